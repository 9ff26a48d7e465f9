#!/usr/bin/python3
#
# tcpchurn  Count the TCP accepts, opens and closes of a process over sliding time windows.
#           For Linux, uses bcc, eBPF.
#
# usage: tcpchurn [-h] [-c | --json | --prometheus FILE] [-p] [-w SECONDS [SECONDS ...]] [-i SECONDS] [-a]
#                 [--netns NETNS] [--duration SECONDS] [--probes {tracepoint,kprobe}] [--ebpf] [--version] PID
#
# O counts connections that the process opened: accept() calls that returned one, and connect() attempts. C counts those
# that ended on this side: the process sent its FIN (close, shutdown, exit), or the connection was torn down (reset,
# timeout, abort), each once. So O - C under ALL is the growth in open connections since the start.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), tcp:tcp_destroy_sock, accept() and
# the exit of the process. The kernel side counts in buckets of time; no events are sent to user space.
#
# CAVEATS: a window is exact to one bucket: 0.1 s, or a tenth of the smallest window if that is less. A connection that
# the process hands to another remains its own.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}      # the last one for --duration
if __name__ == "__main__":      # blocked from here on and polled in trace(): no signal interrupts an import or a line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import bisect
import contextlib
import fcntl
import ipaddress
import json
import math
import mmap
import os
import re
import select
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
    ./tcpchurn 30800                # accepts and opens, and closes, of PID 30800
    ./tcpchurn -a 30800             # accepts and opens separately
    ./tcpchurn -c 30800             # clear the screen before each update
    ./tcpchurn -p 30800             # leave out connections with private addresses
    ./tcpchurn 30800 -w 1 5 10 -i 5 # other windows, an update every 5 seconds
    ./tcpchurn -w 1,5,10 30800      # the same windows
    ./tcpchurn --json 30800         # one JSON object per update
    ./tcpchurn --prometheus tcpchurn_shop.prom 30800    # counters for node-exporter
"""

PROGRAM = "tcpchurn"
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "signal_struct", "files_struct", "fdtable", "file", "socket_alloc",
                "mptcp_sock"]
WINDOWS = [1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0, 500.0, 1200.0]     # seconds
BUCKET_SECONDS = 0.1            # at most
MAX_BUCKETS = 1 << 19           # 14 hours of 0.1 s
MAX_SOCKETS = 1 << 18           # live connections of the process
INTERVAL = 0.1                  # seconds between checks of the process
HARMLESS = b"_second", b"_destroy"              # skipping a program whose name ends like this loses nothing
LOSSES = ["closes lost: the map of live connections was full",
          "state changes or accepts lost: the kernel did not run the probe"]
PRIVATE = ["0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
           "::/127", "fc00::/7", "fe80::/10"]

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/sched/signal.h>
#include <linux/tcp.h>
#include <net/sock.h>

#define IS_IPV4(address) (!(address)[0] && !(address)[1] && (address)[2] == htonl(0xffff))

/* A member of a kernel object. */
#define READ(p, member) ({                                                  \
    typeof((p)->member) value;                                              \
    bpf_probe_read_kernel(&value, sizeof(value), &(p)->member);             \
    value;                                                                  \
})

enum { ACCEPTED, CONNECTED, CLOSED, COUNTERS };
enum { LOST_SOCKET, RESCUED, LOST_COUNTERS };           /* as LOSSES above */

/* What had been counted when a bucket of time got its first event, so that no bucket ever has to be cleared. */
struct bucket {                 /* as BUCKET below */
    u64 number;                 /* bpf_ktime_get_ns() / BUCKET_NS */
    u64 count[COUNTERS];
};

BPF_F_TABLE("array", int, struct bucket, buckets, BUCKETS + 1, BUCKETS_FLAGS);      /* the last one: counted so far */
BPF_HASH(owned, struct sock *, u8, MAX_SOCKETS);        /* opened by the process since the start, and open */
BPF_HASH(existing, u64, u8, MAX_SOCKETS);               /* inodes of its sockets from before the start */
BPF_ARRAY(ended, u8, 1);                                /* whether the process has ended */
BPF_ARRAY(lost, u64, LOST_COUNTERS);

static inline void count_lost(int what)
{
    u64 *n = lost.lookup(&what);

    if (n)
        __sync_fetch_and_add(n, 1);
}

/*
 * The kernel skips a program that is already running on this CPU (since 6.1): it would miss the events of a softirq
 * that interrupts it and, since 7.0, those of a process that preempts it. So a tracepoint has a second program, which
 * handles what the first was skipped for. What the first has handled is marked until the second has run.
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
struct marks {
    u64 event[2048];
};
BPF_PERCPU_ARRAY(marks, struct marks, 1);

static inline bool is_mine(void *ctx, u64 event, bool first)
{
    int zero = 0;
    struct marks *m = marks.lookup(&zero);
    u64 *mark;

    if (!m)
        return false;           /* never */
    /* By event and depth of the stack, where ctx is: a softirq is deeper than the process, or has its own stack. */
    mark = &m->event[((u64)(ctx - (void *)m) ^ event) * 0x9e3779b97f4a7c15 >> 53];
    if (first) {
        *mark = event;
    } else if (*mark == event) {
        *mark = 0;
        return false;
    } else {
        count_lost(RESCUED);
    }
    return true;
}
#endif

static inline u32 netns_of(struct sock *sk)
{
    return READ(READ(sk, __sk_common.skc_net.net), ns.inum);
}

/* MPTCP's own sockets and SCTP's report their states here too; MPTCP's subflows are TCP. */
static inline u16 protocol_of(struct sock *sk)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and no MPTCP */
    return READ(sk, sk_protocol);
#else
    return IPPROTO_TCP;
#endif
}

static inline void count(int what)
{
    u64 now = bpf_ktime_get_ns() / BUCKET_NS;
    int slot = now % BUCKETS, last = BUCKETS;
    struct bucket *b = buckets.lookup(&slot), *so_far = buckets.lookup(&last);

    if (!b || !so_far)
        return;                 /* never */
    if (b->number != now) {
        *b = *so_far;
        b->number = now;
    }
    __sync_fetch_and_add(&so_far->count[what], 1);
}

static inline u32 current_pid(void)
{
#if PIDNS
    struct bpf_pidns_info ns = {};

    bpf_get_ns_current_pid_tgid(PIDNS_DEV, PIDNS, &ns, sizeof(ns));
    return ns.tgid;             /* 0 for a process of another namespace */
#else
    return bpf_get_current_pid_tgid() >> 32;
#endif
}

static inline bool is_of_process(void)
{
    int zero = 0;
    u8 *has_ended = ended.lookup(&zero);

    return current_pid() == FILTER_PID && has_ended && !*has_ended;
}

/* Whether the other end is one to be counted. */
static inline bool is_wanted(struct sock *sk)
{
    u32 address[4] = {0, 0, htonl(0xffff), READ(sk, __sk_common.skc_daddr)};

    if (READ(sk, __sk_common.skc_family) == AF_INET6)
        bpf_probe_read_kernel(address, sizeof(address), &sk->__sk_common.skc_v6_daddr);
    return (!IGNORE_PRIVATE || !IS_PRIVATE(address)) && (!FILTER_NETNS || netns_of(sk) == FILTER_NETNS);
}

/* The inode that user space sees of this socket; 0 before accept() and after close(). */
static inline u64 inode_of(struct sock *sk)
{
    struct socket *socket = READ(sk, sk_socket);

    return socket ? READ((struct socket_alloc *)socket, vfs_inode.i_ino) : 0;
}

static inline bool is_open(u8 state)
{
    return state == TCP_ESTABLISHED || state == TCP_CLOSE_WAIT || state == TCP_SYN_SENT || state == TCP_SYN_RECV;
}

static inline void closed(struct sock *sk, int oldstate)
{
    bool counts = owned.lookup(&sk) && !owned.delete(&sk);
    u64 inode = is_open(oldstate) ? inode_of(sk) : 0;

    if (existing.lookup(&inode) && !existing.delete(&inode) && is_wanted(sk))
        counts = true;
    if (counts)
        count(CLOSED);
}

static inline void opened(struct sock *sk, int how)
{
    u8 one = 1;
    int err;

    if (!is_of_process() || protocol_of(sk) != IPPROTO_TCP || !is_wanted(sk))
        return;
    err = owned.insert(&sk, &one);
    if (err == -EEXIST)         /* another thread put this socket behind the descriptor: it is counted already */
        return;
    if (err)
        count_lost(LOST_SOCKET);
    count(how);
    if (how == ACCEPTED && !is_open(READ(sk, __sk_common.skc_state)))       /* reset before accept() */
        closed(sk, TCP_CLOSE);
}

static inline void accepted(void *ctx, struct sock *sk)
{
#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the connection is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        sk = READ((struct mptcp_sock *)sk, first);
#endif
    opened(sk, ACCEPTED);
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    /* For new sockets, too: if one is known, the end of an older one at this address was not seen. */
    if ((oldstate == TCP_CLOSE || oldstate == TCP_LISTEN || !is_open(newstate)) && newstate != TCP_LISTEN)
        closed(sk, oldstate);
    if (newstate == TCP_SYN_SENT)
        opened(sk, CONNECTED);
}

#if KPROBES
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int newstate)
{
    state_change(ctx, sk, READ(sk, __sk_common.skc_state), newstate);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk) { closed(sk, TCP_CLOSE); return 0; }
#else
static inline int set_state(struct bpf_raw_tracepoint_args *ctx, bool first)
{
    /* An event is a socket and its new state, which goes into the top byte of the address, always 0xff. */
    if (is_mine(ctx, ctx->args[0] ^ ctx->args[2] << 56, first))
        state_change(ctx, (struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_first(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, true); }
int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, false); }

/* For what was accepted while its last state change was under way on another CPU. */
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx)
{
    closed((struct sock *)ctx->args[0], TCP_CLOSE);
    return 0;
}
#endif

/* At the exit of each thread. A later process with this PID is another one. */
int exited(void *ctx)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    int zero = 0;
    u8 one = 1;

    if (current_pid() == FILTER_PID && !READ(READ(task, signal), live.counter))
        ended.update(&zero, &one);
    return 0;
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

static inline int accept_returned(struct syscall_exit *ctx, bool first)
{
    struct sock *sk = is_mine(ctx, bpf_get_current_pid_tgid(), first) ? socket_of(ctx->ret) : NULL;

    if (sk)
        accepted(ctx, sk);
    return 0;
}

int tracepoint_accept_first(struct syscall_exit *ctx) { return accept_returned(ctx, true); }
int tracepoint_accept_second(struct syscall_exit *ctx) { return accept_returned(ctx, false); }
"""

BUCKET = struct.Struct("=4Q")


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
    parser = argparse.ArgumentParser(
        PROGRAM, description="Count the TCP accepts, opens and closes of a process over sliding time windows",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    form, add, seconds = parser.add_mutually_exclusive_group(), parser.add_argument, number(0.001, 1e9, float)
    add("pid", metavar="PID", nargs="?", help="the process")
    form.add_argument("-c", "--clear", action="store_true", help="clear the screen before each update")
    add("-p", "--ignore-private", action="store_true", help="leave out connections with private addresses")
    add("-w", "--windows", metavar="SECONDS", nargs="+", action="extend",
        help="time windows, in seconds (default: %s)" % ",".join("%g" % window for window in WINDOWS))
    add("-i", "--interval", metavar="SECONDS", type=seconds, default=1.0, help="time between two updates (default: 1)")
    add("-a", "--accepts", action="store_true", help="count accepts (A) and opens (O) separately")
    form.add_argument("--json", action="store_true", help="print one JSON object per update")
    form.add_argument("--prometheus", metavar="FILE",
        help="write the counts since the start to FILE, for node-exporter's textfile collector, and print nothing")
    add("--netns", type=netns, help="count in this network namespace only: inode number, path or name")
    add("--duration", metavar="SECONDS", type=seconds, help="exit after this many seconds")
    add("--probes", choices=("tracepoint", "kprobe"),
        help="use this kind of probe only (default: tracepoints, and for accept() a kprobe where there are any)")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit
    parser.usage = parser.format_usage()[len("usage: "):].replace("[PID]", "PID")      # optional for the parser only
    args = parser.parse_args(argv)
    args.kprobes = args.probes == "kprobe" or KERNEL < (4, 17)
    if args.pid is None and args.windows and len(args.windows) > 1:
        args.pid = args.windows.pop()           # -w 1 5 10 PID
    if args.pid is None:
        parser.error("the following arguments are required: PID")
    if args.prometheus is not None and not args.prometheus.endswith(".prom"):
        parser.error("the textfile collector reads no file whose name does not end in .prom: %r" % args.prometheus)
    try:
        args.pid = process(args.pid)
        windows = [seconds(part) for text in args.windows or [] for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    args.windows = sorted(set(windows or WINDOWS), reverse=True)
    if buckets(args) > MAX_BUCKETS:
        parser.error("the windows are too long, or too far apart")
    return args


def bucket_ns(args):
    """Returns the nanoseconds per bucket: BUCKET_SECONDS, or a tenth of the smallest window; at least a millisecond."""
    return max(10 ** 6, int(min(BUCKET_SECONDS, args.windows[-1] / 10) * 1e9))


def buckets(args):
    """Returns how many buckets the largest window needs: the full ones, one being filled, and one just over."""
    return math.ceil(args.windows[0] * 1e9 / bucket_ns(args)) + 2


def address_condition(networks):
    """Returns a C expression that is true for an address (4 words as sent) in these networks, or for all if none."""
    conditions = []
    for network in networks or []:
        if network.version == 4:
            network = ipaddress.ip_network("::ffff:%s/%d" % (network.network_address, 96 + network.prefixlen))
        words = zip(struct.unpack("=4I", network.network_address.packed), struct.unpack("=4I", network.netmask.packed))
        parts = ["((address)[%d] & %du) == %du" % (n, mask, value) for n, (value, mask) in enumerate(words) if mask]
        if network.prefixlen < 96:              # IPv6, but not IPv4 in the form of IPv6
            parts.append("!IS_IPV4(address)")
        conditions.append("(%s)" % " && ".join(parts))
    return " || ".join(conditions) or "true"


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
        "KPROBES": int(args.kprobes),
        "BUCKETS": buckets(args),
        "BUCKETS_FLAGS": 1024 if KERNEL >= (5, 5) else 0,       # BPF_F_MMAPABLE
        "BUCKET_NS": "%dull" % bucket_ns(args),
        "MAX_SOCKETS": MAX_SOCKETS,
        "FILTER_PID": args.pid,
        "FILTER_NETNS": args.netns or 0,
        "IGNORE_PRIVATE": int(args.ignore_private),
        "IS_PRIVATE(address)": address_condition(map(ipaddress.ip_network, PRIVATE)),
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


def attach(bcc, args):
    """Returns the BPF object, compiled, loaded and attached."""
    bpf = bcc.BPF(text=bpf_text, cflags=cflags(args))
    if args.kprobes:
        bpf.attach_kprobe(event="tcp_set_state", fn_name="kprobe_set_state")
        bpf.attach_kprobe(event="tcp_v4_destroy_sock", fn_name="kprobe_destroy")
        with contextlib.suppress(Exception):    # no CONFIG_TASKSTATS: only /proc shows it
            bpf.attach_kprobe(event="taskstats_exit", fn_name="exited")
    else:
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_first")
        bpf.raw_tracepoint_fds.clear()          # bcc refuses a second program on a raw tracepoint it knows of
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_second")
        bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
        bpf.attach_raw_tracepoint(tp="sched_process_exit", fn_name="exited")
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


def losses(bpf):
    """Returns {what was lost: how often since the start}."""
    skipped = 0                 # how often a program was not run because it was running already (since Linux 5.12)
    for name, function in bpf.funcs.items():
        if not name.endswith(HARMLESS):
            with open("/proc/self/fdinfo/%d" % function.fd) as info:
                skipped += sum(int(n) for n in re.findall(r"recursion_misses:\s*(\d+)", info.read()))
    *counts, rescued = (count.value for count in bpf["lost"].values())      # read last: skipped comes before rescued
    return dict(zip(LOSSES, [*counts, skipped - rescued]))


def birth_of(pid):
    """Returns when the process started, in clock ticks; None if it has ended."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        # The first thread may have ended before the others: then it is a zombie as well.
        has_ended = fields[0] in b"ZX" and len(os.listdir("/proc/%d/task" % pid)) < 2
    except OSError:
        return None
    return None if has_ended else int(fields[19])


def socket_inodes(pid):
    """Returns the inode numbers of the sockets that the process holds, of any kind."""
    inodes = set()
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/%s/task" % pid):          # a first thread that has ended shows no descriptors
            for fd in os.scandir("/proc/%s/task/%s/fd" % (pid, task)):
                with contextlib.suppress(OSError):
                    target = os.readlink(fd.path)
                    if target.startswith("socket:["):
                        inodes.add(int(target[8:-1]))
            if inodes:
                break           # the other threads have the same descriptors
    return inodes


def learn_existing(args, bpf):
    """Passes the sockets that the process already has to the kernel side."""
    table, unknown = bpf["existing"], 0
    try:
        os.listdir("/proc/%d/fd" % args.pid)
    except PermissionError:
        print("%s: sockets from before the start not known: needs CAP_SYS_PTRACE" % PROGRAM, file=sys.stderr)
    except OSError:             # the process has ended: trace() reports that
        pass
    for inode in socket_inodes(args.pid):
        try:
            table[table.Key(inode)] = table.Leaf(1)
        except Exception:       # the map is full
            unknown += 1
    report({"sockets from before the start not known: the map was full": unknown}, {})


class Windows:
    """Counts over sliding windows, from the buckets of the kernel side."""

    def __init__(self, args, bpf):
        self.size, self.width = buckets(args), bucket_ns(args)
        self.spans = [math.ceil(window * 1e9 / self.width) for window in args.windows]
        self.history = []       # the buckets that had events, the oldest first
        if KERNEL >= (5, 5):
            memory = mmap.mmap(bpf["buckets"].map_fd, (self.size + 1) * BUCKET.size, prot=mmap.PROT_READ)
            self.bucket = lambda slot: BUCKET.unpack_from(memory, slot * BUCKET.size)
        else:
            self.bucket = lambda slot: BUCKET.unpack(bytes(bpf["buckets"][slot]))
        self.next = 0           # number of the bucket to look at next

    def read(self):
        """Returns what was counted, as (accepted, connected, closed), in each of the windows, and in all."""
        now = time.monotonic_ns() // self.width
        for number in range(max(self.next, now - self.size + 1), now + 1):
            bucket = self.bucket(number % self.size)
            if bucket[0] == number:
                self.history.append(bucket)
                self.next = number + 1
        self.next = max(self.next, now - 1)     # these two may get their first event only now
        del self.history[:bisect.bisect(self.history, (now - self.size + 1,))]
        so_far = self.bucket(self.size)
        counts = []
        for span in self.spans:
            first = bisect.bisect(self.history, (now - span,))
            before = self.history[first] if first < len(self.history) else so_far
            counts.append([all - earlier for all, earlier in zip(so_far[1:], before[1:])])
        return counts, so_far[1:]


def heading(window):
    return "%8.1f" % window if round(window, 1) == window else " %7.5g" % window


def render(args, windows, totals):
    """Returns whole lines for one update, from what Windows.read() returns."""
    accepted, connected, closed = zip(*windows)
    all_accepted, all_connected, all_closed = totals
    opened, all_opened = [a + c for a, c in zip(accepted, connected)], all_accepted + all_connected
    if args.json:
        return json.dumps({
            "ts": time.time(), "pid": args.pid, "windows": args.windows, "opened": opened, "accepted": accepted,
            "connected": connected, "closed": closed,
            "all": {"opened": all_opened, "accepted": all_accepted, "connected": all_connected, "closed": all_closed},
        }, separators=(",", ":")) + "\n"
    rows = [("O", opened, all_opened), ("C", closed, all_closed)]
    if args.accepts:
        rows[:1] = [("A", accepted, all_accepted), ("O", connected, all_connected)]
    lines = [" " + "".join(map(heading, args.windows)) + "%7s\n" % "ALL"]
    lines += [name + "".join("%8d" % count for count in counts) + "%7d\n" % total for name, counts, total in rows]
    return args.clear * "\033[H\033[2J" + "".join(lines)


def labels_of(pid):
    """Returns PID and COMM as labels for Prometheus, COMM escaped as in the text of the other tools."""
    comm = b"\n"
    with contextlib.suppress(OSError), open("/proc/%d/comm" % pid, "rb") as file:
        comm = file.read()
    text = comm[:-1].decode("latin-1").encode("unicode_escape").decode("ascii")
    return 'pid="%d",comm="%s"' % (pid, text.replace("\\", r"\\").replace('"', r'\"'))


def publish(path, labels, start, totals, lost):
    """Writes the counts in Prometheus' text format 0.0.4, where HELP and TYPE have to be the same in all files."""
    new = path[:-len("prom")] + "new"           # a name that the collector does not read
    with open(new, "w", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o644)) as file:
        for name, kind, meaning, values in (
                ("accepts_total", "counter", "TCP connections that the process accepted.", {"": totals[0]}),
                ("connects_total", "counter", "Attempts of the process to connect by TCP.", {"": totals[1]}),
                ("closes_total", "counter", "TCP connections that ended on the side of the process.", {"": totals[2]}),
                ("lost_total", "counter", "Events that tcpchurn knows it missed.",
                 {',what="%s"' % what: n for what, n in zip(("map_full", "probe_skipped"), lost.values())}),
                ("start_time_seconds", "gauge", "Unix time at which counting started.", {"": start})):
            file.write("# HELP {0}_{1} {2}\n# TYPE {0}_{1} {3}\n".format(PROGRAM, name, meaning, kind))
            file.writelines(["%s_%s{%s%s} %s\n" % (PROGRAM, name, labels, *value) for value in values.items()])
    os.replace(new, path)                       # so that a reader never sees half a file


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


def trace(args, bpf, birth):
    """Prints updates until a signal comes, the time is up, or the process or the reader of the output has gone."""
    windows, reader, reported, labels, start = Windows(args, bpf), select.poll(), {}, labels_of(args.pid), time.time()
    due = time.monotonic() + args.interval * (not args.prometheus)
    reader.register(1, 0)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    stop = gone = False
    while not stop:
        time.sleep(max(0, min(INTERVAL, due - time.monotonic())))
        gone = birth_of(args.pid) != birth
        stop = gone or signal.sigpending() & STOP_SIGNALS or reader.poll(0)
        if stop or time.monotonic() >= due:
            due = max(due + args.interval, time.monotonic())
            if args.prometheus:
                publish(args.prometheus, labels, start, windows.read()[1], losses(bpf))
            else:
                stop = write(render(args, *windows.read())) or stop
            reported = report(losses(bpf), reported)
    if gone:
        print("%s: process %d has ended" % (PROGRAM, args.pid), file=sys.stderr)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # for --help and --ebpf
        args = parse_args()
        if args.ebpf:
            return print("/* %s */\n%s" % (" ".join(cflags(args)), bpf_text))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        birth = birth_of(args.pid)
        if birth is None:
            sys.exit("%s: no such process: %d" % (PROGRAM, args.pid))
        bpf = load(args)
        learn_existing(args, bpf)
        try:
            trace(args, bpf, birth)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(args.prometheus or "")
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit("%s: cannot write the output: %s" % (PROGRAM, error.strerror))


if __name__ == "__main__":
    main()
