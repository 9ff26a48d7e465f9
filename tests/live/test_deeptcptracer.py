"""deeptcptracer: each event provoked, and found with the right owner, addresses, state and error."""
import concurrent.futures
import contextlib
import functools
import os
import re
import select
import socket
import struct
import subprocess
import time
import deeptcptracer
import live
import workload

PORTS = iter(range(20000, 30000))       # not in net.ipv4.ip_local_port_range


def retransmitted(sock):
    """How many segments of this socket the kernel has sent again: tcpi_total_retrans."""
    return struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]


def timeouts(sock):
    """How often in a row the retransmission timer of this socket has run out: tcpi_retransmits."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[2]


def host(family):
    return "::1" if family == socket.AF_INET6 else "127.0.0.1"


def bound(family=socket.AF_INET):
    """A socket at a port that the kernel gives to nobody and so nobody had before. As yet, nobody listens there."""
    sock = socket.socket(family)
    for port in PORTS:
        with contextlib.suppress(OSError):      # somebody uses it
            sock.bind((host(family), port))
            return sock


def listen(family=socket.AF_INET):
    sock = bound(family)
    sock.listen()
    return sock


@contextlib.contextmanager
def pair(family=socket.AF_INET):
    """A connected client and server socket of this process."""
    with listen(family) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        server = listener.accept()[0]
    with client, server:
        yield client, server


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
        live.settle(0.1)
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
    with bound() as nobody, socket.socket() as sock:
        there = nobody.getsockname()
        sock.connect_ex(there)
    return {there: [("tcp_set_state()", "CLOSE", "SYN_SENT", None), ("tcp_reset()", None, "SYN_SENT", None),
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


def lose_one(client, server):
    """The client sends five segments, and the first one again when it hears that the others have come."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    workload.deaf(server)
    client.send(b"x")
    workload.hear(server)
    for _ in range(4):
        client.send(b"x")
    workload.receive(server, 5)


@provokes("tcp_retransmit_skb")
def fast_retransmission():
    with pair() as (client, server):
        there = name(client)
        lose_one(client, server)
        fast_retransmission.count = retransmitted(client)
        workload.reset(client)          # no FIN that a slow machine would send again
        workload.reset(server)
    return {there: [("tcp_retransmit_skb()", None, "ESTABLISHED/Recovery", None)]}


@provokes("tcp_retransmit_skb")
def retransmission():
    with pair() as (client, server):
        there = name(client)
        workload.deaf(server)
        client.send(b"x")
        live.until(lambda: retransmitted(client) > 1)
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
        live.settle(1)
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
        live.settle(0.1)
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
        live.until(lambda: retransmitted(client) > 1)
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
        workload.await_state(client, workload.CLOSE)
        workload.reset(server)
    return {there: [("sock_def_error_report()", None, "*", "ETIMEDOUT")]}


@provokes("tcp_send_reset")
def reset_of_nobody(family=socket.AF_INET):
    """Where nobody listens."""
    with bound(family) as nobody, socket.socket(family) as sock:
        sock.bind((host(family), 0))
        sock.connect_ex(nobody.getsockname())
        return {(*nobody.getsockname()[:2], *sock.getsockname()[:2]): [("tcp_send_reset()", None, None, "NO_SOCKET")]}


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
        live.settle(0.1)
    return {there: [("tcp_send_reset()", None, "CLOSE", "TCP_ABORT_ON_CLOSE")]}


@provokes("tcp_send_reset")
def reset_of_data_after_close(family=socket.AF_INET):
    with pair(family) as (client, server):
        back = name(server)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 100)      # above 60 s it stays a full socket
        server.close()
        client.recv(1)
        client.send(b"x")
        live.settle(0.1)
    return {back: [("tcp_send_reset()", None, "CLOSE", "TCP_ABORT_ON_DATA")]}


@provokes("tcp_send_reset")
def reset_in_time_wait(family=socket.AF_INET):
    """By the small socket that waits for the peer's FIN, when there comes data."""
    with pair(family) as (client, server):
        back = name(server)
        server.shutdown(socket.SHUT_WR)
        client.recv(1)
        live.settle(0.1)
        server.close()
        client.send(b"x")
        live.settle(0.1)
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
        live.settle(0.1)
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
SCENARIOS = [listener_closed, reset_received, refused, half_close, fast_retransmission, *BOTH, *map(over_ipv6, BOTH),
             *TIMED]


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


def expected_of(events):
    """The events as this kernel shows them: RSTs without a full socket, and reasons of RSTs, only since 6.10."""
    if deeptcptracer.KERNEL >= (6, 10):
        return events
    return type(events)(
        (event, oldstate, state, None if event == "tcp_send_reset()" else error, *rest)
        for event, oldstate, state, error, *rest in events if event != "tcp_send_reset()" or state == "CLOSE")


def difference(scenario, expected, objects):
    """What is not as the scenario expects it in these lines, as a list of texts."""
    wrong = []
    for endpoints, events in expected.items():
        events = expected_of(events)
        lines = [line for line in objects
                 if (line["saddr"], line["sport"], line["daddr"], line["dport"])[-len(endpoints):] == endpoints and
                 (not scenario.events or line["event"].partition("(")[0] in scenario.events)]
        seen = list(map(summary, lines))
        # nobody owns a socket before accept(), or after its end
        owners = {line["pid"] for line in lines if line["state"] != "SYN_RECV" and line["oldstate"] != "SYN_RECV"}
        known = set() if scenario.__name__.startswith(("reset_of_", "reset_in_")) else {os.getpid()}
        if not as_expected(events, seen) or len(seen) != getattr(scenario, "count", len(seen)):
            wrong.append("%s: %s has %s, not %s" % (scenario.__name__, endpoints, seen, events))
        elif owners - {None} != known:
            wrong.append("%s: owners of %s are %s" % (scenario.__name__, endpoints, owners))
    return wrong


def wrong_owners(log, objects):
    """Lines of the workload's sockets with an owner that is not theirs; and its records without any such line."""
    def ends(record):
        return record["laddr"], record["lport"], record["raddr"], record["rport"]
    owner, found, met = {ends(record): record for record in log}, [], set()
    for line in objects:
        endpoints = line["saddr"], line["sport"], line["daddr"], line["dport"]
        record = owner.get(endpoints)
        if record and line["pid"]:
            met.add(endpoints)
            if (line["pid"], line["comm"]) != (record["pid"], record["comm"]):
                found.append((line, record))
    return found, [record for record in workload.used(log) if ends(record) not in met]


class Events(live.Alone):
    me = os.getpid()

    @contextlib.contextmanager
    def tracing(self, *args):
        with live.Tracer("deeptcptracer", "--json", "-N", self.netns, *args) as self.tracer:
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
        """In no event a stranger: what workload.py does, compared with all owners that are printed."""
        with self.tracing():
            log = workload.work()
        self.assertEqual(wrong_owners(log, self.tracer.objects), ([], []))

    def test_owner_from_before_the_start(self):
        with pair() as (client, server):
            there, back = name(client), name(server)
            with self.tracing():
                client.close()
                server.recv(1)
                server.close()
                live.settle(0.1)
        for endpoints in (there, back):
            self.assertEqual(self.owners(*endpoints), {self.me})
            self.assertIn("CLOSE", [event[2] for event in self.seen(*endpoints)])

    def test_each_event_alone(self):
        names = ["tcp_set_state", "tcp_send_fin", "tcp_fin", "tcp_reset", "tcp_retransmit_skb", "sock_def_error_report",
                 "tcp_send_reset"]
        tracers = {one: live.Tracer("deeptcptracer", "--json", "-N", self.netns, "-e", one) for one in names}
        with live.tracing(*tracers.values()):
            workload.work(scenarios=["client_close", "client_reset"])
            with pair() as (client, server):
                lose_one(client, server)
        for one, tracer in tracers.items():
            self.assertEqual({line["event"] for line in tracer.objects}, {one + "()"})

    def test_filters(self):
        """By processes, addresses, ports, families and namespaces; of resets without a socket, too."""
        def visit(where):
            client = socket.create_connection(where.getsockname()[:2])
            with client, where.accept()[0] as server:
                client.shutdown(socket.SHUT_WR)
                server.recv(1)
        with socket.create_server(("127.0.0.7", 0)) as one, socket.create_server(("127.0.0.8", 0)) as other, \
                socket.create_server(("::1", 0), family=socket.AF_INET6) as v6, live.deserted("127.0.0.9") as nobody:
            port, reset_port = one.getsockname()[1], nobody[1]
            actor = live.Actor([lambda _: visit(one)])

            def play():
                actor.do(0)
                visit(other)
                visit(v6)
                with socket.socket() as sock:
                    sock.bind(("127.0.0.8", 0))
                    sock.connect_ex(nobody)
                with live.network(self.namespaces.server), socket.create_server(("127.0.0.8", 0)) as elsewhere:
                    visit(elsewhere)
            lines = self.check_filters("deeptcptracer", {
                ("-p", actor.pid): (lambda line: line["pid"] == actor.pid, None),
                ("-d", "127.0.0.4/30"): (lambda line: line["daddr"] == "127.0.0.7", None),
                ("-d", "fd00::1,127.0.0.9"): (lambda line: line["daddr"] == "127.0.0.9", None),
                ("-d", "::/0"): (lambda line: line["ip"] == 6, None),
                ("-s", "10.0.0.0/8,127.0.0.8"): (lambda line: line["saddr"] == "127.0.0.8", None),
                ("-D", "1,%d" % port): (lambda line: line["dport"] == port, None),
                ("-S", "%d,%d" % (port, reset_port)): (lambda line: line["sport"] in (port, reset_port), None),
                ("-4",): (lambda line: line["ip"] == 4, None),
                ("-6",): (lambda line: line["ip"] == 6, None),
                ("-N", self.namespaces.client): (lambda line: line["netns"] == self.netns, None),
                ("-N", self.namespaces.inode(self.namespaces.server), "-4"): (
                    lambda line: line["netns"] != self.netns, None)}, play)
            actor.end()
        resets = [line["sport"] for line in lines if line["event"] == "tcp_send_reset()" and not line["state"]]
        self.assertEqual(resets, [reset_port] * (deeptcptracer.KERNEL >= (6, 10)))

    @live.by_timer
    def test_attempts_that_send_nothing(self):
        """They are no retransmissions: here the route is gone."""
        host = self.namespaces.hosts[0]

        def route(*how):
            subprocess.run(["ip", "-n", self.namespaces.client, "route", *how], check=True)
        route("replace", host, "dev", "veth0", "rto_min", "20ms")
        with live.network(self.namespaces.server):
            listener = socket.create_server((host, 0))
        try:
            with self.tracing("-R"), listener, socket.create_connection(listener.getsockname()) as client, \
                    listener.accept()[0] as server:
                workload.deaf(server)
                there = name(client)
                client.send(b"x")
                live.settle(0.3)
                route("replace", "unreachable", host)
                sent, before = retransmitted(client), timeouts(client)
                live.settle(1)
                self.assertEqual(retransmitted(client), sent)
                self.assertGreater(timeouts(client), before)
        finally:
            route("del", host)
        self.assertEqual(len(self.seen(*there)), sent)
        self.assertGreater(sent, 1)

    def test_times_only_where_they_are_known(self):
        """Not of a state that began before the start, and none without -m."""
        where = "--json", "-N", self.netns
        timed, plain = live.Tracer("deeptcptracer", "-m", *where), live.Tracer("deeptcptracer", *where)
        with pair() as (client, server), live.tracing(timed, plain):
            client.shutdown(socket.SHUT_WR)
            server.recv(1)
            server.close()
            live.settle(0.1)
        for tracer, known in (timed, {"FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK"}), (plain, set()):
            states = {line["oldstate"] for line in tracer.objects if line["state_ms"] is not None}
            self.assertEqual(states, known)

    def test_times_lost(self):
        """Of all sockets that enter a state only as many are known as the map holds. Strangers' are among them."""
        sockets, known = 20, 16
        with listen() as listener, contextlib.ExitStack() as stack, live.Ftrace(inet_sock_set_state="") as changes:
            workload.deaf(listener)
            with live.Tracer("deeptcptracer", "-m", check=False, pretend={"MAX_SOCKETS": known}) as tracer:
                for _ in range(sockets):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex(listener.getsockname())
        lost = re.search("in all ([0-9]+) times lost: the map of socket states was full\n", tracer.stderr)
        self.assertGreaterEqual(int(lost.group(1)), sockets - known)
        self.assertLessEqual(int(lost.group(1)), changes.count - known)

    def test_kernel_stack(self):
        with self.tracing("-K", "-e", "tcp_set_state"), pair():
            pass
        line = next(line for line in self.tracer.objects if line["state"] == "SYN_SENT")
        self.assertIn("tcp_v4_connect", line["stack"][:3])
        self.assertFalse([frame for frame in line["stack"] if "bpf" in frame or "trace_" in frame])
        callers = ["tcp_v4_connect", "__inet_stream_connect", "inet_stream_connect"]
        self.assertEqual([frame for frame in line["stack"] if frame in callers], callers)

    def test_text(self):
        where = "-N", self.netns
        plain, timed = live.Tracer("deeptcptracer", "-t", *where), live.Tracer("deeptcptracer", "-m", *where)
        with live.tracing(plain, timed), pair():
            pass
        self.assertEqual(plain.lines[0], "Tracing TCP events. Ctrl-C to end.")
        self.assertEqual(plain.lines[1].split(),
                         "TIME EVENT_SOURCE PID COMM SOURCE DESTINATION TCP_STATE SK_ERR".split())
        self.assertRegex(plain.lines[2], r"^\d\d:\d\d:\d\d\.\d{3} tcp_set_state\(\)         \d+ +\S+ +127.0.0.1:0 +"
                                         r"127.0.0.1:\d+ +CLOSE -> SYN_SENT$")
        self.assertTrue(timed.lines[1].endswith(" SK_ERR                   MS"))
        where = timed.lines[1].index("MS")
        self.assertEqual(timed.lines[2][where - 1:], " N/A")
        self.assertRegex(timed.lines[3][where - 1:], r"^ \d+\.\d\d$")

    def test_owners_are_forgotten(self):
        """After many connections the maps hold what is still open."""
        churn = live.Load()
        with live.Tracer("deeptcptracer", "-m", "-R", "-N", self.netns) as tracer:
            before = [live.entries(tracer, name) for name in ("owners", "since")]
            churn.run(10000, 2)
            left = [live.entries(tracer, name) for name in ("owners", "since")]
        self.assertLess(left[0] - before[0], 100)
        self.assertLess(left[1] - before[1], 100)
