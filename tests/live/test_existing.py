"""Sockets from before the start, and those that are open: what a walk through the kernel's tables finds."""
import contextlib
import os
import pathlib
import re
import socket
import subprocess
import time
import unittest

import live
import own
import workload

IPPROTO_MPTCP, TCP_REPAIR = 262, 19
CHILD_TABLE = pathlib.Path("/proc/sys/net/ipv4/tcp_child_ehash_entries")


def open_sessions(*options, check=True):
    """Returns the sessions that are open now, as tcplife lists them with these options."""
    with live.Tracer("tcplife", "--json", "--existing", "-i", 1000, *options, check=check) as tracer:
        pass
    lines = [line for line in tracer.objects if line["end"] == "open"]
    assert check is False or len({key(line) for line in lines}) == len(lines), "a session comes twice"
    return lines if check else (lines, tracer.stderr)


def key(line):
    return (line["lport"], line["raddr"], line["rport"], line["netns"])


def ends(client):
    """Returns the ports of both ends: as the client sees them, and as the server does."""
    ours, theirs = client.getsockname()[1], client.getpeername()[1]
    return (ours, theirs), (theirs, ours)


def ss(pid):
    """Returns how many connected sockets the process has, as ss says."""
    text = subprocess.run(["ss", "-Htnp"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return len(re.findall(r"\bpid=%d," % pid, text))


class Existing(live.Alone):
    def listen(self, **how):
        return self.enterContext(socket.create_server(("127.0.0.1", 0), **how))

    def pair(self, listener):
        return [self.enterContext(end) for end in own.pair(listener)]

    def enterContext(self, context):            # for Python before 3.11
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def test_owners_and_roles(self):
        """Each socket once, whoever has it by now, and in whatever namespace."""
        me, listener = os.getpid(), self.listen()
        known = {}

        def expect(client, client_side, server_side):
            known.update(zip(ends(client), (client_side, server_side)))
        client, _ = self.pair(listener)
        expect(client, (me, "connect"), (me, "accept"))
        # A port of the client's own choice and a listener without a backlog leave no trace.
        client = self.enterContext(socket.socket())
        client.bind(("127.0.0.1", 0))
        quiet = self.listen(backlog=0)
        client.connect(quiet.getsockname())
        self.enterContext(quiet.accept()[0])
        expect(client, (me, None), (me, None))
        client, server = self.pair(listener)
        keeper, giver = socket.socketpair()
        actor = live.Actor([lambda state: state.update(fds=socket.recv_fds(keeper, 1, 1)[1])])
        socket.send_fds(giver, [b"."], [server.fileno()])
        server.close()
        actor.do(0)
        expect(client, (me, "connect"), (actor.pid, "accept"))
        client, server = self.pair(listener)    # on its way
        socket.send_fds(giver, [b"."], [server.fileno()])
        server.close()
        expect(client, (me, "connect"), (None, "accept"))
        client, server = self.pair(listener)    # an orphan that sends its FIN again and again
        workload.deaf(server)
        expect(client, (None, "connect"), (me, "accept"))
        client.close()
        client = self.enterContext(socket.create_connection(listener.getsockname()))       # waits for accept()
        expect(client, (me, "connect"), (None, "accept"))
        deaf = self.listen()
        workload.deaf(deaf)
        client = self.enterContext(socket.socket())
        client.setblocking(False)
        client.connect_ex(deaf.getsockname())   # SYN_SENT
        known[client.getsockname()[1], deaf.getsockname()[1]] = me, "connect"
        with contextlib.suppress(OSError):      # this kernel has no MPTCP
            multi = self.enterContext(socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP))
            multi.bind(("127.0.0.1", 0))
            multi.listen()
            client = self.enterContext(socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP))
            client.connect(multi.getsockname())
            self.enterContext(multi.accept()[0])
            expect(client, (me, "connect"), (me, "accept"))
        with live.network(self.namespaces.server):
            client, _ = self.pair(self.listen())
        expect(client, (me, "connect"), (me, "accept"))
        found = {(line["lport"], line["rport"]): (line["pid"], line["role"]) for line in open_sessions()
                 if line["netns"] in (self.netns, self.namespaces.inode(self.namespaces.server))}
        self.assertEqual(found, known)
        actor.end()

    def test_figures(self):
        """They are of the whole session; what moved while the tool ran is beside them. The last line wins."""
        client, server = self.pair(self.listen())
        client.send(b"12345")
        server.send(b"123")
        tracer = live.Tracer("tcplife", "--json", "--existing", "-i", 0.3, "--netns", self.netns)
        text = live.Tracer("tcplife", "-x", "--existing", "-i", 0.3, "--netns", self.netns)
        with live.tracing(tracer, text):
            live.settle(0.6)
            client.send(b"1234567")
            live.settle(1)
            self.assertEqual((client.recv(9), server.recv(99)), (b"123", b"123451234567"))
            client.close()
            server.close()
        of_client = [line for line in tracer.objects if line["role"] == "connect"]
        figures = [(line["end"], line["tx_bytes"], line["tx_bytes_seen"], line["rx_bytes"], line["rx_bytes_seen"])
                   for line in of_client]
        self.assertEqual(sorted(set(figures), key=figures.index),
                         [("open", 5, 0, 3, 0), ("open", 12, 7, 3, 0), ("local", 12, 7, 3, 0)])
        self.assertEqual(figures[-1][0], "local")
        times = [line["ms"] for line in of_client]
        self.assertEqual(times, sorted(times))
        forms = {(line.split()[8], line.split()[-3]) for line in text.lines[1:]}
        for ms, end in forms:
            self.assertRegex(ms, r"^>\d+\.\d\d\+$" if end == "open" else r"^>\d+\.\d\d$")

    def test_filters(self):
        """An open session is a line where its end would be one."""
        one, other, v6 = self.listen(), self.listen(), self.enterContext(
            socket.create_server(("::1", 0), family=socket.AF_INET6))
        actor = live.Actor([lambda state: state.update(kept=own.pair(one))])
        actor.do(0)
        for listener in one, other:
            self.pair(listener)
        self.pair_v6 = [self.enterContext(end) for end in (
            socket.create_connection(v6.getsockname()[:2]), v6.accept()[0])]
        port = one.getsockname()[1]
        every = [line for line in open_sessions() if line["netns"] == self.netns]
        self.assertEqual(len(every), 8)
        for option, wanted in ((("-p", actor.pid), lambda line: line["pid"] == actor.pid),
                               (("-L", port), lambda line: line["lport"] == port),
                               (("-D", port), lambda line: line["rport"] == port),
                               (("-6",), lambda line: line["ip"] == 6),
                               (("-4", "--netns", self.netns), lambda line: line["ip"] == 4)):
            with self.subTest(option):
                found = [key(line) for line in open_sessions(*option) if line["netns"] == self.netns]
                self.assertEqual(sorted(found), sorted(key(line) for line in every if wanted(line)))
        actor.end()

    def test_without_existing(self):
        """-i alone is about sessions that began while the tool ran."""
        listener = self.listen()
        self.pair(listener)
        with live.Tracer("tcplife", "--json", "-i", 0.2, "--netns", self.netns) as tracer:
            client, _ = self.pair(listener)
            live.settle(0.5)
        self.assertEqual({(line["lport"], line["rport"]) for line in tracer.objects}, set(ends(client)))
        self.assertEqual({(line["end"], line["partial"], "tx_bytes_seen" in line) for line in tracer.objects},
                         {("open", False, False)})

    def test_under_fire(self):
        """Sockets come, go and use each other's memory during each walk; the others are found, each once."""
        actor = live.Actor([lambda state: state.update(listener=socket.create_server(("127.0.0.1", 0), backlog=99)),
                            lambda state: state.update(kept=[own.pair(state["listener"]) for _ in range(100)])])
        actor.do(0)
        actor.do(1)
        load = live.Load(self.namespaces.client)
        process = load.start(400000, 2, 0, 5001)
        try:
            with live.Tracer("tcplife", "--existing", "-i", 0.1, "--json", "--netns", self.netns) as tracer:
                for _ in range(3):
                    found = open_sessions("-p", actor.pid)
                    self.assertEqual([line["pid"] for line in found], [actor.pid] * 200)
                    self.assertEqual(len({key(line) for line in found}), 200)
                self.assertIsNone(process.poll(), "the load has ended too early")
        finally:
            process.kill()
            process.communicate()
        actor.end()
        self.assertEqual(len(set(tracer.lines)), len(tracer.lines))

    def child_namespace(self, buckets):
        """Returns a network namespace with a table of its own."""
        if not CHILD_TABLE.exists():
            self.skipTest("this kernel has one table for all network namespaces")
        CHILD_TABLE.write_text(str(buckets))
        name = "tcpt-child-%d-%d" % (os.getpid(), buckets)
        subprocess.run(["ip", "netns", "add", name], check=True)
        CHILD_TABLE.write_text("0")
        self.addCleanup(subprocess.run, ["ip", "netns", "del", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        return name

    def test_a_table_per_namespace(self):
        name = self.child_namespace(16)
        with live.network(name):
            listener = self.listen()
            clients = [self.pair(listener)[0] for _ in range(100)]
        found = {(line["lport"], line["rport"]) for line in open_sessions("--netns", name)}
        self.assertEqual(found, {end for client in clients for end in ends(client)})

    def test_a_chain_that_is_too_long(self):
        name = self.child_namespace(1)
        with live.network(name):
            listener = self.listen()
            for _ in range(100):
                self.pair(listener)
        lines, stderr = open_sessions("--netns", name, check=False)
        self.assertLess(len(lines), 200)
        self.assertEqual(set(stderr.splitlines()), {
            "tcplife: 1 chains of connected sockets not read to the end: too long, or changing too fast"})

    def test_refused(self):
        """One line says so, and the rest works."""
        client, server = self.pair(self.listen())
        refuse = """
def refuse(command, *rest, call_bpf={0}.call_bpf):
    if command == 10:           # BPF_PROG_TEST_RUN
        raise PermissionError(1, "Operation not permitted")
    return call_bpf(command, *rest)
{0}.call_bpf = refuse
"""
        for tool in (["tcplife", "--json", "--existing", "-i", 0.1, "--netns", self.netns],
                     ["deeptcptracer", "--json", "-N", self.netns], ["tcpchurn", os.getpid(), "--json", "-i", 0.2]):
            with self.subTest(tool), live.Tracer(*tool, check=False, before=refuse.format(tool[0])) as tracer:
                self.pair(self.listen())
                live.settle(0.5)
            self.assertEqual((tracer.status, tracer.stderr),
                             (0, "%s: cannot look for connected sockets: Operation not permitted\n" % tool[0]))
            if tool[0] == "tcpchurn":
                self.assertEqual((tracer.objects[-1]["open"], tracer.objects[-1]["all"]["opened"]), (None, 2))
        client.close()
        server.close()

    def test_a_listener_from_before_the_start(self):
        """It is in no table of connected sockets, but it sends resets."""
        def vanish(state):
            with state["listener"].accept()[0] as server:
                server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)        # close() says nothing to the client
        actor = live.Actor([lambda state: state.update(listener=socket.create_server(("127.0.0.77", 7777))), vanish])
        actor.do(0)
        client = self.enterContext(socket.create_connection(("127.0.0.77", 7777)))
        actor.do(1)
        with live.Tracer("deeptcptracer", "--json", "-N", self.netns, "-e", "tcp_send_reset,tcp_set_state") as tracer:
            client.send(b"to nobody")
            live.settle(0.2)
            actor.end()
        found = [(line["event"], line["pid"]) for line in tracer.objects if line["sport"] == 7777]
        self.assertEqual(found, [("tcp_send_reset()", actor.pid), ("tcp_set_state()", actor.pid)])

    def test_as_many_as_ss_says(self):
        """tcpchurn, before, during and after load."""
        def keep(state):
            listener = state.setdefault("listener", socket.create_server(("127.0.0.1", 0), backlog=99))
            state.setdefault("kept", []).extend(own.pair(listener) for _ in range(20))

        def work(state):
            own.connect(state["listener"], 300)
            for n, (client, server) in enumerate(state["kept"][::3]):
                (workload.reset if n % 2 else socket.socket.close)(client)
                if n % 3:
                    server.close()
            del state["kept"][::3]
            state.setdefault("more", []).extend(own.pair(state["listener"]) for _ in range(7))
        actor = live.Actor([keep, work])
        actor.do(0)
        seen = []

        def look():
            live.settle(0.3)
            seen.append((time.time(), ss(actor.pid)))
            live.settle(0.3)
        with live.Tracer("tcpchurn", actor.pid, "--json", "-i", 0.1) as tracer:
            look()
            for step in 1, 0, 1:
                actor.do(step)
                look()
        actor.end()
        counts = [[line["open"] for line in tracer.objects if line["ts"] <= then][-1] for then, _ in seen]
        self.assertEqual(counts, [count for _, count in seen])
        self.assertEqual(counts[0], 40)


if __name__ == "__main__":
    unittest.main()
