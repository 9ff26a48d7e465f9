"""Where a tool writes, and how it ends: whatever its standard output and error are, and whoever reads them."""
import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import tempfile
import termios
import threading
import time
import unittest

import live
from own import Tracer, connect

# Each tool so that it says something of each connection of this process.
TOOLS = {"tcplife": [], "tcpaccept": [], "tcpv4connect": ["-r"], "tcpchurn": [os.getpid(), "-i", "0.1"],
         "deeptcptracer": ["-e", "tcp_set_state"]}
STOP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
CONNECTIONS = 3


class Redirected(Tracer):
    """A tool whose standard output or error is another descriptor than a file's."""

    def __init__(self, *command, out=None, err=None, **how):
        super().__init__(*command, **how)
        self.redirected = out, err

    def start(self):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        out, err = self.redirected
        self.process = subprocess.Popen(self.command, stdin=out if out and os.isatty(out) else subprocess.DEVNULL,
                                        stdout=out or self.out, stderr=err or self.err)


@contextlib.contextmanager
def closing(reader, writer):
    yield reader, writer
    for fd in reader, writer:
        os.close(fd)


def pipe():
    return closing(*os.pipe())


def socket_pair():
    return closing(*[sock.detach() for sock in socket.socketpair()])


def terminal():
    return closing(*pty.openpty())


@contextlib.contextmanager
def fifo():
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/fifo"
        os.mkfifo(path)
        with closing(os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_WRONLY)) as ends:
            yield ends


def fill(writer):
    """Nobody reads, and nothing fits any more."""
    if stat.S_ISSOCK(os.fstat(writer).st_mode):
        with socket.socket(fileno=os.dup(writer)) as sock:
            for size in 4096, 1:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock.send(b"\n" * size, socket.MSG_DONTWAIT)
        return
    # Opened again, as O_NONBLOCK is for all that share a description.
    again = os.open("/proc/self/fd/%d" % writer, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(again, b"\n" * 4096)
    os.close(again)


def stop(writer):
    """As Ctrl-S does."""
    termios.tcflow(writer, termios.TCOOFF)


# Where a tool writes, and why nothing goes through.
BLOCKED = {"pipe": (pipe, fill), "stopped terminal": (terminal, stop), "FIFO": (fifo, fill),
           "socket": (socket_pair, fill), "stalled terminal": (terminal, fill)}


def drain(reader):
    """Returns what has come so far."""
    os.set_blocking(reader, False)
    text = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(reader, 1 << 16):
            text += part
    return text.decode()


def ends_of(tool):
    """Returns how many ends of a connection the tool counts or prints."""
    return 1 if tool in ("tcpaccept", "tcpv4connect") else 2


def ended(tool, lines):
    """Returns the number of ends of connections in these JSON objects."""
    if tool == "tcpchurn":
        return lines[-1]["all"]["closed"] if lines else 0
    if tool == "deeptcptracer":
        return sum(line["state"] == "CLOSE" and line["oldstate"] != "LISTEN" for line in lines)
    return len(lines)


class Output(live.Alone):
    def tracer(self, tool, *options, **how):
        return Redirected(tool, *TOOLS[tool], "--json", "--netns", self.netns, *options, **how)

    def wait(self, tracers, seconds):
        """All of them end in this time."""
        give_up, late = time.monotonic() + seconds, []
        for tracer in tracers:
            try:
                tracer.process.wait(max(0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(tracer.command)
                tracer.process.kill()
        self.assertEqual(late, [])

    def end(self, tracers, *numbers, seconds=2):
        """They get these signals in turn, and end soon."""
        for tracer, number in zip(tracers, itertools.cycle(numbers)):
            tracer.process.send_signal(number)
        self.wait(tracers, seconds * live.SLOW)

    def test_signals(self):
        """What has happened before the signal is printed, and the status is 0."""
        with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
            tracers, readers, numbers = [], [], []
            for number, kind in (signal.SIGTERM, pipe), (signal.SIGHUP, fifo), (signal.SIGQUIT, socket_pair):
                for tool in TOOLS:
                    reader, writer = stack.enter_context(kind())
                    readers.append(reader)
                    numbers.append(number)
                    tracers.append(self.tracer(tool, out=writer))
            with live.tracing(*tracers):
                connect(listener, CONNECTIONS)
                self.end(tracers, *numbers)
            for tracer, reader, number in zip(tracers, readers, numbers):
                lines = [live.strict_json(line) for line in drain(reader).splitlines()]
                self.assertEqual(ended(tracer.tool, lines), CONNECTIONS * ends_of(tracer.tool), (tracer.tool, number))

    def test_nobody_reads(self):
        """Standard output and error are the same, and blocked."""
        tools = list(TOOLS)
        with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
            tracers, blocks = [], []
            for some, (kind, how) in zip((tools, tools, tools[:1], tools[1:3], tools[3:]), BLOCKED.values()):
                for tool in some:
                    writer = stack.enter_context(kind())[1]
                    tracers.append(self.tracer(tool, out=writer, err=writer))
                    blocks.append((how, writer))
            with live.tracing(*tracers):
                for how, writer in blocks:
                    how(writer)
                connect(listener, CONNECTIONS)
                live.settle(0.3)
                self.end(tracers, *STOP)
            for _, writer in blocks:
                self.assertFalse(fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK)        # for those who share it

    def test_duration_while_nobody_reads(self):
        over = threading.Event()

        def go_on():
            while not over.is_set():
                connect(listener, CONNECTIONS)
                live.settle()
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
            load = threading.Thread(target=go_on)
            stack.callback(load.join)
            stack.callback(over.set)
            tracers = []
            for tool, (kind, block) in zip(TOOLS, BLOCKED.values()):
                writer = stack.enter_context(kind())[1]
                block(writer)
                tracers.append(self.tracer(tool, "--duration", 1, out=writer, err=writer))
            for tracer in tracers:
                tracer.start()
                stack.callback(tracer.process.kill)
            load.start()
            self.wait(tracers, live.START)
            self.assertEqual({tracer.process.returncode for tracer in tracers}, {0})

    def test_nobody_reads_standard_error(self):
        """The lines go on in a file. Messages are dropped and counted, and losses are reported at the end."""
        with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
            pipes = [stack.enter_context(pipe()) for _ in TOOLS]
            # So small that each of these bursts costs losses.
            tracers = [self.tracer(tool, err=writer, check=False, pretend={"RING_PAGES": 1, "MAX_SOCKETS": 1})
                       for tool, (_, writer) in zip(TOOLS, pipes)]
            made = 0

            def sizes():
                return [os.fstat(tracer.out.fileno()).st_size for tracer in tracers]

            def burst(times):
                nonlocal made
                before = sizes()
                connect(listener, times)
                made += times
                live.until(lambda: all(size > old for size, old in zip(sizes(), before)))
                stopped = [tracer.tool for tracer, size, old in zip(tracers, sizes(), before) if size == old]
                self.assertEqual(stopped, [])
                live.settle(1.2)        # a tool asks for losses once per second
            with live.tracing(*tracers):
                for _, writer in pipes:
                    fill(writer)
                for _ in range(3):
                    burst(300)
                said = [drain(reader) for reader, _ in pipes]
                burst(300)
                self.end(tracers, signal.SIGTERM)
            for tracer, text, (reader, _) in zip(tracers, said, pipes):
                tracer.stderr = (text + drain(reader)).lstrip("\n")
                self.assertRegex(tracer.stderr, "(?m)^%s: [0-9]+ messages missing here: standard error was full$"
                                 % tracer.tool)
                self.assertEqual(tracer.status, 0)
                if tracer.tool != "deeptcptracer":              # each of its connections has many events
                    lost, expected = live.losses(tracer), made * ends_of(tracer.tool)
                    skipped = sum(n for what, n in lost.items() if what.endswith("did not run the probe"))
                    found = ended(tracer.tool, tracer.objects) + sum(lost.values()) - skipped
                    self.assertTrue(found <= expected <= found + skipped, (found, expected, lost))
                    self.assertGreater(sum(lost.values()), skipped)

    def test_signals_that_are_ignored(self):
        """By nohup, or for a script's background jobs: the tools go on, until another one comes."""
        tracers = [self.tracer(tool) for tool in TOOLS]
        for tracer in tracers:
            tracer.command[:0] = ["env", "--ignore-signal=INT,HUP"]
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers):
            for tracer in tracers:
                tracer.process.send_signal(signal.SIGINT)
                tracer.process.send_signal(signal.SIGHUP)
            live.settle(0.3)
            connect(listener, CONNECTIONS)
            self.end(tracers, signal.SIGTERM)
        for tracer in tracers:
            self.assertEqual(ended(tracer.tool, tracer.objects), CONNECTIONS * ends_of(tracer.tool), tracer.tool)

    def test_the_terminal_goes_away(self):
        """That is a SIGHUP: nothing is said, and tcpchurn removes its file. It does so at SIGQUIT, too."""
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            paths = [folder + name for name in ("/hup.prom", "/quit.prom")]
            publish = "tcpchurn", os.getpid(), "--netns", self.netns, "--prometheus"
            masters, slaves = zip(*[pty.openpty() for _ in range(2)])
            for slave in slaves:
                stack.callback(os.close, slave)
            tracers = life, churn, other = [self.tracer("tcplife", out=slaves[0]),
                                            Redirected(*publish, paths[0], out=slaves[1]), Tracer(*publish, paths[1])]
            for tracer in life, churn:
                tracer.command[:0] = ["setsid", "-c"]
            with live.tracing(*tracers):
                live.until(lambda: all(map(os.path.exists, paths)))
                self.assertEqual(len(os.listdir(folder)), 2)
                for master in masters:
                    os.close(master)
                self.end([other], signal.SIGQUIT)
                self.wait(tracers, 2 * live.SLOW)
            self.assertEqual(os.listdir(folder), [])


# With the usage as Python prints it in colours since 3.14.
COLOURED = """
import argparse
import sys
plain = argparse.ArgumentParser.format_usage
def format_usage(self):
    text = plain(self)
    return text.replace("usage: ", "\\033[1;34musage: \\033[0m") if getattr(self, "color", True) else text
if sys.version_info < (3, 14):
    argparse.ArgumentParser.format_usage = format_usage
sys.path.insert(0, {tools!r})
import tcpchurn
tcpchurn.main()
"""
SAYS_HELP = r"""#!/bin/sh
[ -n "$NO_COLOR" ] || colour='\033[1;32m' plain='\033[0m'
printf "  $colour--duration$plain ${colour}SECONDS$plain  exit after this many seconds\n"
"""
COMPLETES = """
. "$0/completion/tcp-tracers.bash"
COMP_WORDS=(tcplife --du) COMP_CWORD=1
_tcp_tracers "$1" --du tcplife
printf '%s\n' "${COMPREPLY[@]}"
"""


class Commands(live.Alone):
    @staticmethod
    def run_all(*options, command=()):
        """Returns what each tool says: [(tool, subprocess.CompletedProcess), ...]"""
        def run(tool):
            return subprocess.run([*command, live.PYTHON, "%s/%s.py" % (live.TOOLS, tool), *map(str, TOOLS[tool]),
                                   "--duration", "0.1", *options], capture_output=True, text=True, timeout=live.START)
        with concurrent.futures.ThreadPoolExecutor() as side_by_side:
            return list(zip(TOOLS, side_by_side.map(run, TOOLS)))

    def test_namespaces_that_come_and_go(self):
        """A name of digits is a name. The number of a namespace that is traced is given to no other when it is deleted.

        Else one of the next few gets it.
        """
        names = [str(10 ** 8 + 10 * os.getpid() + n) for n in range(9)]
        tracers = [Tracer(tool, *options, "--json", "--netns", names[0]) for tool, options in TOOLS.items()]
        with contextlib.ExitStack() as stack:
            def add(name):
                subprocess.run(["ip", "netns", "add", name], check=True)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
                subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)

            def visit(name):
                with live.network(name), socket.create_server(("127.0.0.1", 0)) as listener:
                    connect(listener, CONNECTIONS)
            add(names[0])
            with live.tracing(*tracers):
                visit(names[0])
                subprocess.run(["ip", "netns", "del", names[0]], check=True)
                for name in names[1:]:
                    add(name)
                    visit(name)
        for tracer in tracers:
            self.assertEqual(ended(tracer.tool, tracer.objects), CONNECTIONS * ends_of(tracer.tool), tracer.tool)

    def test_no_such_namespace(self):
        """That is known where each process can be asked for its own. Process 1 of a micro-VM may refuse even root."""
        another = ["unshare", "--mount", "sh", "-c", 'mount --bind /proc/$$ /proc/1 && exec "$@"', "sh"]
        for tool, said in self.run_all("--netns", "4294967290", command=another):
            with self.subTest(tool):
                self.assertRegex(said.stderr, "error: argument .*--netns: not a network namespace: '4294967290'\n$")
                self.assertEqual((said.stdout, said.returncode), ("", 2))

    def test_log_of_the_service(self):
        """What a full disk or kill -9 has left of a line stays on a line of its own."""
        torn = '{"ts":1,"pid":'
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
            path = folder + "/tcplife.json"
            tracer = Tracer("tcplife")
            tracer.command = ["env", "PYTHONPATH=" + live.TOOLS, live.PYTHON, live.TOOLS + "/service/tcplife-log.py",
                              path, "--json", "--netns", str(self.netns)]

            def tear():
                with open(path, "a") as file:
                    file.write(torn)

            def lines():
                with open(path) as file:
                    return file.read().splitlines()
            tear()
            with tracer:
                connect(listener)
                live.until(lambda: len(lines()) == 3)
                tear()
                connect(listener)
            found = lines()
        self.assertEqual([line == torn for line in found], [True, False, False, True, False, False])
        for line in found:
            if line != torn:
                json.loads(line)

    def test_without_capabilities(self):
        """Root learns as well what is missing, as in a container."""
        for tool, said in self.run_all(command=["setpriv", "--bounding-set=-all", "--inh-caps=-all"]):
            with self.subTest(tool):
                self.assertEqual((said.stdout, said.returncode), ("", 1))
                self.assertRegex(said.stderr, "^%s: cannot trace: .*needs root, or the capabilities .*\n$" % tool)

    def test_usage_in_colour(self):
        """Python's own is, since 3.14."""
        said = subprocess.run([live.PYTHON, "-c", COLOURED.format(tools=live.TOOLS), "--help"],
                              env=dict(os.environ, FORCE_COLOR="1"), capture_output=True, text=True, check=True).stdout
        self.assertRegex(said, "^usage: tcpchurn [[]-h[]]")
        self.assertEqual((said.count("usage:"), said.count("\033")), (1, 0))

    def test_completion_in_colour(self):
        """The completion reads what --help prints."""
        with tempfile.TemporaryDirectory() as folder:
            command = folder + "/tcplife"
            with open(command, "w") as file:
                file.write(SAYS_HELP)
            os.chmod(command, 0o700)
            said = subprocess.check_output(["bash", "-c", COMPLETES, live.TOOLS, command],
                                           env=dict(os.environ, FORCE_COLOR="1"), text=True)
        self.assertEqual(said, "--duration\n")


if __name__ == "__main__":
    unittest.main()
