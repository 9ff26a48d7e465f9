#!/usr/bin/python3
"""bcc's own tools and these ones on the same sessions of known processes: what each missed, whose owners are wrong.

usage: peers.py

Runs what is there of tcplife-bpfcc, tcpaccept-bpfcc and tcpconnect-bpfcc (package bpfcc-tools), with the installed
kernel headers, or with the types of btfheaders.py where there are none, and tcplife of the package libbpf-tools.
"""
import collections
import contextlib
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import tempfile
import time

import btfheaders
import live
import test_tcpaccept
import workload

# Our tool, its peers, and where in a line they print what identifies a connection, by the names in our JSON.
PAIRS = [
    ("tcplife", ("tcplife-bpfcc", "libbpf tcplife"), {"lport": 3, "raddr": 4, "rport": 5}),
    ("tcpaccept", ("tcpaccept-bpfcc",), {"raddr": 3, "rport": 4, "lport": 6}),
    ("tcpv4connect", ("tcpconnect-bpfcc",), {"daddr": 4, "dport": 5}),
]
ROW = "%-24s %-18s %8s %8s %12s"


class Peer:
    """A tool of bpfcc-tools that has printed its heading. Afterwards: lines, or None if it does not run here."""

    def __init__(self, path):
        self.out = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(["stdbuf", "-oL", path], stdout=self.out, stderr=subprocess.DEVNULL,
                                        env=dict(os.environ, PYTHONUNBUFFERED="1"))

    def __enter__(self):
        give_up = time.monotonic() + live.START
        while (not os.fstat(self.out.fileno()).st_size and self.process.poll() is None and
               time.monotonic() < give_up):
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(live.START)
        self.out.seek(0)
        self.lines = self.out.read().splitlines() or None


def find(peer):
    """Returns the path of a peer, or None. That of libbpf-tools is no script, as ours is, which has the same path."""
    path = shutil.which(peer.replace("libbpf ", "/usr/sbin/"))
    if path and peer.startswith("libbpf ") and not pathlib.Path(path).read_bytes().startswith(b"\x7fELF"):
        return None
    return path


def parse(lines, places):
    """(pid, what identifies the connection) of these lines of a peer."""
    rows = [line.split() for line in lines]
    return [(row[0], *[row[place].replace("::ffff:", "") for place in places.values()])
            for row in rows if row and row[0].isdecimal()]


def score(known, printed):
    """How many of the known are missed, and how many are there with another owner."""
    known, printed = collections.Counter(known), collections.Counter(printed)
    right = known & printed
    known, printed = (collections.Counter(key[1:] for key in (some - right).elements()) for some in (known, printed))
    wrong = sum((known & printed).values())
    return sum(known.values()) - wrong, wrong


def expected(log, tool, names):
    """What of the workload's log a tool has to show, as strings in the form of parse()."""
    if tool == "tcpaccept":
        log = test_tcpaccept.accepted(log)
    if tool == "tcpv4connect":
        log = [dict(record, daddr=record["raddr"], dport=record["rport"])
               for record in log if record["role"] == "client"]
    return [(str(record["pid"]), *[str(record[name]) for name in names]) for record in log]


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job ignores it, and so would the peers
    release = platform.release()
    ours = {tool: live.Tracer(tool, "--json", check=False) for tool, _, _ in PAIRS}
    with contextlib.ExitStack() as stack:
        for one in ours.values():
            one.start()
            stack.callback(one.process.kill)        # if another one fails to start
        if not os.path.exists("/lib/modules/%s/build" % release):
            stack.enter_context(btfheaders.kernel_source(btfheaders.COMMON_TYPES))
        peers = {peer: Peer(find(peer)) for _, some, _ in PAIRS for peer in some if find(peer)}
        for one in [*peers.values(), *ours.values()]:
            stack.enter_context(one)
        time.sleep(live.SLOW / 2)       # from the peers' heading to their tracing
        log = workload.work()
        time.sleep(live.SLOW / 2)
    print(ROW % ("kernel", "tool", "of", "missed", "wrong owner"))
    for tool, some, places in PAIRS:
        known = expected(log, tool, places)
        for peer in filter(peers.get, some):
            lines = peers[peer].lines
            print(ROW % (release, peer, len(known), *(score(known, parse(lines, places)) if lines else ("no run", ""))))
        if tool == "tcpv4connect":
            known = expected([record for record in log if record["ip"] == 4], tool, places)
        printed = [(str(line["pid"]), *[str(line[name]) for name in places]) for line in ours[tool].objects]
        print(ROW % (release, tool, len(known), *score(known, printed)))


if __name__ == "__main__":
    main()
