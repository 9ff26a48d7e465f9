"""The logic of tcplife, without tracing."""
import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
import unittest
from unittest import mock

import ctext
import tcplife

LADDR, RADDR = "192.0.2.1", "198.51.100.2"
LADDR6, RADDR6 = "2001:db8::1", "2001:db8::2"


def record(comm=b"curl", pid=42, laddr=LADDR, raddr=RADDR, born=10 ** 9, ready=0, died=3 * 10 ** 9 + 500,
           role="connect", srtt=0, end="local", err=0, seen=(2000, 23), min_rtt=900):
    """A record. Each number in it is another one."""
    tx, rx, retrans, syn = 3000, 1023, 7, 1
    return tcplife.RECORD.unpack(tcplife.RECORD.pack(
        born, ready, ctext.owner(pid, comm), list(tcplife.ROLES.values()).index(role), syn, 9, 4711, *seen, died,
        tx, rx,
        ctext.address(laddr), ctext.address(raddr), 5555, 80, 4026531840, srtt, retrans,
        list(tcplife.ENDS.values()).index(end), err, 4, min_rtt, 10, 2, 1448, 99))


def line(*options, **fields):
    return tcplife.line(tcplife.parse_args(options), record(**fields), 2 * 10 ** 9, 0)


HOSTILE = (b"\x1b[31mred", b"a\nb", b'say "hi"', b"a,b", b"=1+1", b"tab\there", b"\xff\xfe", b"back\\slash",
           "é".encode(), b"\x7f\x80", b"' or \"", b" ", "\uffff".encode(), "\u202e".encode(), b"\xed\xa0\x80",
           b"\xf0\x9f\x98")


class Output(unittest.TestCase):
    def test_default_fits_80_columns(self):
        self.assertEqual(tcplife.header(tcplife.parse_args([])),
                         "PID   COMM       LADDR           LPORT RADDR           RPORT TX_KB RX_KB MS\n")
        self.assertEqual(line(), "42    curl       192.0.2.1       5555  198.51.100.2    80        2     0 2000.00\n")
        self.assertLessEqual(len(line()), 81)

    def test_wide_fits_ipv6(self):
        local, remote = "1011:1213:1415:1617:1819:1a1b:1c1d:1e1f", "2021:2223:2425:2627:2829:2a2b:2c2d:2e2f"
        self.assertEqual(tcplife.header(tcplife.parse_args(["-w"])),
                         "PID     COMM             IP LADDR                                   LPORT "
                         "RADDR                                   RPORT TX_KB RX_KB MS\n")
        self.assertEqual(line("-w", laddr=local, raddr=remote),
                         "42      curl             6  %s 5555  %s 80        2     0 2000.00\n" % (local, remote))

    def test_columns_of_every_form(self):
        for options in ([], ["-w"], ["-t"], ["-T"], ["-x"], ["-wx"], ["-wtT"]):
            names = tcplife.header(tcplife.parse_args(options)).split()
            self.assertEqual(len(names), len(line(*options).split()), options)
        self.assertEqual(names[:5], ["TIME", "TIME(s)", "PID", "COMM", "IP"])
        names = tcplife.header(tcplife.parse_args(["-stT"]))
        self.assertEqual(names, "TIME,TIME(s),PID,COMM,IP,LADDR,LPORT,RADDR,RPORT,TX_KB,RX_KB,MS\n")
        self.assertEqual(len(line("-stT").split(",")), 12)

    def test_timestamp_counts_from_the_start_and_is_never_negative(self):
        self.assertTrue(line("-t").startswith("1.000 "))
        self.assertTrue(line("-t", died=10 ** 9).startswith("0.000 "))

    def test_date_and_milliseconds(self):
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="UTC"):
            time.tzset()
            self.assertTrue(line("-TT", died=1234567890 * 10 ** 6).startswith("1970-01-15 06:56:07.890 "))

    def test_unit(self):
        self.assertEqual(tcplife.header(tcplife.parse_args(["--unit"])).split()[:3], ["PID", "COMM", "UNIT"])
        self.assertEqual(line("--unit")[:30], "42    curl       N/A          ")
        self.assertEqual(line("-s", "--unit").split(",")[:4], ["42", "curl", "N/A", "4"])

    def test_every_column_in_its_place(self):
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="UTC"):
            time.tzset()
            self.assertEqual(line("-sxtT", ready=10 ** 9 + 1234567, srtt=8 * 2345),
                             "00:00:03,1.000,42,curl,4,192.0.2.1,5555,198.51.100.2,80,2,0,2000.00,"
                             "connect,1.23,2.35,7,local,N/A,4\n")
            columns = line("-sxtT", ready=10 ** 9 + 1234567, srtt=8 * 2345).rstrip().split(",")
            self.assertEqual(line("-xtTw", ready=10 ** 9 + 1234567, srtt=8 * 2345).split(), columns)
            self.assertEqual(line("-xtT", ready=10 ** 9 + 1234567, srtt=8 * 2345).split(), columns[:4] + columns[5:])

    def test_json_is_exact(self):
        self.assertEqual(json.loads(line("--json", laddr=LADDR6, raddr=RADDR6, srtt=8008, ready=1250000000, err=104)), {
            "ts": 3.000001, "pid": 42, "comm": "curl", "ip": 6,
            "laddr": "2001:db8::1", "lport": 5555, "raddr": "2001:db8::2", "rport": 80,
            "tx_bytes": 3000, "rx_bytes": 1023, "ms": 2000.0005, "netns": 4026531840,
            "role": "connect", "end": "reset", "err": "ECONNRESET", "connect_ms": 250, "accept_ms": None,
            "srtt_us": 1001, "retrans": 7, "partial": False, "inode": 4711, "cgroup": None, "ooo": 4, "min_rtt_us": 900,
            "cwnd": 10, "mss": 1448, "lost": 2})
        self.assertIsNone(json.loads(line("--json", min_rtt=0xffffffff))["min_rtt_us"])
        value = json.loads(line("--json"))
        self.assertEqual([value[name] for name in ("ip", "laddr", "raddr", "end", "err", "connect_ms", "srtt_us")],
                         [4, LADDR, RADDR, "local", None, None, None])

    def test_waits(self):
        for role, waits in (("connect", (250, None)), ("accept", (None, 250)), (None, (None, None))):
            value = json.loads(line("--json", role=role, ready=1250000000, srtt=8001))
            self.assertEqual((value["role"], value["connect_ms"], value["accept_ms"]), (role, *waits))
            self.assertEqual(value["srtt_us"], 1000)

    def test_how_it_ended(self):
        for end, err, columns in (("both", 0, "both both None"), ("abort", 104, "reset reset ECONNRESET"),
                                  ("quit", 110, "timeout timeout ETIMEDOUT"), ("abort", 71, "EPROTO None EPROTO"),
                                  ("abort", 9999, "9999 None 9999"), (None, 0, "N/A None None")):
            value, column = json.loads(line("--json", end=end, err=err)), line("-x", end=end, err=err).split()[-3]
            self.assertEqual("%s %s %s" % (column, value["end"], value["err"]), columns)

    def test_extra_columns(self):
        self.assertEqual(tcplife.header(tcplife.parse_args(["-x"])).split()[-8:],
                         ["MS", "ROLE", "CONN_MS", "RTT_MS", "RETR", "END", "ACC_MS", "OOO"])
        self.assertEqual(line("-x", ready=10 ** 9 + 1234567, srtt=8 * 2345).split()[-8:],
                         ["2000.00", "connect", "1.23", "2.35", "7", "local", "N/A", "4"])
        self.assertEqual(line("-x", ready=10 ** 9 + 1234567, role="accept").split()[-7:],
                         ["accept", "N/A", "N/A", "7", "local", "1.23", "4"])
        self.assertEqual(line("-xs", role=None, born=0), "42,curl,4,192.0.2.1,5555,198.51.100.2,80,2,0,"
                                                         ">1000.00,N/A,N/A,N/A,7,local,N/A,4\n")

    def test_session_from_before_the_start(self):
        self.assertEqual(line(born=0, role=None).split()[-1], ">1000.00")
        self.assertEqual(line(born=0, role=None, died=1).split()[-1], ">0.00")
        value = json.loads(line("--json", born=0, role=None))
        self.assertEqual((value["partial"], value["ms"], value["role"]), (True, 1000.0005, None))

        self.assertEqual(line("-x", born=0, role="connect", ready=5).split()[-8:-6], [">1000.00", "connect"])
        value = json.loads(line("--json", "--existing", born=0, role="accept", ready=5))
        self.assertEqual((value["role"], value["connect_ms"], value["accept_ms"]), ("accept", None, None))
        self.assertEqual((value["tx_bytes_seen"], value["rx_bytes_seen"]), (2000, 23))

    def test_open_session(self):
        self.assertEqual(line(end="open").split()[-1], "2000.00+")
        self.assertEqual(line("-x", end="open", born=0).split()[-8], ">1000.00+")
        self.assertTrue(line("-sx", end="open").endswith(",2000.00+,connect,N/A,N/A,7,open,N/A,4\n"))
        value = json.loads(line("--json", end="open"))
        self.assertEqual((value["end"], value["err"], value["ms"]), ("open", None, 2000.0005))

    def test_unknown_owner(self):
        value = json.loads(line("--json", pid=0, comm=b""))
        self.assertEqual((value["pid"], value["comm"]), (None, None))
        self.assertEqual(line(pid=0, comm=b"").split()[:2], ["N/A", "N/A"])

    def test_hostile_comm(self):
        for comm in HOSTILE:
            for options in ([], ["-w"], ["-s"]):
                text = line(*options, comm=comm)
                self.assertTrue(text.endswith("\n") and text[:-1].isascii() and text[:-1].isprintable(), (comm, text))
            row, = csv.reader(io.StringIO(line("-s", comm=comm)))
            self.assertEqual(row[1].encode().decode("unicode_escape").encode("latin-1"), comm)

    def test_json_is_text_that_strict_readers_take(self):
        for comm in HOSTILE:
            text = line("--json", comm=comm)
            value = json.loads(text)
            self.assertTrue(text.isascii() and "\n" not in text[:-1] and not re.search(r"[:,] ", text), text)
            value["comm"].encode()              # no lone surrogates
            raw = bytes.fromhex(value["comm_hex"]) if "comm_hex" in value else value["comm"].encode()
            self.assertEqual(raw, comm)
        self.assertEqual(json.loads(line("--json", comm="é".encode()))["comm"], "é")
        self.assertEqual(json.loads(line("--json", comm=b"\xff"))["comm"], "\\xff")


class Arguments(unittest.TestCase):
    def test_values(self):
        args = tcplife.parse_args("-p 1 -L 80,81 -D 443 --duration 2.5".split())
        self.assertEqual((args.pid, args.lport, args.rport, args.duration), ([1], [80, 81], [443], 2.5))

    def test_netns(self):
        inode = os.stat("/proc/self/ns/net").st_ino
        for text in "/proc/self/ns/net", str(inode):
            self.assertEqual(tcplife.parse_args(["--netns", text]).netns, inode)

    def test_bad_arguments_exit_2(self):
        for wrong in (["-p", "x"], ["-p", "٣"], ["-L", "1,,2"], ["-4", "-6"], ["--duration", "1_0"], ["-i", "0"],
                      ["-i", "1", "--failed"], ["--rows", "3"], ["-c", "-s"], ["-c", "--rows", "0"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                tcplife.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2)


class Imports(unittest.TestCase):
    def test_without_bcc_and_root(self):
        names = ", ".join([*ctext.NAMES.split(), "btfheaders"])
        subprocess.run([sys.executable, "-c", "import sys, %s; assert 'bcc' not in sys.modules" % names], check=True)


if __name__ == "__main__":
    unittest.main()
