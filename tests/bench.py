#!/usr/bin/python3
"""What tracing costs: each tool beside the same load untraced, and beside its peers where they are installed.

usage: bench.py [-n PAIRS] [-c CONNECTIONS] [TOOL ...]

For each tool, PAIRS times: the load (churn.c, two client threads, as fast as it goes) untraced, traced, and untraced
again. One more run with BPF statistics on gives the time in the kernel; they slow every run, so it is not timed.

    kept   load while traced / mean of the load before and after, median of the pairs
    ns     BPF run time of all the tool's programs a connection
    each   BPF run time of the program that runs most often, each time, in ns
    CPU    user and system seconds of the tool from its start to its end
    RSS    resident MB at the end
    start  seconds from start to the first line, median; 2.00: it keeps its first line back
    lines  printed; sessions have two ends, accepts and connects one
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
# name: (command, peers that do the same)
TOOLS = {
    "tcplife": (["tcplife"], {"libbpf-tools": ["/usr/sbin/tcplife"], "bpfcc-tools": ["/usr/sbin/tcplife-bpfcc"]}),
    "tcplife --owner close": (["tcplife", "--owner", "close"], {}),
    "tcpaccept": (["tcpaccept"], {"bpfcc-tools": ["/usr/sbin/tcpaccept-bpfcc"]}),
    "tcpv4connect": (["tcpv4connect"], {"bpfcc-tools": ["/usr/sbin/tcpconnect-bpfcc", "-4"]}),
    "tcpchurn": (["tcpchurn", str(os.getpid())], {}),
    "deeptcptracer": (["deeptcptracer"], {}),
    "deeptcptracer -e tcp_set_state": (["deeptcptracer", "-e", "tcp_set_state"], {
        "libbpf-tools tcpstates": ["/usr/sbin/tcpstates"], "bpfcc-tools tcpstates": ["/usr/sbin/tcpstates-bpfcc"]}),
}


def load(connections):
    """Connections a second."""
    return float(subprocess.check_output([BIN, str(connections), "2"]).split()[-1])


class Traced:
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

    def programs(self):
        """{ID: (nanoseconds, times)} that the BPF programs of the tool have run."""
        found = {}
        for path in pathlib.Path("/proc/%d/fdinfo" % self.process.pid).iterdir():
            info = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if "prog_id" in info and "run_time_ns" in info:
                found[info["prog_id"]] = int(info["run_time_ns"]), int(info["run_cnt"])
        return found

    def end(self):
        """CPU seconds, RSS in MB, lines."""
        time.sleep(0.3)
        if self.process.poll() is not None:
            return None
        status = pathlib.Path("/proc/%d/status" % self.process.pid).read_text()
        rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
        self.process.send_signal(signal.SIGINT)
        usage = os.wait4(self.process.pid, 0)[2]
        self.out.seek(0)
        return usage.ru_utime + usage.ru_stime, rss, sum(1 for _ in self.out) - 1


def measure(command, pairs, connections):
    kept, cpu, start = [], [], []
    for _ in range(pairs):
        before = load(connections)
        traced = Traced(command)
        rate = load(connections)
        figures = traced.end()
        if figures is None:
            return "does not run here"
        seconds, rss, lines = figures
        kept.append(2 * rate / (before + load(connections)))
        cpu.append(seconds)
        start.append(traced.start)
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=1"], check=True)
    traced = Traced(command)
    load(connections)
    programs = traced.programs().values()
    nanoseconds = sum(time for time, _ in programs)
    each = max((count, time / max(1, count)) for time, count in programs)[1] if programs else 0
    traced.end()
    subprocess.run(["sysctl", "-q", "kernel.bpf_stats_enabled=0"], check=True)
    return ("%5.2f %5.2f-%4.2f %6.0f %5.0f %6.2f %5.0f %6.2f %7d" % (
        statistics.median(kept), min(kept), max(kept), nanoseconds / (2 * connections), each,
        statistics.median(cpu), rss, statistics.median(start), lines))


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
    parser.add_argument("tools", nargs="*", default=list(TOOLS), metavar="TOOL")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job ignores it, and so would the tools
    source = pathlib.Path(__file__).resolve().parent / "churn.c"
    subprocess.run(["cc", "-O2", "-pthread", "-o", BIN, source], check=True)
    shutil.rmtree(TREE, ignore_errors=True)
    subprocess.run([live.ROOT / "btfheaders.py", TREE], check=True)
    print("%-34s %5s %10s %6s %5s %6s %5s %6s %7s" % (
        "", "kept", "range", "ns", "each", "CPU", "RSS", "start", "lines"))
    load(args.connections)
    for name in args.tools:
        command, peers = TOOLS[name]
        ours = [live.PYTHON, str(live.ROOT / (command[0] + ".py")), *command[1:]]
        print("%-34s %s" % (name, measure(ours, args.pairs, args.connections)), flush=True)
        for peer, command in peers.items():
            if os.path.exists(command[0]):
                print("%-34s %s" % ("  " + peer, measure(command, args.pairs, args.connections)), flush=True)
    untraced = syscall()
    traced = Traced([live.PYTHON, str(live.ROOT / "tcpaccept.py")])
    print("a system call costs %.0f ns more while tcpaccept traces" % (syscall() - untraced))
    traced.end()


if __name__ == "__main__":
    main()
