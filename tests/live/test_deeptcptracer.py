"""deeptcptracer: each event provoked, and found with the right owner, addresses, state and error."""
import concurrent.futures
import contextlib
import functools
import os
import select
import socket
import struct
import subprocess
import time
import unittest

import live
import workload

PORTS = iter(range(20000, 30000))       # not in net.ipv4.ip_local_port_range


def retransmitted(sock):
    """How many segments of this socket the kernel has sent again: tcpi_total_retrans."""
    return struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]


def listen(family=socket.AF_INET):
    """A listening socket, at a port that the kernel gives to nobody and so nobody had before."""
    for port in PORTS:
        with contextlib.suppress(OSError):      # somebody uses it
            return socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", port), family=family)


@contextlib.contextmanager
def pair(family=socket.AF_INET):
    """A connected client and server socket of this process."""
    with listen(family) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        server = listener.accept()[0]
    with client, server:
        yield client, server


def inside(namespace, function, *args):
    """What the function returns, called in this network namespace."""
    def call():
        workload.enter(namespace)
        return function(*args)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def reset(sock, peer):
    """Reset this end, and wait until the other one knows."""
    workload.reset(sock)
    give_up = time.monotonic() + 5
    while peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x07" and time.monotonic() < give_up:
        time.sleep(0.01)                # 7: TCP_CLOSE


def name(sock):
    """(local address, port, remote address, port)"""
    return (*sock.getsockname()[:2], *sock.getpeername()[:2])


# The scenarios. Each provokes something in this process and returns what has to be seen of it: {endpoints: events}.
# endpoints: (saddr, sport, daddr, dport), or the last two of these. events: as from summary(), in their order, or a set
# of them where the number is the kernel's affair; "*" stands for what differs between kernels. A scenario's count, if
# it has one, is what the kernel itself has counted.

def provokes(*events):
    """Only events of these names are looked at; all, if there are none."""
    def mark(scenario):
        scenario.events = events
        return scenario
    return mark


@provokes()
def close_in_order(family=socket.AF_INET):
    with pair(family) as (client, server):
        there, back = name(client), name(server)
        client.shutdown(socket.SHUT_WR)     # after close() the peer's FIN might find a TIME_WAIT socket
        server.recv(1)
        server.close()
        time.sleep(0.1)
    return {(there[0], 0, *there[2:]): [("tcp_set_state()", "CLOSE", "SYN_SENT", None)],
            there: [("tcp_set_state()", "SYN_SENT", "ESTABLISHED", None),
                    ("tcp_set_state()", "ESTABLISHED", "FIN_WAIT1", None),
                    ("tcp_send_fin()", "ESTABLISHED", "FIN_WAIT1", None),
                    ("tcp_set_state()", "FIN_WAIT1", "FIN_WAIT2", None),
                    ("tcp_fin()", "FIN_WAIT2", "FIN_WAIT2", None),
                    ("tcp_set_state()", "FIN_WAIT2", "CLOSE", None)],
            back: [("tcp_set_state()", "SYN_RECV", "ESTABLISHED", None),
                   ("tcp_fin()", "ESTABLISHED", "ESTABLISHED", None),
                   ("tcp_set_state()", "ESTABLISHED", "CLOSE_WAIT", None),
                   ("tcp_set_state()", "CLOSE_WAIT", "LAST_ACK", None),
                   ("tcp_send_fin()", "CLOSE_WAIT", "LAST_ACK", None),
                   ("tcp_set_state()", "LAST_ACK", "CLOSE", None)]}


@provokes()
def listener_closed():
    with listen() as listener:
        there = listener.getsockname()
    return {(*there, "0.0.0.0", 0): [("tcp_set_state()", "LISTEN", "CLOSE", None)]}          # noqa: S104


@provokes("tcp_reset", "sock_def_error_report")
def reset_received():
    with pair() as (client, server):
        there = name(client)
        reset(server, client)
    with pair() as (client, server):
        back = name(server)
        reset(client, server)
    events = [("tcp_reset()", None, "ESTABLISHED", None), ("sock_def_error_report()", None, "CLOSE", "ECONNRESET")]
    return {there: events, back: events}


@provokes()
def refused():
    with socket.socket() as sock:
        sock.connect_ex(("127.0.0.10", 9))
    return {("127.0.0.10", 9): [("tcp_set_state()", "CLOSE", "SYN_SENT", None),
                               ("tcp_reset()", None, "SYN_SENT", None),
                               ("tcp_set_state()", "SYN_SENT", "CLOSE", "ECONNREFUSED"),
                               ("sock_def_error_report()", None, "CLOSE", "ECONNREFUSED")]}


@provokes()
def connect_timeout():
    with listen() as listener:
        workload.deaf(listener)
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
            sock.connect_ex(listener.getsockname())
        return {listener.getsockname(): {("tcp_set_state()", "CLOSE", "SYN_SENT", None),
                                         ("tcp_retransmit_skb()", None, "SYN_SENT/Loss", None),
                                         ("tcp_set_state()", "SYN_SENT", "CLOSE", "ETIMEDOUT"),
                                         ("sock_def_error_report()", None, "*", "ETIMEDOUT")}}


@provokes("tcp_retransmit_skb")
def retransmission():
    with pair() as (client, server):
        there = name(client)
        workload.deaf(server)
        client.send(b"x")
        time.sleep(0.8)
        retransmission.count = retransmitted(client)
        workload.reset(client)
        workload.reset(server)
    return {there: {("tcp_retransmit_skb()", None, "ESTABLISHED/Open", None),           # a tail loss probe
                    ("tcp_retransmit_skb()", None, "ESTABLISHED/Loss", None)}}          # a timeout


@provokes("tcp_ack", "tcp_select_window")
def zero_windows():
    with pair() as (client, server):
        there, back = name(client), name(server)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(bytes(65536))
                select.select([], [client], [], 0.1)
        time.sleep(1)
        workload.reset(client)
    return {there: {("tcp_ack()/win==0", None, "ESTABLISHED", None)},
            back: {("tcp_select_window()/win==0", None, "ESTABLISHED", None)}}


@provokes("tcp_send_fin", "tcp_fin")
def half_close():
    with pair() as (client, server):
        there, back = name(client), name(server)
        client.shutdown(socket.SHUT_WR)
        server.recv(1)
        server.send(b"x")
        server.close()
        client.recv(10)
        time.sleep(0.1)
    return {there: [("tcp_send_fin()", "ESTABLISHED", "FIN_WAIT1", None),
                    ("tcp_fin()", "FIN_WAIT2", "FIN_WAIT2", None)],
            back: [("tcp_fin()", "ESTABLISHED", "ESTABLISHED", None),
                   ("tcp_send_fin()", "CLOSE_WAIT", "LAST_ACK", None)]}


@provokes("tcp_send_fin", "tcp_fin", "tcp_retransmit_skb")
def retransmitted_fin():
    """The client does not hear that its FIN has come, and sends it again: a retransmission and not one more FIN."""
    with pair() as (client, server):
        there, back = name(client), name(server)
        workload.deaf(client)
        client.shutdown(socket.SHUT_WR)
        time.sleep(1)
        assert retransmitted(client) > 1
        reset(client, server)
    return {there: {("tcp_send_fin()", "ESTABLISHED", "FIN_WAIT1", None),
                    ("tcp_retransmit_skb()", None, "FIN_WAIT1/Open", None),
                    ("tcp_retransmit_skb()", None, "FIN_WAIT1/Loss", None)},
            back: [("tcp_fin()", "ESTABLISHED", "ESTABLISHED", None)]}


@provokes("sock_def_error_report")
def keepalive_failure():
    with pair() as (client, server):
        there = name(client)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            client.setsockopt(socket.IPPROTO_TCP, option, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        workload.deaf(server)
        time.sleep(3)
        workload.reset(server)
    return {there: [("sock_def_error_report()", None, "*", "ETIMEDOUT")]}


def host(family):
    return "::1" if family == socket.AF_INET6 else "127.0.0.1"


@provokes("tcp_send_reset")
def reset_of_nobody(family=socket.AF_INET):
    """Where nobody listens."""
    with socket.socket(family) as sock:
        sock.bind((host(family), 0))
        sock.connect_ex((host(family), 9))
        return {(host(family), 9, *sock.getsockname()[:2]): [("tcp_send_reset()", None, None, "NO_SOCKET")]}


@provokes("tcp_send_reset")
def reset_by_linger(family=socket.AF_INET):
    with pair(family) as (client, server):
        there = name(client)
        reset(client, server)
    return {there: [("tcp_send_reset()", None, "CLOSE", "TCP_STATE")]}


@provokes("tcp_send_reset")
def reset_by_unread_data(family=socket.AF_INET):
    with pair(family) as (client, server):
        there = name(client)
        server.send(b"x")
        select.select([client], [], [])
        client.close()
        time.sleep(0.1)
    return {there: [("tcp_send_reset()", None, "CLOSE", "TCP_ABORT_ON_CLOSE")]}


@provokes("tcp_send_reset")
def reset_of_data_after_close(family=socket.AF_INET):
    with pair(family) as (client, server):
        back = name(server)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 100)      # above 60 s it stays a full socket
        server.close()
        client.recv(1)
        client.send(b"x")
        time.sleep(0.1)
    return {back: [("tcp_send_reset()", None, "CLOSE", "TCP_ABORT_ON_DATA")]}


@provokes("tcp_send_reset")
def reset_in_time_wait(family=socket.AF_INET):
    """By the small socket that waits for the peer's FIN, when there comes data."""
    with pair(family) as (client, server):
        back = name(server)
        server.shutdown(socket.SHUT_WR)
        client.recv(1)
        time.sleep(0.1)
        server.close()
        client.send(b"x")
        time.sleep(0.1)
    return {back: [("tcp_send_reset()", None, "TIME_WAIT", "TCP_TIMEWAIT_SOCKET")]}


@provokes("tcp_set_state")
def close_wait(family=socket.AF_INET):
    """The server closes late."""
    with pair(family) as (client, server):
        back = name(server)
        times = [time.monotonic()]
        client.shutdown(socket.SHUT_WR)
        server.recv(1)
        times.append(time.monotonic())
        time.sleep(0.3)
        times.append(time.monotonic())
        server.close()
        times.append(time.monotonic())
        time.sleep(0.1)
    # 0.2 ms, as the clock of BPF programs is not quite the one of processes
    held = Between(1000 * (times[2] - times[1]) - 0.2, 1000 * (times[3] - times[0]) + 0.2)
    return {back: [("tcp_set_state()", "SYN_RECV", "ESTABLISHED", None),
                   ("tcp_set_state()", "ESTABLISHED", "CLOSE_WAIT", None),
                   ("tcp_set_state()", "CLOSE_WAIT", "LAST_ACK", None, held),
                   ("tcp_set_state()", "LAST_ACK", "CLOSE", None)]}


def over_ipv6(scenario):
    @functools.wraps(scenario)
    def scenario_ipv6():
        return scenario(socket.AF_INET6)
    scenario_ipv6.__name__ += "_ipv6"
    return scenario_ipv6


TIMED = [connect_timeout, retransmission, zero_windows, retransmitted_fin, keepalive_failure]      # by timers
BOTH = [close_in_order, reset_of_nobody, reset_by_linger, reset_by_unread_data, reset_of_data_after_close,
        reset_in_time_wait, close_wait]
SCENARIOS = [listener_closed, reset_received, refused, half_close, *BOTH, *map(over_ipv6, BOTH), *TIMED]


def provoke(scenarios):
    """Play these scenarios side by side: [(scenario, what has to be seen of it), ...]."""
    with concurrent.futures.ThreadPoolExecutor(len(scenarios)) as side_by_side:
        return list(zip(scenarios, side_by_side.map(lambda scenario: scenario(), scenarios)))


class Between:
    """Equal to each number from low to high."""

    __hash__ = None

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __eq__(self, number):
        return number is not None and self.low <= number <= self.high

    def __repr__(self):
        return "%.3f to %.3f" % (self.low, self.high)


def summary(line):
    """(event, old state, state and congestion state, error or reason, milliseconds in the old state)"""
    state = "/".join(filter(None, (line["state"], line["ca_state"]))) or None
    return line["event"], line["oldstate"], state, line["sk_err"] or line["reason"], line["state_ms"]


def alike(event, seen):
    return all(one == other or one == "*" for one, other in zip(event, seen))


def as_expected(events, seen):
    if isinstance(events, set):
        return (all(any(alike(event, one) for one in seen) for event in events) and
                all(any(alike(event, one) for event in events) for one in seen))
    return len(events) == len(seen) and all(map(alike, events, seen))


def expected_of(events, has_loss_probes, has_bare_resets, has_reasons):
    """The events that this kernel and kind of probe can show, in the form in which they do."""
    def as_shown(event, oldstate, state, error, *rest):
        return event, oldstate, state, error if has_reasons or event != "tcp_send_reset()" else None, *rest
    return type(events)(
        as_shown(*event) for event in events
        if (has_loss_probes or not str(event[2]).endswith("/Open")) and
        (has_bare_resets or event[0] != "tcp_send_reset()" or event[2] == "CLOSE"))


def difference(scenario, expected, objects, by_tracepoint=True, has_bare_resets=True, has_reasons=True):
    """What is not as the scenario expects it in these lines, as a list of texts.

    by_tracepoint: the retransmissions are all the kernel counts, and every end of a socket is seen. The kprobe does not
    see tail loss probes, and the kernel may skip the one at a socket's end: then its owner is still known afterwards.
    has_bare_resets: RSTs without a full socket are shown; the tracepoint does since Linux 6.10.
    has_reasons: they have the kernel's reasons, as the tracepoint's do since 6.10.
    """
    wrong = []
    for endpoints, events in expected.items():
        events = expected_of(events, by_tracepoint, has_bare_resets, has_reasons)
        lines = [line for line in objects
                 if (line["saddr"], line["sport"], line["daddr"], line["dport"])[-len(endpoints):] == endpoints and
                 (not scenario.events or line["event"].partition("(")[0] in scenario.events)]
        seen = list(map(summary, lines))
        count = getattr(scenario, "count", len(seen))
        # nobody owns a socket before accept(), or after its end
        owners = {line["pid"] for line in lines if line["state"] != "SYN_RECV" and line["oldstate"] != "SYN_RECV"}
        nobody = scenario.__name__.startswith(("reset_of_", "reset_in_"))
        is_known = os.getpid() in owners
        if not as_expected(events, seen) or len(seen) > count or (len(seen) < count and by_tracepoint):
            wrong.append("%s: %s has %s, not %s" % (scenario.__name__, endpoints, seen, events))
        elif not owners <= {os.getpid(), None} or (is_known and nobody and by_tracepoint) or not (is_known or nobody):
            wrong.append("%s: owners of %s are %s" % (scenario.__name__, endpoints, owners))
    return wrong


def wrong_owners(log, objects):
    """Lines of the workload's sockets with an owner that is not theirs; the endpoints for which an owner was named."""
    owner = {(record["laddr"], record["lport"], record["raddr"], record["rport"]): record for record in log}
    found, met = [], set()
    for line in objects:
        endpoints = line["saddr"], line["sport"], line["daddr"], line["dport"]
        record = owner.get(endpoints)
        if record and line["pid"]:
            met.add(endpoints)
            if (line["pid"], line["comm"]) != (record["pid"], record["comm"]):
                found.append((line, record))
    return found, met


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Events(unittest.TestCase):
    maxDiff = None
    me = os.getpid()

    @contextlib.contextmanager
    def tracing(self, *args):
        with live.Tracer("deeptcptracer", "--json", *args) as self.tracer:
            yield

    def seen(self, *endpoints):
        """summary() of the lines with these addresses, in order."""
        return [summary(line) for line in self.tracer.objects
                if (line["saddr"], line["sport"], line["daddr"], line["dport"]) == endpoints]

    def owners(self, *endpoints):
        return {line["pid"] for line in self.tracer.objects
                if (line["saddr"], line["sport"], line["daddr"], line["dport"]) == endpoints}

    def play(self, scenarios):
        with self.tracing("-m"):
            played = provoke(scenarios)
        for scenario, endpoints in played:
            self.assertEqual(difference(scenario, endpoints, self.tracer.objects), [])
        return dict(played)

    def test_scenarios(self):
        self.play([scenario for scenario in SCENARIOS if scenario not in TIMED])

    @live.by_timer
    def test_scenarios_with_timers(self):
        there, back = self.play(TIMED)[retransmitted_fin]
        events = [line[0] for line in self.seen(*there) + self.seen(*back)]
        self.assertEqual((events.count("tcp_send_fin()"), events.count("tcp_fin()")), (1, 1))

    def test_owners_of_known_processes(self):
        """In no event a stranger: what workload.py does, compared with all owners that are printed.

        In a namespace of its own, so that nobody else's load fills the ring buffer.
        """
        with live.Namespaces() as namespaces, self.tracing("-N", namespaces.client):
            log = workload.work(namespaces=(namespaces.client, namespaces.client))
        found, met = wrong_owners(log, self.tracer.objects)
        self.assertEqual(found, [])
        self.assertGreaterEqual(len(met), len([record for record in log if record["laddr"]]) - 8)    # early ones

    def test_owner_from_before_the_start(self):
        with pair() as (client, server):
            there, back = name(client), name(server)
            with self.tracing("-p", self.me):
                client.close()
                server.recv(1)
                server.close()
                time.sleep(0.1)
        for endpoints in (there, back):
            self.assertEqual(self.owners(*endpoints), {self.me})
            self.assertIn("CLOSE", [event[2] for event in self.seen(*endpoints)])

    @live.by_timer
    def test_each_event_alone(self):
        names = ["tcp_set_state", "tcp_send_fin", "tcp_fin", "tcp_reset", "tcp_retransmit_skb", "sock_def_error_report",
                 "tcp_send_reset"]
        tracers = {one: live.Tracer("deeptcptracer", "--json", "-e", one) for one in names}
        with live.tracing(*tracers.values()):
            workload.work(scenarios=["client_close", "client_reset"])
            with pair() as (client, server):
                workload.deaf(server)
                client.send(b"x")
                time.sleep(0.5)
        for one, tracer in tracers.items():
            self.assertEqual({line["event"] for line in tracer.objects}, {one + "()"})

    def test_filters(self):
        with socket.create_server(("127.0.0.7", 0)) as listener:
            address, port = listener.getsockname()
            filters = {("-d", "127.0.0.7"): 1, ("-d", "127.0.0.4/30"): 1, ("-s", "127.0.0.7"): 1,
                       ("-s", "127.0.0.7/32"): 1, ("-D", port): 1,
                       ("-S", "1,%d" % port): 1, ("-6",): 0, ("-4", "-D", port): 1, ("-d", "::/0"): 0,
                       ("-s", "10.0.0.0/8"): 0, ("-d", "fd00::1,127.0.0.7"): 1, ("-p", 1): 0, ("-p", self.me): 1}
            tracers = {one: live.Tracer("deeptcptracer", "--json", *one) for one in filters}
            with live.tracing(*tracers.values()):
                with socket.create_connection((address, port)):
                    listener.accept()[0].close()
                time.sleep(0.1)
        for one, some in filters.items():
            ours = [line for line in tracers[one].objects if port in (line["sport"], line["dport"])]
            self.assertEqual(bool(ours), bool(some), one)
            if one[0] in ("-d", "-D"):
                self.assertEqual({line["dport"] for line in ours}, {port} if some else set())
            if one[0] in ("-s", "-S"):
                self.assertEqual({line["sport"] for line in ours}, {port} if some else set())

    def test_namespaces(self):
        with live.Namespaces() as namespaces:
            inodes = [namespaces.inode(namespaces.client), namespaces.inode(namespaces.server)]
            everywhere, one = (live.Tracer("deeptcptracer", "--json", *options) for options in (
                [], ["-N", namespaces.client]))
            with live.tracing(everywhere, one):
                workload.work(scenarios=["client_close", "server_reset"], **namespaces.where)
        self.assertTrue({line["netns"] for line in everywhere.objects} >= set(inodes))
        self.assertEqual({line["netns"] for line in one.objects}, {inodes[0]})

    def test_filters_of_resets_without_a_socket(self):
        filters = {("-d", "127.0.0.8"): 1, ("-s", "127.0.0.9"): 1, ("-S", 9): 1, ("-D", 9): 0, ("-d", "127.0.0.9"): 0,
                   ("-4",): 1, ("-6",): 0, ("-p", self.me): 0, ("-N", "/proc/self/ns/net"): 1,
                   ("-N", os.stat("/proc/self/ns/net").st_ino + 1): 0}
        tracers = {one: live.Tracer("deeptcptracer", "--json", "-e", "tcp_send_reset", *one) for one in filters}
        with live.tracing(*tracers.values()), socket.socket() as sock:
            sock.bind(("127.0.0.8", 0))
            sock.connect_ex(("127.0.0.9", 9))
            here = sock.getsockname()
        for one, count in filters.items():
            seen = [line["reason"] for line in tracers[one].objects if (line["daddr"], line["dport"]) == here]
            self.assertEqual(seen, ["NO_SOCKET"] * count, one)

    @live.by_timer
    def test_attempts_that_send_nothing(self):
        """They are no retransmissions: here the route is gone."""
        with live.Namespaces() as namespaces, self.tracing("-R", "-N", namespaces.client):
            host = namespaces.hosts[0]
            with inside(namespaces.server, socket.create_server, (host, 0)) as listener, \
                    inside(namespaces.client, socket.create_connection, listener.getsockname()) as client, \
                    listener.accept()[0] as server:
                workload.deaf(server)
                there = name(client)
                client.send(b"x")
                time.sleep(0.8)
                sent = retransmitted(client)
                subprocess.run(["ip", "-n", namespaces.client, "route", "add", "unreachable", host], check=True)
                time.sleep(3)
                self.assertEqual(retransmitted(client), sent)
        self.assertEqual(len(self.seen(*there)), sent)
        self.assertGreater(sent, 1)

    def test_times_only_where_they_are_known(self):
        """Not of a state that began before the start, and none without -m."""
        for options, known in (["-m"], True), ([], False):
            with pair() as (client, server):
                there, back = name(client), name(server)
                with self.tracing(*options):
                    client.shutdown(socket.SHUT_WR)
                    server.recv(1)
                    server.close()
                    time.sleep(0.1)
            states = {event[1] for event in self.seen(*there) + self.seen(*back) if event[4] is not None}
            self.assertEqual(states, {"FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK"} if known else set())

    def test_times_in_text(self):
        with live.Tracer("deeptcptracer", "-m", "-p", self.me) as tracer, pair():
            pass
        self.assertTrue(tracer.lines[1].endswith(" SK_ERR                   MS"))
        where = tracer.lines[1].index("MS")
        self.assertEqual(tracer.lines[2][where - 1:], " N/A")
        self.assertRegex(tracer.lines[3][where - 1:], r"^ \d+\.\d\d$")

    def test_times_lost(self):
        with live.Tracer("deeptcptracer", "-m", check=False, pretend={"MAX_SOCKETS": 16}) as tracer:
            with contextlib.ExitStack() as stack:
                for _ in range(40):
                    stack.enter_context(pair())
        self.assertRegex(tracer.stderr, "deeptcptracer: in all [0-9]+ times lost: the map of socket states was full\n")

    def test_kernel_stack(self):
        with self.tracing("-K", "-e", "tcp_set_state"), pair() as (client, _):
            there = name(client)
        line = next(line for line in self.tracer.objects
                    if line["state"] == "SYN_SENT" and line["dport"] == there[3])
        self.assertIn("tcp_v4_connect", line["stack"][:3])
        self.assertFalse([frame for frame in line["stack"] if "bpf" in frame or "trace_" in frame])
        self.assertLess(line["stack"].index("tcp_v4_connect"), line["stack"].index("do_syscall_64")
                        if "do_syscall_64" in line["stack"] else len(line["stack"]))

    def test_text(self):
        with live.Tracer("deeptcptracer", "-t", "-p", self.me) as tracer, pair():
            pass
        self.assertEqual(tracer.lines[0], "Tracing TCP events. Ctrl-C to end.")
        self.assertEqual(tracer.lines[1].split(),
                         "TIME EVENT_SOURCE PID COMM SOURCE DESTINATION TCP_STATE SK_ERR".split())
        self.assertRegex(tracer.lines[2], r"^\d\d:\d\d:\d\d\.\d{3} tcp_set_state\(\)         \d+ +\S+ +127.0.0.1:0 +"
                                          r"127.0.0.1:\d+ +CLOSE -> SYN_SENT$")

    def test_owners_are_forgotten(self):
        """After many connections the maps hold what is still open."""
        churn = live.Load()
        with live.Tracer("deeptcptracer", "-m", "-R") as tracer:
            before = [live.entries(tracer, name) for name in ("owners", "since")]
            churn.run(20000, 2)
            left = [live.entries(tracer, name) for name in ("owners", "since")]
        self.assertLess(left[0] - before[0], 100)
        self.assertLess(left[1] - before[1], 100)
