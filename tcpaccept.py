#!/usr/bin/python3
#
# tcpaccept  Trace TCP accepts.
#            For Linux, uses bcc, eBPF.
#
# usage: tcpaccept [-h] [-t] [-p PID] [-T] [-P PORT] [-4 | -6] [-r] [--cgroupmap PATH] [--mntnsmap PATH] [--json]
#                  [--netns NETNS] [--duration SECONDS] [--probes {tracepoint,kprobe}] [--ebpf] [--version]
#
# Prints one line per passive connection that a process has accepted: the process that called accept(), not the one that
# listens, and the addresses. Connections that nobody accepts are not shown.
#
# Traces security_sock_graft() (kprobe), which accept() calls with the new socket, or else the exits of the accept() and
# accept4() system calls, whose descriptor leads to the socket.
#
# CAVEATS: while a tracepoint of a system call is on, every system call on the machine costs up to 80 ns more. These
# exits do not cover io_uring and 32-bit programs, which the kprobe does.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}      # the last one for --duration
if __name__ == "__main__":      # blocked from here on and polled in trace(): no signal interrupts an import or a line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import ctypes
import fcntl
import functools
import json
import mmap
import os
import re
import select
import socket
import struct
import sys
import time

sys.dont_write_bytecode = True
try:
    from btfheaders import compiled     # kernel types without kernel headers, and a compiler that is quick and quiet
except ImportError:
    def compiled(_types, compile_it):   # without it, an ordinary bcc program that needs kernel headers
        return compile_it()

examples = """examples:
    ./tcpaccept           # trace all TCP accept()s
    ./tcpaccept -t        # include timestamps
    ./tcpaccept -p 181    # only trace PID 181
    ./tcpaccept -P 80,81  # only trace local ports 80 and 81
    ./tcpaccept -r        # include the remote port
    ./tcpaccept --json    # one JSON object per line
    ./tcpaccept --cgroupmap /sys/fs/bpf/set   # only trace the cgroups in this pinned map
    ./tcpaccept --mntnsmap /sys/fs/bpf/set    # only trace the mount namespaces in this pinned map
"""

PROGRAM = "tcpaccept"
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "files_struct", "fdtable", "file", "socket", "inet_bind_bucket",
                "nsproxy"]
RECENT = 1024                   # connections per CPU that are remembered as accepted
RING_PAGES = (4 << 20) // mmap.PAGESIZE if KERNEL >= (5, 8) else 0      # 4 MiB: a second of the fastest load measured
PERF_PAGES = (1 << 20) // mmap.PAGESIZE         # per CPU, where there is no ring buffer
HARMLESS = b"_second", b"_destroy"              # skipping a program whose name ends like this loses nothing
LOSSES = ["accepts lost: the ring buffer was full", "accepts lost: another thread had closed the socket already",
          "accepts lost: the kernel did not run the probe"]

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/tcp.h>
#include <net/inet_hashtables.h>
#include <net/sock.h>

/* A member of a kernel object. */
#define READ(p, member) ({                                                  \
    typeof((p)->member) value;                                              \
    bpf_probe_read_kernel(&value, sizeof(value), &(p)->member);             \
    value;                                                                  \
})

struct owner {
    u32 pid;                    /* 0: not known */
    char comm[TASK_COMM_LEN];
};

struct event {                  /* as RECORD below */
    u64 ts;                     /* bpf_ktime_get_ns() */
    struct owner owner;
    u32 netns;
    u32 laddr[4], raddr[4];     /* IPv4 as ::ffff:a.b.c.d */
    u16 lport, rport;
    u32 pad;
};

/* A socket's memory is reused, but each time with another initial sequence number. */
struct connection {
    u64 sk;
    u64 isn;
};

enum { LOST_EVENT, LOST_SOCKET, RESCUED, COUNTERS };            /* as LOSSES above */

BPF_HASH(recent, struct connection, u8, 2 * RECENT * CPUS);
BPF_PERCPU_ARRAY(order, struct connection, RECENT);     /* the same in order, to forget the oldest */
BPF_PERCPU_ARRAY(next, u32, 1);
BPF_ARRAY(lost, u64, COUNTERS);
#if RING_PAGES
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
#else
BPF_PERF_OUTPUT(events);
#endif

static inline void count_lost(int what)
{
    u64 *n = lost.lookup(&what);

    if (n)
        __sync_fetch_and_add(n, 1);
}

/*
 * Since 7.0 a program can be preempted, and the kernel skips it for the process that preempts it. So there is a second
 * program, which handles what the first was skipped for. What the first has handled is marked until the second has run.
 */
#if PREEMPTIBLE
BPF_TABLE("lru_hash", u64, u8, marks, 1 << 14);         /* not per CPU: a preempted process may move to another one */

static inline bool is_mine(void *ctx, u64 event, bool first)
{
    u8 one = 1;

    if (first)
        marks.update(&event, &one);
    else if (!marks.delete(&event))
        return false;
    else
        count_lost(RESCUED);
    return true;
}
#else
#define is_mine(ctx, event, first) true      /* accept() runs in no interrupt, and only the first is attached */
#endif

static inline u16 protocol_of(struct sock *sk)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and no MPTCP */
    return READ(sk, sk_protocol);
#else
    return IPPROTO_TCP;
#endif
}

/* accept() returns sockets of other kinds too: Unix, SCTP, ... */
static inline bool is_tcp(struct sock *sk)
{
    u16 protocol = protocol_of(sk), family = READ(sk, __sk_common.skc_family);

    return (family == AF_INET || family == AF_INET6) && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

static inline void read_endpoints(struct event *e, struct sock *sk)
{
    struct sock_common c;

    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    if (c.skc_family == AF_INET) {
        e->laddr[2] = e->raddr[2] = htonl(0xffff);
        e->laddr[3] = c.skc_rcv_saddr;
        e->raddr[3] = c.skc_daddr;
    } else {
        __builtin_memcpy(e->laddr, &c.skc_v6_rcv_saddr, sizeof(e->laddr));
        __builtin_memcpy(e->raddr, &c.skc_v6_daddr, sizeof(e->raddr));
    }
    /* skc_num is 0 once the socket has left the port's hash table, which is before CLOSE. inet_sport stays. */
    e->lport = ntohs(READ((struct inet_sock *)sk, inet_sport));
    e->rport = ntohs(c.skc_dport);
}

/* To be called only where the current process is the one that uses the socket. */
static inline void set_owner(struct owner *o)
{
#if PIDNS
    struct bpf_pidns_info ns = {};

    bpf_get_ns_current_pid_tgid(PIDNS_DEV, PIDNS, &ns, sizeof(ns));
    o->pid = ns.tgid;           /* 0 for a process of another namespace */
#else
    o->pid = bpf_get_current_pid_tgid() >> 32;
#endif
    bpf_get_current_comm(&o->comm, sizeof(o->comm));
}

static inline void accepted(void *ctx, struct sock *sk)
{
    struct event e = {};
    bool ipv4;

    if (!is_tcp(sk) || container_should_be_filtered())
        return;
    set_owner(&e.owner);
    e.netns = READ(READ(sk, __sk_common.skc_net.net), ns.inum);
    read_endpoints(&e, sk);
    ipv4 = !e.raddr[0] && !e.raddr[1] && e.raddr[2] == htonl(0xffff);
    if ((FILTER_PID && e.owner.pid != FILTER_PID) || (FILTER_NETNS && e.netns != FILTER_NETNS) ||
        (FILTER_IP && ipv4 != (FILTER_IP == 4)) || !IS_WANTED_PORT(e.lport))
        return;
    e.ts = bpf_ktime_get_ns();
#if RING_PAGES
    if (events.ringbuf_output(&e, sizeof(e), BPF_RB_NO_WAKEUP))     /* no wake-up: the reader polls */
#else
    if (events.perf_submit(ctx, &e, sizeof(e)))
#endif
        count_lost(LOST_EVENT);
}

/* security_sock_graft() is called in accept() with the new socket, by io_uring too. */
int kprobe_accept(struct pt_regs *ctx, struct sock *sk) { accepted(ctx, sk); return 0; }

struct syscall_exit {
    u64 common;
    long nr, ret;
};

/* The socket behind a descriptor of the current process; NULL if it is already closed, or no longer a socket. */
static inline struct sock *socket_of(long fd)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct file **files, *file = NULL;
    struct socket *socket;

    if (fd < 0)
        return NULL;
    files = READ(READ(READ(task, files), fdt), fd);
    bpf_probe_read_kernel(&file, sizeof(file), &files[fd]);
    socket = READ(file, private_data);
    return file && READ(socket, file) == file ? READ(socket, sk) : NULL;
}

/* Whether this connection is newly accepted: another thread may have put an older one behind the descriptor. */
static inline bool is_new(struct sock *sk)
{
    struct tcp_sock *tp = (struct tcp_sock *)sk;
    struct connection key = {.sk = (u64)sk}, *oldest;
    int zero = 0;
    u8 one = 1;
    u32 *n;

    if (protocol_of(sk) != IPPROTO_TCP)
        return true;
    key.isn = READ(tp, snd_una) - (u32)READ(tp, bytes_acked);
    if (recent.insert(&key, &one) == -EEXIST)
        return false;
    n = next.lookup(&zero);
    oldest = n ? order.lookup(n) : NULL;
    if (oldest) {
        recent.delete(oldest);
        *oldest = key;
        *n = (*n + 1) % RECENT;
    }
    return true;
}

/* A port that connect() chose is in a bucket marked as such: this socket came from connect(), not from accept(). */
static inline bool has_connected(struct sock *sk)
{
    struct inet_bind_bucket *bucket = READ((struct inet_connection_sock *)sk, icsk_bind_hash);

    return bucket && (signed char)READ(bucket, fastreuse) < 0;
}

static inline int accept_returned(struct syscall_exit *ctx, bool first)
{
    struct sock *sk;

    if (!is_mine(ctx, bpf_get_current_pid_tgid(), first) || ctx->ret < 0)
        return 0;
    sk = socket_of(ctx->ret);
    if (sk && !is_tcp(sk))
        return 0;
    if (sk && READ(sk, __sk_common.skc_dport) && !has_connected(sk) && is_new(sk))
        accepted(ctx, sk);
    else
        count_lost(LOST_SOCKET);
    return 0;
}

int tracepoint_accept_first(struct syscall_exit *ctx) { return accept_returned(ctx, true); }
int tracepoint_accept_second(struct syscall_exit *ctx) { return accept_returned(ctx, false); }
"""

# struct event, behind the ring buffer's own header of a record (length and flags, page offset)
RECORD = struct.Struct("=8xQ20sI16s16sHH4x")
TEXT = "%%-6s %%-12.12s %%-2s %%-16s %s%%-16s %%s\n"
JSON = '{"ts":%.6f,%s,"ip":%d,"laddr":"%s","lport":%d,"raddr":"%s","rport":%d,"netns":%d}\n'


def number(low, high, kind=int):
    """Returns a converter for argparse: a number from low to high in plain digits, as an int or a float."""
    def number(text):
        if not re.fullmatch(r"\d+" if kind is int else r"\d*\.?\d+", text, re.A) or not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError("not a number from %s to %s: %r" % (low, high, text))
        return kind(text)
    return number


def process(text):
    """Returns a process ID. The process need not exist yet, but a thread is refused."""
    pid = number(1, 1 << 22)(text)
    with contextlib.suppress(OSError), open("/proc/%d/status" % pid, "rb") as status:
        leader = int(status.read().split(b"\nTgid:")[1].split()[0])
        if leader != pid:
            raise argparse.ArgumentTypeError("%d is a thread of process %d" % (pid, leader))
    return pid


def netns(text):
    """Returns the inode number of a network namespace, given as such, as a path or as a name from `ip netns list`."""
    if text.isdecimal():
        return number(1, 0xffffffff)(text)
    path = text if "/" in text else "/run/netns/" + text
    with contextlib.suppress(OSError), open(path, opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        if fcntl.ioctl(file, 0xb703) == 0x40000000:         # NS_GET_NSTYPE, CLONE_NEWNET
            return os.fstat(file.fileno()).st_ino
    raise argparse.ArgumentTypeError("not a network namespace: %r" % text)


def pinned_map(text):
    """Returns the path of a pinned BPF map, in characters that can stand in the C text."""
    if not re.fullmatch("/[A-Za-z0-9_./-]+", text) or not os.path.exists(text):
        raise argparse.ArgumentTypeError("not the path of a pinned BPF map: %r" % text)
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace TCP accepts",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    family, add = parser.add_mutually_exclusive_group(), parser.add_argument
    add("-t", "--timestamp", action="store_true", help="include timestamp on output")
    add("-p", "--pid", type=process, help="trace this PID only")
    add("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    add("-P", "--port", type=lambda text: [number(1, 65535)(port) for port in text.split(",")],
        help="comma-separated list of local ports to trace.")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    add("-r", "--rport", action="store_true", help="include the remote port on output")
    add("--cgroupmap", metavar="PATH", type=pinned_map, help="trace cgroups in this BPF map only")
    add("--mntnsmap", metavar="PATH", type=pinned_map, help="trace mount namespaces in this BPF map only")
    add("--json", action="store_true", help="print one JSON object per line, with exact times")
    add("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    add("--duration", metavar="SECONDS", type=number(0.001, 1e9, float), help="exit after this many seconds")
    add("--probes", choices=("tracepoint", "kprobe"),
        help="use this kind of probe only (default: the kprobe where the kernel has kprobes)")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit
    args = parser.parse_args(argv)
    args.form = args.time * "%-8s " + args.timestamp * "%-8s " + TEXT % ("%-5s " if args.rport else "%.0s")
    return args


def pid_namespace():
    """Returns macros for the PID namespace in which the tool runs: 0 for the initial one."""
    namespace = os.stat("/proc/self/ns/pid")
    is_initial = namespace.st_ino == 0xeffffffc         # PROC_PID_INIT_INO, include/linux/proc_ns.h
    if KERNEL < (5, 7) and not is_initial:
        print("%s: before Linux 5.7 the PIDs are the host's, not this PID namespace's" % PROGRAM, file=sys.stderr)
    return {"PIDNS": 0 if is_initial or KERNEL < (5, 7) else namespace.st_ino, "PIDNS_DEV": os.minor(namespace.st_dev)}


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    macros = {
        **pid_namespace(),
        "PREEMPTIBLE": int(KERNEL >= (7, 0)),
        "RING_PAGES": RING_PAGES,
        "RECENT": RECENT,
        "CPUS": os.sysconf("SC_NPROCESSORS_CONF"),
        "FILTER_PID": args.pid or 0,
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IP": 4 * args.ipv4 + 6 * args.ipv6,
        "IS_WANTED_PORT(port)": " || ".join("(port) == %d" % port for port in args.port or []) or "true",
    }
    return ["-g0"] + ["-D%s=(%s)" % item for item in macros.items()]    # no debug information: starts 10 % faster


def attach_accept(bpf, args):
    """Attaches to security_sock_graft(), or else to the exits of the system calls."""
    if args.probes != "tracepoint":
        try:
            return bpf.attach_kprobe(event="security_sock_graft", fn_name="kprobe_accept")
        except Exception:       # no kprobes, or no CONFIG_SECURITY_NETWORK
            if args.probes == "kprobe":
                raise
    for fn_name in ["tracepoint_accept_first"] + ["tracepoint_accept_second"] * (KERNEL >= (7, 0)):
        bpf.attach_tracepoint(tp="syscalls:sys_exit_accept4", fn_name=fn_name)
        bpf.attach_tracepoint(tp="syscalls:sys_exit_accept", fn_name=fn_name)


def c_text(args):
    """Returns the C text with bcc's function container_should_be_filtered(), if there is a bcc."""
    with contextlib.suppress(ImportError):
        from bcc.containers import filter_by_containers
        return filter_by_containers(args) + bpf_text
    return bpf_text


def attach(bcc, args):
    """Returns the BPF object, compiled, loaded and attached."""
    bpf = bcc.BPF(text=c_text(args), cflags=cflags(args))
    attach_accept(bpf, args)
    return bpf


def load(args):
    """Returns what attach() returns, or exits with one line that says what to do."""
    if sys.stdout is None or sys.stderr is None:        # else a BPF map would become descriptor 1 or 2
        sys.exit("%s: standard output or standard error is closed" % PROGRAM)
    try:
        import bcc
        return compiled(KERNEL_TYPES, lambda: attach(bcc, args))
    except ImportError as error:
        sys.exit("%s: %s: %s has no bcc: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora)"
                 % (PROGRAM, error, sys.executable))
    except Exception as error:
        sys.exit("%s: cannot trace: %s" % (PROGRAM, error))


def open_events(bpf, record):
    """Returns a function that returns the records since its last call, as bytes. record: their struct.Struct.

    bcc would call back into Python once per record. The layout of a ring buffer is the kernel's ABI (see
    Documentation/bpf/ringbuf.rst): a page with the consumer's position, one with the producer's, then the data, mapped
    twice in a row so that no record is ever split.
    """
    if not RING_PAGES:
        records = []
        bpf["events"].open_perf_buffer(
            lambda cpu, data, size: records.append(bytes(8) + ctypes.string_at(data, record.size - 8)),
            page_cnt=PERF_PAGES, lost_cb=lambda count: None)        # the probe has counted them

        def poll():
            records.clear()
            bpf.perf_buffer_poll(0)
            return b"".join(records)
        return poll

    page, size = mmap.PAGESIZE, RING_PAGES * mmap.PAGESIZE
    consumer = mmap.mmap(bpf["events"].map_fd, page)
    ring = memoryview(mmap.mmap(bpf["events"].map_fd, page + 2 * size, prot=mmap.PROT_READ, offset=page))
    position, produced, data = ctypes.c_ulong.from_buffer(consumer), ring[:8].cast("L"), ring[page:]

    def read():
        start, end = position.value & size - 1, produced[0]
        time.sleep(0)           # gives up Python's lock and takes it again, in place of libbpf's memory barrier
        records = data[start:start + end - position.value]
        lengths = records.cast("I")[::record.size // 4].tolist()
        # A length with a flag in it: another CPU is still writing that record.
        whole = next((n for n, length in enumerate(lengths) if length != record.size - 8), len(lengths))
        time.sleep(0)
        taken = bytes(records[:whole * record.size])
        time.sleep(0)
        position.value += len(taken)            # from now on the kernel may write there
        return taken
    return read


def losses(bpf):
    """Returns {what was lost: how often since the start}."""
    skipped = 0                 # how often a program was not run because it was running already (since Linux 5.12)
    for name, function in bpf.funcs.items():
        if not name.endswith(HARMLESS):
            with open("/proc/self/fdinfo/%d" % function.fd) as info:
                skipped += sum(int(n) for n in re.findall(r"recursion_misses:\s*(\d+)", info.read()))
    *counts, rescued = (count.value for count in bpf["lost"].values())      # read last: skipped comes before rescued
    return dict(zip(LOSSES, [*counts, skipped - rescued]))


@functools.lru_cache(maxsize=1024)
def address(packed):
    """Returns the text of 16 bytes, in which IPv4 is ::ffff:a.b.c.d."""
    if packed.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


@functools.lru_cache(maxsize=1024)
def owner_text(packed):
    """Returns PID, COMM and JSON members of struct owner. comm can be any bytes: all but plain text is escaped."""
    pid, comm = struct.unpack("=I16s", packed)
    if not pid:
        return "N/A", "N/A", '"pid":null,"comm":null'
    comm = comm.partition(b"\0")[0]
    text = comm.decode(errors="backslashreplace")
    if not text.isprintable():          # I-JSON has no noncharacters
        text = comm.decode("ascii", errors="backslashreplace")
    comm_hex = "" if text.encode() == comm else ',"comm_hex":"%s"' % comm.hex()
    return (pid, comm.decode("latin-1").encode("unicode_escape").decode("ascii"),
            '"pid":%d,"comm":%s%s' % (pid, json.dumps(text), comm_hex))


def header(args):
    names = ("TIME",) * args.time + ("TIME(s)",) * args.timestamp
    return "" if args.json else args.form % (*names, "PID", "COMM", "IP", "RADDR", "RPORT", "LADDR", "LPORT")


def line(args, record, start, wall):
    """Returns one line. start: of the first accept, wall: offset of the kernel's clock from Unix time, both in ns."""
    ts, owner, netns, laddr, raddr, lport, rport = record
    pid, comm, members = owner_text(owner)
    laddr, raddr = address(laddr), address(raddr)
    ip = 6 if ":" in raddr else 4
    if args.json:
        return JSON % ((ts + wall) / 1e9, members, ip, laddr, lport, raddr, rport, netns)
    row = (pid, comm, ip, raddr, rport, laddr, lport)
    if args.timestamp:
        row = ("%.3f" % (max(0, ts - start) / 1e9), *row)
    if args.time:
        row = (time.strftime("%H:%M:%S", time.localtime((ts + wall) // 10 ** 9)), *row)
    return args.form % row


def write(text):
    """Prints all of it now. Returns True if the tool is to stop and nobody has read for a second."""
    data = memoryview(text.encode())
    while data:
        if select.select([], [1], [], 1)[1]:
            data = data[os.write(1, data[:select.PIPE_BUF]):]       # so much never blocks
        elif signal.sigpending() & STOP_SIGNALS:
            print("%s: the output was not read to its end" % PROGRAM, file=sys.stderr)
            return True


def report(lost, reported, form="%s: %d %s"):
    """Prints the losses that have not been reported yet. Returns what has now been reported."""
    for what, count in lost.items():
        if count > reported.get(what, 0):
            with contextlib.suppress(OSError):          # standard error has no reader
                os.write(2, (form % (PROGRAM, count - reported.get(what, 0), what) + "\n").encode())
    return lost


def trace(args, bpf):
    """Prints accepts until a signal comes, the time is up or the reader of the output has gone."""
    read, reader, start, reported, stop = open_events(bpf, RECORD), select.poll(), 0, {}, False
    reader.register(1, 0)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    write(header(args))
    while not stop:
        time.sleep(0.1)         # seconds that a line may be late
        stop = signal.sigpending() & STOP_SIGNALS or reader.poll(0)
        records = list(RECORD.iter_unpack(read()))
        start = start or (records and records[0][0])
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        stop = write("".join([line(args, record, start, wall) for record in records])) or stop
        reported = report(losses(bpf), reported)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # for --help and --ebpf
        args = parse_args()
        if args.ebpf:
            return print("/* %s */\n%s" % (" ".join(cflags(args)), c_text(args)))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        trace(args, load(args))
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit("%s: cannot write the output: %s" % (PROGRAM, error.strerror))


if __name__ == "__main__":
    main()
