"""Whose connections a tool shows: by process, name, user and cgroup; and what else it says of an owner."""
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import live
import own
import tcplife
import workload

TOOLS = {"tcplife": 2, "tcpaccept": 1, "tcpv4connect": 1, "deeptcptracer": 1}        # at least so many lines a visit
NAMES = "one", "the other", "one and a half"
USER = 4294967294


class Visitor(live.Actor):
    """A process of this name, user and cgroup, both ends of whose connections are its own."""

    def __init__(self, name, listener, uid=0, cgroup=None):
        def become(_):
            if cgroup:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            workload.set_comm(name)
            os.setresuid(uid, uid, 0)

        def keep(state):
            state["kept"] = own.pair(listener)

        def leave(state):
            for end in state["kept"]:
                end.close()
        super().__init__([become, lambda _: own.connect(listener), keep, leave])
        self.do(0)


class Owners(live.Alone):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not tcplife.cgroup_mount():
            folder = tempfile.mkdtemp()
            subprocess.run(["mount", "-t", "cgroup2", "cgroup2", folder], check=True)
            cls.addClassCleanup(subprocess.run, ["umount", folder], check=True)
            tcplife.cgroup_mount.cache_clear()
        cls.top = pathlib.Path(tcplife.cgroup_mount(), "tcpt-%d" % os.getpid())
        cls.cgroups = [cls.top, cls.top / "shop.service", cls.top / ("docker-%s.scope" % ("0123456789abcdef" * 4))]
        for cgroup in cls.cgroups:
            cgroup.mkdir()
        cls.addClassCleanup(lambda: [cgroup.rmdir() for cgroup in reversed(cls.cgroups) if cgroup.exists()])

    def visitors(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        found = [Visitor(NAMES[0], listener, cgroup=self.cgroups[1]),
                 Visitor(NAMES[1], listener, USER, self.cgroups[2]), Visitor(NAMES[2], listener)]
        for visitor in found:
            self.addCleanup(visitor.end)
        return found

    def test_filters(self):
        """Each lets through whom it names and nobody else, in each tool."""
        visitors = self.visitors()
        pids = [visitor.pid for visitor in visitors]
        path = "/" + str(self.top.relative_to(tcplife.cgroup_mount()))
        filters = {("-p", "%d,%d" % (pids[0], pids[2])): {0, 2}, ("--name", NAMES[0]): {0},
                   ("--name", "nobody,%s,%s" % NAMES[1:]): {1, 2}, ("--uid", "%d,77" % USER): {1},
                   ("--uid", "0"): {0, 2}, ("--cgroup", path): {0, 1}, ("--cgroup", str(self.cgroups[1])): {0},
                   ("--cgroup", path, "--uid", "0"): {0}, ("--uid", "78"): set()}
        for tool, count in TOOLS.items():
            if tool != "tcplife":       # the conditions are the same
                filters = {option: wanted for option, wanted in filters.items() if wanted in ({0, 1}, {1, 2}, {1})}
            tracers = {option: live.Tracer(tool, "--json", "--netns", self.netns, *option) for option in filters}
            with live.tracing(*tracers.values()):
                for visitor in visitors:
                    visitor.do(1)
            for option, wanted in filters.items():
                with self.subTest(tool=tool, option=option):
                    owners = [line["pid"] for line in tracers[option].objects]
                    self.assertEqual(set(owners), {pids[n] for n in wanted})
                    self.assertGreaterEqual(len(owners), count * len(wanted))

    def test_from_before_the_start(self):
        """The options are asked of the process that holds the socket then."""
        visitors = self.visitors()
        for visitor in visitors:
            visitor.do(2)
        path = "/" + str(self.top.relative_to(tcplife.cgroup_mount()))
        for option, wanted in {("--name", NAMES[0]): {0}, ("--uid", USER): {1}, ("--cgroup", path): {0, 1},
                               ("-p", "%d,%d" % (visitors[0].pid, visitors[2].pid)): {0, 2}}.items():
            with self.subTest(option):
                options = "--json", "--existing", "-i", 1000, "--netns", self.netns
                with live.Tracer("tcplife", *options, *option) as tracer:
                    pass
                self.assertEqual([line["pid"] for line in tracer.objects], [
                    line["pid"] for line in tracer.objects if line["pid"] in {visitors[n].pid for n in wanted}])
                self.assertEqual(len(tracer.objects), 2 * len(wanted))
        events = live.Tracer("deeptcptracer", "--json", "-N", self.netns, "--uid", USER, "-e", "tcp_set_state")
        with events:
            for visitor in visitors:
                visitor.do(3)
        self.assertEqual({line["pid"] for line in events.objects}, {visitors[1].pid})

    def test_cgroups(self):
        """As /proc/PID/cgroup shows them, and as units."""
        visitors = self.visitors()
        for visitor in visitors:
            visitor.do(2)
        paths = [pathlib.Path("/proc/%d/cgroup" % visitor.pid).read_text().partition("0::")[2].splitlines()[0]
                 for visitor in visitors]
        self.assertTrue(paths[0].endswith("/shop.service"), paths)
        units = ["shop", "0123456789ab", paths[2].rpartition("/")[2] or "/"]
        tracers = {tool: live.Tracer(tool, "--json", "--netns", self.netns) for tool in TOOLS}
        tracers["existing"] = live.Tracer("tcplife", "--json", "--netns", self.netns, "--existing", "-i", 1000)
        texts = {tool: live.Tracer(tool, "--unit", "--netns", self.netns) for tool in TOOLS}
        texts["csv"] = live.Tracer("tcplife", "-s", "--unit", "--netns", self.netns)
        with live.tracing(*tracers.values(), *texts.values()):
            for visitor in visitors:
                visitor.do(1)
        for tool, tracer in tracers.items():
            found = {(line["pid"], line["cgroup"]) for line in tracer.objects if line["pid"]}
            self.assertEqual(found, set(zip((visitor.pid for visitor in visitors), paths)), tool)
        for tool, tracer in texts.items():
            for visitor, unit in zip(visitors, units):
                lines = [line for line in tracer.lines if str(visitor.pid) in line.replace(",", " ").split()]
                self.assertTrue(lines and all(" %s " % unit in line.replace(",", " ") for line in lines), (tool, lines))
        with live.Tracer("tcpchurn", visitors[0].pid, "--json") as churn:
            pass
        self.assertEqual(churn.objects[-1]["cgroup"], paths[0])

    def test_where_cgroups_are_not_all_seen(self):
        """With cgroup v1 only, and in a cgroup namespace, where paths start at its root."""
        visitors, mount = self.visitors(), tcplife.cgroup_mount()
        none, some = (live.Tracer("tcplife", "--json", "--netns", self.netns) for _ in range(2))
        none.command[:0] = ["unshare", "--mount", "sh", "-c", "umount %s && exec \"$@\"" % mount, "sh"]
        inside = "umount %s && mount -t cgroup2 cgroup2 %s && exec \"$@\"" % (mount, mount)
        some.command[:0] = ["sh", "-c", "echo $$ >%s/cgroup.procs && exec unshare --cgroup --mount \"$@\"" % self.top,
                            "sh", "sh", "-c", inside, "sh"]
        with live.tracing(none, some):
            for visitor in visitors:
                visitor.do(1)
        self.assertEqual({line["cgroup"] for line in none.objects}, {None})
        self.assertEqual({(line["pid"], line["cgroup"]) for line in some.objects}, {
            (visitors[0].pid, "/" + self.cgroups[1].name), (visitors[1].pid, "/" + self.cgroups[2].name),
            (visitors[2].pid, None)})
        command = [*none.command[:6], *none.command[6:8], "--cgroup", "/"]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        self.assertEqual((result.returncode, result.stderr.splitlines()[-1]),
                         (2, "tcplife: error: argument --cgroup: not a cgroup v2: '/'"))

    def test_a_cgroup_that_has_gone(self):
        """Its path is still known if a line has shown it before; else it is null."""
        cgroup = self.top / "short.service"
        listener = socket.create_server(("127.0.0.1", 0))
        with listener:
            for shown in True, False:
                cgroup.mkdir()
                visitor = Visitor("short", listener, cgroup=cgroup)
                with live.Tracer("tcplife", "--json", "--netns", self.netns) as tracer:
                    if shown:
                        visitor.do(1)
                        live.settle(0.3)
                    visitor.do(2)
                    os.kill(tracer.process.pid, signal.SIGSTOP)         # what comes now is printed when it has gone
                    visitor.do(3)
                    visitor.end()
                    cgroup.rmdir()
                    os.kill(tracer.process.pid, signal.SIGCONT)
                found = {line["cgroup"] for line in tracer.objects}
                self.assertEqual({path and path.rpartition("/")[2] for path in found},
                                 {"short.service"} if shown else {None})

    def test_several_processes_at_once(self):
        """tcpchurn counts all of a name, a user or a cgroup together."""
        visitors = self.visitors()
        for visitor in visitors:
            visitor.do(2)
        tracers = {("--name", "%s,%s" % NAMES[:2]): 2, ("--uid", USER): 1, ("--cgroup", str(self.top)): 2}
        churns = {option: live.Tracer("tcpchurn", "--json", "--netns", self.netns, *option) for option in tracers}
        with live.tracing(*churns.values()):
            for visitor in visitors:
                visitor.do(1)
            live.settle(0.2)
        for option, count in tracers.items():
            last = churns[option].objects[-1]
            self.assertEqual((last["pid"], last["all"]["accepted"], last["all"]["connected"], last["all"]["closed"]),
                             (None, count, count, 2 * count))

    def test_refused(self):
        for option in ("--cgroup", "/no/such"), ("--name", "sixteen bytes..."), ("--name", ""), ("--uid", "x"), \
                ("--uid", "-1"):
            command = [live.PYTHON, live.ROOT / "tcpaccept.py", *option]
            result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            self.assertEqual(result.returncode, 2, result.stderr)


class Figures(live.Alone):
    def test_inodes(self):
        """What ss -e and lsof show, in each tool."""
        tracers = {tool: live.Tracer(tool, "--json", "--netns", self.netns) for tool in TOOLS}
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers.values()):
            ends = own.pair(listener)
            inodes = {end.getsockname()[1]: os.fstat(end.fileno()).st_ino for end in ends}
            port = listener.getsockname()[1]
            for end in ends:
                end.close()
        client, = inodes.keys() - {port}
        for tool, tracer in tracers.items():
            for line in tracer.objects:
                ours = line.get("lport", line.get("sport"))
                if tool == "tcpv4connect":
                    self.assertEqual(line["inode"], inodes[client])
                elif line["inode"] is not None and ours in inodes:
                    self.assertEqual(line["inode"], inodes[ours], (tool, line))
            self.assertTrue([line for line in tracer.objects if line["inode"]], tool)

    def test_min_ms(self):
        tracers = {option: live.Tracer("tcplife", "--json", "--netns", self.netns, *option)
                   for option in ((), ("--min-ms", 100))}
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers.values()):
            for seconds in 0, 0.3:
                ends = own.pair(listener)
                time.sleep(seconds)
                for end in ends:
                    end.close()
        every, slow = (tracer.objects for tracer in tracers.values())
        self.assertEqual((len(every), len(slow)), (4, 2))
        self.assertEqual([live.timeless(line) for line in slow],
                         [live.timeless(line) for line in every if line["ms"] >= 100])

    def test_what_is_lost_on_the_way_here(self):
        """It shows in no RETR of this end, but in OOO."""
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                live.Tracer("tcplife", "--json", "--netns", self.netns) as tracer:
            client, server = own.pair(listener)
            with client, server:
                server.send(b"x")
                client.recv(1)
                workload.deaf(server)
                client.send(b"lost")
                workload.hear(server)
                client.send(b"early")
                workload.receive(server, 9)
                port = listener.getsockname()[1]
        figures = {line["lport"] == port: (line["ooo"], line["retrans"] > 0) for line in tracer.objects}
        self.assertEqual(figures, {True: (1, False), False: (0, True)})
        for line in tracer.objects:
            self.assertTrue(line["min_rtt_us"] <= line["srtt_us"] * 1.5 and line["cwnd"] and line["mss"] > 500, line)

    @live.by_timer
    def test_a_lost_syn(self):
        """RETR tells it from a slow peer; --min-ms leaves the quick ones out."""
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as quick, \
                live.Tracer("tcpv4connect", "-r", "--json", "--netns", self.netns) as tracer, \
                live.Tracer("tcpv4connect", "-r", "--min-ms", 500, "--netns", self.netns) as slow:
            workload.deaf(listener)
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            time.sleep(0.3)
            workload.hear(listener)
            own.connect(quick)
            time.sleep(1.5)
            client.close()
        self.assertEqual(sorted((line["result"], line["retrans"]) for line in tracer.objects), [("ok", 0), ("ok", 1)])
        row, = slow.lines[1:]
        self.assertEqual(row.split()[-2:], ["ok", "1"])

    @live.by_timer
    def test_a_server_that_stops_accepting(self):
        """Its full queue is seen from the server alone: the kernel drops the handshakes' last ACKs."""
        with live.network(self.namespaces.server):
            listener = socket.create_server((self.namespaces.hosts[0], 0), backlog=1)
        with listener, contextlib.ExitStack() as stack, live.Tracer(
                "deeptcptracer", "-e", "tcp_retransmit_synack", "--json", "-N", self.namespaces.server) as tracer, \
                live.Tracer("deeptcptracer", "-R", "-N", self.namespaces.server) as text:
            late = [stack.enter_context(socket.socket()) for _ in range(4)]
            for client in late:         # their SYNs come before the queue is full
                workload.deaf(client)
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            for _ in range(2):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            for client in late:
                workload.hear(client)
            time.sleep(2)
        self.assertGreaterEqual(len(tracer.objects), 4)
        for line in tracer.objects:
            self.assertEqual((line["pid"], line["state"], line["backlog"], line["max_backlog"], line["saddr"]),
                             (os.getpid(), "NEW_SYN_RECV", 2, 1, self.namespaces.hosts[0]))
        rows = [row for row in text.lines if row.startswith("tcp_retransmit_synack()")]
        self.assertTrue(rows and all(row.endswith("queue 2/1") for row in rows), rows)


if __name__ == "__main__":
    unittest.main()
