"""tcpv4connect against what known processes did: see workload.py."""
import errno
import os
import socket
import subprocess
import unittest

import live
import workload


def connection(record):
    names = ("daddr", "dport") if "daddr" in record else ("raddr", "rport")
    return (*[record[name] for name in names], record["netns"])


def key(record):
    return (record["pid"], record["comm"], *connection(record))


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    def trace(self, *modes, **work):
        """tcpv4connect with each of these options, all on one workload."""
        tracers = [live.Tracer("tcpv4connect", "--json", "-U", *options) for options in modes]
        with live.tracing(*tracers):
            log = workload.work(**work)
        known = [record for record in log if record["role"] == "client" and record["ip"] == 4]
        source = {key(record): record["laddr"] for record in known if record["laddr"]}
        for options, tracer in zip(modes, tracers):
            with self.subTest(options=options):
                printed = live.ours(log, tracer.objects, connection)
                self.assertEqual(live.compare(known, printed, key), ([], []))
                for line in printed:
                    self.assertEqual((line["uid"], line["saddr"]), (0, source.get(key(line), line["saddr"])))
        self.assertTrue(known)

    def test_every_connect_once_by_who_called_it(self):
        self.trace((), ("--probes", "tracepoint"), rounds=3)

    def test_one_namespace(self):
        with live.Namespaces() as namespaces:
            self.trace(("--netns", namespaces.client), **namespaces.where)

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
            subprocess.run(["ip", "-n", namespaces.client, "route", "add", "unreachable", "10.78.0.0/24"], check=True)
            results = {}

            def work():
                self.attempt(("10.77.0.2", 1))                              # refused
                self.attempt(("10.77.0.99", 2), timeout=0.2)                # nobody answers ARP
                self.attempt(("10.78.0.1", 3))                              # no route: never sent
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
        by_pid, by_port, by_uid = (live.Tracer("tcpv4connect", *options) for options in (
            ["-p", os.getpid()], ["-P", "7,9"], ["-U", "-u", uid]))
        with live.tracing(by_pid, by_port, by_uid):
            workload.work(scenarios=["client_close"])
            self.assertEqual(self.attempt(("127.0.0.1", 9)), errno.ECONNREFUSED)

            def other_user():
                os.setuid(uid)
                self.attempt(("127.0.0.1", 11))
            workload.wait(workload.spawn("other", None, other_user))
        self.assertEqual([line.split()[-1] for line in by_pid.lines[1:]], ["9"])
        self.assertEqual([line.split()[-1] for line in by_port.lines[1:]], ["9"])
        self.assertEqual([(line.split()[0], line.split()[-1]) for line in by_uid.lines[1:]], [(str(uid), "11")])
