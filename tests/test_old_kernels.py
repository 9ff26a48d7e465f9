"""The branches for older kernels, taken on this one: the tool is told that a feature is missing."""
import unittest

import live
import workload

# Runs a tool with its idea of the kernel's features replaced.
PRETEND = """
import signal
import sys
sys.path.insert(0, {root!r})
import {tool}
{tool}.has_ring_buffer = lambda: False
signal.pthread_sigmask(signal.SIG_BLOCK, {tool}.STOP_SIGNALS)
{tool}.main()
"""


class Pretender(live.Tracer):
    """A tool that believes the kernel has no ring buffer, as before Linux 5.8."""

    def __init__(self, tool, *args):
        super().__init__(tool, *args)
        self.command = [live.PYTHON, "-c", PRETEND.format(tool=tool, root=str(live.ROOT)), *map(str, args)]


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class PerfBuffer(unittest.TestCase):
    def compare(self, tool, *args):
        with live.Tracer(tool, "--json", *args) as ring, Pretender(tool, "--json", *args) as perf:
            workload.work(scenarios=["client_close", "server_reset", "refused"])
        times = ("ts", "ms")

        def key(record):
            return repr(sorted((name, value) for name, value in record.items() if name not in times))
        self.assertEqual(live.compare(ring.objects, perf.objects, key), ([], []))
        self.assertTrue(perf.objects)

    def test_tcplife(self):
        self.compare("tcplife")

    def test_tcpaccept(self):
        self.compare("tcpaccept")

    def test_tcpv4connect(self):
        self.compare("tcpv4connect")

    def test_deeptcptracer(self):
        self.compare("deeptcptracer", "-e", "tcp_set_state,tcp_reset,sock_def_error_report")
