"""tcpv4connect against what known processes did: see workload.py."""
import concurrent.futures
import contextlib
import errno
import os
import socket
import subprocess
import time
import unittest

import live
import tcpv4connect
import workload


def connection(record):
    names = ("daddr", "dport") if "daddr" in record else ("raddr", "rport")
    return (*[record[name] for name in names], record["netns"])


def key(record):
    return (record["pid"], record["comm"], *connection(record))


def result(record):
    """What only -r shows besides."""
    return (*key(record), record["lport"], record["failed"] if "failed" in record else record["err"])


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Tcpv4connectAgainstWorkload(unittest.TestCase):
    maxDiff = None

    def trace(self, modes, **work):
        """tcpv4connect in each of these modes, options and what it pretends, all on one workload."""
        tracers = [live.Tracer("tcpv4connect", "--json", "-U", *options, pretend=pretend) for options, pretend in modes]
        with live.tracing(*tracers):
            log = workload.work(**work)
        known = [record for record in log if record["role"] == "client" and record["ip"] == 4]
        source = {key(record): record["laddr"] for record in known if record["laddr"]}
        for (options, pretend), tracer in zip(modes, tracers):
            with self.subTest(options=options, pretend=pretend):
                printed = live.ours(log, tracer.objects, connection)
                self.assertEqual(live.compare(known, printed, result if "-r" in options else key), ([], []))
                for line in printed:
                    self.assertEqual((line["uid"], line["saddr"]), (0, source.get(key(line), line["saddr"])))
        self.assertTrue(known)

    def test_every_connect_once_by_who_called_it(self):
        """Also where programs can be preempted."""
        self.trace([((), None), (("-r",), None), ((), live.SEVEN), (("-r",), live.SEVEN)], rounds=3)

    def test_one_namespace(self):
        with live.Namespaces() as namespaces:
            where = "--netns", namespaces.client
            self.trace([(where, None), (("-r", *where), None)], **namespaces.where)


def attempt(address, timeout=None, family=socket.AF_INET):
    """The error of connect(), as its name; "timed out" if this process has not waited for it."""
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        try:
            client.connect(address)
        except socket.timeout:
            return "timed out"
        except OSError as error:
            return errno.errorcode[error.errno]


def as_user(uid, function, *args):
    """What the function returns in a process of this user."""
    def work():
        os.setuid(uid)
        return function(*args)
    return live.in_process(work)[1]


def connect(address, family=socket.AF_INET, user_timeout=0, give_up=None):
    """What has to be said of this connect: (address, port), result, and milliseconds by this process's clock.

    give_up: what is done after 0.2 s with a socket that does not wait.
    """
    with socket.socket(family) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout)
        sock.setblocking(not give_up)
        began, err = time.monotonic(), sock.connect_ex(address)
        if give_up:
            live.settle(0.2)
            give_up(sock)
        ms = (time.monotonic() - began) * 1000
    names = {0: "ok", errno.EINPROGRESS: "quit", errno.EADDRNOTAVAIL: "failed"}
    return (address[0].replace("::ffff:", ""), address[1]), names.get(err) or errno.errorcode[err], ms


class OneByOne(live.Alone):
    """In a namespace where nobody else connects."""

    def tracer(self, *options, **how):
        return live.Tracer("tcpv4connect", "--netns", self.netns, *options, **how)

    def results(self, *options, **how):
        return self.tracer("-r", *options, **how)

    @contextlib.contextmanager
    def listeners(self, count):
        """Sockets that listen, at an address that strangers do not have in their namespaces."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(socket.create_server((workload.OWN, 0))) for _ in range(count)]

    def test_filters(self):
        """By processes, ports, users, results and namespaces."""
        uid = 54321             # nobody's
        with self.listeners(2) as (one, other), live.deserted() as nobody:
            actor = live.Actor([lambda _: attempt(one.getsockname())])

            def play():
                actor.do(0)
                self.assertEqual(as_user(uid, attempt, other.getsockname()), None)
                self.assertEqual(as_user(uid, attempt, nobody), "ECONNREFUSED")
                self.assertEqual(attempt(nobody), "ECONNREFUSED")
                with live.network(self.namespaces.server):
                    self.assertEqual(attempt(nobody), "ECONNREFUSED")
            ports = other.getsockname()[1], nobody[1]
            filters = {
                ("-p", actor.pid): (lambda line: line["pid"] == actor.pid, 1),
                ("-P", "%d,%d" % ports): (lambda line: line["dport"] in ports, 4),
                ("-u", uid): (lambda line: line["uid"] == uid, 2),
                ("-u", 0): (lambda line: line["uid"] == 0, 3),
                ("--saddr", "0.0.0.0/0", "-P", nobody[1]): (lambda line: line["dport"] == nobody[1], 3),
                ("--netns", self.namespaces.client): (lambda line: line["netns"] == self.netns, 4)}
            self.check_filters("tcpv4connect", filters, play)
            # These are chosen by the program in the same place.
            self.check_filters("tcpv4connect", {
                ("-u", uid): filters["-u", uid], ("--failed",): (lambda line: line["result"] == "ECONNREFUSED", 3),
                ("--failed", "-u", 0): (lambda line: line["result"] == "ECONNREFUSED" and line["uid"] == 0, 2)},
                               play, options=["-r"])
            actor.end()

    def test_attempts_that_fail(self):
        """They are shown if something was sent, and it was IPv4."""
        v4, v6 = self.namespaces.hosts
        subprocess.run(["ip", "-n", self.namespaces.client, "route", "add", "unreachable", "192.0.2.0/24"], check=True)

        def work():
            return [attempt((v4, 1)),
                    attempt((self.namespaces.host(99), 2), timeout=0.2),        # nobody answers ARP
                    attempt(("192.0.2.1", 3)),                                  # no route: never sent
                    attempt((v4, 4), timeout=0),                                # non-blocking
                    attempt(("::ffff:" + v4, 5), family=socket.AF_INET6),
                    attempt((v6, 6), family=socket.AF_INET6)]                   # IPv6: another tool's
        with self.tracer("--json") as tracer:
            pid, results = live.in_process(work)
        self.assertEqual(results, ["ECONNREFUSED", "timed out", "EHOSTUNREACH", "EINPROGRESS", "ECONNREFUSED",
                                   "ECONNREFUSED"])
        self.assertEqual([(line["pid"], line["saddr"], line["daddr"], line["dport"]) for line in tracer.objects],
                         [(pid, self.namespaces.guests[0], address, port) for address, port in (
                             (v4, 1), (self.namespaces.host(99), 2), (v4, 4), (v4, 5))])

    def check_results(self, expected, meanwhile=lambda: None):
        """All these attempts at once, beside those that ftrace sees; this process hears of a result later.

        expected: [(arguments of connect(), its result), ...]
        """
        every, failed, preempted = (
            self.results("--json"), self.results("--json", "--failed"), self.results("--json", pretend=live.SEVEN))
        own = live.of(*{address[0].replace("::ffff:", "") for (address, *_), _ in expected})
        with live.Times(own) as before, live.tracing(every, failed, preempted), live.Times(own) as after, \
                concurrent.futures.ThreadPoolExecutor(len(expected) + 1) as side_by_side:
            side_by_side.submit(meanwhile)
            attempts = [side_by_side.submit(connect, *args) for args, _ in expected]
            known = sorted(attempt.result() for attempt in attempts)
        self.assertEqual([one[:2] for one in known],
                         sorted(((address[0].replace("::ffff:", ""), address[1]), result)
                                for (address, *_), result in expected))
        times = live.between(before, after)
        for tracer in every, preempted:
            printed = sorted(((line["daddr"], line["dport"]), line["result"], line["ms"]) for line in tracer.objects)
            self.assertEqual([one[:2] for one in printed], [one[:2] for one in known])
            for (*_, ms), (where, _, measured) in zip(printed, known):
                self.assertLess(ms, measured + 0.2, where)      # the clocks differ by some microseconds
            for line in tracer.objects:
                here, there = line["lport"], (line["daddr"], line["dport"])
                began, = times[(0, *there, "SYN_SENT")]
                ended, = times[(here, *there, "ESTABLISHED")] or times[(here, *there, "CLOSE")]
                low, high = (1000 * (one - other) for one, other in zip(ended, reversed(began)))
                self.assertTrue(low - 0.01 <= line["ms"] <= high + 0.01, (line, low, high))     # ftrace rounds
                self.assertEqual(line["err"], line["result"] if line["result"].isupper() else None)
                self.assertGreater(here, 0)
                self.assertEqual((line["pid"], line["comm"]), (os.getpid(), workload.get_comm()))
        failures = [line for line in every.objects if line["result"] != "ok"]
        self.assertEqual(live.compare(failures, failed.objects, live.timeless), ([], []))
        return {where: ms for where, _, ms in known}

    def test_each_result(self):
        v6, mapped = socket.AF_INET6, "::ffff:" + workload.OWN
        with self.listeners(2) as (one, other), live.deserted() as nobody, live.deserted() as none:
            self.check_results([
                ((one.getsockname(),), "ok"), (((mapped, other.getsockname()[1]), v6), "ok"),
                ((nobody,), "ECONNREFUSED"), (((mapped, none[1]), v6), "ECONNREFUSED"),
                (((self.namespaces.host(98), 5), socket.AF_INET, 0, socket.socket.close), "quit"),
                (((self.namespaces.host(97), 6), socket.AF_INET, 0, lambda sock: sock.shutdown(socket.SHUT_RDWR)),
                 "quit")])

    @live.by_timer
    def test_results_by_timers(self):
        """Those that come after a retransmission, or because there is no answer."""
        subprocess.run(["sysctl", "-qw", "net.ipv4.neigh.veth0.retrans_time_ms=250"], check=True)
        with self.listeners(2) as (silent, late):
            workload.deaf(silent)
            workload.deaf(late)

            def hear_the_second_syn():
                live.settle(0.5)
                workload.hear(late)
            took = self.check_results([
                ((silent.getsockname(), socket.AF_INET, 700), "ETIMEDOUT"), ((late.getsockname(),), "ok"),
                (((self.namespaces.nowhere[0], 3),), "EHOSTUNREACH"),           # the router says that there is no way
                (((self.namespaces.host(99), 4),), "EHOSTUNREACH")],            # nobody answers ARP
                hear_the_second_syn)
            self.assertGreater(took[late.getsockname()], 900)

    def test_no_local_port(self):
        """The kernel does not leave this error in the socket."""
        with self.listeners(1) as (listener,), self.results("--json") as tracer, live.local_ports(40000, 40000), \
                socket.create_connection(listener.getsockname()):
            self.assertEqual(connect(listener.getsockname())[1], "failed")
        self.assertEqual([(line["result"], line["err"], line["lport"]) for line in tracer.objects],
                         [("ok", None, 40000), ("failed", None, None)])

    def test_another_attempt_of_a_socket(self):
        with self.listeners(1) as (listener,), live.deserted() as nobody, self.results("--json") as tracer, \
                socket.socket() as sock:
            sock.connect_ex(nobody)
            sock.connect(listener.getsockname())
        self.assertEqual([line["result"] for line in tracer.objects], ["ECONNREFUSED", "ok"])

    def test_both_ends_call_connect(self):
        with self.results("--json") as tracer, socket.socket() as sock:
            sock.bind((workload.OWN, 0))
            sock.connect(sock.getsockname())
        self.assertEqual([(line["result"], line["lport"] == line["dport"]) for line in tracer.objects], [("ok", True)])

    def test_under_way_at_the_end(self):
        """And the rest, where the map has room for two."""
        every, few = self.results("-tU"), self.results("--json", check=False, pretend={"MAX_ATTEMPTS": 2})
        with self.listeners(1) as (listener,), contextlib.ExitStack() as stack:
            workload.deaf(listener)
            port = listener.getsockname()[1]
            with live.tracing(every, few):
                began = time.monotonic()
                for _ in range(5):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex(listener.getsockname())
                called = time.monotonic()
                live.settle(0.3)
                slept = time.monotonic()
            ended = time.monotonic()
        self.assertEqual(every.lines[0].split(),
                         "TIME(s) UID PID COMM SADDR DADDR DPORT LPORT MS RESULT RETR".split())
        self.assertEqual([line.split()[-5:-3] + line.split()[-2:] for line in every.lines[1:]],
                         [[str(port), "N/A", "pending", "0"]] * 5)
        self.assertEqual([(line["result"], line["err"], line["lport"]) for line in few.objects],
                         [("pending", None, None)] * 2)
        for ms in [float(line.split()[-3]) for line in every.lines[1:]] + [line["ms"] for line in few.objects]:
            self.assertTrue(1000 * (slept - called) - 0.2 <= ms <= 1000 * (ended - began), ms)
        self.assertRegex(few.stderr, "in all 3 connects lost: the map of attempts was full\n$")

    def test_load(self):
        """Each connect is printed once or reported as lost, and no attempt is left in the map."""
        churn = live.Load(self.namespaces.client)
        tracers = [self.results("--json", check=False, pretend=pretend)
                   for pretend in (None, live.SEVEN, {"RING_PAGES": 4})]
        with live.tracing(*tracers):
            churn.run(10000, 2)
            live.settle(0.2)
            left = [live.entries(tracer, "attempts") for tracer in tracers]
        self.assertEqual(left, [0, 0, 0])
        for tracer in tracers:
            lines = tracer.objects
            self.assertEqual(len(lines) + live.reported_losses(tracer), 20000, tracer.stderr)
            self.assertEqual({line["result"] for line in lines}, {"ok"})
            self.assertEqual(len({(line["ts"], line["daddr"], line["lport"]) for line in lines}), len(lines))

    def test_results_that_are_not_seen(self):
        """They are reported when the kernel destroys the sockets, or where it does not show that, uses them again."""
        blind = live.without(tcpv4connect.bpf_text, "decide(sk, newstate);",
                             "if (newstate == TCP_SYN_SENT) decide(sk, newstate);")
        blinder = live.without(blind, "decide(sk, 0);")
        one, other = (self.results("--json", check=False, pretend={"bpf_text": text}) for text in (blind, blinder))
        with self.listeners(1) as (listener,), live.tracing(one, other):
            for _ in range(200):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()
        self.assertEqual(one.objects, [])
        self.assertLessEqual({line["result"] for line in other.objects}, {"pending"})
        for tracer in one, other:
            self.assertEqual(live.losses(tracer),
                             {"connects lost: their result was not seen": 200 - len(tracer.objects)})
