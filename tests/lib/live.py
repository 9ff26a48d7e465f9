"""What the live tests share: starting a tool on the real kernel and stopping it, and where nobody else connects."""
import bisect
import collections
import contextlib
import ctypes
import functools
import ipaddress
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import workload

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PYTHON = os.environ.get("PYTHON", "/usr/bin/python3")
TOOLS = os.environ.get("TOOLS", str(ROOT))                      # the directory of the tools
SLOW = workload.SLOW
# Numbers of the system calls in which a tool waits: poll() or ppoll(), or what time.sleep() makes, which is
# clock_nanosleep(), or select() or pselect6() of no descriptor.
SLEEPS = {"x86_64": ("7 ", "271 ", "230", "23 0x0", "270 0x0"), "aarch64": ("73 ", "115", "72 0x0")}.get(
    os.uname().machine, ())
# For pretend=: the constants of a tool on a kernel whose programs can be preempted.
SEVEN = {"KERNEL": (7, 0), "PREEMPTIBLE": True, "MAX_MARKS": 1 << 14}
MAY_TRACE = os.geteuid() == 0 and os.path.exists("/sys/kernel/btf/vmlinux") and bool(SLEEPS)
WHY_NOT = "needs root and a kernel with BTF, on x86-64 or arm64"
START = 30 * SLOW       # seconds a tool may take until it traces
signal.signal(signal.SIGINT, signal.default_int_handler)        # in a background job it is ignored, also by the tools


def settle(seconds=0.05):
    """Wait for what the kernel still does after the last system call of a test, or for the next polls of a tool."""
    time.sleep(seconds * SLOW)


def until(condition, seconds=10):
    """Wait until condition() is true, but not longer than this."""
    give_up = time.monotonic() + seconds * SLOW
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.02)


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

    check: it has to exit with status 0 and has to be silent on standard error, as it has nothing lost. A tool without
    --netns looks at what strangers do, too.
    pretend: constants of the tool, with the values they are to have. before: code that runs before the tool's main().
    """

    def __init__(self, tool, *args, check=True, pretend=None, before=""):
        path = [os.path.join(TOOLS, tool + ".py")]
        if pretend or before:
            path = ["-c", PRETEND.format(tool=tool, tools=TOOLS, pretend=pretend or {}, before=before)]
        self.command = [PYTHON, *path, *map(str, args)]
        self.tool, self.check, self.process = tool, check, None

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
        settle()
        self.stop()
        if self.check and kind is None:
            assert (self.status, self.stderr) == (0, ""), (self.command, self.status, self.stderr)

    @property
    def lines(self):
        return self.stdout.splitlines()

    @functools.cached_property
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
        settle()
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


def losses(tracer):
    """Returns {what: how often in all} of what a tool that has exited reports as lost, and {line: 0} for all else."""
    found = {}
    for line in tracer.stderr.splitlines():
        loss = re.fullmatch("[a-z0-9]+: (in all )?([0-9]+) (.* lost: .*)", line)
        if not loss:
            found[line] = 0
        elif loss.group(1):
            found[loss.group(3)] = int(loss.group(2))
        else:
            found.setdefault(loss.group(3), 0)
    return found


def reported_losses(tracer):
    """Returns how much a tool that has exited reports as lost in all."""
    return sum(losses(tracer).values())


TIMES = "ts", "ms", "connect_ms", "accept_ms", "state_ms", "srtt_us"


def timeless(line):
    """Returns the text of a JSON object without its times, to be compared with what another tracer has printed."""
    return json.dumps({name: value for name, value in line.items() if name not in TIMES})


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


class Ftrace:
    """Events that the kernel traces while the context lasts, in an instance of ftrace. Afterwards: count and trace.

    A tracepoint calls its probes in the order in which they came to it. So what a tool reads from the kernel's clock
    lies between the times of an instance that was entered before the tool started and of one entered later.
    """

    numbers = itertools.count()

    def __init__(self, kilobytes=1024, **filters):
        """kilobytes: of lines to keep, per CPU. filters: {event: which of them, as a filter of ftrace; "": all}"""
        self.kilobytes = kilobytes
        self.instance = "/sys/kernel/tracing/instances/tcp-tracers-test-%d-%d" % (os.getpid(), next(self.numbers))
        self.filters = {("tcp/" if event.startswith("tcp_") else "sock/") + event: which
                        for event, which in filters.items()}
        self.count, self.trace = 0, ""

    def write(self, name, text):
        with open(os.path.join(self.instance, name), "w") as file:
            file.write(text)

    def __enter__(self):
        if not os.path.isdir("/sys/kernel/tracing/events"):
            subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=True)
        os.makedirs(self.instance)
        self.write("trace_clock", "mono")
        self.write("buffer_size_kb", str(self.kilobytes))
        for event, which in self.filters.items():
            self.write("events/%s/filter" % event, which or "0")
            self.write("events/%s/enable" % event, "1")
        return self

    def __exit__(self, *_):
        settle()
        for event in self.filters:
            self.write("events/%s/enable" % event, "0")
        self.count = sum(int(count) for path in pathlib.Path(self.instance).glob("per_cpu/*/stats")
                         for count in re.findall("(?:entries|overrun): ([0-9]+)", path.read_text()))
        self.trace = pathlib.Path(self.instance, "trace").read_text(errors="replace")     # names can be any bytes
        os.rmdir(self.instance)


def of(*addresses):
    """Returns a filter for state changes of connections of these IPv4 addresses, or of any IPv6 address.

    Strangers may have more connections than a buffer holds. For ftrace, a field of four bytes is a number.
    """
    numbers = [int.from_bytes(socket.inet_aton(address), sys.byteorder) for address in addresses]
    return " || ".join(["family == %d" % socket.AF_INET6] + ["saddr == %d || daddr == %d" % (n, n) for n in numbers])


def agent():
    """Returns the threads of process 1.

    There are kernels that run no BPF program while certain tasks are current (seen on a 6.18 micro-VM: its own agent,
    which is process 1). An interrupt that comes then may change the state of any socket, and no tool sees that.
    """
    return set(os.listdir("/proc/1/task"))


class UnseenStateChanges(Ftrace):
    """How many of these state changes the tools may not have seen while the context lasted: count. See agent()."""

    def __init__(self, which=""):
        tasks = " || ".join("common_pid == " + thread for thread in agent())
        super().__init__(kilobytes=8, inet_sock_set_state="(%s) && (%s)" % (tasks, which) if which else tasks)


class Times(Ftrace):
    """When the states of these connections changed, and what went again."""

    ends = r"sport=(\d+) dport=(\d+) .*daddrv6=(?:::ffff:)?(\S+) "
    change = re.compile(r"^.{16}-(\d+) .* ([0-9.]+): inet_sock_set_state: .*protocol=IPPROTO_TCP " + ends +
                        r".*newstate=TCP_(\w+)", re.MULTILINE)
    again = re.compile(r" tcp_retransmit_skb: (?!.* err=-).*?" + ends)         # err: nothing was sent

    def __init__(self, which):
        super().__init__(inet_sock_set_state=which, tcp_retransmit_skb="")

    def __enter__(self):
        self.agent = agent()
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self.agent |= agent()

    def changes(self):
        """Returns {(lport, raddr, rport, new state): [CLOCK_MONOTONIC seconds, ...]}."""
        times = collections.defaultdict(list)
        for _, seconds, lport, rport, raddr, state in self.change.findall(self.trace):
            times[int(lport), raddr, int(rport), state].append(float(seconds))
        return times

    def unseen(self):
        """Returns those of the changes that no tool may have seen: see agent()."""
        return {(int(lport), raddr, int(rport), state)
                for task, _, lport, rport, raddr, state in self.change.findall(self.trace) if task in self.agent}

    def retransmissions(self):
        """Returns {(lport, raddr, rport): how many segments of it the kernel retransmitted}."""
        return collections.Counter((int(lport), raddr, int(rport))
                                   for lport, rport, raddr in self.again.findall(self.trace))


def between(before, after):
    """Returns {what changed, as in Times.changes(): pairs of times between which a tool has seen it}.

    before, after: Times that were entered before the tool started and after it.
    """
    early, late = before.changes(), after.changes()
    return collections.defaultdict(list, {
        change: [(early[change][bisect.bisect(early[change], second) - 1], second) for second in seconds]
        for change, seconds in late.items()})


MAX_RETRIES = 2         # of by_timer(), in all of a run


@functools.lru_cache(maxsize=None)
def retries():
    """The file with a line for each retry. All test files of a run share it if they find its name in RETRIES."""
    return open(os.environ["RETRIES"], "a+") if os.environ.get("RETRIES") else tempfile.TemporaryFile("a+")


def by_timer(test):
    """For events that a timer causes: the test may be tried again, but each time is reported, and few are granted.

    A timer's interrupt may come while a task is current for which this kernel runs no BPF program: see agent(). That
    is rare. More than MAX_RETRIES in a run of all tests are a failure.
    """
    @functools.wraps(test)
    def tries(self):
        while True:
            try:
                return test(self)
            except AssertionError as error:
                file = retries()
                file.write(self.id() + "\n")
                file.flush()
                file.seek(0)
                count = len(file.readlines())
                is_last = count > MAX_RETRIES
                print("by_timer: %s: retry %d of at most %d in this run%s: %s" % (
                    self.id(), count, MAX_RETRIES, ", not granted" if is_last else "", error), file=sys.stderr)
                if is_last:
                    raise
    return tries


class Namespaces:
    """Two network namespaces with a veth pair between them.

    client, server: their names. hosts: the server's addresses. guests: the client's. nowhere: addresses to which the
    client's packets go by way of the server, which says that it has no route. No other process uses these addresses.
    """

    numbers = itertools.count()
    here, elsewhere = ("10.%d.%d." % (first + (os.getpid() >> 8 & 63), os.getpid() & 255) for first in (64, 128))

    def __init__(self):
        number, pid = next(self.numbers), os.getpid()
        self.client, self.server = ("tcpt-%s-%d-%d" % (side, pid, number) for side in ("client", "server"))
        self.guests, self.hosts, self.nowhere = (
            (v4 + last, str(ipaddress.ip_address("%s:%x:%x::%s" % (v6, pid >> 16, pid & 0xffff, last))))
            for v4, v6, last in ((self.here, "fd77", "1"), (self.here, "fd77", "2"), (self.elsewhere, "fd78", "1")))

    def __enter__(self):
        for command in (
                "netns add %s" % self.client, "netns add %s" % self.server,
                "-n %s link add veth0 type veth peer name veth0 netns %s" % (self.client, self.server),
                "-n %s addr add %s/24 dev veth0" % (self.client, self.guests[0]),
                "-n %s addr add %s/24 dev veth0" % (self.server, self.hosts[0]),
                "-n %s addr add %s/64 dev veth0 nodad" % (self.client, self.guests[1]),
                "-n %s addr add %s/64 dev veth0 nodad" % (self.server, self.hosts[1]),
                "-n %s link set veth0 up" % self.client, "-n %s link set veth0 up" % self.server,
                "-n %s link set lo up" % self.client, "-n %s link set lo up" % self.server,
                "netns exec %s sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 "
                "net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0" % self.server,
                "-n %s route add %s/24 via %s" % (self.client, self.elsewhere + "0", self.hosts[0]),
                "-n %s route add %s/128 via %s" % (self.client, self.nowhere[1], self.hosts[1]),
                "-n %s route add unreachable %s/24" % (self.server, self.elsewhere + "0"),
                "-n %s route add unreachable %s/128" % (self.server, self.nowhere[1])):
            subprocess.run(["ip"] + command.split(), check=True)
        return self

    def __exit__(self, *_):
        for name in (self.client, self.server):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    @property
    def where(self):
        """Returns the arguments of workload.work() for a run between the two."""
        return {"namespaces": (self.client, self.server), "hosts": self.hosts, "nowhere": self.nowhere}

    def host(self, number):
        """Returns an address of the network between the two that nobody has."""
        return self.here + str(number)

    @staticmethod
    def inode(name):
        return os.stat("/run/netns/" + name).st_ino


@contextlib.contextmanager
def network(namespace):
    """This thread, and those it starts, are in that network namespace while the context lasts."""
    with open("/proc/thread-self/ns/net") as home:
        workload.enter(namespace)
        try:
            yield
        finally:
            ctypes.CDLL(None).setns(home.fileno(), 0)


@contextlib.contextmanager
def packets_shared(namespace):
    """Packets of this namespace's lo come to all CPUs (RPS), where their softirqs interrupt whatever runs there."""
    def share(cpus):
        subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c",
                        "file=/sys/class/net/lo/queues/rx-0/rps_cpus; [ ! -e $file ] || echo %x >$file" % cpus],
                       check=True)
    share((1 << os.cpu_count()) - 1)
    try:
        yield
    finally:
        share(0)


@contextlib.contextmanager
def local_ports(first, last):
    """connect() chooses among these ports, in the namespace of this thread, while the context lasts."""
    path = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    usual = path.read_text()
    path.write_text("%d %d" % (first, last))
    try:
        yield
    finally:
        path.write_text(usual)


@contextlib.contextmanager
def deserted(host=workload.OWN):
    """Yields an address where nobody listens while the context lasts."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        yield sock.getsockname()[:2]


def without(text, part, instead=";"):
    """Returns the text of a program without this part."""
    assert part in text, part
    return text.replace(part, instead)


@unittest.skipUnless(MAY_TRACE, WHY_NOT)
class Alone(unittest.TestCase):
    """Tests in a network namespace where nobody else has connections: the client's of namespaces."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        with contextlib.ExitStack() as stack:
            cls.namespaces = stack.enter_context(Namespaces())
            stack.enter_context(network(cls.namespaces.client))
            cls.netns = Namespaces.inode(cls.namespaces.client)
            cls.addClassCleanup(stack.pop_all().close)

    def check_filters(self, tool, filters, play, options=()):
        """What the tool prints with each filter is what it prints without one of those that the filter lets through.

        Of what happens while all of them trace: an older connection of these namespaces may still send its FIN again.
        filters: {options: (condition on a line, how many lines of what play() does meet it; None: at least one)}
        Returns the lines without a filter.
        """
        every = Tracer(tool, "--json", *options)
        tracers = {filter: Tracer(tool, "--json", *options, *filter) for filter in filters}
        with tracing(every, *tracers.values()):
            began = time.time()
            settle()
            play()
            settle()
            ended = time.time()
        both = {self.netns, Namespaces.inode(self.namespaces.server)}

        def seen(tracer):
            return [line for line in tracer.objects if line["netns"] in both and began < line["ts"] < ended]
        lines = seen(every)
        for filter, (is_wanted, count) in filters.items():
            with self.subTest(filter):
                wanted = [line for line in lines if is_wanted(line)]
                self.assertEqual(compare(wanted, seen(tracers[filter]), timeless), ([], []))
                self.assertTrue(0 < len(wanted) < len(lines))
                self.assertIn(count, (len(wanted), None))
        return lines


class Actor:
    """A process that takes steps: each is a function of its own state, a dict."""

    END = 255

    def __init__(self, steps):
        self.orders, self.write = os.pipe()
        self.read, self.answers = os.pipe()
        self.pid = workload.spawn("actor", None, self.obey, steps)
        os.close(self.answers)

    def obey(self, steps):
        signal.alarm(int(120 * SLOW))           # if nobody ends it
        os.close(self.write)            # so that it ends, by an error, if the test does
        state = {}
        while True:
            order = os.read(self.orders, 1)[0]
            if order == self.END:
                return
            steps[order](state)
            os.write(self.answers, b".")

    def do(self, step):
        os.write(self.write, bytes([step]))
        assert os.read(self.read, 1), "the actor has failed in step %d" % step

    def end(self):
        os.write(self.write, bytes([self.END]))
        os.waitpid(self.pid, 0)


def in_process(work):
    """Returns the PID of a process that runs work(), and what that has returned, by way of JSON."""
    with tempfile.TemporaryFile("w+") as file:
        def child():
            json.dump(work(), file)
            file.flush()
        pid = workload.spawn("child", None, child)
        assert os.waitpid(pid, 0)[1] == 0, "the process has failed"
        file.seek(0)
        return pid, json.load(file)


class Load:
    """The load of connload.c, compiled once. run(connections, threads, rate, port) returns the rate it reached."""

    def __init__(self, namespace=None):
        self.folder = tempfile.TemporaryDirectory()
        self.binary = os.path.join(self.folder.name, "churn")
        self.command = ["ip", "netns", "exec", namespace, self.binary] if namespace else [self.binary]
        subprocess.run(["cc", "-O2", "-pthread", "-o", self.binary, ROOT / "tests/lib/connload.c"], check=True)

    def start(self, *numbers):
        return subprocess.Popen([*self.command, *map(str, numbers)], stdout=subprocess.PIPE, text=True)

    def hold(self, *numbers):
        """Returns a process that waits for a line before it becomes this load."""
        return subprocess.Popen(["sh", "-c", 'read -r _ && exec "$0" "$@"', *self.command, *map(str, numbers)],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *numbers):
        return float(subprocess.check_output([*self.command, *map(str, numbers)], text=True).split()[-1])
