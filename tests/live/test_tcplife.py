"""tcplife against what known processes did: see workload.py."""
import collections
import os
import socket
import subprocess
import unittest

import live
import tcplife
import workload

MS = 5 * live.SLOW      # what two clocks in two processes may differ by


def connection(record):
    return (record["lport"], record["raddr"], record["rport"], record["netns"])


def key(record):
    return (record["pid"], *connection(record))


def waits(known):
    """{member: between which milliseconds it should be; None if it should be null}"""
    connected, accepted = known.get("connected"), known.get("accepted")
    return {"connect_ms": connected and [1000 * seconds for seconds in connected],
            "accept_ms": accepted and [1000 * (moment - known["born"][0]) for moment in accepted]}


def difference(log, printed, sees_accept=True):
    """What is missing and what is wrong in these lines, as two lists of texts; empty if they are the log's sessions.

    sees_accept: the tool traces accept().
    """
    found = collections.defaultdict(list)
    for line in printed:
        found[key(line)].append(line)
    missing, wrong = [], []
    for known in log:
        lines = found.pop(key(known), [])
        if not lines:
            missing.append(known)
            continue
        if len(lines) > 1:
            wrong.append("%d lines for %s" % (len(lines), known))
        line = lines[0]
        expected = dict(known, role={"client": "connect", "server": "accept"}[known["role"]],
                        tx_bytes=known["sent"], rx_bytes=known["received"], partial=False)
        if not sees_accept:
            expected.pop("accepted", None)
        for name in line.keys() & expected.keys() - {"ts"}:
            if line[name] != expected[name] and (expected[name] is not None or name == "err"):
                wrong.append("%s is %r in %s, not that of %s" % (name, line[name], line, expected))
        for name, between in waits(expected).items():
            ms = line[name]
            if ms != between if None in (ms, between) else not between[0] - MS <= ms <= between[1] + MS:
                wrong.append("%s is %s in %s, not %s" % (name, ms, line, between))
        (born, connected), (dying, died) = known["born"], known["died"]
        if not (dying - connected) * 1000 - MS <= line["ms"] <= (died - born) * 1000 + MS:
            wrong.append("ms is %s, not %.3f to %.3f, in %s of %s" % (
                line["ms"], (dying - connected) * 1000, (died - born) * 1000, line, known))
    return missing, wrong + ["no such session: %s" % line for lines in found.values() for line in lines]


def timed(log, times, retransmissions):
    """The log with what ftrace saw: when sessions started and ended, and how many segments went again.

    A process only knows what it asked for. The packet that makes it so may wait on a busy CPU for milliseconds.
    """
    for known in log:
        lport, rport, is_client = known["lport"], known["rport"], known["role"] == "client"
        established = times[lport, rport, "ESTABLISHED"]
        # connect() starts without a local port, unless the socket is bound
        sent = times[lport, rport, "SYN_SENT"] or times[0, rport, "SYN_SENT"]
        for name, moments in ("born", sent if is_client else established), ("died", times[lport, rport, "CLOSE"]):
            if len(moments) == 1:
                known[name] = moments * 2
        if is_client and len(established) == 1:
            before = [moment for moment in sent if moment < established[0]]
            known["connected"] = established[0] - max(before, default=established[0]), established[0] - known["born"][0]
        known["retrans"] = retransmissions[lport, rport]
    return log


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class TcplifeAgainstWorkload(unittest.TestCase):
    maxDiff = None

    def trace(self, modes, **work):
        """tcplife in several modes on one workload. modes: {options: which of the log's sessions are to be printed}."""
        tracers = [live.Tracer("tcplife", "--json", *options, check=False) for options in modes]
        with live.tracing(*tracers), live.UnseenStateChanges(tracers[0]) as unseen:
            log = workload.sessions(workload.work(**work))
        log = timed(log, unseen.times(), unseen.retransmissions())
        for (options, wanted), tracer in zip(modes.items(), tracers):
            with self.subTest(options=options):
                missing, wrong = difference([record for record in log if wanted(record)],
                                            live.ours(log, tracer.objects, connection), "close" not in options)
                self.assertEqual(wrong, [])
                if unseen.count:
                    self.assertLessEqual(len(missing), unseen.count, missing)
                else:
                    self.assertEqual((missing, tracer.stderr), ([], ""))
                self.assertEqual(tracer.status, 0)
        return log

    def test_every_session_once_with_its_owner(self):
        log = self.trace({(): live.every}, rounds=3)
        self.assertEqual(len(log), 3 * 172)

    def test_how_sessions_end(self):
        with live.Namespaces() as namespaces:
            self.trace({("--probes", "tracepoint"): live.every, (): live.every,
                        ("--failed",): lambda record: record["end"] not in ("local", "remote", "both")},
                       scenarios=[*workload.ENDS, "unreachable"], **namespaces.where)

    def test_options(self):
        self.trace({("--owner", "close"): live.every, ("--probes", "tracepoint"): live.every,
                    ("-4",): lambda record: record["ip"] == 4, ("-6",): lambda record: record["ip"] == 6})

    def test_namespaces(self):
        with live.Namespaces() as namespaces:
            one, other = namespaces.inode(namespaces.server), namespaces.inode(namespaces.client)
            log = self.trace({(): live.every, ("--netns", namespaces.server): lambda record: record["netns"] == one,
                              ("--netns", other): lambda record: record["netns"] == other}, **namespaces.where)
        self.assertEqual({record["netns"] for record in log}, {one, other})

    def test_no_port_is_left(self):
        """connect() fails before it has sent anything: nobody gave up, nothing was refused."""
        with live.Namespaces() as namespaces, \
                live.Tracer("tcplife", "--json", "--netns", namespaces.client, "-D", "9") as tracer:
            subprocess.run(["ip", "netns", "exec", namespaces.client, "sysctl", "-qw",
                            "net.ipv4.ip_local_port_range=40000 40000"], check=True)

            def work():
                with socket.create_server(("127.0.0.1", 9)), socket.create_connection(("127.0.0.1", 9)), \
                        self.assertRaisesRegex(OSError, "Cannot assign"):
                    socket.create_connection(("127.0.0.1", 9))
            workload.wait(workload.spawn("no-port", namespaces.client, work))
        failed, = [line for line in tracer.objects if not line["connect_ms"]]
        self.assertEqual((failed["role"], failed["end"], failed["err"]), ("connect", None, None))

    def test_ends_that_are_not_seen(self):
        """They are reported when the kernel destroys the sockets."""
        blind = tcplife.bpf_text.replace("death(ctx, sk, oldstate);", ";")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            with live.Tracer("tcplife", "--json", "-D", address[1], pretend={"bpf_text": blind}) as tracer:
                for _ in range(5):
                    with socket.create_connection(address):
                        listener.accept()[0].close()
        self.assertEqual(tracer.objects, [])
        self.assertIn("tcplife: in all 5 sessions lost: their end was not seen\n", tracer.stderr)

    def test_sessions_from_before_the_start(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ends = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(2)]
            port = listener.getsockname()[1]
        for client, server in ends:
            client.send(b"12345")
            server.send(b"123")
            self.assertEqual((server.recv(9), client.recv(9)), (b"12345", b"123"))
        tracers = new, old, wide = [live.Tracer("tcplife", *options, "-p", os.getpid()) for options in (
            ["--json"], ["--json", "--existing"], ["-wx", "--existing"])]
        with live.tracing(*tracers):
            (one, other), (reset, heir) = ends
            one.close()
            other.close()
            workload.reset(reset)
            workload.await_state(heir, workload.CLOSE)
            heir.close()
        self.assertEqual(new.objects, [])
        ours = [line for line in old.objects if port in (line["lport"], line["rport"])]
        self.assertEqual([(line["end"], line["role"], line["partial"]) for line in ours],
                         [(end, None, True) for end in ("local", "remote", "abort", "reset")])
        for line in ours:           # a SYN of before the start counts as a byte
            server = line["lport"] == port
            self.assertEqual(line["rx_bytes"], 5 if server else 3)
            self.assertIn(line["tx_bytes"] - (3 if server else 5), [0] if server else [0, 1])
            self.assertTrue(0 <= line["ms"] < 1000 * live.START, line)
        self.assertEqual({line.split()[9][0] for line in wide.lines[1:]}, {">"})
