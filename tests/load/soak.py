#!/usr/bin/python3
"""All five tools at once under a mixed load for a long time: nothing missing, nothing grown.

usage: soak.py [-r RATE] SECONDS

The load: connload.c at RATE connections per second, with it the rounds of workload.py one after the other, and now and
then a crowd of 2,000 connections that are open at once. In the end every tool's lines are compared with what the load
itself has counted. Prints a row per check; exit status 1 if one fails. A state change that the kernel has not shown to
any program (live.agent()) may be missing, no other; and tcplife has to report it.
"""
import argparse
import collections
import contextlib
import signal
import sys
import time

import live
import load_many
import test_tcpaccept
import test_tcplife
import test_tcpv4connect
import workload

ADDRESS = "127.0.0.7"           # one of the 64 of connload.c: every state change would be more than a disk holds
MAPS = {"tcplife": "sessions", "deeptcptracer": "owners"}


class Check:
    """Prints a row for each thing that is compared, and remembers whether one was wrong.

    unseen: how many state changes the kernel has not shown, so how much may be missing.
    """

    def __init__(self):
        self.failed, self.unseen = False, 0

    def row(self, what, got, fine):
        self.failed |= not fine
        print("%-4s %-60s %s" % ("ok" if fine else "FAIL", what, got), flush=True)

    def equal(self, what, got, expected):
        self.row(what, got if got == expected else "%d of %d" % (got, expected), 0 <= expected - got <= self.unseen)


def mixed_load(seconds):
    """What runs beside churn; the log of workload.py and how many sessions the crowds had."""
    end, log, visits = time.monotonic() + seconds, [], 0
    while time.monotonic() < end:
        for _ in range(5):
            log += workload.sessions(workload.work())
        with load_many.Crowd(1, 2000):
            time.sleep(0.5)
        visits += 2 * 2000
    return log, visits


def held(tracers):
    """Entries of the maps, by tool."""
    return {tool: live.entries(tracers[tool], name) for tool, name in MAPS.items()}


def load_of(line):
    """Which part of the load a line is of. By the name: a PID is used again within half an hour."""
    comm = line["comm"] or ""
    if comm.startswith("many-"):
        return "crowds"
    return "churn" if comm == "churn" else "known"


def compare(check, tracers, made, log, visits, left):
    """Every line of every tool with what the load has counted. made: churn's connections, left: in tcplife's map."""
    lines, ours = {}, {}
    for module in (test_tcplife, test_tcpaccept, test_tcpv4connect):
        tool = module.__name__[len("test_"):]
        objects = tracers[tool].objects
        lines[tool] = collections.Counter(map(load_of, objects))
        ours[tool] = live.ours(log, [line for line in objects if load_of(line) == "known"], module.connection)
    check.equal("tcplife: sessions of churn", lines["tcplife"]["churn"], 2 * made)
    check.equal("tcpaccept: accepts of churn", lines["tcpaccept"]["churn"], made)
    check.equal("tcpv4connect: connects of churn", lines["tcpv4connect"]["churn"], made)
    check.equal("tcplife: sessions of the crowds", lines["tcplife"]["crowds"], visits)
    missing, wrong = test_tcplife.difference(log, ours["tcplife"])
    check.row("tcplife: of %d known sessions missing, wrong" % len(log), "%d, %d" % (len(missing), len(wrong)),
              len(missing) <= check.unseen and not wrong)
    silent = (2 * made - lines["tcplife"]["churn"] + visits - lines["tcplife"]["crowds"] + len(missing)
              - live.reported_losses(tracers["tcplife"]) - left)
    check.row("tcplife: missing, but neither reported nor still in the map", max(0, silent), silent <= 0)
    for text in [*missing[:10], *wrong[:10]]:
        print("     %s" % text)
    for tool, known, key in (
            ("tcpaccept", test_tcpaccept.accepted(log), test_tcpaccept.key),
            ("tcpv4connect", [record for record in log if record["role"] == "client" and record["ip"] == 4],
             test_tcpv4connect.key)):
        missing, foreign = live.compare(known, ours[tool], key)
        check.row("%s: of %d known missing, wrong" % (tool, len(known)), "%d, %d" % (len(missing), len(foreign)),
                  not missing and not foreign)
    total = tracers["tcpchurn"].objects[-1]["all"]
    for name, count in {"opened": 2 * made, "accepted": made, "connected": made, "closed": 2 * made}.items():
        check.equal("tcpchurn: %s by churn" % name, total[name], count)
    known = sum(line["raddr"] == ADDRESS for line in tracers["tcplife"].objects)
    changes = collections.Counter((line["oldstate"], line["state"]) for line in tracers["deeptcptracer"].objects)
    for old, new in (("CLOSE", "SYN_SENT"), ("SYN_SENT", "ESTABLISHED")):
        check.equal("deeptcptracer: %s -> %s to %s" % (old, new, ADDRESS), changes[old, new], known)


def main():
    parser = argparse.ArgumentParser(description="All five tools at once under a mixed load for a long time.")
    parser.add_argument("-r", "--rate", type=int, default=300, help="connections a second of connload.c")
    parser.add_argument("seconds", type=float)
    args = parser.parse_args()
    test_tcplife.MS = 200               # the processes that log wait for a CPU
    check, program = Check(), live.Load()
    load = program.hold(10 ** 9, 2, args.rate)
    tracers = {tool: live.Tracer(tool, "--json", *options, check=False) for tool, options in {
        "tcplife": [], "tcpaccept": [], "tcpv4connect": [], "tcpchurn": [load.pid, "-i", "1"],
        "deeptcptracer": ["-e", "tcp_set_state", "-d", ADDRESS]}.items()}
    for tracer in tracers.values():
        tracer.start()
    with contextlib.ExitStack() as stack:
        stack.callback(load.kill)
        for tracer in tracers.values():
            stack.enter_context(tracer)
        unseen = stack.enter_context(live.UnseenStateChanges())
        load.stdin.write("\n")
        load.stdin.flush()
        log, visits = mixed_load(max(10, min(60, args.seconds / 10)))
        before = {tool: load_many.rss(tracer) for tool, tracer in tracers.items()}
        more, more_visits = mixed_load(args.seconds * 0.9)
        after = {tool: load_many.rss(tracer) for tool, tracer in tracers.items()}
        load.send_signal(signal.SIGINT)
        made = int(load.communicate()[0].split()[3])
        time.sleep(2.5)                 # an update of tcpchurn
        left = held(tracers)
    print("%d connections of churn, %d known sessions, %d sessions of crowds" % (
        made, len(log) + len(more), visits + more_visits))
    check.unseen = unseen.count
    print("%d state changes that the kernel has not shown" % unseen.count)
    compare(check, tracers, made, log + more, visits + more_visits, left["tcplife"])
    for tool, tracer in tracers.items():
        check.row("%s: lost" % tool, live.reported_losses(tracer), live.reported_losses(tracer) <= unseen.count)
        for line in tracer.stderr.splitlines():
            if " in all " in line:
                print("     " + line)
        check.row("%s: resident MB at a tenth, at the end" % tool, "%d, %d" % (before[tool] >> 10, after[tool] >> 10),
                  after[tool] <= 1.05 * before[tool] + 2048)
    for tool, entries in left.items():
        check.row("%s: entries left in the map of sockets" % tool, entries, entries < 20 + unseen.count)
    return check.failed


if __name__ == "__main__":
    sys.exit(main())
