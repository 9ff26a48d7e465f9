"""Where a tool may easily be wrong: in containers, with odd processes and sockets, or when it is held up itself."""
import concurrent.futures
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import live
import workload

EXIT = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)   # exit(2): of a thread alone
F_SETPIPE_SZ, CLONE_NEWNS, IPPROTO_MPTCP = 1031, 0x20000, 262
LAST_PID = "/proc/sys/kernel/ns_last_pid"


class Unheard(live.Tracer):
    """A tool whose standard error nobody reads."""

    def start(self):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        reader, writer = os.pipe()
        self.process = subprocess.Popen(self.command, stdout=self.out, stderr=writer)
        os.close(reader)
        os.close(writer)


class Unread(live.Tracer):
    """A tool whose output is a small pipe that nobody reads."""

    def start(self):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.err)
        fcntl.fcntl(self.process.stdout, F_SETPIPE_SZ, 4096)

    def is_tracing(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])         # its heading, or its first update

    def stop(self, number=signal.SIGKILL):
        super().stop(number)
        self.process.stdout.close()


class Leaderless(live.Actor):
    """An actor that is a second thread: the first one ends in one more step, the last."""

    def __init__(self, steps):
        self.over = threading.Event()
        super().__init__([*steps, lambda _: self.over.set()])

    def obey(self, steps):
        def second():
            try:
                super(Leaderless, self).obey(steps)
            finally:
                os._exit(0)
        threading.Thread(target=second).start()
        self.over.wait()
        ctypes.CDLL(None).syscall(EXIT, 0)


def connect(listener, times=1):
    """Open and close connections to the listener in this process."""
    for _ in range(times):
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()


def restless(listener):
    """Open and close connections until the end comes."""
    while True:
        connect(listener)
        time.sleep(0.02)


MORE = 5


def steps(listener):
    """Steps of an actor: keep a connection; close it, and open and close MORE."""
    def keep(state):
        state["kept"] = socket.create_connection(listener.getsockname()), listener.accept()[0]

    def go_on(state):
        for sock in state["kept"]:
            sock.close()
        connect(listener, MORE)
    return [keep, go_on]


# What the actor does in the second step, by what tcpchurn counts: it is both ends of each connection.
COUNTS = {"opened": 2 * MORE, "accepted": MORE, "connected": MORE, "closed": 2 * (1 + MORE)}


def sockets_of(pid):
    names = (os.readlink(fd.path) for fd in os.scandir("/proc/%d/fd" % pid) if os.path.islink(fd.path))
    return sum(name.startswith("socket:") for name in names)


def in_pid_namespace(number):
    """To be called as the first process of a PID namespace. A process that gets this number opens and closes.

    Returns its port and what the tools say of this process, of all, and what tcpchurn counts in the end.
    """
    tools = {"tcplife": [], "tcpaccept": [], "tcpv4connect": [], "deeptcptracer": ["-e", "tcp_set_state"]}
    here = "--netns", "/proc/self/ns/net"
    listener = socket.create_server(("127.0.0.1", 0))
    with open(LAST_PID, "w") as last:
        last.write(str(number - 1))
    actor = live.Actor(steps(listener))
    assert actor.pid == number, actor.pid
    actor.do(0)
    one, every = ({tool: live.Tracer(tool, "--json", *here, *options, *more) for tool, more in tools.items()}
                  for options in (("-p", number), ()))
    churn = live.Tracer("tcpchurn", number, "--json", check=False)
    with live.tracing(*one.values(), *every.values(), churn):
        actor.do(1)
        live.settle(0.2)
        actor.end()
    return {"port": listener.getsockname()[1], "one": {tool: tracer.objects for tool, tracer in one.items()},
            "every": {tool: tracer.objects for tool, tracer in every.items()},
            "all": churn.objects[-1]["all"], "stderr": churn.stderr}


def owners(lines, port):
    """Whom the lines with this port name."""
    return {line["pid"] for line in lines
            if port in [line.get(name) for name in ("lport", "rport", "sport", "dport")]}


class Right(live.Alone):
    def test_windows_however_far_apart_the_updates_are(self):
        """Updates further apart than the largest window, and a tool that is stopped: each update is right."""
        log, tolerance = [], 0.05

        def visit(seconds, pause):
            end = time.time() + seconds
            while time.time() < end:
                log.append(time.time())
                connect(listener)
                time.sleep(pause)
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                live.Tracer("tcpchurn", os.getpid(), "-w", "0.01,0.2", "-i", "0.3", "--json") as tracer:
            tracer.process.send_signal(signal.SIGSTOP)
            for _ in range(20):
                visit(0.2, 0)
                time.sleep(0.2)
                # A bucket is for a millisecond here, and the largest window needs 200: each has been used again.
                if len({int(moment * 1000) for moment in log}) > 2 * 200:
                    break
            tracer.process.send_signal(signal.SIGCONT)
            visit(0.8, 0.02)
            live.settle(0.6)

        def between(begin, end):
            return sum(begin < moment < end for moment in log)
        for update in tracer.objects:
            ts, opened = update["ts"], update["opened"][0] / 2
            self.assertLessEqual(between(ts - 0.2 + tolerance, ts - tolerance), opened, update)
            self.assertLessEqual(opened, between(ts - 0.2 - tolerance, ts + tolerance), update)
        self.assertEqual([update["all"]["closed"], update["opened"]], [2 * len(log), [0, 0]])

    def test_pid_namespace(self):
        """PIDs are those of the namespace where the tools run; a process outside that has the same number is another.

        What is printed of a process outside has no owner.
        """
        if not os.path.exists(LAST_PID):
            self.skipTest("this kernel has no " + LAST_PID)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            outside, port = workload.spawn("restless", None, restless, listener), listener.getsockname()[1]
            text = "import json, test_right; print(json.dumps(test_right.in_pid_namespace(%d)))" % outside
            try:
                said = json.loads(subprocess.check_output(
                    ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-W", "ignore", "-c", text]))
            finally:
                os.kill(outside, signal.SIGKILL)
                os.waitpid(outside, 0)
        inside = said["port"]
        for tool, lines in said["every"].items():
            self.assertEqual(owners(lines, port), {None}, tool)
            self.assertEqual(owners(lines, inside) - {None}, {outside}, tool)
        self.assertEqual({line["pid"] for lines in said["one"].values() for line in lines}, {outside})
        self.assertEqual([len(said["one"][tool]) for tool in ("tcplife", "tcpaccept", "tcpv4connect")],
                         [COUNTS["opened"], COUNTS["accepted"], COUNTS["connected"]])
        self.assertEqual(sum(line["state"] == "CLOSE_WAIT" for line in said["one"]["deeptcptracer"]), 1 + MORE)
        self.assertEqual(said["all"], COUNTS)
        self.assertEqual(said["stderr"], "tcpchurn: process %d has ended\n" % outside)

    def test_another_attempt_has_another_port(self):
        """A socket that connects again after a refusal has not the local port of the first attempt."""
        where = "--json", "--netns", self.netns
        first, second = (live.Tracer("tcplife", *where, "-L", port) for port in (40000, 40001))
        changes, changes_of_first = (live.Tracer("deeptcptracer", *where, "-e", "tcp_set_state", *options)
                                     for options in ((), ("-S", 40000)))
        with live.tracing(first, second, changes, changes_of_first), live.local_ports(40000, 40001), \
                socket.create_server(("127.0.0.1", 50)) as listener, socket.socket() as sock:
            with socket.socket() as other:          # takes the port that this attempt is not to have
                other.bind(("127.0.0.1", 40001))
                self.assertTrue(sock.connect_ex(("127.0.0.1", 51)))
            with socket.socket() as other:
                other.bind(("127.0.0.1", 40000))
                sock.connect(listener.getsockname())
            listener.accept()[0].close()
        self.assertEqual([[(line["lport"], line["rport"]) for line in tracer.objects] for tracer in (first, second)],
                         [[(40000, 51)], [(40001, 50)]])
        self.assertEqual([(line["sport"], line["dport"]) for line in changes.objects if line["state"] == "SYN_SENT"],
                         [(0, 51), (0, 50)])
        self.assertEqual({line["dport"] for line in changes_of_first.objects}, {51})

    def test_sessions_that_nobody_accepts(self):
        """They have no owner in the end, are not printed if a process is asked for, and reported if there are too many.

        A reader of standard error who goes away does not end the tool.
        """
        where = "--json", "--netns", self.netns
        every, one, named = (live.Tracer("tcplife", *where, *option) for option in ((), ("-p", 1), ("--uid", 7)))
        few, unheard = (kind("tcplife", *where, check=False, pretend={"MAX_UNCLAIMED": 1})
                        for kind in (live.Tracer, Unheard))
        with socket.create_server(("127.0.0.1", 60)) as listener, live.tracing(every, one, named, few, unheard):
            for _ in range(10):
                workload.reset(socket.create_connection(listener.getsockname()))
            live.settle(0.3)
            with socket.create_server(("127.0.0.1", 61)) as other:
                connect(other)
        self.assertEqual([line["pid"] for line in every.objects if line["lport"] == 60], [None] * 10)
        self.assertEqual((one.lines, named.lines), ([], []))
        self.assertEqual([line["pid"] for line in few.objects if line["lport"] == 60], [None])
        self.assertEqual(live.losses(few), {"sessions lost: the map of unaccepted sessions was full": 9})
        for tracer in few, unheard:
            self.assertEqual(tracer.status, 0)
            self.assertEqual([line["pid"] for line in tracer.objects if line["lport"] == 61], [os.getpid()])

    def test_more_sockets_than_the_maps_hold(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection(listener.getsockname()))
                stack.enter_context(listener.accept()[0])
            churn, events = (live.Tracer(*tool, check=False, pretend={"MAX_SOCKETS": 16})
                             for tool in (("tcpchurn", os.getpid()), ("deeptcptracer",)))
            with live.tracing(churn, events):
                unknown = sockets_of(os.getpid()) - 16
        self.assertEqual((churn.status, events.status), (0, 0))
        self.assertEqual(churn.stderr,
                         "tcpchurn: %d owners of sockets from before the start not known: the map was full\n" % unknown)
        self.assertRegex(events.stderr, "^deeptcptracer: [0-9]+ owners of sockets from before the start not known: "
                                        "the map was full\n")
        self.assertGreaterEqual(int(events.stderr.split()[1]), unknown)

    def test_first_thread_has_ended(self):
        """The process is what its other threads are: before the start, and while the tool runs."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            actors = [Leaderless(steps(listener)) for _ in range(2)]
            for actor in actors:
                actor.do(0)
            actors[0].do(2)
            churns = [live.Tracer("tcpchurn", actor.pid, "--json", check=False) for actor in actors]
            with live.tracing(*churns), \
                    live.Tracer("deeptcptracer", "--json", "-N", self.netns, "-p", actors[0].pid) as events:
                actors[1].do(2)
                live.settle(0.3)
                for actor in actors:
                    actor.do(1)
                    actor.end()
                live.settle(0.3)
        for actor, churn in zip(actors, churns):
            self.assertEqual((churn.status, churn.stderr), (0, "tcpchurn: process %d has ended\n" % actor.pid))
            self.assertEqual(churn.objects[-1]["all"], COUNTS)
        # One of these is from before the start, and comes before its owner closes it.
        self.assertEqual(sum(line["state"] == "CLOSE_WAIT" for line in events.objects), 1 + MORE)

    def test_closed_by_multipath_tcp(self):
        """Whom MPTCP's worker, a kernel thread, closes a session for is not known."""
        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
        except OSError as error:
            self.skipTest("this kernel has no MPTCP: %s" % error)
        with listener, live.Tracer("tcplife", "--json", "--netns", self.netns, "--owner", "close") as tracer:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            for _ in range(3):
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as client:
                    client.connect(listener.getsockname())
                    server = listener.accept()[0]
                with server:
                    server.recv(1)
                live.settle(0.1)
        pids = [line["pid"] for line in tracer.objects if line["lport"] == port]
        self.assertEqual(len(pids), 3)
        self.assertLessEqual(set(pids), {os.getpid(), None})

    def test_closed_by_io_uring(self):
        """Nor whom io_uring's worker closes a direct descriptor for."""
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                live.Tracer("tcplife", "--json", "--netns", self.netns) as tracer:
            port = listener.getsockname()[1]
            with socket.create_connection(listener.getsockname()):
                try:
                    ring = workload.uring_accept(listener, direct=True)
                except OSError as error:
                    self.skipTest("this kernel has no io_uring, or no direct descriptors: %s" % error)
            os.close(ring)
            live.settle(0.3)
        pids = [line["pid"] for line in tracer.objects if line["lport"] == port]
        self.assertEqual(len(pids), 1)
        self.assertLessEqual(set(pids), {os.getpid(), None})

    def test_duration_ends_though_nobody_reads(self):
        tools = {"tcplife": [], "tcpaccept": [], "tcpv4connect": [], "tcpchurn": [os.getpid(), "-i", 0.02],
                 "deeptcptracer": []}

        def run(tool):
            with Unread(tool, *tools[tool], "--duration", 1, check=False) as tracer:
                connect(listener, 100)
                tracer.process.wait(5 * live.SLOW)
            # Other people's connections may cost losses.
            return tracer.status, [line for line in tracer.stderr.splitlines() if " lost: " not in line]
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                concurrent.futures.ThreadPoolExecutor(len(tools)) as side_by_side:
            for tool, said in zip(tools, side_by_side.map(run, tools)):
                self.assertEqual(said, (0, ["%s: the output was not read to its end" % tool]))

    def test_containers(self):
        """tcpaccept with a map of cgroups and with one of mount namespaces, made as its manual page says."""
        with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
            folder, root = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
            for kind, path in (("bpf", folder), ("cgroup2", root)):
                subprocess.run(["mount", "-t", kind, kind, path], check=True)
                stack.callback(subprocess.run, ["umount", path], check=True)
            group = "%s/tcpt-%d" % (root, os.getpid())
            os.mkdir(group)
            stack.callback(os.rmdir, group)

            def leave(_):
                ctypes.CDLL(None).unshare(CLONE_NEWNS)
            actors = [live.Actor([leave, lambda _: connect(listener, 3)]) for _ in range(2)]
            for actor in actors:
                stack.callback(actor.end)
            with open(group + "/cgroup.procs", "w") as members:
                members.write(str(actors[0].pid))
            actors[1].do(0)
            tracers = []
            for option, size, path in (("--cgroupmap", 8, group), ("--mntnsmap", 4, "/proc/%d/ns/mnt" % actors[1].pid)):
                pinned = folder + "/" + option.strip("-")
                key = ["%d" % byte for byte in os.stat(path).st_ino.to_bytes(8, sys.byteorder)]
                for command in (
                        ["create", pinned, *("type hash key 8 value %d entries 1024 name set" % size).split()],
                        ["update", "pinned", pinned, "key", *key, "value", *["0"] * size]):
                    subprocess.run(["bpftool", "map", *command], check=True)
                tracers.append(live.Tracer("tcpaccept", "--json", "--netns", self.netns, option, pinned))
            with live.tracing(*tracers):
                connect(listener, 3)
                for actor in actors:
                    actor.do(1)
        self.assertEqual([[line["pid"] for line in tracer.objects] for tracer in tracers],
                         [[actor.pid] * 3 for actor in actors])
