"""The logic of tcplife -c, without tracing."""
import json
import math
import os
import random
import types
import unittest
from unittest import mock

import ctext
import tcplife

TABLE = """\
COMM       ROLE    RADDR           PORT      N FAIL  TX_KB  RX_KB   P50_MS   P99_MS
shop       connect 10.30.0.32      7001      3    2      8      2     8.00     8.00
"""
HISTOGRAM = """
shop connect 10.30.0.32 7001
     msecs               : count     distribution
         0 -> 1          : 2        |********************                    |
         2 -> 3          : 0        |                                        |
         4 -> 7          : 1        |**********                              |
         8 -> 15         : 4        |****************************************|
"""


def record(comm=b"shop", pid=42, raddr="10.30.0.32", role="connect", ports=(40000, 7001), born=10 ** 9, ready=0,
           ms=8.0, tx=3000, rx=1000, retrans=1, end="local", err=0, scope=0):
    return tcplife.RECORD.unpack(tcplife.RECORD.pack(
        born, ready, ctext.owner(pid, comm), list(tcplife.ROLES.values()).index(role), 1, 9, 4711, 0, 0,
        (born or 10 ** 9) + round(ms * 1e6),
        tx, rx, ctext.address("192.0.2.1"), ctext.address(raddr, scope), *ports, 4026531840, 800, retrans,
        list(tcplife.ENDS.values()).index(end), err,
        4, 900, 10, 2, 1448, 99))


def table(*records, start=10 ** 9, **options):
    args = types.SimpleNamespace(**{"json": False, "extra": False, "wide": False, "unit": False, "histogram": False,
                                    "by_peer": False, "rows": None, "prometheus": None, **options})
    made = tcplife.Table(args, start)
    for one in records:
        made.add(one)
    return made


def rows(*records, **options):
    """Returns the columns of each row, without those that are empty."""
    return [line.split() for line in table(*records, **options).text().splitlines()[1:]]


def objects(*records, **options):
    return [json.loads(line) for line in table(*records, json=True, **options).text().splitlines()]


class Text(unittest.TestCase):
    def setUp(self):
        patch = mock.patch("os.isatty", lambda fd: False)
        patch.start()
        self.addCleanup(patch.stop)

    def test_table(self):
        made = table(record(), record(end="abort"), record(end="quit", err=111))
        self.assertEqual(made.text(), TABLE)
        self.assertEqual(made.text(), TABLE.splitlines(True)[0])        # starts again

    def test_extra_columns(self):
        made = table(record(ready=1004000000), record(end="quit", err=111), record(end="open"), extra=True)
        names, values = [line.split() for line in made.text().splitlines()]
        self.assertEqual(names[10:], ["CONN_P99", "ACC_P99", "RETR", "OPEN", "WORST"])
        self.assertEqual(values[4:], ["2", "1", "5", "1", "8.00", "8.00", "3.98", "N/A", "2", "1", "refused"])
        row, = rows(record(role="accept", ports=(80, 40000), ready=1002000000), extra=True)
        self.assertEqual(row[10:], ["N/A", "1.97", "1", "0", "-"])

    def test_columns_are_aligned(self):
        records = [record(), record(comm=b"a longer name", end="abort"), record(role="accept"), record(role=None),
                   record(raddr="10.1.1.1"), record(end="open", comm=b"idle")]
        for wide, width in (False, 83), (True, 113):
            for extra in "", "  1234.00      N/A":
                lines = table(*records, wide=wide, extra=bool(extra), rows=4).text().splitlines()
                self.assertEqual({len(line[:width + len(extra)]) for line in lines}, {width + len(extra)})
                for line in lines:
                    self.assertRegex(line, r"^.{%d} (ROLE|connect|accept|N/A|   ) " % (16 if wide else 10))

    def test_keys(self):
        self.assertEqual([row[:5] for row in rows(
            record(), record(pid=43), record(comm=b"web", role="accept", ports=(80, 40000), raddr="10.0.0.1"),
            record(comm=b"web", role="accept", ports=(80, 40001), raddr="10.0.0.2"),
            record(role=None, ports=(22, 50000)), record(role=None, ports=(50001, 22)), record(ports=(1, 7002)),
            record(pid=0), record(raddr="2001:db8::1"))], [
                ["shop", "N/A", "10.30.0.32", "22", "2"], ["shop", "connect", "10.30.0.32", "7001", "2"],
                ["web", "accept", "*", "80", "2"], ["N/A", "connect", "10.30.0.32", "7001", "1"],
                ["shop", "connect", "10.30.0.32", "7002", "1"], ["shop", "connect", "2001:db8::1", "7001", "1"]])
        self.assertEqual([row[:5] for row in rows(
            record(role="accept", ports=(80, 40000), raddr="10.0.0.1"),
            record(role="accept", ports=(80, 40001), raddr="10.0.0.2"), by_peer=True)],
            [["shop", "accept", "10.0.0.1", "80", "1"], ["shop", "accept", "10.0.0.2", "80", "1"]])

    def test_rows_of_the_same_text_are_one(self):
        row, = rows(record(raddr="2001:db8::1"), record(raddr="2001:db8::1", scope=2), record(
            comm=b"shop\0rest", raddr="2001:db8::1"))
        self.assertEqual(row[4:8], ["3", "0", "8", "2"])

    def test_order(self):
        records = [record(comm=b"b")] * 5 + [record(comm=b"a")] * 5 + [record(comm=b"c")] * 9
        records += [record(comm=b"d", end="abort")] + [record(comm=b"e", end="abort")] * 2
        self.assertEqual([row[0] for row in rows(*records)], list("edcab"))

    def test_what_does_not_fit(self):
        records = [record(comm=b"%d" % n, ms=n + 1) for n in range(9)] + [record(comm=b"x", end="abort")] * 2
        self.assertEqual(len(rows(*records, rows=10)), 10)
        *shown, others = rows(*records, rows=3, extra=True)
        self.assertEqual([row[0] for row in shown], ["x", "0"])
        self.assertEqual(others, ["(others)", "8", "0", "23", "7", "5.04", "9.00", "N/A", "N/A", "8", "0", "-"])
        self.assertEqual([row[:3] for row in rows(*records, rows=1)], [["(others)", "11", "2"]])
        self.assertEqual(len(objects(*records, rows=3)), 10)

    def test_terminal(self):
        records = [record(comm=b"%d" % n) for n in range(50)]
        with mock.patch("os.isatty", lambda fd: fd == 1), mock.patch.dict(os.environ):
            os.environ.pop("LINES", None)
            for lines, shown in (24, 22), (1, 1), (0, 22):      # 0: a terminal whose size is not known
                with mock.patch("os.get_terminal_size", lambda fd, lines=lines: os.terminal_size((80, lines))):
                    self.assertEqual(len(rows(*records)), shown)
                    self.assertEqual(len(rows(*records, rows=30)), 30)
                    self.assertEqual(len(objects(*records)), 50)
        self.assertEqual(len(rows(*records)), 50)

    def test_no_more_keys_than_fit(self):
        records = [record(comm=b"%d" % n, ready=1001000000) for n in range(9)] * 2
        with mock.patch("tcplife.MAX_ROWS", 5):
            *shown, others = rows(*records)
            self.assertEqual([row[4] for row in shown], ["2"] * 5)
            self.assertEqual(others[:3], ["(others)", "8", "0"])
            *shown, others = rows(*records, rows=3)
            self.assertEqual(([row[4] for row in shown], others[1]), (["2"] * 2, "14"))
            *shown, others = objects(*records)
            self.assertEqual([row["n"] for row in shown], [2] * 5)
            self.assertEqual([others[name] for name in ("comm", "role", "raddr", "port", "n", "others")],
                             [None, None, None, None, 8, True])
            self.assertEqual(others["connect_ms"]["max"], 1)
            self.assertEqual(list(others)[-1], "others")
            self.assertEqual(len(rows(*records[:5])), 5)

    def test_open_sessions(self):
        made = table(record(end="open"), record(end="open", comm=b"idle"), record(), extra=True)
        self.assertEqual([(row[0], row[4], row[13]) for row in map(str.split, made.text().splitlines()[1:])],
                         [("shop", "1", "1"), ("idle", "0", "1")])
        made.add(record(end="open", comm=b"idle"))
        row = made.text().splitlines()[1].split()
        self.assertEqual(row[4:], ["0", "0", "0", "0", "N/A", "N/A", "N/A", "N/A", "0", "1", "-"])

    def test_hostile_comm(self):
        for comm in (b"\x1b[31mred", b"a\nb", b'say "hi"', b"\xff\xfe", b"back\\slash", "é".encode(), b"\xed\xa0\x80"):
            for options in {}, {"wide": True}, {"histogram": True}:
                text = table(record(comm=comm), **options).text()
                self.assertTrue(text.isascii() and text.replace("\n", "").isprintable(), text)
            text = table(record(comm=comm), json=True).text()
            value = json.loads(text)
            self.assertTrue(text.isascii() and "\n" not in text[:-1], text)
            self.assertEqual(bytes.fromhex(value["comm_hex"]) if "comm_hex" in value else value["comm"].encode(), comm)

    def test_histogram(self):
        times = 0, 1.9, 5, 8, 9, 12, 15.9
        self.assertEqual(table(*[record(ms=ms) for ms in times], histogram=True).text(), HISTOGRAM)
        self.assertEqual(table(record(end="open"), record(comm=b"b"), record(comm=b"c"), histogram=True, rows=2).text(
            ).count("\n(others)\n"), 1)
        self.assertEqual(len(table(record(end="open"), histogram=True).text().splitlines()), 3)


class Json(unittest.TestCase):
    def test_exact(self):
        with mock.patch("time.time", lambda: 1795330800.25):
            text = table(record(ready=1002500000), record(end="quit", err=111), record(end=None), record(end=None),
                         record(end="open"), json=True).text()
        self.assertEqual(text, '{"ts":1795330800.250000,"comm":"shop","role":"connect","raddr":"10.30.0.32",'
                         '"port":7001,"n":4,"ends":{"N/A":2,"local":1,"refused":1},"open":1,"tx_bytes":12000,'
                         '"rx_bytes":4000,"retrans":4,"ms":{"p50":8.000000,"p99":8.000000,"max":8.000000},'
                         '"connect_ms":{"p50":2.488966,"p99":2.488966,"max":2.500000},"accept_ms":null}\n')

    def test_nulls(self):
        row, = objects(record(pid=0, comm=b"", role="accept", ports=(80, 1), end="open"))
        self.assertEqual([row[name] for name in ("comm", "role", "raddr", "port", "ms")],
                         [None, "accept", None, 80, None])
        row, = objects(record(role=None))
        self.assertEqual((row["role"], row["raddr"]), (None, "10.30.0.32"))
        self.assertNotIn("others", row)
        self.assertEqual(table(json=True).text(), "")

    def test_names_of_ends(self):
        row, = objects(record(end="abort", err=71), record(end="abort", err=9999), record(end="both"))
        self.assertEqual(row["ends"], {"9999": 1, "EPROTO": 1, "both": 1})


class Times(unittest.TestCase):
    def test_waits(self):
        for role, waits in ("connect", (2, None)), ("accept", (None, 2)), (None, (None, None)):
            row, = objects(record(role=role, ready=1002000000))
            self.assertEqual(tuple(row[name] and row[name]["max"] for name in ("connect_ms", "accept_ms")), waits)
            self.assertEqual(row["ms"]["max"], 8)
        row, = objects(record(born=0, ready=5))
        self.assertIsNone(row["connect_ms"])

    def test_session_from_before_the_start(self):
        self.assertEqual(objects(record(born=0, ms=3))[0]["ms"]["max"], 3)
        self.assertEqual(objects(record(born=0, ms=3), start=10 ** 10)[0]["ms"], {"p50": 0, "p99": 0, "max": 0})

    def test_no_time_and_less(self):
        self.assertEqual(objects(record(ms=0), record(ms=-0.001))[0]["ms"], {"p50": 0, "p99": 0, "max": 0})

    def test_percentiles(self):
        random.seed(1)
        for n in [*range(1, 60), 99, 100, 101, 199, 200, 201, 1000, 5000]:
            for spread in 0.01, 1, 5:
                times = sorted(min(10 ** 17, int(random.lognormvariate(16, spread))) for _ in range(n))
                row = tcplife.Row()
                for ns in random.sample(times, n):
                    row.add_time(1, ns)
                p50, p99, longest = row.figures(1)
                self.assertEqual(longest, times[-1] / 1e6)
                for value, percent in (p50, 50), (p99, 99):
                    exact = times[math.ceil(n * percent / 100) - 1] / 1e6
                    self.assertLessEqual(abs(value - exact), 0.02 * exact + 1e-12, (n, spread, percent))
                    self.assertLessEqual(value, longest)

    def test_small_times(self):
        for ns in range(1, 2000):
            row = tcplife.Row()
            row.add_time(0, ns)
            row.add_time(0, 10 ** 9)
            self.assertLessEqual(abs(row.figures(0)[0] * 1e6 - ns), 0.02 * ns + 1e-9)


if __name__ == "__main__":
    unittest.main()
