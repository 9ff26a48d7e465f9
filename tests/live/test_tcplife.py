"""tcplife against what known processes did: see workload.py."""
import collections
import os
import re
import socket
import tempfile
import unittest

import live
import tcplife
import workload

MS = live.SLOW          # by how much the clocks of processes may differ from the kernel's


def connection(record):
    return (record["lport"], record["raddr"], record["rport"], record["netns"])


def key(record):
    return (record["pid"], *connection(record))


def waits(known):
    """{member: between which milliseconds it should be; None if it should be null}"""
    connected, accepted = known.get("connected"), known.get("accepted")
    return {"connect_ms": connected and [1000 * seconds for seconds in connected],
            "accept_ms": accepted and [1000 * (accepted[0] - known["born"][1]),
                                       1000 * (accepted[1] - known["born"][0])]}


def fits(ms, between):
    if ms is None or between is None:
        return ms is between
    return between[0] - MS <= ms <= between[1] + MS


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
            is_unseen = name == "connect_ms" and line[name] is None and "ESTABLISHED" in known.get("unseen", ())
            if not fits(line[name], between) and not is_unseen:
                wrong.append("%s is %s in %s, not %s" % (name, line[name], line, between))
        lived = 1000 * (known["died"][0] - known["born"][1]), 1000 * (known["died"][1] - known["born"][0])
        if not fits(line["ms"], lived):
            wrong.append("ms is %s, not %.3f to %.3f, in %s of %s" % (line["ms"], *lived, line, known))
    return missing, wrong + ["no such session: %s" % line for lines in found.values() for line in lines]


def timed(log, before, after):
    """The log with what ftrace saw: between which times sessions started and ended, and what went again.

    before, after: as of live.between(). A process only knows what it asked for, and the packet that makes it so may
    wait on a busy CPU for milliseconds. "unseen" are states whose start no tool may have seen.
    """
    times, again, unseen = live.between(before, after), after.retransmissions(), after.unseen()
    for known in log:
        ends, is_client = (known["lport"], known["raddr"], known["rport"]), known["role"] == "client"
        established, closed, sent = (times[(*ends, state)] for state in ("ESTABLISHED", "CLOSE", "SYN_SENT"))
        if is_client and not sent:          # it has no local port yet, and nor have others that connect to this port
            began, ended = known["born"]
            sent = [one for one in times[(0, *ends[1:], "SYN_SENT")] if one[1] > began and one[0] < ended]
        born = sent if is_client else established
        if born:
            known["born"] = born[0][0], born[-1][1]
        if len(closed) == 1:
            known["died"] = closed[0]
        if is_client and len(established) == 1:
            known["connected"] = established[0][0] - known["born"][1], established[0][1] - known["born"][0]
        known["retrans"] = again[ends]
        known["unseen"] = {state for state in ("ESTABLISHED", "CLOSE") if (*ends, state) in unseen}
    return log


def ended_with_fins(record):
    return record["end"] in ("local", "remote", "both")


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class TcplifeAgainstWorkload(unittest.TestCase):
    maxDiff = None

    def trace(self, modes, **work):
        """tcplife in several modes on one workload. modes: {options: which of the log's sessions are to be printed}."""
        tracers = [live.Tracer("tcplife", "--json", *options, check=False) for options in modes]
        own = live.of(work.get("hosts", [workload.OWN])[0], *work.get("nowhere", [])[:1])
        with live.Times(own) as before, live.tracing(*tracers), live.Times(own) as after, \
                live.Ftrace(kilobytes=8, inet_sock_set_state="") as every:
            log = workload.sessions(workload.work(**work))
        log = timed(log, before, after)
        strangers = every.count - sum(map(len, after.changes().values()))
        for (options, wanted), tracer in zip(modes.items(), tracers):
            with self.subTest(options=options):
                some = [record for record in log if wanted(record)]
                self.assertTrue(0 < len(some) < len(log) or wanted == live.every)
                missing, wrong = difference(some, live.ours(log, tracer.objects, connection), "close" not in options)
                self.assertEqual(wrong, [])
                self.assertEqual([record for record in missing if not record["unseen"]], [])
                said = live.losses(tracer)
                if missing or (strangers and "--netns" not in options):         # the end of one of their sessions
                    said.pop("sessions lost: their end was not seen", None)
                self.assertEqual((tracer.status, said), (0, {}))

    def test_every_session_once_with_its_owner(self):
        self.trace({(): live.every, ("--no-kprobe",): live.every, ("--owner", "close"): live.every,
                    ("-4",): lambda record: record["ip"] == 4, ("-6",): lambda record: record["ip"] == 6}, rounds=3)

    def test_how_sessions_end(self):
        """And in which namespace."""
        with live.Namespaces() as namespaces:
            one, other = namespaces.inode(namespaces.server), namespaces.inode(namespaces.client)
            self.trace({(): live.every, ("--no-kprobe",): live.every,
                        ("--failed",): lambda record: not ended_with_fins(record),
                        ("--netns", namespaces.server): lambda record: record["netns"] == one,
                        ("--netns", other): lambda record: record["netns"] == other},
                       scenarios=[*workload.USUAL, *workload.ENDS], **namespaces.where)


class OneByOne(live.Alone):
    def test_filters(self):
        """By processes, ports, families, ends and namespaces."""
        def visit(where, how=socket.socket.close):
            with socket.socket(where.family) as client:
                client.connect(where.getsockname()[:2])
                with where.accept()[0] as server:
                    how(client)
                    workload.receive(server)
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other, \
                socket.create_server(("::1", 0), family=socket.AF_INET6) as v6:
            ports = [listener.getsockname()[1] for listener in (one, other, v6)]
            actor = live.Actor([lambda _: visit(one), lambda _: visit(other)])

            def play():
                actor.do(0)
                actor.do(1)
                visit(one)
                visit(v6, workload.reset)
                with live.network(self.namespaces.server), socket.create_server(("127.0.0.1", 0)) as elsewhere:
                    visit(elsewhere)
            self.check_filters("tcplife", {
                ("-p", actor.pid): (lambda line: line["pid"] == actor.pid, 4),
                ("-L", "%d,%d" % (ports[0], ports[2])): (lambda line: line["lport"] in (ports[0], ports[2]), 3),
                ("-D", ports[1]): (lambda line: line["rport"] == ports[1], 1),
                ("-4",): (lambda line: line["ip"] == 4, 8),
                ("-6",): (lambda line: line["ip"] == 6, 2),
                ("--raddr", "!127.0.0.0/8,::/0"): (lambda line: line["ip"] == 6, 2),
                ("--laddr", "127.0.0.1"): (lambda line: line["ip"] == 4, 8),
                ("--failed",): (lambda line: not ended_with_fins(line), 2),
                ("--netns", self.namespaces.client): (lambda line: line["netns"] == self.netns, 8),
                ("--netns", self.namespaces.inode(self.namespaces.server), "-4"): (
                    lambda line: line["netns"] != self.netns, 2)}, play)
            actor.end()

    def test_counts(self):
        """-c says of these sessions what their lines say: exactly, but for times, which are at most 2 % off."""
        tracers = {option: live.Tracer("tcplife", "--json", "--netns", self.netns, *option)
                   for option in ((), ("-c",), ("-c", "--by-peer"), ("-c", "--unit", "-i", 0.5))}
        text = live.Tracer("tcplife", "-cx", "--rows", 3, "--netns", self.netns)
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers.values(), text):
            workload.work(scenarios=["client_close", "client_reset", "refused", "server_exit"], rounds=3)
            kept = socket.create_connection(listener.getsockname())
            live.settle(0.3)
        kept.close()
        lines, *tables = (tracer.objects for tracer in tracers.values())

        def count(members, lines):
            """Returns {members: figures} of these lines."""
            rows = collections.defaultdict(list)
            for line in lines:
                rows[tuple(line[name] for name in members)].append(line)
            return {row: {
                "n": len(lines), "tx_bytes": sum(line["tx_bytes"] for line in lines),
                "rx_bytes": sum(line["rx_bytes"] for line in lines), "retrans": sum(line["retrans"] for line in lines),
                "ends": dict(collections.Counter(line["end"] or line["err"] or "N/A" for line in lines)),
                "max": max(line["ms"] for line in lines)} for row, lines in rows.items()}
        for line in lines:
            line.update(port=line["rport"] if line["role"] == "connect" else line["lport"], peer=line["raddr"])
            if line["role"] == "accept":
                line["raddr"] = None
        for table, members in zip(tables, (["comm", "role", "raddr", "port"], ["comm", "role", "peer", "port"],
                                           ["cgroup", "role", "raddr", "port"])):
            if members[0] == "cgroup":          # one table every half a second: their sums
                self.assertGreater(len({row["ts"] for row in table}), 1)
                found = collections.Counter()
                for row in table:
                    found[tuple(row[name] for name in members)] += row["n"]
                expected = {key: row["n"] for key, row in count(members, lines).items()}
                self.assertEqual({key: n for key, n in found.items() if n}, expected)
                continue
            names = [name if name != "peer" else "raddr" for name in members]
            expected, found = count(members, lines), {tuple(row[name] for name in names): row for row in table}
            for key, figures in expected.items():
                row = found[key]
                self.assertEqual({name: row[name] for name in figures if name != "max"},
                                 {name: value for name, value in figures.items() if name != "max"}, key)
                self.assertAlmostEqual(row["ms"]["max"], figures["max"], delta=MS)
            self.assertEqual(sum(row["open"] for row in table), 2)         # both ends of the one that is kept
        self.assertEqual(len(text.lines), 4)
        self.assertEqual(text.lines[0].split()[-5:], ["CONN_P99", "ACC_P99", "RETR", "OPEN", "WORST"])
        self.assertTrue(text.lines[3].startswith("(others)"))

    def test_prometheus(self):
        """The file says from the start on what these processes did, and is gone when the tool has exited."""
        def found():
            with open(path) as file:
                return {series: float(value) for series, value in re.findall(r"(?m)^tcplife_(\S+) (\S+)$", file.read())}
        expected, seconds = collections.Counter(), collections.defaultdict(lambda: [0, 0])
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()), listener.accept()[0]:
            path, port = os.path.join(folder, "a.prom"), listener.getsockname()[1]
            with live.Tracer("tcplife", "--prometheus", path, "-i", "0.3", "--existing", "--netns",
                             self.netns) as tracer:
                live.until(lambda: os.path.exists(path))
                log = workload.sessions(workload.work(
                    scenarios=["client_close", "client_reset", "refused", "server_exit"], rounds=2))
                for known in log:
                    row = 'comm="%s",role="%s",port="%d"' % (known["comm"], *{
                        "client": ("connect", known["rport"]), "server": ("accept", known["lport"])}[known["role"]])
                    expected.update({
                        'sessions_total{%s,end="%s"}' % (row, known["end"]): 1, "open{%s}" % row: 0,
                        "sent_bytes_total{%s}" % row: known["sent"],
                        "received_bytes_total{%s}" % row: known["received"],
                        "duration_seconds_count{%s}" % row: 1, 'duration_seconds_bucket{%s,le="+Inf"}' % row: 1})
                    for at_least_or_most, died, born in (0, 0, 1), (1, 1, 0):
                        seconds[row][at_least_or_most] += known["died"][died] - known["born"][born]
                with open("/proc/self/comm") as comm:
                    own = 'open{comm="%s",role="%%s",port="%d"}' % (comm.read()[:-1], port)
                expected.update({own % "connect": 1, own % "accept": 1})
                live.until(lambda: expected.items() <= found().items())
                series = found()
            self.assertEqual({key: series.get(key) for key in expected}, dict(expected))
            self.assertEqual(sum(n for key, n in series.items() if key.startswith("sessions_total{")), len(log))
            for row, (least, most) in seconds.items():
                lasted = series["duration_seconds_sum{%s}" % row]
                self.assertTrue(least - MS / 500 <= lasted <= most + MS / 500, (row, least, lasted, most))
            self.assertEqual((tracer.stdout, os.listdir(folder)), ("", []))

    def test_no_port_is_left(self):
        """connect() fails before it has sent anything: nobody gave up, nothing was refused."""
        with socket.create_server(("127.0.0.1", 0)) as listener, live.local_ports(40000, 40000), \
                live.Tracer("tcplife", "--json", "--netns", self.netns, "-D", listener.getsockname()[1]) as tracer:
            with socket.create_connection(listener.getsockname()), self.assertRaisesRegex(OSError, "Cannot assign"):
                socket.create_connection(listener.getsockname())
        failed, = [line for line in tracer.objects if not line["connect_ms"]]
        self.assertEqual((failed["role"], failed["end"], failed["err"]), ("connect", None, None))

    def test_ends_that_are_not_seen(self):
        """They are reported when the kernel destroys the sockets."""
        blind = live.without(tcplife.bpf_text, "tell(sk, oldstate, 0);")
        with socket.create_server(("127.0.0.1", 0)) as listener, live.Tracer(
                "tcplife", "--json", "--netns", self.netns, check=False, pretend={"bpf_text": blind}) as tracer:
            for _ in range(5):
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()
        self.assertEqual((tracer.status, tracer.objects), (0, []))
        self.assertEqual(live.losses(tracer), {"sessions lost: their end was not seen": 10})

    def test_sessions_from_before_the_start(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ends = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(2)]
            port = listener.getsockname()[1]
        for client, server in ends:
            client.send(b"12345")
            server.send(b"123")
            self.assertEqual((server.recv(9), client.recv(9)), (b"12345", b"123"))
        tracers = new, old, wide = [live.Tracer("tcplife", *options, "--netns", self.netns) for options in (
            ["--json"], ["--json", "--existing"], ["-wx", "--existing"])]
        with live.tracing(*tracers):
            (one, other), (reset, heir) = ends
            one.close()
            other.close()
            workload.reset(reset)
            workload.await_state(heir, workload.CLOSE)
            heir.close()
        self.assertEqual(new.objects, [])
        self.assertEqual([(line["pid"], line["end"], line["partial"]) for line in old.objects],
                         [(os.getpid(), end, True) for end in ("local", "remote", "abort", "reset")])
        for line in old.objects:
            server = line["lport"] == port
            self.assertEqual(line["role"], "accept" if server else "connect")
            self.assertEqual((line["tx_bytes"], line["rx_bytes"]), (3, 5) if server else (5, 3))
            self.assertEqual((line["tx_bytes_seen"], line["rx_bytes_seen"]), (0, 0))
            self.assertTrue(0 <= line["ms"] < 1000 * live.START, line)
        self.assertEqual({line.split()[9][0] for line in wide.lines[1:]}, {">"})
