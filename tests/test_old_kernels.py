"""The branches for older kernels, taken on this one: the tool is told that a feature is missing."""
import unittest

import live
import workload

@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class PerfBuffer(unittest.TestCase):
    """Before Linux 5.8 there is no ring buffer."""

    def compare(self, tool, *args):
        with live.Tracer(tool, "--json", *args) as ring, \
                live.Tracer(tool, "--json", *args, pretend={"has_ring_buffer": False}) as perf:
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

    def test_deeptcptracer_with_stacks(self):
        self.compare("deeptcptracer", "-K", "-e", "tcp_reset,sock_def_error_report")
