"""The logic of tcpv4connect, without tracing."""
import json
import struct
import unittest
from unittest import mock

import tcpv4connect


class Output(unittest.TestCase):
    def connect(self, *options, comm=b"curl", lport=0, decided=0, result=0):
        record = tcpv4connect.RECORD.unpack(tcpv4connect.RECORD.pack(
            5 * 10 ** 9, struct.pack("=I16s", 1469, comm), 1000, 4026531840,
            b"\x0a\xc9\xdb\xec", b"\x36\xf5\x69\x19", 80, lport, decided, result))
        args = tcpv4connect.parse_args(options)
        return tcpv4connect.header(args), tcpv4connect.line(args, record, 5 * 10 ** 9, 0)

    def test_documented_format(self):
        self.assertEqual(self.connect(), (
            "PID    COMM         SADDR            DADDR            DPORT\n",
            "1469   curl         10.201.219.236   54.245.105.25    80\n"))
        self.assertEqual(self.connect("-U")[1].split()[0], "1000")
        value = json.loads(self.connect("--json")[1])
        self.assertEqual(sorted(value), sorted("ts pid comm uid ip saddr daddr dport netns".split()))

    def test_result_of_a_connect(self):
        self.assertEqual(self.connect("-r", lport=40000, decided=5003456000), (
            "PID    COMM         SADDR            DADDR            DPORT LPORT MS        RESULT\n",
            "1469   curl         10.201.219.236   54.245.105.25    80    40000 3.46      ok\n"))
        for code, result, err in ((0, "ok", None), (-1, "quit", None), (-2, "failed", None),
                                  (111, "ECONNREFUSED", "ECONNREFUSED"), (9999, "9999", "9999")):
            how = {"lport": 40000, "decided": 5003456789, "result": code}
            self.assertEqual(self.connect("-rtTU", **how)[1].split()[-1], result)
            value = json.loads(self.connect("-r", "--json", **how)[1])
            self.assertEqual([value[name] for name in ("lport", "ms", "result", "err")],
                             [40000, 3.456789, result, err])
        with mock.patch("time.monotonic_ns", return_value=6 * 10 ** 9):
            self.assertEqual(self.connect("-r")[1].split()[-3:], ["N/A", "1000.00", "pending"])
            value = json.loads(self.connect("-r", "--json")[1])
        self.assertEqual([value[name] for name in ("ts", "lport", "ms", "result", "err")],
                         [5.0, None, 1000.0, "pending", None])

    def test_hostile_comm(self):
        for comm in (b"\x1b[2J", b"a\nb", b"\xff", b'"', b"\\"):
            text = self.connect(comm=comm)[1]
            self.assertTrue(text[:-1].isprintable() and text.isascii(), text)
            value = json.loads(self.connect("--json", comm=comm)[1])
            self.assertEqual(bytes.fromhex(value.get("comm_hex", value["comm"].encode().hex())), comm)


if __name__ == "__main__":
    unittest.main()
