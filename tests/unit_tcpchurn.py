"""The logic of tcpchurn, without tracing."""
import contextlib
import io
import json
import types
import unittest
from unittest import mock

import tcpchurn

SAMPLE = """\
   1200.0   500.0   240.0   120.0    60.0    30.0    10.0     5.0     1.0    ALL
O      10      10      10      10      10      10      10       6       3     10
C       3       3       3       3       3       3       3       2       2      3
"""


class Table(dict):
    """A BPF map of buckets, or of totals."""
    Key = int


class Kernel:
    """The maps of the kernel side, and a clock."""

    def __init__(self, args):
        self.now, self.width = 10 ** 12, tcpchurn.bucket_ns(args)
        self.maps = {"buckets": Table(), "total": {n: types.SimpleNamespace(value=0) for n in range(3)}}

    def __getitem__(self, name):
        return self.maps[name]

    def count(self, what, number=1):
        bucket = self.maps["buckets"].setdefault(self.now // self.width, types.SimpleNamespace(count=[0, 0, 0]))
        bucket.count[what] += number
        self.maps["total"][what].value += number


class Sums(unittest.TestCase):
    def start(self, *argv):
        args = tcpchurn.parse_args(["1", *argv])
        kernel = Kernel(args)
        clock = mock.patch("time.monotonic_ns", lambda: kernel.now)
        clock.start()
        self.addCleanup(clock.stop)
        return kernel, tcpchurn.Windows(args, kernel)

    def test_a_window_is_exact_to_one_bucket(self):
        kernel, windows = self.start("-w", "1,5")
        kernel.count(0, 7)
        for step in range(1, 80):
            kernel.now += 10 ** 8
            (accepted, _, _), totals = windows.read()
            self.assertEqual(accepted, [7 if step <= 50 else 0, 7 if step <= 10 else 0], step)
            self.assertEqual(totals, [7, 0, 0])

    def test_late_counts_are_seen(self):
        kernel, windows = self.start("-w", "1")
        kernel.count(1)
        self.assertEqual(windows.read()[0][1], [1])
        kernel.count(1)                         # the same bucket, after it was read
        kernel.now += 10 ** 8
        self.assertEqual(windows.read()[0][1], [2])

    def test_ten_million_events_in_constant_memory(self):
        """Simulated: the buckets are written as the kernel would, 5,000 counts each, for 2,000 buckets."""
        kernel, windows = self.start("-w", "1,10")
        size = None
        for n in range(2000):
            kernel.count(n % 3, 5000)
            kernel.now += 10 ** 8
            counts, totals = windows.read()
            if n == 200:
                size = len(kernel["buckets"])
        self.assertEqual(sum(totals), 10 ** 7)
        self.assertEqual(len(kernel["buckets"]), size)
        self.assertLessEqual(size, windows.size + 1)
        self.assertEqual([sum(count[n] for count in counts) for n in (0, 1)], [500000, 50000])

    def test_a_reader_that_was_stopped(self):
        kernel, windows = self.start("-w", "1,10")
        kernel.count(2, 5)
        windows.read()
        kernel.now += 3600 * 10 ** 9
        kernel.count(2, 3)
        self.assertEqual(windows.read()[0][2], [3, 3])

    def test_bucket_width(self):
        for argv, width in ((["-w", "1200", "1"], 10 ** 8), (["-w", "0.5"], 5 * 10 ** 7), (["-w", "0.001"], 10 ** 6)):
            self.assertEqual(tcpchurn.bucket_ns(tcpchurn.parse_args(["1", *argv])), width)


class Arguments(unittest.TestCase):
    def test_windows_with_commas_and_spaces(self):
        for argv in (["-w", "1,5,10", "7"], ["7", "-w", "1", "5", "10"], ["-w", "1", "5", "10", "7"],
                     ["-w", "10,1", "5", "7"]):
            args = tcpchurn.parse_args(argv)
            self.assertEqual((args.pid, args.windows), (7, [10.0, 5.0, 1.0]), argv)

    def test_errors_of_argparse(self):
        for wrong in ([], ["x"], ["1", "-w", "0"], ["-w", "1,2"], ["1", "-w", "0.001,9999999"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                tcpchurn.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2, wrong)

    def test_private_addresses(self):
        for address, private in (("10.1.2.3", True), ("172.31.0.1", True), ("172.32.0.1", False), ("8.8.8.8", False),
                                 ("127.0.0.1", True), ("::1", True), ("fe80::1", True), ("fd12::1", True),
                                 ("2001:db8::1", False), ("::ffff:192.168.1.1", True), ("::ffff:1.1.1.1", False)):
            self.assertEqual(tcpchurn.is_private(tcpchurn.ipaddress.ip_address(address)), private, address)

    def test_the_kernels_idea_of_private_is_the_same(self):
        expression = tcpchurn.private_ranges().replace("&&", "and").replace("||", "or").replace("u)", ")")
        for address in ("10.1.2.3", "172.31.0.1", "172.32.0.1", "8.8.8.8", "::1", "fe80::1", "fd12::1", "2001:db8::1"):
            ip = tcpchurn.ipaddress.ip_address(address)
            packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
            a = tcpchurn.struct.unpack(">4I", packed)
            result = eval(expression.replace("u ", " ").rstrip("u"), {"a": a})          # noqa: S307
            self.assertEqual(bool(result), tcpchurn.is_private(ip), address)


class Output(unittest.TestCase):
    windows = [[4] * 7 + [2, 1], [6] * 7 + [4, 2], [3] * 7 + [2, 2]]

    def test_as_in_the_sample(self):
        text = tcpchurn.render(tcpchurn.parse_args(["1"]), self.windows, [4, 6, 3])
        self.assertEqual(text, SAMPLE)

    def test_accepts_apart(self):
        text = tcpchurn.render(tcpchurn.parse_args(["1", "-a", "-c"]), self.windows, [4, 6, 3])
        self.assertTrue(text.startswith("\033[H\033[2J "))
        self.assertEqual([line[0] for line in text.splitlines()[1:]], ["A", "O", "C"])

    def test_json(self):
        value = json.loads(tcpchurn.render(tcpchurn.parse_args(["1", "--json"]), self.windows, [4, 6, 3]))
        self.assertEqual(value["opened"], [a + c for a, c in zip(value["accepted"], value["connected"])])
        self.assertEqual(value["all"], {"opened": 10, "accepted": 4, "connected": 6, "closed": 3})


if __name__ == "__main__":
    unittest.main()
