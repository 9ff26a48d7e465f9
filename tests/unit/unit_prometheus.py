"""The logic of tcplife --prometheus, without tracing."""
import collections
import math
import os
import random
import re
import tempfile
import unittest
from unittest import mock

import ctext
import tcplife
import unit_count

PROM = """\
# HELP tcplife_sessions_total TCP sessions that ended.
# TYPE tcplife_sessions_total counter
tcplife_sessions_total{comm="shop",role="connect",port="7001",end="local"} 2
tcplife_sessions_total{comm="shop",role="connect",port="7001",end="refused"} 1
# HELP tcplife_sent_bytes_total Bytes of these sessions that the peer acknowledged.
# TYPE tcplife_sent_bytes_total counter
tcplife_sent_bytes_total{comm="shop",role="connect",port="7001"} 9000
tcplife_sent_bytes_total{comm="(others)",role="",port=""} 0
# HELP tcplife_received_bytes_total Bytes of these sessions that were received.
# TYPE tcplife_received_bytes_total counter
tcplife_received_bytes_total{comm="shop",role="connect",port="7001"} 3000
tcplife_received_bytes_total{comm="(others)",role="",port=""} 0
# HELP tcplife_duration_seconds How long these sessions lasted.
# TYPE tcplife_duration_seconds histogram
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="0.001"} 0
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="0.01"} 2
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="0.1"} 2
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="1"} 2
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="10"} 3
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="100"} 3
tcplife_duration_seconds_bucket{comm="shop",role="connect",port="7001",le="+Inf"} 3
tcplife_duration_seconds_sum{comm="shop",role="connect",port="7001"} 2.516
tcplife_duration_seconds_count{comm="shop",role="connect",port="7001"} 3
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="0.001"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="0.01"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="0.1"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="1"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="10"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="100"} 0
tcplife_duration_seconds_bucket{comm="(others)",role="",port="",le="+Inf"} 0
tcplife_duration_seconds_sum{comm="(others)",role="",port=""} 0.0
tcplife_duration_seconds_count{comm="(others)",role="",port=""} 0
# HELP tcplife_open TCP sessions that are open.
# TYPE tcplife_open gauge
tcplife_open{comm="shop",role="connect",port="7001"} 1
tcplife_open{comm="(others)",role="",port=""} 0
# HELP tcplife_lost_total Events that tcplife knows it missed.
# TYPE tcplife_lost_total counter
tcplife_lost_total{what="ring_full"} 0
tcplife_lost_total{what="map_full"} 0
tcplife_lost_total{what="unaccepted_full"} 0
tcplife_lost_total{what="end_unseen"} 7
tcplife_lost_total{what="probe_skipped"} 0
# HELP tcplife_start_time_seconds Unix time at which counting started.
# TYPE tcplife_start_time_seconds gauge
tcplife_start_time_seconds{} 1795330800.25
"""
# What the format allows in a line, as a reader of it would take it apart.
LINE = re.compile(r'(tcplife_\w+)\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (\S+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def table(*records, **options):
    return unit_count.table(*records, prometheus="a.prom", **options)


def text(made, knows_open=True):
    """Returns what is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.prom")
        tcplife.publish(path, made.metrics(knows_open), 1795330800.25)
        with open(path) as file:
            return file.read()


def series(made, knows_open=True):
    """Returns {(name, labels): value} of what is written, without what is 0 because there are no others."""
    found = {}
    for line in text(made, knows_open).splitlines():
        if not line.startswith("#"):
            name, labels, value = LINE.fullmatch(line).groups()
            key = name[len("tcplife_"):], ",".join(value for _, value in LABEL.findall(labels))
            assert key not in found, key
            found[key] = float(value)
    return {key: value for key, value in found.items() if value or not key[1].startswith("(others)")}


def one_of(values):
    return random.sample(values, 1)[0]


def of(found, name):
    return {labels: value for (one, labels), value in found.items() if one == name}


class Metrics(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        patch = mock.patch.dict(tcplife.LOST, dict(zip(tcplife.LOSSES.values(), (0, 0, 0, 7, 0))), clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_text(self):
        """To the letter: text format 0.0.4."""
        record = unit_count.record
        self.assertEqual(text(table(record(), record(pid=43, raddr="10.30.0.31"), record(ms=2500, end="quit", err=111),
                                    record(end="open"))), PROM)
        self.assertEqual(len(tcplife.CAUSES), len(tcplife.LOSSES))

    def test_sums_go_on(self):
        made = table(unit_count.record())
        for n in range(1, 4):
            found = series(made)
            self.assertEqual(of(found, "sessions_total"), {"shop,connect,7001,local": n})
            self.assertEqual(of(found, "sent_bytes_total"), {"shop,connect,7001": 3000 * n})
            made.add(unit_count.record())

    def test_keys(self):
        """No remote address, and no port of a client, as far as that is known."""
        record = unit_count.record
        found = series(table(
            *[record(raddr="10.0.0.%d" % n, ports=(40000 + n, 7001)) for n in range(9)],
            *[record(raddr="10.0.0.%d" % n, ports=(80, 50000 + n), role="accept", comm=b"web") for n in range(9)],
            *[record(ports=ports, role=None) for ports in ((22, 50000), (50001, 22))], record(pid=0),
            record(pid=0, ports=(80, 1), role="accept", end="abort", err=71)))
        self.assertEqual(of(found, "sessions_total"), {
            "shop,connect,7001,local": 9, "web,accept,80,local": 9, "shop,N/A,22,local": 2, "N/A,connect,7001,local": 1,
            "N/A,accept,80,EPROTO": 1})

    def test_open_sessions(self):
        """How many there are now: 0 for those who have had some, and no value at all if that is not known."""
        record = unit_count.record
        made = table(record(end="open"), record(end="open"), record(comm=b"idle", end="open"))
        self.assertEqual(of(series(made), "open"), {"shop,connect,7001": 2, "idle,connect,7001": 1})
        made.add(record(end="open"))
        made.add(record())
        found = series(made)
        self.assertEqual(of(found, "open"), {"shop,connect,7001": 1, "idle,connect,7001": 0})
        self.assertEqual(of(found, "sessions_total"), {"shop,connect,7001,local": 1})
        self.assertEqual(of(found, "duration_seconds_count"), {"shop,connect,7001": 1, "idle,connect,7001": 0})
        self.assertEqual(of(series(made, knows_open=False), "open"), {})

    def test_no_more_series_than_fit(self):
        records = [unit_count.record(comm=b"%d" % n, end=end) for n in range(9) for end in ("local", "abort", "open")]
        with mock.patch("tcplife.MAX_SERIES", 30 + 5 * 14):
            made = table(*records * 2)
            found = series(made)
            self.assertEqual(len(of(found, "sent_bytes_total")), 6)
            self.assertEqual(len(of(found, "sessions_total")), 12)
            self.assertEqual(found["sessions_total", "(others),,,abort"], 8)
            self.assertEqual((found["open", "(others),,"], found["open", "4,connect,7001"]), (8, 2))
            self.assertEqual(found["sent_bytes_total", "(others),,"], 16 * 3000)
            made.add(unit_count.record(comm=b"3"))
            self.assertEqual(series(made)["sessions_total", "3,connect,7001,local"], 3)
        self.assertEqual(sum(of(found, "sessions_total").values()), 36)

    def test_any_name(self):
        """In each line there is one value, and names that are written in the same way are one series."""
        names = [b'a"b\n\xff', b"back\\slash", b"\\", b'"', b"a,b}", b"{", "é".encode(), b"", b"N/A", b"\x1b[31mred"]
        found = series(table(*[unit_count.record(comm=comm) for comm in names], unit_count.record(pid=0),
                             unit_count.record(comm=b"{\0rest")))
        sessions = of(found, "sessions_total")
        self.assertEqual(sum(sessions.values()), 12)
        self.assertEqual((len(sessions), sessions["{,connect,7001,local"], sessions["N/A,connect,7001,local"]),
                         (10, 2, 2))

    def test_units(self):
        """A service has the same series after a restart, and when its cgroup has gone."""
        made, paths = table(unit=True), {7: "/system.slice/shop.service", 8: "/system.slice/shop.service", 9: None}
        with mock.patch("tcplife.cgroup_path", paths.get):
            for cgroup in 7, 8, 9:
                record = list(unit_count.record())
                record[2] = ctext.owner(4242, b"python3", cgroup)
                made.add(record)
        with mock.patch("tcplife.cgroup_path", lambda _: None):
            tcplife.owner_text.cache_clear()
            self.assertIn('_total{unit="shop",role="connect",port="7001",end="local"} 2\n', text(made))
            self.assertEqual(of(series(made), "sessions_total"),
                             {"shop,connect,7001,local": 2, "N/A,connect,7001,local": 1})
        tcplife.owner_text.cache_clear()

    def test_histogram(self):
        """Of each time in the buckets that are not smaller, to the nanosecond."""
        for limit in 10 ** 6, 10 ** 7, 10 ** 8, 10 ** 9, 10 ** 10, 10 ** 11:
            for ns, fits in (limit - 1, 1), (limit + 1, 0):
                found = of(series(table(unit_count.record(ms=ns / 1e6))), "duration_seconds_bucket")
                self.assertEqual(found["shop,connect,7001,%g" % (limit / 1e9)], fits, ns)
        for record, seconds in ((unit_count.record(ms=0), 0), (unit_count.record(ms=-0.001), 0),
                                (unit_count.record(ms=4e9), 4e6), (unit_count.record(born=0, ms=3), 0.003)):
            found = series(table(record))
            self.assertEqual(found["duration_seconds_sum", "shop,connect,7001"], seconds)
            self.assertEqual(found["duration_seconds_bucket", "shop,connect,7001,+Inf"], 1)
            self.assertEqual(found["duration_seconds_bucket", "shop,connect,7001,0.001"], seconds == 0)

    def test_no_counter_ever_falls(self):
        """And all of them are what was put in, whatever that is."""
        random.seed(1)
        made, before, all = table(), {}, collections.Counter()
        with mock.patch("tcplife.MAX_SERIES", 300):
            for _ in range(60):
                for _ in range(one_of(range(60))):
                    record = unit_count.record(
                        comm=b"%d" % one_of(range(5)), role=one_of(["connect", "accept", None]),
                        ports=(one_of(range(1, 5)), one_of(range(1, 5))), ms=random.lognormvariate(0, 5),
                        tx=one_of(range(10 ** 9)), rx=one_of(range(10 ** 9)),
                        end=one_of(["local", "remote", "abort", None, "open"]))
                    made.add(record)
                    if record[19] != tcplife.OPEN:
                        all += {"n": 1, "tx": record[10], "rx": record[11], "ns": record[9] - record[0]}
                found = series(made)
                for key, value in before.items():
                    if key[0] != "open":
                        self.assertGreaterEqual(found[key], value, key)
                before = found
                for name, sum_ in (("sessions_total", all["n"]), ("sent_bytes_total", all["tx"]),
                                   ("received_bytes_total", all["rx"]), ("duration_seconds_count", all["n"])):
                    self.assertEqual(sum(of(found, name).values()), sum_)
                self.assertAlmostEqual(sum(of(found, "duration_seconds_sum").values()) / (all["ns"] / 1e9 or 1),
                                       all["ns"] > 0)
                by_row = collections.defaultdict(list)
                for labels, count in of(found, "duration_seconds_bucket").items():
                    row, _, limit = labels.rpartition(",")
                    by_row[row].append((float(limit.replace("+Inf", "inf")), count))
                for row, counts in by_row.items():
                    self.assertEqual(counts, sorted(counts))
                    self.assertEqual([count for _, count in counts], sorted(count for _, count in counts))
                    self.assertEqual(counts[-1], (math.inf, found["duration_seconds_count", row]))
        self.assertIn(("sent_bytes_total", "(others),,"), found)
        self.assertIn(len(found), range(280, 301))


if __name__ == "__main__":
    unittest.main()
