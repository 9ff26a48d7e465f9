"""The logic of tcpv4connect, without tracing."""
import json
import unittest
from unittest import mock

import ctext
import tcpv4connect


class Output(unittest.TestCase):
    def connect(self, *options, comm=b"curl", lport=0, decided=0, outcome="pending", err=0):
        record = tcpv4connect.RECORD.unpack(tcpv4connect.RECORD.pack(
            5 * 10 ** 9, ctext.owner(1469, comm), 1000, 4711, ctext.address("10.201.219.236"),
            ctext.address("54.245.105.25"), lport, 80, 4026531840, decided,
            list(tcpv4connect.OUTCOMES.values()).index(outcome), err, 3, 99))
        args = tcpv4connect.parse_args(options)
        return tcpv4connect.header(args), tcpv4connect.line(args, record, 3 * 10 ** 9, 10 ** 9)

    def test_documented_format(self):
        self.assertEqual(self.connect(), (
            "PID    COMM         SADDR            DADDR            DPORT\n",
            "1469   curl         10.201.219.236   54.245.105.25    80\n"))
        self.assertEqual(self.connect("-tU"), (
            "TIME(s)  UID   PID    COMM         SADDR            DADDR            DPORT\n",
            "2.000    1000  1469   curl         10.201.219.236   54.245.105.25    80\n"))
        self.assertEqual(json.loads(self.connect("--json")[1]), {
            "ts": 6, "pid": 1469, "comm": "curl", "uid": 1000, "ip": 4, "saddr": "10.201.219.236",
            "daddr": "54.245.105.25", "dport": 80, "netns": 4026531840,
            "inode": 4711, "cgroup": None})

    def test_result_of_a_connect(self):
        self.assertEqual(self.connect("-r", lport=40000, decided=5003456000, outcome="ok"), (
            "PID    COMM         SADDR            DADDR            DPORT LPORT MS        RESULT       RETR\n",
            "1469   curl         10.201.219.236   54.245.105.25    80    40000 3.46      ok           3\n"))
        for outcome, code, result, err in (
                ("ok", 0, "ok", None), ("quit", 0, "quit", None), ("failed", 0, "failed", None),
                ("quit", 111, "ECONNREFUSED", "ECONNREFUSED"), ("quit", 9999, "9999", "9999"),
                ("failed", 99, "EADDRNOTAVAIL", "EADDRNOTAVAIL")):
            how = {"lport": 40000, "decided": 5003456789, "outcome": outcome, "err": code}
            self.assertEqual(self.connect("-rtU", **how)[1].split(), [
                "2.000", "1000", "1469", "curl", "10.201.219.236", "54.245.105.25", "80", "40000", "3.46", result, "3"])
            value = json.loads(self.connect("-r", "--json", **how)[1])
            self.assertEqual([value[name] for name in ("ts", "lport", "dport", "ms", "result", "err", "retrans")],
                             [6, 40000, 80, 3.456789, result, err, 3])
        with mock.patch("time.monotonic_ns", return_value=6 * 10 ** 9):
            self.assertEqual(self.connect("-r")[1].split()[-4:], ["N/A", "1000.00", "pending", "3"])
            value = json.loads(self.connect("-r", "--json")[1])
        self.assertEqual([value[name] for name in ("ts", "lport", "ms", "result", "err")],
                         [6, None, 1000.0, "pending", None])

    def test_hostile_comm(self):
        for comm in (b"\x1b[2J", b"a\nb", b"\xff", b'"', b"\\"):
            text = self.connect(comm=comm)[1]
            self.assertTrue(text[:-1].isprintable() and text.isascii(), text)
            value = json.loads(self.connect("--json", comm=comm)[1])
            self.assertEqual(bytes.fromhex(value.get("comm_hex", value["comm"].encode().hex())), comm)


if __name__ == "__main__":
    unittest.main()
