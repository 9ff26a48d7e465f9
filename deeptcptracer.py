#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The authors of tcp-tracers
#
# deeptcptracer  Trace what happens to TCP connections: state changes, FIN, RST, retransmissions, errors, zero windows.
#                For Linux, uses bcc, eBPF.
#
# usage: deeptcptracer [-h] [-p PID] [-t] [-m] [-K] [-s ADDRESS] [-d ADDRESS] [-S PORT] [-D PORT] [-e LIST | -R]
#                      [-4 | -6] [--json] [--unit] [--no-kprobe] [--name NAME] [--uid UID] [--cgroup PATH] [-N NETNS]
#                      [--duration SECONDS] [--ebpf] [--version]
#
# Prints one line per event: the process that owns the socket, the local and the remote address, the TCP state, the
# socket's error or the reason of a RST; with -m how long a state lasted, with -K the kernel stack below it.
#
# Traces the tracepoints sock:inet_sock_set_state, sock:inet_sk_error_report, tcp:tcp_receive_reset, tcp:tcp_send_reset,
# tcp:tcp_retransmit_skb, tcp:tcp_retransmit_synack and tcp:tcp_probe. Sent and received FINs are derived from the state
# changes that go with them.
# Owners are known from connect(), accept() and close(), and for sockets from before the start from /proc.
#
# CAVEATS: the two zero-window events look at every segment received in ESTABLISHED; -e leaves them out. A FIN that
# comes after the kernel has dropped the socket into TIME_WAIT is not seen.

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

# ---- deeptcptracer ----
import itertools

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
MAPS = "lost", "events", "holders", "tables"
RECORD = struct.Struct("=8xQ32si20s20sHHIHHHHIIIq")  # struct event, behind the ring buffer's own header
KERNEL_TYPES = ["tcp_sock", "net", "net_device", "sk_buff", "iphdr", "ipv6hdr", "tcphdr", "task_struct", "pid",
                "pid_namespace", "files_struct", "fdtable", "file", "socket_alloc", "mptcp_sock", "sock_flags",
                "sock_type", "sock_exterr_skb", "nsproxy", "inet_hashinfo", "inet_ehash_bucket", "hlist_nulls_node"]
MAX_SOCKETS = 1 << 18           # live sockets
STACK_DEPTH = 48                # frames
RING_PAGES = (16 << 20) // mmap.PAGESIZE        # 16 MiB: 160,000 events without stacks
# Names in the C text, where they are numbers in this order, and what is printed.
LOSSES = {"LOST_EVENT": "events lost: the ring buffer was full",
          "LOST_OWNER": "owners lost: the map of live sockets was full",
          "LOST_TIME": "times lost: the map of socket states was full",
          "SKIPPED": "events or owners lost: the kernel did not run the probe"}
EVENTS = {"SET_STATE": "tcp_set_state()", "SEND_FIN": "tcp_send_fin()", "FIN": "tcp_fin()", "RESET": "tcp_reset()",
          "RETRANSMIT": "tcp_retransmit_skb()", "ERROR": "sock_def_error_report()",
          "ZERO_WINDOW_RECEIVED": "tcp_ack()/win==0", "ZERO_WINDOW_SENT": "tcp_select_window()/win==0",
          "SEND_RESET": "tcp_send_reset()", "RETRANSMIT_SYNACK": "tcp_retransmit_synack()"}
EVENT_NAMES = list(EVENTS.values())
DEFAULT_EVENTS = set(range(len(EVENTS) - 1))    # all but the last
STATES = ["", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
          "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"]
RESET_REASONS = {}              # the kernel's names for why it sends a RST, by number; none before Linux 6.10
CA_STATES = dict(enumerate(["Open", "Disorder", "CWR", "Recovery", "Loss"]))         # enum tcp_ca_state
# Frames on top of a stack that belong to the tracing itself; a BPF program has no name there.
TRACING_FRAMES = re.compile(rb"_*bpf_|__traceiter_|_*trace_|_*do_trace|perf_|k(ret)?probe|aggr_|ftrace_|\[unknown\]")

bpf_text = r"""
#include <linux/fs.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/skbuff.h>

struct event {
    u64 ts;                     /* bpf_ktime_get_ns() */
    struct owner owner;
    s32 sk_err;
    struct endpoints ends;
    u16 event;                  /* EVENTS */
    u16 oldstate, state;
    u16 detail;                 /* state of congestion control, or reason of a RST */
    u32 inode;
    u32 backlog, max_backlog;   /* of a listener that sends a SYN-ACK again */
    s64 stack_size;             /* bytes */
    u64 in_state[STATE_TIME];   /* ns in the old state; 0: not known */
    u64 stack[STACK_DEPTH];
};

BPF_HASH(owners, struct sock *, struct owner, MAX_SOCKETS);
BPF_HASH(since, struct sock *, u64, STATE_TIME ? MAX_SOCKETS : 1);      /* ns: when it entered its state */

static inline u8 state_of(struct sock *sk)
{
    return READ(sk, __sk_common.skc_state);
}

static inline struct owner *owner_of(struct sock *sk)
{
    return owners.lookup(&sk) ?: state_of(sk) == TCP_LISTEN ? holder_of(sk) : NULL;     /* no walk finds listeners */
}

static inline void destroyed(struct sock *sk)
{
    owners.delete(&sk);
    if (STATE_TIME)
        since.delete(&sk);
}

/* Returns how long the socket was in its old state. It starts in CLOSE: an entry for that is of an older socket. */
static inline u64 time_in_state(struct sock *sk, int oldstate)
{
    u64 now = bpf_ktime_get_ns(), ns = 0, *then = since.lookup(&sk);

    if (then && oldstate != TCP_CLOSE)
        ns = now - *then;
    if (since.update(&sk, &now))
        count_lost(LOST_TIME);
    return ns;
}

/* The current process uses this socket. */
static inline void remember_owner(struct sock *sk)
{
    struct owner o = {};

    set_owner(&o);
    if (o.pid && owners.update(&sk, &o))
        count_lost(LOST_OWNER);
}

/* A connected socket, at the start. */
static inline void found(struct sock *sk, u8 state, u16 what)
{
    struct owner *holder = holder_of(sk);
    int err = holder ? owners.insert(&sk, holder) : 0;

    if (err && err != -EEXIST)
        count_lost(LOST_OWNER);
}

static inline struct tcphdr tcphdr_of(struct sk_buff *skb)
{
    struct tcphdr th;

    bpf_probe_read_kernel(&th, sizeof(th), READ(skb, head) + READ(skb, transport_header));
    return th;
}

/* The same as read_endpoints(), of a segment received. sk: as in rst_sent() */
static inline void read_skb_endpoints(struct endpoints *e, struct sk_buff *skb, struct sock *sk)
{
    void *ip = READ(skb, head) + READ(skb, network_header);
    struct net_device *dev = READ(skb, dev);
    struct tcphdr th = tcphdr_of(skb);

    __builtin_memset(e, 0, sizeof(*e));
    e->lport = ntohs(th.dest);
    e->rport = ntohs(th.source);
    e->netns = READ(sk ? READ(sk, __sk_common.skc_net.net) : READ(dev, nd_net.net), ns.inum);
    if (READ(skb, protocol) == htons(ETH_P_IP)) {
        e->laddr.word[2] = e->raddr.word[2] = htonl(0xffff);
        e->laddr.word[3] = READ((struct iphdr *)ip, daddr);
        e->raddr.word[3] = READ((struct iphdr *)ip, saddr);
    } else {
        *(struct in6_addr *)e->laddr.word = READ((struct ipv6hdr *)ip, daddr);
        *(struct in6_addr *)e->raddr.word = READ((struct ipv6hdr *)ip, saddr);
        e->laddr.scope = e->raddr.scope = READ(dev, ifindex);
    }
}

/* skb: as in rst_sent(), else NULL; listener: of a mini-socket, else NULL */
static inline void emit(void *ctx, struct sock *sk, struct sk_buff *skb, struct owner *o, u8 event, u8 oldstate,
                        u8 state, u8 detail, u64 in_state, struct sock *listener)
{
    u64 ts = bpf_ktime_get_ns();
    struct owner nobody = {};
    struct endpoints ends;
    struct event *e;

    if (!o)
        o = &nobody;
    if (!IS_WANTED_OWNER(o))
        return;
    if (skb)
        read_skb_endpoints(&ends, skb, sk);
    else
        read_endpoints(&ends, sk);
    /* inet_sport stays when a socket leaves the port's hash table, even until another connect() has found a port */
    if (listener || oldstate == TCP_CLOSE || (oldstate == TCP_SYN_SENT && is_unsent(sk)))
        ends.lport = READ(sk, __sk_common.skc_num);
    if (!IS_WANTED_PEER(&ends) || !IS_WANTED_LPORT(ends.lport))
        return;
    e = events.ringbuf_reserve(sizeof(*e));
    if (!e) {
        count_lost(LOST_EVENT);
        return;
    }
    e->ts = ts;
    e->owner = *o;
    e->sk_err = listener || event == SEND_RESET ? 0 : error_of(sk, oldstate);
    e->ends = ends;
    e->event = event;
    e->oldstate = oldstate;
    e->state = state;
    e->detail = detail;
    e->inode = event == SEND_RESET ? 0 : INODE_OF(listener ?: sk);
    e->backlog = listener ? READ(listener, sk_ack_backlog) : 0;
    e->max_backlog = listener ? READ(listener, sk_max_ack_backlog) : 0;
    e->stack_size = 0;
    if (STATE_TIME)
        e->in_state[0] = in_state;
#if STACK_DEPTH
    e->stack_size = bpf_get_stack(ctx, e->stack, sizeof(e->stack), 0);
#endif
    events.ringbuf_submit(e, 0);
}

/* An event that is not a change of state. */
static inline int happened(void *ctx, struct sock *sk, u8 event, u8 detail)
{
    emit(ctx, sk, NULL, owner_of(sk), event, 0, state_of(sk), detail, 0, NULL);
    return 0;
}

/* tcp_fin() marks the socket as done; else FIN_WAIT2 may end by a timeout or go on as a TIME_WAIT socket. */
static inline bool fin_has_come(struct sock *sk, int oldstate, int newstate)
{
    if (oldstate == TCP_FIN_WAIT2 && newstate == TCP_CLOSE)
        return READ(sk, __sk_common.skc_flags) >> SOCK_DONE & 1;
    return newstate == TCP_CLOSE_WAIT || newstate == TCP_CLOSING;
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    bool sends_fin = newstate != oldstate && (newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK);
    bool is_new = oldstate == TCP_LISTEN && newstate == TCP_SYN_RECV;
    struct owner *o;
    u64 ns;

    if (READ(sk, sk_protocol) != IPPROTO_TCP)
        return;
    if (is_new)                 /* what is known of its address is of an older socket, whose end was not seen */
        destroyed(sk);
    ns = STATE_TIME ? time_in_state(sk, oldstate) : 0;
    if (is_new)                 /* it has no addresses yet */
        return;
    o = owner_of(sk);
    if (newstate == TCP_SYN_SENT || newstate == TCP_LISTEN ||
        (!o && (oldstate == TCP_LISTEN || (sends_fin && READ(sk, sk_lock.owned))))) {
        remember_owner(sk);     /* in connect(), listen(), close(), shutdown() or exit */
        o = owners.lookup(&sk);
    }
    if (newstate == TCP_LISTEN)         /* not by tcp_set_state() */
        return;
    if (IS_CHOSEN(FIN) && fin_has_come(sk, oldstate, newstate))
        emit(ctx, sk, NULL, o, FIN, oldstate, oldstate, 0, 0, NULL);
    if (IS_CHOSEN(SET_STATE))
        emit(ctx, sk, NULL, o, SET_STATE, oldstate, newstate, 0, ns, NULL);
    if (IS_CHOSEN(SEND_FIN) && sends_fin)
        emit(ctx, sk, NULL, o, SEND_FIN, oldstate, newstate, 0, 0, NULL);
}

static inline int error_reported(void *ctx, struct sock *sk)
{
    /* sockets of every kind report errors here, raw ones for TCP among them */
    if (READ(sk, sk_protocol) == IPPROTO_TCP && READ(sk, sk_type) == SOCK_STREAM)
        happened(ctx, sk, ERROR, 0);
    return 0;
}

static inline int retransmitted(void *ctx, struct sock *sk)
{
    u8 bits;                    /* icsk_ca_state is a bit field in the byte before this member */

    bpf_probe_read_kernel(&bits, 1, &((struct inet_connection_sock *)sk)->icsk_retransmits - 1);
    return happened(ctx, sk, RETRANSMIT, __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? bits >> 3 : bits & 31);
}

/* req: a mini-socket, as below */
static inline int synack_retransmitted(void *ctx, struct sock *listener, u64 req)
{
    emit(ctx, (struct sock *)req, NULL, owner_of(listener), RETRANSMIT_SYNACK, 0, TCP_NEW_SYN_RECV, 0, 0, listener);
    return 0;
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
        emit(ctx, sk, skb, is_full ? owner_of(sk) : NULL, SEND_RESET, 0, state, reason, 0, NULL);
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

static inline void accepted(struct sock *sk)
{
    if (sk && state_of(sk) != TCP_CLOSE && !owner_of(sk))
        remember_owner(sk);
}

#define SK(ctx) ((struct sock *)(ctx)->args[0])
#define SKB(ctx) ((struct sk_buff *)(ctx)->args[1])

int tracepoint_rst(struct bpf_raw_tracepoint_args *ctx) { return rst_sent(ctx, SK(ctx), SKB(ctx), REASON(ctx)); }
int tracepoint_retransmit(struct bpf_raw_tracepoint_args *ctx) { return ERR(ctx) ? 0 : retransmitted(ctx, SK(ctx)); }
int tracepoint_synack(struct bpf_raw_tracepoint_args *ctx) { return synack_retransmitted(ctx, SK(ctx), ctx->args[1]); }
int tracepoint_segment(struct bpf_raw_tracepoint_args *ctx) { return segment_received(ctx, SK(ctx), SKB(ctx)); }
int tracepoint_reset(struct bpf_raw_tracepoint_args *ctx) { return happened(ctx, SK(ctx), RESET, 0); }
int tracepoint_error(struct bpf_raw_tracepoint_args *ctx) { return error_reported(ctx, SK(ctx)); }
int kprobe_error(struct pt_regs *ctx, struct sock *sk) { return error_reported(ctx, sk); }
"""

NAMES = "EVENT_SOURCE", "PID", "COMM", "SOURCE", "DESTINATION", "TCP_STATE", "SK_ERR"
TEXT = "%-23s %-6s %-16s ", "%-21s %-21s %-24s %s"
UNIT = "%-12.12s "              # between these two, with --unit
JSON = '{"ts":%.6f,%s,%s,%s,"state_ms":%s,"netns":%d,"inode":%s%s}\n'


def event_list(text):
    """Returns the numbers of comma-separated EVENTS, each named with or without what follows the name."""
    names = [name.partition("(")[0] for name in EVENT_NAMES]
    try:
        return {(EVENT_NAMES if "(" in part else names).index(part) for part in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError("no such event in %r (there are: %s)" % (text, ", ".join(names)))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace what happens to TCP connections",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    add = parser.add_argument
    add("-p", "--pid", type=processes, help="trace this PID only (or comma-separated ones)")
    add("-t", "--timestamp", action="count", default=0,
        help="include timestamp on output (HH:MM:SS.mmm); given twice, with the date")
    add("-m", "--ms", action="store_true", help="include how many milliseconds the old state lasted")
    add("-K", "--kstack", action="store_true", help="include the kernel stack")
    add("-s", "--saddr", dest="laddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of local addresses or networks; ! excludes")
    add("-d", "--daddr", dest="raddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of remote addresses or networks; ! excludes")
    add("-S", "--sport", dest="lport", metavar="PORT", type=ports, help="comma-separated list of local ports to trace.")
    add("-D", "--dport", dest="rport", metavar="PORT", type=ports,
        help="comma-separated list of remote ports to trace.")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("-e", "--events", metavar="LIST", type=event_list, default=DEFAULT_EVENTS,
        help="comma-separated list of the events to trace (default: all but the last): " +
             ", ".join(name.partition("(")[0] for name in EVENT_NAMES))
    chosen.add_argument("-R", "--retransmissions", action="store_const", dest="events",
        const=event_list("tcp_retransmit_skb,tcp_retransmit_synack"), help="trace retransmissions only")
    family = parser.add_mutually_exclusive_group()
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    add("--json", action="store_true", help="print one JSON object per line, with exact times")
    add("--unit", action="store_true", help="include the service or container of the process on output")
    add("--no-kprobe", action="store_true", help="trace accept() at the exit of the system call, kprobes or not")
    add_common(parser, "-N")
    return parser.parse_args(argv)


def tracepoint_format(name):
    """Returns the description of a tracepoint of TCP, or "" where there is no tracefs, as outside of attached()."""
    with contextlib.suppress(OSError), open("/sys/kernel/tracing/events/tcp/%s/format" % name) as file:
        return file.read()
    return ""


def reset_reasons():
    """Returns the kernel's names for why it sends a RST, by number; none before Linux 6.10."""
    names = tracepoint_format("tcp_send_reset").partition("REC->reason, {")[2]
    return {int(number): name for number, name in re.findall(r'(\d+), "(\w+)"', names)}


def record_of(args):
    """Returns the layout of a record with the arrays at its end, which depend on options."""
    return struct.Struct(RECORD.format + "%ds%ds" % (8 * args.ms, 8 * STACK_DEPTH * args.kstack))


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    return flags({
        **filters(args),
        "RING_PAGES": RING_PAGES, "RECORD_SIZE": record_of(args).size - 8,
        "MAX_SOCKETS": MAX_SOCKETS, "MAX_HOLDERS": MAX_SOCKETS, "WALKS": 1,
        "STACK_DEPTH": STACK_DEPTH if args.kstack else 0, "STATE_TIME": int(args.ms),
        # arguments that a tracepoint may lack; with an error nothing was sent
        "ERR(ctx)": "(int)ctx->args[2]" if "REC->err" in tracepoint_format("tcp_retransmit_skb") else 0,
        "REASON(ctx)": "ctx->args[2]" if reset_reasons() else 0,
        "IS_CHOSEN(event)": "%d >> (event) & 1" % sum(1 << event for event in args.events),
    }, LOSSES, EVENTS)


def program(_args):
    return shared_text + bpf_text + probes_text


def attach(bpf, args):
    """Returns what the parent needs to know besides."""
    chosen = {list(EVENTS)[event] for event in args.events}
    probes = [("tcp_destroy_sock", "destroy")]          # always, to forget owners
    if "RESET" in chosen:
        probes.append(("tcp_receive_reset", "reset"))
    if "SEND_RESET" in chosen:
        probes.append(("tcp_send_reset", "rst"))
    if "RETRANSMIT_SYNACK" in chosen:
        probes.append(("tcp_retransmit_synack", "synack"))
    if "RETRANSMIT" in chosen:
        probes.append(("tcp_retransmit_skb", "retransmit"))
    if chosen & {"ZERO_WINDOW_RECEIVED", "ZERO_WINDOW_SENT"}:
        probes.append(("tcp_probe", "segment"))
    for tracepoint, name in probes:
        bpf.attach_raw_tracepoint(tp=tracepoint, fn_name="tracepoint_" + name)
    if "ERROR" in chosen:
        try:
            bpf.attach_raw_tracepoint(tp="inet_sk_error_report", fn_name="tracepoint_error")
        except Exception:       # before Linux 5.15
            bpf.attach_kprobe(event="sock_def_error_report", fn_name="kprobe_error")
    attach_state_changes(bpf)
    attach_accept(bpf, args)
    for name in WALK:
        bpf.load_func(name, bpf.RAW_TRACEPOINT)
    return {"reset_reasons": reset_reasons()}


@functools.lru_cache(maxsize=16)
def clock(second, form):
    return time.strftime(form, time.localtime(second))


# A connection has many events, and their lines have parts in common.
@functools.lru_cache(maxsize=4096)
def owner_columns(is_json, has_unit, owner, event):
    """Returns event and owner as text, or as JSON members."""
    pid, comm, unit, members = owner_text(owner)
    name = EVENT_NAMES[event]
    return '"event":"%s",%s' % (name, members) if is_json else TEXT[0] % (name, pid, comm) + UNIT % unit * has_unit


@functools.lru_cache(maxsize=4096)
def endpoint_columns(is_json, laddr, raddr, lport, rport, netns):
    """Returns both addresses with their ports as text, or as JSON members."""
    saddr, daddr = address(laddr, netns), address(raddr, netns)
    ip, form = (6, "[%s]:%d") if ":" in daddr else (4, "%s:%d")
    if is_json:
        return '"ip":%d,"saddr":"%s","sport":%d,"daddr":"%s","dport":%d' % (ip, saddr, lport, daddr, rport)
    return "%-21s %-21s " % (form % (saddr, lport), form % (daddr, rport))


@functools.lru_cache(maxsize=4096)
def state_columns(is_json, event, oldstate, state, detail, sk_err, backlog, max_backlog):
    """Returns states, error and reason as text, or as JSON members."""
    name, old, new = EVENT_NAMES[event], STATES[oldstate], STATES[state]
    error = errno.errorcode.get(sk_err, str(sk_err)) if sk_err else ""
    ca_state = CA_STATES.get(detail, "") if name == "tcp_retransmit_skb()" else ""
    reason = RESET_REASONS.get(detail, "") if name == "tcp_send_reset()" else ""
    queue = "queue %d/%d" % (backlog, max_backlog) if name == "tcp_retransmit_synack()" else ""
    states = "%s -> %s" % (old, new) if name == "tcp_set_state()" else new or "N/A"
    if is_json:
        return '"oldstate":%s,"state":%s,"sk_err":%s,"ca_state":%s,"reason":%s,"backlog":%s,"max_backlog":%s' % tuple(
            json.dumps(value) for value in (*(value or None for value in (old, new, error, ca_state, reason)),
                                            *((backlog, max_backlog) if queue else (None, None))))
    return ("%-24s %s" % (states + ("/" + ca_state if ca_state else ""), error or reason or queue)).rstrip()


@functools.lru_cache(maxsize=None)
def has_names():
    """Returns whether the kernel shows this user where its functions are."""
    import bcc
    return bcc.BPF.ksymname(b"tcp_v4_connect") not in (-1, 0)


@functools.lru_cache(maxsize=1024)
def stack_of(packed):
    """Returns the functions, innermost first, without those of the tracing itself; without names, all addresses."""
    frames = struct.unpack("=%dQ" % (len(packed) // 8), packed)
    if not has_names():
        return ["0x%x" % frame for frame in frames]
    import bcc
    names = [bcc.BPF.ksym(frame, show_offset=False) for frame in frames]
    while names and TRACING_FRAMES.match(names[0]):
        names.pop(0)
    return [name.decode(errors="replace") for name in names]


def header(args):
    if args.json:
        return ""
    time_column = ("", "%-12s " % "TIME", "%-23s " % "TIME")[min(args.timestamp, 2)]
    return ("Tracing TCP events. Ctrl-C to end.\n" + time_column +
            (UNIT * args.unit).join(TEXT) % (NAMES[:3] + ("UNIT",) * args.unit + NAMES[3:]) +
            ("%21s" % "MS" if args.ms else "") + "\n")


def line(args, record, wall):
    """Returns one line, with its stack. wall: offset of the kernel's clock from Unix time in ns."""
    (ts, owner, sk_err, laddr, raddr, lport, rport, netns, event, oldstate, state, detail, inode, backlog, max_backlog,
     stack_size, in_state, stack) = record
    ms = int.from_bytes(in_state, sys.byteorder) / 1e6 if args.ms else 0
    subject = owner_columns(args.json, args.unit, owner, event)
    endpoints = endpoint_columns(args.json, laddr, raddr, lport, rport, netns)
    states = state_columns(args.json, event, oldstate, state, detail, sk_err, backlog, max_backlog)
    functions = stack_of(stack[:stack_size]) if stack_size > 0 else None
    if args.json:
        json_stack = ',"stack":' + json.dumps(functions, separators=(",", ":")) if args.kstack else ""
        return JSON % ((ts + wall) / 1e9, subject, endpoints, states, "%.6f" % ms if ms else "null", netns,
                       inode or "null", json_stack)
    if args.ms and EVENT_NAMES[event] == "tcp_set_state()":
        states = "%-49s %s" % (states, "%.2f" % ms if ms else "N/A")
    text = subject + endpoints + states + "\n"
    if args.timestamp:
        ms, form = (ts + wall) // 10 ** 6, "%H:%M:%S" if args.timestamp == 1 else "%Y-%m-%d %H:%M:%S"
        text = "%s.%03d " % (clock(ms // 1000, form), ms % 1000) + text
    return text + "".join(["    %s\n" % name for name in functions]) + "\n" if functions else text


def trace(args):
    """Prints events until a signal comes, the time is up or the reader of the output has gone."""
    fds = load(args)
    RESET_REASONS.update(fds["reset_reasons"])
    record = record_of(args)
    report, read, wait = open_losses(fds), open_events(fds, record), open_wait(fds["events"])
    learn_existing(fds, args)
    if args.kstack and not has_names():
        say("stacks have addresses, no names: the kernel shows this user none (kernel.kptr_restrict, CAP_SYSLOG)")
    write(header(args))
    stop = False
    while not stop:
        stop = wait()
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        records = record.iter_unpack(read())
        while text := "".join([line(args, event, wall) for event in itertools.islice(records, 10000)]):
            if write(text):     # in parts: a full ring is 80 MB of text
                stop = True
                break
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
