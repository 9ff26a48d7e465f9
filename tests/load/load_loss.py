"""Printed + reported as lost = made, to the unit, also when nobody reads or the buffers are small."""
import collections
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

import live

# Each with the lines it prints for a connection; None: it is not known, but a second one counts as much.
TOOLS = {"tcplife": 2, "tcpaccept": 1, "tcpv4connect": 1, "deeptcptracer": None}
OPTIONS = {"deeptcptracer": ["-e", "tcp_set_state"]}
HEADINGS = {"tcplife": 1, "tcpaccept": 1, "tcpv4connect": 1, "deeptcptracer": 2}


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


class Loss(live.Alone):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.churn = live.Load()

    def trace(self, load, kind=live.Tracer, pretend=None):
        """All the tools and a second deeptcptracer while load(tracers) runs, which returns the connections made."""
        where = ["--netns", self.netns]
        tracers = {tool: kind(tool, *where, *OPTIONS.get(tool, []), check=False, pretend=pretend) for tool in TOOLS}
        witness = live.Tracer("deeptcptracer", *where, *OPTIONS["deeptcptracer"], check=False)
        with live.tracing(*tracers.values(), witness):
            connections = load(tracers)
        made = {tool: TOOLS[tool] * connections if TOOLS[tool] else
                len(witness.lines) - HEADINGS[tool] + live.reported_losses(witness) for tool in TOOLS}
        printed = {tool: len(tracer.lines) - HEADINGS[tool] for tool, tracer in tracers.items()}
        lost = {tool: live.reported_losses(tracer) for tool, tracer in tracers.items()}
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

    def test_nothing_is_lost_at_full_speed(self):
        """Each tool alone with the load, and the kernel's buffers as they are."""
        for tool, lines in {"tcplife": 80000, "tcpaccept": 40000, "tcpv4connect": 40000}.items():
            with live.Tracer(tool, "--netns", self.netns) as tracer:
                self.churn.run(20000, 2)
            self.assertEqual(len(tracer.lines) - HEADINGS[tool], lines, tool)

    def test_softirqs_that_interrupt(self):
        """Packets that other CPUs have to take (RPS) interrupt at any moment: each event is printed once."""
        where = "--json", "--netns", self.netns
        connects = live.Tracer("tcpv4connect", *where)
        changes = live.Tracer("deeptcptracer", *where, "-e", "tcp_set_state", check=False)
        with live.packets_shared(self.namespaces.client), live.tracing(connects, changes):
            self.churn.run(20000, 2, 9000)
        self.assertEqual(len(connects.lines), 40000)
        last, doubles = {}, []
        for line in changes.objects:
            what = tuple(line[name] for name in ("saddr", "sport", "daddr", "dport", "oldstate", "state"))
            if line["sport"] and line["ts"] - last.get(what, 0) < 0.001:        # no port is used again so soon
                doubles.append(line)
            last[what] = line["ts"]
        self.assertEqual(doubles, [])

    def test_ten_thousand_a_second(self):
        where = ["-N", self.netns]
        with live.Tracer("deeptcptracer", "-e", "tcp_set_state,tcp_send_fin,tcp_fin", *where) as tracer:
            self.churn.run(10000, 2, 10000)
        events = collections.Counter(line.split()[0] for line in tracer.lines)
        changes = collections.Counter(line.split(None, 5)[5].strip() for line in tracer.lines[2:])
        self.assertEqual(changes["CLOSE -> SYN_SENT"], 20000)
        self.assertEqual(changes["SYN_RECV -> ESTABLISHED"], 20000)
        self.assertGreater(events["tcp_set_state()"], 6 * 20000)

    def test_any_rate_costs_the_same(self):
        """As ms of CPU time per second, in the best of three tries: softirqs may count as the tool's."""
        def cost(rate):
            load = self.churn.start(int(3.5 * rate / 2), 2, rate) if rate else live.Actor([])
            with live.Tracer("tcpchurn", load.pid, "-i", "0.1", check=False) as tracer:
                stat = pathlib.Path("/proc/%d/schedstat" % tracer.process.pid)
                time.sleep(0.5)
                before = int(stat.read_text().split()[0])
                time.sleep(2)
                spent = int(stat.read_text().split()[0]) - before
            load.communicate() if rate else load.end()
            return spent / 2e6
        costs = {rate: min(cost(rate) for _ in range(3)) for rate in (0, 1000, 20000)}
        self.assertLessEqual(max(costs.values()) - min(costs.values()), 0.1 * max(costs.values()) + 5, costs)
