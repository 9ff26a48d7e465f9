"""tcpchurn against a process that opens and closes known numbers of connections in known seconds."""
import collections
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

import live
import workload

REFUSED = ("127.0.0.9", 9)


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


class Actor:
    """A process that takes steps: each is a function of its own state, a dict."""

    END = 255

    def __init__(self, steps):
        self.orders, self.write = os.pipe()
        self.read, self.answers = os.pipe()
        self.pid = workload.spawn("actor", None, self.obey, steps)
        os.close(self.answers)

    def obey(self, steps):
        signal.alarm(int(120 * live.SLOW))          # if nobody ends it
        os.close(self.write)            # so that it ends, by an error, if the test does
        state = {}
        while True:
            order = os.read(self.orders, 1)[0]
            if order == self.END:
                return
            steps[order](state)
            os.write(self.answers, b".")

    def do(self, step):
        os.write(self.write, bytes([step]))
        assert os.read(self.read, 1), "the actor has failed in step %d" % step

    def end(self):
        os.write(self.write, bytes([self.END]))
        os.waitpid(self.pid, 0)


class Peer:
    """Accepts whatever comes, and keeps it."""

    def __init__(self):
        self.v4 = socket.create_server(("127.0.0.1", 0), backlog=500)
        self.v6 = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=500)
        self.accepted = []

    def accept(self, count, listener):
        self.accepted += [listener.accept()[0] for _ in range(count)]

    def close(self):
        for sock in [self.v4, self.v6, *self.accepted]:
            sock.close()


def steps(peer):
    v4, v6 = peer.v4.getsockname(), peer.v6.getsockname()[:2]
    server = socket.create_server(("127.0.0.1", 0), backlog=500)

    def before(state):
        state["before"] = [connect(v4), connect(v4), connect(v6)]

    def opens(state):
        state["v4"] = in_threads(lambda: connect(v4), 40)
        state["v6"] = in_threads(lambda: connect(v6), 20)
        state["refused"] = in_threads(lambda: connect(REFUSED), 5)
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

    ALL = collections.Counter(opened=99, accepted=34, connected=65, closed=102)         # in the end

    def __init__(self):
        self.sides = []
        for _ in range(2):
            peer = Peer()
            server, what = steps(peer)
            self.sides.append((Actor(what), server, peer))
            self.sides[-1][0].do(0)
        self.pid = self.sides[0][0].pid

    def play(self):
        """All steps but the end; the moments (Unix seconds) after which each was done."""
        moments = []
        for step in (1, 2, 3, 4):
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
            moments.append(time.time())
            time.sleep(0.8 if step == 3 else 0.4)
        return moments

    def end(self):
        for one, _, _ in self.sides:
            one.end()

    def close(self):
        for _, server, peer in self.sides:
            server.close()
            peer.close()


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    @live.by_timer
    def test_totals_and_windows(self):
        """Three tools with other options beside: what they count is compared in the end only."""
        life = Life()
        with live.Namespaces() as namespaces:
            options = (), ("--probes", "tracepoint"), ("--ignore-private",), ("--netns", namespaces.server)
            tracers = [live.Tracer("tcpchurn", life.pid, "-w", "1,3", "-i", "0.2", "--json", *some, check=False)
                       for some in options]
            with live.tracing(*tracers):
                moments = life.play()
                time.sleep(3.4)
                moments.append(time.time())
                time.sleep(0.3)
                life.end()
                time.sleep(0.3)
        life.close()
        for tracer, total in zip(tracers, (Life.ALL, Life.ALL, {}, {})):
            self.assertEqual((tracer.status, tracer.stderr), (0, "tcpchurn: process %d has ended\n" % life.pid))
            self.assertEqual(tracer.objects[-1]["all"], {name: total.get(name, 0) for name in Life.ALL}, tracer.command)
        self.compare(tracers[0].objects, *moments)

    def compare(self, updates, opened, closed, early, again, quiet):
        """The updates with what a life has done up to these moments."""
        def after(moment):
            return next(update for update in updates if update["ts"] > moment)
        self.assertEqual(after(opened)["all"], {"opened": 95, "accepted": 30, "connected": 65, "closed": 5})
        self.assertEqual(after(opened)["windows"], [3.0, 1.0])
        self.assertEqual(after(opened)["connected"], [65, 65])
        self.assertEqual(after(opened)["accepted"], [30, 30])
        self.assertEqual(after(opened)["opened"], [95, 95])
        # 10 and one from before closed, 6 shut down, 7 reset by the peer; then 4 that were reset before accept()
        self.assertEqual(after(closed)["all"]["closed"], 5 + 10 + 1 + 6 + 7)
        self.assertEqual(after(early)["all"], {"opened": 99, "accepted": 34, "connected": 65, "closed": 33})
        # what had ended already is not counted again when it is closed
        self.assertEqual(after(again)["all"]["closed"], 33)
        self.assertEqual([after(again)[name][1] for name in ("accepted", "connected")], [4, 0])
        self.assertEqual([after(again)[name][0] for name in ("accepted", "connected", "closed")], [34, 65, 33])
        # empty again
        self.assertEqual([after(quiet)[name] for name in ("opened", "closed")], [[0, 0], [0, 0]])

    def test_documented_format(self):
        actor = Actor([lambda state: None])
        with live.Tracer("tcpchurn", actor.pid, "-i", "0.3", "-a") as tracer:
            time.sleep(0.4)
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
                time.sleep(0.5)
                with open(path) as file:
                    text = file.read()
            self.assertEqual([int(n) for n in re.findall(r"_total\{.*\} (\d+)\n", text)], [1, 3, 4, 0, 0])
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
    os.kill(args.pid, 9)
    while os.path.exists("/proc/%d" % args.pid):
        time.sleep(0.01)
    return load(args)
tcpchurn.load = load_late
""")
            tracer.start()
            process.wait()
            status = tracer.process.wait(live.START)
            tracer.err.seek(0)
            self.assertEqual((status, tracer.err.read()), (0, "tcpchurn: process %d has ended\n" % process.pid))
