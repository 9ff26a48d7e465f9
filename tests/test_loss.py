"""What is not printed is told: printed + told lost = made, to the unit, when nobody reads or the buffers are small."""
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

import live

# Each with the lines it prints for a connection; None: it is not known, but a second one counts as much.
TOOLS = {"tcplife": 2, "tcpaccept": 1, "tcpv4connect": 1, "deeptcptracer": None}
OPTIONS = {"deeptcptracer": ["-e", "tcp_set_state"]}
HEADINGS = {"tcplife": 1, "tcpaccept": 1, "tcpv4connect": 1, "deeptcptracer": 2}


# Starts a tool whose programs called ..._first are loaded, but see nothing: all is left to the second ones.
SECOND_ALONE = """
import signal
import sys
import bcc
sys.path.insert(0, {tools!r})
import {tool}
{tool}.has_preemption = lambda: True
def but_the_first(attach, kind):
    def attach_others(bpf, tp, fn_name):
        if fn_name.endswith("_first"):
            bpf.load_func(fn_name, kind)
        else:
            attach(bpf, tp=tp, fn_name=fn_name)
    return attach_others
bcc.BPF.attach_raw_tracepoint = but_the_first(bcc.BPF.attach_raw_tracepoint, bcc.BPF.RAW_TRACEPOINT)
bcc.BPF.attach_tracepoint = but_the_first(bcc.BPF.attach_tracepoint, bcc.BPF.TRACEPOINT)
signal.pthread_sigmask(signal.SIG_BLOCK, {tool}.STOP_SIGNALS)
{tool}.main()
"""


def second_alone(tool, *options):
    tracer = live.Tracer(tool, *options, "--json", "--probes", "tracepoint")
    tracer.command[1:2] = ["-c", SECOND_ALONE.format(tool=tool, tools=live.TOOLS)]
    return tracer


class Piped(live.Tracer):
    """A tool that writes into a pipe; read() takes all that comes until it ends."""

    def start(self):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.err)

    def read(self):
        def drain():
            for chunk in iter(lambda: os.read(self.process.stdout.fileno(), 1 << 20), b""):
                self.out.write(chunk.decode())
        self.reader = threading.Thread(target=drain)
        self.reader.start()

    def stop(self, number=signal.SIGINT):
        self.process.send_signal(number)
        self.reader.join(live.START)
        self.process.stdout.close()
        super().stop(number)


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Loss(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.namespaces = live.Namespaces().__enter__()
        cls.churn = live.Churn(cls.namespaces.client)       # where nobody else has connections

    @classmethod
    def tearDownClass(cls):
        cls.namespaces.__exit__()

    def trace(self, load, kind=live.Tracer, pretend=None):
        """All the tools and a second deeptcptracer while load(tracers) runs, which returns the connections made."""
        with contextlib.ExitStack() as stack:
            where = ["--netns", self.namespaces.client]
            tracers = {tool: kind(tool, *where, *OPTIONS.get(tool, []), check=False, pretend=pretend) for tool in TOOLS}
            witness = live.Tracer("deeptcptracer", *where, *OPTIONS["deeptcptracer"], check=False)
            for tracer in [*tracers.values(), witness]:
                tracer.start()
            for tracer in [*tracers.values(), witness]:
                stack.enter_context(tracer)
            connections = load(tracers)
        made = {tool: TOOLS[tool] * connections if TOOLS[tool] else
                len(witness.lines) - HEADINGS[tool] + live.told(witness) for tool in TOOLS}
        printed = {tool: len(tracer.lines) - HEADINGS[tool] for tool, tracer in tracers.items()}
        lost = {tool: live.told(tracer) for tool, tracer in tracers.items()}
        self.assertEqual({tool: printed[tool] + lost[tool] for tool in TOOLS}, made, (printed, lost))
        self.assertEqual({tracer.status for tracer in tracers.values()}, {0})
        return lost

    def test_reader_stopped_for_ten_seconds(self):
        def load(tracers):
            churn = self.churn.start(10 ** 6, 2)
            time.sleep(1)
            for tracer in tracers.values():
                tracer.process.send_signal(signal.SIGSTOP)
            time.sleep(10)
            for tracer in tracers.values():
                tracer.process.send_signal(signal.SIGCONT)
            time.sleep(1)
            churn.send_signal(signal.SIGINT)
            return int(churn.communicate()[0].split()[3])
        lost = self.trace(load)
        self.assertTrue(all(lost.values()), lost)

    def test_reader_of_the_pipe_that_stalls(self):
        def load(tracers):
            self.churn.run(100000, 2)
            for tracer in tracers.values():
                tracer.read()
            return 200000
        lost = self.trace(load, kind=Piped)
        self.assertTrue(all(lost.values()), lost)

    def test_small_ring_buffer(self):
        def load(_):
            self.churn.run(20000, 2)
            return 40000
        lost = self.trace(load, pretend={"RING_PAGES": 4})
        self.assertTrue(all(lost.values()), lost)

    def test_small_perf_buffer(self):
        def load(_):
            self.churn.run(20000, 2)
            return 40000
        lost = self.trace(load, pretend={"has_ring_buffer": False, "PERF_PAGES": 4})
        self.assertTrue(all(lost.values()), lost)

    def test_second_takes_what_the_first_does_not_see(self):
        sessions, accepts, connects = map(second_alone, ("tcplife", "tcpaccept", "tcpv4connect"))
        churn = second_alone("tcpchurn", os.getpid())
        events = second_alone("deeptcptracer", *OPTIONS["deeptcptracer"])
        witness = live.Tracer("deeptcptracer", *OPTIONS["deeptcptracer"], "--json")
        tracers = [sessions, accepts, connects, churn, events, witness]
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
            for tracer in tracers:
                tracer.start()
            for tracer in tracers:
                stack.enter_context(tracer)
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
