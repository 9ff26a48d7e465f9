"""The logic of tcpchurn, without tracing."""
import contextlib
import io
import json
import os
import struct
import tempfile
import unittest
from unittest import mock

import tcpchurn

SAMPLE = """\
   1200.0   500.0   240.0   120.0    60.0    30.0    10.0     5.0     1.0    ALL
O      10      10      10      10      10      10      10       6       3     10
C       3       3       3       3       3       3       3       2       2      3
"""

PROM = """\
# HELP tcpchurn_accepts_total TCP connections that the process accepted.
# TYPE tcpchurn_accepts_total counter
tcpchurn_accepts_total{pid="1",comm="init"} 4
# HELP tcpchurn_connects_total Attempts of the process to connect by TCP.
# TYPE tcpchurn_connects_total counter
tcpchurn_connects_total{pid="1",comm="init"} 6
# HELP tcpchurn_closes_total TCP connections that ended on the side of the process.
# TYPE tcpchurn_closes_total counter
tcpchurn_closes_total{pid="1",comm="init"} 3
# HELP tcpchurn_open TCP connections of the process that are open.
# TYPE tcpchurn_open gauge
tcpchurn_open{pid="1",comm="init"} 12
# HELP tcpchurn_lost_total Events that tcpchurn knows it missed.
# TYPE tcpchurn_lost_total counter
tcpchurn_lost_total{pid="1",comm="init",what="map_full"} 0
tcpchurn_lost_total{pid="1",comm="init",what="probe_skipped"} 3
# HELP tcpchurn_start_time_seconds Unix time at which counting started.
# TYPE tcpchurn_start_time_seconds gauge
tcpchurn_start_time_seconds{pid="1",comm="init"} 1795330800.25
"""


class Kernel:
    """The buckets of the kernel side, and a clock."""

    def __init__(self, args):
        self.now, self.width, self.size = 10 ** 12, tcpchurn.bucket_ns(args), tcpchurn.buckets(args)
        self.so_far = [0, 0, 0, 0]
        self.map_fd = os.memfd_create("buckets")
        os.ftruncate(self.map_fd, (self.size + 1) * tcpchurn.BUCKET.size)

    def put(self, slot, number):
        os.pwrite(self.map_fd, tcpchurn.BUCKET.pack(number, *self.so_far), slot * tcpchurn.BUCKET.size)

    def count(self, what, number=1):
        now, slot = self.now // self.width, self.now // self.width % self.size
        if os.pread(self.map_fd, 8, slot * tcpchurn.BUCKET.size) != struct.pack("=Q", now):
            self.put(slot, now)
        self.so_far[what] += number
        self.put(self.size, 0)


class Sums(unittest.TestCase):
    def start(self, *argv):
        args = tcpchurn.parse_args(["1", *argv])
        kernel = Kernel(args)
        patch = mock.patch("time.monotonic_ns", lambda: kernel.now)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(os.close, kernel.map_fd)
        return kernel, tcpchurn.Windows(args, kernel.map_fd)

    def test_a_window_is_exact_to_one_bucket(self):
        kernel, windows = self.start("-w", "1,5")
        kernel.count(0, 7)
        for step in range(1, 80):
            kernel.now += 10 ** 8
            counts, totals = windows.read()
            self.assertEqual([accepted for accepted, *_ in counts], [7 * (step <= 50), 7 * (step <= 10)], step)
            self.assertEqual(totals, (7, 0, 0, 0))

    def test_late_counts_are_seen(self):
        kernel, windows = self.start("-w", "1")
        kernel.count(1)
        self.assertEqual(windows.read()[0], [[0, 1, 0, 0]])
        kernel.count(1)                         # the same bucket, after it was read
        kernel.now += 10 ** 8
        self.assertEqual(windows.read()[0], [[0, 2, 0, 0]])

    def test_the_first_count_of_a_bucket_may_come_late(self):
        """The kernel side looks at the clock, and writes when the next bucket has been read already."""
        kernel, windows = self.start("-w", "1")
        kernel.now += kernel.width
        windows.read()
        kernel.now -= kernel.width
        kernel.count(0)
        kernel.now += kernel.width
        for step in range(20):
            self.assertEqual(windows.read(), ([[1 if step < 10 else 0, 0, 0, 0]], (1, 0, 0, 0)), step)
            kernel.now += kernel.width

    def test_ten_million_events_in_constant_memory(self):
        """Simulated: the buckets are written as the kernel would, 5,000 counts each, for 2,000 buckets."""
        kernel, windows = self.start("-w", "1,10")
        for n in range(2000):
            kernel.count(n % 3, 5000)
            kernel.now += 10 ** 8
            counts, totals = windows.read()
            self.assertLessEqual(len(windows.history), windows.size)
        self.assertEqual(sum(totals), 10 ** 7)
        self.assertEqual([sum(count) for count in counts], [500000, 50000])

    def test_a_reader_that_was_stopped(self):
        """However far apart two reads are, the windows are right at once."""
        kernel, windows = self.start("-w", "1,10")
        for pause in (1, 11, 12, 60, 3600, 5):
            kernel.count(2, 5)
            windows.read()
            kernel.now += pause * 10 ** 9
            kernel.count(2, 3)
            kernel.now += 2 * 10 ** 9
            kernel.count(2, 1)
            expected = 4 if pause > 8 else 9
            self.assertEqual([closed for _, _, closed, _ in windows.read()[0]], [expected, 1], pause)
            kernel.now += 3600 * 10 ** 9
            self.assertEqual([closed for _, _, closed, _ in windows.read()[0]], [0, 0], pause)

    def test_bucket_width(self):
        for argv, width in ((["-w", "1200", "1"], 10 ** 8), (["-w", "0.5"], 5 * 10 ** 7), (["-w", "0.001"], 10 ** 6)):
            self.assertEqual(tcpchurn.bucket_ns(tcpchurn.parse_args(["1", *argv])), width)


class Arguments(unittest.TestCase):
    def test_windows_with_commas_and_spaces(self):
        for argv in (["-w", "1,5,10", "7"], ["7", "-w", "1", "5", "10"], ["-w", "1", "5", "10", "7"],
                     ["-w", "10,1", "5", "7"], ["-w", "1", "-w", "5", "-w", "10", "7"]):
            args = tcpchurn.parse_args(argv)
            self.assertEqual((args.pid, args.windows), ([7], [10.0, 5.0, 1.0]), argv)

    def test_bad_arguments_exit_2(self):
        for wrong in ([], ["x"], ["1", "-w", "0"], ["-w", "1,2"], ["1", "-w", "0.001,9999999"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                tcpchurn.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2, wrong)


class Output(unittest.TestCase):
    def test_headings_are_separate(self):
        self.assertEqual("".join(map(tcpchurn.heading, [1.05, 0.123456789, 1200, 0.001])).split(),
                         ["1.05", "0.12346", "1200.0", "0.001"])

    windows, totals = [[4, 6, 3, 5]] * 7 + [[2, 4, 2, 0], [1, 2, 2, 0]], [4, 6, 3, 5]

    def test_documented_format(self):
        text = tcpchurn.render(tcpchurn.parse_args(["1"]), self.windows, self.totals)
        self.assertEqual(text, SAMPLE)

    def test_accepts_apart(self):
        text = tcpchurn.render(tcpchurn.parse_args(["1", "-a", "-c"]), self.windows, self.totals)
        self.assertTrue(text.startswith("\033[H\033[2J "))
        self.assertEqual([line[0] for line in text.splitlines()[1:]], ["A", "O", "C"])

    def test_open(self):
        """As many seconds ago, and now."""
        args = tcpchurn.parse_args(["1", "-o"])
        rows = tcpchurn.render(args, self.windows, self.totals).splitlines()
        self.assertEqual(rows[:3], SAMPLE.splitlines())
        self.assertEqual(rows[3].split(), ["N", *["5"] * 7, "8", "11", "12"])
        rows = tcpchurn.render(args, self.windows, self.totals, knows_existing=False).splitlines()
        self.assertEqual(rows[3].split(), ["N"] + ["N/A"] * 10)
        self.assertEqual({len(row) for row in rows}, {len(rows[0])})

    def test_json(self):
        value = json.loads(tcpchurn.render(tcpchurn.parse_args(["1", "--json"]), self.windows, self.totals))
        self.assertEqual(value["opened"], [a + c for a, c in zip(value["accepted"], value["connected"])])
        self.assertEqual(value["all"], {"opened": 10, "accepted": 4, "connected": 6, "closed": 3})
        self.assertEqual(value["open"], 12)

    def test_prometheus(self):
        """To the letter: text format 0.0.4, for all to read, and nothing is left beside the file."""
        self.addCleanup(os.umask, os.umask(0o077))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.prom")
            process = {"pid": 1, "comm": "init"}
            with mock.patch.object(tcpchurn, "LOST", dict(zip(tcpchurn.LOSSES, [0, 3]))):
                for accepted in 3, 4:
                    tcpchurn.publish(path, tcpchurn.metrics(process, (accepted, 6, 3, 5)), 1795330800.25, **process)
            with open(path) as file:
                self.assertEqual(file.read(), PROM)
            self.assertEqual((os.listdir(folder), os.stat(path).st_mode & 0o777), (["a.prom"], 0o644))
            os.symlink("/dev/full", os.path.join(folder, "a.new"))
            with self.assertRaises(OSError):            # whoever may write to the folder must not redirect root
                tcpchurn.publish(path, [], 0)
            tcpchurn.unpublish(path)
            tcpchurn.unpublish(path)                    # somebody else has removed it
            self.assertEqual(os.listdir(folder), ["a.new"])

    def test_label_values(self):
        name = b'a"b\\\n\xff'
        with mock.patch.object(tcpchurn, "open", lambda *_: io.BytesIO(name + b"\n"), create=True):
            self.assertEqual(tcpchurn.labels(**tcpchurn.labels_of(1)), r'{pid="1",comm="a\"b\\\\\\n\\xff"}')
        self.assertEqual(tcpchurn.labels(**tcpchurn.labels_of(1 << 22)), '{pid="4194304",comm=""}')     # has just ended
        self.assertEqual(tcpchurn.labels(**tcpchurn.labels_of(None)), '{pid="",comm=""}')


if __name__ == "__main__":
    unittest.main()
