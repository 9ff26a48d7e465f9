#!/usr/bin/python3
#
# tcplife  Trace the lifespan of TCP sessions and summarize.
#          For Linux, uses bcc, eBPF.
#
# usage: tcplife [-h] [-T] [-t] [-w] [-s] [-p PID] [-L LOCALPORT] [-D REMOTEPORT] [-4 | -6] [--json] [--netns NETNS]
#                [--duration SECONDS] [--owner {accept,close}] [--probes {tracepoint,kprobe}]
#
# One line a finished session: the process that owns the socket, addresses, ports, bytes each way, milliseconds. Both
# ends are shown when both are on this machine, and so is a connect that failed.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), tcp:tcp_destroy_sock and accept().
# No packet is looked at. The owner of a session is the process that called connect() or accept(): many state changes
# run in softirq, in the context of whichever process was interrupted, and the current process means nothing there.
#
# CAVEATS: sessions that began before the tool are not shown. A kernel without kprobes shows accept() by the exit of the
# system call, which does not cover io_uring and 32-bit programs: there the process that closes is taken as the owner.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":      # taken by stop_asked() only: nothing is interrupted half done, imports neither
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import csv
import ctypes
import fcntl
import functools
import io
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
  ./tcplife              # trace all TCP sessions
  ./tcplife -T           # include time column (HH:MM:SS)
  ./tcplife -w           # wider columns (fit IPv6)
  ./tcplife -stT         # csv output, with times & timestamps
  ./tcplife -p 181       # only trace PID 181
  ./tcplife -L 80        # only trace local port 80
  ./tcplife -L 80,81     # only trace local ports 80 and 81
  ./tcplife -D 80        # only trace remote port 80
  ./tcplife -6 --json    # IPv6 only, one JSON object a line
  ./tcplife --netns web  # only trace the network namespace web
"""

KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "files_struct", "fdtable", "file", "socket", "mptcp_sock"]
MAX_SESSIONS = 1 << 18          # live sockets; 23 MB of kernel memory
MAX_UNCLAIMED = 1 << 14         # sessions that ended before accept() returned them
RING_PAGES = 1024               # 4 MiB: 40,000 sessions, more than half a second of the fastest load measured
PERF_PAGES = 256                # a CPU, where there is no ring buffer
INTERVAL = 0.1                  # seconds between two looks at the ring buffer
BATCH = 1000                    # records that are printed between two looks at it, if there are more
MAX_PENDING = 1 << 26           # bytes that have been read and wait to be printed
V4MAPPED = bytes(10) + b"\xff\xff"

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/net.h>
#include <linux/tcp.h>
#include <net/net_namespace.h>
#include <net/sock.h>

struct session {
    u64 born;
    u32 pid;                    /* 0: nobody has accepted it yet */
    char comm[TASK_COMM_LEN];
};

struct event {
    u64 born, died;             /* bpf_ktime_get_ns() */
    u64 tx, rx;
    u32 pid, netns;
    u32 laddr[4], raddr[4];     /* IPv4 as ::ffff:a.b.c.d */
    u16 lport, rport;
    u32 pad;
    char comm[TASK_COMM_LEN];
};

enum { LOST_EVENT, LOST_SESSION, LOST_END, NOT_LOST, LOST_COUNTERS };

BPF_HASH(sessions, struct sock *, struct session, MAX_SESSIONS);
BPF_HASH(unclaimed, struct sock *, struct event, MAX_UNCLAIMED);  /* finished before anybody accepted them */
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
    bpf_probe_read_kernel(&e->lport, sizeof(e->lport), &((struct inet_sock *)sk)->inet_sport);
    e->lport = ntohs(e->lport);
    e->rport = ntohs(c.skc_dport);
}

/* An active socket has no local port yet when it is born: that one is looked at again in the end. */
static inline bool is_wanted(struct event *e, struct sock *sk)
{
    bool ipv4 = !e->raddr[0] && !e->raddr[1] && e->raddr[2] == htonl(0xffff);

    return (!FILTER_IPV4 || ipv4) && (!FILTER_IPV6 || !ipv4) && IS_WANTED_RPORT(e->rport) &&
           (!e->lport || IS_WANTED_LPORT(e->lport)) && (!FILTER_NETNS || netns_of(sk) == FILTER_NETNS);
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

static inline void emit(void *ctx, struct event *e)
{
    if (FILTER_PID && e->pid != FILTER_PID)
        return;
#ifdef RING_PAGES
    /* Nobody is woken: the reader comes by itself. */
    if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
        count_lost(LOST_EVENT);
#else
    if (events.perf_submit(ctx, e, sizeof(*e)))
        count_lost(LOST_EVENT);
#endif
}

/* Only where the current process is known to be the one that uses the socket. */
static inline void own(struct session *s)
{
    bpf_get_current_comm(&s->comm, sizeof(s->comm));
    s->pid = bpf_get_current_pid_tgid() >> 32;
}

static inline void birth(struct sock *sk, bool active)
{
    struct session s = {.born = bpf_ktime_get_ns()};
    int err;

    if (protocol_of(sk) != IPPROTO_TCP)
        return;
    if (FILTERS) {
        struct event e = {};

        read_endpoints(&e, sk);
        if (!is_wanted(&e, sk))
            return;
    }
    if (active)
        own(&s);
    err = sessions.insert(&sk, &s);
    if (err && err != -EEXIST)  /* exists: both ends called connect(), or accept() saw it first (TCP Fast Open) */
        count_lost(LOST_SESSION);
}

/* A socket that only now begins: what is known of it belongs to one whose end was not seen. */
static inline void forget(struct sock *sk)
{
    /* lookup() takes no lock, delete() does */
    if (sessions.lookup(&sk) && !sessions.delete(&sk))
        count_lost(LOST_END);
    if (unclaimed.lookup(&sk) && !unclaimed.delete(&sk))
        count_lost(LOST_END);
}

/* FIN_WAIT1 and LAST_ACK are entered in close(), shutdown() and exit only, so by the owner. */
static inline void closing(struct sock *sk)
{
    struct session *s = sessions.lookup(&sk);

    if (s && !s->pid)
        own(s);
}

static inline void death(void *ctx, struct sock *sk)
{
    struct session *s = sessions.lookup(&sk);
    struct event e = {};

    if (!s)
        return;
    e.born = s->born;
    e.died = bpf_ktime_get_ns();
    e.pid = s->pid;
    __builtin_memcpy(e.comm, s->comm, sizeof(e.comm));
    sessions.delete(&sk);
    read_endpoints(&e, sk);
    if (FILTERS && !is_wanted(&e, sk))
        return;
    e.netns = netns_of(sk);
    bpf_probe_read_kernel(&e.tx, sizeof(e.tx), &((struct tcp_sock *)sk)->bytes_acked);
    bpf_probe_read_kernel(&e.rx, sizeof(e.rx), &((struct tcp_sock *)sk)->bytes_received);
    if (e.pid)
        emit(ctx, &e);
    else if (unclaimed.update(&sk, &e))
        count_lost(LOST_SESSION);
}

/* A session that the peer ended before accept() returned it is printed once somebody shows that it is his. */
static inline void claim(void *ctx, struct sock *sk)
{
    struct event *held = unclaimed.lookup(&sk), e;
    struct session s;

    if (!held)
        return;
    e = *held;
    if (unclaimed.delete(&sk))  /* somebody else was faster */
        return;
    own(&s);
    e.pid = s.pid;
    __builtin_memcpy(e.comm, s.comm, sizeof(e.comm));
    emit(ctx, &e);
}

static inline void accepted(void *ctx, struct sock *sk)
{
    struct session *s;
    u8 state = 0;

#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the session is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        bpf_probe_read_kernel(&sk, sizeof(sk), &((struct mptcp_sock *)sk)->first);
#endif
    s = sessions.lookup(&sk);
    if (!s) {
        /* TCP Fast Open: accept() returns a socket that is not ESTABLISHED yet. */
        bpf_probe_read_kernel(&state, sizeof(state), (void *)&sk->__sk_common.skc_state);
        if (state == TCP_SYN_RECV)
            birth(sk, true);
        else
            claim(ctx, sk);
    } else if (!s->pid) {
        own(s);
    }
}

static inline void state_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
    if (oldstate == TCP_CLOSE || oldstate == TCP_LISTEN)
        forget(sk);
    if (newstate == TCP_SYN_SENT)
        birth(sk, true);
    else if (newstate == TCP_ESTABLISHED && oldstate == TCP_SYN_RECV)
        birth(sk, false);
    else if (newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK)
        closing(sk);
    else if (newstate == TCP_CLOSE)
        death(ctx, sk);
}

#ifdef KPROBE_STATE
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
    u8 oldstate = 0;

    bpf_probe_read_kernel(&oldstate, sizeof(oldstate), (void *)&sk->__sk_common.skc_state);
    state_change(ctx, sk, oldstate, state);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk)
{
    claim(ctx, sk);
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

/* A socket in CLOSE is destroyed in close(), and one that still waits for accept() in the listener's close(). */
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx)
{
    claim(ctx, (struct sock *)ctx->args[0]);
    return 0;
}
#endif

#ifdef KPROBE_ACCEPT
/* Called in accept() with the new socket, by io_uring too. Not a return probe: those run out when many threads wait. */
int kprobe_accept(struct pt_regs *ctx, struct sock *sk)
{
    accepted(ctx, sk);
    return 0;
}

int kretprobe_accept(struct pt_regs *ctx)
{
    struct sock *sk = (struct sock *)PT_REGS_RC(ctx);

    if (sk)
        accepted(ctx, sk);
    return 0;
}
#else
struct syscall_exit {
    u64 common;
    long nr, ret;
};

static inline void accept_returned(void *ctx, long fd)
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
        accepted(ctx, sk);
}

int tracepoint_accept_first(struct syscall_exit *ctx)
{
    first_sees(bpf_get_current_pid_tgid());
    accept_returned(ctx, ctx->ret);
    return 0;
}

int tracepoint_accept_second(struct syscall_exit *ctx)
{
    if (!first_has_seen(bpf_get_current_pid_tgid()))
        accept_returned(ctx, ctx->ret);
    return 0;
}
#endif
"""

PROGRAM = "tcplife"

# One record of the ring: the kernel's 8-byte header (length and flags, page offset), then struct event.
RECORD = struct.Struct("=IIQQQQII16s16sHHI16s")


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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trace the lifespan of TCP sessions and summarize",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    family, form = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    parser.add_argument("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    parser.add_argument("-t", "--timestamp", action="store_true", help="include timestamp on output (seconds)")
    form.add_argument("-w", "--wide", action="store_true", help="wide column output (fits IPv6 addresses)")
    form.add_argument("-s", "--csv", action="store_true", help="comma separated values output")
    parser.add_argument("-p", "--pid", type=pid, help="trace this PID only")
    parser.add_argument("-L", "--localport", type=ports, help="comma-separated list of local ports to trace.")
    parser.add_argument("-D", "--remoteport", type=ports, help="comma-separated list of remote ports to trace.")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    form.add_argument("--json", action="store_true", help="one JSON object a line: exact bytes and times")
    parser.add_argument("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    parser.add_argument("--duration", metavar="SECONDS", type=seconds, help="end after this time")
    parser.add_argument("--owner", choices=("accept", "close"), default="accept",
                        help="who owns a session that came in: the process that accepted it (default), or the one "
                             "that closed it, which spares the probe on accept()")
    parser.add_argument("--probes", choices=("tracepoint", "kprobe"),
                        help="use this kind of probe where there is a choice (default: tracepoints, and "
                             "kprobes for what has none)")
    return parser.parse_args(argv)


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
    return sides


def any_of(numbers):
    """C expression that is true for a port among these, for all ports if there are none."""
    return " || ".join("(port) == %d" % n for n in numbers) if numbers else "true"


def cflags(args):
    """The arguments as macros of the C text; only numbers get there."""
    macros = {
        "MAX_SESSIONS": MAX_SESSIONS,
        "MAX_UNCLAIMED": MAX_UNCLAIMED,
        "FILTERS": int(bool(args.ipv4 or args.ipv6 or args.netns or args.localport or args.remoteport)),
        "FILTER_PID": args.pid or 0,
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IPV4": int(args.ipv4),
        "FILTER_IPV6": int(args.ipv6),
        "IS_WANTED_LPORT(port)": any_of(args.localport),
        "IS_WANTED_RPORT(port)": any_of(args.remoteport),
    }
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
    if "KPROBE_STATE" in sides:
        bpf.attach_kprobe(event="tcp_set_state", fn_name="kprobe_set_state")
        bpf.attach_kprobe(event="tcp_v4_destroy_sock", fn_name="kprobe_destroy")
    else:
        attach_set_state(bpf)
        bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
    if args.owner == "close":
        return
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

def open_ring(bpf):
    """A function that returns what the ring holds, as bytes of whole records.

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
        for n, length in enumerate(records.cast("I")[::RECORD.size // 4]):
            if length != RECORD.size - 8:       # another CPU is still writing this one
                records = records[:n * RECORD.size]
                break
        taken = bytes(records)
        position.value += len(taken)        # from now on the kernel may write there
        return taken
    return read


def open_perf(bpf):
    """The same from a perf buffer, for kernels before 5.8."""
    records, header = [], bytes(8)

    def on_event(_cpu, data, _size):
        records.append(header + ctypes.string_at(data, RECORD.size - 8))

    # What does not fit is counted by the probe, whose perf_submit() fails.
    bpf["events"].open_perf_buffer(on_event, page_cnt=PERF_PAGES, lost_cb=lambda count: None)

    def read():
        records.clear()
        bpf.perf_buffer_poll(0)
        return b"".join(records)
    return read


def unclaimed(bpf):
    """Sessions that are over but that nobody has accepted so far: their owner is not known."""
    return sorted((RECORD.unpack(bytes(8) + bytes(event)) for event in bpf["unclaimed"].values()),
                  key=lambda record: record[3])


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
    return {"sessions lost: the ring buffer was full": lost[0],
            "sessions lost: the map of live sessions was full": lost[1],
            "sessions lost: their end was not seen": lost[2],
            "state changes or accepts lost: the kernel did not run the probe": missed - lost[3]}


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


def column_names(args):
    names = ["PID", "COMM", "LADDR", "LPORT", "RADDR", "RPORT", "TX_KB", "RX_KB", "MS"]
    if args.wide or args.csv:
        names.insert(2, "IP")
    return ["TIME"] * args.time + ["TIME(s)"] * args.timestamp + names


def columns(args, record, began, wall):
    """The values for column_names(). began: when tracing began, wall: what makes Unix time of the kernel's, both ns."""
    _, _, born, died, tx, rx, pid, _, laddr, raddr, lport, rport, _, comm = record
    laddr, raddr = address(laddr), address(raddr)
    row = pid, printable(comm), laddr, lport, raddr, rport, tx >> 10, rx >> 10, "%.2f" % ((died - born) / 1e6)
    if args.wide or args.csv:
        row = row[:2] + (6 if ":" in raddr else 4,) + row[2:]
    if args.timestamp:
        row = ("%.3f" % (max(0, died - began) / 1e9),) + row
    if args.time:
        row = (clock((died + wall) // 10 ** 9),) + row
    return row


def json_object(record, wall):
    _, _, born, died, tx, rx, pid, netns, laddr, raddr, lport, rport, _, comm = record
    laddr, raddr = address(laddr), address(raddr)
    return {"ts": (died + wall) / 1e9, "pid": pid or None,
            "comm": comm.partition(b"\0")[0].decode(errors="surrogateescape") if pid else None,
            "ip": 6 if ":" in raddr else 4, "laddr": laddr, "lport": lport, "raddr": raddr, "rport": rport,
            "tx_bytes": tx, "rx_bytes": rx, "ms": (died - born) / 1e6, "netns": netns}


def form_of(args):
    """The format of a line of text."""
    if args.wide:
        form = "%-7s %-16s %-2s %-39s %-5s %-39s %-5s %5s %5s %s\n"
    else:
        form = "%-5s %-10.10s %-15s %-5s %-15s %-5s %5s %5s %s\n"
    return args.time * "%-8s " + args.timestamp * "%-9s " + form


def render(args, records, began):
    """Whole lines for these records."""
    wall = time.time_ns() - time.monotonic_ns()     # each time anew: the clock may be set meanwhile
    if args.json:
        return "".join([json.dumps(json_object(record, wall)) + "\n" for record in records])
    rows = [columns(args, record, began, wall) for record in records]
    if args.csv:
        return csv_lines(rows)
    form = form_of(args)
    return "".join([form % row for row in rows])


def csv_lines(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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
    """Print sessions until a signal comes, the time is over or nobody reads any more."""
    read = open_ring(bpf) if has_ring_buffer() else open_perf(bpf)
    began, told = time.monotonic_ns(), {}
    end = began + args.duration * 1e9 if args.duration else math.inf
    if args.csv:
        write(csv_lines([column_names(args)]))
    elif not args.json:
        write(form_of(args) % tuple(column_names(args)))
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
        records = list(RECORD.iter_unpack(pending[:BATCH * RECORD.size]))
        del pending[:len(records) * RECORD.size]
        if stop and not pending:
            records += unclaimed(bpf)
        if records:
            write(render(args, records, began))
            told = report(losses(bpf), told)
    report(losses(bpf), told)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    args = parse_args()
    if sys.stdout is None or sys.stderr is None:        # their numbers would be given to a map
        die("standard output or standard error is closed")
    bpf = load(args)
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
