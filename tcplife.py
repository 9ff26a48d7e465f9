#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The authors of tcp-tracers
#
# tcplife  Trace the lifespan of TCP sessions and summarize.
#          For Linux, uses bcc, eBPF.
#
# usage: tcplife [-h] [-T] [-t] [-w | -s | --json | --prometheus FILE] [-x] [-p PID] [-L LOCALPORT] [-D REMOTEPORT]
#                [--laddr ADDRESS] [--raddr ADDRESS] [-4 | -6] [--failed] [-i SECONDS] [-c] [--rows N] [--by-peer]
#                [--histogram] [--min-ms MS] [--existing] [--owner {accept,close}] [--unit] [--no-kprobe] [--name NAME]
#                [--uid UID] [--cgroup PATH] [--netns NETNS] [--duration SECONDS] [--ebpf] [--version]
#
# Prints one line per finished session: the process that owns the socket, addresses, ports, bytes each way and
# milliseconds; with -x also how it ended. Failed connects are shown, too; with -i also sessions that are open. With -c
# it prints one table of how many there were instead, and with --prometheus it writes counters to a file.
#
# Traces the tracepoints sock:inet_sock_set_state and tcp:tcp_destroy_sock, and accept(). No packet is looked at. The
# owner of a session is the process that called connect() or accept(): many state changes run in softirq, in the
# context of whichever process was interrupted, and the current process means nothing there.
#
# CAVEATS: a kernel without kprobes shows accept() at the exit of the system call, which does not cover io_uring and
# 32-bit programs: there the process that closes is taken as the owner.

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

# ---- tcplife ----
import atexit
import bisect
import collections
import csv
import io
import itertools
import math

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
  ./tcplife -x --existing -i 1 --duration 1     # list what is open now
  ./tcplife -c --duration 10                    # count by owner, peer and port
  ./tcplife --prometheus tcplife.prom           # counters for node-exporter
"""

PROGRAM = "tcplife"
MAPS = "lost", "events", "unclaimed", "holders", "tables"
RECORD = struct.Struct("=8xQQ32sBBHIQQQQQ20s20sHHIIIIIIIIIII")  # struct event, behind the ring buffer's own header
KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "pid", "pid_namespace", "files_struct", "fdtable", "file",
                "socket_alloc", "mptcp_sock", "sock_flags", "sock_exterr_skb", "sk_buff", "inet_bind_bucket", "nsproxy",
                "inet_hashinfo", "inet_ehash_bucket", "hlist_nulls_node"]
MAX_SOCKETS = 1 << 18           # live sockets: 38 MB of kernel memory
MAX_UNCLAIMED = 1 << 14         # sessions that ended before accept() returned them
RING_PAGES = (8 << 20) // mmap.PAGESIZE         # 8 MiB: a second of the fastest load measured
# Names in the C text, where they are numbers in this order, and what is printed.
LOSSES = {"LOST_EVENT": "sessions lost: the ring buffer was full",
          "LOST_SESSION": "sessions lost: the map of live sessions was full",
          "LOST_UNCLAIMED": "sessions lost: the map of unaccepted sessions was full",
          "LOST_END": "sessions lost: their end was not seen",
          "SKIPPED": "state changes or accepts lost: the kernel did not run the probe"}
CAUSES = "ring_full", "map_full", "unaccepted_full", "end_unseen", "probe_skipped"       # LOSSES as labels
ROLES = {"EXISTED": None, "CONNECT": "connect", "ACCEPT": "accept"}
ENDS = {"LOCAL": "local", "REMOTE": "remote", "BOTH": "both",           # these with FINs
        "ABORT": "abort", "QUIT": "quit", "UNSENT": None, "OPEN": "open"}
ERRORS = {errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ECONNREFUSED: "refused", errno.ETIMEDOUT: "timeout",
          errno.EHOSTUNREACH: "unreachable", errno.ENETUNREACH: "unreachable", errno.ECONNABORTED: "killed"}

bpf_text = r"""
/*
 * The life of a session. (P): there, and only there, the current process is the one that uses the socket.
 *
 *   connect(): CLOSE -> SYN_SENT       birth() (P)    SYN_RECV -> ESTABLISHED                 birth(), no owner yet
 *                                                     accept()                                own() (P)
 *   close(), shutdown(), exit: -> FIN_WAIT1 or LAST_ACK                                       own() (P), if it has none
 *   any change to CLOSE                                                                       tell()
 *   accept() of a session that has ended; close() of its listener destroys it                 claim() (P)
 *   the socket is destroyed, or its memory is used again                                      forget()
 */
struct session {
    u64 born;                   /* bpf_ktime_get_ns(); 0: before the start of the tool */
    u64 ready;                  /* when connect() succeeded or accept() returned; 0: not yet */
    struct owner owner;
    u8 role;                    /* ROLES */
    u8 syn;                     /* 1: the kernel counts a SYN as a byte sent */
    u16 listed;                 /* number of the list of open sessions that it was in last */
    u32 inode;                  /* when the owner was taken */
    u64 tx_seen, rx_seen;       /* of EXISTED, counted by then; in an event, bytes since then */
};

struct event {
    struct session session;
    u64 died;                   /* now, if it is open */
    u64 tx, rx;                 /* bytes */
    struct endpoints ends;
    u32 srtt;                   /* eighths of a microsecond */
    u32 retrans;                /* segments */
    u32 end, err;               /* ENDS, or if there was an error its number */
    u32 ooo;                    /* segments received out of order */
    u32 min_rtt;                /* microseconds */
    u32 cwnd, lost;             /* segments */
    u32 mss;                    /* bytes */
    u32 pad;
};

BPF_HASH(sessions, struct sock *, struct session, MAX_SOCKETS);
BPF_HASH(unclaimed, struct sock *, struct event, MAX_UNCLAIMED);        /* ended before anybody accepted them */

static inline void submit(struct event *e)
{
    if (IS_WANTED_OWNER(&e->session.owner) && events.ringbuf_output(e, sizeof(*e), 0))
        count_lost(LOST_EVENT);
}

/* Fills in what can still be seen of a session from before the start. */
static inline void recall(struct sock *sk, struct session *s)
{
    struct owner *holder = holder_of(sk);

    if (READ(sk, sk_max_ack_backlog))           /* a listener's, passed on to what it accepts */
        s->role = ACCEPT;
    else if (has_connected(sk) || READ(sk, __sk_common.skc_state) == TCP_SYN_SENT)
        s->role = CONNECT;
    s->syn = s->role == CONNECT && READ((struct tcp_sock *)sk, segs_out);
    s->tx_seen = READ((struct tcp_sock *)sk, bytes_acked);
    s->rx_seen = READ((struct tcp_sock *)sk, bytes_received);
    s->inode = INODE_OF(sk);
    if (holder)
        s->owner = *holder;
}

static inline void birth(struct sock *sk, u8 role)
{
    struct session s = {.born = role == EXISTED ? 0 : bpf_ktime_get_ns(), .role = role, .syn = role == CONNECT};
    struct endpoints ends;
    int err;

    if (READ(sk, sk_protocol) != IPPROTO_TCP)
        return;
    if (FILTERS) {              /* all but the local port of an outgoing session, which it does not have yet */
        read_endpoints(&ends, sk);
        if (!IS_WANTED_PEER(&ends) || (role != CONNECT && !IS_WANTED_LPORT(ends.lport)))
            return;
    }
    if (role == CONNECT) {
        set_owner(&s.owner);
        s.inode = INODE_OF(sk);
    }
    if (role == EXISTED)
        recall(sk, &s);
    err = sessions.insert(&sk, &s);
    if (err && err != -EEXIST)  /* exists: accept() saw it first (TCP Fast Open), or EXISTED comes again */
        count_lost(LOST_SESSION);
}

static inline void established(struct sock *sk, int oldstate)
{
    struct session *s = sessions.lookup(&sk);

    if (s && s->role == CONNECT) {      /* from SYN_RECV if the other end called connect(), too */
        s->ready = bpf_ktime_get_ns();
        s->syn = READ((struct tcp_sock *)sk, segs_out) > 0;     /* none: restored by TCP_REPAIR */
    } else if (oldstate == TCP_SYN_RECV) {
        birth(sk, ACCEPT);
    }
}

/* The current process uses this socket. Returns its session s, NULL if it is not known. */
static inline struct session *own(struct sock *sk, struct session *s)
{
    struct owner o = {};

    if (!s || s->owner.pid)
        return s;
    set_owner(&o);
    s = sessions.lookup(&sk);   /* again: a softirq may have ended it and given its memory to another one */
    if (s) {
        s->owner = o;
        s->inode = INODE_OF(sk);
    }
    return s;
}

static inline u32 end_of(struct sock *sk, int oldstate, bool fin_acked, bool fin_came, bool is_orphan)
{
    struct tcp_sock *tp = (struct tcp_sock *)sk;

    if (oldstate == TCP_SYN_SENT)
        return is_unsent(sk) ? UNSENT : QUIT;
    if (!fin_acked)
        return ABORT;
    /* close() after shutdown() has found unread data, or TCP_LINGER2 forbids to wait for the peer's FIN. */
    if (oldstate == TCP_FIN_WAIT2 && !fin_came && (!is_orphan || (int)READ(tp, linger2) < 0))
        return ABORT;
    return oldstate == TCP_FIN_WAIT2 ? LOCAL : oldstate == TCP_LAST_ACK ? REMOTE : BOTH;
}

static inline u64 without(u64 bytes, u64 counted)
{
    return bytes > counted ? bytes - counted : 0;
}

/* Prints a session that leaves this state for CLOSE, or an open one for this list, once. */
static inline void tell(struct sock *sk, int state, u16 list)
{
    struct session *s = sessions.lookup(&sk);
    struct event e = {.died = bpf_ktime_get_ns()};
    struct tcp_sock *tp = (struct tcp_sock *)sk;
    bool fin_acked, fin_came, is_orphan;
    u64 flags;

    if (!s || (list && s->listed == list))
        return;
    e.session = *s;
    if (list)
        s->listed = list;
    else
        sessions.delete(&sk);
    if (e.died - e.session.born < MIN_NS)
        return;
    flags = READ(sk, __sk_common.skc_flags);
    is_orphan = flags >> SOCK_DEAD & 1;
    fin_came = flags >> SOCK_DONE & 1;
    fin_acked = (state == TCP_FIN_WAIT2 || state == TCP_LAST_ACK || state == TCP_CLOSING) &&
                READ(tp, snd_una) == READ(tp, write_seq);
    e.end = list ? OPEN : end_of(sk, state, fin_acked, fin_came, is_orphan);
    e.err = list ? 0 : error_of(sk, state);
    if (FAILED && !e.err && e.end <= BOTH)
        return;
    read_endpoints(&e.ends, sk);
    if (e.end == UNSENT)
        e.ends.lport = READ(sk, __sk_common.skc_num);           /* inet_sport is that of an earlier attempt */
    if (!IS_WANTED_PEER(&e.ends) || !IS_WANTED_LPORT(e.ends.lport))
        return;
    /* The kernel counts a SYN and FINs as bytes. */
    e.tx = READ(tp, bytes_acked);
    e.rx = READ(tp, bytes_received);
    e.session.tx_seen = without(e.tx - e.session.tx_seen, fin_acked + (e.session.tx_seen ? 0 : e.session.syn));
    e.session.rx_seen = without(e.rx - e.session.rx_seen, fin_came);
    e.tx = without(e.tx, fin_acked + e.session.syn);
    e.rx = without(e.rx, fin_came);
    e.srtt = READ(tp, srtt_us);
    e.retrans = READ(tp, total_retrans);
    if (MORE) {
        e.ooo = READ(tp, rcv_ooopack);
        e.min_rtt = READ(tp, rtt_min.s[0].v);
        e.cwnd = READ(tp, snd_cwnd);
        e.lost = READ(tp, lost);
        e.mss = READ(tp, mss_cache);
    }
    if (list || is_orphan || e.session.owner.pid)       /* nobody accepts an orphan */
        submit(&e);
    else if (unclaimed.update(&sk, &e))
        count_lost(LOST_UNCLAIMED);
}

/* A connected socket: at the start, or for a list of those that are open. */
static inline void found(struct sock *sk, u8 state, u16 list)
{
    if (list)
        tell(sk, state, list);
    else
        birth(sk, EXISTED);
}

/* A session that the peer ended before accept() returned it is printed once its owner is known. */
static inline void claim(struct sock *sk, u64 accepted)
{
    struct event *held = unclaimed.lookup(&sk), e;

    if (!held)
        return;
    e = *held;
    if (unclaimed.delete(&sk))  /* another process was faster */
        return;
    e.session.ready = accepted;
    set_owner(&e.session.owner);
    e.session.inode = INODE_OF(sk);
    submit(&e);
}

/* At the start and at the very end of a socket: the end of a session that is still known was not seen. */
static inline void forget(struct sock *sk)
{
    struct session *s = sessions.lookup(&sk);   /* takes no lock, delete() does */
    bool is_lost = s && s->born;        /* else it may have ended just while a walk found it */

    if ((s && !sessions.delete(&sk) && is_lost) || (unclaimed.lookup(&sk) && !unclaimed.delete(&sk)))
        count_lost(LOST_END);
}

static inline void accepted(struct sock *sk)
{
    struct session *s;

    if (READ(sk, __sk_common.skc_state) == TCP_SYN_RECV)        /* TCP Fast Open: not ESTABLISHED yet */
        birth(sk, ACCEPT);
    s = sessions.lookup(&sk);
    if (!s)
        return claim(sk, bpf_ktime_get_ns());
    if (s->role != ACCEPT || s->ready)  /* that is an older one */
        return;
    s = own(sk, s);
    if (s)
        s->ready = bpf_ktime_get_ns();
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    bool closes = newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK;

    if (oldstate == TCP_CLOSE || oldstate == TCP_LISTEN)
        forget(sk);
    else if (EXISTING && oldstate != TCP_SYN_RECV && (closes || newstate == TCP_CLOSE) && !sessions.lookup(&sk))
        birth(sk, EXISTED);     /* it ends before the walk has found it */
    if (newstate == TCP_SYN_SENT) {
        birth(sk, CONNECT);
    } else if (newstate == TCP_ESTABLISHED) {
        established(sk, oldstate);
    } else if (closes && READ(sk, sk_lock.owned)) {     /* not in softirq */
        own(sk, sessions.lookup(&sk));
    } else if (newstate == TCP_CLOSE) {
        tell(sk, oldstate, 0);
    }
}

static inline void destroyed(struct sock *sk)
{
    claim(sk, 0);
    forget(sk);
}
"""

NAMES = {"pid": "PID", "comm": "COMM", "unit": "UNIT", "ip": "IP", "laddr": "LADDR", "raddr": "RADDR"}
EXTRA_NAMES = "ROLE", "CONN_MS", "RTT_MS", "RETR", "END", "ACC_MS", "OOO"
# Formats for columns(), of which the second is for --unit, and of the row that they stand in.
NARROW = "%(pid)-5s %(comm)-10.10s ", "%(unit)-12.12s ", "%(laddr)-15s ", " %(raddr)-15s "
WIDE = "%(pid)-7s %(comm)-16s ", "%(unit)-12.12s ", "%(ip)-2s %(laddr)-39s ", " %(raddr)-39s "
ROW, EXTRA = "%s%-5s%s%-5s %5s %5s ", "%-8s %-7s %7s %7s %4s %-11s %7s "
CSV = "%(pid)s,%(comm)s,", "%(unit)s,", "%(ip)s,%(laddr)s,", ",%(raddr)s,"
CSV_ROW, CSV_EXTRA = "%s%s%s%s,%s,%s,", "%s," * 7
JSON = "%(members)s,", "", '"ip":%(ip)d,"laddr":"%(laddr)s","lport":', ',"raddr":"%(raddr)s","rport":'
JSON_ROW = ('{"ts":%.6f,%s%d%s%d,"tx_bytes":%d,"rx_bytes":%d,"ms":%.6f,"netns":%d,"inode":%s,%s,"connect_ms":%s,'
            '"accept_ms":%s,"srtt_us":%s,"retrans":%d,"partial":%s,"ooo":%d,"min_rtt_us":%s,"cwnd":%d,"mss":%d,'
            '"lost":%d%s}\n')

# Of -c and --prometheus.
MAX_ROWS = 10000                # of a table, besides "(others)"
MAX_SERIES = 1000               # of --prometheus, with those of "(others)"
STEP = math.log(1.04)           # bucket i has the times from 1.04 ** i to 1.04 ** (i + 1) ns; for --prometheus 10 ** i
LIMITS = {"0.001": 6, "0.01": 7, "0.1": 8, "1": 9, "10": 10, "100": 11, "+Inf": math.inf}       # seconds: 10 ** i ns
_, CONNECT, ACCEPT = range(len(ROLES))
OPEN, FINS = list(ENDS).index("OPEN"), ("local", "remote", "both")
OTHERS = ("(others)", "", "", ""), '"comm":null,"role":null,"raddr":null,"port":null'
COUNT_NAMES = "COMM", "UNIT", "ROLE", "RADDR", "PORT", "N", "FAIL", "TX_KB", "RX_KB", "P50_MS", "P99_MS"
COUNT_EXTRA_NAMES = "CONN_P99", "ACC_P99", "RETR", "OPEN", "WORST"
COUNT_JSON = ('{"ts":%.6f,%s,"n":%d,"ends":%s,"open":%d,"tx_bytes":%d,"rx_bytes":%d,"retrans":%d,'
              '"ms":%s,"connect_ms":%s,"accept_ms":%s%s}\n')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(PROGRAM, description="Trace the lifespan of TCP sessions and summarize",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    add = parser.add_argument
    add("-T", "--time", action="count", default=0,
        help="include time column on output (HH:MM:SS); given twice, with date and milliseconds")
    add("-t", "--timestamp", action="store_true", help="include timestamp on output (seconds)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-w", "--wide", action="store_true", help="wide column output (fits IPv6 addresses)")
    output.add_argument("-s", "--csv", action="store_true", help="comma separated values output")
    output.add_argument("--json", action="store_true",
        help="print one JSON object per line, with exact bytes and times")
    output.add_argument("--prometheus", metavar="FILE",
        help="write counts since the start to FILE, for node-exporter's textfile collector, every 15 seconds, or "
             "with -i every so many, and print nothing")
    add("-x", "--extra", action="store_true",
        help="include columns on how sessions started and ended: ROLE CONN_MS RTT_MS RETR END ACC_MS OOO")
    add("-p", "--pid", type=processes, help="trace this PID only (or comma-separated ones)")
    add("-L", "--localport", dest="lport", metavar="LOCALPORT", type=ports,
        help="comma-separated list of local ports to trace.")
    add("-D", "--remoteport", dest="rport", metavar="REMOTEPORT", type=ports,
        help="comma-separated list of remote ports to trace.")
    add("--laddr", dest="laddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of local addresses or networks; ! excludes")
    add("--raddr", dest="raddr", metavar="ADDRESS", type=networks,
        help="comma-separated list of remote addresses or networks; ! excludes")
    family = parser.add_mutually_exclusive_group()
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    add("--failed", action="store_true", help="trace only sessions that did not end with FINs")
    add("-i", "--interval", metavar="SECONDS", type=number(0.1, 1e9, float),
        help="also print the sessions that are open, every so many seconds and at the end")
    add("-c", "--count", action="store_true",
        help="print no sessions, but one table of how many there were, at the end or with -i every so many seconds")
    add("--rows", metavar="N", type=number(1, 10 ** 6), help="with -c, so many rows (default: what fits the terminal)")
    add("--by-peer", action="store_true", help="with -c, count accepts by remote address, too")
    add("--histogram", action="store_true", help="with -c, print the distribution of MS for each row")
    add("--min-ms", metavar="MS", type=number(0, 1e9, float), default=0, help="trace only sessions that last as long")
    add("--existing", action="store_true", help="also trace sessions from before the start")
    add("--owner", choices=("accept", "close"), default="accept",
        help="who owns an incoming session: the process that accepted it (default), or the one that closed it, "
             "which saves the probe on accept()")
    add("--unit", action="store_true", help="include the service or container of the process on output")
    add("--no-kprobe", action="store_true", help="trace accept() at the exit of the system call, kprobes or not")
    add_common(parser)
    args = parser.parse_args(argv)
    if args.prometheus is not None and not args.prometheus.endswith(".prom"):
        parser.error("the textfile collector reads no file whose name does not end in .prom: %r" % args.prometheus)
    if args.prometheus and (args.count or args.extra or args.time or args.timestamp):
        parser.error("--prometheus prints nothing for -c, -x, -T and -t")
    if args.interval and args.failed and not args.count and not args.prometheus:
        parser.error("-i prints open sessions, which --failed leaves out")
    if (args.rows or args.by_peer or args.histogram) and not args.count:
        parser.error("--rows, --by-peer and --histogram need -c")
    if args.count and (args.csv or args.time or args.timestamp):
        parser.error("-c has no lines for -s, -T and -t")
    owner, unit, local, remote = JSON if args.json else CSV if args.csv else WIDE if args.wide else NARROW
    args.columns = owner + unit * args.unit + local, remote
    if args.csv:
        args.row_format = "%s," * (bool(args.time) + args.timestamp) + CSV_ROW + CSV_EXTRA * args.extra + "%s\n"
    else:
        args.row_format = time_format(args) + "%-9s " * args.timestamp + ROW + EXTRA * args.extra + "%s\n"
    return args


def walks(args):
    """Returns whether the options ask for sessions that are open."""
    return bool(args.existing or (args.extra or args.json if args.count else args.interval and not args.prometheus))


def cflags(args):
    """Returns the arguments as macros for the C text. Only numbers get into it."""
    return flags({
        **filters(args),
        "RING_PAGES": RING_PAGES, "RECORD_SIZE": RECORD.size - 8,
        "MAX_SOCKETS": MAX_SOCKETS, "MAX_UNCLAIMED": MAX_UNCLAIMED,
        "FAILED": int(args.failed), "EXISTING": int(args.existing), "MIN_NS": "%dull" % (args.min_ms * 1e6),
        "MORE": int(args.extra or args.json),
        "MAX_HOLDERS": MAX_SOCKETS if args.existing else 1,
        "WALKS": int(walks(args)),
    }, LOSSES, ROLES, ENDS)


def program(_args):
    return shared_text + bpf_text + probes_text


def attach(bpf, args):
    attach_state_changes(bpf)
    bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
    if args.owner == "accept":
        attach_accept(bpf, args)
    for name in WALK if walks(args) else ():
        bpf.load_func(name, bpf.RAW_TRACEPOINT)


def csv_text(name):
    """Returns a name as CSV: in quotes if it has a comma or a quote."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([name])
    return text.getvalue()


def header(args):
    if args.json or args.prometheus:
        return ""
    if args.count:
        return "Counting TCP sessions. Ctrl-C to end.\n" * os.isatty(1)
    before, between = [form % NAMES for form in args.columns]
    names = before, "LPORT", between, "RPORT", "TX_KB", "RX_KB", "MS"
    return args.row_format % (time_names(args) + names + EXTRA_NAMES * args.extra)


@functools.lru_cache(maxsize=1024)
def fate(role, end, err):
    """Returns role and end as text and as JSON members."""
    role = list(ROLES.values())[role]
    end = ERRORS.get(err) if err else list(ENDS.values())[end]
    err = errno.errorcode.get(err, str(err)) if err else None
    return (role or "N/A", end or err or "N/A",
            '"role":%s,"end":%s,"err":%s' % (json.dumps(role), json.dumps(end), json.dumps(err)))


def line(args, record, start, wall):
    """Returns one line. start: when tracing started, wall: offset of the kernel's clock from Unix time, both in ns."""
    (born, ready, owner, role, _, _, inode, tx_seen, rx_seen, died, tx, rx, laddr, raddr, lport, rport, netns, srtt,
     retrans, end, err, ooo, min_rtt, cwnd, lost, mss, _) = record
    before, between = columns(args.columns, csv_text if args.csv else str, owner, laddr, raddr, netns)
    ms = (died - born if born else max(0, died - start)) / 1e6
    if args.json:
        waited = "%.6f" % ((ready - born) / 1e6) if ready and born else "null"
        return JSON_ROW % ((died + wall) / 1e9, before, lport, between, rport, tx, rx, ms, netns, inode or "null",
                           fate(role, end, err)[2],
                           waited if role == CONNECT else "null", waited if role == ACCEPT else "null",
                           srtt >> 3 or "null", retrans, "false" if born else "true", ooo,
                           min_rtt if min_rtt != 0xffffffff else "null", cwnd, mss, lost,
                           ',"tx_bytes_seen":%d,"rx_bytes_seen":%d' % (tx_seen, rx_seen) if args.existing else "")
    lifespan = "%s%.2f%s" % ("" if born else ">", ms, "+" if end == OPEN else "")
    row = before, lport, between, rport, tx >> 10, rx >> 10, lifespan
    if args.extra:
        began, how, _ = fate(role, end, err)
        waited = "%.2f" % ((ready - born) / 1e6) if ready and born else "N/A"
        row += (began, waited if role == CONNECT else "N/A", "%.2f" % (srtt / 8e3) if srtt else "N/A", retrans, how,
                waited if role == ACCEPT else "N/A", ooo)
    if args.time or args.timestamp:
        row = times(args, died, start, wall) + row
    return args.row_format % row


def unaccepted(fds):
    """Returns the sessions that ended and that nobody has accepted, as records."""
    return [RECORD.unpack(bytes(8) + event) for event in map_values(fds["unclaimed"], RECORD.size - 8, MAX_UNCLAIMED)]


class Row:
    """Sums over sessions, ns: of their times. times and longest (in ns): of sessions, of connect() and of accept()."""

    __slots__ = "ends", "longest", "netns", "ns", "owner", "retrans", "rx", "times", "tx"

    def __init__(self, owner=b"", netns=0):
        self.owner, self.netns, self.tx, self.rx, self.retrans, self.ns = owner, netns, 0, 0, 0, 0
        self.ends, self.times, self.longest = collections.defaultdict(int), ({}, {}, {}), [0, 0, 0]

    def add_time(self, role, ns, step=STEP):
        """Counts a time in ns."""
        times, bucket = self.times[role], int(math.log(ns) / step) if ns > 0 else 0
        times[bucket] = times.get(bucket, 0) + 1
        if ns > self.longest[role]:
            self.longest[role] = ns

    def merge(self, row):
        """Adds the sums of another row."""
        self.tx, self.rx, self.retrans = self.tx + row.tx, self.rx + row.rx, self.retrans + row.retrans
        self.longest, self.ns = [*map(max, self.longest, row.longest)], self.ns + row.ns
        for mine, counts in zip((self.ends, *self.times), (row.ends, *row.times)):
            for key, n in counts.items():
                mine[key] = mine.get(key, 0) + n

    def sessions(self):
        """Returns how many sessions failed, ended and are open, and {END: how many}, the most frequent first."""
        ends = collections.Counter()
        for (end, err), n in self.ends.items():
            ends[fate(0, end, err)[1]] += n
        still_open = ends.pop("open", 0)
        ends = dict(sorted(ends.items(), key=lambda item: (-item[1], item[0])))
        return sum([n for end, n in ends.items() if end not in FINS]), sum(ends.values()), still_open, ends

    def ms(self, role, bucket):
        """Returns the middle of a bucket in ms, which is at most 2 % off; at most the longest time."""
        return min(math.exp((bucket + 0.5) * STEP), self.longest[role]) / 1e6

    def figures(self, role):
        """Returns P50, P99 (by nearest rank) and maximum in ms; () if there are no times."""
        buckets = sorted(self.times[role])
        if not buckets:
            return ()
        ranks = [*itertools.accumulate(map(self.times[role].get, buckets))]
        places = [bisect.bisect_left(ranks, ranks[-1] * percent / 100) for percent in (50, 99)]
        return (*[self.ms(role, buckets[place]) for place in places], self.longest[role] / 1e6)

    def histogram(self):
        """Returns lines in the form of bcc's tools: how many sessions lasted which power of two of ms."""
        counts = collections.Counter()
        for bucket, n in self.times[0].items():
            counts[(int(self.ms(0, bucket)) >> 1).bit_length()] += n
        return "     %-19s : count     distribution\n" % "msecs" + "".join([
            "%10d -> %-10d : %-8d |%-40s|\n" % (power and 1 << power, (2 << power) - 1, counts[power],
                                                "*" * (40 * counts[power] // max(counts.values())))
            for power in range(max(counts, default=-1) + 1)])


class Table:
    """What -c prints: a row per owner's name, role, remote address (not for --prometheus) and the server's port."""

    def __init__(self, args, start):
        self.args, self.by_peer, self.start, self.rows, self.others = args, args.by_peer, start, {}, Row()
        self.name = slice(24, 32) if args.unit else slice(4, 20)        # in struct owner: cgroup or comm
        self.step, self.series = math.log(10) if args.prometheus else STEP, 30          # those of others, and 6 more

    def add(self, record):
        """Counts a session, given as for line()."""
        (born, ready, owner, role, _, _, _, _, _, died, tx, rx, _, raddr, lport, rport, netns, _, retrans, end, err,
         *_) = record
        name = owner[self.name] if owner[:4] != bytes(4) else None
        if self.args.prometheus:        # addresses have no limit, and a cgroup that has gone has no name any more
            name, raddr = owner_text(owner)[1 + self.args.unit], None
        if role == ACCEPT:
            key = name, role, raddr if self.by_peer else None, lport
        else:
            key = name, role, raddr, rport if role == CONNECT else min(lport, rport)
        row = self.rows.get(key)
        has_room = row or len(self.rows) < MAX_ROWS
        if self.args.prometheus:        # a row has 12 series, and one for each end
            more = 12 * (not row) + (end != OPEN and (not row or (end, err) not in row.ends))
            has_room = self.series + more <= MAX_SERIES
            self.series += has_room and more
        if not has_room:
            row = self.others
        elif not row:
            row = self.rows[key] = Row(owner, netns)
        row.ends[end, err] += 1
        if end == OPEN:
            return
        row.tx += tx
        row.rx += rx
        row.retrans += retrans
        ns = max(0, died - (born or self.start))
        row.ns += ns
        row.add_time(0, ns, self.step)
        if ready and born and role:
            row.add_time(role, ready - born, self.step)

    def take(self):
        """Returns [((columns, JSON members), row)] in order, as many as fit, and starts again."""
        rows, others, limit = {}, self.others, MAX_ROWS + 1
        for (_, role, raddr, port), row in self.rows.items():
            _, comm, unit, members = owner_text(row.owner)
            json_comm, _, json_cgroup = members.partition(",")[2].rpartition(',"cgroup":')
            role, _, json_fate = fate(role, 0, 0)
            remote = address(raddr, row.netns) if raddr else None
            members = '"cgroup":' + json_cgroup if self.args.unit else json_comm, json_fate.partition(",")[0]
            members = '%s,%s,"raddr":%s,"port":%d' % (*members, json.dumps(remote), port)
            names = (unit if self.args.unit else comm, role, remote or "*", port), members
            rows.setdefault(names, Row()).merge(row)    # other bytes may be the same text
        self.rows, self.others = {}, Row()
        rows = sorted(rows.items(), key=lambda item: ([-n for n in item[1].sessions()[:2]], item[0]))
        if not self.args.json and (self.args.rows or os.isatty(1)):
            limit = self.args.rows or max(1, (os.get_terminal_size(1).lines or 24) - 2)
        if others.ends or len(rows) > limit:
            for _, row in rows[limit - 1:]:
                others.merge(row)
            rows[limit - 1:] = [(OTHERS, others)]
        return rows

    def text(self):
        """Returns the table, or what is printed in its place. Counting starts again."""
        args, now, lines = self.args, time.time(), []
        form = "%-16s %-7s %-39s " if args.wide else "%-12s %-7s %-15s " if args.unit else "%-10.10s %-7s %-15s "
        form += "%-5s %5s %4s %6s %6s %8s %8s" + " %8s %8s %4s %5s %s" * args.extra + "\n"
        if not args.json and not args.histogram:
            lines.append(form % (COUNT_NAMES[args.unit], *COUNT_NAMES[2:], *COUNT_EXTRA_NAMES * args.extra))
        for (columns, members), row in self.take():
            failed, n, still_open, ends = row.sessions()
            times = [row.figures(role) for role in range(3)]
            if args.json:
                lines.append(COUNT_JSON % (
                    now, members, n, json.dumps(ends, separators=(",", ":")), still_open, row.tx, row.rx, row.retrans,
                    *['{"p50":%.6f,"p99":%.6f,"max":%.6f}' % figures if figures else "null" for figures in times],
                    ',"others":true' if members == OTHERS[1] else ""))
            elif args.histogram:
                lines.append("\n%s\n%s" % (" ".join(map(str, columns)).rstrip(), row.histogram()))
            else:
                (p50, p99, _), (_, connect, _), (_, accept, _) = [
                    ["%.2f" % ms for ms in figures] or ["N/A"] * 3 for figures in times]
                worst = next((end for end in ends if end not in FINS), "-")
                extra = (connect, accept, row.retrans, still_open, worst) if args.extra else ()
                lines.append(form % (*columns, n, failed, row.tx >> 10, row.rx >> 10, p50, p99, *extra))
        return "".join(lines)

    def metrics(self, knows_open):
        """Returns the sums since the start for publish(), and what is open now."""
        sessions, sent, received, seconds, is_open = {}, {}, {}, {}, {}
        rows = {(name, fate(role, 0, 0)[0], port): row for (name, role, _, port), row in self.rows.items()}
        rows[OTHERS[0][:3]] = self.others
        for (name, role, port), row in rows.items():
            every = labels(**{"unit" if self.args.unit else "comm": name, "role": role, "port": port})
            _, n, _, ends = row.sessions()
            sessions.update({every[:-1] + ',end="%s"}' % end: count for end, count in ends.items()})
            sent[every], received[every], is_open[every] = row.tx, row.rx, row.ends.pop((OPEN, 0), 0)
            seconds.update({"_bucket" + every[:-1] + ',le="%s"}' % le: sum([
                count for bucket, count in row.times[0].items() if bucket < limit]) for le, limit in LIMITS.items()})
            seconds.update({"_sum" + every: row.ns / 1e9, "_count" + every: n})
        return [("sessions_total", "counter", "TCP sessions that ended.", sessions),
                ("sent_bytes_total", "counter", "Bytes of these sessions that the peer acknowledged.", sent),
                ("received_bytes_total", "counter", "Bytes of these sessions that were received.", received),
                ("duration_seconds", "histogram", "How long these sessions lasted.", seconds),
                ("open", "gauge", "TCP sessions that are open.", is_open if knows_open else {})]


def trace(args):
    """Prints sessions until a signal comes, the time is up or the reader of the output has gone."""
    fds = load(args)
    report, read, wait = open_losses(fds), open_events(fds, RECORD), open_wait(fds["events"])
    start = time.monotonic_ns()
    due = start / 1e9 + (0 if args.prometheus else args.interval or math.inf)   # the next list, table or file
    number = walks(args) and bool(args.count or args.interval or args.prometheus)   # of the next list of open sessions
    if args.prometheus:
        began = time.time()
        atexit.register(unpublish, args.prometheus)
    table = Table(args, start)
    if args.existing and learn_existing(fds, args) is None:
        number = 0
    write(header(args))
    stop = False
    while not stop:
        stop = wait(due - time.monotonic())
        data, is_due = b"", stop or time.monotonic() >= due
        if is_due and number:
            data = walk(fds, number, read)
            number = 0 if data is None else number % 0xffff + 1
        if is_due:
            due = max(due + (args.interval or 15), time.monotonic())      # 15 seconds: of --prometheus
        # At the end, what nobody has accepted. One that is accepted just now is in both, with the same from its end on.
        wants_all = not (args.pid or args.name or args.uid or args.cgroup)
        unclaimed = unaccepted(fds) if stop and wants_all else []
        records = RECORD.iter_unpack((data or b"") + read())
        if unclaimed:
            records = {record[9:]: record for record in (*unclaimed, *records)}.values()
        wall = time.time_ns() - time.monotonic_ns()     # every time, as the clock may have been set
        if args.count or args.prometheus:
            for record in records:
                table.add(record)
            if is_due and args.prometheus:
                publish(args.prometheus, table.metrics(number), began)
            elif is_due:
                stop = write(table.text()) or stop
        else:
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

/* ---- holders ---- */
BPF_HASH(holders, u32, struct owner, MAX_HOLDERS);      /* of sockets from before the start, by the file's inode */

static inline struct owner *holder_of(struct sock *sk)
{
    u32 inode = inode_of(sk);

    return holders.lookup(&inode);
}

/* ---- roles ---- */
#include <net/inet_hashtables.h>

/* Whether connect() chose the port, which it marks. A transparent proxy's connection may share it, see its backlog. */
static inline bool has_connected(struct sock *sk)
{
    struct inet_bind_bucket *bucket = READ((struct inet_connection_sock *)sk, icsk_bind_hash);

    return bucket && (signed char)READ(bucket, fastreuse) < 0 && !READ(sk, sk_max_ack_backlog);
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


# ---- maps ----
def map_values(fd, size, most):
    """Returns the values in a hash map whose keys are addresses, as bytes. size: of a value, most: values."""
    keys, values = [(ctypes.c_char * (n * most)).from_buffer(mmap.mmap(-1, n * most)) for n in (8, size)]
    attr = call_bpf(24, "=8xQQQII16x", bytes(8), keys, values, most, fd)            # BPF_MAP_LOOKUP_BATCH
    count, = struct.unpack_from("=I", attr, 32)
    return [values[n * size:(n + 1) * size] for n in range(count)]


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
