#!/usr/bin/python3
#
# tcpv4connect  Trace TCP IPv4 connects.
#               For Linux, uses bcc, eBPF.
#
# usage: tcpv4connect [-h] [-t] [-p PID] [-T] [-U] [-u UID] [-P PORT] [--json] [--netns NETNS] [--duration SECONDS]
#                     [--probes {tracepoint,kprobe}]
#
# One line an active connection that is attempted over IPv4: the process that called connect(), addresses and port. It
# may have failed afterwards. IPv4 from an IPv6 socket (v4-mapped addresses) is shown too, IPv6 is not.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), where a socket enters SYN_SENT.
# That happens in connect() itself, so the current process is the one that connects, and after a route has been found.
#
# CAVEATS: a connect() that finds no route never gets that far and is not shown. Subflows that Multipath TCP opens later
# are connects of a kernel thread.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":      # taken by stop_asked() only: nothing is interrupted half done, imports neither
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import ctypes
import fcntl
import functools
import json
import math
import mmap
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time

examples = """examples:
    ./tcpv4connect           # trace all TCP IPv4 connect()s
    ./tcpv4connect -t        # include timestamps
    ./tcpv4connect -p 181    # only trace PID 181
    ./tcpv4connect -P 80,443 # only trace ports 80 and 443
    ./tcpv4connect -u 1000   # only trace UID 1000
    ./tcpv4connect --json    # one JSON object a line
"""

KERNEL_TYPES = ["tcp_sock", "net"]
RING_PAGES = 512                # 2 MiB: 37,000 connects, more than a second of the fastest load measured
PERF_PAGES = 256                # a CPU, where there is no ring buffer
INTERVAL = 0.1                  # seconds between two looks at the ring buffer
BATCH = 1000                    # records that are printed between two looks at it, if there are more
MAX_PENDING = 1 << 26           # bytes that have been read and wait to be printed

bpf_text = r"""
#include <linux/tcp.h>
#include <net/net_namespace.h>
#include <net/sock.h>

struct event {
    u64 ts;                     /* bpf_ktime_get_ns() */
    u32 pid, uid, netns;
    u32 saddr, daddr;
    u16 dport, pad;
    char comm[TASK_COMM_LEN];
};

enum { LOST_EVENT, NOT_LOST, LOST_COUNTERS };

/*
 * The kernel lets no program interrupt itself (since 6.1): while one runs, it is skipped for what a softirq does, and
 * (in 7.2) for what a process does that has taken the CPU meanwhile. So two stand at a tracepoint, and the second
 * takes what the first has not seen. They cannot share a third by a tail call: since 6.13 that would have one stack a
 * CPU, and they do interrupt each other.
 */
#define SEEN_BITS 10
BPF_PERCPU_ARRAY(seen, u64, 1 << SEEN_BITS);    /* what is between the two, by its hash */
#ifdef RING_PAGES
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_F_TABLE("array", int, u64, lost, LOST_COUNTERS, BPF_F_MMAPABLE);
#else
BPF_PERF_OUTPUT(events);
BPF_ARRAY(lost, u64, LOST_COUNTERS);
#endif

static inline void count_lost(int what)
{
    u64 *n = lost.lookup(&what);

    if (n)
        __sync_fetch_and_add(n, 1);
}

static inline u64 *slot_of(u64 what)
{
    u32 slot = what * 0x9e3779b97f4a7c15 >> (64 - SEEN_BITS);

    return seen.lookup(&slot);
}

static inline void first_sees(u64 what)
{
    u64 *slot = slot_of(what);

    if (slot)
        *slot = what;
}

static inline bool first_has_seen(u64 what)
{
    u64 *slot = slot_of(what);

    if (slot && *slot == what) {
        *slot = 0;
        return true;
    }
    count_lost(NOT_LOST);
    return false;
}

static inline u32 netns_of(struct sock *sk)
{
    struct net *net = NULL;
    u32 inum = 0;

    bpf_probe_read_kernel(&net, sizeof(net), &sk->__sk_common.skc_net.net);
    bpf_probe_read_kernel(&inum, sizeof(inum), &net->ns.inum);
    return inum;
}

/* MPTCP's own sockets and SCTP's report their states here too; MPTCP's subflows are TCP. */
static inline u16 protocol_of(struct sock *sk)
{
    u16 protocol = IPPROTO_TCP;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and MPTCP came with 5.6 */
    bpf_probe_read_kernel(&protocol, sizeof(protocol), &sk->sk_protocol);
#endif
    return protocol;
}

static inline bool is_ipv4(struct sock_common *c)
{
    u32 daddr[4];

    if (c->skc_family == AF_INET)
        return true;
    __builtin_memcpy(daddr, &c->skc_v6_daddr, sizeof(daddr));
    return c->skc_family == AF_INET6 && !daddr[0] && !daddr[1] && daddr[2] == htonl(0xffff);
}

static inline void emit(void *ctx, struct event *e)
{
#ifdef RING_PAGES
    /* Nobody is woken: the reader comes by itself. */
    if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
        count_lost(LOST_EVENT);
#else
    if (events.perf_submit(ctx, e, sizeof(*e)))
        count_lost(LOST_EVENT);
#endif
}

/* tcp_v4_connect() has put the addresses into the socket; the source port comes after this. */
static inline void state_change(void *ctx, struct sock *sk, int newstate)
{
    struct event e = {};
    struct sock_common c;

    if (newstate != TCP_SYN_SENT)
        return;
    e.pid = bpf_get_current_pid_tgid() >> 32;
    e.uid = bpf_get_current_uid_gid();
    if ((FILTER_PID && e.pid != FILTER_PID) || (FILTER_BY_UID && e.uid != FILTER_UID))
        return;
    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    e.dport = ntohs(c.skc_dport);
    if (!is_ipv4(&c) || !IS_WANTED_PORT(e.dport) || protocol_of(sk) != IPPROTO_TCP)
        return;
    e.netns = netns_of(sk);
    if (FILTER_NETNS && e.netns != FILTER_NETNS)
        return;
    e.ts = bpf_ktime_get_ns();
    e.saddr = c.skc_rcv_saddr;
    e.daddr = c.skc_daddr;
    bpf_get_current_comm(&e.comm, sizeof(e.comm));
    emit(ctx, &e);
}

#ifdef KPROBE_STATE
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
    state_change(ctx, sk, state);
    return 0;
}
#else
/* The socket, whose address begins with 0xff, and its new state. */
static inline u64 change_of(struct bpf_raw_tracepoint_args *ctx)
{
    return ctx->args[0] ^ ctx->args[2] << 56;
}

int tracepoint_set_state_first(struct bpf_raw_tracepoint_args *ctx)
{
    first_sees(change_of(ctx));
    state_change(ctx, (struct sock *)ctx->args[0], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx)
{
    if (!first_has_seen(change_of(ctx)))
        state_change(ctx, (struct sock *)ctx->args[0], ctx->args[2]);
    return 0;
}
#endif
"""

PROGRAM = "tcpv4connect"

# One record of the ring: the kernel's 8-byte header (length and flags, page offset), then struct event.
RECORD = struct.Struct("=IIQIII4s4sHH16s")


# arguments

def pid(text):
    if not re.fullmatch("[0-9]{1,7}", text, re.ASCII) or not 0 < int(text) <= 1 << 22:
        raise argparse.ArgumentTypeError("not a process ID: %r" % text)
    return int(text)


def ports(text):
    """Comma-separated port numbers as a list of int."""
    numbers = text.split(",")
    if not all(re.fullmatch("[0-9]{1,5}", n, re.ASCII) and 0 < int(n) < 65536 for n in numbers):
        raise argparse.ArgumentTypeError("not a comma-separated list of ports: %r" % text)
    return [int(n) for n in numbers]


def uid(text):
    if not re.fullmatch("[0-9]{1,10}", text, re.ASCII) or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError("not a user ID: %r" % text)
    return int(text)


def seconds(text):
    if not re.fullmatch("([0-9]{1,9}[.]?|[0-9]{0,9}[.][0-9]{1,9})", text, re.ASCII) or float(text) == 0:
        raise argparse.ArgumentTypeError("not a number of seconds: %r" % text)
    return float(text)


def netns(text):
    """Inode number of a network namespace, given as such, as a path or as a name that ip netns knows."""
    if re.fullmatch("[0-9]{1,10}", text, re.ASCII) and 0 < int(text) < 1 << 32:
        return int(text)
    ns_get_nstype, clone_newnet = 0xb703, 0x40000000        # include/uapi/linux/nsfs.h, sched.h
    try:
        with open(text if "/" in text else os.path.join("/run/netns", text), "rb") as namespace:
            if fcntl.ioctl(namespace, ns_get_nstype) == clone_newnet:
                return os.fstat(namespace.fileno()).st_ino
    except (OSError, ValueError):
        pass
    raise argparse.ArgumentTypeError("not a network namespace: %r" % text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trace TCP IPv4 connects",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    parser.add_argument("-t", "--timestamp", action="store_true", help="include timestamp on output")
    parser.add_argument("-p", "--pid", type=pid, help="trace this PID only")
    parser.add_argument("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    parser.add_argument("-U", "--print-uid", action="store_true", help="include UID on output")
    parser.add_argument("-u", "--uid", type=uid, help="trace this UID only")
    parser.add_argument("-P", "--port", type=ports, help="comma-separated list of destination ports to trace.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with exact times")
    parser.add_argument("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    parser.add_argument("--duration", metavar="SECONDS", type=seconds, help="end after this time")
    parser.add_argument("--probes", choices=("tracepoint", "kprobe"),
                        help="use this kind of probe (default: the tracepoint where the kernel has it)")
    return parser.parse_args(argv)


# loading

def die(message):
    sys.exit("%s: %s" % (PROGRAM, message))


def kernel_version():
    return tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])


def has_ring_buffer():
    return kernel_version() >= (5, 8)


def has_raw_tracepoint():
    """Raw tracepoints came with 4.17, one release after sock:inet_sock_set_state."""
    return kernel_version() >= (4, 17)


def may_trace():
    """Whether the capabilities suffice: CAP_SYS_ADMIN (21), or CAP_PERFMON (38) and CAP_BPF (39) since Linux 5.8."""
    with open("/proc/self/status") as status:
        caps = int(re.search("CapEff:\\s*([0-9a-f]+)", status.read()).group(1), 16)
    return bool(caps >> 21 & 1) or caps >> 38 & 3 == 3


def import_bcc():
    try:
        import bcc
    except (ImportError, OSError):
        for python in ("/usr/bin/python3", "/usr/local/bin/python3", "/usr/libexec/platform-python"):
            if os.path.exists(python) and not subprocess.run([python, "-I", "-c", "import bcc"],
                                                             stderr=subprocess.DEVNULL).returncode:
                die("%s has no bcc module, but %s has: start it with that one" % (sys.executable, python))
        die("the bcc module for Python is not installed: install python3-bpfcc (Debian, Ubuntu), "
            "python3-bcc (Fedora, RHEL) or python-bcc (Arch)")
    return bcc


def has_kernel_headers():
    modules = os.path.join("/lib/modules", os.uname().release)
    return "BCC_KERNEL_SOURCE" in os.environ or any(os.path.exists(path) for path in (
        os.path.join(modules, "build"), os.path.join(modules, "source"), "/sys/kernel/kheaders.tar.xz"))


@contextlib.contextmanager
def kernel_types():
    """While this context lasts, bcc finds the kernel's types: in its BTF, or else in the installed headers."""
    with contextlib.ExitStack() as stack:
        try:
            sys.dont_write_bytecode = True
            from btfheaders import kernel_source
            stack.enter_context(kernel_source(KERNEL_TYPES))
        except (ImportError, OSError) as error:
            if not has_kernel_headers():
                die("no kernel types (%s): install linux-headers-%s (Debian, Ubuntu) or kernel-devel (Fedora, RHEL)"
                    % (error, os.uname().release))
        yield


@contextlib.contextmanager
def held_stderr():
    """libbcc explains itself on stderr, at length: hold that back and give its last words to the exception."""
    saved, held = os.dup(2), os.memfd_create("stderr")
    os.dup2(held, 2)
    try:
        yield
    except Exception as error:
        os.lseek(held, 0, os.SEEK_SET)
        words = os.read(held, 1 << 20).decode(errors="replace").split("\n")
        said = [line.strip() for line in words if re.search("error|fail|denied|not permitted", line, re.IGNORECASE)]
        raise RuntimeError(": ".join([str(error)] + said[:1])) from error
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(held)


def kprobe_sides(args):
    """Which probes are kprobes, as names that the C text knows."""
    return {"KPROBE_STATE"} if args.probes == "kprobe" or not has_raw_tracepoint() else set()


def any_of(numbers):
    """C expression that is true for a port among these, for all ports if there are none."""
    return " || ".join("(port) == %d" % n for n in numbers) if numbers else "true"


def cflags(args):
    """The arguments as macros of the C text; only numbers get there."""
    macros = {
        "FILTER_PID": args.pid or 0,
        "FILTER_BY_UID": int(args.uid is not None),
        "FILTER_UID": args.uid or 0,
        "FILTER_NETNS": args.netns or 0,
        "IS_WANTED_PORT(port)": any_of(args.port),
    }
    macros.update((side, 1) for side in kprobe_sides(args))
    if has_ring_buffer():
        macros["RING_PAGES"] = RING_PAGES
    return ["-g0"] + ["-D%s=(%s)" % item for item in macros.items()]     # nobody debugs it: a tenth of the start


def attach_set_state(bpf):
    import bcc
    tracepoint = "inet_sock_set_state"
    bpf.attach_raw_tracepoint(tp=tracepoint, fn_name="tracepoint_set_state_first")
    # bcc attaches but one program to a raw tracepoint
    second = bpf.load_func("tracepoint_set_state_second", bcc.BPF.RAW_TRACEPOINT)
    if bcc.lib.bpf_attach_raw_tracepoint(second.fd, tracepoint.encode()) < 0:
        raise OSError("Failed to attach BPF to raw tracepoint")


def attach(bpf, args):
    if kprobe_sides(args):
        bpf.attach_kprobe(event="tcp_set_state", fn_name="kprobe_set_state")
    else:
        attach_set_state(bpf)


def let_go_of_llvm():
    """The compiler has done its work: give back its heap, and its code, which comes from the file again if need be."""
    libc, madv_dontneed = ctypes.CDLL(None), 4
    if hasattr(libc, "malloc_trim"):        # glibc
        libc.malloc_trim(0)
    with open("/proc/self/maps") as maps:
        for start, end in re.findall("(?m)^(\\w+)-(\\w+) r-xp .*/lib(?:LLVM|clang|bcc)", maps.read()):
            start, end = int(start, 16), int(end, 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), madv_dontneed)


def load(args):
    """Compile, load and attach; the BPF object."""
    if not may_trace():
        die("needs root, or the capabilities CAP_BPF and CAP_PERFMON")
    bcc = import_bcc()
    try:
        with kernel_types(), held_stderr():
            bpf = bcc.BPF(text=bpf_text, cflags=cflags(args))
            attach(bpf, args)
    except Exception as error:
        die("cannot trace: %s" % error)
    let_go_of_llvm()
    return bpf


# reading

def open_ring(bpf):
    """A function that returns what the ring holds, as bytes of whole records.

    bcc's own reader calls back into Python once an event. The layout of the ring is the kernel's ABI
    (Documentation/bpf/ringbuf.rst): a page with the consumer's position, one with the producer's, and the data, mapped
    twice in a row so that no record is ever split.
    """
    page, size = mmap.PAGESIZE, RING_PAGES * mmap.PAGESIZE
    consumer = mmap.mmap(bpf["events"].map_fd, page)
    ring = memoryview(mmap.mmap(bpf["events"].map_fd, page + 2 * size, prot=mmap.PROT_READ, offset=page))
    position, produced, data = ctypes.c_ulong.from_buffer(consumer), ring[:8].cast("L"), ring[page:]

    def read():
        start = position.value & size - 1
        records = data[start:start + produced[0] - position.value]
        for n, length in enumerate(records.cast("I")[::RECORD.size // 4]):
            if length != RECORD.size - 8:       # another CPU is still writing this one
                records = records[:n * RECORD.size]
                break
        taken = bytes(records)
        position.value += len(taken)        # from now on the kernel may write there
        return taken
    return read


def open_perf(bpf):
    """The same from a perf buffer, for kernels before 5.8."""
    records, header = [], bytes(8)

    def on_event(_cpu, data, _size):
        records.append(header + ctypes.string_at(data, RECORD.size - 8))

    # What does not fit is counted by the probe, whose perf_submit() fails.
    bpf["events"].open_perf_buffer(on_event, page_cnt=PERF_PAGES, lost_cb=lambda count: None)

    def read():
        records.clear()
        bpf.perf_buffer_poll(0)
        return b"".join(records)
    return read


@functools.lru_cache(maxsize=None)
def mapped_counters(bpf):
    """What has been lost, in memory that the kernel writes to.

    A look into a map by bpf(2) would cost events itself: if another process takes the CPU meanwhile, the kernel runs no
    kprobe for that one (bpf_disable_instrumentation(), include/linux/bpf.h).
    """
    return memoryview(mmap.mmap(bpf["lost"].map_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)).cast("Q")


def losses(bpf):
    """How often each kind of loss has happened since the start, as {what: count}."""
    missed = 0
    for name, function in bpf.funcs.items():
        if name.endswith(b"_second"):
            continue        # what only this was skipped for is not lost
        with open("/proc/self/fdinfo/%d" % function.fd) as info:        # the line exists since Linux 5.12
            missed += sum(int(n) for n in re.findall("recursion_misses:\\s*([0-9]+)", info.read()))
    lost = mapped_counters(bpf) if has_ring_buffer() else [count.value for count in bpf["lost"].values()]
    return {"connects lost: the ring buffer was full": lost[0],
            "state changes lost: the kernel did not run the probe": missed - lost[1]}


# output

@functools.lru_cache(maxsize=1024)
def address(packed):
    return socket.inet_ntop(socket.AF_INET, packed)


@functools.lru_cache(maxsize=1024)
def printable(comm):
    """Any user may put any bytes into comm: all but printable ASCII is shown as \\xNN, and a backslash as two."""
    return comm.partition(b"\0")[0].decode("latin-1").encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=16)
def clock(second):
    return time.strftime("%H:%M:%S", time.localtime(second))


def column_names(args):
    names = ["PID", "COMM", "SADDR", "DADDR", "DPORT"]
    return ["TIME"] * args.time + ["TIME(s)"] * args.timestamp + ["UID"] * args.print_uid + names


def columns(args, record, began, wall):
    """The values for column_names(). began: when tracing began, wall: what makes Unix time of the kernel's, both ns."""
    _, _, ts, pid, uid, _, saddr, daddr, dport, _, comm = record
    row = pid, printable(comm), address(saddr), address(daddr), dport
    if args.print_uid:
        row = (uid,) + row
    if args.timestamp:
        row = ("%.3f" % (max(0, ts - began) / 1e9),) + row
    if args.time:
        row = (clock((ts + wall) // 10 ** 9),) + row
    return row


def json_object(args, record, wall):
    _, _, ts, pid, uid, netns, saddr, daddr, dport, _, comm = record
    fields = {"ts": (ts + wall) / 1e9, "pid": pid,
              "comm": comm.partition(b"\0")[0].decode(errors="surrogateescape"),
              "saddr": address(saddr), "daddr": address(daddr), "dport": dport, "netns": netns}
    if args.print_uid:
        fields["uid"] = uid
    return fields


def form_of(args):
    """The format of a line of text."""
    form = "%-6s %-12.12s %-16s %-16s %s\n"
    return args.time * "%-8s " + args.timestamp * "%-8s " + args.print_uid * "%-5s " + form


def render(args, records, began):
    """Whole lines for these records."""
    wall = time.time_ns() - time.monotonic_ns()     # each time anew: the clock may be set meanwhile
    if args.json:
        return "".join([json.dumps(json_object(args, record, wall)) + "\n" for record in records])
    form = form_of(args)
    return "".join([form % columns(args, record, began, wall) for record in records])


def write(text):
    """Print all of it now. Raises KeyboardInterrupt if a signal comes while the reader of the output stands still."""
    data = memoryview(text.encode("ascii"))
    while data:
        if select.select([], [1], [], INTERVAL)[1]:
            data = data[os.write(1, data[:select.PIPE_BUF]):]       # so much fits, and does not block
        elif signal.sigpending() & STOP_SIGNALS:
            raise KeyboardInterrupt


def stop_asked():
    """Whether a signal has come that ends the tool."""
    # Not sigtimedwait() with a time: in CPython, it returns nonsense if SIGSTOP and SIGCONT have outlasted that.
    return signal.sigpending() & STOP_SIGNALS and signal.sigtimedwait(STOP_SIGNALS, 0)


def report(lost, told, form="%s: %d %s"):
    """Tell on stderr what has been lost and not been told; what has been told now."""
    for what, count in lost.items():
        if count > told.get(what, 0):
            print(form % (PROGRAM, count - told.get(what, 0), what), file=sys.stderr, flush=True)
    return lost


def trace(args, bpf):
    """Print connects until a signal comes, the time is over or nobody reads any more."""
    read = open_ring(bpf) if has_ring_buffer() else open_perf(bpf)
    began, told = time.monotonic_ns(), {}
    end = began + args.duration * 1e9 if args.duration else math.inf
    if not args.json:
        write(form_of(args) % tuple(column_names(args)))
    hangup = select.poll()
    hangup.register(1, 0)
    pending, stop = bytearray(), False
    while pending or not stop:
        if not stop:
            if not pending:
                time.sleep(max(0, min(INTERVAL, (end - time.monotonic_ns()) / 1e9)))
            stop = stop_asked() or time.monotonic_ns() >= end or hangup.poll(0)
            if stop or len(pending) < MAX_PENDING:
                pending += read()       # at once, and print it by and by: reading is much faster
        records = list(RECORD.iter_unpack(pending[:BATCH * RECORD.size]))
        del pending[:len(records) * RECORD.size]
        if records:
            write(render(args, records, began))
            told = report(losses(bpf), told)
    report(losses(bpf), told)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    args = parse_args()
    if sys.stdout is None or sys.stderr is None:        # their numbers would be given to a map
        die("standard output or standard error is closed")
    bpf = load(args)
    try:
        trace(args, bpf)
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        print("%s: the output was not read to its end" % PROGRAM, file=sys.stderr)
    except OSError as error:
        die("cannot write the output: %s" % error.strerror)


if __name__ == "__main__":
    main()
