"""tcpv4connect against what known processes did: see workload.py."""
import errno
import os
import socket
import subprocess
import unittest

import live
import workload


def key(record):
    if "daddr" in record:
        return tuple(record[name] for name in ("pid", "comm", "daddr", "dport", "netns"))
    return tuple(record[name] for name in ("pid", "comm", "raddr", "rport", "netns"))


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    def trace(self, *args, wanted=lambda record: True, **work):
        with live.Tracer("tcpv4connect", "--json", "-U", *args) as tracer:
            log = workload.work(**work)
        known = [record for record in log if record["role"] == "client" and record["ip"] == 4 and wanted(record)]
        self.assertEqual(live.compare(known, tracer.objects, key), ([], []))
        source = {key(record): record["laddr"] for record in known if record["laddr"]}
        for line in tracer.objects:
            self.assertEqual(line["uid"], 0)
            self.assertEqual(line["saddr"], source.get(key(line), line["saddr"]))
        self.assertTrue(known)

    def test_every_connect_once_by_who_called_it(self):
        self.trace(rounds=3)

    def test_tracepoint_only(self):
        self.trace("--probes", "tracepoint")

    def test_one_namespace(self):
        with live.Namespaces() as namespaces:
            self.trace("--netns", namespaces.client, **namespaces.where)

    def attempt(self, address, timeout=None, family=socket.AF_INET):
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            try:
                client.connect(address)
            except OSError as error:
                return error.errno
        return 0

    def test_attempts_that_fail(self):
        with live.Namespaces() as namespaces, live.Tracer("tcpv4connect", "--json") as tracer:
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
        with live.Tracer("tcpv4connect", "-p", os.getpid()) as by_pid, \
                live.Tracer("tcpv4connect", "-P", "7,9") as by_port, \
                live.Tracer("tcpv4connect", "-U", "-u", 65534) as by_uid:
            workload.work(scenarios=["client_close"])
            self.assertEqual(self.attempt(("127.0.0.1", 9)), errno.ECONNREFUSED)

            def other_user():
                os.setuid(65534)
                self.attempt(("127.0.0.1", 11))
            workload.wait(workload.spawn("nobody", None, other_user))
        self.assertEqual([line.split()[-1] for line in by_pid.lines[1:]], ["9"])
        self.assertEqual([line.split()[-1] for line in by_port.lines[1:]], ["9"])
        self.assertEqual([(line.split()[0], line.split()[-1]) for line in by_uid.lines[1:]], [("65534", "11")])

    def test_full_speed(self):
        churn = live.Churn()
        with live.Tracer("tcpv4connect") as tracer:
            churn.run(20000, 2)
        self.assertEqual(len(tracer.lines), 40001)
