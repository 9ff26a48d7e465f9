#!/usr/bin/python3
"""What tracing costs: each tool beside the same load untraced, and beside its peers where they are installed.

usage: bench.py [-n PAIRS] [-c CONNECTIONS] [--tools DIR] [--beside DIR] [TOOL ...]

For each tool, PAIRS times: the load (connload.c, two client threads, as fast as the machine allows) untraced, traced,
and untraced again. The tool of another checkout (--beside) and the peers take turns with it. One more run with BPF
statistics on gives the time in the kernel; they slow every run, so it is not timed. One more at 1,000 connections per
second gives the CPU that the tool takes then.

    kept   load while traced / mean of the load before and after, median of the pairs, and their range
    peer   kept of our tool / kept of this one
    ns     BPF run time of all the tool's programs a connection
    each   BPF run time of the program that runs most often, each time, in ns
    us     CPU time of the tool a line, without its start, in microseconds
    1000   CPU time of the tool at 1,000 connections a second, in percent of one CPU
    RSS    resident MB at the end
    start  seconds from start to the first line, median; 2.00: it keeps its first line back
    lost   of what there was to print; -: not known how much that is
"""
import argparse
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

import live

BIN = pathlib.Path(tempfile.gettempdir()) / "tcp-tracers-churn"
TREE = pathlib.Path(tempfile.gettempdir()) / "tcp-tracers-tree"
# name: (command, lines a connection or None, peers that do the same)
TOOLS = {
    "tcplife": (["tcplife"], 2, {"libbpf-tools": ["/usr/sbin/tcplife"], "bpfcc-tools": ["/usr/sbin/tcplife-bpfcc"]}),
    "tcplife --json": (["tcplife", "--json"], 2, {}),
    "tcplife -c": (["tcplife", "-c"], None, {}),
    "tcplife --owner close": (["tcplife", "--owner", "close"], 2, {}),
    "tcpaccept": (["tcpaccept"], 1, {"bpfcc-tools": ["/usr/sbin/tcpaccept-bpfcc"]}),
    "tcpv4connect": (["tcpv4connect"], 1, {"bpfcc-tools": ["/usr/sbin/tcpconnect-bpfcc", "-4"]}),
    "tcpv4connect -r": (["tcpv4connect", "-r"], 1, {}),
    "tcpchurn": (["tcpchurn", str(os.getpid())], None, {}),
    "deeptcptracer": (["deeptcptracer"], None, {}),
    "deeptcptracer --json": (["deeptcptracer", "--json"], None, {}),
    "deeptcptracer -e tcp_set_state": (["deeptcptracer", "-e", "tcp_set_state"], None, {
        "libbpf-tools tcpstates": ["/usr/sbin/tcpstates"], "bpfcc-tools tcpstates": ["/usr/sbin/tcpstates-bpfcc"]}),
}
HEADING = "%-32s %5s %10s %5s %6s %5s %5s %5s %4s %5s %6s" % (
    "", "kept", "range", "peer", "ns", "each", "us", "1000", "RSS", "start", "lost")


def load(connections, rate=0):
    """Connections a second."""
    return float(subprocess.check_output([BIN, str(connections), "2", str(rate)]).split()[-1])


class Traced:
    """A tool that is tracing."""

    def __init__(self, command):
        self.out = tempfile.TemporaryFile()
        began = time.monotonic()
        env = dict(os.environ, BCC_KERNEL_SOURCE=str(TREE)) if "bpfcc" in command[0] else None
        self.process = subprocess.Popen(command, stdout=self.out, stderr=subprocess.DEVNULL, env=env)
        while not self.out.tell() and self.process.poll() is None and time.monotonic() < began + 2:
            time.sleep(0.002)
            self.out.seek(0, os.SEEK_END)
        self.start = time.monotonic() - began
        time.sleep(0.3)

    def cpu(self):
        """CPU nanoseconds so far."""
        return int(pathlib.Path("/proc/%d/schedstat" % self.process.pid).read_text().split()[0])

    def programs(self):
        """[(nanoseconds, times)] that the BPF programs of the tool have run."""
        found = {}
        for path in pathlib.Path("/proc/%d/fdinfo" % self.process.pid).iterdir():
            info = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if "prog_id" in info and "run_time_ns" in info:
                found[info["prog_id"]] = int(info["run_time_ns"]), int(info["run_cnt"])
        return list(found.values())

    def rss(self):
        """Resident MB."""
        status = pathlib.Path("/proc/%d/status" % self.process.pid).read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def end(self):
        """How many lines it has printed."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:       # a peer may not heed a signal that comes while it starts
            self.process.kill()
            self.process.wait()
        self.out.seek(0)
        return sum(1 for _ in self.out) - 1


def pair(command, connections):
    """(kept, CPU us a line, MB, seconds to start, lines) of one run between two untraced ones."""
    before = load(connections)
    traced = Traced(command)
    cpu = traced.cpu()
    rate = load(connections)
    time.sleep(0.3)
    cpu, rss, lines = traced.cpu() - cpu, traced.rss(), traced.end()
    return 2 * rate / (before + load(connections)), cpu / 1000 / max(1, lines), rss, traced.start, lines


def in_kernel(command, connections):
    """BPF nanoseconds a connection, and each time of the busiest program."""
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=1"], check=True)
    traced = Traced(command)
    load(connections)
    programs = traced.programs()
    traced.end()
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=0"], check=True)
    each = max((count, time / max(1, count)) for time, count in programs)[1] if programs else 0
    return sum(time for time, _ in programs) / (2 * connections), each


def at_a_thousand(command):
    """Percent of a CPU at 1,000 connections a second."""
    traced = Traced(command)
    cpu, began = traced.cpu(), time.monotonic()
    load(1500, 1000)
    percent = (traced.cpu() - cpu) / (time.monotonic() - began) / 1e7
    traced.end()
    return percent


def runs(command):
    traced = Traced(command)
    alive = traced.process.poll() is None
    traced.end()
    return alive


def measure(commands, lines, pairs, connections):
    """Print a row for each of these, which are measured in turn. commands: {name: command}, our tool first."""
    samples = {name: [] for name, command in commands.items() if runs(command)}
    for _ in range(pairs):
        for name in samples:
            samples[name].append(pair(commands[name], connections))
    ours = None
    for name, command in commands.items():
        if name not in samples:
            print("%-32s does not run here" % name, flush=True)
            continue
        kept, cpu, rss, start, printed = zip(*samples[name])
        median = statistics.median(kept)
        ours = ours or median
        lost = "%.1f%%" % (100 - 100 * sum(printed) / (pairs * 2 * connections * lines)) if lines else "-"
        print("%-32s %5.2f %5.2f-%4.2f %5.2f %6.0f %5.0f %5.1f %5.1f %4.0f %5.2f %6s" % (
            name, median, min(kept), max(kept), ours / median, *in_kernel(command, connections),
            statistics.median(cpu), at_a_thousand(command), max(rss), statistics.median(start), lost), flush=True)


def syscall():
    """Nanoseconds of one getppid() from Python, the best of many tries."""
    def once():
        began = time.perf_counter_ns()
        for _ in range(20000):
            os.getppid()
        return (time.perf_counter_ns() - began) / 20000
    return min(once() for _ in range(50))


def main():
    parser = argparse.ArgumentParser(description="What tracing costs.")
    parser.add_argument("-n", "--pairs", type=int, default=5)
    parser.add_argument("-c", "--connections", type=int, default=20000, help="of each of the two client threads")
    parser.add_argument("-t", "--tools", dest="folder", metavar="DIR", default=str(live.ROOT),
                        help="where the tools stand (default: this repository)")
    parser.add_argument("-b", "--beside", metavar="DIR", help="measure these tools in turn with them")
    parser.add_argument("tools", nargs="*", default=list(TOOLS), metavar="TOOL")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job ignores it, and so would the tools
    source = live.ROOT / "tests/lib/connload.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", BIN, source], check=True)
    shutil.rmtree(TREE, ignore_errors=True)
    subprocess.run([live.ROOT / "btfheaders.py", TREE], check=True)
    print(HEADING)
    load(args.connections)
    for name in args.tools:
        (tool, *options), lines, peers = TOOLS[name]
        folders = {name: args.folder, "  beside": args.beside}
        commands = {row: [live.PYTHON, os.path.join(folder, tool + ".py"), *options]
                    for row, folder in folders.items() if folder}
        commands.update(("  " + peer, command) for peer, command in peers.items() if os.path.exists(command[0]))
        measure(commands, lines, args.pairs, args.connections)
    untraced = syscall()
    traced = Traced([live.PYTHON, os.path.join(args.folder, "tcpaccept.py")])
    print("a system call costs %.0f ns more while tcpaccept traces" % (syscall() - untraced))
    traced.end()


if __name__ == "__main__":
    main()
