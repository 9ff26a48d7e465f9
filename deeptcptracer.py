#!/usr/bin/python3
#
# deeptcptracer  Trace what happens to TCP connections: state changes, FIN, RST, retransmissions, errors, zero windows.
#                For Linux, uses bcc, eBPF.
#
# usage: deeptcptracer [-h] [-p PID] [-t] [-m] [-K] [-s ADDRESS] [-d ADDRESS] [-S PORT] [-D PORT] [-N NETNS]
#                      [-e LIST | -R] [-4 | -6] [--json] [--duration SECONDS] [--probes {tracepoint,kprobe}] [--ebpf]
#                      [--version]
#
# Prints one line per event: the process that owns the socket, the local and the remote address, the TCP state, the
# socket's error or the reason of a RST; with -m how long a state lasted, with -K the kernel stack below it.
#
# Traces the tracepoints sock:inet_sock_set_state, sock:inet_sk_error_report, tcp:tcp_receive_reset, tcp:tcp_send_reset,
# tcp:tcp_retransmit_skb and tcp:tcp_probe, or kernel functions where a kernel lacks one. Sent and received
# FINs are derived from the state changes that go with them. Owners are known from connect(), accept() and close(), and
# for sockets from before the start from /proc.
#
# CAVEATS: the two zero-window events look at every segment received in ESTABLISHED; -e leaves them out. A FIN that
# comes after the kernel has dropped the socket into TIME_WAIT is not seen.

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
import ipaddress
import itertools
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
    ./deeptcptracer.py                  # trace all TCP events
    ./deeptcptracer.py -p 42            # only trace PID 42
    ./deeptcptracer.py -t               # include timestamps
    ./deeptcptracer.py -m               # include how long states lasted
    ./deeptcptracer.py -K               # include kernel stacks
    ./deeptcptracer.py -d 10.0.0.0/8    # only trace this remote network
    ./deeptcptracer.py -D 80,443        # only trace these remote ports
    ./deeptcptracer.py -R               # only trace retransmissions
    ./deeptcptracer.py -e tcp_reset,sock_def_error_report   # only trace these events
    ./deeptcptracer.py --json           # one JSON object per line
"""

PROGRAM = "deeptcptracer"
KERNEL = tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])
KERNEL_TYPES = ["tcp_sock", "net", "net_device", "sk_buff", "iphdr", "ipv6hdr", "tcphdr", "task_struct",
                "files_struct", "fdtable", "file", "socket_alloc", "mptcp_sock"]
# The kernel's names, in the order of the enum in the C text.
EVENTS = ["tcp_set_state()", "tcp_send_fin()", "tcp_fin()", "tcp_reset()", "tcp_retransmit_skb()",
          "sock_def_error_report()", "tcp_ack()/win==0", "tcp_select_window()/win==0", "tcp_send_reset()"]
STATES = ["", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
          "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"]
CA_STATES = dict(enumerate(["Open", "Disorder", "CWR", "Recovery", "Loss"]))         # enum tcp_ca_state
MAX_SOCKETS = 1 << 18           # live sockets
STACK_DEPTH = 48                # frames
RING_PAGES = (16 << 20) // mmap.PAGESIZE if KERNEL >= (5, 8) else 0     # 16 MiB: 170,000 events without stacks
PERF_PAGES = (1 << 20) // mmap.PAGESIZE         # per CPU, where there is no ring buffer
HARMLESS = b"_second", b"_destroy"              # skipping a program whose name ends like this loses nothing
LOSSES = ["events lost: the ring buffer was full", "owners lost: the map of live sockets was full",
          "times lost: the map of socket states was full", "events or owners lost: the kernel did not run the probe"]
# Frames on top of a stack that belong to the tracing itself; a BPF program has no name there.
TRACING_FRAMES = re.compile(rb"_*bpf_|__traceiter_|_*trace_|_*do_trace|perf_|k(ret)?probe|aggr_|ftrace_|\[unknown\]")

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/sched.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <net/sock.h>

#define IS_IPV4(address) (!(address)[0] && !(address)[1] && (address)[2] == htonl(0xffff))

/* A member of a kernel object. */
#define READ(p, member) ({                                                  \
    typeof((p)->member) value;                                              \
    bpf_probe_read_kernel(&value, sizeof(value), &(p)->member);             \
    value;                                                                  \
})

enum { SET_STATE, SEND_FIN, FIN, RESET, RETRANSMIT, ERROR, ZERO_WINDOW_RECEIVED, ZERO_WINDOW_SENT, SEND_RESET };
enum { LOST_EVENT, LOST_OWNER, LOST_TIME, RESCUED, COUNTERS };     /* as LOSSES above */

struct owner {
    u32 pid;                    /* 0: not known */
    char comm[TASK_COMM_LEN];
};

struct endpoint {
    u32 address[4];             /* IPv4 as ::ffff:a.b.c.d */
    u16 port, pad;
};

struct event {                  /* as HEAD below; parts of a line are kept together */
    u64 ts;                     /* bpf_ktime_get_ns() */
    struct owner owner;
    u32 event;
    struct endpoint source, destination;
    s32 sk_err;
    u8 which, oldstate, state, detail;  /* which: the event again; detail: congestion state, or reason of a RST */
    u32 netns;
    s32 stack_size;             /* bytes */
    u64 in_state[STATE_TIME];   /* ns in the old state; 0: not known */
    u64 stack[STACK_DEPTH];
};

BPF_HASH(owners, struct sock *, struct owner, MAX_SOCKETS);
BPF_HASH(existing, u64, struct owner, MAX_SOCKETS);     /* of sockets from before the start, by inode */
BPF_HASH(since, struct sock *, u64, STATE_TIME ? MAX_SOCKETS : 1);     /* ns: when it entered its state */
BPF_ARRAY(lost, u64, COUNTERS);
#if RING_PAGES
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
#else
BPF_PERF_OUTPUT(events);
BPF_PERCPU_ARRAY(scratch, struct event, 1);     /* an event with a stack is too large for the program's own */
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

/* MPTCP's own sockets and SCTP's report their states here too; MPTCP's subflows are TCP. */
static inline u16 protocol_of(struct sock *sk)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and no MPTCP */
    return READ(sk, sk_protocol);
#else
    return IPPROTO_TCP;
#endif
}

static inline u8 state_of(struct sock *sk)
{
    return READ(sk, __sk_common.skc_state);
}

/* The inode that user space sees of this socket; 0 before accept() and after close(). */
static inline u64 inode_of(struct sock *sk)
{
    struct socket *socket = READ(sk, sk_socket);

    return socket ? READ((struct socket_alloc *)socket, vfs_inode.i_ino) : 0;
}

static inline struct owner *owner_of(struct sock *sk)
{
    struct owner *o = owners.lookup(&sk), copy;
    u64 inode;

    if (o)
        return o;
    inode = inode_of(sk);
    o = existing.lookup(&inode);
    if (!o)
        return NULL;
    copy = *o;                  /* from now on by address: it has no inode after close() */
    if (owners.update(&sk, &copy))
        count_lost(LOST_OWNER);
    existing.delete(&inode);
    return owners.lookup(&sk);
}

static inline int destroyed(struct sock *sk)
{
    owners.delete(&sk);
    if (STATE_TIME)
        since.delete(&sk);
    return 0;
}

/* Returns how long the socket was in its old state. It starts in CLOSE: an entry for that is of an older socket. */
static inline u64 time_in_state(struct sock *sk, int oldstate)
{
    u64 *then = since.lookup(&sk), now = bpf_ktime_get_ns(), ns = then && oldstate != TCP_CLOSE ? now - *then : 0;

    if (since.update(&sk, &now))
        count_lost(LOST_TIME);
    return ns;
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

/* A kernel thread closes for others: MPTCP's worker, io_uring's, the collector of Unix sockets. */
#define is_kthread() (READ((struct task_struct *)bpf_get_current_task(), flags) & 0x00200000 /* PF_KTHREAD */)

static inline void remember_owner(struct sock *sk)
{
    struct owner o = {};

    if (is_kthread())
        return;
    set_owner(&o);
    if (o.pid && owners.update(&sk, &o))
        count_lost(LOST_OWNER);
}

/* Addresses and ports of a socket. Returns its network namespace. */
static inline u32 sk_ends(struct sock *sk, bool is_new, struct endpoint *local, struct endpoint *peer)
{
    struct sock_common c;

    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    /* inet_sport stays when a socket leaves the port's hash table before CLOSE, until another attempt to connect */
    local->port = is_new ? c.skc_num : ntohs(READ((struct inet_sock *)sk, inet_sport));
    peer->port = ntohs(c.skc_dport);
    if (c.skc_family == AF_INET) {
        local->address[3] = c.skc_rcv_saddr;
        peer->address[3] = c.skc_daddr;
    } else {
        __builtin_memcpy(local->address, &c.skc_v6_rcv_saddr, sizeof(local->address));
        __builtin_memcpy(peer->address, &c.skc_v6_daddr, sizeof(peer->address));
    }
    return READ(c.skc_net.net, ns.inum);
}

static inline struct tcphdr tcphdr_of(struct sk_buff *skb)
{
    struct tcphdr th;

    bpf_probe_read_kernel(&th, sizeof(th), READ(skb, head) + READ(skb, transport_header));
    return th;
}

/* The same of a segment received. sk: as in rst_sent() */
static inline u32 skb_ends(struct sk_buff *skb, struct sock *sk, struct endpoint *local, struct endpoint *peer)
{
    void *ip = READ(skb, head) + READ(skb, network_header);
    struct tcphdr th = tcphdr_of(skb);

    local->port = ntohs(th.dest);
    peer->port = ntohs(th.source);
    if (READ(skb, protocol) == htons(ETH_P_IP)) {
        local->address[3] = READ((struct iphdr *)ip, daddr);
        peer->address[3] = READ((struct iphdr *)ip, saddr);
    } else {
        *(struct in6_addr *)local->address = READ((struct ipv6hdr *)ip, daddr);
        *(struct in6_addr *)peer->address = READ((struct ipv6hdr *)ip, saddr);
    }
    return READ(sk ? READ(sk, __sk_common.skc_net.net) : READ(READ(skb, dev), nd_net.net), ns.inum);
}

/* skb: as in rst_sent(), else NULL */
static inline void emit(void *ctx, struct sock *sk, struct sk_buff *skb, struct owner *o, u8 event, u8 oldstate,
                        u8 state, u8 detail, u64 in_state)
{
    struct endpoint source = {.address = {0, 0, htonl(0xffff), 0}}, destination = source;
    u64 ts = bpf_ktime_get_ns();
    struct event small, *e = &small;
    int zero = 0;
    u32 netns;
    bool ipv4;

    if (FILTER_PID && (!o || o->pid != FILTER_PID))
        return;
    netns = skb ? skb_ends(skb, sk, &source, &destination) : sk_ends(sk, oldstate == TCP_CLOSE, &source, &destination);
    ipv4 = IS_IPV4(destination.address);
    if ((FILTER_NETNS && netns != FILTER_NETNS) || (FILTER_IP && ipv4 != (FILTER_IP == 4)) ||
        !IS_WANTED_SPORT(source.port) || !IS_WANTED_DPORT(destination.port) ||
        !IS_WANTED_SADDR(source.address) || !IS_WANTED_DADDR(destination.address))
        return;
#if RING_PAGES
    e = events.ringbuf_reserve(sizeof(*e));
#elif STACK_DEPTH
    e = scratch.lookup(&zero);
#endif
    if (!e) {
        count_lost(LOST_EVENT);
        return;
    }
    e->ts = ts;
    __builtin_memset(&e->owner, 0, sizeof(e->owner));
    if (o)
        e->owner = *o;
    e->event = e->which = event;
    e->source = source;
    e->destination = destination;
    e->sk_err = event == SEND_RESET ? 0 : READ(sk, sk_err);
    e->oldstate = oldstate;
    e->state = state;
    e->detail = detail;
    e->netns = netns;
    e->stack_size = 0;
    if (STATE_TIME)
        e->in_state[0] = in_state;
#if STACK_DEPTH && KPROBES && defined(__aarch64__)
    /* At a function's entry the caller is only in the link register, which the kernel's stack walk leaves out. */
    e->stack_size = bpf_get_stack(ctx, e->stack + 1, sizeof(e->stack) - sizeof(u64), 0) + sizeof(u64);
    e->stack[0] = e->stack[1];
    e->stack[1] = ((struct pt_regs *)ctx)->regs[30];
#elif STACK_DEPTH
    e->stack_size = bpf_get_stack(ctx, e->stack, sizeof(e->stack), 0);
#endif
#if RING_PAGES
    events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);         /* no wake-up: the reader polls */
#else
    if (e->ts != ts || events.perf_submit(ctx, e, sizeof(*e)))          /* an interrupt may have used scratch as well */
        count_lost(LOST_EVENT);
#endif
}

/* An event that is not a change of state. */
static inline int happened(void *ctx, struct sock *sk, u8 event, u8 detail)
{
    emit(ctx, sk, NULL, owner_of(sk), event, 0, state_of(sk), detail, 0);
    return 0;
}

/*
 * Whether this is the first change seen of a listening socket or a new connection: what is known of its address is then
 * of an older one, whose end was not seen. The kprobe sees neither the change to LISTEN nor LISTEN -> SYN_RECV.
 */
static inline bool is_first_change(struct sock *sk, int oldstate, int newstate)
{
    if (KPROBES)
        return oldstate == TCP_LISTEN || (oldstate == TCP_SYN_RECV && !READ(sk, sk_socket));    /* before accept() */
    return oldstate == TCP_LISTEN && newstate == TCP_SYN_RECV;
}

/* tcp_fin() marks the socket as done; else FIN_WAIT2 may end by a timeout or go on as a TIME_WAIT socket. */
static inline bool fin_has_come(struct sock *sk, int oldstate, int newstate)
{
    if (oldstate == TCP_FIN_WAIT2 && newstate == TCP_CLOSE)
        return READ(sk, __sk_common.skc_flags) & 1 << 1;        /* SOCK_DONE */
    return newstate == TCP_CLOSE_WAIT || newstate == TCP_CLOSING;
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    bool sends_fin = newstate != oldstate && (newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK);
    struct owner *o;
    u64 ns;

    if (protocol_of(sk) != IPPROTO_TCP)
        return;
    if (is_first_change(sk, oldstate, newstate))
        destroyed(sk);
    ns = STATE_TIME ? time_in_state(sk, oldstate) : 0;
    if (oldstate == TCP_LISTEN && newstate == TCP_SYN_RECV)     /* has no addresses yet */
        return;
    o = owner_of(sk);
    if (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN || ((sends_fin || oldstate == TCP_LISTEN) && !o)) {
        remember_owner(sk);     /* in connect(), listen(), close(), shutdown() or exit */
        o = owners.lookup(&sk);
    }
    if (newstate == TCP_LISTEN)         /* not by tcp_set_state() */
        return;
    if (IS_CHOSEN(FIN) && fin_has_come(sk, oldstate, newstate))
        emit(ctx, sk, NULL, o, FIN, oldstate, oldstate, 0, 0);
    if (IS_CHOSEN(SET_STATE))
        emit(ctx, sk, NULL, o, SET_STATE, oldstate, newstate, 0, ns);
    if (IS_CHOSEN(SEND_FIN) && sends_fin)
        emit(ctx, sk, NULL, o, SEND_FIN, oldstate, newstate, 0, 0);
}

static inline int error_reported(void *ctx, struct sock *sk)
{
    u16 family = READ(sk, __sk_common.skc_family);

    /* sockets of every kind report errors here */
    if ((family == AF_INET || family == AF_INET6) && protocol_of(sk) == IPPROTO_TCP)
        happened(ctx, sk, ERROR, 0);
    return 0;
}

static inline int retransmitted(void *ctx, struct sock *sk)
{
    u8 ca_state;

    /* icsk_ca_state is a bit field in the byte before this one */
    bpf_probe_read_kernel(&ca_state, 1, &((struct inet_connection_sock *)sk)->icsk_retransmits - 1);
    return happened(ctx, sk, RETRANSMIT, ca_state & 31);
}

/*
 * sk: NULL if there is none, or a mini-socket, which has only the members of struct sock_common.
 * skb: the segment that is answered, or NULL if this end aborts the connection
 */
static inline int rst_sent(void *ctx, struct sock *sk, struct sk_buff *skb, u8 reason)
{
    u8 state = sk ? state_of(sk) : 0;
    bool is_full = state && state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV;

    if (!skb || !tcphdr_of(skb).rst)            /* the function is also called for a RST, but does not answer it */
        emit(ctx, sk, skb, is_full ? owner_of(sk) : NULL, SEND_RESET, 0, state, reason, 0);
    return 0;
}

static inline int segment_received(void *ctx, struct sock *sk, struct sk_buff *skb)
{
    struct tcphdr th = tcphdr_of(skb);

    if (IS_CHOSEN(ZERO_WINDOW_RECEIVED) && !th.window && th.ack && !th.rst)
        happened(ctx, sk, ZERO_WINDOW_RECEIVED, 0);
    if (IS_CHOSEN(ZERO_WINDOW_SENT) && !READ((struct tcp_sock *)sk, rcv_wnd))
        happened(ctx, sk, ZERO_WINDOW_SENT, 0);
    return 0;
}

static inline void accepted(void *ctx, struct sock *sk)
{
#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the connection is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        sk = READ((struct mptcp_sock *)sk, first);
#endif
    if (protocol_of(sk) == IPPROTO_TCP && state_of(sk) != TCP_CLOSE && !owner_of(sk))
        remember_owner(sk);
}

#if KPROBES
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int newstate)
{
    state_change(ctx, sk, READ(sk, __sk_common.skc_state), newstate);
    return 0;
}

/* The position of the argument that has the reason differs between kernels, even within 6.12. */
#define UNKNOWN 255

int kprobe_rst(struct pt_regs *ctx, struct sock *sk) { return rst_sent(ctx, sk, NULL, UNKNOWN); }
int kprobe_reply(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb) { return rst_sent(ctx, sk, skb, UNKNOWN); }
int kprobe_segment(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb) { return segment_received(ctx, sk, skb); }
int kprobe_retransmit(struct pt_regs *ctx, struct sock *sk) { return retransmitted(ctx, sk); }
int kprobe_reset(struct pt_regs *ctx, struct sock *sk) { return happened(ctx, sk, RESET, 0); }
int kprobe_destroy(struct pt_regs *ctx, struct sock *sk) { return destroyed(sk); }
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

#define SK(ctx) ((struct sock *)(ctx)->args[0])
#define SKB(ctx) ((struct sk_buff *)(ctx)->args[1])

int tracepoint_rst(struct bpf_raw_tracepoint_args *ctx) { return rst_sent(ctx, SK(ctx), SKB(ctx), REASON(ctx)); }
int tracepoint_retransmit(struct bpf_raw_tracepoint_args *ctx) { return ERR(ctx) ? 0 : retransmitted(ctx, SK(ctx)); }
int tracepoint_segment(struct bpf_raw_tracepoint_args *ctx) { return segment_received(ctx, SK(ctx), SKB(ctx)); }
int tracepoint_reset(struct bpf_raw_tracepoint_args *ctx) { return happened(ctx, SK(ctx), RESET, 0); }
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx) { return destroyed(SK(ctx)); }
#endif

#if KPROBES || LINUX_VERSION_CODE < KERNEL_VERSION(5, 15, 0)
int kprobe_error(struct pt_regs *ctx, struct sock *sk) { return error_reported(ctx, sk); }
#else
int tracepoint_error(struct bpf_raw_tracepoint_args *ctx) { return error_reported(ctx, SK(ctx)); }
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

# struct event, behind the ring buffer's own header of a record (length and flags, page offset), up to its arrays
HEAD = "=8xQ24s20s20s8sIi"
NAMES = "EVENT_SOURCE", "PID", "COMM", "SOURCE", "DESTINATION", "TCP_STATE", "SK_ERR"
TEXT = "%-23s %-6s %-16s %-21s %-21s %-24s %s"
JSON = '{"ts":%.6f,%s,"ip":%d,"saddr":"%s","sport":%d,"daddr":"%s","dport":%d,%s,"state_ms":%s,"netns":%d%s}\n'


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


def networks(text):
    """Returns comma-separated addresses and prefixes as a list of ip_network."""
    try:
        if not text.isascii() or "%" in text:   # ip_network() would take the digits of any script, and ignore a scope
            raise ValueError
        return [ipaddress.ip_network(part, strict=False) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("not a list of addresses or networks: %r" % text)


def event_list(text):
    """Returns the numbers of comma-separated EVENTS, each named with or without what follows the name."""
    names = [event.partition("(")[0] for event in EVENTS]
    try:
        return {(EVENTS if "(" in part else names).index(part) for part in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError("no such event in %r (there are: %s)" % (text, ", ".join(names)))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace what happens to TCP connections",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    which, family = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    add = parser.add_argument
    add("-p", "--pid", type=process, help="trace this PID only")
    add("-t", "--timestamp", action="store_true", help="include timestamp on output (HH:MM:SS.mmm)")
    add("-m", "--ms", action="store_true", help="include how many milliseconds the old state lasted")
    add("-K", "--kstack", action="store_true", help="include the kernel stack")
    add("-s", "--saddr", metavar="ADDRESS", type=networks, help="comma-separated list of local addresses or networks")
    add("-d", "--daddr", metavar="ADDRESS", type=networks, help="comma-separated list of remote addresses or networks")
    add("-S", "--sport", metavar="PORT", type=ports, help="comma-separated list of local ports to trace.")
    add("-D", "--dport", metavar="PORT", type=ports, help="comma-separated list of remote ports to trace.")
    add("-N", "--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    which.add_argument("-e", "--events", metavar="LIST", type=event_list, default=set(range(len(EVENTS))),
                       help="comma-separated list of the events to trace: " +
                            ", ".join(event.partition("(")[0] for event in EVENTS))
    which.add_argument("-R", "--retransmissions", action="store_const", dest="events",
                       const={EVENTS.index("tcp_retransmit_skb()")}, help="trace retransmissions only")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    add("--json", action="store_true", help="print one JSON object per line, with exact times")
    add("--duration", metavar="SECONDS", type=number(0.001, 1e9, float), help="exit after this many seconds")
    add("--probes", choices=("tracepoint", "kprobe"),
        help="use this kind of probe only (default: tracepoints, and for accept() a kprobe where there are any)")
    add("--ebpf", action="store_true", help="print the program's C text and its compiler flags, and exit")
    add("--version", action="version", version="%(prog)s 1.0")
    parser.print_help = lambda: write(parser.format_help())     # argparse's own would fail only at exit
    args = parser.parse_args(argv)
    args.kprobes = args.probes == "kprobe" or KERNEL < (4, 17)
    return args


def port_condition(ports):
    """Returns a C expression that is true for these ports, or for all if there are none."""
    return " || ".join("(port) == %d" % port for port in ports or []) or "true"


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


def tracepoint_format(name):
    """Returns the description of a tracepoint of TCP, or "" where there is no tracefs."""
    with contextlib.suppress(OSError), open("/sys/kernel/tracing/events/tcp/%s/format" % name) as file:
        return file.read()
    return ""


@functools.lru_cache(maxsize=None)      # called first in attach(), which sees tracefs
def reset_reasons():
    """Returns the kernel's names for why it sends a RST, by number; none before Linux 6.10."""
    names = tracepoint_format("tcp_send_reset").partition("REC->reason, {")[2]
    return {int(number): name for number, name in re.findall(r'(\d+), "(\w+)"', names)}


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    macros = {
        **pid_namespace(),
        "PREEMPTIBLE": int(KERNEL >= (7, 0)),
        "RING_PAGES": RING_PAGES,
        "KPROBES": int(args.kprobes),
        "MAX_SOCKETS": MAX_SOCKETS,
        "STACK_DEPTH": STACK_DEPTH * args.kstack,
        "STATE_TIME": int(args.ms),
        # arguments that a tracepoint may lack; with an error nothing was sent
        "ERR(ctx)": "(int)ctx->args[2]" if "REC->err" in tracepoint_format("tcp_retransmit_skb") else 0,
        "REASON(ctx)": "ctx->args[2]" if reset_reasons() else 0,
        "FILTER_PID": args.pid or 0,
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IP": 4 * args.ipv4 + 6 * args.ipv6,
        "IS_WANTED_SPORT(port)": port_condition(args.sport),
        "IS_WANTED_DPORT(port)": port_condition(args.dport),
        "IS_WANTED_SADDR(address)": address_condition(args.saddr),
        "IS_WANTED_DADDR(address)": address_condition(args.daddr),
        "IS_CHOSEN(event)": "%d >> (event) & 1" % sum(1 << event for event in args.events),
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
    chosen = {EVENTS[event].partition("(")[0] for event in args.events}
    # function, tracepoint, name in the C text; destruction always, to forget owners
    probes = [("tcp_v4_destroy_sock", "tcp_destroy_sock", "destroy")]
    if "tcp_reset" in chosen:
        probes.append(("tcp_reset", "tcp_receive_reset", "reset"))
    if "tcp_send_reset" in chosen:
        probes.append(("tcp_send_active_reset", "tcp_send_reset", "rst"))
        probes += [("tcp_v4_send_reset", None, "reply")] * args.kprobes
        probes += [("tcp_v6_send_reset", None, "reply")] * (args.kprobes and os.path.exists("/proc/net/tcp6"))
    if "tcp_retransmit_skb" in chosen:
        probes.append(("tcp_retransmit_skb", "tcp_retransmit_skb", "retransmit"))
    if chosen & {"tcp_ack", "tcp_select_window"}:
        probes.append(("tcp_rcv_established", "tcp_probe", "segment"))
    if "sock_def_error_report" in chosen:
        probes.append(("sock_def_error_report", "inet_sk_error_report", "error"))
    for function, tracepoint, name in probes:
        if args.kprobes or (name == "error" and KERNEL < (5, 15)):
            bpf.attach_kprobe(event=function, fn_name="kprobe_" + name)
        else:
            bpf.attach_raw_tracepoint(tp=tracepoint, fn_name="tracepoint_" + name)
    if args.kprobes:
        bpf.attach_kprobe(event="tcp_set_state", fn_name="kprobe_set_state")
    else:
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_first")
        bpf.raw_tracepoint_fds.clear()          # bcc refuses a second program on a raw tracepoint it knows of
        bpf.attach_raw_tracepoint(tp="inet_sock_set_state", fn_name="tracepoint_set_state_second")
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


def learn_existing(bpf):
    """Passes the owners of the sockets that already exist to the kernel side."""
    table, unknown = bpf["existing"], 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):      # the process has ended
            with open("/proc/%s/comm" % pid, "rb") as file:
                owner = table.Leaf(int(pid), file.read()[:15].rstrip(b"\n"))
            for inode in socket_inodes(pid):
                try:
                    table[table.Key(inode)] = owner
                except Exception:               # the map is full
                    unknown += 1
    report({"owners of sockets from before the start not known: the map was full": unknown}, {})


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


@functools.lru_cache(maxsize=16)
def clock(second):
    return time.strftime("%H:%M:%S", time.localtime(second))


# A connection has many events, and their lines have parts in common.
@functools.lru_cache(maxsize=4096)
def owner_columns(packed):
    """Returns event and owner, as text and as JSON members."""
    event = EVENTS[packed[20]]
    pid, comm, members = owner_text(packed[:20])
    return "%-23s %-6s %-16s " % (event, pid, comm), '"event":"%s",%s' % (event, members)


@functools.lru_cache(maxsize=4096)
def endpoint(packed):
    """Returns an address with its port as text, and both of them."""
    text, port = address(packed[:16]), int.from_bytes(packed[16:18], sys.byteorder)
    return "%-21s " % (("[%s]:%d" if ":" in text else "%s:%d") % (text, port)), text, port


@functools.lru_cache(maxsize=4096)
def state_columns(packed):
    """Returns states, error and reason, as text and as JSON members."""
    sk_err, event, oldstate, state, detail = struct.unpack("=iBBBB", packed)
    error = errno.errorcode.get(sk_err, str(sk_err)) if sk_err else ""
    ca_state = CA_STATES.get(detail, "") if EVENTS[event] == "tcp_retransmit_skb()" else ""
    reason = reset_reasons().get(detail, "") if EVENTS[event] == "tcp_send_reset()" else ""
    states = "%s -> %s" % (STATES[oldstate], STATES[state]) if event == 0 else STATES[state] or "N/A"
    members = '"oldstate":%s,"state":%s,"sk_err":%s,"ca_state":%s,"reason":%s' % tuple(
        json.dumps(value or None) for value in (STATES[oldstate], STATES[state], error, ca_state, reason))
    return ("%-24s %s" % (states + ("/" + ca_state if ca_state else ""), error or reason)).rstrip() + "\n", members


@functools.lru_cache(maxsize=1024)
def stack_of(packed):
    """Returns the names of the functions, innermost first, without those of the tracing itself."""
    import bcc
    names = [bcc.BPF.ksym(frame, show_offset=False) for frame in struct.unpack("=%dQ" % (len(packed) // 8), packed)]
    while names and TRACING_FRAMES.match(names[0]):
        names.pop(0)
    return [name.decode(errors="replace") for name in names]


def header(args):
    if args.json:
        return ""
    return ("Tracing TCP events. Ctrl-C to end.\n" + args.timestamp * ("%-12s " % "TIME") + TEXT % NAMES +
            args.ms * ("%21s" % "MS") + "\n")


def line(args, record, wall):
    """Returns one line, with its stack. wall: offset of the kernel's clock from Unix time in ns."""
    ts, owner, source, destination, state, netns, size, in_state, stack = record
    ms = in_state and int.from_bytes(in_state, sys.byteorder) / 1e6
    (owner, json_owner), (source, saddr, sport), (destination, daddr, dport), (state, json_state) = (
        owner_columns(owner), endpoint(source), endpoint(destination), state_columns(state))
    stack = stack_of(stack[:size]) if size > 0 else None
    if args.json:
        stack = ',"stack":' + json.dumps(stack, separators=(",", ":")) if args.kstack else ""
        return JSON % ((ts + wall) / 1e9, json_owner, 6 if ":" in daddr else 4, saddr, sport, daddr, dport, json_state,
                       "%.6f" % ms if ms else "null", netns, stack)
    text = owner + source + destination + state
    if in_state and EVENTS[record[4][4]] == "tcp_set_state()":
        text = "%s%-49s %s\n" % (owner + source + destination, state[:-1], "%.2f" % ms if ms else "N/A")
    if args.timestamp:
        text = "%s.%03d " % (clock((ts + wall) // 10 ** 9), (ts + wall) // 10 ** 6 % 1000) + text
    return text + "".join("    %s\n" % name for name in stack) + "\n" if stack else text


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
    """Prints events until a signal comes, the time is up or the reader of the output has gone."""
    form = struct.Struct(HEAD + "%ds%ds" % (8 * args.ms, 8 * STACK_DEPTH * args.kstack))
    read, reader, reported, stop = open_events(bpf, form), select.poll(), {}, False
    reader.register(1, 0)
    signal.setitimer(signal.ITIMER_REAL, args.duration or 0)
    learn_existing(bpf)
    write(header(args))
    while not stop:
        time.sleep(0.1)         # seconds that a line may be late
        stop = signal.sigpending() & STOP_SIGNALS or reader.poll(0)
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        records = form.iter_unpack(read())
        if not RING_PAGES:
            records = iter(sorted(records))             # perf buffers are read CPU by CPU
        while text := "".join([line(args, record, wall) for record in itertools.islice(records, 10000)]):
            if write(text):                             # in parts: a full ring is 80 MB of text
                stop = True
                break
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
