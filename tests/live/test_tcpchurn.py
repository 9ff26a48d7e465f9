"""tcpchurn against a process that opens and closes known numbers of connections in known seconds."""
import collections
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
import unittest

import live
import workload

def in_threads(work, count, threads=4):
    """work() called count times, from several threads; what it returned."""
    results, rest = [], list(range(count))

    def thread():
        while True:
            try:
                rest.pop()
            except IndexError:
                return
            results.append(work())
    crowd = [threading.Thread(target=thread) for _ in range(threads)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    return results


def connect(address):
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    sock.connect_ex(address)
    return sock


class Peer:
    """Accepts whatever comes, and keeps it."""

    def __init__(self):
        self.v4 = socket.create_server(("127.0.0.1", 0), backlog=500)
        self.v6 = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=500)
        self.nobody = socket.socket()
        self.nobody.bind((workload.OWN, 0))         # where nobody listens
        self.accepted = []

    def accept(self, count, listener):
        self.accepted += [listener.accept()[0] for _ in range(count)]

    def close(self):
        for sock in [self.v4, self.v6, self.nobody, *self.accepted]:
            sock.close()


def steps(peer):
    v4, v6, nobody = peer.v4.getsockname(), peer.v6.getsockname()[:2], peer.nobody.getsockname()
    server = socket.create_server(("127.0.0.1", 0), backlog=500)

    def before(state):
        state["before"] = [connect(v4), connect(v4), connect(v6)]

    def opens(state):
        state["v4"] = in_threads(lambda: connect(v4), 40)
        state["v6"] = in_threads(lambda: connect(v6), 20)
        state["refused"] = in_threads(lambda: connect(nobody), 5)
        state["accepted"] = in_threads(lambda: server.accept()[0], 30)

    def closes(state):
        for sock in state["v4"][:10] + state["before"][:1]:
            sock.close()
        for sock in state["v6"][:6]:
            sock.shutdown(socket.SHUT_WR)

    def early(state):
        state["early"] = in_threads(lambda: server.accept()[0], 4)

    def closes_again(state):
        for sock in state["v6"][:6] + state["early"] + state["refused"]:
            sock.close()
    return server, [before, opens, closes, early, closes_again]


class Life:
    """A process that opens and closes connections step by step, and another one that does the same beside it."""

    # What counts in steps 1 to 4, and at the end of the process.
    COUNTS = [
        collections.Counter(accepted=30, connected=40 + 20 + 5, closed=5),      # 5 are refused
        collections.Counter(closed=10 + 1 + 6 + 7),         # 10 and one from before, 6 shut down, 7 reset by the peer
        collections.Counter(accepted=4, closed=4),          # they were reset before accept()
        collections.Counter(),                              # what had ended already does not end again
        collections.Counter(closed=3 + 65 + 30 - 5 - 24)]   # the rest
    ALL = sum(COUNTS, collections.Counter())
    ALL["opened"] = ALL["accepted"] + ALL["connected"]

    def __init__(self):
        self.sides = []
        for _ in range(2):
            peer = Peer()
            server, what = steps(peer)
            self.sides.append((live.Actor(what), server, peer))
            self.sides[-1][0].do(0)
        self.pid = self.sides[0][0].pid

    def play(self, pauses=(0, 0, 0, 0)):
        """All steps but the end, with these pauses after them: [(began, ended, counts), ...], in Unix seconds."""
        played = []
        for step, pause in enumerate(pauses, 1):
            began = time.time()
            for one, server, peer in self.sides:
                if step == 1:
                    visitors = [socket.create_connection(server.getsockname()) for _ in range(30)]
                if step == 3:
                    for _ in range(4):
                        workload.reset(socket.create_connection(server.getsockname()))
                one.do(step)
                if step == 1:
                    peer.visitors = visitors
                    peer.accept(42, peer.v4)
                    peer.accept(21, peer.v6)
                if step == 2:
                    for sock in peer.accepted[20:27]:       # of those to IPv4 that stay open
                        workload.reset(sock)
            played.append((began, time.time(), self.COUNTS[step - 1]))
            live.settle(pause)
        return played

    def end(self):
        for one, _, _ in self.sides:
            one.end()

    def close(self):
        for _, server, peer in self.sides:
            server.close()
            peer.close()


def bounds(played, begin, end, tolerance):
    """What happened for sure between these two moments, and what may have: two Counters."""
    low, high = collections.Counter(), collections.Counter()
    for began, ended, counts in played:
        low += counts if begin + tolerance < began and ended < end - tolerance else collections.Counter()
        high += counts if begin - tolerance < ended and began < end + tolerance else collections.Counter()
    return low, high


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    def test_totals_and_windows(self):
        life = Life()
        tracers = [live.Tracer("tcpchurn", life.pid, "-w", "0.5,1.5", "-i", "0.1", "--json", *some, check=False)
                   for some in ((), ("--no-kprobe",))]
        with live.tracing(*tracers):
            played = life.play(pauses=(0.4, 0.4, 0.8, 1.8))
            life.end()
            live.settle(0.3)
        life.close()
        for tracer in tracers:
            self.assertEqual((tracer.status, tracer.stderr), (0, "tcpchurn: process %d has ended\n" % life.pid))
            self.assertEqual(collections.Counter(tracer.objects[-1]["all"]), Life.ALL)
            # Without the last ones: the process ended between them.
            self.compare([update for update in tracer.objects if update["ts"] < played[-1][1] + 1.75], played)

    def compare(self, updates, played):
        """Each window of each update with what happened in it. What happened at its edges is not known exactly."""
        names, exact = ("accepted", "connected", "closed"), {0.5: set(), 1.5: set(), None: set()}
        for update in updates:
            self.assertEqual(update["windows"], [1.5, 0.5])
            counted = {window: [update[name][n] for name in names] for n, window in enumerate(update["windows"])}
            counted[None] = [update["all"][name] for name in names]
            self.assertEqual(update["opened"], [sum(counted[window][:2]) for window in update["windows"]])
            for window, counts in counted.items():
                # Windows end with a bucket of 50 ms, and the time of an update is when it is printed.
                low, high = bounds(played, update["ts"] - (window or 1e9), update["ts"], tolerance=0.1)
                for name, count in zip(names, counts):
                    self.assertTrue(low[name] <= count <= high[name], (window, name, count, low, high, update))
                if low == high:
                    exact[window].add(tuple(counts))
        one, two, three, _, _ = ([counts[name] for name in names] for counts in Life.COUNTS)
        after = [tuple(map(sum, zip(*some))) for some in ([one], [one, two], [one, two, three])]
        self.assertLessEqual({after[0], after[2], (0, 0, 0)}, exact[1.5])
        self.assertLessEqual({after[0], tuple(three), (0, 0, 0)}, exact[0.5])
        self.assertLessEqual(set(after), exact[None])

    def test_documented_format(self):
        actor = live.Actor([])
        with live.Tracer("tcpchurn", actor.pid, "-i", "0.3", "-a") as tracer:
            live.settle(0.4)
        self.assertEqual(tracer.lines[0],
                         "   1200.0   500.0   240.0   120.0    60.0    30.0    10.0     5.0     1.0    ALL")
        self.assertEqual(tracer.lines[1],
                         "A       0       0       0       0       0       0       0       0       0      0")
        self.assertEqual([line[0] for line in tracer.lines[:4]], [" ", "A", "O", "C"])
        actor.end()

    def test_prometheus(self):
        """The file is there from the start, has the counts in the end, and is gone afterwards."""
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
            path = os.path.join(folder, "a.prom")
            with live.Tracer("tcpchurn", os.getpid(), "--prometheus", path, "-i", "0.2") as tracer:
                for _ in range(3):
                    connect(listener.getsockname()).close()
                listener.accept()

                def counts():
                    with open(path) as file:
                        return [int(n) for n in re.findall(r"_total\{.*\} (\d+)\n", file.read())]
                live.until(lambda: counts() == [1, 3, 4, 0, 0])
                self.assertEqual(counts(), [1, 3, 4, 0, 0])
            self.assertEqual((tracer.stdout, os.listdir(folder)), ("", []))
        tracer = live.Tracer("tcpchurn", os.getpid(), "--prometheus", path, check=False)
        with self.assertRaisesRegex(AssertionError, "tcpchurn: cannot write the output: No such file or directory\n$"):
            tracer.__enter__()
        self.assertEqual(tracer.status, 1)

    def test_no_such_process(self):
        pid = workload.spawn("gone", None, lambda: None)
        workload.wait(pid)
        result = subprocess.run([live.PYTHON, live.ROOT / "tcpchurn.py", str(pid)], capture_output=True, text=True,
                                check=False)
        self.assertEqual((result.returncode, result.stderr), (1, "tcpchurn: no such process: %d\n" % pid))

    def test_process_that_ends_while_the_tool_starts(self):
        with subprocess.Popen(["sleep", "60"]) as process:
            tracer = live.Tracer("tcpchurn", process.pid, before="""
import os
import time
load = tcpchurn.load
def load_late(args):
    os.kill(args.pid[0], 9)
    while os.path.exists("/proc/%d" % args.pid[0]):
        time.sleep(0.01)
    return load(args)
tcpchurn.load = load_late
""")
            tracer.start()
            process.wait()
            status = tracer.process.wait(live.START)
            tracer.err.seek(0)
            self.assertEqual((status, tracer.err.read()), (0, "tcpchurn: process %d has ended\n" % process.pid))


class Filters(live.Alone):
    def test_filters(self):
        """By address and namespace. Another process does the same."""
        public = "198.51.100.1", "2001:db8::1"
        for namespace in self.namespaces.client, self.namespaces.server:
            for address in public:
                subprocess.run(["ip", "-n", namespace, "addr", "add", address, "dev", "lo"], check=True)
        # The namespace, the address of both ends, and how many connections: sums of these tell which ones they are.
        visits = [("client", "127.0.0.1", 1), ("client", "::1", 2), ("client", public[0], 4), ("client", public[1], 8),
                  ("server", "127.0.0.1", 16), ("server", public[0], 32)]

        def visit(_):
            for where, address, times in visits:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with live.network(getattr(self.namespaces, where)), \
                        socket.create_server((address, 0), family=family) as listener:
                    for _ in range(times):
                        with socket.create_connection(listener.getsockname()[:2], source_address=(address, 0)):
                            listener.accept()[0].close()
        actor, other = live.Actor([visit]), live.Actor([visit])
        expected = {(): 63, ("-p",): 4 + 8 + 32, ("--netns", self.namespaces.client): 1 + 2 + 4 + 8,
                    ("--netns", self.namespaces.inode(self.namespaces.server)): 16 + 32,
                    ("--netns", self.namespaces.server, "-p"): 32}
        tracers = [live.Tracer("tcpchurn", actor.pid, "--json", *some) for some in expected]
        with live.tracing(*tracers):
            other.do(0)
            actor.do(0)
        for (options, times), tracer in zip(expected.items(), tracers):
            with self.subTest(options):
                self.assertEqual(tracer.objects[-1]["all"], {"opened": 2 * times, "accepted": times, "connected": times,
                                                             "closed": 2 * times})
        actor.end()
        other.end()
