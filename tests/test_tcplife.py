"""tcplife against what known processes did: see workload.py."""
import collections
import unittest

import live
import workload

MS = 5 * live.SLOW      # what two clocks in two processes may differ by
BYTES = 2               # SYN and FIN count one each


def connection(record):
    return (record["lport"], record["raddr"], record["rport"], record["netns"])


def key(record):
    return (record["pid"], *connection(record))


def difference(log, printed):
    """What is missing and what is wrong in these lines, as two lists of texts; empty if they are the log's sessions."""
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
        for name in ("comm", "ip", "laddr", "netns"):
            if line[name] != known[name] and known[name] is not None:
                wrong.append("%s is %r in %s, not that of %s" % (name, line[name], line, known))
        for name, count in (("tx_bytes", known["sent"]), ("rx_bytes", known["received"])):
            if not 0 <= line[name] - count <= BYTES:
                wrong.append("%s is %d in %s, but %d in %s" % (name, line[name], line, count, known))
        (born, connected), (dying, died) = known["born"], known["died"]
        if not (dying - connected) * 1000 - MS <= line["ms"] <= (died - born) * 1000 + MS:
            wrong.append("ms is %s, not %.3f to %.3f, in %s of %s" % (
                line["ms"], (dying - connected) * 1000, (died - born) * 1000, line, known))
    return missing, wrong + ["no such session: %s" % line for lines in found.values() for line in lines]


def timed(log, times):
    """The log with the moments at which ftrace saw sessions start and end.

    A process only knows what it asked for. The packet that makes it so may wait on a busy CPU for milliseconds.
    """
    for known in log:
        for name, state in (("born", "ESTABLISHED" if known["role"] == "server" else "SYN_SENT"), ("died", "CLOSE")):
            # connect() begins without a local port, unless the socket is bound
            moments = times[known["lport"], known["rport"], state] or times[0, known["rport"], state]
            if len(moments) == 1:
                known[name] = moments * 2
    return log


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    def trace(self, modes, **work):
        """tcplife in several modes on one workload. modes: {options: which of the log's sessions are to be printed}."""
        tracers = [live.Tracer("tcplife", "--json", *options, check=False) for options in modes]
        with live.tracing(*tracers), live.Unseen(tracers[0]) as unseen:
            log = workload.sessions(workload.work(**work))
        log = timed(log, unseen.times())
        for (options, wanted), tracer in zip(modes.items(), tracers):
            with self.subTest(options=options):
                missing, wrong = difference([record for record in log if wanted(record)],
                                            live.ours(log, tracer.objects, connection))
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

    def test_options(self):
        self.trace({("--owner", "close"): live.every, ("--probes", "tracepoint"): live.every,
                    ("-4",): lambda record: record["ip"] == 4, ("-6",): lambda record: record["ip"] == 6})

    def test_namespaces(self):
        with live.Namespaces() as namespaces:
            one, other = namespaces.inode(namespaces.server), namespaces.inode(namespaces.client)
            log = self.trace({(): live.every, ("--netns", namespaces.server): lambda record: record["netns"] == one,
                              ("--netns", other): lambda record: record["netns"] == other}, **namespaces.where)
        self.assertEqual({record["netns"] for record in log}, {one, other})
