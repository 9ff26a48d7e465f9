"""What users of other tracers have reported, and what the code was found to get wrong: owners, names, and the end."""
import collections
import contextlib
import ctypes
import json
import mmap
import os
import pathlib
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import unittest

import live
import workload
from own import Tracer, connect, pair, ports

CLONE_NEWPID = 0x20000000
LIBC = ctypes.CDLL(None, use_errno=True)
VETHS = "veth0", "veth1"
CHANGES = "deeptcptracer", "-e", "tcp_set_state"


def of_port(lines, port):
    return [line for line in lines if port in ports(line)]


VISITS = 3


def serve(listener):
    for _ in range(VISITS):
        sock = listener.accept()[0]
        sock.send(sock.recv(1))         # after this, an ACK waits for data or a FIN to go with
        sock.recv(1)
        sock.close()


def in_pid_namespace(fd):
    """To be called as the first process of a PID namespace: serves a client outside, and has others within it.

    Prints what the tools say of them. pids: of the server, of a process in a PID namespace within this one, and of one
    that is another level deeper.
    """
    listener, own = socket.socket(fileno=fd), socket.create_server(("127.0.0.1", 0))
    read, write = os.pipe()
    here = os.open("/proc/self/ns/pid", os.O_RDONLY)
    where = "--json", "--netns", "/proc/self/ns/net"

    def tell():
        os.write(write, b"%d\n" % int(os.readlink("/proc/self")))

    def keep(state):
        tell()
        state["kept"] = pair(own)

    def deeper(_state):
        LIBC.unshare(CLONE_NEWPID)
        workload.wait(workload.spawn("deeper", None, lambda: (tell(), connect(own, VISITS))))

    def finish(state):
        for sock in state["kept"]:
            sock.close()
        connect(own, VISITS)
    LIBC.unshare(CLONE_NEWPID)
    nested = live.Actor([keep, deeper, finish])
    LIBC.setns(here, CLONE_NEWPID)
    nested.do(0)
    server = live.Actor([lambda _: serve(listener)])
    tracers = {tool + " of one": Tracer(tool, *options, *where) for tool, *options in (
        ("tcplife", "-p", nested.pid), ("tcpaccept", "-p", nested.pid), ("tcpv4connect", "-p", nested.pid),
        (*CHANGES, "-p", nested.pid), ("tcpchurn", nested.pid))}
    tracers["tcplife"] = Tracer("tcplife", *where)
    tracers["tcplife of the server"] = Tracer("tcplife", "-p", server.pid, *where)
    with live.tracing(*tracers.values()):
        print("ready", flush=True)
        server.do(0)
        nested.do(1)
        nested.do(2)
    server.end()
    nested.end()
    with os.fdopen(read) as numbers:
        pids = [int(numbers.readline()) for _ in range(2)]
    print(json.dumps({"pids": [server.pid, *pids], "port": own.getsockname()[1],
                      **{name: tracer.objects for name, tracer in tracers.items()}}))


class Owners(live.Alone):
    def test_orphan_from_before_the_start(self):
        """Its session ends in softirq, while the process of the other end is current."""
        life, changes, churn = tracers = [Tracer(*tool, "--json", "--netns", self.netns) for tool in (
            ("tcplife", "--existing"), CHANGES, ("tcpchurn", os.getpid()))]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            actor = live.Actor([lambda state: state.update(sock=socket.create_connection(listener.getsockname())),
                                lambda state: state["sock"].close()])
            actor.do(0)
            server, (_, port) = listener.accept()
            workload.deaf(server)       # so its FIN is not acknowledged
            actor.do(1)
            with live.tracing(*tracers), server:
                workload.hear(server)
                server.send(b"x")
                workload.await_state(server, workload.CLOSE)
            actor.end()
        self.assertEqual([(line["lport"] == port, line["pid"], line["end"]) for line in life.objects],
                         [(True, None, "reset"), (False, os.getpid(), "reset")])
        self.assertEqual([line["pid"] for line in changes.objects if line["sport"] == port], [None])
        self.assertEqual(churn.objects[-1]["all"], {"opened": 0, "accepted": 0, "connected": 0, "closed": 1})

    def test_in_a_pid_namespace(self):
        """The client, outside, closes first, and the server at once: both ends close while the server is current."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            code = "import test_reports; test_reports.in_pid_namespace(%d)" % listener.fileno()
            inside = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-W", "ignore", "-c", code],
                stdout=subprocess.PIPE, pass_fds=[listener.fileno()], text=True)
            with inside:
                self.assertEqual(inside.stdout.readline(), "ready\n")
                for _ in range(VISITS):
                    with socket.create_connection(listener.getsockname()) as client:
                        client.send(b"x")
                        client.recv(1)
                said = json.loads(inside.communicate()[0])
            port = listener.getsockname()[1]
        server, nested, deeper = said["pids"]
        with self.subTest("a client outside"):
            ends = [(line["lport"] == port, line["pid"]) for line in of_port(said["tcplife"], port)]
            self.assertEqual(collections.Counter(ends), {(False, None): VISITS, (True, server): VISITS})
            self.assertEqual([(line["lport"], line["pid"]) for line in said["tcplife of the server"]],
                             [(port, server)] * VISITS)
        with self.subTest("a namespace within this one, and another one within that"):
            self.assertEqual(collections.Counter(line["pid"] for line in of_port(said["tcplife"], said["port"])),
                             {nested: 2 * VISITS, deeper: 2 * VISITS})
        for tool, count in ("tcplife", 2 * VISITS), ("tcpaccept", VISITS), ("tcpv4connect", VISITS):
            with self.subTest(tool):
                self.assertEqual([line["pid"] for line in said[tool + " of one"]], [nested] * count)
        with self.subTest("deeptcptracer"):             # it has a connection from before the start, too
            changes = said["deeptcptracer of one"]
            self.assertEqual({line["pid"] for line in changes}, {nested})
            self.assertEqual(sum(line["state"] == "CLOSE_WAIT" for line in changes), 1 + VISITS)
        with self.subTest("tcpchurn"):
            self.assertEqual(said["tcpchurn of one"][-1]["all"], {"opened": 2 * VISITS, "accepted": VISITS,
                                                                  "connected": VISITS, "closed": 2 * (VISITS + 1)})


def uring_connect(sock, address, by):
    """Connect by io_uring. by: the thread that is to do it: "caller", "worker" or "poller"."""
    flags, setup = 16 * (by == "worker"), 2 * (by == "poller")          # IOSQE_ASYNC, IORING_SETUP_SQPOLL
    params = ctypes.create_string_buffer(struct.pack("=8xI", setup), 120)
    ring = LIBC.syscall(425, 1, params)                                 # io_uring_setup
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    tail, array = (struct.unpack_from("=I", params, 40 + offset)[0] for offset in (4, 24))
    done = struct.unpack_from("=I", params, 80 + 20)[0]
    where = struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", address[1], socket.inet_aton(address[0]))
    where = ctypes.create_string_buffer(where)
    with mmap.mmap(ring, array + 4) as queue, mmap.mmap(ring, 64, offset=0x10000000) as entry, \
            mmap.mmap(ring, done + 32, offset=0x8000000) as results:
        struct.pack_into("=BBHiQQ", entry, 0, 16, flags, 0, sock.fileno(), 16, ctypes.addressof(where))     # CONNECT
        struct.pack_into("=I", queue, array, 0)
        struct.pack_into("=I", queue, tail, 1)
        LIBC.syscall(426, ring, not setup, 1, 1 | setup, None, 0)       # io_uring_enter: wait for it, wake the poller
        result = struct.unpack_from("=Qi", results, done)[1]
    os.close(ring)
    if result:
        raise OSError(-result, "connect")


class Names(live.Alone):
    def test_a_name_that_ends_in_a_newline(self):
        """It is the same for a socket from before the start."""
        name = b"two\n"

        def rename(state):
            with open("/proc/self/comm", "wb") as comm:
                comm.write(name)
            state["kept"] = pair(listener)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            actor = live.Actor([rename, lambda state: [sock.close() for sock in state["kept"]],
                                lambda _: connect(listener)])
            actor.do(0)
            with Tracer(*CHANGES, "--json", "--netns", self.netns, "-p", actor.pid) as tracer:
                actor.do(1)
                actor.do(2)
            actor.end()
        self.assertEqual([live.comm(line) for line in tracer.objects if line["state"] == "LAST_ACK"], [name] * 2)

    def test_stacks_without_names(self):
        """Where nobody may know where functions are: addresses, and one line that says why."""
        path = pathlib.Path("/proc/sys/kernel/kptr_restrict")
        usual = path.read_text()
        text, lines = tracers = [Tracer(*CHANGES, "-K", "--netns", self.netns, *options, check=False)
                                 for options in ((), ("--json",))]
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
            stack.callback(path.write_text, usual)
            path.write_text("2")
            with live.tracing(*tracers):
                path.write_text(usual)          # it is the whole machine's: no longer than they need to find out
                connect(listener)
        for tracer in tracers:
            self.assertEqual((tracer.status, tracer.stderr), (0, "deeptcptracer: stacks have addresses, no names: the "
                             "kernel shows this user none (kernel.kptr_restrict, CAP_SYSLOG)\n"))
        for line in lines.objects:
            self.assertGreater(len(line["stack"]), 3)
            for frame in line["stack"]:
                self.assertRegex(frame, "^0x[0-9a-f]+$")
        self.assertRegex(text.stdout, "CLOSE_WAIT\n    0x[0-9a-f]+\n    0x")

    def test_by_io_uring(self):
        """Its worker and its poller have names of their own, but are threads of the process."""
        ways = "caller", "worker", "poller"
        tracers = [Tracer(*tool, "--json", "--netns", self.netns)
                   for tool in (("tcplife",), ("tcpv4connect",), CHANGES)]

        def visit():
            workload.set_comm("visitor")
            for way in ways:
                with socket.socket() as sock:
                    try:
                        uring_connect(sock, listener.getsockname(), way)
                    except OSError as error:
                        return "this kernel has no io_uring to connect: %s" % error
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers):
            pid, why = live.in_process(visit)
        if why:
            self.skipTest(why)
        for tracer in tracers:
            self.assertEqual([(line["pid"], line["comm"]) for line in tracer.objects if
                              line.get("role", "connect") == "connect" and line.get("oldstate", "CLOSE") == "CLOSE"],
                             [(pid, "visitor")] * len(ways), tracer.tool)

    def test_link_local_addresses(self):
        """With the interface: its name, or its number if it is in another namespace than the tool."""
        client, server, where = self.namespaces.client, self.namespaces.server, ("--json", "--netns", self.netns)
        commands = ["-n %s link add veth1 type veth peer name veth1 netns %s" % (client, server)]
        for namespace, address in (client, "fe80::1"), (server, "fe80::2"):
            commands.append("-n %s link set veth1 up" % namespace)
            commands += ["-n %s addr add %s/64 dev %s nodad" % (namespace, address, veth) for veth in VETHS]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        here, there = Tracer("tcplife", *where), Tracer("tcplife", *where)
        events, accepts = Tracer(*CHANGES, *where), Tracer("tcpaccept", "--json", "--netns", server)
        numbers = [socket.if_nametoindex(veth) for veth in VETHS]
        filtered = [Tracer(*CHANGES, *where, *options) for options in (
            ("-s", "fe80::1%" + VETHS[1]), ("-s", "fe80::1%%%d" % numbers[1]), ("-d", "fe80::2%" + VETHS[1]))]
        with contextlib.ExitStack() as stack:
            with live.network(server):
                stack.enter_context(there)
                listener = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6))
                peers = [socket.if_nametoindex(veth) for veth in VETHS]
            with live.tracing(here, events, accepts, *filtered):
                for number in numbers:
                    with socket.socket(socket.AF_INET6) as sock:
                        sock.bind(("fe80::1", 0, 0, number))
                        sock.connect(("fe80::2", listener.getsockname()[1], 0, number))
                        listener.accept()[0].close()

        def addresses(tracer, *names):
            return sorted({tuple(line[name] for name in names) for line in tracer.objects})

        def over(*interfaces):
            return [("fe80::1%%%s" % interface, "fe80::2%%%s" % interface) for interface in interfaces]
        self.assertEqual(addresses(here, "laddr", "raddr"), over(*VETHS))
        self.assertEqual(addresses(there, "laddr", "raddr"), over(*numbers))
        self.assertEqual(addresses(accepts, "raddr", "laddr"), over(*peers))
        self.assertEqual(addresses(events, "saddr", "daddr"), over(*VETHS))
        for tracer in filtered:
            self.assertEqual(addresses(tracer, "saddr", "daddr"), over(VETHS[1]))


class AtTheEnd(live.Alone):
    def test_events_while_the_tool_ends(self):
        """Sessions that are accepted meanwhile, and connects that are decided, are printed once."""
        count, seconds = 1500, 0.4 * live.SLOW
        tracers = [Tracer(tool, *options, "--json", "--netns", self.netns) for tool, *options in (
            ("tcplife",), ("tcplife",), ("tcpv4connect", "-r"), ("tcpv4connect", "-r"))]
        listener, deaf = (socket.create_server(("127.0.0.1", 0), backlog=4096) for _ in range(2))
        workload.deaf(deaf)
        port = deaf.getsockname()[1]

        def prepare(state):
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            state["pending"] = [socket.socket() for _ in range(count)]
            for sock in state["pending"]:
                sock.setblocking(False)
                sock.connect_ex(deaf.getsockname())
                workload.reset(socket.create_connection(listener.getsockname()))

        def decide(state):
            began = time.monotonic()
            for number, sock in enumerate(state["pending"]):
                listener.accept()[0].close()
                sock.close()
                time.sleep(max(0, began + seconds * number / count - time.monotonic()))
        actor = live.Actor([prepare, decide])
        with listener, deaf, live.tracing(*tracers):
            actor.do(0)
            os.write(actor.write, b"\1")                # as do(1), but this does not wait
            for tracer in tracers:
                time.sleep(seconds / 10)
                tracer.process.send_signal(signal.SIGINT)
            os.read(actor.read, 1)
            actor.end()
        *sessions, connects, other_connects = tracers
        for tracer in sessions:
            with self.subTest(tracer.tool):
                times = collections.Counter(line["rport"] for line in tracer.objects if line["role"] == "accept")
                self.assertEqual((len(times), set(times.values())), (count, {1}))
        for tracer in connects, other_connects:
            with self.subTest(tracer.tool):
                lines = [line for line in tracer.objects if line["dport"] == port]
                decided = collections.Counter(line["lport"] for line in lines if line["result"] == "quit")
                self.assertEqual((len(lines), set(decided.values())), (count, {1}))


if __name__ == "__main__":
    unittest.main()
