#!/usr/bin/python3
#
# tcpchurn  Count the TCP accepts, opens and closes of a process over sliding time windows.
#           For Linux, uses bcc, eBPF.
#
# usage: tcpchurn [-h] [-c] [-p] [-w SECONDS [SECONDS ...]] [-i SECONDS] [-a] [--json] [--netns NETNS]
#                 [--duration SECONDS] [--probes {tracepoint,kprobe}] PID
#
# O counts connections that the process opened: accept() calls that returned one, and connect() attempts. C counts those
# that ended on this side: the process sent its FIN (close, shutdown, exit), or the connection was torn down (reset,
# timeout, abort), each once. So O - C under ALL is by how much the open connections have grown since the start.
#
# Traces the sock:inet_sock_set_state tracepoint (tcp_set_state() before Linux 4.17), tcp:tcp_destroy_sock, accept() and
# the exit of the process. The kernel side counts in buckets of time; no event comes to user space, at any rate.
#
# CAVEATS: a window is exact to one bucket: 0.1 s, or a tenth of the smallest window if that is less. A connection that
# the process hands to another stays its own.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":      # taken by stop_asked() only: nothing is interrupted half done, imports neither
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import array
import contextlib
import ctypes
import fcntl
import ipaddress
import json
import math
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time

examples = """examples:
    ./tcpchurn 30800                # accepts and opens, and closes, of PID 30800
    ./tcpchurn -a 30800             # accepts and opens apart
    ./tcpchurn -c 30800             # clear the screen before each update
    ./tcpchurn -p 30800             # leave connections with private addresses out
    ./tcpchurn 30800 -w 1 5 10 -i 5 # other windows, an update every 5 seconds
    ./tcpchurn -w 1,5,10 30800      # the same windows
    ./tcpchurn --json 30800         # one JSON object an update
"""

KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "signal_struct", "files_struct", "fdtable", "file", "socket",
                "mptcp_sock"]
WINDOWS = [1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0, 500.0, 1200.0]     # seconds
BUCKET = 0.1                    # seconds, at most
MAX_BUCKETS = 1 << 19           # 14 hours of 0.1 s
MAX_SOCKETS = 1 << 18           # live connections of the process
INTERVAL = 0.1                  # seconds between two looks at the process
PRIVATE = ["0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
           "::/127", "fc00::/7", "fe80::/10"]

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/net.h>
#include <linux/sched/signal.h>
#include <linux/tcp.h>
#include <net/net_namespace.h>
#include <net/sock.h>

enum { ACCEPTED, CONNECTED, CLOSED, COUNTERS };
enum { LOST_SOCKET, LOST_BUCKET, NOT_LOST, LOST_COUNTERS };

struct bucket {
    u64 count[COUNTERS];
};

BPF_ARRAY(total, u64, COUNTERS);
BPF_HASH(buckets, u64, struct bucket, BUCKETS);         /* by bpf_ktime_get_ns() / BUCKET_NS */
BPF_HASH(owned, struct sock *, u8, MAX_SOCKETS);        /* opened by the process since the start, and open */
BPF_HASH(existing, u64, u8, MAX_SOCKETS);               /* open before the start, by cookie */
BPF_ARRAY(ended, u8, 1);                                /* whether the process has */
BPF_ARRAY(lost, u64, LOST_COUNTERS);
/*
 * The kernel lets no program interrupt itself (since 6.1): while one runs, it is skipped for what a softirq does, and
 * (in 7.2) for what a process does that has taken the CPU meanwhile. So two stand at a tracepoint, and the second
 * takes what the first has not seen. They cannot share a third by a tail call: since 6.13 that would have one stack a
 * CPU, and they do interrupt each other.
 */
#define SEEN_BITS 10
BPF_PERCPU_ARRAY(seen, u64, 1 << SEEN_BITS);    /* what is between the two, by its hash */

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

static inline void count(int what)
{
    u64 now = bpf_ktime_get_ns() / BUCKET_NS, old = now - KEPT_BUCKETS;
    struct bucket empty = {}, *b = buckets.lookup(&now);
    u64 *n = total.lookup(&what);

    if (n)
        __sync_fetch_and_add(n, 1);
    if (!b) {
        buckets.delete(&old);
        buckets.insert(&now, &empty);           /* or another CPU has */
        b = buckets.lookup(&now);
    }
    if (b && what >= 0 && what < COUNTERS)
        __sync_fetch_and_add(&b->count[what], 1);
    else
        count_lost(LOST_BUCKET);
}

static inline bool is_of_process(void)
{
    int zero = 0;
    u8 *has_ended = ended.lookup(&zero);

    return bpf_get_current_pid_tgid() >> 32 == FILTER_PID && has_ended && !*has_ended;
}

/* Whether the other end is one to be counted. */
static inline bool is_wanted(struct sock *sk)
{
    struct sock_common c;
    u32 a[4] = {0, 0, htonl(0xffff), 0};

    if (FILTER_NETNS && netns_of(sk) != FILTER_NETNS)
        return false;
    if (!IGNORE_PRIVATE)
        return true;
    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    if (c.skc_family == AF_INET)
        a[3] = c.skc_daddr;
    else
        __builtin_memcpy(a, &c.skc_v6_daddr, sizeof(a));
    a[0] = ntohl(a[0]);
    a[1] = ntohl(a[1]);
    a[2] = ntohl(a[2]);
    a[3] = ntohl(a[3]);
    return !(IS_PRIVATE);
}

static inline bool has_ended_state(u8 state)
{
    return state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT && state != TCP_SYN_SENT && state != TCP_SYN_RECV;
}

static inline void closed(struct sock *sk)
{
    u64 cookie = 0;

    if (owned.lookup(&sk)) {
        if (!owned.delete(&sk))
            count(CLOSED);
        return;
    }
    /* sock_diag has given a cookie to every socket that user space has asked for at the start. */
    bpf_probe_read_kernel(&cookie, sizeof(cookie), &sk->__sk_common.skc_cookie);
    if (cookie && existing.lookup(&cookie) && !existing.delete(&cookie))
        count(CLOSED);
}

static inline void opened(struct sock *sk, int how)
{
    u8 one = 1, state = 0;
    int err;

    if (!is_of_process() || protocol_of(sk) != IPPROTO_TCP || !is_wanted(sk))
        return;
    err = owned.insert(&sk, &one);
    if (err == -EEXIST)         /* another thread has put this socket behind the descriptor, and it is counted */
        return;
    if (err)
        count_lost(LOST_SOCKET);
    count(how);
    if (how == ACCEPTED) {
        /* The peer may have reset it before. */
        bpf_probe_read_kernel(&state, sizeof(state), (void *)&sk->__sk_common.skc_state);
        if (has_ended_state(state))
            closed(sk);
    }
}

static inline void accepted(struct sock *sk)
{
#ifdef BTF_HAS_mptcp_sock
    /* accept() returns MPTCP's own socket; the connection is its first subflow. */
    if (protocol_of(sk) == IPPROTO_MPTCP)
        bpf_probe_read_kernel(&sk, sizeof(sk), &((struct mptcp_sock *)sk)->first);
#endif
    opened(sk, ACCEPTED);
}

static inline void state_change(struct sock *sk, int oldstate, int newstate)
{
    /* A socket that only now begins: if it is known, the end of the one before was not seen. */
    if ((oldstate == TCP_CLOSE || oldstate == TCP_LISTEN || has_ended_state(newstate)) && newstate != TCP_LISTEN)
        closed(sk);
    if (newstate == TCP_SYN_SENT)
        opened(sk, CONNECTED);
}

#ifdef KPROBE_STATE
int kprobe_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
    u8 oldstate = 0;

    bpf_probe_read_kernel(&oldstate, sizeof(oldstate), (void *)&sk->__sk_common.skc_state);
    state_change(sk, oldstate, state);
    return 0;
}

int kprobe_destroy(struct pt_regs *ctx, struct sock *sk)
{
    closed(sk);
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
    state_change((struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

int tracepoint_set_state_second(struct bpf_raw_tracepoint_args *ctx)
{
    if (!first_has_seen(change_of(ctx)))
        state_change((struct sock *)ctx->args[0], ctx->args[1], ctx->args[2]);
    return 0;
}

/* For what was accepted while its last state change was under way on another CPU. */
int tracepoint_destroy(struct bpf_raw_tracepoint_args *ctx)
{
    closed((struct sock *)ctx->args[0]);
    return 0;
}
#endif

/* What comes later with this PID is another process. */
static inline void exited(void)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct signal_struct *signal = NULL;
    int zero = 0, live = 0;
    u8 one = 1;

    if (bpf_get_current_pid_tgid() >> 32 != FILTER_PID)
        return;
    /* not &task->signal: LLVM 11 gets that wrong by 16 bytes */
    bpf_probe_read_kernel(&signal, sizeof(signal), (void *)task + __builtin_offsetof(struct task_struct, signal));
    bpf_probe_read_kernel(&live, sizeof(live), &signal->live);
    if (!live)
        ended.update(&zero, &one);
}

#ifdef KPROBE_STATE
int kprobe_exit(struct pt_regs *ctx)
{
    exited();
    return 0;
}
#else
int tracepoint_exit(struct bpf_raw_tracepoint_args *ctx)
{
    exited();
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

PROGRAM = "tcpchurn"


# arguments

def pid(text):
    if not re.fullmatch("[0-9]{1,7}", text, re.ASCII) or not 0 < int(text) <= 1 << 22:
        raise argparse.ArgumentTypeError("not a process ID: %r" % text)
    return int(text)


def seconds(text):
    if not re.fullmatch("([0-9]{1,9}[.]?|[0-9]{0,9}[.][0-9]{1,9})", text, re.ASCII) or float(text) == 0:
        raise argparse.ArgumentTypeError("not a number of seconds: %r" % text)
    return float(text)


def some_seconds(text):
    """Numbers of seconds, as a list: the windows may come with commas, with spaces or with both."""
    return [seconds(part) for part in text.split(",")]


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
        prog=PROGRAM, description="Count the TCP accepts, opens and closes of a process over sliding time windows",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    form = parser.add_mutually_exclusive_group()
    parser.add_argument("pid", metavar="PID", nargs="?", help="the process")
    form.add_argument("-c", "--clear", action="store_true", help="clear the screen before each update")
    parser.add_argument("-p", "--ignore-private", action="store_true",
                        help="leave out connections with private addresses")
    parser.add_argument("-w", "--windows", metavar="SECONDS", nargs="+",
                        help="time windows, in seconds (default: %s)" % ",".join("%g" % w for w in WINDOWS))
    parser.add_argument("-i", "--interval", metavar="SECONDS", type=seconds, default=1.0,
                        help="time between two updates (default: 1)")
    parser.add_argument("-a", "--accepts", action="store_true", help="count accepts (A) and opens (O) apart")
    form.add_argument("--json", action="store_true", help="one JSON object an update")
    parser.add_argument("--netns", type=netns, help="count in this network namespace only: inode number, path or name")
    parser.add_argument("--duration", metavar="SECONDS", type=seconds, help="end after this time")
    parser.add_argument("--probes", choices=("tracepoint", "kprobe"),
                        help="use this kind of probe where there is a choice (default: tracepoints, and "
                             "kprobes for what has none)")
    args = parser.parse_args(argv)
    # "-w 1 5 10 PID": the last of them is the process
    if args.pid is None and args.windows and len(args.windows) > 1:
        args.pid = args.windows.pop()
    try:
        if args.pid is None:
            raise argparse.ArgumentTypeError("the PID is missing")
        args.pid = pid(args.pid)
        windows = [window for text in args.windows for window in some_seconds(text)] if args.windows else WINDOWS
        args.windows = sorted(set(windows), reverse=True)
        if buckets(args) > MAX_BUCKETS:
            raise argparse.ArgumentTypeError("the windows are too long, or too far apart")
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args


def bucket_ns(args):
    """Nanoseconds a bucket: BUCKET, or a tenth of the smallest window; a millisecond at least."""
    return max(10 ** 6, int(min(BUCKET, args.windows[-1] / 10) * 1e9))


def buckets(args):
    """How many buckets the largest window needs: those that are full, the one that fills, and one that is just over."""
    return math.ceil(args.windows[0] * 1e9 / bucket_ns(args)) + 2


# loading

def die(message):
    sys.exit("%s: %s" % (PROGRAM, message))


def kernel_version():
    return tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])


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


def private_ranges():
    """C expression that is true for an address in PRIVATE: a[4], IPv4 as ::ffff:a.b.c.d, words in host order."""
    ranges = []
    for name in PRIVATE:
        network = ipaddress.ip_network(name)
        if network.version == 4:
            network = ipaddress.ip_network("::ffff:%s/%d" % (network.network_address, 96 + network.prefixlen))
        words = zip(struct.unpack(">4I", network.network_address.packed), struct.unpack(">4I", network.netmask.packed))
        ranges.append(" && ".join("(a[%d] & %du) == %du" % (n, mask, value)
                                  for n, (value, mask) in enumerate(words) if mask))
    return " || ".join("(%s)" % one for one in ranges)


def cflags(args):
    """The arguments as macros of the C text; only numbers get there."""
    macros = {
        "MAX_SOCKETS": MAX_SOCKETS,
        "BUCKETS": buckets(args) + 1024,
        "KEPT_BUCKETS": buckets(args),
        "BUCKET_NS": "%dull" % bucket_ns(args),
        "FILTER_PID": args.pid,
        "FILTER_NETNS": args.netns or 0,
        "IGNORE_PRIVATE": int(args.ignore_private),
        "IS_PRIVATE": private_ranges(),
    }
    macros.update((side, 1) for side in kprobe_sides(args))
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
        with contextlib.suppress(Exception):    # a kernel without CONFIG_TASKSTATS: the look at /proc has to do
            bpf.attach_kprobe(event="taskstats_exit", fn_name="kprobe_exit")
    else:
        attach_set_state(bpf)
        bpf.attach_raw_tracepoint(tp="tcp_destroy_sock", fn_name="tracepoint_destroy")
        bpf.attach_raw_tracepoint(tp="sched_process_exit", fn_name="tracepoint_exit")
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


# the process

def birth_of(pid):
    """When the process began, in clock ticks; None if there is none, or only its corpse."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def socket_inodes(pid):
    """Inode numbers of the sockets that the process holds."""
    inodes = set()
    with contextlib.suppress(OSError):
        for fd in os.scandir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                target = os.readlink(fd.path)
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
    return inodes


def diag_socket(pid):
    """A sock_diag socket in the network namespace of the process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as ours, open("/proc/%d/ns/net" % pid) as theirs:
        if libc.setns(theirs.fileno(), 0) and os.fstat(ours.fileno()).st_ino != os.fstat(theirs.fileno()).st_ino:
            raise OSError(ctypes.get_errno(), "setns")
        try:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)         # NETLINK_SOCK_DIAG
        finally:
            libc.setns(ours.fileno(), 0)


def existing_sockets(pid):
    """(cookie, remote address) of each TCP connection that the process holds and has not ended. Raises OSError.

    By sock_diag(7): inet_diag_req_v2 and inet_diag_msg of include/uapi/linux/inet_diag.h.
    """
    failed, last, by_family, dump = 2, 3, 20, 0x301     # NLMSG_ERROR, NLMSG_DONE, SOCK_DIAG_BY_FAMILY, NLM_F_*
    inodes = socket_inodes(pid)
    states = sum(1 << state for state in (1, 2, 3, 8))          # ESTABLISHED, SYN_SENT, SYN_RECV, CLOSE_WAIT
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with diag_socket(pid) as diag:
            request = struct.pack("=BBBBI48s", family, socket.IPPROTO_TCP, 0, 0, states, b"")
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
                        remote, cookie, inode = struct.unpack_from("=24x16s4xQ16xI", answer, 16)[:3]
                        if inode in inodes:
                            found.append((cookie, ipaddress.ip_address(remote[:4 if family == socket.AF_INET else 16])))
                    answer = answer[length + 3 & ~3:]
    return found


def is_private(address):
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in ipaddress.ip_network(network) for network in PRIVATE)


def learn_existing(args, bpf):
    """Tell the kernel side which connections the process has already."""
    if args.netns and args.netns != os.stat("/proc/%d/ns/net" % args.pid).st_ino:
        return
    table = bpf["existing"]
    for cookie, remote in existing_sockets(args.pid):
        if not (args.ignore_private and is_private(remote)):
            table[table.Key(cookie)] = table.Leaf(1)


# counting

class Windows:
    """Sums over sliding windows, from the buckets of the kernel side."""

    def __init__(self, args, bpf):
        self.bpf, self.width = bpf, bucket_ns(args)
        self.spans = [math.ceil(window * 1e9 / self.width) for window in args.windows]
        self.size = buckets(args)
        # What had been counted by the end of each bucket, one ring for each counter.
        self.sums = [array.array("Q", bytes(8 * self.size)) for _ in range(3)]
        self.last = time.monotonic_ns() // self.width

    def read(self):
        """For each of accepted, connected, closed: a list of the windows' counts, and the count of all."""
        now, table = time.monotonic_ns() // self.width, self.bpf["buckets"]
        # The two that were the newest the last time may have grown since.
        for bucket in range(max(self.last - 1, now - self.size + 2), now + 1):
            try:
                counts = table[table.Key(bucket)].count
            except KeyError:
                counts = 0, 0, 0
            with contextlib.suppress(KeyError):
                del table[table.Key(bucket - self.size)]
            for ring, count in zip(self.sums, counts):
                ring[bucket % self.size] = ring[(bucket - 1) % self.size] + count
        self.last = now
        windows = [[ring[now % self.size] - ring[(now - span - 1) % self.size] for span in self.spans]
                   for ring in self.sums]
        return windows, [self.bpf["total"][n].value for n in range(3)]


def losses(bpf):
    """How often each kind of loss has happened since the start, as {what: count}."""
    missed = 0
    for name, function in bpf.funcs.items():
        if name.endswith(b"_second") or name == b"tracepoint_destroy":
            continue        # what only these were skipped for is not lost
        with open("/proc/self/fdinfo/%d" % function.fd) as info:        # the line exists since Linux 5.12
            missed += sum(int(n) for n in re.findall("recursion_misses:\\s*([0-9]+)", info.read()))
    return {"closes lost: the map of live connections was full": bpf["lost"][0].value,
            "counts missing in the windows: the map of buckets was full": bpf["lost"][1].value,
            "state changes or accepts lost: the kernel did not run the probe": missed - bpf["lost"][2].value}


# output

def heading(window):
    return "%8.1f" % window if round(window, 1) == window else "%8g" % window


def render(args, windows, totals):
    """Whole lines for one update; windows and totals as Windows.read() gives them."""
    (accepted, connected, closed), (all_accepted, all_connected, all_closed) = windows, totals
    opened, all_opened = [a + c for a, c in zip(accepted, connected)], all_accepted + all_connected
    if args.json:
        return json.dumps({
            "ts": time.time(), "pid": args.pid, "windows": args.windows, "opened": opened, "accepted": accepted,
            "connected": connected, "closed": closed,
            "all": {"opened": all_opened, "accepted": all_accepted, "connected": all_connected, "closed": all_closed},
        }) + "\n"
    rows = [("O", opened, all_opened), ("C", closed, all_closed)]
    if args.accepts:
        rows[:1] = [("A", accepted, all_accepted), ("O", connected, all_connected)]
    lines = [" " + "".join(map(heading, args.windows)) + "%7s\n" % "ALL"]
    lines += [name + "".join("%8d" % count for count in counts) + "%7d\n" % total for name, counts, total in rows]
    return args.clear * "\033[H\033[2J" + "".join(lines)


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


def trace(args, bpf, birth):
    """Print updates until a signal comes, the time is over, the process has ended or nobody reads any more."""
    windows, told = Windows(args, bpf), {}
    began = time.monotonic()
    end, due = began + (args.duration or math.inf), began + args.interval
    hangup = select.poll()
    hangup.register(1, 0)
    stop = gone = False
    while not stop:
        time.sleep(max(0, min(INTERVAL, end - time.monotonic(), due - time.monotonic())))
        gone = birth_of(args.pid) != birth
        stop = stop_asked() or time.monotonic() >= end or hangup.poll(0) or gone
        if stop or time.monotonic() >= due:
            due = max(due + args.interval, time.monotonic())
            write(render(args, *windows.read()))
            told = report(losses(bpf), told)
    if gone:
        print("%s: process %d has ended" % (PROGRAM, args.pid), file=sys.stderr)
    report(losses(bpf), {}, "%s: in all %d %s")


def main():
    args = parse_args()
    if sys.stdout is None or sys.stderr is None:        # their numbers would be given to a map
        die("standard output or standard error is closed")
    birth = birth_of(args.pid)
    if birth is None:
        die("no such process: %d" % args.pid)
    bpf = load(args)
    try:
        learn_existing(args, bpf)
    except OSError as error:
        print("%s: connections from before are not known: %s" % (PROGRAM, error.strerror), file=sys.stderr)
    try:
        trace(args, bpf, birth)
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        print("%s: the output was not read to its end" % PROGRAM, file=sys.stderr)
    except OSError as error:
        die("cannot write the output: %s" % error.strerror)


if __name__ == "__main__":
    main()
