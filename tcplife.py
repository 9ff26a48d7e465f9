#!/usr/bin/python3
#
# tcplife  Trace the lifespan of TCP sessions and summarize.
#          For Linux, uses bcc, eBPF.
#
# usage: tcplife [-h] [-T] [-t] [-w | -s | --json] [-x] [-p PID] [-L LOCALPORT] [-D REMOTEPORT] [-4 | -6] [--failed]
#                [--existing] [--netns NETNS] [--duration SECONDS] [--owner {accept,close}]
#                [--probes {tracepoint,kprobe}] [--ebpf] [--version]
#
# Prints one line per finished session: the process that owns the socket, addresses, ports, bytes each way and
# milliseconds; with -x also how it ended. Failed connects are shown, too.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), tcp:tcp_destroy_sock and accept().
# No packet is looked at. The owner of a session is the process that called connect() or accept(): many state changes
# run in softirq, in the context of whichever process was interrupted, and the current process means nothing there.
#
# CAVEATS: a kernel without kprobes shows accept() at the exit of the system call, which does not cover io_uring and
# 32-bit programs: there the process that closes is taken as the owner.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}      # the last one for --duration
if __name__ == "__main__":      # blocked from here on and polled in trace(): no signal interrupts an import or a line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import io
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
  ./tcplife              # trace all TCP sessions
  ./tcplife -T           # include time column (HH:MM:SS)
  ./tcplife -w           # wider columns (fit IPv6)
  ./tcplife -stT         # csv output, with times & timestamps
  ./tcplife -p 181       # only trace PID 181
  ./tcplife -L 80        # only trace local port 80
  ./tcplife -L 80,81     # only trace local ports 80 and 81
  ./tcplife -D 80        # only trace remote port 80
  ./tcplife -x --failed  # only sessions that failed, and how
  ./tcplife --netns web  # only trace the network namespace web
"""

PROGRAM = "tcplife"
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "files_struct", "fdtable", "file", "socket", "mptcp_sock"]
MAX_SESSIONS = 1 << 18          # live sockets: 29 MB of kernel memory
MAX_UNCLAIMED = 1 << 14         # sessions that ended before accept() returned them
RING_PAGES = (8 << 20) // mmap.PAGESIZE if KERNEL >= (5, 8) else 0      # 8 MiB: a second of the fastest load measured
PERF_PAGES = (1 << 20) // mmap.PAGESIZE         # per CPU, where there is no ring buffer
HARMLESS = b"_second", b"_destroy"              # skipping a program whose name ends like this loses nothing
LOSSES = ["sessions lost: the ring buffer was full", "sessions lost: the map of live sessions was full",
          "sessions lost: the map of unaccepted sessions was full", "sessions lost: their end was not seen",
          "state changes or accepts lost: the kernel did not run the probe"]

bpf_text = r"""
#include <linux/fdtable.h>
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

enum { EXISTED, CONNECT, ACCEPT };                      /* as ROLES below */
enum { LOCAL, REMOTE, BOTH, ABORT, QUIT, NEVER_SENT };  /* as ENDS below; the first three with FINs */

struct session {
    u64 born;                   /* bpf_ktime_get_ns(); 0: before the start of the tool */
    u64 ready;                  /* when connect() succeeded or accept() returned; 0: not yet */
    struct owner owner;
    u32 role;
};

struct event {                  /* as RECORD below */
    struct session session;
    u64 died;
    u64 tx, rx;                 /* bytes */
    u32 netns;
    u32 laddr[4], raddr[4];     /* IPv4 as ::ffff:a.b.c.d */
    u16 lport, rport;
    u32 srtt;                   /* eighths of a microsecond */
    u32 retrans;                /* segments */
    u32 end, err;               /* err: instead of the end; 0: none */
};

enum { LOST_EVENT, LOST_SESSION, LOST_UNCLAIMED, LOST_END, RESCUED, COUNTERS };      /* as LOSSES above */

BPF_HASH(sessions, struct sock *, struct session, MAX_SESSIONS);
BPF_HASH(unclaimed, struct sock *, struct event, MAX_UNCLAIMED);    /* ended before anybody accepted them */
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

static inline bool is_wanted(struct event *e, struct sock *sk)
{
    bool ipv4 = !e->raddr[0] && !e->raddr[1] && e->raddr[2] == htonl(0xffff);

    return (!FILTER_IP || ipv4 == (FILTER_IP == 4)) && (!FILTER_NETNS || netns_of(sk) == FILTER_NETNS) &&
           (!e->lport || IS_WANTED_LPORT(e->lport)) && IS_WANTED_RPORT(e->rport);
}

static inline void submit(void *ctx, struct event *e)
{
#if RING_PAGES          /* no wake-up: the reader polls */
    if (IS_WANTED_PID(e->session.owner.pid) && events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
#else
    if (IS_WANTED_PID(e->session.owner.pid) && events.perf_submit(ctx, e, sizeof(*e)))
#endif
        count_lost(LOST_EVENT);
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

static inline void birth(struct sock *sk, u32 role)
{
    struct session s = {.born = role == EXISTED ? 0 : bpf_ktime_get_ns(), .role = role};
    struct event e = {};
    int err;

    if (protocol_of(sk) != IPPROTO_TCP)
        return;
    if (FILTERS) {
        read_endpoints(&e, sk);
        if (role == CONNECT)
            e.lport = 0;        /* not chosen yet, or that of an earlier attempt: checked when the session ends */
        if (!is_wanted(&e, sk))
            return;
    }
    if (role == CONNECT)
        set_owner(&s.owner);
    err = sessions.insert(&sk, &s);
    if (err && err != -EEXIST)  /* exists: accept() saw it first (TCP Fast Open), or EXISTED comes again */
        count_lost(LOST_SESSION);
}

/* At the start and at the very end of a socket: the end of a session that is still known was not seen. */
static inline void forget(struct sock *sk)
{
    /* lookup() takes no lock, delete() does */
    if ((sessions.lookup(&sk) && !sessions.delete(&sk)) || (unclaimed.lookup(&sk) && !unclaimed.delete(&sk)))
        count_lost(LOST_END);
}

static inline void established(struct sock *sk, int oldstate)
{
    struct session *s = sessions.lookup(&sk);

    if (s && s->role == CONNECT)        /* from SYN_RECV if the other end called connect(), too */
        s->ready = bpf_ktime_get_ns();
    else if (oldstate == TCP_SYN_RECV)
        birth(sk, ACCEPT);
}

/* A kernel thread closes for others: MPTCP's worker, io_uring's, the collector of Unix sockets. */
#define is_kthread() (READ((struct task_struct *)bpf_get_current_task(), flags) & 0x00200000 /* PF_KTHREAD */)

/* The current process uses this socket. Returns its session, or NULL if it is not known. */
static inline struct session *own(struct sock *sk)
{
    struct session *s = sessions.lookup(&sk);

    if (s && !s->owner.pid)
        set_owner(&s->owner);
    return s;
}

static inline void death(void *ctx, struct sock *sk, int oldstate)
{
    struct session *s = sessions.lookup(&sk);
    struct event e = {.died = bpf_ktime_get_ns(), .end = ABORT};
    struct tcp_sock *tp = (struct tcp_sock *)sk;
    bool fin_acked;
    u64 flags;

    if (!s)
        return;
    e.session = *s;
    sessions.delete(&sk);
    flags = READ(sk, __sk_common.skc_flags);
    fin_acked = (oldstate == TCP_FIN_WAIT2 || oldstate == TCP_LAST_ACK || oldstate == TCP_CLOSING) &&
                READ(tp, snd_una) == READ(tp, write_seq);
    if (oldstate == TCP_SYN_SENT)       /* no SYN: connect() itself failed, for lack of a port for example */
        e.end = READ(tp, segs_out) ? QUIT : NEVER_SENT;
    /* In FIN_WAIT2 without SOCK_DEAD and SOCK_DONE, close() came after shutdown() and found unread data. */
    if (fin_acked && (oldstate != TCP_FIN_WAIT2 || flags & 3))
        e.end = oldstate == TCP_FIN_WAIT2 ? LOCAL : oldstate == TCP_LAST_ACK ? REMOTE : BOTH;
    e.err = READ(sk, sk_err);
    if (FAILED && !e.err && e.end <= BOTH)
        return;
    read_endpoints(&e, sk);
    if (FILTERS && !is_wanted(&e, sk))
        return;
    e.netns = netns_of(sk);
    /* The kernel counts the SYN of connect() and FINs as bytes. */
    e.tx = READ(tp, bytes_acked);
    e.tx -= fin_acked + (e.tx && e.session.role == CONNECT);
    e.rx = READ(tp, bytes_received) - (flags >> 1 & 1);         /* SOCK_DONE: the peer's FIN has come */
    e.srtt = READ(tp, srtt_us);
    e.retrans = READ(tp, total_retrans);
    if (e.session.owner.pid)
        submit(ctx, &e);
    else if (unclaimed.update(&sk, &e))
        count_lost(LOST_UNCLAIMED);
}

/* A session that the peer ended before accept() returned it is printed once its owner is known. */
static inline void claim(void *ctx, struct sock *sk, u64 accepted)
{
    struct event *held = unclaimed.lookup(&sk), e;

    if (!held)
        return;
    e = *held;
    if (unclaimed.delete(&sk))  /* another process was faster */
        return;
    e.session.ready = accepted;
    if (!is_kthread())
        set_owner(&e.session.owner);
    submit(ctx, &e);
}

static inline void accepted(void *ctx, struct sock *sk)
{
    struct session *s;

#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the session is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        sk = READ((struct mptcp_sock *)sk, first);
#endif
    if (READ(sk, __sk_common.skc_state) == TCP_SYN_RECV)        /* TCP Fast Open: not ESTABLISHED yet */
        birth(sk, ACCEPT);
    s = own(sk);
    if (s)
        s->ready = bpf_ktime_get_ns();
    else
        claim(ctx, sk, bpf_ktime_get_ns());
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    bool closes = newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK;

    /* The kprobe does not see LISTEN -> SYN_RECV. Before accept() there is no sk_socket. */
    if (oldstate == TCP_CLOSE || oldstate == TCP_LISTEN ||
        (KPROBES && oldstate == TCP_SYN_RECV && !READ(sk, sk_socket)))
        forget(sk);
    else if (EXISTING && oldstate != TCP_SYN_RECV && (closes || newstate == TCP_CLOSE))
        birth(sk, EXISTED);     /* unless it is known */
    if (newstate == TCP_SYN_SENT)
        birth(sk, CONNECT);
    else if (newstate == TCP_ESTABLISHED)
        established(sk, oldstate);
    else if (closes && !is_kthread())
        own(sk);                /* in close(), shutdown() or exit */
    else if (newstate == TCP_CLOSE)
        death(ctx, sk, oldstate);
}

/* A socket in CLOSE is destroyed in close(), and one still waiting for accept() in the listener's close(). */
static inline int burial(void *ctx, struct sock *sk)
{
    claim(ctx, sk, 0);
    forget(sk);
    return 0;
}

#if KPROBES
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int newstate)
{
    state_change(ctx, sk, READ(sk, __sk_common.skc_state), newstate);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk) { return burial(ctx, sk); }
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

int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx) { return burial(ctx, (struct sock *)ctx->args[0]); }
#endif

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

# struct event, behind the ring buffer's own header of a record (length and flags, page offset)
RECORD = struct.Struct("=8xQQ20sIQQQI16s16sHHIIII")
ROLES = [None, "connect", "accept"]
ENDS = ["local", "remote", "both", "abort", "quit", None]
ERRORS = {errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ECONNREFUSED: "refused", errno.ETIMEDOUT: "timeout",
          errno.EHOSTUNREACH: "unreachable", errno.ENETUNREACH: "unreachable", errno.ECONNABORTED: "killed"}
NAMES = "PID", "COMM", "IP", "LADDR", "LPORT", "RADDR", "RPORT", "TX_KB", "RX_KB", "MS"
EXTRA_NAMES = "ROLE", "CONN_MS", "RTT_MS", "RETR", "END"
NARROW = "%-5s %-10.10s %.0s%-15s %-5s %-15s %-5s %5s %5s "     # without IP
WIDE = "%-7s %-16s %-2s %-39s %-5s %-39s %-5s %5s %5s "
EXTRA = "%-8s %-7s %7s %7s %4s "
JSON = ('{"ts":%.6f,%s,"ip":%d,"laddr":"%s","lport":%d,"raddr":"%s","rport":%d,"tx_bytes":%d,"rx_bytes":%d,"ms":%.6f,'
        '"netns":%d,%s,"connect_ms":%s,"accept_ms":%s,"srtt_us":%s,"retrans":%d,"partial":%s}\n')


def number(low, high, kind=int):
    """Returns a converter for argparse: a number from low to high in plain digits, as an int or a float."""
    def number(text):
        if not re.fullmatch(r"\d+" if kind is int else r"\d*\.?\d+", text, re.A) or not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError("not a number from %s to %s: %r" % (low, high, text))
        return kind(text)
    return number


def ports(text):
    return [number(1, 65535)(port) for port in text.split(",")]


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
    parser = argparse.ArgumentParser(PROGRAM, description="Trace the lifespan of TCP sessions and summarize",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    family, form = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    add = parser.add_argument
    add("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    add("-t", "--timestamp", action="store_true", help="include timestamp on output (seconds)")
    form.add_argument("-w", "--wide", action="store_true", help="wide column output (fits IPv6 addresses)")
    form.add_argument("-s", "--csv", action="store_true", help="comma separated values output")
    add("-x", "--extra", action="store_true",
        help="include columns on how sessions started and ended: ROLE CONN_MS RTT_MS RETR END")
    add("-p", "--pid", type=process, help="trace this PID only")
    add("-L", "--localport", type=ports, help="comma-separated list of local ports to trace.")
    add("-D", "--remoteport", type=ports, help="comma-separated list of remote ports to trace.")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    add("--failed", action="store_true", help="trace only sessions that did not end with FINs")
    add("--existing", action="store_true", help="also trace sessions from before the start")
    form.add_argument("--json", action="store_true", help="print one JSON object per line, with exact bytes and times")
    add("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    add("--duration", metavar="SECONDS", type=number(0.001, 1e9, float), help="exit after this many seconds")
    add("--owner", choices=("accept", "close"), default="accept",
        help="who owns an incoming session: the process that accepted it (default), or the one that closed it, "
             "which saves the probe on accept()")
    add("--probes", choices=("tracepoint", "kprobe"),
        help="use this kind of probe only (default: tracepoints, and for accept() a kprobe where there are any)")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit
    args = parser.parse_args(argv)
    args.kprobes = args.probes == "kprobe" or KERNEL < (4, 17)
    args.form = (args.time * "%-8s " + args.timestamp * "%-9s " + (WIDE if args.wide else NARROW) +
                 args.extra * EXTRA + "%s\n")
    return args


def port_condition(ports):
    """Returns a C expression that is true for these ports, or for all if there are none."""
    return " || ".join("(port) == %d" % port for port in ports or []) or "true"


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
        "KPROBES": int(args.kprobes),
        "MAX_SESSIONS": MAX_SESSIONS,
        "MAX_UNCLAIMED": MAX_UNCLAIMED,
        "FILTERS": int(bool(args.ipv4 or args.ipv6 or args.netns or args.localport or args.remoteport)),
        "FAILED": int(args.failed),
        "EXISTING": int(args.existing),
        "IS_WANTED_PID(pid)": "(pid) == %d" % args.pid if args.pid else "true",
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IP": 4 * args.ipv4 + 6 * args.ipv6,
        "IS_WANTED_LPORT(port)": port_condition(args.localport),
        "IS_WANTED_RPORT(port)": port_condition(args.remoteport),
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
    else:
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_first")
        bpf.raw_tracepoint_fds.clear()          # bcc refuses a second program on a raw tracepoint it knows of
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_second")
        bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
    if args.owner == "accept":
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


@functools.lru_cache(maxsize=1024)
def fate(role, end, err):
    """Returns role and end as text and as JSON members."""
    role, end, err = ROLES[role], ERRORS.get(err) if err else ENDS[end], errno.errorcode.get(err, str(err) * bool(err))
    return (role or "N/A", end or err or "N/A",
            '"role":%s,"end":%s,"err":%s' % tuple(json.dumps(name or None) for name in (role, end, err)))


def csv_line(row):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def header(args):
    names = ("TIME",) * args.time + ("TIME(s)",) * args.timestamp + NAMES + EXTRA_NAMES * args.extra
    return "" if args.json else csv_line(names) if args.csv else args.form % names


def line(args, record, start, wall):
    """Returns one line. start: when tracing started, wall: offset of the kernel's clock from Unix time, both in ns."""
    born, ready, owner, role, died, tx, rx, netns, laddr, raddr, lport, rport, srtt, retrans, end, err = record
    laddr, raddr = address(laddr), address(raddr)
    ip = 6 if ":" in raddr else 4
    pid, comm, members = owner_text(owner)
    role, end, json_fate = fate(role, end, err)
    ms = (died - born if born else max(0, died - start)) / 1e6
    if args.json:
        waited = "%.6f" % ((ready - born) / 1e6) if ready else "null"
        return JSON % ((died + wall) / 1e9, members, ip, laddr, lport, raddr, rport, tx, rx, ms, netns, json_fate,
                       waited if role == "connect" else "null", waited if role == "accept" else "null",
                       srtt >> 3 or "null", retrans, "false" if born else "true")
    row = (pid, comm, ip, laddr, lport, raddr, rport, tx >> 10, rx >> 10, ("%.2f" if born else ">%.2f") % ms)
    if args.extra:
        row += (role, "%.2f" % ((ready - born) / 1e6) if ready and role == "connect" else "N/A",
                "%.2f" % (srtt / 8e3) if srtt else "N/A", retrans, end)
    if args.timestamp:
        row = ("%.3f" % (max(0, died - start) / 1e9), *row)
    if args.time:
        row = (time.strftime("%H:%M:%S", time.localtime((died + wall) // 10 ** 9)), *row)
    return csv_line(row) if args.csv else args.form % row


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
    """Prints sessions until a signal comes, the time is up or the reader of the output has gone."""
    read, reader, start, reported, stop = open_events(bpf, RECORD), select.poll(), time.monotonic_ns(), {}, False
    reader.register(1, 0)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    write(header(args))
    while not stop:
        time.sleep(0.1)         # seconds that a line may be late
        stop = signal.sigpending() & STOP_SIGNALS or reader.poll(0)
        records = read()
        if stop and not args.pid:       # sessions that ended before anybody accepted them: their owner is not known
            records += b"".join(bytes(8) + bytes(event) for event in bpf["unclaimed"].values())
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        stop = write("".join([line(args, record, start, wall) for record in RECORD.iter_unpack(records)])) or stop
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
