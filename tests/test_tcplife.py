"""tcplife against what known processes did: see workload.py."""
import collections
import unittest

import live
import workload

MS = 5 * live.SLOW      # what two clocks in two processes may differ by
BYTES = 2               # SYN and FIN count one each


def key(record):
    return (record["pid"], record["lport"], record["raddr"], record["rport"])


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
    """The log with the moments at which ftrace saw an accepted session begin, and any session end.

    A process only knows what it asked for. The packet that makes it so may wait on a busy CPU for milliseconds.
    """
    for known in log:
        for name, state in (("born", "ESTABLISHED"), ("died", "CLOSE")):
            moments = times.get((known["lport"], known["rport"], state), [])
            if len(moments) == 1 and (name == "died" or known["role"] == "server"):
                known[name] = moments * 2
    return log


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Truth(unittest.TestCase):
    maxDiff = None

    def trace(self, *args, wanted=lambda record: True, **work):
        with live.Tracer("tcplife", "--json", *args, check=False) as tracer, live.Unseen(tracer) as unseen:
            log = workload.sessions(workload.work(**work))
        log = timed(log, unseen.times())
        missing, wrong = difference([record for record in log if wanted(record)], tracer.objects)
        self.assertEqual(wrong, [])
        if unseen.count:
            self.assertLessEqual(len(missing), unseen.count, missing)
        else:
            self.assertEqual((missing, tracer.stderr), ([], ""))
        self.assertEqual(tracer.status, 0)
        return log

    def test_every_session_once_with_its_owner(self):
        log = self.trace(rounds=3)
        self.assertEqual(len(log), 3 * 172)

    def test_owner_is_who_closed(self):
        self.trace("--owner", "close")

    def test_tracepoints_only(self):
        self.trace("--probes", "tracepoint")

    def test_both_namespaces(self):
        with live.Namespaces() as namespaces:
            self.trace(**namespaces.where)

    def test_one_namespace_by_name(self):
        with live.Namespaces() as namespaces:
            inode = namespaces.inode(namespaces.server)
            log = self.trace("--netns", namespaces.server, wanted=lambda r: r["netns"] == inode, **namespaces.where)
            self.assertIn("client", {record["role"] for record in log})

    def test_one_namespace_by_inode(self):
        with live.Namespaces() as namespaces:
            inode = namespaces.inode(namespaces.client)
            self.trace("--netns", inode, wanted=lambda r: r["netns"] == inode, **namespaces.where)

    def test_ipv4_only(self):
        self.trace("-4", wanted=lambda record: record["ip"] == 4)

    def test_ipv6_only(self):
        self.trace("-6", wanted=lambda record: record["ip"] == 6)
