#!/usr/bin/python3
"""What tracing costs: each tool, and its peers where they are installed, at full load, at 1,000 connections per second
and with nothing to do.

usage: bench.py [-n ROUNDS] [-c CONNECTIONS] [--tools DIR] [--beside DIR] [TOOL ...]

The load is connload.c with two client threads, as fast as the machine allows, ROUNDS times for each tool; the tool of
another checkout (--beside) and the peers take turns with it. CPU time is that of the tool's process, by its own clock,
and that of tracing in all other processes, by samples (perf): those in which a tracepoint or a BPF program is among the
callers. So the load of others does not count; their tracing does (row none). What tracing slows down by using the
caches does not.

    CPU    CPU time per connection in microseconds, both ends together: median of the rounds
    +-     half the distance from the smallest to the largest round
    tool   the part of it that the tool's process used
    ns     BPF run time per connection in nanoseconds (kernel.bpf_stats_enabled), from a run of its own
    1000   CPU time at 1,000 connections per second, in percent of one CPU
    idle   CPU time of the tool's process over 20 s without events, in percent of one CPU; the peers at the same time
    priv   memory in MB that belongs to the process alone; RSS: resident; both after the load; peak: the most resident
    start  seconds from start to the first line, median; 2.00: it keeps its first line back
    lost   of what there was to print; -: not known how much that is
"""
import argparse
import atexit
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

import live

BIN = pathlib.Path(tempfile.gettempdir()) / "tcp-tracers-churn"
TREE = pathlib.Path(tempfile.gettempdir()) / "tcp-tracers-tree"
SAMPLES = pathlib.Path(tempfile.gettempdir()) / "tcp-tracers-samples"
HERTZ = 4999            # not a divisor of what happens regularly
IDLE = 20               # seconds
# What the kernel calls only to trace, with all that it calls in turn.
TRACING = ("^(__traceiter_|__bpf_trace_|bpf_prog_[0-9a-f]{16}_|bpf_trace_run|bpf_ringbuf_notify|trace_call_bpf|"
           "perf_(syscall|trace|pending)_|syscall_(trace_enter|exit_work))")
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
HEADING = "%-32s %5s %5s %5s %6s %5s %5s %5s %5s %5s %5s %6s" % (
    "", "CPU", "+-", "tool", "ns", "1000", "idle", "priv", "RSS", "peak", "start", "lost")
REMARKS = """
+- is half the distance from the smallest to the largest of %d rounds.
bcc's tools were compiled with the types that btfheaders.py writes."""
NO_KPROBES = """
This kernel has no kprobes: what the kprobe on accept() costs where there is one, as usual, was not measured."""


def load(connections, rate=0):
    """Returns the command for this many connections of each client thread, RATE per second in all (0: full speed)."""
    return [BIN, str(connections), "2", str(rate)]


class Traced:
    """A tool that is tracing."""

    def __init__(self, command):
        self.out = tempfile.TemporaryFile()
        began = time.monotonic()
        env = dict(os.environ, BCC_KERNEL_SOURCE=str(TREE)) if "bpfcc" in command[0] else None
        self.process = subprocess.Popen(command, stdout=self.out, stderr=subprocess.DEVNULL, env=env)
        atexit.register(self.process.kill)
        while not self.size() and self.process.poll() is None and time.monotonic() < began + 2:
            time.sleep(0.002)
        self.start = time.monotonic() - began
        time.sleep(0.3)

    def cpu(self):
        """Returns the CPU seconds of all its threads so far."""
        return time.clock_gettime(~self.process.pid << 3 | 2)       # see clock_getcpuclockid(3)

    def under(self, connections, rate=0):
        """Returns CPU seconds under a load: (of the tool, of tracing in other processes)."""
        cpu = self.cpu()
        subprocess.run(["perf", "record", "-q", "-a", "-g", "-e", "cpu-clock", "-F", str(HERTZ), "-m", "8M",
                        "-o", SAMPLES, *load(connections, rate)], stdout=subprocess.DEVNULL, check=True)
        time.sleep(0.3)
        cpu = self.cpu() - cpu
        report = subprocess.check_output(["perf", "report", "-i", SAMPLES, "--stdio", "--no-children", "-g", "none",
                                          "-F", "sample,pid,parent", "-p", TRACING, "-t", "|"], errors="replace")
        own = os.listdir("/proc/%d/task" % self.process.pid)
        tracing = re.findall(r"^ *(\d+) *\| *(\d+):.*\|(?!\[other])", report, re.MULTILINE)
        return cpu, sum(int(samples) for samples, thread in tracing if thread not in own) / HERTZ

    def bpf(self):
        """Returns the nanoseconds that its BPF programs have run."""
        found = {}
        for path in pathlib.Path("/proc/%d/fdinfo" % self.process.pid).iterdir():
            info = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if "run_time_ns" in info:           # a link has a prog_id, too
                found[info["prog_id"]] = int(info["run_time_ns"])
        return sum(found.values())

    def size(self):
        """Returns how many bytes it has printed."""
        return os.fstat(self.out.fileno()).st_size

    def memory(self):
        """Returns MB: (private, resident, the most that was resident)."""
        folder = pathlib.Path("/proc/%d" % self.process.pid)
        text = (folder / "smaps_rollup").read_text() + (folder / "status").read_text()
        kb = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        return (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024, kb["VmRSS"] / 1024, kb["VmHWM"] / 1024

    def end(self):
        """Returns how many lines it has printed."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:       # a peer may not heed a signal that comes while it starts
            self.process.kill()
            self.process.wait()
        self.out.seek(0)
        return sum(1 for _ in self.out) - 1


def round_of(command, connections):
    """Returns ((us of the tool, us of tracing) per connection, memory(), seconds to start, lines) of one run."""
    traced = Traced(command)
    used = [seconds * 1e6 / (2 * connections) for seconds in traced.under(connections)]
    return used, traced.memory(), traced.start, traced.end()


def in_kernel(command, connections):
    """Returns BPF nanoseconds per connection."""
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=1"], check=True)
    traced = Traced(command)
    subprocess.run(load(connections), stdout=subprocess.DEVNULL, check=True)
    spent = traced.bpf()
    traced.end()
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=0"], check=True)
    return spent / (2 * connections)


def at_a_thousand(command, seconds=10):
    """Returns the percent of a CPU at 1,000 connections per second."""
    traced = Traced(command)
    used = sum(traced.under(500 * seconds, 1000))
    traced.end()
    return 100 * used / seconds


def idle(commands, prints_always):
    """Returns the percent of a CPU that each of these takes at the same time while none has an event to print."""
    tools = [Traced(command) for command in commands]
    for _ in range(3):              # others may use the network
        before = [(tool.size(), tool.cpu()) for tool in tools]
        time.sleep(IDLE)
        percents = [100 * (tool.cpu() - cpu) / IDLE for tool, (_, cpu) in zip(tools, before)]
        if prints_always or [tool.size() for tool in tools] == [size for size, _ in before]:
            break
    else:
        percents = [float("nan")] * len(tools)
    for tool in tools:
        tool.end()
    return percents


def runs(command):
    """Returns whether it still runs after some seconds."""
    traced = Traced(command)
    time.sleep(3)
    alive = traced.process.poll() is None
    traced.end()
    return alive


def measure(commands, lines, rounds, connections):
    """Print a row for each of these, which are measured in turn. commands: {name: command}, our tool first."""
    samples = {name: [] for name, command in commands.items() if runs(command)}
    for _ in range(rounds):
        for name in samples:
            samples[name].append(round_of(commands[name], connections))
    idles = dict(zip(samples, idle([commands[name] for name in samples], "tcpchurn" in samples)))
    for name, command in commands.items():
        if name not in samples:
            print("%-32s does not run here" % name, flush=True)
            continue
        used, memory, start, printed = zip(*samples[name])
        sums = [sum(parts) for parts in used]
        lost = "%.1f%%" % (100 - 100 * sum(printed) / (rounds * 2 * connections * lines)) if lines else "-"
        print("%-32s %5.1f %5.1f %5.1f %6.0f %5.1f %5.2f %5.0f %5.0f %5.0f %5.2f %6s" % (
            name, statistics.median(sums), (max(sums) - min(sums)) / 2, statistics.median(tool for tool, _ in used),
            in_kernel(command, connections), at_a_thousand(command), idles[name], *map(max, zip(*memory)),
            statistics.median(start), lost), flush=True)


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
    parser.add_argument("-n", "--rounds", type=int, default=5)
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
    print("%-32s %5.1f   of others that trace here" % ("none", sum(round_of(["sleep", "inf"], args.connections)[0])))
    for name in args.tools:
        (tool, *options), lines, peers = TOOLS[name]
        folders = {name: args.folder, "  beside": args.beside}
        commands = {row: [live.PYTHON, os.path.join(folder, tool + ".py"), *options]
                    for row, folder in folders.items() if folder}
        commands.update(("  " + peer, command) for peer, command in peers.items() if os.path.exists(command[0]))
        measure(commands, lines, args.rounds, args.connections)
    untraced = syscall()
    traced = Traced([live.PYTHON, os.path.join(args.folder, "tcpaccept.py")])
    print("a system call costs %.0f ns more while tcpaccept traces" % (syscall() - untraced))
    traced.end()
    print(REMARKS % args.rounds + ("" if os.path.exists("/sys/bus/event_source/devices/kprobe") else NO_KPROBES))


if __name__ == "__main__":
    main()
