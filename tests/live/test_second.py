"""The second programs at the tracepoints, which take what the kernel skips the first ones for."""
import collections
import os
import socket

import live

# The programs called ..._first are loaded, but attached to nothing.
BUT_THE_FIRST = """
import bcc
def but_the_first(attach, kind):
    def attach_others(bpf, tp, fn_name):
        if fn_name.endswith("_first"):
            bpf.load_func(fn_name, kind)
        else:
            attach(bpf, tp=tp, fn_name=fn_name)
    return attach_others
bcc.BPF.attach_raw_tracepoint = but_the_first(bcc.BPF.attach_raw_tracepoint, bcc.BPF.RAW_TRACEPOINT)
bcc.BPF.attach_tracepoint = but_the_first(bcc.BPF.attach_tracepoint, bcc.BPF.TRACEPOINT)
"""
EVENTS = "deeptcptracer", "-e", "tcp_set_state"
TCP_SYN_RECV, TCP_LISTEN = 3, 10        # include/net/tcp_states.h


def doubles(lines):
    """The lines that say the same as another one did less than 0.1 ms before. No connection is as short as that."""
    last, found = {}, []
    for line in sorted(lines, key=lambda line: line["ts"]):
        what = tuple(line.get(name) for name in ("laddr", "lport", "raddr", "rport", "saddr", "sport", "daddr", "dport",
                                                 "oldstate", "state"))
        if line["ts"] - last.get(what, 0) < 0.0001 and line.get("oldstate") != "CLOSE":         # no local port yet
            found.append(line)
        last[what] = line["ts"]
    return found


class Second(live.Alone):
    def second_alone(self, tool, *options):
        options = [*options, "--json", "--netns", self.netns] + ["--no-kprobe"] * (tool != "tcpv4connect")
        return live.Tracer(tool, *options, pretend=live.SEVEN, before=BUT_THE_FIRST)

    def test_second_takes_what_the_first_does_not_see(self):
        """Here it takes all."""
        sessions, accepts, connects = map(self.second_alone, ("tcplife", "tcpaccept", "tcpv4connect"))
        results = self.second_alone("tcpv4connect", "-r")
        churn, events = self.second_alone("tcpchurn", os.getpid()), self.second_alone(*EVENTS)
        witness = live.Tracer(*EVENTS, "--json", "--netns", self.netns)
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                live.tracing(sessions, accepts, connects, results, churn, events, witness):
            for _ in range(50):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()
        for tracer, count in (sessions, 100), (accepts, 50), (connects, 50), (results, 50):
            self.assertEqual((len(tracer.objects), {line["pid"] for line in tracer.objects}), (count, {os.getpid()}))
        self.assertEqual(churn.objects[-1]["all"],
                         {"opened": 100, "accepted": 50, "connected": 50, "closed": 100})
        changes = [sorted((line["pid"] or 0, line["saddr"], line["sport"], line["oldstate"], line["state"])
                          for line in tracer.objects) for tracer in (events, witness)]
        self.assertEqual(*changes)
        self.assertGreater(len(changes[0]), 300)


class Once(live.Alone):
    """Softirqs interrupt the programs at any moment. Each event is printed once, or reported as lost."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.load = live.Load()

    def compare(self, may_be_skipped, pretend=None):
        """may_be_skipped: which part of all state changes."""
        connections, threads = 1500, 4
        total = connections * threads
        port = 10000 + os.getpid() % 20000          # in no other process of these tests, and no local port
        load = self.load.hold(connections, threads, 0, port)
        sessions, connects, changes, churn = tracers = [
            live.Tracer(tool, *options, "--json", "--netns", self.netns, check=False, pretend=pretend)
            for tool, *options in (["tcplife"], ["tcpv4connect", "-r"], EVENTS, ["tcpchurn", load.pid])]
        own = "(sport == %d || dport == %d)" % (port, port)
        # deeptcptracer does not show the changes of sockets that have no addresses yet.
        shown = "%s && newstate != %d && newstate != %d" % (own, TCP_SYN_RECV, TCP_LISTEN)
        with live.packets_shared(self.namespaces.client), live.tracing(*tracers), \
                live.Ftrace(kilobytes=8, inet_sock_set_state="") as every, \
                live.Ftrace(kilobytes=8, inet_sock_set_state=own) as ours, \
                live.Ftrace(kilobytes=8, inet_sock_set_state=shown) as changed, \
                live.UnseenStateChanges(own) as unseen:
            self.assertIn("connections %d " % total, load.communicate("\n")[0])
            live.settle(0.3)
        self.assertEqual([tracer.status for tracer in tracers], [0] * len(tracers))

        missing = collections.Counter(opened=2 * total, accepted=total, connected=total, closed=2 * total)
        missing.subtract(churn.objects[-1]["all"])
        self.assertGreaterEqual(min(missing.values()), 0, missing)
        for tracer, count in ((sessions, 2 * total - len(sessions.objects)), (connects, total - len(connects.objects)),
                              (changes, changed.count - len(changes.objects)),
                              (churn, missing["opened"] + missing["closed"])):
            with self.subTest(tracer.tool):
                self.assertEqual(doubles(tracer.objects), [])
                lost = live.reported_losses(tracer)
                # Not each change of a state is one that a line or a count depends on.
                skipped = sum(n for what, n in live.losses(tracer).items() if what.endswith("did not run the probe"))
                self.assertLessEqual(count - unseen.count, lost, tracer.stderr)
                if every.count == ours.count:       # else strangers' may be lost, too
                    self.assertLessEqual(lost - skipped, count, tracer.stderr)
                    self.assertLessEqual(skipped, may_be_skipped * ours.count, tracer.stderr)

    def test_usual(self):
        self.compare(may_be_skipped=0.001)

    def test_a_single_place_for_marks(self):
        self.compare(may_be_skipped=0.1, pretend={"MAX_MARKS": 1})

    def test_a_single_place_for_marks_where_programs_can_be_preempted(self):
        self.compare(may_be_skipped=0.1, pretend={**live.SEVEN, "MAX_MARKS": 1})
