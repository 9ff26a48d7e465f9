"""The second programs at the tracepoints, which take what the kernel skips the first ones for: here they take all."""
import os
import socket
import time
import unittest

import live

# The programs called ..._first are loaded, but attached to nothing.
BUT_THE_FIRST = """
import bcc
def but_the_first(attach, kind):
    def attach_others(bpf, tp, fn_name):
        if fn_name.endswith("_first"):
            bpf.load_func(fn_name, kind)
        else:
            attach(bpf, tp=tp, fn_name=fn_name)
    return attach_others
bcc.BPF.attach_raw_tracepoint = but_the_first(bcc.BPF.attach_raw_tracepoint, bcc.BPF.RAW_TRACEPOINT)
bcc.BPF.attach_tracepoint = but_the_first(bcc.BPF.attach_tracepoint, bcc.BPF.TRACEPOINT)
"""
EVENTS = "deeptcptracer", "--json", "-e", "tcp_set_state"


def second_alone(tool, *options):
    return live.Tracer(tool, *options, "--json", "--probes", "tracepoint", pretend={"KERNEL": (7, 0)},
                       before=BUT_THE_FIRST)


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Second(unittest.TestCase):
    def test_second_takes_what_the_first_does_not_see(self):
        sessions, accepts, connects = map(second_alone, ("tcplife", "tcpaccept", "tcpv4connect"))
        churn, events, witness = second_alone("tcpchurn", os.getpid()), second_alone(*EVENTS), live.Tracer(*EVENTS)
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                live.tracing(sessions, accepts, connects, churn, events, witness):
            for _ in range(50):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()
            time.sleep(1.2)         # an update of tcpchurn
        ours = [sum(line["pid"] == os.getpid() for line in tracer.objects) for tracer in (sessions, accepts, connects)]
        self.assertEqual(ours, [100, 50, 50])
        self.assertEqual(churn.objects[-1]["all"],
                         {"opened": 100, "accepted": 50, "connected": 50, "closed": 100})
        changes = [[(line["saddr"], line["sport"], line["oldstate"], line["state"]) for line in tracer.objects
                    if line["pid"] == os.getpid()] for tracer in (events, witness)]
        self.assertEqual(*map(sorted, changes))
        self.assertGreater(len(changes[0]), 300)
