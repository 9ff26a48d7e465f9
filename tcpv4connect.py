#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The authors of tcp-tracers
#
# tcpv4connect  Trace TCP IPv4 connects.
#               For Linux, uses bcc, eBPF.
#
# usage: tcpv4connect [-h] [-t] [-p PID] [-T] [-U] [-P PORT] [--saddr ADDRESS] [--daddr ADDRESS] [-r] [--min-ms MS]
#                     [--failed] [--unit] [--json] [--name NAME] [-u UID] [--cgroup PATH] [--netns NETNS]
#                     [--duration SECONDS] [--ebpf] [--version]
#
# Prints one line for each active IPv4 connection that a process attempts: when it starts, or with -r when its result is
# known. IPv4 from an IPv6 socket (v4-mapped addresses) is shown too, IPv6 is not.
#
# Traces the tracepoint sock:inet_sock_set_state, where a socket enters SYN_SENT and, with -r, leaves it, and
# tcp:tcp_destroy_sock. It enters inside connect(), after a route has been found, so the current process is the one that
# connects.
#
# CAVEATS: a connect() that finds no route never gets that far and is not shown.

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

# ---- tcpv4connect ----

examples = """examples:
    ./tcpv4connect           # trace all TCP IPv4 connect()s
    ./tcpv4connect -t        # include timestamps
    ./tcpv4connect -p 181    # only trace PID 181
    ./tcpv4connect -P 80,443 # only trace ports 80 and 443
    ./tcpv4connect -r        # show whether they succeed, and after how long
    ./tcpv4connect --json    # one JSON object per line
"""

PROGRAM = "tcpv4connect"
MAPS = "lost", "events", "attempts"
RECORD = struct.Struct("=8xQ32sII20s20sHHIQIIII")  # struct event, behind the ring buffer's own header
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "pid", "pid_namespace", "socket_alloc", "sock_exterr_skb", "sk_buff"]
MAX_ATTEMPTS = 1 << 17          # connects under way at once, with -r: 25 MB of kernel memory
RING_PAGES = (4 << 20) // mmap.PAGESIZE         # 4 MiB: a second of the fastest load measured
# Names in the C text, where they are numbers in this order, and what is printed.
LOSSES = {"LOST_EVENT": "connects lost: the ring buffer was full",
          "LOST_ATTEMPT": "connects lost: the map of attempts was full",
          "LOST_RESULT": "connects lost: their result was not seen",
          "SKIPPED": "state changes lost: the kernel did not run the probe"}
OUTCOMES = {"PENDING": "pending", "OK": "ok", "FAILED": "failed", "QUIT": "quit"}

bpf_text = r"""
struct event {
    u64 ts;                     /* bpf_ktime_get_ns() */
    struct owner owner;
    u32 uid, inode;
    struct endpoints ends;
    u64 decided;
    u32 outcome, err;           /* OUTCOMES, or if there was an error its number */
    u32 retrans;                /* SYNs sent again */
    u32 pad;
};

BPF_HASH(attempts, struct sock *, struct event, MAX_ATTEMPTS);          /* with -r: not decided yet */

static inline void submit(struct event *e)
{
    if (events.ringbuf_output(e, sizeof(*e), 0))
        count_lost(LOST_EVENT);
}

/* newstate: 0 when the socket is destroyed */
static inline void decide(struct sock *sk, int newstate)
{
    struct event *attempt = attempts.lookup(&sk), e;

    if (!attempt || newstate == TCP_SYN_RECV)       /* both ends have called connect() */
        return;
    e = *attempt;
    attempts.delete(&sk);
    /* Destroyed, or another socket at this address by now: the result was not seen. */
    if (!newstate || newstate == TCP_SYN_SENT || e.ends.rport != ntohs(READ(sk, __sk_common.skc_dport)))
        return count_lost(LOST_RESULT);
    e.decided = bpf_ktime_get_ns();
    e.retrans = READ((struct tcp_sock *)sk, total_retrans);
    e.outcome = newstate == TCP_ESTABLISHED ? OK : is_unsent(sk) ? FAILED : QUIT;
    if (e.outcome != OK)
        e.err = error_of(sk, TCP_SYN_SENT);
    if (e.outcome != FAILED)    /* else it has no port, and inet_sport is that of an earlier attempt */
        e.ends.lport = ntohs(READ((struct inet_sock *)sk, inet_sport));
    if ((e.outcome != OK || !ONLY_FAILED) && e.decided - e.ts >= MIN_NS)
        submit(&e);
}

/* tcp_v4_connect() has put the addresses into the socket. The local port is only there if it is bound to one. */
static inline void attempt(struct sock *sk)
{
    struct event e = {};

    if (READ(sk, sk_protocol) != IPPROTO_TCP)
        return;
    read_endpoints(&e.ends, sk);
    e.ends.lport = READ(sk, __sk_common.skc_num);
    if (!IS_IPV4(e.ends.raddr) || !IS_WANTED_PEER(&e.ends))
        return;
    set_owner(&e.owner);
    e.uid = bpf_get_current_uid_gid();
    if (!IS_WANTED_OWNER(&e.owner))
        return;
    e.inode = INODE_OF(sk);
    e.ts = bpf_ktime_get_ns();
    if (!RESULTS)
        submit(&e);
    else if (attempts.update(&sk, &e))
        count_lost(LOST_ATTEMPT);
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    if (RESULTS && (newstate == TCP_SYN_SENT || oldstate == TCP_SYN_SENT || oldstate == TCP_SYN_RECV))
        decide(sk, newstate);
    if (newstate == TCP_SYN_SENT)
        attempt(sk);
}

static inline void destroyed(struct sock *sk)
{
    decide(sk, 0);
}
"""

NAMES = {"pid": "PID", "comm": "COMM", "unit": "UNIT", "laddr": "SADDR", "raddr": "DADDR"}
RESULT_NAMES = "LPORT", "MS", "RESULT", "RETR"          # with -r
# Formats for columns(), of which the second is for --unit, and of the row that they stand in.
TEXT = "%(pid)-6s %(comm)-12.12s ", "%(unit)-12.12s ", "%(laddr)-16s %(raddr)-16s "
ROW, RESULT_ROW = "%s%s%s\n", "%s%s%-5s %-5s %-9s %-12s %s\n"
JSON = "%(members)s", "", ',"ip":4,"saddr":"%(laddr)s","daddr":"%(raddr)s","dport":'
JSON_ROW = '{"ts":%.6f,%s,"uid":%d%s%d,"netns":%d,"inode":%s%s}\n'
RESULT_JSON = ',"lport":%s,"ms":%.6f,%s,"retrans":%d'


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace TCP IPv4 connects",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    add = parser.add_argument
    add("-t", "--timestamp", action="store_true", help="include timestamp on output")
    add("-p", "--pid", type=processes, help="trace this PID only (or comma-separated ones)")
    add("-T", "--time", action="count", default=0,
        help="include time column on output (HH:MM:SS); given twice, with date and milliseconds")
    add("-U", "--print-uid", action="store_true", help="include UID on output")
    add("-P", "--port", dest="rport", metavar="PORT", type=ports,
        help="comma-separated list of destination ports to trace.")
    add("--saddr", dest="laddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of local addresses or networks; ! excludes")
    add("--daddr", dest="raddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of remote addresses or networks; ! excludes")
    add("-r", "--result", action="store_true",
        help="print each connect when its result is known, with local port, milliseconds and result")
    add("--min-ms", metavar="MS", type=number(0, 1e9, float), default=0,
        help="with -r, trace only connects that take as long")
    add("--failed", action="store_true", help="with -r, trace only connects that do not succeed")
    add("--unit", action="store_true", help="include the service or container of the process on output")
    add("--json", action="store_true", help="print one JSON object per line, with exact times")
    add_common(parser, "-u")
    args = parser.parse_args(argv)
    if (args.failed or args.min_ms) and not args.result:
        parser.error("--failed and --min-ms need -r")
    owner, unit, addresses = JSON if args.json else TEXT
    args.columns = owner, unit * args.unit + addresses
    args.row_format = time_format(args) + "%-8s " * args.timestamp + "%-5s " * args.print_uid
    args.row_format += RESULT_ROW if args.result else ROW
    return args


def orders(args):
    """Returns which of the programs for state changes are needed. No softirq interrupts connect(), but a result."""
    return ("first", "second") if args.result or PREEMPTIBLE else ("first",)


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    return flags({
        **filters(args),
        "TWO_PROGRAMS": int("second" in orders(args)),
        "RING_PAGES": RING_PAGES, "RECORD_SIZE": RECORD.size - 8,
        "MAX_ATTEMPTS": MAX_ATTEMPTS if args.result else 1,
        "RESULTS": int(args.result), "ONLY_FAILED": int(args.failed), "MIN_NS": "%dull" % (args.min_ms * 1e6),
    }, LOSSES, OUTCOMES)


def program(_args):
    return shared_text + bpf_text + probes_text


def attach(bpf, args):
    attach_state_changes(bpf, orders(args))
    if args.result:
        bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")


def header(args):
    if args.json:
        return ""
    names = *["UID"] * args.print_uid, *[form % NAMES for form in args.columns], "DPORT"
    return args.row_format % (time_names(args) + names + RESULT_NAMES * args.result)


@functools.lru_cache(maxsize=256)
def result_text(outcome, err):
    """Returns the result as text and as JSON members."""
    name = errno.errorcode.get(err, str(err)) if err else None
    result = name or list(OUTCOMES.values())[outcome]
    return result, '"result":"%s","err":%s' % (result, json.dumps(name))


def line(args, record, start, wall):
    """Returns one line. start: when tracing started, wall: offset of the kernel's clock from Unix time, both in ns."""
    ts, owner, uid, inode, laddr, raddr, lport, rport, netns, decided, outcome, err, retrans, _ = record
    who, addresses = columns(args.columns, str, owner, laddr, raddr, netns)
    if args.result:
        ms = ((decided or time.monotonic_ns()) - ts) / 1e6
        result, json_result = result_text(outcome, err)
    if args.json:
        more = RESULT_JSON % (lport or "null", ms, json_result, retrans) if args.result else ""
        return JSON_ROW % ((ts + wall) / 1e9, who, uid, addresses, rport, netns, inode or "null", more)
    row = who, addresses, rport
    if args.result:
        row += (lport or "N/A", "%.2f" % ms, result, retrans)
    if args.print_uid:
        row = (uid, *row)
    if args.time or args.timestamp:
        row = times(args, ts, start, wall) + row
    return args.row_format % row


def under_way(fds, latest):
    """Returns the connects whose result is not known yet, as records. latest: when they began, in ns."""
    records = [RECORD.unpack(bytes(8) + event)
               for event in map_values(fds["attempts"], RECORD.size - 8, MAX_ATTEMPTS)]
    return [record for record in records if record[0] <= latest]


def trace(args):
    """Prints connects until a signal comes, the time is up or the reader of the output has gone."""
    if "second" not in orders(args):
        HARMLESS.add("tracepoint_set_state_first")      # it may be skipped in softirq, where nobody calls connect()
    fds = load(args)
    report, read, wait = open_losses(fds), open_events(fds, RECORD), open_wait(fds["events"])
    start = time.monotonic_ns()
    write(header(args))
    stop = False
    while not stop:
        stop = wait()
        # At the end, what is under way. What is decided just now is in both, with the same up to the addresses.
        attempts = under_way(fds, time.monotonic_ns() - args.min_ms * 1e6) if stop and args.result else []
        records = RECORD.iter_unpack(read())
        if attempts:
            records = [*records]
            decided = {record[:6] for record in records}
            records += sorted(record for record in attempts if record[:6] not in decided)
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        stop = write("".join([line(args, record, start, wall) for record in records])) or stop
        report()
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

/* ---- sockets ---- */
/* Whether connect() failed before it sent a SYN, for lack of a port for example. TCP Fast Open may defer the SYN. */
static inline bool is_unsent(struct sock *sk)
{
    return !READ((struct tcp_sock *)sk, segs_out) && READ(READ(sk, sk_socket), state) == SS_UNCONNECTED;
}

/*
 * The socket's error, 0 for none. An ICMP error that comes while connect() holds the lock reaches the caller by the
 * error queue only; sk_err_soft has it until getsockopt(SO_ERROR) takes it from there.
 */
static inline int error_of(struct sock *sk, int oldstate)
{
    int err = READ(sk, sk_err);
    struct sock_exterr_skb *last;
    u8 origin;

    if (err || oldstate != TCP_SYN_SENT || !READ(sk, sk_error_queue.qlen))
        return err;
    last = (struct sock_exterr_skb *)READ(sk, sk_error_queue.prev)->cb;
    origin = READ(last, ee.ee_origin);
    return origin == SO_EE_ORIGIN_ICMP || origin == SO_EE_ORIGIN_ICMP6 ? READ(last, ee.ee_errno) : 0;
}

/* ---- ring buffer ---- */
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
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

/* ---- records ---- */
_Static_assert(sizeof(struct event) == RECORD_SIZE, "struct event is not as in RECORD");
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


# ---- maps ----
def map_values(fd, size, most):
    """Returns the values in a hash map whose keys are addresses, as bytes. size: of a value, most: values."""
    keys, values = [(ctypes.c_char * (n * most)).from_buffer(mmap.mmap(-1, n * most)) for n in (8, size)]
    attr = call_bpf(24, "=8xQQQII16x", bytes(8), keys, values, most, fd)            # BPF_MAP_LOOKUP_BATCH
    count, = struct.unpack_from("=I", attr, 32)
    return [values[n * size:(n + 1) * size] for n in range(count)]


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


# ---- ring buffer ----
def open_events(fds, record):
    """Returns a function that returns the records since its last call, as bytes. record: their struct.Struct.

    bcc would call back into Python once per record. The layout of a ring buffer is the kernel's ABI (see
    Documentation/bpf/ringbuf.rst): a page with the consumer's position, one with the producer's, then the data, mapped
    twice in a row so that no record is ever split.
    """
    page, size = mmap.PAGESIZE, RING_PAGES * mmap.PAGESIZE
    consumer = mmap.mmap(fds["events"], page)
    ring = memoryview(mmap.mmap(fds["events"], page + 2 * size, prot=mmap.PROT_READ, offset=page))
    position = ctypes.c_ulong.from_buffer(consumer)
    produced = ring[:8].cast("L")
    data = ring[page:]

    def read():
        start, end = position.value & size - 1, produced[0]
        if end == position.value:
            return b""
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


# ---- text ----
@functools.lru_cache(maxsize=1024)
def address(packed, netns):
    """Returns the text of struct address, with the interface of a link-local one; its number, if in another netns."""
    if packed.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:16])
    text, scope = socket.inet_ntop(socket.AF_INET6, packed[:16]), int.from_bytes(packed[16:], sys.byteorder)
    if not scope or packed[0] != 0xfe or packed[1] & 0xc0 != 0x80:
        return text
    with contextlib.suppress(OSError):          # the interface has gone
        name = socket.if_indextoname(scope)
        if netns == os.stat("/proc/self/ns/net").st_ino and re.fullmatch(r"[\w.-]+", name, re.A):
            return "%s%%%s" % (text, name)
    return "%s%%%d" % (text, scope)


@functools.lru_cache(maxsize=4096)
def cgroup_path(number):
    """Returns the path of the cgroup v2 with this ID; None if it has gone, or is not below the mount."""
    handle = struct.pack("=IiQ", 8, 0xfe, number)               # struct file_handle with FILEID_KERNFS
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        mount = os.open(cgroup_mount(), os.O_RDONLY)
        stack.callback(os.close, mount)
        file = LIBC.open_by_handle_at(mount, handle, os.O_PATH)
        stack.callback(os.close, file)
        path = os.readlink("/proc/self/fd/%d" % file)
        return path[len(cgroup_mount()):] or "/" if path.startswith(cgroup_mount()) else None


def escaped(raw):
    """Returns bytes as text that no terminal takes for anything else."""
    return raw.decode("latin-1").encode("unicode_escape").decode("ascii")


def json_text(raw):
    """Returns bytes as JSON text: what is no plain text is escaped, as I-JSON has no noncharacters."""
    text = raw.decode(errors="backslashreplace")
    return json.dumps(text if text.isprintable() else raw.decode("ascii", errors="backslashreplace"))


@functools.lru_cache(maxsize=1024)
def owner_text(packed):
    """Returns PID, COMM, UNIT and JSON members of struct owner. Names can be any bytes: all but plain text is escaped.

    UNIT is the name of a service, the start of a container's ID, or else the last part of the cgroup's path.
    """
    pid, comm, _, number = struct.unpack("=I16sIQ", packed)
    path = cgroup_path(number) if number else None
    if not pid:
        return "N/A", "N/A", "N/A", '"pid":null,"comm":null,"cgroup":null'
    comm, path = comm.partition(b"\0")[0], path and os.fsencode(path)
    text = json_text(comm)
    comm_hex = "" if json.loads(text).encode() == comm else ',"comm_hex":"%s"' % comm.hex()
    container = re.findall(b"[0-9a-f]{64}", path or b"")
    name = re.sub(rb"\.service$", b"", path.rpartition(b"/")[2]) or b"/" if path else b"N/A"
    return (pid, escaped(comm), escaped(container[-1][:12] if container else name),
            '"pid":%d,"comm":%s%s,"cgroup":%s' % (pid, text, comm_hex, json_text(path) if path else "null"))


# ---- columns ----
@functools.lru_cache(maxsize=4096)
def columns(forms, quote, owner, laddr, raddr, netns):
    """Returns %-formats filled in with what the lines of a process and a peer have in common. quote: for names."""
    pid, comm, unit, members = owner_text(owner)
    local, remote = address(laddr, netns), address(raddr, netns)
    values = {"pid": pid, "comm": quote(comm), "unit": quote(unit), "members": members, "ip": 6 if ":" in remote else 4,
              "laddr": local, "raddr": remote}
    return [form % values for form in forms]


# ---- times ----
def time_names(args):
    return (("TIME",) if args.time else ()) + (("TIME(s)",) if args.timestamp else ())


def time_format(args):
    """Returns the format of the column of -T."""
    return ("", "%-8s ", "%-23s ")[min(args.time, 2)]


def times(args, ts, start, wall):
    """Returns the columns of -T and -t. ts, start: ns of the kernel's clock; wall: its offset from Unix time."""
    columns = ()
    if args.time:
        ms = (ts + wall) // 10 ** 6
        text = time.strftime("%H:%M:%S" if args.time == 1 else "%Y-%m-%d %H:%M:%S", time.localtime(ms // 1000))
        columns = (text if args.time == 1 else "%s.%03d" % (text, ms % 1000),)
    return (*columns, "%.3f" % (max(0, ts - start) / 1e9)) if args.timestamp else columns


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
