#!/usr/bin/python3
#
# deeptcptracer  Trace what happens to TCP connections: state changes, FIN, RST, retransmissions, errors, zero windows.
#                For Linux, uses bcc, eBPF.
#
# usage: deeptcptracer [-h] [-p PID] [-t] [-K] [-s ADDRESS] [-d ADDRESS] [-S PORT] [-D PORT] [-N NETNS] [-e LIST | -R]
#                      [-4 | -6] [--json] [--duration SECONDS] [--probes {tracepoint,kprobe}]
#
# One line an event: the process that owns the socket, the local and the remote address, the TCP state, the socket's
# error; with -K the kernel stack below it.
#
# Traces the tracepoints sock:inet_sock_set_state, sock:inet_sk_error_report, tcp:tcp_receive_reset,
# tcp:tcp_retransmit_skb and tcp:tcp_probe, or the functions of these names where a kernel lacks one. Sent and received
# FINs are told from the state changes that go with them. Owners are known from connect(), accept() and close(), and for
# sockets from before the start from /proc and sock_diag.
#
# CAVEATS: the two zero-window events look at every segment received in ESTABLISHED; -e leaves them out. A FIN that
# comes after the kernel has dropped the socket into TIME_WAIT is not seen.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":      # taken by stop_asked() only: nothing is interrupted half done, imports neither
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import ipaddress
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
    ./deeptcptracer.py                  # trace all TCP events
    ./deeptcptracer.py -p 42            # only trace PID 42
    ./deeptcptracer.py -t               # include timestamps
    ./deeptcptracer.py -K               # include kernel stacks
    ./deeptcptracer.py -d 10.0.0.0/8    # only trace this remote network
    ./deeptcptracer.py -D 80,443        # only trace these remote ports
    ./deeptcptracer.py -R               # only trace retransmissions
    ./deeptcptracer.py -e tcp_reset,sock_def_error_report   # only trace these events
    ./deeptcptracer.py --json           # one JSON object a line
"""

KERNEL_TYPES = ["tcp_sock", "net", "sk_buff", "tcphdr", "task_struct", "files_struct", "fdtable", "file", "socket",
                "mptcp_sock"]
EVENTS = ["tcp_set_state()", "tcp_send_fin()", "tcp_fin()", "tcp_reset()", "tcp_retransmit_skb()",
          "sock_def_error_report()", "tcp_ack()/win==0", "tcp_select_window()/win==0"]
STATES = ["", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
          "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"]
MAX_SOCKETS = 1 << 18           # live sockets
STACK_DEPTH = 48                # frames
RING_PAGES = 2048               # 8 MiB: 95,000 events without stacks
PERF_PAGES = 256                # a CPU, where there is no ring buffer
INTERVAL = 0.1                  # seconds between two looks at the ring buffer
BATCH = 1000                    # records that are printed between two looks at it, if there are more
MAX_PENDING = 1 << 26           # bytes that have been read and wait to be printed
V4MAPPED = bytes(10) + b"\xff\xff"
# Frames on top of a stack that belong to the tracing itself; a BPF program has no name there.
MACHINERY = re.compile(rb"_*bpf_|__traceiter_|_*trace_|_*do_trace|perf_|k(ret)?probe|aggr_|ftrace_|\[unknown\]")

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#define IS_IPV4(address) (!(address)[0] && !(address)[1] && (address)[2] == htonl(0xffff))

enum { SET_STATE, SEND_FIN, FIN, RESET, RETRANSMIT, ERROR, ZERO_WINDOW_RECEIVED, ZERO_WINDOW_SENT, EVENTS };
enum { LOST_EVENT, LOST_OWNER, NOT_LOST, LOST_COUNTERS };

struct owner {
    u32 pid;
    char comm[TASK_COMM_LEN];
};

struct event {
    u64 ts;                     /* bpf_ktime_get_ns() */
    u32 pid, netns;             /* pid 0: not known */
    u32 saddr[4], daddr[4];     /* IPv4 as ::ffff:a.b.c.d */
    u16 sport, dport;
    u8 event, oldstate, state, pad;
    s32 sk_err;
    s32 stack_size;             /* bytes */
    char comm[TASK_COMM_LEN];
};

#ifdef STACK_DEPTH
struct event_with_stack {       /* too large for a program's own stack */
    struct event event;
    u64 stack[STACK_DEPTH];
};
#endif

BPF_HASH(owners, struct sock *, struct owner, MAX_SOCKETS);
BPF_HASH(existing, u64, struct owner, MAX_SOCKETS);     /* of sockets from before the start, by cookie */
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
#ifdef STACK_DEPTH
BPF_PERCPU_ARRAY(scratch, struct event_with_stack, 1);
#endif
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

static inline u8 state_of(struct sock *sk)
{
    u8 state = 0;

    bpf_probe_read_kernel(&state, sizeof(state), (void *)&sk->__sk_common.skc_state);
    return state;
}

static inline u64 cookie_of(struct sock *sk)
{
    u64 cookie = 0;

    bpf_probe_read_kernel(&cookie, sizeof(cookie), &sk->__sk_common.skc_cookie);
    return cookie;
}

static inline struct owner *owner_of(struct sock *sk)
{
    struct owner *o = owners.lookup(&sk);
    u64 cookie;

    if (o)
        return o;
    /* sock_diag has given a cookie to every socket that user space has asked for at the start. */
    cookie = cookie_of(sk);
    return cookie ? existing.lookup(&cookie) : NULL;
}

/* Only where the current process is known to be the one that uses the socket. */
static inline void own(struct sock *sk)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct owner o = {.pid = bpf_get_current_pid_tgid() >> 32};
    u32 flags = 0;

    bpf_probe_read_kernel(&flags, sizeof(flags), &task->flags);
    if (flags & 0x00200000)     /* PF_KTHREAD: MPTCP's worker closes for others */
        return;
    bpf_get_current_comm(&o.comm, sizeof(o.comm));
    if (owners.update(&sk, &o))
        count_lost(LOST_OWNER);
}

static inline void disown(struct sock *sk)
{
    u64 cookie = cookie_of(sk);

    owners.delete(&sk);
    if (cookie)
        existing.delete(&cookie);
}

/* Nobody is woken: the reader comes by itself. */
static inline void submit(void *ctx, struct event *e)
{
#if defined(STACK_DEPTH) && defined(RING_PAGES)
    struct event_with_stack *s = events.ringbuf_reserve(sizeof(*s));

    if (!s) {
        count_lost(LOST_EVENT);
        return;
    }
    s->event = *e;
    s->event.stack_size = bpf_get_stack(ctx, s->stack, sizeof(s->stack), 0);
    events.ringbuf_submit(s, BPF_RB_NO_WAKEUP);
#elif defined(STACK_DEPTH)
    int zero = 0;
    struct event_with_stack *s = scratch.lookup(&zero);

    if (!s)
        return;
    s->event = *e;
    s->event.stack_size = bpf_get_stack(ctx, s->stack, sizeof(s->stack), 0);
    /* An interrupt may have used it, too. */
    if (s->event.ts != e->ts || events.perf_submit(ctx, s, sizeof(*s)))
        count_lost(LOST_EVENT);
#elif defined(RING_PAGES)
    if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
        count_lost(LOST_EVENT);
#else
    if (events.perf_submit(ctx, e, sizeof(*e)))
        count_lost(LOST_EVENT);
#endif
}

static inline void emit(void *ctx, struct sock *sk, u8 what, u8 oldstate, u8 state)
{
    struct event e = {.event = what, .oldstate = oldstate, .state = state};
    struct owner *o = owner_of(sk);
    struct sock_common c;
    bool ipv4;

    if (FILTER_PID && (!o || o->pid != FILTER_PID))
        return;
    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    bpf_probe_read_kernel(&e.sport, sizeof(e.sport), &((struct inet_sock *)sk)->inet_sport);
    e.sport = ntohs(e.sport);
    e.dport = ntohs(c.skc_dport);
    if (!IS_WANTED_SPORT(e.sport) || !IS_WANTED_DPORT(e.dport))
        return;
    if (c.skc_family == AF_INET) {
        e.saddr[2] = e.daddr[2] = htonl(0xffff);
        e.saddr[3] = c.skc_rcv_saddr;
        e.daddr[3] = c.skc_daddr;
    } else {
        __builtin_memcpy(e.saddr, &c.skc_v6_rcv_saddr, sizeof(e.saddr));
        __builtin_memcpy(e.daddr, &c.skc_v6_daddr, sizeof(e.daddr));
    }
    ipv4 = IS_IPV4(e.daddr);
    if ((FILTER_IPV4 && !ipv4) || (FILTER_IPV6 && ipv4))
        return;
    if (!IS_WANTED_SADDR(e.saddr) || !IS_WANTED_DADDR(e.daddr))
        return;
    e.netns = netns_of(sk);
    if (FILTER_NETNS && e.netns != FILTER_NETNS)
        return;
    e.ts = bpf_ktime_get_ns();
    bpf_probe_read_kernel(&e.sk_err, sizeof(e.sk_err), &sk->sk_err);
    if (o) {
        e.pid = o->pid;
        __builtin_memcpy(e.comm, o->comm, sizeof(e.comm));
    }
    submit(ctx, &e);
}

/* tcp_fin() marks the socket as done; else FIN_WAIT2 may end by a timeout or go on as a TIME_WAIT socket. */
static inline bool fin_has_come(struct sock *sk, int oldstate, int newstate)
{
    unsigned long flags = 0;

    if (newstate == TCP_CLOSE_WAIT || newstate == TCP_CLOSING)
        return true;
    if (oldstate != TCP_FIN_WAIT2 || newstate != TCP_CLOSE)
        return false;
    bpf_probe_read_kernel(&flags, sizeof(flags), &sk->__sk_common.skc_flags);
    return flags & 1 << 1;      /* SOCK_DONE */
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    bool sends_fin = newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK;

    if (protocol_of(sk) != IPPROTO_TCP)
        return;
    if (oldstate == TCP_LISTEN && newstate == TCP_SYN_RECV) {
        /* A socket that only now begins: what is known is of one whose end was not seen. It has no addresses yet. */
        disown(sk);
        return;
    }
    /* These run in connect(), listen(), close(), shutdown() and exit. */
    if (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN || (sends_fin && !owner_of(sk)))
        own(sk);
    if (newstate == TCP_LISTEN)         /* not by tcp_set_state() */
        return;
    if (IS_CHOSEN(FIN) && fin_has_come(sk, oldstate, newstate))
        emit(ctx, sk, FIN, oldstate, oldstate);
    if (IS_CHOSEN(SET_STATE))
        emit(ctx, sk, SET_STATE, oldstate, newstate);
    if (IS_CHOSEN(SEND_FIN) && sends_fin)
        emit(ctx, sk, SEND_FIN, oldstate, newstate);
}

static inline void segment_received(void *ctx, struct sock *sk, struct sk_buff *skb)
{
    unsigned char *head = NULL;
    struct tcphdr th = {};
    u16 offset = 0;
    u32 rcv_wnd = 1;

    if (IS_CHOSEN(ZERO_WINDOW_RECEIVED)) {
        bpf_probe_read_kernel(&head, sizeof(head), &skb->head);
        bpf_probe_read_kernel(&offset, sizeof(offset), &skb->transport_header);
        bpf_probe_read_kernel(&th, sizeof(th), head + offset);
        if (!th.window && th.ack && !th.rst)
            emit(ctx, sk, ZERO_WINDOW_RECEIVED, 0, state_of(sk));
    }
    if (IS_CHOSEN(ZERO_WINDOW_SENT)) {
        bpf_probe_read_kernel(&rcv_wnd, sizeof(rcv_wnd), &((struct tcp_sock *)sk)->rcv_wnd);
        if (!rcv_wnd)
            emit(ctx, sk, ZERO_WINDOW_SENT, 0, state_of(sk));
    }
}

static inline void accepted(struct sock *sk)
{
#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the connection is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        bpf_probe_read_kernel(&sk, sizeof(sk), &((struct mptcp_sock *)sk)->first);
#endif
    if (protocol_of(sk) == IPPROTO_TCP && state_of(sk) != TCP_CLOSE && !owner_of(sk))
        own(sk);
}

#ifdef KPROBE_STATE
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
    state_change(ctx, sk, state_of(sk), state);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk)
{
    disown(sk);
    return 0;
}

int kprobe_reset(struct pt_regs *ctx, struct sock *sk)
{
    emit(ctx, sk, RESET, 0, state_of(sk));
    return 0;
}

int kprobe_retransmit(struct pt_regs *ctx, struct sock *sk)
{
    emit(ctx, sk, RETRANSMIT, 0, state_of(sk));
    return 0;
}

int kprobe_segment(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb)
{
    segment_received(ctx, sk, skb);
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
    state_change(ctx, (struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx)
{
    if (!first_has_seen(change_of(ctx)))
        state_change(ctx, (struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx)
{
    disown((struct sock *)ctx->args[0]);
    return 0;
}

int tracepoint_reset(struct bpf_raw_tracepoint_args *ctx)
{
    struct sock *sk = (struct sock *)ctx->args[0];

    emit(ctx, sk, RESET, 0, state_of(sk));
    return 0;
}

int tracepoint_retransmit(struct bpf_raw_tracepoint_args *ctx)
{
    struct sock *sk = (struct sock *)ctx->args[0];

    emit(ctx, sk, RETRANSMIT, 0, state_of(sk));
    return 0;
}

int tracepoint_segment(struct bpf_raw_tracepoint_args *ctx)
{
    segment_received(ctx, (struct sock *)ctx->args[0], (struct sk_buff *)ctx->args[1]);
    return 0;
}
#endif

static inline void error_reported(void *ctx, struct sock *sk)
{
    u16 family = 0;

    /* sockets of every kind report errors here */
    bpf_probe_read_kernel(&family, sizeof(family), &sk->__sk_common.skc_family);
    if ((family == AF_INET || family == AF_INET6) && protocol_of(sk) == IPPROTO_TCP)
        emit(ctx, sk, ERROR, 0, state_of(sk));
}

#ifdef KPROBE_ERROR
int kprobe_error(struct pt_regs *ctx, struct sock *sk)
{
    error_reported(ctx, sk);
    return 0;
}
#else
int tracepoint_error(struct bpf_raw_tracepoint_args *ctx)
{
    error_reported(ctx, (struct sock *)ctx->args[0]);
    return 0;
}
#endif

#ifdef KPROBE_ACCEPT
/* Called in accept() with the new socket, by io_uring too. Not a return probe: those run out when many threads wait. */
int kprobe_accept(struct pt_regs *ctx, struct sock *sk)
{
    accepted(sk);
    return 0;
}

int kretprobe_accept(struct pt_regs *ctx)
{
    struct sock *sk = (struct sock *)PT_REGS_RC(ctx);

    if (sk)
        accepted(sk);
    return 0;
}
#else
struct syscall_exit {
    u64 common;
    long nr, ret;
};

static inline void accept_returned(long fd)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct files_struct *files = NULL;
    struct fdtable *fdt = NULL;
    struct file **fds = NULL, *file = NULL;
    struct socket *socket = NULL;
    struct sock *sk = NULL;

    if (fd < 0)
        return;
    /* not &task->files: LLVM 11 gets that wrong by 16 bytes */
    bpf_probe_read_kernel(&files, sizeof(files), (void *)task + __builtin_offsetof(struct task_struct, files));
    bpf_probe_read_kernel(&fdt, sizeof(fdt), &files->fdt);
    bpf_probe_read_kernel(&fds, sizeof(fds), &fdt->fd);
    bpf_probe_read_kernel(&file, sizeof(file), &fds[fd]);
    bpf_probe_read_kernel(&socket, sizeof(socket), &file->private_data);
    bpf_probe_read_kernel(&sk, sizeof(sk), &socket->sk);
    if (sk)
        accepted(sk);
}

int tracepoint_accept_first(struct syscall_exit *ctx)
{
    first_sees(bpf_get_current_pid_tgid());
    accept_returned(ctx->ret);
    return 0;
}

int tracepoint_accept_second(struct syscall_exit *ctx)
{
    if (!first_has_seen(bpf_get_current_pid_tgid()))
        accept_returned(ctx->ret);
    return 0;
}
#endif
"""

PROGRAM = "deeptcptracer"

# One record of the ring: the kernel's 8-byte header (length and flags, page offset), then struct event but its stack.
HEAD = "=IIQII16s16sHHBBBBii16s"
FORM = "%-23s %-6s %-16s %-21s %-21s %-24s %s"


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


def networks(text):
    """Comma-separated addresses and prefixes as a list of ip_network."""
    try:
        text.encode("ascii")
        return [ipaddress.ip_network(part, strict=False) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("not a list of addresses or networks: %r" % text)


def event_list(text):
    """Comma-separated names of EVENTS, with or without what follows the name, as a set of their numbers."""
    names = [event.partition("(")[0] for event in EVENTS]
    chosen = [part.partition("(")[0] for part in text.split(",")]
    for name in chosen:
        if name not in names:
            raise argparse.ArgumentTypeError("no such event: %r (there are: %s)" % (name, ", ".join(names)))
    return {names.index(name) for name in chosen}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trace what happens to TCP connections",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    which, family = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    parser.add_argument("-p", "--pid", type=pid, help="show events of this process only")
    parser.add_argument("-t", "--timestamp", action="store_true", help="print the time of each event")
    parser.add_argument("-K", "--kstack", action="store_true", help="print the kernel stack")
    parser.add_argument("-s", "--saddr", metavar="ADDRESS", type=networks,
                        help="comma-separated list of local addresses or networks")
    parser.add_argument("-d", "--daddr", metavar="ADDRESS", type=networks,
                        help="comma-separated list of remote addresses or networks")
    parser.add_argument("-S", "--sport", metavar="PORT", type=ports, help="comma-separated list of local ports")
    parser.add_argument("-D", "--dport", metavar="PORT", type=ports, help="comma-separated list of remote ports")
    parser.add_argument("-N", "--netns", type=netns,
                        help="trace this network namespace only: inode number, path or name")
    which.add_argument("-e", "--events", metavar="LIST", type=event_list,
                       help="comma-separated list of the events to trace: " +
                            ", ".join(event.partition("(")[0] for event in EVENTS))
    which.add_argument("-R", "--retransmissions", action="store_true", help="trace retransmissions only")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--duration", metavar="SECONDS", type=seconds, help="end after this time")
    parser.add_argument("--probes", choices=("tracepoint", "kprobe"),
                        help="use this kind of probe where there is a choice (default: tracepoints, and "
                             "kprobes for what has none)")
    args = parser.parse_args(argv)
    if args.retransmissions:
        args.events = {EVENTS.index("tcp_retransmit_skb()")}
    elif args.events is None:
        args.events = set(range(len(EVENTS)))
    return args


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


def has_kprobes():
    return (os.path.exists("/sys/bus/event_source/devices/kprobe") or
            os.path.exists("/sys/kernel/debug/tracing/kprobe_events"))


def has_preemption():
    """Whether another process may take the CPU from a program at a system call's exit: on 7.2 it may, on 6.18 not."""
    return kernel_version() >= (7, 0)


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


def mount_debugfs():
    """bcc looks tracepoints up there."""
    if not os.path.isdir("/sys/kernel/debug/tracing/events"):
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], stderr=subprocess.DEVNULL)


def kprobe_sides(args):
    """Which probes are kprobes, as names that the C text knows."""
    sides = set()
    if args.probes == "kprobe" or not has_raw_tracepoint():
        sides.add("KPROBE_STATE")
    if args.probes == "kprobe" or (args.probes is None and has_kprobes()):
        sides.add("KPROBE_ACCEPT")
    if args.probes == "kprobe" or kernel_version() < (5, 15):
        sides.add("KPROBE_ERROR")
    return sides


def any_of(numbers):
    """C expression that is true for a port among these, for all ports if there are none."""
    return " || ".join("(port) == %d" % n for n in numbers) if numbers else "true"


def any_network(networks):
    """C expression that is true for an address in these networks, for all if there are none: address[4] as sent."""
    ranges = []
    for network in networks or []:
        if network.version == 4:
            network = ipaddress.ip_network("::ffff:%s/%d" % (network.network_address, 96 + network.prefixlen))
        words = zip(struct.unpack("=4I", network.network_address.packed), struct.unpack("=4I", network.netmask.packed))
        parts = ["((address)[%d] & %du) == %du" % (n, mask, value) for n, (value, mask) in enumerate(words) if mask]
        if network.prefixlen < 96:      # IPv6, which IPv4 in IPv6's clothes is not
            parts.append("!IS_IPV4(address)")
        ranges.append(" && ".join(parts))
    return " || ".join("(%s)" % one for one in ranges) if ranges else "true"


def cflags(args):
    """The arguments as macros of the C text; only numbers get there."""
    macros = {
        "MAX_SOCKETS": MAX_SOCKETS,
        "FILTER_PID": args.pid or 0,
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IPV4": int(args.ipv4),
        "FILTER_IPV6": int(args.ipv6),
        "IS_WANTED_SPORT(port)": any_of(args.sport),
        "IS_WANTED_DPORT(port)": any_of(args.dport),
        "IS_WANTED_SADDR(address)": any_network(args.saddr),
        "IS_WANTED_DADDR(address)": any_network(args.daddr),
        "IS_CHOSEN(event)": "%d >> (event) & 1" % sum(1 << event for event in args.events),
    }
    if args.kstack:
        macros["STACK_DEPTH"] = STACK_DEPTH
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
    sides = kprobe_sides(args)
    chosen = {EVENTS[event].partition("(")[0] for event in args.events}
    # function, tracepoint, name in the C text; the first two always: they know the owners
    probes = [("tcp_set_state", "inet_sock_set_state", "set_state"),
              ("tcp_v4_destroy_sock", "tcp_destroy_sock", "destroy")]
    if "tcp_reset" in chosen:
        probes.append(("tcp_reset", "tcp_receive_reset", "reset"))
    if "tcp_retransmit_skb" in chosen:
        probes.append(("tcp_retransmit_skb", "tcp_retransmit_skb", "retransmit"))
    if chosen & {"tcp_ack", "tcp_select_window"}:
        probes.append(("tcp_rcv_established", "tcp_probe", "segment"))
    if "sock_def_error_report" in chosen:
        probes.append(("sock_def_error_report", "inet_sk_error_report", "error"))
    for function, tracepoint, name in probes:
        if ("KPROBE_ERROR" if name == "error" else "KPROBE_STATE") in sides:
            bpf.attach_kprobe(event=function, fn_name="kprobe_" + name)
        elif name == "set_state":
            attach_set_state(bpf)
        else:
            bpf.attach_raw_tracepoint(tp=tracepoint, fn_name="tracepoint_" + name)
    if "KPROBE_ACCEPT" in sides:
        try:
            bpf.attach_kprobe(event="security_sock_graft", fn_name="kprobe_accept")
        except Exception:       # a kernel without CONFIG_SECURITY_NETWORK
            bpf.attach_kretprobe(event="inet_csk_accept", fn_name="kretprobe_accept")
    else:
        mount_debugfs()
        for fn_name in ["tracepoint_accept_first"] + ["tracepoint_accept_second"] * has_preemption():
            bpf.attach_tracepoint(tp="syscalls:sys_exit_accept4", fn_name=fn_name)
            bpf.attach_tracepoint(tp="syscalls:sys_exit_accept", fn_name=fn_name)


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

def open_ring(bpf, record_form):
    """A function that returns what the ring holds, as bytes of whole records of this form.

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
        for n, length in enumerate(records.cast("I")[::record_form.size // 4]):
            if length != record_form.size - 8:       # another CPU is still writing this one
                records = records[:n * record_form.size]
                break
        taken = bytes(records)
        position.value += len(taken)        # from now on the kernel may write there
        return taken
    return read


def open_perf(bpf, record_form):
    """The same from a perf buffer, for kernels before 5.8."""
    records, header = [], bytes(8)

    def on_event(_cpu, data, _size):
        records.append(header + ctypes.string_at(data, record_form.size - 8))

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
        if name.endswith(b"_second") or name == b"tracepoint_destroy":
            continue        # what only these were skipped for is not lost
        with open("/proc/self/fdinfo/%d" % function.fd) as info:        # the line exists since Linux 5.12
            missed += sum(int(n) for n in re.findall("recursion_misses:\\s*([0-9]+)", info.read()))
    lost = mapped_counters(bpf) if has_ring_buffer() else [count.value for count in bpf["lost"].values()]
    return {"events lost: the ring buffer was full": lost[0],
            "owners lost: the map of live sockets was full": lost[1],
            "events or owners lost: the kernel did not run the probe": missed - lost[2]}


# sockets from before the start

def holders():
    """{network namespace's path: {inode of a socket: (PID, comm)}} of all processes."""
    found = collections.defaultdict(dict)
    paths = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            namespace = "/proc/%s/ns/net" % pid
            path = paths.setdefault(os.stat(namespace).st_ino, namespace)
            with open("/proc/%s/comm" % pid, "rb") as file:
                comm = file.read().rstrip(b"\n")
            for fd in os.scandir("/proc/%s/fd" % pid):
                with contextlib.suppress(OSError):
                    target = os.readlink(fd.path)
                    if target.startswith("socket:["):
                        found[path][int(target[8:-1])] = int(pid), comm
    return found


def diag_socket(namespace):
    """A sock_diag socket in this network namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as ours, open(namespace) as theirs:
        if libc.setns(theirs.fileno(), 0) and os.fstat(ours.fileno()).st_ino != os.fstat(theirs.fileno()).st_ino:
            raise OSError(ctypes.get_errno(), "setns")
        try:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)         # NETLINK_SOCK_DIAG
        finally:
            libc.setns(ours.fileno(), 0)


def tcp_sockets(namespace):
    """(cookie, inode) of each TCP socket of this network namespace. Raises OSError.

    By sock_diag(7): inet_diag_req_v2 and inet_diag_msg of include/uapi/linux/inet_diag.h.
    """
    failed, last, by_family, dump = 2, 3, 20, 0x301     # NLMSG_ERROR, NLMSG_DONE, SOCK_DIAG_BY_FAMILY, NLM_F_*
    for family in (socket.AF_INET, socket.AF_INET6):
        with diag_socket(namespace) as diag:
            request = struct.pack("=BBBBI48s", family, socket.IPPROTO_TCP, 0, 0, 0xffffffff, b"")
            diag.send(struct.pack("=IHHII", 16 + len(request), by_family, dump, 0, 0) + request)
            done = False
            while not done:
                answer = diag.recv(1 << 18)
                while answer and not done:
                    length, kind = struct.unpack_from("=IH", answer)
                    if kind == failed:
                        raise OSError(-struct.unpack_from("=i", answer, 16)[0], "sock_diag")
                    done = kind == last
                    if kind == by_family:
                        yield struct.unpack_from("=44xQ16xI", answer, 16)
                    answer = answer[length + 3 & ~3:]


def learn_existing(bpf):
    """Tell the kernel side whose the sockets are that exist already."""
    table = bpf["existing"]
    for namespace, owners in holders().items():
        with contextlib.suppress(OSError):      # a process that has ended meanwhile, or no sock_diag: not known
            for cookie, inode in tcp_sockets(namespace):
                if inode in owners:
                    pid, comm = owners[inode]
                    table[table.Key(cookie)] = table.Leaf(pid, comm)


# output

@functools.lru_cache(maxsize=1024)
def address(packed):
    """Text of 16 bytes; IPv4 is ::ffff:a.b.c.d in them and a.b.c.d in the text."""
    if packed.startswith(V4MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


@functools.lru_cache(maxsize=1024)
def printable(comm):
    """Any user may put any bytes into comm: all but printable ASCII is shown as \\xNN, and a backslash as two."""
    return comm.partition(b"\0")[0].decode("latin-1").encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=16)
def clock(second):
    return time.strftime("%H:%M:%S", time.localtime(second))


# A connection has many events, and a line is made of parts that come again: these are worth remembering.
@functools.lru_cache(maxsize=1024)
def endpoint(packed, port):
    text = address(packed)
    return "%-21s " % (("[%s]:%d" if ":" in text else "%s:%d") % (text, port))


@functools.lru_cache(maxsize=1024)
def who(event, pid, comm):
    return "%-23s %-6s %-16s " % (EVENTS[event], pid or "N/A", printable(comm) if pid else "N/A")


@functools.lru_cache(maxsize=1024)
def what(event, oldstate, state, sk_err):
    states = STATES[state]
    if EVENTS[event] == "tcp_set_state()":
        states = "%s -> %s" % (STATES[oldstate], states)
    return ("%-24s %s" % (states, errno.errorcode.get(sk_err, sk_err) if sk_err else "")).rstrip()


def stack_of(bcc, frames):
    """Names of the functions, innermost first, without those of the tracing itself."""
    names = [bcc.BPF.ksym(frame, show_offset=False) for frame in frames if frame]
    while names and MACHINERY.match(names[0]):
        names.pop(0)
    return [name.decode(errors="replace") for name in names]


def json_object(args, bcc, record, wall):
    _, _, ts, pid, netns, saddr, daddr, sport, dport, event, oldstate, state, _, sk_err, size, comm = record[:16]
    saddr, daddr = address(saddr), address(daddr)
    fields = {"ts": (ts + wall) / 1e9, "event": EVENTS[event], "pid": pid or None,
              "comm": comm.partition(b"\0")[0].decode(errors="surrogateescape") if pid else None,
              "ip": 6 if ":" in daddr else 4, "saddr": saddr, "sport": sport, "daddr": daddr, "dport": dport,
              "oldstate": STATES[oldstate] or None, "state": STATES[state],
              "sk_err": errno.errorcode.get(sk_err, sk_err) if sk_err else None, "netns": netns}
    if args.kstack:
        fields["stack"] = stack_of(bcc, record[16:16 + size // 8]) if size > 0 else None
    return fields


def text_lines(args, bcc, record, wall):
    _, _, ts, pid, _, saddr, daddr, sport, dport, event, oldstate, state, _, sk_err, size, comm = record[:16]
    line = (who(event, pid, comm) + endpoint(saddr, sport) + endpoint(daddr, dport) +
            what(event, oldstate, state, sk_err) + "\n")
    if args.timestamp:
        when = ts + wall
        line = "%s.%03d " % (clock(when // 10 ** 9), when // 10 ** 6 % 1000) + line
    if args.kstack and size > 0:
        line += "".join("    %s\n" % name for name in stack_of(bcc, record[16:16 + size // 8])) + "\n"
    return line


def header(args):
    names = FORM % ("EVENT_SOURCE", "PID", "COMM", "SOURCE", "DESTINATION", "TCP_STATE", "SK_ERR")
    return "Tracing TCP events. Ctrl-C to end.\n" + args.timestamp * ("%-12s " % "TIME") + names + "\n"


def render(args, bcc, records):
    """Whole lines for these records."""
    wall = time.time_ns() - time.monotonic_ns()     # each time anew: the clock may be set meanwhile
    if args.json:
        return "".join([json.dumps(json_object(args, bcc, record, wall)) + "\n" for record in records])
    return "".join([text_lines(args, bcc, record, wall) for record in records])


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
    """Print events until a signal comes, the time is over or nobody reads any more."""
    bcc = import_bcc()
    form = struct.Struct(HEAD + args.kstack * ("%dQ" % STACK_DEPTH))
    read = open_ring(bpf, form) if has_ring_buffer() else open_perf(bpf, form)
    began, told = time.monotonic_ns(), {}
    end = began + args.duration * 1e9 if args.duration else math.inf
    if not args.json:
        write(header(args))
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
        records = list(form.iter_unpack(pending[:BATCH * form.size]))
        del pending[:len(records) * form.size]
        if records:
            write(render(args, bcc, records))
            told = report(losses(bpf), told)
    report(losses(bpf), told)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    args = parse_args()
    if sys.stdout is None or sys.stderr is None:        # their numbers would be given to a map
        die("standard output or standard error is closed")
    bpf = load(args)
    learn_existing(bpf)
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
