"""The logic of tcpaccept, without tracing."""
import json
import unittest

import ctext
import tcpaccept

LADDR, RADDR = "192.0.2.1", "198.51.100.2"


class Output(unittest.TestCase):
    def accept(self, *options, comm=b"sshd", laddr=LADDR, raddr=RADDR):
        record = tcpaccept.RECORD.unpack(tcpaccept.RECORD.pack(
            5 * 10 ** 9, ctext.owner(907, comm), ctext.address(laddr), ctext.address(raddr), 22, 40000,
            4026531840, 4711, 99))
        args = tcpaccept.parse_args(options)
        return tcpaccept.header(args), tcpaccept.line(args, record, 3 * 10 ** 9, 10 ** 9)

    def test_documented_format(self):
        self.assertEqual(self.accept(), (
            "PID    COMM         IP RADDR            LADDR            LPORT\n",
            "907    sshd         4  198.51.100.2     192.0.2.1        22\n"))
        self.assertEqual(self.accept("-t"), (
            "TIME(s)  PID    COMM         IP RADDR            LADDR            LPORT\n",
            "2.000    907    sshd         4  198.51.100.2     192.0.2.1        22\n"))
        self.assertEqual(self.accept("-r"), (
            "PID    COMM         IP RADDR            RPORT LADDR            LPORT\n",
            "907    sshd         4  198.51.100.2     40000 192.0.2.1        22\n"))
        self.assertEqual(self.accept(laddr="2001:db8::1", raddr="2001:db8::2")[1].split(),
                         ["907", "sshd", "6", "2001:db8::2", "2001:db8::1", "22"])

    def test_json(self):
        self.assertEqual(self.accept("--json")[0], "")
        self.assertEqual(json.loads(self.accept("--json")[1]), {
            "ts": 6, "pid": 907, "comm": "sshd", "ip": 4, "laddr": LADDR, "lport": 22, "raddr": RADDR, "rport": 40000,
            "netns": 4026531840, "inode": 4711, "cgroup": None})
        value = json.loads(self.accept("--json", laddr="2001:db8::1", raddr="2001:db8::2")[1])
        self.assertEqual([value[name] for name in ("ip", "laddr", "raddr")], [6, "2001:db8::1", "2001:db8::2"])

    def test_hostile_comm(self):
        for comm in (b"\x1b[2J", b"a\nb", b"\xff", b'"', b"\\"):
            text = self.accept(comm=comm)[1]
            self.assertTrue(text[:-1].isprintable() and text.isascii(), text)
            value = json.loads(self.accept("--json", comm=comm)[1])
            self.assertEqual(bytes.fromhex(value.get("comm_hex", value["comm"].encode().hex())), comm)


if __name__ == "__main__":
    unittest.main()
