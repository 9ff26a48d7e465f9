#!/usr/bin/python3
#
# tcpv4connect  Trace TCP IPv4 connects.
#               For Linux, uses bcc, eBPF.
#
# usage: tcpv4connect [-h] [-t] [-p PID] [-T] [-U] [-u UID] [-P PORT] [-r] [--failed] [--json] [--netns NETNS]
#                     [--duration SECONDS] [--probes {tracepoint,kprobe}] [--ebpf] [--version]
#
# Prints one line for each active IPv4 connection that a process attempts: when it starts, or with -r when its result is
# known. IPv4 from an IPv6 socket (v4-mapped addresses) is shown too, IPv6 is not.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), where a socket enters SYN_SENT
# and, with -r, leaves it, and tcp:tcp_destroy_sock. It enters inside connect(), after a route has been found, so the
# current process is the one that connects.
#
# CAVEATS: a connect() that finds no route never gets that far and is not shown.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}      # the last one for --duration
if __name__ == "__main__":      # blocked from here on and polled in trace(): no signal interrupts an import or a line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import ctypes
import errno
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
    ./tcpv4connect           # trace all TCP IPv4 connect()s
    ./tcpv4connect -t        # include timestamps
    ./tcpv4connect -p 181    # only trace PID 181
    ./tcpv4connect -P 80,443 # only trace ports 80 and 443
    ./tcpv4connect -r        # show whether they succeed, and after how long
    ./tcpv4connect --json    # one JSON object per line
"""

PROGRAM = "tcpv4connect"
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
KERNEL_TYPES = ["tcp_sock", "net"]
MAX_ATTEMPTS = 1 << 17          # connects under way at once, with -r: 17 MB of kernel memory
RING_PAGES = (4 << 20) // mmap.PAGESIZE if KERNEL >= (5, 8) else 0      # 4 MiB: a second of the fastest load measured
PERF_PAGES = (1 << 20) // mmap.PAGESIZE         # per CPU, where there is no ring buffer
HARMLESS = b"_second", b"_destroy"              # skipping a program whose name ends like this loses nothing
LOSSES = ["connects lost: the ring buffer was full", "connects lost: the map of attempts was full",
          "connects lost: their result was not seen", "state changes lost: the kernel did not run the probe"]

bpf_text = r"""
#include <linux/tcp.h>
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
    u32 uid, netns;
    u32 saddr, daddr;
    u16 dport, lport;
    u64 decided;                /* 0: not yet */
    s64 result;                 /* 0: connected, an errno, -1: given up, -2: connect() has failed at once */
};

enum { LOST_EVENT, LOST_ATTEMPT, LOST_RESULT, RESCUED, COUNTERS };      /* as LOSSES above */

BPF_HASH(attempts, struct sock *, struct event, MAX_ATTEMPTS);          /* not decided yet, with RESULTS */
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
 * The kernel skips a program that is already running on this CPU: for a process that preempts it (since 7.0) and for a
 * softirq that interrupts it, which matters to RESULTS only. For these there is a second program, which handles what
 * the first was skipped for. What the first has handled is marked until the second has run.
 */
#if TWO_PROGRAMS
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
#define is_mine(ctx, event, first) true      /* connect() runs in no interrupt, and only the first is attached */
#endif

/* MPTCP's own sockets and SCTP's report their states here too; MPTCP's subflows are TCP. */
static inline u16 protocol_of(struct sock *sk)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and no MPTCP */
    return READ(sk, sk_protocol);
#else
    return IPPROTO_TCP;
#endif
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

static inline void output(void *ctx, struct event *e)
{
#if RING_PAGES
    if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))     /* no wake-up: the reader polls */
#else
    if (events.perf_submit(ctx, e, sizeof(*e)))
#endif
        count_lost(LOST_EVENT);
}

/* newstate: 0 when the socket is destroyed */
static inline void decide(void *ctx, struct sock *sk, int newstate)
{
    struct event *attempt = attempts.lookup(&sk), e;

    if (!attempt || newstate == TCP_SYN_RECV)       /* both ends have called connect() */
        return;
    e = *attempt;
    attempts.delete(&sk);
    /* Destroyed, or another socket at this address by now: the result was not seen. */
    if (!newstate || newstate == TCP_SYN_SENT || e.dport != ntohs(READ(sk, __sk_common.skc_dport)))
        return count_lost(LOST_RESULT);
    e.decided = bpf_ktime_get_ns();
    e.lport = ntohs(READ((struct inet_sock *)sk, inet_sport));
    /* No error: close() or shutdown(), or connect() itself failed, for lack of a port for example. */
    if (newstate != TCP_ESTABLISHED)
        e.result = READ(sk, sk_err) ?: READ((struct tcp_sock *)sk, segs_out) ? -1 : -2;
    if (e.result || !ONLY_FAILED)
        output(ctx, &e);
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    struct event e = {};
    struct sock_common c;
    u32 *daddr6 = c.skc_v6_daddr.in6_u.u6_addr32;

    if (RESULTS && (newstate == TCP_SYN_SENT || oldstate == TCP_SYN_SENT || oldstate == TCP_SYN_RECV))
        decide(ctx, sk, newstate);
    if (newstate != TCP_SYN_SENT || protocol_of(sk) != IPPROTO_TCP)
        return;
    /* tcp_v4_connect() has put the addresses into the socket; the source port comes later. */
    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    if (c.skc_family != AF_INET && (daddr6[0] || daddr6[1] || daddr6[2] != htonl(0xffff)))
        return;
    set_owner(&e.owner);
    e.uid = bpf_get_current_uid_gid();
    e.netns = READ(c.skc_net.net, ns.inum);
    e.dport = ntohs(c.skc_dport);
    if ((FILTER_PID && e.owner.pid != FILTER_PID) || (FILTER_NETNS && e.netns != FILTER_NETNS) ||
        !IS_WANTED_UID(e.uid) || !IS_WANTED_PORT(e.dport))
        return;
    e.ts = bpf_ktime_get_ns();
    e.saddr = c.skc_rcv_saddr;
    e.daddr = c.skc_daddr;
    if (!RESULTS)
        output(ctx, &e);
    else if (attempts.update(&sk, &e))
        count_lost(LOST_ATTEMPT);
}

static inline int set_state(struct bpf_raw_tracepoint_args *ctx, bool first)
{
    /* An event is a socket and its new state, which goes into the top byte of the address, always 0xff. */
    if (is_mine(ctx, ctx->args[0] ^ ctx->args[2] << 56, first))
        state_change(ctx, (struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_first(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, true); }
int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, false); }
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx) { decide(ctx, (struct sock *)ctx->args[0], 0); return 0; }

int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int newstate)
{
    state_change(ctx, sk, READ(sk, __sk_common.skc_state), newstate);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk) { decide(ctx, sk, 0); return 0; }
"""

# struct event, behind the ring buffer's own header of a record (length and flags, page offset)
RECORD = struct.Struct("=8xQ20sII4s4sHHQq")
RESULTS = "ok", "failed", "quit"        # 0, -2, -1
ipv4 = functools.lru_cache(maxsize=1024)(socket.inet_ntoa)
TEXT = "%-6s %-12.12s %-16s %-16s %s\n", "%-6s %-12.12s %-16s %-16s %-5s %-5s %-9s %s\n"     # without and with -r
JSON = '{"ts":%.6f,%s,"uid":%d,"ip":4,"saddr":"%s","daddr":"%s","dport":%d,"netns":%d%s}\n'


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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace TCP IPv4 connects",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    add = parser.add_argument
    add("-t", "--timestamp", action="store_true", help="include timestamp on output")
    add("-p", "--pid", type=process, help="trace this PID only")
    add("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    add("-U", "--print-uid", action="store_true", help="include UID on output")
    add("-u", "--uid", type=number(0, 0xffffffff), help="trace this UID only")
    add("-P", "--port", type=lambda text: [number(1, 65535)(port) for port in text.split(",")],
        help="comma-separated list of destination ports to trace.")
    add("-r", "--result", action="store_true",
        help="print each connect when its result is known, with local port, milliseconds and result")
    add("--failed", action="store_true", help="with -r, trace only connects that do not succeed")
    add("--json", action="store_true", help="print one JSON object per line, with exact times")
    add("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    add("--duration", metavar="SECONDS", type=number(0.001, 1e9, float), help="exit after this many seconds")
    add("--probes", choices=("tracepoint", "kprobe"), help="use this kind of probe only (default: the tracepoint)")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit
    args = parser.parse_args(argv)
    if args.failed and not args.result:
        parser.error("--failed needs -r")
    args.two_programs = args.result or KERNEL >= (7, 0)
    args.form = args.time * "%-8s " + args.timestamp * "%-8s " + args.print_uid * "%-5s " + TEXT[args.result]
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
        "TWO_PROGRAMS": int(args.two_programs),
        "RING_PAGES": RING_PAGES,
        "RESULTS": int(args.result), "ONLY_FAILED": int(args.failed),
        "MAX_ATTEMPTS": MAX_ATTEMPTS if args.result else 1,
        "FILTER_PID": args.pid or 0,
        "IS_WANTED_UID(uid)": "true" if args.uid is None else "uid == %du" % args.uid,
        "FILTER_NETNS": args.netns or 0,
        "IS_WANTED_PORT(port)": " || ".join("(port) == %d" % port for port in args.port or []) or "true",
    }
    return ["-g0"] + ["-D%s=(%s)" % item for item in macros.items()]    # no debug information: starts 10 % faster


def attach(bcc, args):
    """Returns the BPF object, compiled, loaded and attached."""
    bpf = bcc.BPF(text=bpf_text, cflags=cflags(args))
    if args.probes == "kprobe" or KERNEL < (4, 17):
        bpf.attach_kprobe(event="tcp_set_state", fn_name="kprobe_set_state")
        if args.result:
            bpf.attach_kprobe(event="tcp_v4_destroy_sock", fn_name="kprobe_destroy")
    else:
        for fn_name in ["tracepoint_set_state_first"] + ["tracepoint_set_state_second"] * args.two_programs:
            bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name=fn_name)
            bpf.raw_tracepoint_fds.clear()      # bcc refuses a second program on a raw tracepoint it knows of
        if args.result:
            bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
    if not args.two_programs:
        bpf.funcs.clear()       # losses() has nothing to count: only state changes in softirq are skipped, no connects
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
    names = ("TIME",) * args.time + ("TIME(s)",) * args.timestamp + ("UID",) * args.print_uid
    names += ("PID", "COMM", "SADDR", "DADDR", "DPORT") + ("LPORT", "MS", "RESULT") * args.result
    return "" if args.json else args.form % names


def line(args, record, start, wall):
    """Returns one line. start: when tracing started, wall: offset of the kernel's clock from Unix time, both in ns."""
    ts, owner, uid, netns, saddr, daddr, dport, lport, decided, code = record
    pid, comm, members = owner_text(owner)
    saddr, daddr, outcome = ipv4(saddr), ipv4(daddr), ""
    if args.result:
        ms = ((decided or time.monotonic_ns()) - ts) / 1e6
        err = errno.errorcode.get(code, str(code)) if code > 0 else None
        result = (err or RESULTS[code]) if decided else "pending"
        outcome = (',"lport":%s,"ms":%.6f,"result":"%s","err":%s' % (lport or "null", ms, result, json.dumps(err))
                   if args.json else (lport or "N/A", "%.2f" % ms, result))
    if args.json:
        return JSON % ((ts + wall) / 1e9, members, uid, saddr, daddr, dport, netns, outcome)
    row = (pid, comm, saddr, daddr, dport, *outcome)
    if args.print_uid:
        row = (uid, *row)
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
    """Prints connects until a signal comes, the time is up or the reader of the output has gone."""
    read, reader, start, reported, stop = open_events(bpf, RECORD), select.poll(), time.monotonic_ns(), {}, False
    reader.register(1, 0)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    write(header(args))
    while not stop:
        time.sleep(0.1)         # seconds that a line may be late
        stop = signal.sigpending() & STOP_SIGNALS or reader.poll(0)
        under_way = [bytes(8) + bytes(event) for event in bpf["attempts"].values()] if stop and args.result else []
        records = RECORD.iter_unpack(read())
        if under_way:           # except those decided since
            records = list(records)
            records += sorted(set(map(RECORD.unpack, under_way)) - {(*record[:7], 0, 0, 0) for record in records})
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        stop = write("".join([line(args, record, start, wall) for record in records])) or stop
        reported = report(losses(bpf), reported)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # for --help and --ebpf
        args = parse_args()
        if args.ebpf:
            return print("/* %s */\n%s" % (" ".join(cflags(args)), bpf_text))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        trace(args, load(args))
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit("%s: cannot write the output: %s" % (PROGRAM, error.strerror))


if __name__ == "__main__":
    main()
