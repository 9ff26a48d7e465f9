"""What the live tests share: starting a tool on the real kernel and stopping it."""
import collections
import contextlib
import ctypes
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PYTHON = os.environ.get("PYTHON", "/usr/bin/python3")
TOOLS = os.environ.get("TOOLS", str(ROOT))                      # the directory of the tools
OPTIONS = os.environ.get("TOOL_OPTIONS", "").split()            # options for every tool
SLOW = float(os.environ.get("SLOW", "1"))                       # how much slower this machine is than a real one
BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]      # number of the system call
# Numbers of the system calls that time.sleep() makes: clock_nanosleep(), or select() or pselect6() of no descriptor.
SLEEPS = {"x86_64": ("230", "23 0x0", "270 0x0"), "aarch64": ("115", "72 0x0")}[os.uname().machine]
MAY_TRACE = os.geteuid() == 0 and os.path.exists("/sys/kernel/btf/vmlinux")
WHY_NOT = "needs root and a kernel with BTF"
START = 30 * SLOW       # seconds a tool may take until it traces


# Runs a tool with other values for some of its constants.
PRETEND = """
import signal
import sys
sys.path.insert(0, {tools!r})
import {tool}
for constant in {pretend!r}.items():
    setattr({tool}, *constant)
{before}
signal.pthread_sigmask(signal.SIG_BLOCK, {tool}.STOP_SIGNALS)
{tool}.main()
"""


class Tracer:
    """A tool that is tracing from the moment the context is entered. Afterwards: lines, stderr and status.

    pretend: constants of the tool, with the values they are to have. before: code that runs before the tool's main().
    """

    def __init__(self, tool, *args, check=True, pretend=None, before=""):
        path = [os.path.join(TOOLS, tool + ".py")]
        if pretend or before:
            path = ["-c", PRETEND.format(tool=tool, tools=TOOLS, pretend=pretend or {}, before=before)]
        self.command = [PYTHON, *path, *map(str, args), *OPTIONS]
        self.check = check
        self.process = None

    def start(self):
        """Start without waiting: see tracing()."""
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=self.out, stderr=self.err)

    def __enter__(self):
        if not self.process:
            self.start()
        give_up = time.monotonic() + START
        while not self.is_tracing():
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise AssertionError("%s does not trace: %s" % (self.command, self.stderr))
            time.sleep(0.02)
        return self

    def is_tracing(self):
        """Returns whether the tool is in its main loop, the only place where it sleeps."""
        try:
            with open("/proc/%d/syscall" % self.process.pid) as syscall:
                return syscall.read().startswith(SLEEPS)
        except OSError:
            return False

    def stop(self, number=signal.SIGINT):
        self.process.send_signal(number)
        self.status = self.process.wait(START)
        for name, file in (("stdout", self.out), ("stderr", self.err)):
            file.seek(0)
            setattr(self, name, file.read())
            file.close()

    def __exit__(self, kind, *_):
        time.sleep(0.05)        # what the kernel does after the last close() of the workload
        self.stop()
        if self.check and kind is None:
            assert self.status == 0, (self.command, self.status, self.stderr)
            # The end of somebody else's session may be one that the kernel did not show: see UnseenStateChanges.
            assert not [line for line in self.stderr.splitlines() if "their end was not seen" not in line], self.stderr

    @property
    def lines(self):
        return self.stdout.splitlines()

    @property
    def objects(self):
        return [strict_json(line) for line in self.lines]


@contextlib.contextmanager
def tracing(*tracers):
    """All of these trace while the context lasts. They start in parallel and end in parallel."""
    with contextlib.ExitStack() as stack:
        for tracer in tracers:
            tracer.start()
            stack.callback(tracer.process.kill)         # if another one fails
        for tracer in tracers:
            stack.enter_context(tracer)
        yield
        time.sleep(0.05)
        for tracer in tracers:
            tracer.process.send_signal(signal.SIGINT)


def strict_json(line):
    """Returns the object on this line, which any reader must accept: RFC 8259, I-JSON (RFC 7493), and no spaces."""
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), "a name comes twice in %s" % line
        return dict(pairs)

    def refuse(constant):
        raise AssertionError("%s in %s" % (constant, line))
    value = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()      # raises UnicodeEncodeError for a lone surrogate
    assert " " not in re.sub(r'"(\\.|[^"\\])*"', "", line), line
    return value


def comm(line):
    """Returns the bytes of a process's name, from a JSON object."""
    return bytes.fromhex(line["comm_hex"]) if "comm_hex" in line else line["comm"].encode()


def every(_record):
    return True


def ours(log, lines, connection):
    """Returns the lines of a workload: of its connections, whatever owner they name, and of its processes.

    connection: a function that returns the key of a connection, for a record of the log as for a line.
    """
    connections, processes = set(map(connection, log)), {(record["pid"], record["comm"]) for record in log}
    return [line for line in lines if connection(line) in connections or (line["pid"], line["comm"]) in processes]


def reported_losses(tracer):
    """Returns how much a tool that has exited reports as lost in all."""
    return sum(int(line.split(" in all ")[1].split()[0]) for line in tracer.stderr.splitlines() if " in all " in line)


def compare(known, printed, key):
    """Returns the keys of known records that are not printed, and of printed ones that are not known; with doubles."""
    known, printed = collections.Counter(map(key, known)), collections.Counter(map(key, printed))
    return sorted((known - printed).elements()), sorted((printed - known).elements())


def entries(tracer, name):
    """Returns how many entries the tool's BPF map of this name has."""
    maps = json.loads(subprocess.check_output(["bpftool", "-j", "map", "show", "name", name]))
    maps = [maps] if isinstance(maps, dict) else maps           # bpftool's form for one and for many
    ours = {int(info.split("map_id:")[1].split()[0])
            for path in pathlib.Path("/proc/%d/fdinfo" % tracer.process.pid).iterdir()
            if "map_id:" in (info := path.read_text())}
    one, = [entry["id"] for entry in maps if entry["id"] in ours]
    return len(json.loads(subprocess.check_output(["bpftool", "-j", "map", "dump", "id", str(one)])))


class UnseenStateChanges:
    """The state changes that ftrace saw while the context lasted, and how many of them the tool's program did not.

    There are kernels that run no BPF program while certain tasks are current (seen on a 6.18 micro-VM: its own agent).
    A state change that a timer makes then is visible in ftrace only. Nor does a kernel run a kprobe's program that
    interrupts another one. Elsewhere count is 0.
    """

    instance = "/sys/kernel/tracing/instances/tcp-tracers-test-%d" % os.getpid()
    events = "sock/inet_sock_set_state", "tcp/tcp_retransmit_skb"
    not_by_kprobe = re.compile("newstate=TCP_LISTEN|oldstate=TCP_LISTEN newstate=TCP_SYN_RECV")   # no tcp_set_state()
    change = re.compile(r" ([0-9.]+): inet_sock_set_state: .* sport=(\d+) dport=(\d+) .* newstate=TCP_(\w+)")
    again = re.compile(r" tcp_retransmit_skb: (?!.* err=-)(?:.* )?sport=(\d+) dport=(\d+) ")     # err: nothing was sent

    def __init__(self, tracer):
        self.tracer, self.count, self.trace = tracer, 0, ""

    def write(self, name, text):
        with open(os.path.join(self.instance, name), "w") as file:
            file.write(text)

    def runs(self):
        """Returns how often the busiest of the tool's raw tracepoint programs has run, or of its kprobes."""
        runs = collections.defaultdict(list)
        for path in pathlib.Path("/proc/%d/fdinfo" % self.tracer.process.pid).iterdir():
            try:
                info = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            except FileNotFoundError:       # closed by the tool in the meantime
                continue
            runs[info.get("prog_type")].append(int(info.get("run_cnt", 0)))
        self.by_kprobe = "17" not in runs               # BPF_PROG_TYPE_RAW_TRACEPOINT, and 2 is BPF_PROG_TYPE_KPROBE
        return max(runs["2" if self.by_kprobe else "17"])

    def __enter__(self):
        # BPF_ENABLE_STATS: counts runs as long as this is open. Others may turn off the sysctl.
        self.stats = ctypes.CDLL(None).syscall(BPF, 32, ctypes.byref(ctypes.c_uint32(0)), 4)
        assert self.stats >= 0, "bpf(BPF_ENABLE_STATS) fails"
        if not os.path.isdir("/sys/kernel/tracing/events"):
            subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=True)
        os.makedirs(self.instance, exist_ok=True)
        self.before = self.runs()
        self.write("trace_clock", "mono")
        for event in self.events:
            self.write("events/%s/enable" % event, "1")
        return self

    def __exit__(self, *_):
        time.sleep(0.05)
        for event in self.events:
            self.write("events/%s/enable" % event, "0")
        after = self.runs()
        traced = sum(int(count) for path in pathlib.Path(self.instance).glob("per_cpu/*/stats")
                     for count in re.findall("(?:entries|overrun): ([0-9]+)", path.read_text()))
        self.trace = pathlib.Path(self.instance, "trace").read_text(errors="replace")     # names can be any bytes
        os.rmdir(self.instance)
        os.close(self.stats)
        changes = traced - self.trace.count(" tcp_retransmit_skb: ")
        if self.by_kprobe:
            changes -= len(self.not_by_kprobe.findall(self.trace))
        self.count = max(0, changes - (after - self.before))

    def times(self):
        """Returns {(lport, rport, new state): [CLOCK_MONOTONIC seconds, ...]} of what the kernel traced last."""
        times = collections.defaultdict(list)
        for seconds, lport, rport, state in self.change.findall(self.trace):
            times[int(lport), int(rport), state].append(float(seconds))
        return times

    def retransmissions(self):
        """Returns {(lport, rport): how many segments of it the kernel retransmitted}."""
        return collections.Counter((int(lport), int(rport)) for lport, rport in self.again.findall(self.trace))


def by_timer(test):
    """For events that a timer causes: one of three tries must be right to the last line.

    A timer's interrupt may come while a task is current for which this kernel runs no BPF program, as in
    UnseenStateChanges.
    """
    @functools.wraps(test)
    def tries(self):
        for attempt in (1, 2, 3):
            try:
                return test(self)
            except AssertionError:
                if attempt == 3:
                    raise
    return tries


class Namespaces:
    """Two network namespaces with a veth pair between them: their names and the server's addresses.

    From the client's, the networks 10.78.0.0/24 and fd78::/64 are unreachable: the server's says so.
    """

    client, server = ("tcpt-%s-%d" % (side, os.getpid()) for side in ("client", "server"))
    hosts = "10.77.0.2", "fd77::2"

    def __enter__(self):
        for command in (
                "netns add %s" % self.client, "netns add %s" % self.server,
                "-n %s link add veth0 type veth peer name veth0 netns %s" % (self.client, self.server),
                "-n %s addr add 10.77.0.1/24 dev veth0" % self.client,
                "-n %s addr add 10.77.0.2/24 dev veth0" % self.server,
                "-n %s addr add fd77::1/64 dev veth0 nodad" % self.client,
                "-n %s addr add fd77::2/64 dev veth0 nodad" % self.server,
                "-n %s link set veth0 up" % self.client, "-n %s link set veth0 up" % self.server,
                "-n %s link set lo up" % self.client, "-n %s link set lo up" % self.server,
                "netns exec %s sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1" % self.server,
                "-n %s route add 10.78.0.0/24 via 10.77.0.2" % self.client,
                "-n %s route add fd78::/64 via fd77::2" % self.client,
                "-n %s route add unreachable 10.78.0.0/24" % self.server,
                "-n %s route add unreachable fd78::/64" % self.server):
            subprocess.run(["ip"] + command.split(), check=True)
        return self

    def __exit__(self, *_):
        for name in (self.client, self.server):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    @property
    def where(self):
        """Returns the arguments of workload.work() for a run between the two."""
        return {"namespaces": (self.client, self.server), "hosts": self.hosts}

    @staticmethod
    def inode(name):
        return os.stat("/run/netns/" + name).st_ino


class Load:
    """The load of connload.c, compiled once. run(connections, threads, rate) returns the rate it reached."""

    def __init__(self, namespace=None):
        self.folder = tempfile.TemporaryDirectory()
        self.binary = os.path.join(self.folder.name, "churn")
        self.command = ["ip", "netns", "exec", namespace, self.binary] if namespace else [self.binary]
        subprocess.run(["cc", "-O2", "-pthread", "-o", self.binary, ROOT / "tests/lib/connload.c"], check=True)

    def start(self, *numbers):
        return subprocess.Popen([*self.command, *map(str, numbers)], stdout=subprocess.PIPE, text=True)

    def run(self, *numbers):
        return float(subprocess.check_output([*self.command, *map(str, numbers)], text=True).split()[-1])
