"""The branches for older kernels, taken on this one: the tool thinks that there is no ring buffer (before 5.8)."""
import unittest

import live
import workload

TOOLS = ["tcplife"], ["tcpaccept"], ["tcpv4connect"], ["tcpv4connect", "-r"], \
    ["deeptcptracer", "-m", "-e", "tcp_set_state,tcp_reset"], \
    ["deeptcptracer", "-K", "-m", "-e", "tcp_reset,tcp_send_reset,sock_def_error_report"]


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class PerfBuffer(unittest.TestCase):
    def test_as_with_a_ring_buffer(self):
        with live.Namespaces() as namespaces:           # where nobody else has connections
            where = namespaces.client
            pairs = [[live.Tracer(*tool, "--json", "--netns", where, pretend=pretend)
                      for pretend in (None, {"RING_PAGES": 0})] for tool in TOOLS]
            with live.tracing(*[tracer for pair in pairs for tracer in pair]):
                workload.work(scenarios=["client_close", "server_reset", "refused"], namespaces=(where, where))

        def lines(tracer):
            times = "ts", "ms", "connect_ms", "accept_ms", "state_ms"
            return sorted(repr(sorted((name, value) for name, value in line.items() if name not in times))
                          for line in tracer.objects)
        for ring, perf in pairs:
            with self.subTest(ring.command):
                self.assertEqual(lines(ring), lines(perf))
                self.assertTrue(lines(perf))
