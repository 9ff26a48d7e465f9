"""Many sockets: 100,000 connections open at once, a million one after the other, and maps too small for what comes."""
import collections
import os
import pathlib
import resource
import select
import socket
import time

import live
import workload

PAIRS, EACH = 10, 10000             # processes on each side, and connections of each


def raise_limit():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


class Crowd:
    """Pairs of processes with many connections between them, all open from the moment the context is entered."""

    def __init__(self, pairs=PAIRS, each=EACH):
        self.each, self.ends = each, []
        self.ready, is_ready = self.pipe()
        over, self.over = self.pipe()
        self.pids, ports = [], []
        for n in range(pairs):
            reader, writer = self.pipe()
            self.pids.append(workload.spawn("many-server%d" % n, None, self.serve, n, writer, is_ready, over))
            ports.append(int(os.read(reader, 10)))
        self.pids += [workload.spawn("many-client%d" % n, None, self.visit, n, ports[n], is_ready, over)
                      for n in range(pairs)]

    def pipe(self):
        ends = os.pipe()
        self.ends += ends
        return ends

    def hold(self, is_ready, over, sockets):
        os.close(self.over)
        os.write(is_ready, b".")
        os.read(over, 1)            # until all writers have closed it
        for number, sock in enumerate(sockets):
            sock.close()
            if number % 100 == 0:
                time.sleep(0.05)    # so many at once are what is tried here, not how fast they end

    def serve(self, n, writer, is_ready, over):
        raise_limit()
        with socket.create_server(("127.0.1.%d" % (n + 1), 0), backlog=1000) as listener:
            os.write(writer, b"%d" % listener.getsockname()[1])
            self.hold(is_ready, over, [listener.accept()[0] for _ in range(self.each)])

    def visit(self, n, port, is_ready, over):
        raise_limit()
        self.hold(is_ready, over, [socket.create_connection(("127.0.1.%d" % (n + 1), port)) for _ in range(self.each)])

    def __enter__(self):
        for _ in self.pids:
            assert select.select([self.ready], [], [], 120)[0], "the connections take too long"
            os.read(self.ready, 1)
        return self

    def __exit__(self, *_):
        for end in self.ends:
            os.close(end)
        workload.wait(*self.pids)


def rss(tracer):
    """Resident KB of a tool."""
    status = pathlib.Path("/proc/%d/status" % tracer.process.pid).read_text()
    return int(status.split("VmRSS:")[1].split()[0])


class Many(live.Alone):
    def test_a_hundred_thousand_at_once(self):
        """Every session is printed, but those whose end the kernel did not show: see live.agent()."""
        own = live.of(*("127.0.1.%d" % (n + 1) for n in range(PAIRS)))
        with live.Tracer("tcplife", "--json", "--netns", self.netns, check=False) as tracer, \
                live.UnseenStateChanges(own) as unseen:
            with Crowd() as crowd:
                held = live.entries(tracer, "sessions")
            live.settle(0.5)
            left = live.entries(tracer, "sessions")
        printed = collections.Counter(line["pid"] for line in tracer.objects)
        self.assertEqual(held, 2 * PAIRS * EACH)
        self.assertEqual(sum(printed.values()) + left, 2 * PAIRS * EACH, tracer.stderr)
        self.assertNotIn("full", tracer.stderr)
        if not unseen.count:
            self.assertEqual(tracer.stderr, "")
            self.assertEqual(printed, dict.fromkeys(crowd.pids, EACH))

    def test_a_million_one_after_the_other(self):
        churn = live.Load()
        load = churn.start(510000, 2)
        names = {"tcplife": "sessions", "deeptcptracer": "owners"}
        # Without these large buffers, which malloc() may keep, RSS is what the tool keeps. -3: M_MMAP_THRESHOLD
        mallopt = "import ctypes; ctypes.CDLL(None).mallopt(-3, 1 << 17)"
        tracers = {tool: live.Tracer(tool, "--netns", self.netns, *options, check=False, before=mallopt)
                   for tool, options in {"tcplife": [], "tcpaccept": [], "tcpv4connect": [],
                                         "deeptcptracer": ["-e", "tcp_reset"]}.items()}
        with live.tracing(*tracers.values()):
            time.sleep(5)               # until all caches are full
            before = {tool: rss(tracer) for tool, tracer in tracers.items()}
            self.assertIn("connections 1020000 ", load.communicate()[0])
            live.settle(0.5)
            after = {tool: rss(tracer) for tool, tracer in tracers.items()}
            left = {tool: live.entries(tracers[tool], name) for tool, name in names.items()}
        for tool in tracers:
            self.assertLessEqual(after[tool], 1.05 * before[tool], tool)
        self.assertLess(max(left.values()), 20, left)

    def test_maps_that_are_too_small(self):
        """What fits is traced, the rest is reported."""
        sessions = live.Tracer("tcplife", "--json", "--netns", self.netns, check=False, pretend={"MAX_SOCKETS": 1000})
        events = live.Tracer("deeptcptracer", "-e", "tcp_reset", "-N", self.netns, check=False,
                             pretend={"MAX_SOCKETS": 1000})
        with live.tracing(sessions, events):
            with Crowd(1, 2000) as crowd:
                pass
            log = workload.work(scenarios=["client_close"])
        printed = collections.Counter(line["pid"] for line in sessions.objects)
        self.assertEqual(sum(printed[pid] for pid in crowd.pids) + live.reported_losses(sessions), 4000,
                         sessions.stderr)
        self.assertRegex(sessions.stderr, "tcplife: in all [0-9]+ sessions lost: the map of live sessions was full\n")
        self.assertRegex(events.stderr, "deeptcptracer: in all [0-9]+ owners lost: the map of live sockets was full\n")
        self.assertGreater(sum(printed[pid] for pid in crowd.pids), 500)
        self.assertEqual({printed[record["pid"]] for record in log}, {1})
