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
from test_right import network

MS = 5 * live.SLOW      # what one event may be seen later by one tracer than by the other
SEVEN = {"KERNEL": (7, 0)}


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

    def trace(self, *modes, pretend=None, **work):
        """tcpv4connect with each of these options, all on one workload."""
        tracers = [live.Tracer("tcpv4connect", "--json", "-U", *options, pretend=pretend) for options in modes]
        with live.tracing(*tracers):
            log = workload.work(**work)
        known = [record for record in log if record["role"] == "client" and record["ip"] == 4]
        source = {key(record): record["laddr"] for record in known if record["laddr"]}
        for options, tracer in zip(modes, tracers):
            with self.subTest(options=options):
                printed = live.ours(log, tracer.objects, connection)
                self.assertEqual(live.compare(known, printed, result if "-r" in options else key), ([], []))
                for line in printed:
                    self.assertEqual((line["uid"], line["saddr"]), (0, source.get(key(line), line["saddr"])))
        self.assertTrue(known)

    def test_every_connect_once_by_who_called_it(self):
        self.trace((), ("-r",), ("-r", "--probes", "tracepoint"), rounds=3)

    def test_every_connect_once_where_programs_can_be_preempted(self):
        self.trace((), ("-r",), pretend=SEVEN)

    def test_one_namespace(self):
        with live.Namespaces() as namespaces:
            self.trace(("--netns", namespaces.client), ("-r", "--netns", namespaces.client), **namespaces.where)

    def attempt(self, address, timeout=None, family=socket.AF_INET):
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            try:
                client.connect(address)
            except OSError as error:
                return error.errno
        return 0

    def test_attempts_that_fail(self):
        with live.Namespaces() as namespaces, \
                live.Tracer("tcpv4connect", "--json", "--netns", namespaces.client) as tracer:
            subprocess.run(["ip", "-n", namespaces.client, "route", "add", "unreachable", "10.79.0.0/24"], check=True)
            results = {}

            def work():
                self.attempt(("10.77.0.2", 1))                              # refused
                self.attempt(("10.77.0.99", 2), timeout=0.2)                # nobody answers ARP
                self.attempt(("10.79.0.1", 3))                              # no route: never sent
                self.attempt(("10.77.0.2", 4), timeout=0)                   # non-blocking
                self.attempt(("::ffff:10.77.0.2", 5), family=socket.AF_INET6)
                self.attempt(("fd77::2", 6), family=socket.AF_INET6)        # IPv6: another tool's
            pid = workload.spawn("attempts", namespaces.client, work)
            workload.wait(pid)
        self.assertEqual(results, {})
        self.assertEqual([(line["pid"], line["saddr"], line["daddr"], line["dport"]) for line in tracer.objects],
                         [(pid, "10.77.0.1", "10.77.0.2", 1), (pid, "10.77.0.1", "10.77.0.99", 2),
                          (pid, "10.77.0.1", "10.77.0.2", 4), (pid, "10.77.0.1", "10.77.0.2", 5)])

    def test_one_process_one_port_one_user(self):
        uid = 54321             # nobody's
        by_pid, by_port, by_uid, results = (live.Tracer("tcpv4connect", *options) for options in (
            ["-p", os.getpid()], ["-P", "7,9"], ["-U", "-u", uid], ["-rU", "-u", uid]))
        with live.tracing(by_pid, by_port, by_uid, results):
            workload.work(scenarios=["client_close"])
            self.assertEqual(self.attempt(("127.0.0.1", 9)), errno.ECONNREFUSED)

            def other_user():
                os.setuid(uid)
                self.attempt(("127.0.0.1", 11))
            workload.wait(workload.spawn("other", None, other_user))
        self.assertEqual([line.split()[-1] for line in by_pid.lines[1:]], ["9"])
        self.assertEqual([line.split()[-1] for line in by_port.lines[1:] if line.split()[0] == str(os.getpid())], ["9"])
        self.assertLessEqual({line.split()[-1] for line in by_port.lines[1:]}, {"7", "9"})      # others may do so, too
        self.assertEqual([(line.split()[0], line.split()[-1]) for line in by_uid.lines[1:]], [(str(uid), "11")])
        self.assertEqual([(line.split()[0], line.split()[-1]) for line in results.lines[1:]],
                         [(str(uid), "ECONNREFUSED")])


def connect(address, family=socket.AF_INET, user_timeout=0, give_up=None):
    """What has to be said of this connect: (address, port), result, and milliseconds by this process's clock.

    give_up: what is done after 0.2 s with a socket that does not wait.
    """
    with socket.socket(family) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout)
        sock.setblocking(not give_up)
        began, err = time.monotonic(), sock.connect_ex(address)
        if give_up:
            time.sleep(0.2)
            give_up(sock)
        ms = (time.monotonic() - began) * 1000
    names = {0: "ok", errno.EINPROGRESS: "quit", errno.EADDRNOTAVAIL: "failed"}
    return (address[0].replace("::ffff:", ""), address[1]), names.get(err) or errno.errorcode[err], ms


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Results(unittest.TestCase):
    """In a namespace where nobody else connects."""
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.namespaces = live.Namespaces().__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.namespaces.__exit__()

    def tracer(self, *options, **how):
        return live.Tracer("tcpv4connect", "-r", "--netns", self.namespaces.client, *options, **how)

    @contextlib.contextmanager
    def listeners(self, count):
        """Sockets that listen in the client's namespace, where this thread is while the context lasts."""
        with network(self.namespaces.client), contextlib.ExitStack() as stack:
            yield [stack.enter_context(socket.create_server(("127.0.0.1", 50 + n))) for n in range(count)]

    @live.by_timer
    def test_each_result(self):
        """And its milliseconds, beside those that ftrace saw; this process hears of a result later."""
        every, failed, preempted, perf = (
            self.tracer("--json"), self.tracer("--json", "--failed"), self.tracer("--json", pretend=SEVEN),
            self.tracer("--json", pretend={"RING_PAGES": 0}))
        with self.listeners(4) as (*_, silent, late):
            workload.deaf(silent)
            workload.deaf(late)

            def hear_the_second_syn():
                time.sleep(0.5)
                workload.hear(late)
            attempts = [
                (connect, ("127.0.0.1", 50)), (connect, ("::ffff:127.0.0.1", 51), socket.AF_INET6),
                (connect, ("127.0.0.1", 1)), (connect, ("::ffff:127.0.0.1", 2), socket.AF_INET6),
                (connect, ("127.0.0.1", 52), socket.AF_INET, 700), (connect, ("127.0.0.1", 53)),
                (connect, ("10.78.0.1", 3)),            # the router says that there is no way
                (connect, ("10.77.0.99", 4)),           # nobody answers ARP
                (connect, ("10.77.0.98", 5), socket.AF_INET, 0, socket.socket.close),
                (connect, ("10.77.0.97", 6), socket.AF_INET, 0, lambda sock: sock.shutdown(socket.SHUT_RDWR))]
            with live.tracing(every, failed, preempted, perf), live.UnseenStateChanges(every) as ftrace, \
                    concurrent.futures.ThreadPoolExecutor(len(attempts) + 1) as side_by_side:
                ftrace.write("events/sock/inet_sock_set_state/filter", "dport < 60")    # not what others do
                side_by_side.submit(hear_the_second_syn)
                known = sorted(future.result() for future in [side_by_side.submit(*one) for one in attempts])
        self.assertEqual(sorted(what for _, what, _ in known), sorted(
            ["ok"] * 3 + ["ECONNREFUSED"] * 2 + ["EHOSTUNREACH"] * 2 + ["quit"] * 2 + ["ETIMEDOUT"]))
        self.assertGreater({where: ms for where, _, ms in known}["127.0.0.1", 53], 900)
        times = ftrace.times()
        for tracer in every, preempted, perf:
            printed = sorted(((line["daddr"], line["dport"]), line["result"], line["ms"]) for line in tracer.objects)
            self.assertEqual([one[:2] for one in printed], [one[:2] for one in known])
            for (*_, ms), (where, _, measured) in zip(printed, known):
                self.assertLess(ms, measured + 0.2, where)      # the clocks differ by some microseconds
            for line in tracer.objects:
                lport, dport = line["lport"], line["dport"]
                began, = times[0, dport, "SYN_SENT"]
                ended, = times[lport, dport, "ESTABLISHED"] or times[lport, dport, "CLOSE"]
                self.assertLess(abs((ended - began) * 1000 - line["ms"]), MS, line)
                self.assertEqual(line["err"], line["result"] if line["result"].isupper() else None)
                self.assertGreater(line["lport"], 0)
                self.assertEqual((line["pid"], line["comm"]), (os.getpid(), workload.get_comm()))
        self.assertEqual(sorted((line["dport"], line["lport"], line["result"]) for line in failed.objects), sorted(
            (line["dport"], line["lport"], line["result"]) for line in every.objects if line["result"] != "ok"))

    def test_no_local_port(self):
        """The kernel does not leave this error in the socket."""
        with self.listeners(1) as (listener,), self.tracer("--json") as tracer:
            for ports in "40000 40000", "32768 60999":
                with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as port_range:
                    port_range.write(ports)
                if ports == "40000 40000":
                    with socket.create_connection(listener.getsockname()):
                        said = connect(listener.getsockname())[1]
        self.assertEqual(said, "failed")
        self.assertEqual([(line["result"], line["err"], line["lport"]) for line in tracer.objects],
                         [("ok", None, 40000), ("failed", None, None)])

    def test_another_attempt_of_a_socket(self):
        with self.listeners(1) as (listener,), self.tracer("--json") as tracer, socket.socket() as sock:
            sock.connect_ex(("127.0.0.1", 1))
            sock.connect(listener.getsockname())
        self.assertEqual([line["result"] for line in tracer.objects], ["ECONNREFUSED", "ok"])

    def test_both_ends_call_connect(self):
        with self.listeners(0), self.tracer("--json") as tracer, socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.connect(sock.getsockname())
        self.assertEqual([(line["result"], line["lport"] == line["dport"]) for line in tracer.objects], [("ok", True)])

    def test_under_way_at_the_end(self):
        """And the rest, where the map has room for two."""
        every, few = self.tracer("-tU"), self.tracer("--json", check=False, pretend={"MAX_ATTEMPTS": 2})
        with self.listeners(1) as (listener,), contextlib.ExitStack() as stack:
            workload.deaf(listener)
            with live.tracing(every, few):
                for _ in range(5):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex(listener.getsockname())
                time.sleep(0.3)
        self.assertEqual(every.lines[0].split(),
                         "TIME(s) UID PID COMM SADDR DADDR DPORT LPORT MS RESULT".split())
        self.assertEqual([line.split()[-4:-2] + line.split()[-1:] for line in every.lines[1:]],
                         [["50", "N/A", "pending"]] * 5)
        self.assertEqual([(line["result"], line["err"], line["lport"]) for line in few.objects],
                         [("pending", None, None)] * 2)
        for ms in [float(line.split()[-2]) for line in every.lines[1:]] + [line["ms"] for line in few.objects]:
            self.assertTrue(300 <= ms <= 1000 * live.SLOW, ms)
        self.assertRegex(few.stderr, "in all 3 connects lost: the map of attempts was full\n$")

    def test_load(self):
        """Each connect is printed once or reported as lost, and no attempt is left in the map."""
        churn = live.Load(self.namespaces.client)
        tracers = [self.tracer("--json", check=False, pretend=pretend)
                   for pretend in (None, SEVEN, {"RING_PAGES": 0}, {"RING_PAGES": 4})]
        with live.tracing(*tracers):
            churn.run(10000, 2)
            time.sleep(0.2)
            left = [live.entries(tracer, "attempts") for tracer in tracers]
        self.assertEqual(left, [0, 0, 0, 0])
        for tracer in tracers:
            lines = tracer.objects
            self.assertEqual(len(lines) + live.reported_losses(tracer), 20000, tracer.stderr)
            self.assertEqual({line["result"] for line in lines}, {"ok"})
            self.assertEqual(len({(line["ts"], line["daddr"], line["lport"]) for line in lines}), len(lines))

    def test_results_that_are_not_seen(self):
        """They are reported when the kernel destroys the sockets, or where it does not show that, uses them again."""
        blind = tcpv4connect.bpf_text.replace("|| oldstate == TCP_SYN_SENT", "")
        blinder = blind.replace("decide(ctx, (struct sock *)ctx->args[0], 0);", ";")
        one, other = (self.tracer("--json", check=False, pretend={"bpf_text": text}) for text in (blind, blinder))
        with self.listeners(1) as (listener,), live.tracing(one, other):
            for _ in range(200):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()
        self.assertEqual(one.objects, [])
        self.assertIn("in all 200 connects lost: their result was not seen\n", one.stderr)
        self.assertIn("connects lost: their result was not seen\n", other.stderr)
        self.assertLessEqual({line["result"] for line in other.objects}, {"pending"})
        self.assertEqual(len(other.objects) + live.reported_losses(other), 200)
