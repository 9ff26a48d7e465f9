"""The logic of tcpaccept, without tracing."""
import json
import struct
import unittest

import tcpaccept

LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"


class Output(unittest.TestCase):
    def accept(self, *options, comm=b"sshd"):
        record = tcpaccept.RECORD.unpack(tcpaccept.RECORD.pack(
            5 * 10 ** 9, struct.pack("=I16s", 907, comm), 4026531840, LOOPBACK, LOOPBACK, 22, 40000))
        args = tcpaccept.parse_args(options)
        return tcpaccept.header(args), tcpaccept.line(args, record, 5 * 10 ** 9, 0)

    def test_documented_format(self):
        self.assertEqual(self.accept(), (
            "PID    COMM         IP RADDR            LADDR            LPORT\n",
            "907    sshd         4  127.0.0.1        127.0.0.1        22\n"))
        self.assertEqual(self.accept("-t"), (
            "TIME(s)  PID    COMM         IP RADDR            LADDR            LPORT\n",
            "0.000    907    sshd         4  127.0.0.1        127.0.0.1        22\n"))
        self.assertEqual(self.accept("-r")[1].split()[4], "40000")
        self.assertEqual(self.accept("-r")[0].split()[4], "RPORT")

    def test_hostile_comm(self):
        for comm in (b"\x1b[2J", b"a\nb", b"\xff", b'"', b"\\"):
            text = self.accept(comm=comm)[1]
            self.assertTrue(text[:-1].isprintable() and text.isascii(), text)
            value = json.loads(self.accept("--json", comm=comm)[1])
            self.assertEqual(bytes.fromhex(value.get("comm_hex", value["comm"].encode().hex())), comm)


if __name__ == "__main__":
    unittest.main()
