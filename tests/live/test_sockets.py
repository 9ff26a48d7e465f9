"""Odd sockets: refused by firewalls, restored, used again, accepted by others. What the tools say is the truth."""
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import select
import shutil
import socket
import struct
import subprocess
import time
import unittest

import live
import workload
from own import Tracer, pair, ports

FIN_WAIT2 = 5                   # include/net/tcp_states.h
IP_TRANSPARENT = 19             # include/uapi/linux/in.h; those of the next line: tcp.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_FASTOPEN_CONNECT = 19, 20, 21, 30
RECEIVE_QUEUE, SEND_QUEUE, REPAIR_OFF_WITHOUT_PROBE = 1, 2, -1
CHANGES = "deeptcptracer", "-e", "tcp_set_state"


def nft(test, namespace, rules):
    """Set up these rules of a firewall in the namespace."""
    command = ["ip", "netns", "exec", namespace, "nft"]
    if not shutil.which("nft"):
        test.skipTest("needs nft, of the package nftables")
    if subprocess.run([*command, "list", "ruleset"], stderr=subprocess.DEVNULL).returncode:
        test.skipTest("needs a kernel with nf_tables")
    said = subprocess.run([*command, "-f", "-"], input=rules, text=True, stderr=subprocess.PIPE).stderr
    assert "syntax error" not in said, said
    if said:
        test.skipTest("this kernel does not have all that the rules need: %s" % said)
    test.addCleanup(subprocess.run, [*command, "flush", "ruleset"], check=True)


# What a firewall answers to a connect to these ports, and the errors of connect() over IPv4 and IPv6.
REFUSALS = {
    81: ("reject", "ECONNREFUSED", "ECONNREFUSED"),             # by ICMP: the port is unreachable
    82: ("reject with tcp reset", "ECONNREFUSED", "ECONNREFUSED"),
    83: ("reject with icmpx type host-unreachable", "EHOSTUNREACH", "EHOSTUNREACH"),
    84: ("reject with icmpx type no-route", "ENETUNREACH", "ENETUNREACH"),
    85: ("reject with icmpx type admin-prohibited", "EHOSTUNREACH", "EACCES")}
LOCAL = 100                     # the same with ports that are so much higher, by the client's own firewall
ENDS = {"ECONNREFUSED": "refused", "EHOSTUNREACH": "unreachable", "ENETUNREACH": "unreachable"}


def attempt(address, blocking, asks):
    """Returns the local port and the error's name of a connect(). asks: for the error, else it just closes."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock:
        sock.setblocking(blocking)
        error = sock.connect_ex(address)
        port = sock.getsockname()[1]
        if error == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            poll.poll(10000)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if asks else None
    return port, error and errno.errorcode[error]


class Ends(live.Alone):
    def test_refused_by_a_firewall(self):
        """An ICMP error that comes while connect() holds the socket does not change its state at once."""
        table = "table inet refusals { chain refuse { type filter hook %s priority 0; %s; }; }"
        for namespace, hook, more in (self.namespaces.server, "input", 0), (self.namespaces.client, "output", LOCAL):
            nft(self, namespace, table % (hook, "; ".join([
                "tcp dport %d %s" % (port + more, rule) for port, (rule, *_) in REFUSALS.items()])))
        where = "--json", "--netns", self.netns
        tracers = [Tracer(*tool, *where) for tool in (("tcplife",), ("tcpv4connect", "-r"), CHANGES)]
        attempts = [(ip, host, port + more, blocking, asks) for ip, host in zip((4, 6), self.namespaces.hosts)
                    for port in REFUSALS for more in (0, LOCAL)
                    for blocking, asks in ((True, True), (False, True), (False, False))]
        with live.tracing(*tracers), concurrent.futures.ThreadPoolExecutor(len(attempts)) as side_by_side:
            found = list(side_by_side.map(lambda one: attempt(one[1:3], *one[3:]), attempts))
        said = {tracer.tool: {ports(line): line for line in tracer.objects if line.get("state") in (None, "CLOSE")}
                for tracer in tracers}
        for (ip, _, port, blocking, asks), (lport, error) in zip(attempts, found):
            with self.subTest(ip=ip, port=port, blocking=blocking, asks=asks):
                expected = REFUSALS[port % LOCAL][1 if ip == 4 else 2]
                self.assertIn(error, [expected] if asks else [None])
                line = said["tcplife"][lport, port]
                self.assertEqual((line["ip"], line["end"], line["err"]), (ip, ENDS.get(expected), expected))
                self.assertEqual(said["deeptcptracer"][lport, port]["sk_err"], expected)
                if ip == 4:
                    self.assertEqual(said["tcpv4connect"][lport, port]["result"], expected)

    def test_a_fin_that_nobody_waits_for(self):
        """TCP_LINGER2 below 0: this side sends a RST when its FIN is acknowledged. Before or after close()."""
        where = "--json", "--netns", self.netns
        every, failed = Tracer("tcplife", *where), Tracer("tcplife", "--failed", *where)
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(every, failed):
            port = listener.getsockname()[1]
            for shuts_down in False, True:
                client, server = pair(listener)
                if shuts_down:
                    client.shutdown(socket.SHUT_WR)
                    workload.await_state(client, FIN_WAIT2)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, -1)
                client.close()
                workload.await_state(server, workload.CLOSE)
                server.close()
        for tracer in every, failed:
            self.assertEqual(sorted((line["lport"] == port, line["end"]) for line in tracer.objects),
                             [(False, "abort")] * 2 + [(True, "reset")] * 2)

    def test_data_after_close(self):
        """It is answered with a RST: `reset` if this side's FIN is not acknowledged yet, else `local`."""
        def unacknowledged(client, server):
            workload.deaf(server)
            client.close()
            workload.hear(server)

        def together(client, server):           # after a reply, an ACK waits for data to go with
            client.send(b"x")
            server.send(server.recv(1))
            client.recv(1)
            client.close()

        def acknowledged(client, server):
            client.shutdown(socket.SHUT_WR)
            workload.await_state(client, FIN_WAIT2)
            client.close()
        ends = {}
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                Tracer("tcplife", "--json", "--netns", self.netns) as tracer:
            for close, end in (unacknowledged, "reset"), (together, "local"), (acknowledged, "local"):
                client, server = pair(listener)
                ends[client.getsockname()[1]] = end
                close(client, server)
                server.send(b"x")
                workload.await_state(server, workload.CLOSE)
                server.close()
        self.assertEqual({line["lport"]: line["end"] for line in tracer.objects if line["role"] == "connect"}, ends)
        self.assertEqual({line["end"] for line in tracer.objects if line["role"] == "accept"}, {"reset"})

    def test_sessions_that_are_restored(self):
        """By TCP_REPAIR, as CRIU does it: no SYN is sent."""
        ends = ("127.0.0.1", 3001), ("127.0.0.1", 3002)
        sent = 1000             # bytes, one way
        socks = [socket.socket() for _ in ends]
        try:
            for sock in socks:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except PermissionError:
            self.skipTest("needs CAP_NET_ADMIN")
        where = "--json", "--netns", self.netns
        life, changes = Tracer("tcplife", *where), Tracer(*CHANGES, *where)
        with live.tracing(life, changes):
            for sock, here, there, sequences in zip(socks, ends, reversed(ends), ((5000, 9000), (9000, 5000))):
                sock.bind(here)
                for queue, sequence in zip((SEND_QUEUE, RECEIVE_QUEUE), sequences):
                    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
                    sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, sequence)
                sock.connect(there)
            for sock in socks:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
            one, other = socks
            workload.send(one, sent)
            one.close()
            self.assertEqual(workload.receive(other), sent)
            other.close()
        self.assertEqual(sorted((line["lport"], line["tx_bytes"], line["rx_bytes"], line["end"], line["pid"])
                                for line in life.objects),
                         [(3001, sent, 0, "local", os.getpid()), (3002, 0, sent, "remote", os.getpid())])
        self.assertEqual({line["sk_err"] for line in changes.objects}, {None})

    def test_fast_open_that_is_not_used(self):
        """connect() succeeds without a SYN, which would go with the first data."""
        where = "--json", "--netns", self.netns
        life, results = Tracer("tcplife", *where), Tracer("tcpv4connect", "-r", *where)
        changes, failed = Tracer(*CHANGES, *where), Tracer("tcpv4connect", "-r", "--failed", *where)
        path = pathlib.Path("/proc/sys/net/ipv4/tcp_fastopen")
        usual = path.read_text()
        self.addCleanup(path.write_text, usual)
        path.write_text(str(0x207))             # also without a cookie
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(life, results, changes, failed):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
            for data in b"", b"x":
                with socket.socket() as client:
                    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                    client.connect(listener.getsockname())
                    if data:
                        client.send(data)
                        server = listener.accept()[0]
                        server.recv(1)
                        server.close()
                        client.recv(1)
        self.assertEqual([(line["end"], line["err"], line["tx_bytes"], line["pid"]) for line in life.objects
                          if line["role"] == "connect"],
                         [("quit", None, 0, os.getpid()), ("remote", None, 1, os.getpid())])
        self.assertEqual([line["result"] for line in results.objects], ["quit", "ok"])
        self.assertEqual([line["result"] for line in failed.objects], ["quit"])
        self.assertEqual([line["sk_err"] for line in changes.objects if line["oldstate"] == "SYN_SENT"], [None] * 2)

    def test_no_local_port(self):
        """An attempt that finds none does not show that of the attempt before, and matches no filter for ports."""
        life, results, changes, one, *others = tracers = [Tracer(*tool, "--json", "--netns", self.netns) for tool in (
            ("tcplife",), ("tcpv4connect", "-r"), CHANGES, ("tcplife", "-L", 40000), ("tcplife", "-L", 80),
            (*CHANGES, "-S", 80))]
        with live.tracing(*tracers), live.local_ports(40000, 40000), \
                socket.create_server(("127.0.0.1", 70)), \
                socket.socket() as used, socket.socket() as holder, socket.socket() as fresh:
            found = [sock.connect_ex(("127.0.0.1", port)) for sock, port in ((used, 71), (holder, 70), (used, 70),
                                                                             (fresh, 70))]
        self.assertEqual(found, [errno.ECONNREFUSED, 0, errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL])
        self.assertEqual([(*ports(line), line["end"]) for line in life.objects if line["role"] == "connect"][:3],
                         [(40000, 71, "refused"), (0, 70, None), (0, 70, None)])
        self.assertEqual([(line["lport"], line["result"]) for line in results.objects],
                         [(40000, "ECONNREFUSED"), (40000, "ok"), (None, "failed"), (None, "failed")])
        self.assertEqual([ports(line) for line in changes.objects
                          if (line["oldstate"], line["state"]) == ("SYN_SENT", "CLOSE")],
                         [(40000, 71), (0, 70), (0, 70)])
        self.assertEqual([ports(line) for line in one.objects], [(40000, 71), (40000, 70)])
        self.assertEqual([tracer.lines for tracer in others], [[], []])


# Numbers of seccomp(2) and accept4(2), and of seccomp's ioctls.
SECCOMP, ACCEPT4 = {"x86_64": (317, 288), "aarch64": (277, 242)}.get(os.uname().machine, (0, 0))
NOTIF_RECV, NOTIF_ADDFD = 0xc0502100, 0x40182103


def leave_accepts():
    """Leave each accept() of this process to a supervisor. Returns the descriptor by which it does them."""
    load, equal, answer, ask, allow = 0x20, 0x15, 0x06, 0x7fc00000, 0x7fff0000
    steps = (load, 0, 0, 0), (equal, 0, 1, ACCEPT4), (answer, 0, 0, ask), (answer, 0, 0, allow)
    text = ctypes.create_string_buffer(b"".join([struct.pack("=HBBI", *step) for step in steps]))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(text)))
    # SECCOMP_SET_MODE_FILTER, FILTER_FLAG_NEW_LISTENER
    supervisor = ctypes.CDLL(None, use_errno=True).syscall(SECCOMP, 1, 8, program)
    if supervisor < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return supervisor


def may_leave_accepts():
    with contextlib.suppress(OSError):
        return leave_accepts() >= 0
    return False


def accept_for(supervisor, fd):
    """The accept() of the supervised process returns a copy of this descriptor."""
    call = bytearray(80)
    fcntl.ioctl(supervisor, NOTIF_RECV, call)
    answer = struct.pack("=QIIII", struct.unpack_from("=Q", call)[0], 2, fd, 0, 0)      # SECCOMP_ADDFD_FLAG_SEND
    fcntl.ioctl(supervisor, NOTIF_ADDFD, answer)


class Accepts(live.Alone):
    """At the exit of the system call."""

    def test_by_a_supervisor(self):
        """What accept() returns is new, or an older socket: as if another thread had put that there meanwhile."""
        if not live.in_process(may_leave_accepts)[1]:
            self.skipTest("this kernel has no supervisors that answer accept()")
        here, there = socket.socketpair()
        here.settimeout(live.START)
        listener, elsewhere = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        for sock in here, there, listener, elsewhere:
            self.addCleanup(sock.close)

        def keep(state):
            state["before"] = pair(elsewhere)

        def work(state):
            state["connected"], state["accepted"] = pair(elsewhere), pair(elsewhere)
            socks = state["before"][0], state["connected"][0], state["accepted"][1]
            socket.send_fds(there, [b"x"], [leave_accepts(), *[sock.fileno() for sock in socks]])
            for _ in range(6):
                os.close(listener._accept()[0])
        actor = live.Actor([keep, work])
        actor.do(0)
        one, other, life, churn, changes = tracers = [
            Tracer(*tool, "--json", "--netns", self.netns, "--no-kprobe", check=False) for tool in (
                ("tcpaccept", "-p", actor.pid), ("tcpaccept", "-p", os.getpid()), ("tcplife",), ("tcpchurn", actor.pid),
                CHANGES)]
        pause = 0.3 * live.SLOW
        with live.tracing(*tracers):
            os.write(actor.write, b"\1")                # as do(1), but this does not wait
            supervisor, *fds = socket.recv_fds(here, 1, 4)[1]
            before, connected, accepted = socks = [socket.socket(fileno=fd) for fd in fds]
            time.sleep(pause)
            client, server = pair(listener)
            with client, server, socket.socket(socket.AF_UNIX) as unix:
                for sock in server, before, connected, accepted, unix:
                    accept_for(supervisor, sock.fileno())
                accept_for(supervisor, supervisor)      # that is not a socket
                self.assertEqual(os.read(actor.read, 1), b".")
                for sock in socks:
                    sock.close()
            actor.end()
        port, owner = listener.getsockname()[1], {True: os.getpid(), False: actor.pid}
        with self.subTest("tcpaccept"):         # what those four accepts have got is known to nobody
            lost = {"accepts lost: another thread had closed the socket already": 4}
            self.assertEqual(([line["pid"] for line in one.objects], live.losses(one)), ([actor.pid] * 2, lost))
            self.assertEqual(([line["pid"] for line in other.objects], other.stderr), ([os.getpid()], ""))
        with self.subTest("tcplife"):
            self.assertEqual((len(life.lines), life.stderr), (6, ""))
            for line in life.objects:
                self.assertEqual(line["pid"], owner[port in ports(line)])
                self.assertLess(line["accept_ms"] or line["connect_ms"], 1000 * pause)
        with self.subTest("tcpchurn"):
            self.assertEqual(churn.objects[-1]["all"], {"opened": 5, "accepted": 3, "connected": 2, "closed": 7})
        with self.subTest("deeptcptracer"):
            for line in changes.objects:
                self.assertIn(line["pid"], (owner[port in ports(line)], None))

    def test_by_a_transparent_proxy(self):
        """To a port from which a connect() went, in the proxy's own network namespace."""
        local, served = 4000, 5000
        target = self.namespaces.nowhere[0]             # which the visitor reaches by way of this host
        nft(self, self.namespaces.client, "table ip proxy { chain proxy { type filter hook prerouting priority mangle; "
            "ip daddr %s tcp dport %d tproxy to :%d meta mark set 1 accept; }; }" % (target, local, served))
        for namespace, command in (
                (self.namespaces.client, "rule add fwmark 1 lookup 100"),
                (self.namespaces.client, "route add local default dev lo table 100"),
                (self.namespaces.server, "route replace %s via %s" % (target, self.namespaces.guests[0]))):
            subprocess.run(["ip", "-n", namespace, *command.split()], check=True)
        tracer = Tracer("tcpaccept", "--json", "--netns", self.netns, "--no-kprobe", "-p", os.getpid())
        with socket.socket() as proxy, socket.create_server((workload.OWN, 0)) as elsewhere, tracer:
            proxy.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            proxy.bind(("", served))
            proxy.listen()
            with live.local_ports(local, local), socket.create_connection(elsewhere.getsockname()):
                with live.network(self.namespaces.server):
                    visitor = socket.create_connection((target, local), timeout=live.START)
                with visitor, proxy.accept()[0] as accepted:
                    self.assertEqual(accepted.getsockname(), (target, local))
        self.assertEqual([(line["laddr"], line["lport"]) for line in tracer.objects], [(target, local)])


if __name__ == "__main__":
    unittest.main()
