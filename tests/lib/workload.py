#!/usr/bin/python3
"""Known TCP sessions of known processes: what a tracer must report.

usage: workload.py [-r ROUNDS] [-n CLIENTNS:SERVERNS:IPV4,IPV6] [SCENARIO ...]

A scenario is a row of the table SCENARIOS: what happens, and what a tracer has to say of it.

Every client and every server is a separate process with its own name. Each logs what it did; the log is printed
as one JSON object per end of a session:

    scenario, role ("client" or "server"), pid, comm, ip (4 or 6), laddr, lport, raddr, rport, sent, received (bytes),
    netns (inode), born, died (each a pair of CLOCK_MONOTONIC seconds between which it happened), failed (errno name or
    null, of a connect() that did not succeed), connected (seconds that connect() took, as a pair), accepted (a
    pair of CLOCK_MONOTONIC seconds, around accept()), end (as tcplife says it), err (errno name or null)

v4-mapped addresses are logged as IPv4, which is what goes over the wire.
"""
import argparse
import contextlib
import ctypes
import errno
import json
import math
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing

REQUEST, REPLY = 1000, 3000             # bytes
PAUSE = 0.06                            # seconds: longer than a delayed ACK
CLOSE, CLOSING = 7, 11                  # include/net/tcp_states.h
WORKERS = 3
SLOW = float(os.environ.get("SLOW", "1"))               # how much slower this machine is than a real one
TIMEOUT = 20 * SLOW                     # seconds after which a scenario that hangs is given up
LANES = 3 if SLOW == 1 else 1           # scenarios of a family that run at once: they sleep most of the time

# The families: the address that the server listens on, what the client connects to, and the socket family of each.
# {0}: the server's IPv4 address, {1}: its IPv6 address.
FAMILIES = {
    "v4": (socket.AF_INET, "{0}", socket.AF_INET, "{0}"),
    "v6": (socket.AF_INET6, "{1}", socket.AF_INET6, "{1}"),
    "dual": (socket.AF_INET6, "::", socket.AF_INET, "{0}"),
    "mapped": (socket.AF_INET, "{0}", socket.AF_INET6, "::ffff:{0}"),
}


def own_address(pid):
    """Returns a loopback address that no other process uses which chooses its own in this way."""
    return "127.%d.%d.%d" % (64 + (pid >> 16), pid >> 8 & 255, pid & 255)


OWN = own_address(os.getpid())


class Run:
    """One scenario in one family: where it logs, and in which network namespaces it runs."""

    def __init__(self, log, scenario, family, hosts=(OWN, "::1"), nowhere=("", ""), namespaces=(None, None)):
        """hosts: the server's addresses. nowhere: addresses to which the server's host has no route."""
        self.log, self.scenario, self.family = log, scenario, family
        self.server_family, listen_on, self.client_family, connect_to = FAMILIES[family]
        self.listen_on, self.connect_to = listen_on.format(*hosts), connect_to.format(*hosts)
        self.nowhere = connect_to.format(*nowhere)
        self.client_ns, self.server_ns = namespaces

    def write(self, **record):
        record = dict(scenario=self.scenario, family=self.family, **record)
        os.write(self.log, (json.dumps(record) + "\n").encode())


def now():
    return time.monotonic()


def set_comm(name):
    with open("/proc/thread-self/comm", "w") as comm:
        comm.write(name)


def get_comm():
    with open("/proc/thread-self/comm") as comm:
        return comm.read().rstrip("\n")


def enter(namespace):
    if namespace:
        with open("/run/netns/" + namespace) as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")


def spawn(name, namespace, work, *args):
    """Run work(*args) in a new process of this name. Returns its PID."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(math.ceil(TIMEOUT))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        enter(namespace)
        set_comm(name)
        work(*args)
        status = 0
    except BaseException as error:      # nothing of the parent may run in the child
        sys.stderr.write("workload: %s: %r\n" % (name, error))
        sys.stderr.flush()
    os._exit(status)


def endpoints(sock):
    """Returns the addresses of a connected socket, v4-mapped ones as IPv4. Raises OSError once the peer has reset."""
    names = [(name[0][7:] if name[0].startswith("::ffff:") else name[0], name[1])
             for name in (sock.getsockname(), sock.getpeername())]
    return {"ip": 6 if ":" in names[1][0] else 4, "laddr": names[0][0], "lport": names[0][1],
            "raddr": names[1][0], "rport": names[1][1]}


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


FILTER = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))         # keeps 0 bytes of a packet


def deaf(sock):
    """Drop what arrives for this socket from now on."""
    attach_filter = 26
    sock.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HxxxxxxP", 1, ctypes.addressof(FILTER)))


def hear(sock):
    detach_filter = 27
    sock.setsockopt(socket.SOL_SOCKET, detach_filter, 0)


def await_state(sock, *states):
    """Return once the socket is in one of these states (include/net/tcp_states.h)."""
    while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] not in states:
        time.sleep(0.01)


def send(sock, count):
    sock.sendall(b"x" * count)
    return count


def receive(sock, count=None):
    """Read count bytes, or until the peer's end. Returns how many came."""
    total = 0
    try:
        while count is None or total < count:
            data = sock.recv(count - total if count else 65536)
            if not data:
                break
            total += len(data)
    except OSError:             # reset, aborted or timed out
        pass
    return total


def identity():
    return {"pid": os.getpid(), "comm": get_comm(), "netns": os.stat("/proc/self/ns/net").st_ino}


def finish(run, role, sock, record, action):
    """End the connection by action(sock) and log it."""
    began = now()
    action(sock)
    run.write(role=role, died=[began, now()], **record)


# the two sides

def connect(run, port):
    """Returns a connected socket and what is known of it so far."""
    sock = socket.socket(run.client_family, socket.SOCK_STREAM)
    began = now()
    sock.connect((run.connect_to, port))
    ended = now()
    return sock, dict(identity(), born=[began, ended], connected=[ended - began] * 2, failed=None, sent=0, received=0,
                      **endpoints(sock))


def accept(listener, how):
    began = now()
    sock = how(listener)
    return sock, dict(identity(), accepted=[began, now()], failed=None, sent=0, received=0, **endpoints(sock))


def client(run, port, ending):
    """One request, one reply, then the ending."""
    sock, record = connect(run, port)
    record.update(sent=send(sock, REQUEST), received=receive(sock, REPLY))
    ending(run, "client", sock, record)


def serve(run, listener, ending, how=lambda listener: listener.accept()[0]):
    """The other side of client()."""
    sock, record = accept(listener, how)
    record.update(received=receive(sock, REQUEST), sent=send(sock, REPLY))
    ending(run, "server", sock, record)


# The endings, of either side: ending(run, role, sock, record)

def first(action):
    """Returns the ending of the side that ends the connection: action(sock), once the reply has got there."""
    def ending(run, role, sock, record):
        time.sleep(2 * PAUSE if role == "server" else PAUSE)
        finish(run, role, sock, record, action)
    return ending


def first_by(death):
    """The same, by the end of the process: death()."""
    def ending(run, role, sock, record):
        time.sleep(2 * PAUSE if role == "server" else PAUSE)
        run.write(role=role, died=[now(), now() + PAUSE * SLOW], **record)
        death()
    return ending


close, abort = first(socket.socket.close), first(reset)
leave, die = first_by(lambda: os._exit(0)), first_by(lambda: os.kill(os.getpid(), signal.SIGKILL))


def follow(run, role, sock, record):
    """Close when the other side has ended."""
    receive(sock)
    finish(run, role, sock, record, socket.socket.close)


def half_close(run, role, sock, record):
    """The client has nothing more to send, and the server replies once more."""
    if role == "client":
        time.sleep(PAUSE)
        sock.shutdown(socket.SHUT_WR)
        record["received"] += receive(sock)
        run.write(role=role, died=[now(), now()], **record)         # both have sent their FIN: it is over
        sock.close()
    else:
        receive(sock)
        record["sent"] += send(sock, REPLY)
        time.sleep(PAUSE)
        finish(run, role, sock, record, socket.socket.close)


def listen(run):
    listener = socket.socket(run.server_family, socket.SOCK_STREAM)
    if run.server_family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((run.listen_on, 0))
    listener.listen(128)
    return listener


def start_server(run, work, *args, prepare=lambda listener: None):
    """Fork a process that listens and then runs work(listener, *args). Returns its PID and port."""
    reader, writer = os.pipe()

    def server():
        with listen(run) as listener:
            prepare(listener)
            os.write(writer, b"%d\n" % listener.getsockname()[1])
            work(listener, *args)
    pid = spawn("srv-" + run.scenario[:11], run.server_ns, server)
    os.close(writer)
    with os.fdopen(reader) as lines:
        return pid, int(lines.readline())


@contextlib.contextmanager
def pipe():
    """Yields (reader, writer); both are closed afterwards."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def wait(*pids):
    for pid in pids:
        os.waitpid(pid, 0)


# the scenarios

def one_to_one(client_ending, server_ending):
    """Returns a scenario of one client and one server."""
    def scenario(run):
        server, port = start_server(run, lambda listener: serve(run, listener, server_ending))
        wait(spawn("cli-" + run.scenario[:11], run.client_ns, client, run, port, client_ending), server)
    return scenario


def workers(client_ending):
    """Returns a scenario in which one process listens and others accept. The clients end first."""
    def scenario(run):
        def master(listener):
            wait(*[spawn("worker%d" % n, None, serve, run, listener, follow) for n in range(WORKERS)])
        server, port = start_server(run, master)
        wait(*[spawn("cli-worker%d" % n, run.client_ns, client, run, port, client_ending) for n in range(WORKERS)],
             server)
    return scenario


def threads(run):
    """Several threads of one process on each side, each with its own name."""
    def all_at_once(name, work, *args):
        def thread(number):
            set_comm("%s-thread%d" % (name, number))
            work(run, *args)
        crowd = [threading.Thread(target=thread, args=(n,)) for n in range(WORKERS)]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
    server, port = start_server(run, lambda listener: all_at_once("srv", serve, listener, close))
    wait(spawn("clients", run.client_ns, all_at_once, "cli", client, port, follow), server)


def early(client_ending):
    """Returns a scenario in which the client is gone before the server calls accept()."""
    def scenario(run):
        with pipe() as (reader, writer), pipe() as (addresses, address):
            def visitor(port):
                sock, record = connect(run, port)
                record["sent"] = send(sock, REQUEST)
                client_ending(run, "client", sock, record)
                os.write(address, json.dumps(record).encode())
                os.write(writer, b"x")

            def server(listener):
                os.read(reader, 1)
                time.sleep(PAUSE)
                began = now()
                sock = listener.accept()[0]
                accepted = [began, now()]
                seen = json.loads(os.read(addresses, 4096))
                record = dict(identity(), accepted=accepted, failed=None, sent=0, ip=seen["ip"], laddr=seen["raddr"],
                              lport=seen["rport"], raddr=seen["laddr"], rport=seen["lport"],
                              received=receive(sock) or REQUEST)
                finish(run, "server", sock, record, socket.socket.close)
            pid, port = start_server(run, server)
            wait(spawn("cli-" + run.scenario, run.client_ns, visitor, port), pid)
    return scenario


def unaccepted(run):
    """The server exits without having called accept(): the kernel resets the connections that wait."""
    with pipe() as (reader, writer), pipe() as (addresses, address):
        def visitor(port):
            sock, record = connect(run, port)
            record["sent"] = send(sock, REQUEST)
            time.sleep(PAUSE)
            os.write(address, json.dumps(record).encode())
            os.write(writer, b"x")
            receive(sock)
            finish(run, "client", sock, record, socket.socket.close)

        def server(listener):
            os.read(reader, 1)
            seen = json.loads(os.read(addresses, 4096))
            record = dict(identity(), failed=None, sent=0, ip=seen["ip"], laddr=seen["raddr"], lport=seen["rport"],
                          raddr=seen["laddr"], rport=seen["lport"], received=REQUEST)
            finish(run, "server", listener, record, socket.socket.close)
        pid, port = start_server(run, server)
        wait(spawn("cli-unaccepted", run.client_ns, visitor, port), pid)


def attempt(run, address, how):
    """Log a connection that how(sock, address) attempts in vain."""
    sock = socket.socket(run.client_family, socket.SOCK_STREAM)
    sock.bind(("", 0))          # so that its port is known
    port, began, failed = sock.getsockname()[1], now(), None
    try:
        how(sock, address)
    except OSError as error:
        failed = errno.errorcode[error.errno]
    remote = address[0].replace("::ffff:", "")
    run.write(role="client", born=[began, began], died=[began, now()], failed=failed, sent=0, received=0,
              ip=6 if ":" in remote else 4, laddr=None, lport=port, raddr=remote, rport=address[1], **identity())
    sock.close()


def stop_listening(listener):
    """But keep the port: a client that was given it would reach itself."""
    address = listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.bind(address)


def attempts(how, prepare=deaf):
    """Returns a scenario in which a client tries how(sock, address) on a listener that prepare() has made useless."""
    def scenario(run):
        server, port = start_server(run, lambda listener: signal.pause(), prepare=prepare)
        wait(spawn("cli-" + run.scenario[:11], run.client_ns, attempt, run, (run.connect_to, port), how))
        os.kill(server, signal.SIGKILL)
        wait(server)
    return scenario


def time_out(sock, address):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 700)           # milliseconds
    sock.connect(address)


def give_up(sock, address):
    sock.setblocking(False)
    sock.connect_ex(address)
    time.sleep(PAUSE)
    sock.close()


def unreachable(run):
    """The server's host has no route to this network, and reports that."""
    wait(spawn("cli-unreachable", run.client_ns, attempt, run, (run.nowhere, 9), socket.socket.connect))


def together(server_side, client_side, prepare=lambda listener: None):
    """Returns a scenario of a server and a client that wait for each other's steps.

    server_side(run, listener, step, wait_for) and client_side(run, port, step, wait_for): step() reports that this
    side has got there, wait_for() waits for the other's step().
    """
    def scenario(run):
        with pipe() as (client_reader, server_writer), pipe() as (server_reader, client_writer):
            server, port = start_server(
                run, lambda listener: server_side(run, listener, lambda: os.write(server_writer, b"x"),
                                                  lambda: os.read(server_reader, 1)), prepare=prepare)
            wait(spawn("cli-" + run.scenario[:11], run.client_ns, client_side, run, port,
                       lambda: os.write(client_writer, b"x"), lambda: os.read(client_reader, 1)), server)
    return scenario


def open_client(run, port):
    sock, record = connect(run, port)
    record.update(sent=send(sock, REQUEST), received=receive(sock, REPLY))
    return sock, record


def open_server(run, listener):
    sock, record = accept(listener, lambda listener: listener.accept()[0])
    record.update(received=receive(sock, REQUEST), sent=send(sock, REPLY))
    return sock, record


def usual_client(run, port, *_):
    client(run, port, close)


def slow_server(run, listener, *_):
    """Hears only the second SYN, which the client sends after a second."""
    time.sleep(5 * PAUSE)
    hear(listener)
    serve(run, listener, follow)


def late_server(run, listener, *_):
    time.sleep(5 * PAUSE)
    serve(run, listener, follow)


def reset_server(run, listener, *_):
    """The client ends it with a RST."""
    sock, record = open_server(run, listener)
    receive(sock)
    await_state(sock, CLOSE)
    finish(run, "server", sock, record, socket.socket.close)


def unread_client(run, port, *_):
    """Has not read the reply when it closes."""
    sock, record = connect(run, port)
    record.update(sent=send(sock, REQUEST), received=REPLY)
    sock.recv(REPLY, socket.MSG_PEEK | socket.MSG_WAITALL)
    finish(run, "client", sock, record, socket.socket.close)


def unread_after_shutdown(run, port, *_):
    sock, record = connect(run, port)
    record.update(sent=send(sock, REQUEST), received=REPLY)
    sock.recv(REPLY, socket.MSG_PEEK | socket.MSG_WAITALL)
    sock.shutdown(socket.SHUT_WR)
    time.sleep(PAUSE)
    finish(run, "client", sock, record, socket.socket.close)


def killed_client(run, port, *_):
    """Somebody ends it by `ss -K`."""
    sock, record = open_client(run, port)
    time.sleep(PAUSE)
    finish(run, "client", sock, record, lambda sock: subprocess.run(
        ["ss", "-tK", "sport = :%d and dport = :%d" % (record["lport"], record["rport"])], check=True,
        stdout=subprocess.DEVNULL))


def late_talker(run, listener, *_):
    """Sends to a client that has closed."""
    sock, record = open_server(run, listener)
    receive(sock)
    time.sleep(PAUSE)
    finish(run, "server", sock, record, lambda sock: (sock.send(b"x"), await_state(sock, CLOSE)))


def unheard_client(run, port, step, wait_for):
    """Sends what is never acknowledged."""
    sock, record = open_client(run, port)
    wait_for()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)           # milliseconds
    sock.send(b"x")
    finish(run, "client", sock, record, receive)
    step()


def unhearing_server(run, listener, step, wait_for):
    sock, record = open_server(run, listener)
    time.sleep(PAUSE)
    deaf(sock)
    step()
    wait_for()
    hear(sock)
    finish(run, "server", sock, record, lambda sock: (sock.shutdown(socket.SHUT_WR), await_state(sock, CLOSE)))


def crossing_client(run, port, step, wait_for):
    """Both send their FIN before they hear the other's."""
    sock, record = open_client(run, port)
    time.sleep(PAUSE)
    deaf(sock)
    step()
    wait_for()
    sock.shutdown(socket.SHUT_WR)
    step()
    wait_for()
    hear(sock)
    finish(run, "client", sock, record, lambda sock: await_state(sock, CLOSE))


def crossing_server(run, listener, step, wait_for):
    sock, record = open_server(run, listener)
    time.sleep(PAUSE)
    deaf(sock)
    step()
    wait_for()
    wait_for()
    sock.shutdown(socket.SHUT_WR)
    hear(sock)
    await_state(sock, CLOSING)
    time.sleep(PAUSE)               # a FIN that does not acknowledge the client's may still be on its way
    step()
    finish(run, "server", sock, record, lambda sock: await_state(sock, CLOSE))


def uring_accept(listener, direct=False):
    """Returns a connection that io_uring accepts from the listener. Raises OSError if this kernel has no io_uring.

    direct: it has no descriptor and lives in the ring, whose descriptor is returned.
    """
    setup, enter, register, op_accept = 425, 426, 427, 13   # the numbers of most architectures
    sq_ring, cq_ring, sqes = 0, 0x8000000, 0x10000000       # what to map, include/uapi/linux/io_uring.h
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    ring = libc.syscall(setup, 1, params)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    sq_tail, sq_array = (struct.unpack_from("=I", params, 40 + offset)[0] for offset in (4, 24))
    cq_entries = struct.unpack_from("=I", params, 80 + 20)[0]
    with mmap.mmap(ring, sq_array + 4, offset=sq_ring) as queue, mmap.mmap(ring, 64, offset=sqes) as entry, \
            mmap.mmap(ring, cq_entries + 32, offset=cq_ring) as done:
        struct.pack_into("=BBHi", entry, 0, op_accept, 0, 0, listener.fileno())
        if direct:
            libc.syscall(register, ring, 2, ctypes.byref(ctypes.c_int(-1)), 1)         # files: one that is not there
            struct.pack_into("=I", entry, 44, 1)            # file_index: the first of them
        struct.pack_into("=I", queue, sq_array, 0)
        struct.pack_into("=I", queue, sq_tail, 1)
        if libc.syscall(enter, ring, 1, 1, 1, None, 0) < 0:             # submit one, wait for one
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        result = struct.unpack_from("=Qi", done, cq_entries)[1]
    if direct and not result:
        return ring
    os.close(ring)
    if result < 0:
        raise OSError(-result, "accept")
    return socket.socket(fileno=result)


def io_uring(run):
    """The server accepts by io_uring; the client ends first."""
    def server(listener):
        serve(run, listener, follow, uring_accept)
    pid, port = start_server(run, server)
    wait(spawn("cli-io_uring", run.client_ns, client, run, port, close), pid)


class Scenario(typing.NamedTuple):
    """What happens, and what a tracer has to say of it."""

    play: typing.Callable               # play(run)
    client_end: str                     # how it ends for the client, as tcplife says it
    server_end: str = ""                # and for the server; "": there is no session there
    server_err: str = ""                # the server's error, if it is not that of such an end
    over: str = "own step"              # when it is over for a side: see sessions()
    accepted: str = "open"              # how the connection is when accept() returns it; "": nobody calls accept()
    pairs: int = 1                      # of a client and a server
    group: str = "usual"


SCENARIOS = {
    "server_close": Scenario(one_to_one(follow, close), "remote", "local"),
    "client_close": Scenario(one_to_one(close, follow), "local", "remote"),
    "client_reset": Scenario(one_to_one(abort, follow), "abort", "reset", over="first step"),
    "server_reset": Scenario(one_to_one(follow, abort), "reset", "abort", over="first step"),
    "half_close": Scenario(one_to_one(half_close, half_close), "local", "remote", over="server's step"),
    "client_exit": Scenario(one_to_one(leave, follow), "local", "remote"),
    "server_exit": Scenario(one_to_one(follow, leave), "remote", "local"),
    "client_kill": Scenario(one_to_one(die, follow), "local", "remote"),
    "server_kill": Scenario(one_to_one(follow, die), "remote", "local"),
    "workers_close": Scenario(workers(close), "local", "remote", pairs=WORKERS),
    "workers_reset": Scenario(workers(abort), "abort", "reset", over="first step", pairs=WORKERS),
    "threads": Scenario(threads, "remote", "local", pairs=WORKERS),
    "early_close": Scenario(early(close), "local", "remote"),
    "early_reset": Scenario(early(abort), "abort", "reset", over="first step", accepted="over"),
    "unaccepted": Scenario(unaccepted, "reset", "abort", over="first step", accepted=""),
    "refused": Scenario(attempts(socket.socket.connect, stop_listening), "refused"),
    # These take seconds, and the last one needs namespaces.
    "timeout": Scenario(attempts(time_out), "timeout", group="slow"),
    "quit": Scenario(attempts(give_up), "quit", group="slow"),
    "slow_connect": Scenario(together(slow_server, usual_client, deaf), "local", "remote", group="slow"),
    "late_accept": Scenario(together(late_server, usual_client), "local", "remote", group="slow"),
    "unread": Scenario(together(reset_server, unread_client), "abort", "reset", over="first step", group="slow"),
    "unread_shutdown": Scenario(together(reset_server, unread_after_shutdown), "abort", "reset", over="first step",
                                server_err="EPIPE", group="slow"),          # a RST after the peer's FIN
    "killed": Scenario(together(reset_server, killed_client), "killed", "reset", over="first step", group="slow"),
    "late_send": Scenario(together(late_talker, usual_client), "local", "reset", server_err="EPIPE", group="slow"),
    "unheard": Scenario(together(unhearing_server, unheard_client), "timeout", "reset", group="slow"),
    "both": Scenario(together(crossing_server, crossing_client), "local", "both", group="slow"),
    "unreachable": Scenario(unreachable, "unreachable", group="slow"),
    # A kernel may lack io_uring, or a way to trace it.
    "io_uring": Scenario(io_uring, "local", "remote", group="io_uring"),
}
USUAL, ENDS = ([name for name, scenario in SCENARIOS.items() if scenario.group == group] for group in ("usual", "slow"))
ERRORS = {"reset": "ECONNRESET", "refused": "ECONNREFUSED", "timeout": "ETIMEDOUT", "killed": "ECONNABORTED"}


def scenario_of(record):
    return SCENARIOS[record["scenario"]]


def used(log):
    """Returns the records of connections that existed and that the process of the record has used before their end."""
    return [record for record in log
            if record["laddr"] and (record["role"] == "client" or scenario_of(record).accepted == "open")]


def work(scenarios=tuple(USUAL), rounds=1, **where):
    """Run the scenarios in all families, the families in parallel. Returns the log as a list of dicts.

    where: as of a Run.
    """
    with tempfile.TemporaryFile() as file:
        log = os.dup(file.fileno())
        os.set_inheritable(log, True)
        # O_APPEND, so that many processes may write to it
        log = os.open("/proc/self/fd/%d" % log, os.O_WRONLY | os.O_APPEND)

        def play(family, some):
            signal.alarm(0)
            for _ in range(rounds):
                for scenario in some:
                    SCENARIOS[scenario].play(Run(log, scenario, family, **where))
        lanes = [list(scenarios)[lane::LANES] for lane in range(LANES)]
        for pid in [spawn("family-" + family, None, play, family, some) for family in FAMILIES for some in lanes]:
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError("the workload has failed")
        os.close(log)
        file.seek(0)
        records = [json.loads(line) for line in file]
    expected = sum(SCENARIOS[name].pairs * (2 if SCENARIOS[name].server_end else 1) for name in scenarios)
    if len(records) != expected * len(FAMILIES) * rounds:
        raise RuntimeError("the workload has failed: %d sessions, not %d" % (
            len(records), expected * len(FAMILIES) * rounds))
    return records


def sessions(log):
    """Returns the log with born and died of both ends combined: the times between which the kernel saw them."""
    ends = {}
    for record in log:
        ends.setdefault(frozenset([(record["laddr"], record["lport"]), (record["raddr"], record["rport"])]),
                        []).append(record)
    for records in ends.values():
        scenario = scenario_of(records[0])
        born = next(record["born"] for record in records if "born" in record)
        steps = {record["role"]: record["died"] for record in records}          # the last of each side
        last = max(step[1] for step in steps.values())
        for record in records:
            is_server = record["role"] == "server"
            record["end"] = scenario.server_end if is_server else scenario.client_end
            record["err"] = record["failed"] or (is_server and scenario.server_err) or ERRORS.get(record["end"])
            if scenario.over == "first step":
                record["died"] = [min(step[moment] for step in steps.values()) for moment in (0, 1)]
            else:
                # The end that closes first is done when the peer has acknowledged that, at the latest when the peer
                # closes. After a half close, the server's close() ends it for the client, which may learn of it late.
                record["died"] = [steps["server" if scenario.over == "server's step" else record["role"]][0], last]
            record["born"] = born
    return log


def main():
    parser = argparse.ArgumentParser(description="Known TCP sessions by known processes.")
    parser.add_argument("-r", "--rounds", type=int, default=1)
    parser.add_argument("-n", "--namespaces", help="CLIENTNS:SERVERNS:IPV4,IPV6 (the server's)")
    parser.add_argument("scenarios", nargs="*", default=USUAL, metavar="SCENARIO")
    args = parser.parse_args()
    where = {"hosts": ("127.0.0.1", "::1")}
    if args.namespaces:
        client_ns, server_ns, hosts = args.namespaces.split(":", 2)
        where = {"namespaces": (client_ns, server_ns), "hosts": hosts.split(",")}
    for record in sessions(work(args.scenarios, args.rounds, **where)):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
