#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The authors of tcp-tracers
#
# tcpchurn  Count the TCP accepts, opens and closes of a process over sliding time windows.
#           For Linux, uses bcc, eBPF.
#
# usage: tcpchurn [-h] [-c | --json | --prometheus FILE] [--raddr ADDRESS | -p] [-w SECONDS [SECONDS ...]] [-i SECONDS]
#                 [-a] [-o] [--no-kprobe] [--name NAME] [--uid UID] [--cgroup PATH] [--netns NETNS]
#                 [--duration SECONDS] [--ebpf] [--version]
#                 PID
#
# O counts connections that the process opened: accept() calls that returned one, and connect() attempts. C counts those
# that ended on this side: the process sent its FIN (close, shutdown, exit), or the connection was torn down (reset,
# timeout, abort), each once. So O - C under ALL is the growth in open connections since the start.
#
# Traces the tracepoints sock:inet_sock_set_state and tcp:tcp_destroy_sock, accept() and the exit of the process. The
# kernel side counts in buckets of time; no events are sent to user space.
#
# CAVEATS: a window is exact to one bucket: 0.1 s, or a tenth of the smallest window if that is less. A connection that
# the process hands to another remains its own.

# ---- starting ----
import signal

# But for those that nohup or trap "" ignores. SIGALRM is for --duration.
STOP_SIGNALS = {number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
                if signal.getsignal(number) != signal.SIG_IGN} | {signal.SIGALRM}
if __name__ == "__main__":      # blocked from here on and polled: no signal interrupts an import or a line
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import glob
import json
import mmap
import os
import re
import select
import socket
import stat
import struct
import sys
import threading
import time

sys.dont_write_bytecode = True
gc.disable()                    # no loop here makes cycles, and looking for them takes a tenth of its time
try:
    from btfheaders import compiled     # kernel types without kernel headers, and a compiler that is quick and quiet
except ImportError:
    def compiled(_types, compile_it):   # without it, an ordinary bcc program that needs kernel headers
        return compile_it()

# ---- tcpchurn ----
import atexit
import bisect
import itertools
import math

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
MAPS = "lost", "buckets", "holders", "tables"
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "pid", "pid_namespace", "signal_struct", "files_struct", "fdtable",
                "file", "socket_alloc", "mptcp_sock", "nsproxy", "inet_hashinfo", "inet_ehash_bucket",
                "hlist_nulls_node"]
WINDOWS = [1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0, 500.0, 1200.0]     # seconds
BUCKET_SECONDS = 0.1            # at most
MAX_BUCKETS = 1 << 19           # 14 hours of 0.1 s
MAX_SOCKETS = 1 << 18           # live connections of the process
INTERVAL = 0.1                  # seconds between checks of the process
# Names in the C text, where they are numbers in this order, and what is printed.
LOSSES = {"LOST_SOCKET": "closes lost: the map of live connections was full",
          "SKIPPED": "state changes or accepts lost: the kernel did not run the probe"}
CAUSES = "map_full", "probe_skipped"            # LOSSES as labels for Prometheus
COUNTS = "ACCEPTED", "CONNECTED", "CLOSED", "EXISTED"
NOT_PRIVATE = ("!0.0.0.0/8,!10.0.0.0/8,!127.0.0.0/8,!169.254.0.0/16,!172.16.0.0/12,!192.168.0.0/16,"
               "!::/127,!fc00::/7,!fe80::/10")

bpf_text = r"""
#include <linux/sched/signal.h>

/* What had been counted when a bucket of time got its first event, so that no bucket ever has to be cleared. */
struct bucket {                 /* as BUCKET below */
    u64 number;                 /* bpf_ktime_get_ns() / BUCKET_NS */
    u64 count[4];               /* COUNTS */
};

BPF_F_TABLE("array", int, struct bucket, buckets, BUCKETS + 1, 1 << 10 /* BPF_F_MMAPABLE */);   /* last: so far */
BPF_HASH(owned, struct sock *, u8, MAX_SOCKETS);        /* open connections of the process */
BPF_ARRAY(ended, u8, 1);                                /* whether the process has ended */

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

static inline bool is_of_process(void)
{
    struct owner owner = {};
    int zero = 0;
    u8 *has_ended = ended.lookup(&zero);

    set_owner(&owner);
    return has_ended && !*has_ended && IS_WANTED_OWNER(&owner);
}

/* Whether the other end is one to be counted. */
static inline bool is_wanted(struct sock *sk)
{
    struct endpoints e;

    if (!FILTERS)
        return true;
    read_endpoints(&e, sk);
    return IS_WANTED_PEER(&e);
}

static inline bool is_open(u8 state)
{
    return state == TCP_ESTABLISHED || state == TCP_CLOSE_WAIT || state == TCP_SYN_SENT || state == TCP_SYN_RECV;
}

static inline void closed(struct sock *sk)
{
    if (owned.lookup(&sk) && !owned.delete(&sk))
        count(CLOSED);
}

static inline void opened(struct sock *sk, int how)
{
    u8 one = 1;
    int err;

    if (!is_wanted(sk))
        return;
    err = owned.insert(&sk, &one);
    if (err == -EEXIST)         /* counted already: another thread has put this socket behind the descriptor */
        return;
    if (err)
        count_lost(LOST_SOCKET);
    count(how);
    if (how != CONNECTED && !is_open(READ(sk, __sk_common.skc_state)))          /* ended before, or just now */
        closed(sk);
}

static inline void accepted(struct sock *sk)
{
    if (sk && is_of_process())
        opened(sk, ACCEPTED);
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    /* For new sockets, too: if one is known, the end of an older one at this address was not seen. */
    if ((oldstate == TCP_CLOSE || oldstate == TCP_LISTEN || !is_open(newstate)) && newstate != TCP_LISTEN)
        closed(sk);
    if (newstate == TCP_SYN_SENT && READ(sk, sk_protocol) == IPPROTO_TCP && is_of_process())
        opened(sk, CONNECTED);
}

/* A connected socket, at the start. */
static inline void found(struct sock *sk, u8 state, u16 what)
{
    struct owner *holder = holder_of(sk);

    if (holder && IS_WANTED_OWNER(holder) && is_open(state))
        opened(sk, EXISTED);
}

/* Counts what was accepted or found while its last state change was under way on another CPU, or was skipped. */
static inline void destroyed(struct sock *sk)
{
    closed(sk);
}

/* At the exit of each thread. A later process with this PID is another one. */
int tracepoint_exit(void *ctx)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    int zero = 0;
    u8 one = 1;

    if (is_of_process() && !READ(READ(task, signal), live.counter))
        ended.update(&zero, &one);
    return 0;
}
"""

BUCKET = struct.Struct("=5Q")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        PROGRAM, description="Count the TCP accepts, opens and closes of a process over sliding time windows",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    add = parser.add_argument
    seconds = number(0.001, 1e9, float)
    add("pid", metavar="PID", nargs="?", help="the process")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-c", "--clear", action="store_true", help="clear the screen before each update")
    output.add_argument("--json", action="store_true", help="print one JSON object per update")
    output.add_argument("--prometheus", metavar="FILE",
        help="write the counts since the start to FILE, for node-exporter's textfile collector, and print nothing")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--raddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of remote addresses or networks; ! excludes")
    peers.add_argument("-p", "--ignore-private", action="store_const", dest="raddr", const=networks(NOT_PRIVATE),
        help="leave out connections with private addresses")
    add("-w", "--windows", metavar="SECONDS", nargs="+", action="extend",
        help="time windows, in seconds (default: %s)" % ",".join("%g" % window for window in WINDOWS))
    add("-i", "--interval", metavar="SECONDS", type=seconds, default=1.0, help="time between two updates (default: 1)")
    add("-a", "--accepts", action="store_true", help="count accepts (A) and opens (O) separately")
    add("-o", "--open", action="store_true",
        help="include how many connections are open (N): that many seconds ago, and under ALL now")
    add("--no-kprobe", action="store_true", help="trace accept() at the exit of the system call, kprobes or not")
    add_common(parser)
    parser.color = False        # else the usage has escape sequences in it, since Python 3.14
    parser.usage = parser.format_usage()[len("usage: "):].replace("[PID]", "PID")      # optional for the parser only
    args = parser.parse_args(argv)
    others = args.name or args.uid or args.cgroup
    if args.pid is None and not others and args.windows and len(args.windows) > 1:
        args.pid = args.windows.pop()           # -w 1 5 10 PID
    if args.pid is None and not others:
        parser.error("the following arguments are required: PID")
    if args.prometheus is not None and not args.prometheus.endswith(".prom"):
        parser.error("the textfile collector reads no file whose name does not end in .prom: %r" % args.prometheus)
    try:
        args.pid = args.pid and [process(args.pid)]
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


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    return flags({
        **filters(args),
        "MAX_SOCKETS": MAX_SOCKETS, "MAX_HOLDERS": MAX_SOCKETS, "WALKS": 1,
        "BUCKETS": buckets(args), "BUCKET_NS": "%dull" % bucket_ns(args),
    }, LOSSES, COUNTS)


def program(_args):
    return shared_text + bpf_text + probes_text


def attach(bpf, args):
    attach_state_changes(bpf)
    bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
    if args.pid:
        bpf.attach_raw_tracepoint(tp="sched_process_exit", fn_name="tracepoint_exit")
    attach_accept(bpf, args)
    for name in WALK:
        bpf.load_func(name, bpf.RAW_TRACEPOINT)


class Windows:
    """Counts over sliding windows, from the buckets of the kernel side."""

    def __init__(self, args, buckets_fd):
        self.size, self.width = buckets(args), bucket_ns(args)
        self.spans = [math.ceil(window * 1e9 / self.width) for window in args.windows]
        self.history = []       # the buckets that had events, the oldest first
        self.memory = mmap.mmap(buckets_fd, (self.size + 1) * BUCKET.size, prot=mmap.PROT_READ)
        self.next = 0           # number of the bucket to look at next

    def bucket(self, slot):
        return BUCKET.unpack_from(self.memory, slot * BUCKET.size)

    def read(self):
        """Returns what was counted, in the order of COUNTS, in each of the windows, and in all."""
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


def open_of(totals):
    """Returns how many connections are open, from the counts in all."""
    accepted, connected, closed, existed = totals
    return existed + accepted + connected - closed


def render(args, windows, totals, knows_existing=True):
    """Returns whole lines for one update, from what Windows.read() returns."""
    accepted, connected, closed, _ = zip(*windows)
    all_accepted, all_connected, all_closed, _ = totals
    opened, all_opened = [a + c for a, c in zip(accepted, connected)], all_accepted + all_connected
    if args.json:
        cgroup = os.fsencode(cgroup_of(args.pid[0])[0] or "").decode(errors="backslashreplace") if args.pid else ""
        return json.dumps({
            "ts": round(time.time(), 6), "pid": args.pid and args.pid[0], "cgroup": cgroup or None,
            "windows": args.windows, "opened": opened, "accepted": accepted,
            "connected": connected, "closed": closed, "open": open_of(totals) if knows_existing else None,
            "all": {"opened": all_opened, "accepted": all_accepted, "connected": all_connected, "closed": all_closed},
        }, separators=(",", ":")) + "\n"
    rows = [("O", opened, all_opened), ("C", closed, all_closed)]
    if args.accepts:
        rows[:1] = [("A", accepted, all_accepted), ("O", connected, all_connected)]
    if args.open:
        row = [open_of(totals) - o + c for o, c in zip([*opened, 0], [*closed, 0])]
        *counts, total = row if knows_existing else ["N/A"] * len(row)
        rows.append(("N", counts, total))
    lines = [" " + "".join(map(heading, args.windows)) + "%7s\n" % "ALL"]
    lines += [name + "".join("%8s" % count for count in counts) + "%7s\n" % total for name, counts, total in rows]
    return args.clear * "\033[H\033[2J" + "".join(lines)


def labels_of(pid):
    """Returns PID and COMM for labels(), COMM escaped as in the text of the other tools."""
    comm = b"\n"
    with contextlib.suppress(OSError), open("/proc/%s/comm" % pid, "rb") as file:
        comm = file.read()
    return {"pid": pid or "", "comm": comm[:-1].decode("latin-1").encode("unicode_escape").decode("ascii")}


def metrics(common, totals, knows_existing=True):
    """Returns the counts since the start for publish(). common: from labels_of()."""
    accepted, connected, closed, _ = totals
    process = labels(**common)
    return [("accepts_total", "counter", "TCP connections that the process accepted.", {process: accepted}),
            ("connects_total", "counter", "Attempts of the process to connect by TCP.", {process: connected}),
            ("closes_total", "counter", "TCP connections that ended on the side of the process.", {process: closed}),
            ("open", "gauge", "TCP connections of the process that are open.",
             {process: open_of(totals)} if knows_existing else {})]


def trace(args):
    """Prints updates until a signal comes, the time is up, or the process or the reader of the output has gone."""
    pid, = args.pid or [None]
    try:
        process = pid and os.pidfd_open(pid)
    except ProcessLookupError:
        die("no such process: %d" % pid)
    fds = load(args)
    report, wait = open_losses(fds), open_wait(process)
    knows_existing = learn_existing(fds, args, *args.pid or ())
    windows = Windows(args, fds["buckets"])
    common = labels_of(pid)
    start = time.time()
    due = time.monotonic() + (0 if args.prometheus else args.interval)
    stop = gone = False
    if args.prometheus:
        atexit.register(unpublish, args.prometheus)
    while not stop:
        stop = wait(due - time.monotonic())
        gone = bool(pid and select.select([process], [], [], 0)[0])
        stop = stop or gone
        if stop or time.monotonic() >= due:
            due = max(due + args.interval, time.monotonic())
            report()
            if args.prometheus:
                publish(args.prometheus, metrics(common, windows.read()[1], knows_existing), start, **common)
            else:
                stop = write(render(args, *windows.read(), knows_existing)) or stop
    if gone:
        say("process %d has ended" % pid)
    report(in_all=True)


# -------- Shared from here on: a part has the same text in every tool that has it, to the letter (make same) --------

shared_text = r"""
/* ---- members ---- */
#include <linux/errqueue.h>
#include <linux/fdtable.h>
#include <linux/net.h>
#include <linux/pid_namespace.h>
#include <linux/tcp.h>
#include <net/sock.h>

/* A member of a kernel object. */
#define READ(p, member) ({                                                  \
    typeof((p)->member) value;                                              \
    bpf_probe_read_kernel(&value, sizeof(value), &(p)->member);             \
    value;                                                                  \
})

/* ---- losses ---- */
BPF_F_TABLE("array", int, u64, lost, STARTED + 1, 1 << 10 /* BPF_F_MMAPABLE */);

static inline void count_lost(int what)
{
    u64 *n = lost.lookup(&what);

    if (n)
        __sync_fetch_and_add(n, 1);
}

/* ---- marks ---- */
/*
 * The kernel skips a program that is already running on this CPU (since 6.1): it would miss the events of a softirq
 * that interrupts it and, since 7.0, those of a process that preempts it. So a second program runs right after the
 * first one, for the same event. If the first has left a mark, it did the work; if not, it was skipped.
 *
 * A mark belongs to the place of ctx on the kernel stack. That is the same for both programs, and another one for all
 * else that runs or waits at that time. Where the mark of a place is taken by another one, the second does the work.
 */
struct mark {
    u64 place, event;           /* event: 0 if the mark is free */
};

#if PREEMPTIBLE                 /* between the two, the process may lose its CPU and go on on another one */
BPF_HASH(marks, u32, struct mark, MAX_MARKS);
#else
BPF_PERCPU_ARRAY(marks, struct mark, MAX_MARKS);
#endif

static inline bool is_mine(void *ctx, u64 event, bool first)
{
    int started = STARTED;
    u64 *has_started = lost.lookup(&started);
    u64 place = ctx - (void *)has_started;      /* a number: the verifier does not let ctx itself be stored */
    u32 key = place * 0x9e3779b97f4a7c15 >> 32;
    struct mark *mark, new = {};

    if (!has_started || !*has_started)          /* the other program may not be attached yet */
        return false;
    if (!PREEMPTIBLE)
        key %= MAX_MARKS;
    else if (first && !marks.lookup(&key))
        marks.update(&key, &new);
    mark = marks.lookup(&key);
    if (first) {
        if (!mark || (mark->event && mark->place != place)) {
            count_lost(SKIPPED);
            return false;
        }
        mark->place = place;
        mark->event = event;
        return true;
    }
    if (mark && mark->place == place && mark->event == event) {
        mark->event = 0;
        return false;
    }
    count_lost(RESCUED);
    return true;
}

/* ---- owners ---- */
struct owner {
    u32 pid;                    /* 0: not known */
    char comm[TASK_COMM_LEN];
    u32 wanted;                 /* whether the options want this process */
    u64 cgroup;                 /* ID of its cgroup v2; 0: not asked for */
};

#if CGROUP_FILTER
BPF_CGROUP_ARRAY(wanted_cgroup, 1);
#endif

/* Not in a loop: Linux 6.1 cannot verify that, and LLVM cannot unroll it. */
#define LOOK_AT(depth)                                                      \
    if (depth <= deepest) {                                                 \
        bpf_probe_read_kernel(&number, sizeof(number), &pid->numbers[depth]);   \
        if (READ(number.ns, ns.inum) == PIDNS)                              \
            return number.nr;                                               \
    }

/* The process ID that /proc shows where the tool runs; 0 for a process outside of that PID namespace. */
static inline u32 pid_of(struct task_struct *task)
{
#if PIDNS
    struct pid *pid = READ(READ(task, group_leader), thread_pid);
    u32 deepest = READ(pid, level);
    struct upid number;

    LOOK_AT(0) LOOK_AT(1) LOOK_AT(2) LOOK_AT(3) LOOK_AT(4) LOOK_AT(5) LOOK_AT(6) LOOK_AT(7)
    return 0;
#else
    return bpf_get_current_pid_tgid() >> 32;
#endif
}

/* To be called only where the current process is the one that uses the socket. */
static inline void set_owner(struct owner *o)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    u32 flags = READ(task, flags);

    if (flags & PF_KTHREAD)     /* closes for others: MPTCP's worker, io_uring's, the collector of Unix sockets */
        return;
    o->pid = pid_of(task);
    if (flags & PF_IO_WORKER)   /* a thread of the process that io_uring has named iou-wrk-PID */
        bpf_probe_read_kernel(&o->comm, sizeof(o->comm), &READ(task, group_leader)->comm);
    else
        bpf_get_current_comm(&o->comm, sizeof(o->comm));
    o->wanted = o->pid && IS_WANTED_PROCESS(o);
    if (CGROUP_IDS)
        o->cgroup = bpf_get_current_cgroup_id();
#if CGROUP_FILTER
    if (wanted_cgroup.check_current_task(0) != 1)
        o->wanted = 0;
#endif
}

/* ---- endpoints ---- */
struct address {
    u32 word[4];                /* as sent; IPv4 as ::ffff:a.b.c.d */
    u32 scope;                  /* the interface that the socket is bound to */
};

struct endpoints {
    struct address laddr, raddr;
    u16 lport, rport;
    u32 netns;
};

#define IS_IPV4(address) (!(address).word[0] && !(address).word[1] && (address).word[2] == htonl(0xffff))

static inline void read_endpoints(struct endpoints *e, struct sock *sk)
{
    struct sock_common c;

    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    __builtin_memset(e, 0, sizeof(*e));
    e->netns = READ(c.skc_net.net, ns.inum);
    if (c.skc_family == AF_INET) {
        e->laddr.word[2] = e->raddr.word[2] = htonl(0xffff);
        e->laddr.word[3] = c.skc_rcv_saddr;
        e->raddr.word[3] = c.skc_daddr;
    } else {
        __builtin_memcpy(e->laddr.word, &c.skc_v6_rcv_saddr, sizeof(e->laddr.word));
        __builtin_memcpy(e->raddr.word, &c.skc_v6_daddr, sizeof(e->raddr.word));
        e->laddr.scope = e->raddr.scope = c.skc_bound_dev_if;
    }
    /* skc_num is 0 once the socket has left the port's hash table, which is before CLOSE. inet_sport stays. */
    e->lport = ntohs(READ((struct inet_sock *)sk, inet_sport));
    e->rport = ntohs(c.skc_dport);
}

/* The inode that user space sees of this socket; 0 before accept() and after close(). */
static inline u32 inode_of(struct sock *sk)
{
    struct socket *socket = READ(sk, sk_socket);

    return socket ? READ((struct socket_alloc *)socket, vfs_inode.i_ino) : 0;
}

/* ---- holders ---- */
BPF_HASH(holders, u32, struct owner, MAX_HOLDERS);      /* of sockets from before the start, by the file's inode */

static inline struct owner *holder_of(struct sock *sk)
{
    u32 inode = inode_of(sk);

    return holders.lookup(&inode);
}

/* ---- accepted sockets ---- */
/* What accept() returned, if it is TCP, else NULL. Of MPTCP it is the first subflow, unless that has ended. */
static inline struct sock *tcp_of(struct sock *sk)
{
    u16 protocol = READ(sk, sk_protocol);

#ifdef BTF_HAS_mptcp_sock
    if (protocol == IPPROTO_MPTCP)
        return READ((struct mptcp_sock *)sk, first) ?: sk;
#endif
    return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP ? sk : NULL;
}

/* The socket behind a descriptor of the current process; NULL if it is already closed, or no longer a socket. */
static inline struct sock *socket_of(long fd)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct file **files, *file = NULL;
    struct socket *socket;

    files = READ(READ(READ(task, files), fdt), fd);
    bpf_probe_read_kernel(&file, sizeof(file), &files[fd]);
    socket = READ(file, private_data);
    return file && READ(socket, file) == file ? READ(socket, sk) : NULL;
}

struct syscall_exit {
    u64 common;
    long nr, ret;
};

"""

probes_text = r"""
/* ---- state changes ---- */
static inline int set_state(struct bpf_raw_tracepoint_args *ctx, bool first)
{
    /* An event is a socket and its new state, which goes into the top byte of the address: the same for all sockets. */
    if (!TWO_PROGRAMS || is_mine(ctx, ctx->args[0] ^ ctx->args[2] << 56, first))
        state_change(ctx, (struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_first(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, true); }
int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx) { return set_state(ctx, false); }
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx) { destroyed((struct sock *)ctx->args[0]); return 0; }

/* ---- accept() ---- */
/* security_sock_graft() is called in accept() with the new socket, by io_uring too. */
int kprobe_accept(struct pt_regs *ctx, struct sock *sk) { accepted(tcp_of(sk)); return 0; }

static inline int accept_returned(struct syscall_exit *ctx, bool first)
{
    if (ctx->ret >= 0 && (!PREEMPTIBLE || is_mine(ctx, bpf_get_current_pid_tgid(), first)))
        accepted(tcp_of(socket_of(ctx->ret)));          /* or an older socket, put there by another thread meanwhile */
    return 0;
}

int tracepoint_accept_first(struct syscall_exit *ctx) { return accept_returned(ctx, true); }
int tracepoint_accept_second(struct syscall_exit *ctx) { return accept_returned(ctx, false); }

/* ---- existing sockets ---- */
BPF_F_TABLE("array", int, u64, tables, 512, 1 << 10 /* BPF_F_MMAPABLE */);

#if WALKS                       /* else compiling them would take a tenth of a second for nothing */
#include <linux/nsproxy.h>
#include <net/inet_hashtables.h>

/* Called by walk(), not by the kernel. Since Linux 6.1 a network namespace may have its own table of sockets. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#define TABLE_OF(net) READ(READ(net, ipv4.tcp_death_row), hashinfo)
#else
#define TABLE_OF(net) READ(net, ipv4.tcp_death_row.hashinfo)
#endif

/* Returns how many elements are set: one per network namespace, 0 for none. */
int find_tables(void *ctx)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct net *own = READ(READ(task, nsproxy), net_ns), *net = own;
    u64 *table;
    int i, n;

    for (i = 0; i < 512 && (!i || net != own); i++) {
        n = i;                  /* Linux 5.10 cannot verify a loop whose counter is on the stack */
        table = tables.lookup(&n);
        if (table)              /* the head of the list is no namespace */
            *table = READ(net, ns.ops) == READ(own, ns.ops) ? (u64)TABLE_OF(net) : 0;
        net = container_of(READ(net, list.next), struct net, list);
    }
    return i;
}

/*
 * Arguments: a table, a bucket, and what to tell found(). Returns the bucket to go on with, ~0 at the end. It holds the
 * RCU lock: what was a socket may be another one by now, in another bucket, but is nothing else.
 */
int walk_table(struct bpf_raw_tracepoint_args *ctx)
{
    struct inet_hashinfo *table = (struct inet_hashinfo *)ctx->args[0];
    struct inet_ehash_bucket *buckets = READ(table, ehash);
    u32 bucket = ctx->args[1], last = READ(table, ehash_mask);
    struct hlist_nulls_node *node = READ(buckets + bucket, chain.first);
    struct sock *sk;
    u8 state;
    int i;

    for (i = 0; i < 128 && bucket <= last; i++) {
        if (!((u64)node & 1)) {
            sk = container_of(node, struct sock, __sk_common.skc_nulls_node);
            state = READ(sk, __sk_common.skc_state);
            if (state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV && state != TCP_CLOSE)      /* no mini-sockets */
                found(sk, state, ctx->args[2]);
            node = READ(node, next);
        } else if ((u64)node >> 1 == bucket) {          /* the end of the chain has the number of its bucket */
            bucket++;
            node = READ(buckets + bucket, chain.first);
        } else {
            return bucket;
        }
    }
    return bucket > last ? ~0 : bucket;
}
#endif
"""

# ---- arguments ----
def number(low, high, kind=int):
    """Returns a converter for argparse: a number from low to high in plain digits, as an int or a float."""
    def number_from(text):
        if not re.fullmatch(r"\d+" if kind is int else r"\d*\.?\d+", text, re.A) or not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError("not a number from %s to %s: %r" % (low, high, text))
        return kind(text)
    return number_from


def ports(text):
    return [number(1, 65535)(port) for port in text.split(",")]


def names(text):
    """Returns names of processes, as bytes. Longer ones do not exist."""
    found = [os.fsencode(name) for name in text.split(",")]
    if not all(0 < len(name) < 16 for name in found):
        raise argparse.ArgumentTypeError("not a list of names of 1 to 15 bytes: %r" % text)
    return found


def uids(text):
    return [number(0, 0xffffffff)(uid) for uid in text.split(",")]


def process(text):
    """Returns a process ID. The process need not exist yet, but a thread is refused."""
    pid = number(1, 1 << 22)(text)
    with contextlib.suppress(OSError), open("/proc/%d/status" % pid, "rb") as status:
        leader = int(status.read().split(b"\nTgid:")[1].split()[0])
        if leader != pid:
            raise argparse.ArgumentTypeError("%d is a thread of process %d" % (pid, leader))
    return pid


def processes(text):
    return [process(pid) for pid in text.split(",")]


def netns(text):
    """Returns the inode number of a network namespace, given as such, as a path or as a name from `ip netns list`."""
    path = text if "/" in text else "/run/netns/" + text
    if text.isdecimal() and not os.path.exists(path):
        inode = number(1, 0xffffffff)(text)
        try:
            path = netns_path(inode)
        except OSError:
            return inode
    with contextlib.suppress(OSError):
        namespace = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if fcntl.ioctl(namespace, 0xb703) == 0x40000000:    # NS_GET_NSTYPE, CLONE_NEWNET
            return os.fstat(namespace).st_ino               # left open: nobody else gets this number
    raise argparse.ArgumentTypeError("not a network namespace: %r" % text)


def netns_path(inode):
    """Returns a path to this network namespace, "" if there is none. Raises OSError if not all processes are shown."""
    if os.stat("/proc/1/ns/pid").st_ino != 0xeffffffc:          # as in pid_namespace()
        raise PermissionError
    for path in [*glob.iglob("/run/netns/*"), *glob.iglob("/proc/[0-9]*/ns/net")]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):        # it has ended
            if os.stat(path).st_ino == inode:
                return path
    return ""


def add_common(parser, *letters):
    """Adds what all tools have. letters: -u and -N, where they are other names of --uid and --netns."""
    add = parser.add_argument
    add("--name", metavar="NAME", type=names, help="trace processes of this name only (or of comma-separated names)")
    add(*{"-u"} & {*letters}, "--uid", type=uids, help="trace this UID only (or comma-separated ones)")
    add("--cgroup", metavar="PATH", type=cgroup, help="trace this cgroup v2, and those below it, only")
    add(*{"-N"} & {*letters}, "--netns", type=netns,
        help="trace this network namespace only: inode number, path or name")
    add("--duration", metavar="SECONDS", type=number(0.001, 1e9, float), help="exit after this many seconds")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit


# ---- cgroups ----
@functools.lru_cache(maxsize=None)
def cgroup_mount():
    """Returns where cgroup v2 is mounted; "" if it is not."""
    with open("/proc/self/mountinfo") as mounts:
        return (re.findall(r"(?m)^\S+ \S+ \S+ \S+ (\S+) .* - cgroup2 ", mounts.read()) or [""])[0]


def cgroup(text):
    """Returns the path of a cgroup v2 as /proc/PID/cgroup shows it, given so or as a directory."""
    path = os.path.normpath("/" + text.removeprefix(cgroup_mount()).lstrip("/"))
    if not os.path.exists(cgroup_mount() + path + "/cgroup.procs") or not cgroup_mount():
        raise argparse.ArgumentTypeError("not a cgroup v2: %r" % text)
    return path


# ---- filters ----
def any_of(condition, values):
    """Returns a C expression that is true if the condition holds for one of the values, or if there are none."""
    return " || ".join([condition % value for value in values or []]) or "true"


def filters(args):
    """Returns the options that filter as macros: C expressions that are true for what is wanted."""
    option = vars(args).get
    name = "(%s)" % " && ".join(["((u32 *)(o)->comm)[%d] == %%du" % n for n in range(4)])
    owner = [any_of("(o)->pid == %d", args.pid), any_of("(u32)bpf_get_current_uid_gid() == %du", args.uid),
             any_of(name, [struct.unpack("=4I", comm.ljust(16, b"\0")) for comm in args.name or []])]
    peer = [address_condition("(e)->laddr", option("laddr")), address_condition("(e)->raddr", option("raddr")),
            any_of("(e)->netns == %d", args.netns and [args.netns]), any_of("(e)->rport == %d", option("rport")),
            "IS_IPV4((e)->raddr)" if option("ipv4") else "!IS_IPV4((e)->raddr)" if option("ipv6") else "true"]
    return {"IS_WANTED_PROCESS(o)": " && ".join(["(%s)" % condition for condition in owner]),
            "IS_WANTED_OWNER(o)": "(o)->wanted" if set(owner) != {"true"} or args.cgroup else "true",
            "CGROUP_FILTER": int(args.cgroup is not None), "CGROUP_IDS": int(bool(args.json or option("unit"))),
            "INODE_OF(sk)": "inode_of(sk)" if args.json else "0",
            "IS_WANTED_PEER(e)": " && ".join(["(%s)" % condition for condition in peer]),
            "IS_WANTED_LPORT(port)": any_of("(port) == %d", option("lport")),
            "FILTERS": int(set(peer) != {"true"} or bool(option("lport")))}


# ---- addresses ----
def networks(text):
    """Returns a list of addresses and prefixes: (ip_network of IPv6, number of an interface or 0, "!" excludes it)."""
    import ipaddress
    found = []
    try:
        if not text.isascii():                  # ip_network() would take the digits of any script
            raise ValueError
        for part in text.split(","):
            name, percent, interface = part.removeprefix("!").partition("%")
            network, scope = ipaddress.ip_network(name, strict=False), 0
            if percent:
                scope = number(1, 0x7fffffff)(interface) if interface.isdecimal() else socket.if_nametoindex(interface)
            if scope and (network.version == 4 or not network.is_link_local):
                raise ValueError
            if network.version == 4:
                network = ipaddress.ip_network("::ffff:%s/%d" % (network.network_address, 96 + network.prefixlen))
            found.append((network, scope, part.startswith("!")))
    except (ValueError, OSError):
        raise argparse.ArgumentTypeError("not a list of addresses or networks: %r" % text)
    return found


def address_condition(address, networks):
    """Returns a C expression that is true for a struct address that networks() wants, or for all if there are none."""
    conditions = {True: [], False: []}
    for network, scope, is_excluded in networks or []:
        words = zip(struct.unpack("=4I", network.network_address.packed), struct.unpack("=4I", network.netmask.packed))
        parts = ["(%s.word[%d] & %du) == %du" % (address, n, mask, value)
                 for n, (value, mask) in enumerate(words) if mask]
        if network.prefixlen < 96:              # IPv6, but not IPv4 in the form of IPv6
            parts.append("!IS_IPV4(%s)" % address)
        if scope:
            parts.append("%s.scope == %d" % (address, scope))
        conditions[is_excluded].append("(%s)" % " && ".join(parts))
    wanted, excluded = " || ".join(conditions[False]), " || ".join(conditions[True])
    return "%s && !(%s)" % ("(%s)" % wanted if wanted else "true", excluded) if excluded else wanted or "true"


# ---- bpf(2) ----
SYS_BPF = {"x86_64": 321, "ppc64le": 361, "s390x": 351}.get(os.uname().machine, 280)


def call_bpf(command, form, *values):
    """Calls bpf(2) with a union bpf_attr of these values; a pointer is given as what it points to.

    Returns the union as the kernel leaves it. Raises OSError, but not at the end of a map.
    """
    numbers = [value if isinstance(value, int) else ctypes.cast(value, ctypes.c_void_p).value for value in values]
    attr = ctypes.create_string_buffer(struct.pack(form, *numbers), 128)
    if LIBC.syscall(SYS_BPF, command, attr, len(attr)) < 0 and ctypes.get_errno() != errno.ENOENT:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return attr


# ---- existing sockets ----
def cgroup_of(pid):
    """Returns the path of the process's cgroup v2 and its ID; None and 0 if it has none."""
    with contextlib.suppress(OSError, TypeError), open("/proc/%s/cgroup" % pid, errors="surrogateescape") as file:
        path = re.search(r"(?m)^0::(?!/\.\.)(.*)$", file.read())[1]       # "/..": outside our cgroup namespace
        return path, os.stat(cgroup_mount() + path).st_ino
    return None, 0


def is_wanted(args, pid, comm, path):
    """Returns whether the options want this process, by what /proc shows. Raises OSError if it has ended."""
    with open("/proc/%s/status" % pid, "rb") as status:
        uid = int(status.read().split(b"\nUid:")[1].split()[0])
    is_within = not args.cgroup or os.path.commonpath([path or "/", args.cgroup]) == args.cgroup
    return bool(is_within and (not args.pid or int(pid) in args.pid) and (not args.name or comm in args.name) and
                (not args.uid or uid in args.uid))


def socket_inodes(pid):
    """Returns the inode numbers of the sockets that the process holds, of any kind. Raises OSError."""
    inodes = set()
    for task in os.listdir("/proc/%s/task" % pid):              # a first thread that has ended shows no descriptors
        for fd in os.scandir("/proc/%s/task/%s/fd" % (pid, task)):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(fd.path)
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
        if inodes:
            break               # the other threads have the same descriptors
    return inodes


WALK = "find_tables", "walk_table"


def learn_existing(fds, args, *pids):
    """Tells the kernel side which process holds which socket, of several the first one, and walks. pids: only these.

    Returns whether all owners are known; None if the kernel refuses.
    """
    holders, is_hidden = {}, False
    for pid in pids or filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/comm" % pid, "rb") as file:
                comm = file.read()[:-1][:15]
            path, cgroup_id = cgroup_of(pid)
            owner = struct.pack("=I16sIQ", int(pid), comm, is_wanted(args, pid, comm, path), cgroup_id)
            for inode in socket_inodes(pid):
                holders.setdefault(inode, owner)
        except OSError as error:                # else it has ended
            is_hidden |= isinstance(error, PermissionError)
    known = dict(itertools.islice(holders.items(), MAX_SOCKETS))
    if known:                   # BPF_MAP_UPDATE_BATCH
        call_bpf(26, "=16xQQII16x", struct.pack("=%dI" % len(known), *known), b"".join(known.values()), len(known),
                 fds["holders"])
    with open("/proc/self/status") as status:
        capabilities = int(re.search(r"CapEff:\s*(\w+)", status.read())[1], 16)
    is_blind = not (capabilities >> 19 & 1 and capabilities & 6)
    if is_blind and (is_hidden or not pids):
        say("owners of sockets from before the start not known: needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
    if len(holders) > MAX_SOCKETS:
        say("%d owners of sockets from before the start not known: the map was full" % (len(holders) - MAX_SOCKETS))
    is_known = len(holders) <= MAX_SOCKETS and not (is_hidden and (pids or is_blind))
    return None if walk(fds) is None else is_known


def walk(fds, what=0, read=bytes):
    """Calls found() of the C text with each connected socket of the host, and read() now and then.

    Returns what read() returned, joined; None, after a message, if the kernel refuses.
    """
    def call(name, *values):    # BPF_PROG_TEST_RUN, with the arguments of a tracepoint
        context = struct.pack("=12Q", *values, *[0] * (12 - len(values)))
        return struct.unpack_from("=I", call_bpf(10, "=I36xI4xQ", fds[name], len(context), context), 4)[0]
    results, calls, missed = [], 0, 0
    try:
        count = call("find_tables")
        tables = mmap.mmap(fds["tables"], 512 * 8, prot=mmap.PROT_READ)
        for table in {*memoryview(tables).cast("Q")[:count]} - {0}:
            bucket = again = 0
            while bucket != 0xffffffff and missed < 1000:       # more if the table goes away with its namespace
                start, bucket = bucket, call("walk_table", table, bucket, what)
                again = again + 1 if bucket == start else 0
                missed += again == 100
                bucket += again == 100
                calls += 1
                if not calls % 64:
                    results.append(read())
    except OSError as error:
        say("cannot look for connected sockets: %s" % error.strerror)
        return None
    if missed:
        say("%d chains of connected sockets not read to the end: too long, or changing too fast" % missed)
    if count == 512:
        say("network namespaces after the 512th may have tables of connected sockets that are not known")
    return b"".join([*results, read()])


# ---- compiling ----
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
# "tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast": a process may preempt another's program.
PREEMPTIBLE = KERNEL >= (7, 0)
MAX_MARKS = 1 << 14 if PREEMPTIBLE else 1 << 8  # of all CPUs: 1 MB of kernel memory, or of each: 4 KB


def flags(macros, *enums):
    """Returns compiler flags: the macros, and each name in an enum as its place there."""
    macros.setdefault("TWO_PROGRAMS", 1)
    for names in enums:
        macros.update(zip(names, range(len(names))))
    macros.update(PIDNS=pid_namespace(), PREEMPTIBLE=int(PREEMPTIBLE), MAX_MARKS=MAX_MARKS,
                  RESCUED=len(LOSSES), STARTED=len(LOSSES) + 1)
    return ["-g0"] + ["-D%s=(%s)" % item for item in macros.items()]    # no debug information: starts 10 % faster


def pid_namespace():
    """Returns the inode number of the PID namespace whose numbers /proc shows; 0 for the initial one."""
    inode = os.stat("/proc/self/ns/pid").st_ino
    with contextlib.suppress(OSError):          # only root may look at process 1, of whose namespace /proc is
        inode = os.stat("/proc/1/ns/pid").st_ino
    return 0 if inode == 0xeffffffc else inode          # PROC_PID_INIT_INO, include/linux/proc_ns.h


def attached(args):
    """Compiles, loads and attaches. Returns {name: descriptor} of the programs and of MAPS, and what attach() adds."""
    import bcc
    bpf = bcc.BPF(text=program(args), cflags=cflags(args))
    more = attach(bpf, args) or {}
    if args.cgroup:
        bpf["wanted_cgroup"][0] = cgroup_mount() + args.cgroup
    programs = {name.decode(): function.fd for name, function in bpf.funcs.items()}
    return {**programs, **{name: bpf[name].map_fd for name in MAPS}, **more}


def load(args):
    """Returns what attached() returns, or exits with one line that says what to do. --duration counts from here."""
    if KERNEL < (5, 10):
        die("needs Linux 5.10 or later")
    if sys.stdout is None or sys.stderr is None:        # else a BPF map would become descriptor 1 or 2
        die("standard output or standard error is closed")
    try:
        fds = compiled(KERNEL_TYPES, lambda: attached(args))
    except ImportError as error:
        die("%s: %s has no bcc: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora)"
            % (error, sys.executable))
    except Exception as error:
        die("cannot trace: %s" % error)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    return fds


# ---- state changes ----
def attach_state_changes(bpf, orders=("first", "second")):
    for order in orders:
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_" + order)
        bpf.raw_tracepoint_fds.clear()          # bcc refuses a second program on a raw tracepoint it knows of


# ---- accept() ----
def attach_accept(bpf, args):
    """Attaches to security_sock_graft(), or else to the exits of the system calls."""
    if not args.no_kprobe:
        with contextlib.suppress(Exception):    # no kprobes, or no CONFIG_SECURITY_NETWORK
            return bpf.attach_kprobe(event="security_sock_graft", fn_name="kprobe_accept")
    for order in ("first", "second") if PREEMPTIBLE else ("first",):
        bpf.attach_tracepoint(tp="syscalls:sys_exit_accept4", fn_name="tracepoint_accept_" + order)
        bpf.attach_tracepoint(tp="syscalls:sys_exit_accept", fn_name="tracepoint_accept_" + order)


# ---- losses ----
LOST = {}                       # what: how often since the start, as far as it is certain. No number ever falls.
# A program that may be skipped: the first ones handle the same events, and what is left of a socket is dropped later.
HARMLESS = {"tracepoint_set_state_second", "tracepoint_accept_second", "tracepoint_destroy"}


def open_losses(fds):
    """Starts tracing. Returns report(): it prints what was lost since it looked last, which it does once per second.

    With in_all it looks again, and prints what was lost since the start as well.
    """
    counters = memoryview(mmap.mmap(fds["lost"], mmap.PAGESIZE)).cast("Q")[:len(LOSSES) + 2]
    infos = [os.open("/proc/self/fdinfo/%d" % fd, os.O_RDONLY) for name, fd in fds.items()
             if name.startswith(("kprobe_", "tracepoint_")) and name not in HARMLESS]
    skipped = before = due = 0

    def report(in_all=False):
        nonlocal skipped, due
        if time.monotonic() < due and not in_all:
            return
        *counts, taken, rescued, _ = counters
        # What was skipped up to the last call and is not rescued by now: the second program runs right after the first.
        counts.append(skipped - before - rescued)
        misses = re.findall(rb"recursion_misses:\s*(\d+)", b"".join([os.pread(info, 4096, 0) for info in infos]))
        skipped, due = taken + sum(map(int, misses)), 0 if in_all else time.monotonic() + 1
        for what, count in zip(LOSSES.values(), counts):
            if count > LOST.setdefault(what, 0):
                say("%d %s" % (count - LOST[what], what))
                LOST[what] = count
        if in_all:
            report()
            for what, count in LOST.items():
                if count:
                    say("in all %d %s" % (count, what))

    counters[-1] = 1            # STARTED
    report()
    before, due = skipped, 0    # what was skipped before does not count
    return report


# ---- prometheus ----
def labels(**values):
    """Returns labels for Prometheus. The values are printable ASCII."""
    return "{%s}" % ",".join(['%s="%s"' % (name, str(value).replace("\\", r"\\").replace('"', r'\"'))
                              for name, value in values.items()])


def publish(path, metrics, start, **common):
    """Writes metrics, the losses and the start in Prometheus' text format 0.0.4, for the textfile collector.

    metrics: (name, type, HELP, {what follows the name: value}). HELP and TYPE have to be the same in all its files.
    start: Unix time. common: labels of the losses and of the start.
    """
    new = path[:-len("prom")] + "new"           # a name that the collector does not read
    with open(new, "w", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW)) as file:
        os.fchmod(file.fileno(), 0o644)         # whatever the umask is
        for name, kind, meaning, values in (
                *metrics, ("lost_total", "counter", "Events that %s knows it missed." % PROGRAM,
                           {labels(**common, what=what): n for what, n in zip(CAUSES, LOST.values())}),
                ("start_time_seconds", "gauge", "Unix time at which counting started.", {labels(**common): start})):
            file.write("# HELP {0}_{1} {2}\n# TYPE {0}_{1} {3}\n".format(PROGRAM, name, meaning, kind))
            file.writelines(["%s_%s%s %s\n" % (PROGRAM, name, *value) for value in values.items()])
    os.replace(new, path)                       # so that a reader never sees half a file


def unpublish(path):
    with contextlib.suppress(OSError):
        os.unlink(path)


# ---- output ----
class Output(threading.Thread):
    """Writes in a thread of its own, so that whoever does not read it holds up nothing else."""

    def __init__(self, fd):
        super().__init__(daemon=True)
        self.fd, self.rest, self.error = fd, b"", None
        self.given, self.idle = threading.Lock(), threading.Event()
        self.given.acquire()    # until there is a text
        self.idle.set()

    def run(self):
        while self.given.acquire():
            try:
                while self.rest:
                    self.rest = self.rest[os.write(self.fd, self.rest[:select.PIPE_BUF]):]
            except OSError as error:
                self.error = error
            self.idle.set()

    def put(self, text):
        """To be called only when it is idle."""
        self.rest = memoryview(text.encode())
        self.idle.clear()
        self.given.release()
        if not self.is_alive():
            self.start()        # not before the compiler is started: fork() wants a single thread


STDOUT, STDERR = Output(1), Output(2)
MISSING = []                    # messages that standard error has not taken


def say(message):
    """Prints a message on standard error, unless nobody has read the one before. Then the next one says how many."""
    if not STDERR.idle.is_set():
        return MISSING.append(message)
    text = "%s: %s\n" % (PROGRAM, message)
    if MISSING:
        text = "%s: %d messages missing here: standard error was full\n%s" % (PROGRAM, len(MISSING), text)
    MISSING.clear()
    STDERR.put(text)
    STDERR.idle.wait(0.2)


def die(message):
    say(message)
    sys.exit(1)


def write(text):
    """Prints all of it now. Returns True if the tool is to stop and nobody has read for a second."""
    if not text:
        return False
    STDOUT.put(text)
    left = len(text)
    while not STDOUT.idle.wait(1):
        if len(STDOUT.rest) == left and signal.sigpending() & STOP_SIGNALS:
            say("the output was not read to its end")
            return True
        left = len(STDOUT.rest)
    if STDOUT.error:
        raise STDOUT.error
    return False


# ---- waiting ----
LIBC = ctypes.CDLL(None, use_errno=True)


def open_wait(fd):
    """Returns wait(seconds), which waits for fd, but at most a second. It returns whether the tool is to stop.

    That is: a signal has come, --duration has passed, or the reader of the output has gone.
    """
    mask = struct.pack("=Q120x", sum(1 << signum - 1 for signum in STOP_SIGNALS))       # sigset_t
    poll = select.poll()
    poll.register(1, 0)
    for each in {LIBC.signalfd(-1, mask, 0), fd} - {None}:
        poll.register(each, select.POLLIN)

    def wait(seconds=1):
        if poll.poll(1000 * max(0, min(1, seconds))) == [(fd, select.POLLIN)]:
            time.sleep(0.1)     # seconds that a line may be late: what comes together is printed together
        return any(ready != fd for ready, _ in poll.poll(0))
    return wait


# ---- main ----
def main():
    try:
        args = parse_args()
        if args.ebpf:
            write("/* %s */\n%s" % (" ".join(cflags(args)), program(args)))
        else:
            trace(args)
    except ConnectionError:     # the reader of the output has gone
        pass
    except OSError as error:
        if error.errno != errno.EIO or not stat.S_ISCHR(os.fstat(1).st_mode):           # a terminal that has gone
            die("cannot write the output: %s" % error.strerror)


if __name__ == "__main__":
    main()
