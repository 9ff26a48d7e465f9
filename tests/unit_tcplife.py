"""The logic of tcplife, without tracing."""
import contextlib
import csv
import io
import json
import os
import sys
import unittest

import tcplife

LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
IPV6 = bytes.fromhex("20010db8000000000000000000000001")


def record(comm=b"curl", pid=42, laddr=LOOPBACK, raddr=LOOPBACK, died=3 * 10 ** 9 + 500):
    born, tx, rx = 10 ** 9, 3000, 1023
    return tcplife.RECORD.unpack(tcplife.RECORD.pack(
        tcplife.RECORD.size - 8, 0, born, died, tx, rx, pid, 4026531840, laddr, raddr, 5555, 80, 0, comm))


def lines(*options, **fields):
    args = tcplife.parse_args(options)
    return tcplife.render(args, [record(**fields)], began=2 * 10 ** 9).splitlines()


class Output(unittest.TestCase):
    def test_default_fits_80_columns(self):
        args = tcplife.parse_args([])
        self.assertEqual(tcplife.form_of(args) % tuple(tcplife.column_names(args)),
                         "PID   COMM       LADDR           LPORT RADDR           RPORT TX_KB RX_KB MS\n")
        self.assertEqual(lines(), ["42    curl       127.0.0.1       5555  127.0.0.1       80        2     0 2000.00"])
        self.assertLessEqual(len(lines()[0]), 80)

    def test_wide_fits_ipv6(self):
        full = bytes(range(0x10, 0x20))
        line, = lines("-w", laddr=full, raddr=full)
        self.assertEqual(line.split()[2:5], ["6", "1011:1213:1415:1617:1819:1a1b:1c1d:1e1f", "5555"])

    def test_columns_of_every_form(self):
        for options in ([], ["-w"], ["-s"], ["-t"], ["-T"], ["-stT"], ["-wtT"]):
            args = tcplife.parse_args(options)
            names = tcplife.column_names(args)
            self.assertEqual(len(names), len(tcplife.columns(args, record(), 0, 0)), options)
        self.assertEqual(names[:5], ["TIME", "TIME(s)", "PID", "COMM", "IP"])

    def test_timestamp_counts_from_the_beginning_and_is_never_negative(self):
        self.assertTrue(lines("-t")[0].startswith("1.000 "))
        self.assertTrue(lines("-t", died=10 ** 9)[0].startswith("0.000 "))

    def test_json_is_exact(self):
        line, = lines("--json", raddr=IPV6, laddr=IPV6)
        value = json.loads(line)
        self.assertLess(abs(value.pop("ts") - tcplife.time.time()), 10 ** 9)
        self.assertEqual(value, {
            "pid": 42, "comm": "curl", "ip": 6,
            "laddr": "2001:db8::1", "lport": 5555, "raddr": "2001:db8::1", "rport": 80,
            "tx_bytes": 3000, "rx_bytes": 1023, "ms": 2000.0005, "netns": 4026531840})

    def test_unknown_owner(self):
        self.assertIsNone(json.loads(lines("--json", pid=0, comm=b"")[0])["pid"])

    def test_hostile_comm(self):
        for comm in (b"\x1b[31mred", b"a\nb", b'say "hi"', b"a,b", b"=1+1", b"tab\there", b"\xff\xfe", b"back\\slash",
                     "é".encode(), b"\x7f\x80", b"' or \"", b" "):
            for options in ([], ["-w"], ["-s"]):
                text = tcplife.render(tcplife.parse_args(options), [record(comm=comm)], 0)
                self.assertTrue(text.endswith("\n") and text[:-1].isascii() and text[:-1].isprintable(), (comm, text))
            row, = csv.reader(io.StringIO(lines("-s", comm=comm)[0]))
            self.assertEqual(row[1].encode().decode("unicode_escape").encode("latin-1"), comm)
            name = json.loads(lines("--json", comm=comm)[0])["comm"]
            self.assertEqual(name.encode(errors="surrogateescape"), comm)

    def test_addresses(self):
        self.assertEqual(tcplife.address(LOOPBACK), "127.0.0.1")
        self.assertEqual(tcplife.address(IPV6), "2001:db8::1")
        self.assertEqual(tcplife.address(bytes(16)), "::")


class Arguments(unittest.TestCase):
    def test_values(self):
        args = tcplife.parse_args("-p 181 -L 80,81 -D 443 --duration 2.5 --netns 4026531840".split())
        self.assertEqual((args.pid, args.localport, args.remoteport, args.duration, args.netns),
                         (181, [80, 81], [443], 2.5, 4026531840))

    def test_netns_of_a_process(self):
        args = tcplife.parse_args(["--netns", "/proc/self/ns/net"])
        self.assertEqual(args.netns, os.stat("/proc/self/ns/net").st_ino)

    def test_only_numbers_reach_the_c_text(self):
        args = tcplife.parse_args("-p 181 -L 80,81 -D 443 --netns 4026531840".split())
        for flag in tcplife.cflags(args):
            self.assertRegex(flag, r"^-g0$|^-D[A-Z0-9_]+(\(port\))?=\((true|[0-9]+|[port()=| 0-9]+)\)$")

    def test_errors_of_argparse(self):
        for wrong in (["-p", "x"], ["-p", "٣"], ["-L", "1,,2"], ["-4", "-6"], ["--duration", "1_0"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                tcplife.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2)


class Losses(unittest.TestCase):
    def test_told_once_each(self):
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            seen = tcplife.report({"sessions lost: x": 3}, {})
            tcplife.report({"sessions lost: x": 3}, seen)
            tcplife.report({"sessions lost: x": 5}, seen)
        self.assertEqual(told.getvalue(), "tcplife: 3 sessions lost: x\ntcplife: 2 sessions lost: x\n")


class Imports(unittest.TestCase):
    def test_without_bcc_and_root(self):
        self.assertNotIn("bcc", sys.modules)


if __name__ == "__main__":
    unittest.main()
