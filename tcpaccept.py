#!/usr/bin/python3
#
# tcpaccept  Trace TCP accepts.
#            For Linux, uses bcc, eBPF.
#
# usage: tcpaccept [-h] [-t] [-p PID] [-T] [-P PORT] [-4 | -6] [-r] [--cgroupmap PATH] [--mntnsmap PATH] [--json]
#                  [--netns NETNS] [--duration SECONDS] [--probes {tracepoint,kprobe}]
#
# One line a passive connection that a process has accepted: the process that called accept(), not the one that listens,
# and the addresses. Connections that nobody accepts are not shown.
#
# Traces security_sock_graft() (kprobe), which the kernel calls in accept() with the new socket, or inet_csk_accept().
# On a kernel without kprobes: the exits of the accept() and accept4() system calls, and the socket behind the
# descriptor that they return.
#
# CAVEATS: while a tracepoint of a system call is on, every system call of the machine costs some 50 ns more. These
# exits do not cover io_uring and 32-bit programs, which the kprobe does.

import signal

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if __name__ == "__main__":      # taken by stop_asked() only: nothing is interrupted half done, imports neither
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import ctypes
import fcntl
import functools
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
    ./tcpaccept           # trace all TCP accept()s
    ./tcpaccept -t        # include timestamps
    ./tcpaccept -p 181    # only trace PID 181
    ./tcpaccept -P 80,81  # only trace local ports 80 and 81
    ./tcpaccept -r        # include the remote port
    ./tcpaccept --json    # one JSON object a line
    ./tcpaccept --cgroupmap /sys/fs/bpf/set   # only trace the cgroups in this pinned map
    ./tcpaccept --mntnsmap /sys/fs/bpf/set    # only trace the mount namespaces in this pinned map
"""

KERNEL_TYPES = ["tcp_sock", "net", "task_struct", "files_struct", "fdtable", "file", "socket", "inet_bind_bucket",
                "nsproxy"]
RECENT = 1024                   # connections a CPU that are remembered as accepted
RING_PAGES = 512                # 2 MiB: 26,000 accepts, a second of the fastest load measured
PERF_PAGES = 256                # a CPU, where there is no ring buffer
INTERVAL = 0.1                  # seconds between two looks at the ring buffer
BATCH = 1000                    # records that are printed between two looks at it, if there are more
MAX_PENDING = 1 << 26           # bytes that have been read and wait to be printed
V4MAPPED = bytes(10) + b"\xff\xff"

bpf_text = r"""
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/net.h>
#include <linux/tcp.h>
#include <net/inet_hashtables.h>
#include <net/net_namespace.h>
#include <net/sock.h>

struct event {
    u64 ts;                     /* bpf_ktime_get_ns() */
    u32 pid, netns;
    u32 laddr[4], raddr[4];     /* IPv4 as ::ffff:a.b.c.d */
    u16 lport, rport;
    char comm[TASK_COMM_LEN];
    u32 pad;
};

enum { LOST_EVENT, LOST_SOCKET, NOT_LOST, LOST_COUNTERS };

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

static inline u16 protocol_of(struct sock *sk)
{
    u16 protocol = IPPROTO_TCP;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)       /* a bit field before, and MPTCP came with 5.6 */
    bpf_probe_read_kernel(&protocol, sizeof(protocol), &sk->sk_protocol);
#endif
    return protocol;
}

/* accept() returns sockets of other kinds, too: Unix, SCTP, ... */
static inline bool is_tcp(struct sock *sk)
{
    u16 protocol = protocol_of(sk), family = 0;

    bpf_probe_read_kernel(&family, sizeof(family), &sk->__sk_common.skc_family);
    return (family == AF_INET || family == AF_INET6) && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

static inline void emit(void *ctx, struct event *e)
{
#ifdef RING_PAGES
    /* Nobody is woken: the reader comes by itself. */
    if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
        count_lost(LOST_EVENT);
#else
    if (events.perf_submit(ctx, e, sizeof(*e)))
        count_lost(LOST_EVENT);
#endif
}

static inline void accepted(void *ctx, struct sock *sk)
{
    struct event e = {};
    struct sock_common c;
    bool ipv4;

    if (!is_tcp(sk))
        return;
    bpf_probe_read_kernel(&c, sizeof(c), &sk->__sk_common);
    e.pid = bpf_get_current_pid_tgid() >> 32;
    if ((FILTER_PID && e.pid != FILTER_PID) || container_should_be_filtered())
        return;
    e.netns = netns_of(sk);
    if (FILTER_NETNS && e.netns != FILTER_NETNS)
        return;
    /* skc_num is 0 already if the peer has reset the connection meanwhile. inet_sport stays. */
    bpf_probe_read_kernel(&e.lport, sizeof(e.lport), &((struct inet_sock *)sk)->inet_sport);
    e.lport = ntohs(e.lport);
    e.rport = ntohs(c.skc_dport);
    if (!IS_WANTED_PORT(e.lport))
        return;
    if (c.skc_family == AF_INET) {
        e.laddr[2] = e.raddr[2] = htonl(0xffff);
        e.laddr[3] = c.skc_rcv_saddr;
        e.raddr[3] = c.skc_daddr;
    } else {
        __builtin_memcpy(e.laddr, &c.skc_v6_rcv_saddr, sizeof(e.laddr));
        __builtin_memcpy(e.raddr, &c.skc_v6_daddr, sizeof(e.raddr));
    }
    ipv4 = !e.raddr[0] && !e.raddr[1] && e.raddr[2] == htonl(0xffff);
    if ((FILTER_IPV4 && !ipv4) || (FILTER_IPV6 && ipv4))
        return;
    e.ts = bpf_ktime_get_ns();
    bpf_get_current_comm(&e.comm, sizeof(e.comm));
    emit(ctx, &e);
}

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

/*
 * The connections seen: another thread may have put another socket behind the descriptor meanwhile. A socket's memory
 * is used again and again, but each time with another first sequence number.
 */
struct connection {
    u64 sk;
    u64 isn;
};
BPF_HASH(recent, struct connection, u8, 2 * RECENT * CPUS);
BPF_PERCPU_ARRAY(ring, struct connection, RECENT);      /* the same in their order, to forget the oldest */
BPF_PERCPU_ARRAY(newest, u32, 1);

static inline bool is_new(struct sock *sk)
{
    struct tcp_sock *tp = (struct tcp_sock *)sk;
    struct connection key = {.sk = (u64)sk};
    struct connection *oldest;
    u64 bytes_acked = 0;
    u32 snd_una = 0, *n;
    int zero = 0;
    u8 seen = 1;

    if (protocol_of(sk) != IPPROTO_TCP)
        return true;
    bpf_probe_read_kernel(&snd_una, sizeof(snd_una), &tp->snd_una);
    bpf_probe_read_kernel(&bytes_acked, sizeof(bytes_acked), &tp->bytes_acked);
    key.isn = snd_una - (u32)bytes_acked;
    if (recent.insert(&key, &seen) == -EEXIST)
        return false;
    n = newest.lookup(&zero);
    if (!n)
        return true;
    *n = (*n + 1) % RECENT;
    oldest = ring.lookup(n);
    if (oldest) {
        recent.delete(oldest);
        *oldest = key;
    }
    return true;
}

/* A port that connect() has chosen is in a bucket of its own kind: this socket came from there, not from accept(). */
static inline bool has_connected(struct sock *sk)
{
    struct inet_bind_bucket *bucket = NULL;
    signed char fastreuse = 0;

    bpf_probe_read_kernel(&bucket, sizeof(bucket), &((struct inet_connection_sock *)sk)->icsk_bind_hash);
    if (bucket)
        bpf_probe_read_kernel(&fastreuse, sizeof(fastreuse), &bucket->fastreuse);
    return fastreuse < 0;
}

static inline void accept_returned(void *ctx, long fd)
{
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    struct files_struct *files = NULL;
    struct fdtable *fdt = NULL;
    struct file **fds = NULL, *file = NULL, *back = NULL;
    struct socket *socket = NULL;
    struct sock *sk = NULL;
    u16 rport = 0;

    if (fd < 0)
        return;
    /* not &task->files: LLVM 11 gets that wrong by 16 bytes */
    bpf_probe_read_kernel(&files, sizeof(files), (void *)task + __builtin_offsetof(struct task_struct, files));
    bpf_probe_read_kernel(&fdt, sizeof(fdt), &files->fdt);
    bpf_probe_read_kernel(&fds, sizeof(fds), &fdt->fd);
    bpf_probe_read_kernel(&file, sizeof(file), &fds[fd]);
    bpf_probe_read_kernel(&socket, sizeof(socket), &file->private_data);
    bpf_probe_read_kernel(&back, sizeof(back), &socket->file);
    bpf_probe_read_kernel(&sk, sizeof(sk), &socket->sk);
    if (!file || back != file || !sk) {
        count_lost(LOST_SOCKET);        /* closed already, and maybe replaced by a file that is no socket */
        return;
    }
    if (!is_tcp(sk))
        return;
    bpf_probe_read_kernel(&rport, sizeof(rport), &sk->__sk_common.skc_dport);
    if (!rport || has_connected(sk) || !is_new(sk))
        count_lost(LOST_SOCKET);
    else
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

PROGRAM = "tcpaccept"

# One record of the ring: the kernel's 8-byte header (length and flags, page offset), then struct event.
RECORD = struct.Struct("=IIQII16s16sHH16sI")


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


def pinned_map(text):
    """The path of a pinned BPF map; it becomes part of the C text."""
    if not re.fullmatch("/[A-Za-z0-9_./-]+", text, re.ASCII) or not os.path.exists(text):
        raise argparse.ArgumentTypeError("not the path of a pinned BPF map: %r" % text)
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trace TCP accepts",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    family = parser.add_mutually_exclusive_group()
    parser.add_argument("-t", "--timestamp", action="store_true", help="include timestamp on output")
    parser.add_argument("-p", "--pid", type=pid, help="trace this PID only")
    parser.add_argument("-T", "--time", action="store_true", help="include time column on output (HH:MM:SS)")
    parser.add_argument("-P", "--port", type=ports, help="comma-separated list of local ports to trace.")
    family.add_argument("-4", "--ipv4", action="store_true", help="trace IPv4 only")
    family.add_argument("-6", "--ipv6", action="store_true", help="trace IPv6 only")
    parser.add_argument("-r", "--rport", action="store_true", help="include the remote port on output")
    parser.add_argument("--cgroupmap", metavar="PATH", type=pinned_map, help="trace cgroups in this BPF map only")
    parser.add_argument("--mntnsmap", metavar="PATH", type=pinned_map,
                        help="trace mount namespaces in this BPF map only")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with exact times")
    parser.add_argument("--netns", type=netns, help="trace this network namespace only: inode number, path or name")
    parser.add_argument("--duration", metavar="SECONDS", type=seconds, help="end after this time")
    parser.add_argument("--probes", choices=("tracepoint", "kprobe"),
                        help="use this kind of probe (default: the kprobe where the kernel has kprobes)")
    return parser.parse_args(argv)


# loading

def die(message):
    sys.exit("%s: %s" % (PROGRAM, message))


def kernel_version():
    return tuple(int(n) for n in re.findall("[0-9]+", os.uname().release)[:2])


def has_ring_buffer():
    return kernel_version() >= (5, 8)


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
    return {"KPROBE_ACCEPT"} if args.probes == "kprobe" or (args.probes is None and has_kprobes()) else set()


def any_of(numbers):
    """C expression that is true for a port among these, for all ports if there are none."""
    return " || ".join("(port) == %d" % n for n in numbers) if numbers else "true"


def cflags(args):
    """The arguments as macros of the C text; only numbers get there."""
    macros = {
        "RECENT": RECENT,
        "CPUS": os.sysconf("SC_NPROCESSORS_CONF"),
        "FILTER_PID": args.pid or 0,
        "FILTER_NETNS": args.netns or 0,
        "FILTER_IPV4": int(args.ipv4),
        "FILTER_IPV6": int(args.ipv6),
        "IS_WANTED_PORT(port)": any_of(args.port),
    }
    macros.update((side, 1) for side in kprobe_sides(args))
    if has_ring_buffer():
        macros["RING_PAGES"] = RING_PAGES
    return ["-g0"] + ["-D%s=(%s)" % item for item in macros.items()]     # nobody debugs it: a tenth of the start


def attach(bpf, args):
    if kprobe_sides(args):
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
    from bcc.containers import filter_by_containers
    try:
        with kernel_types(), held_stderr():
            bpf = bcc.BPF(text=filter_by_containers(args) + bpf_text, cflags=cflags(args))
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
        if name.endswith(b"_second"):
            continue        # what only this was skipped for is not lost
        with open("/proc/self/fdinfo/%d" % function.fd) as info:        # the line exists since Linux 5.12
            missed += sum(int(n) for n in re.findall("recursion_misses:\\s*([0-9]+)", info.read()))
    lost = mapped_counters(bpf) if has_ring_buffer() else [count.value for count in bpf["lost"].values()]
    return {"accepts lost: the ring buffer was full": lost[0],
            "accepts lost: another thread had closed the socket already": lost[1],
            "accepts lost: the kernel did not run the probe": missed - lost[2]}


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
    names = ["PID", "COMM", "IP", "RADDR", "LADDR", "LPORT"]
    if args.rport:
        names.insert(4, "RPORT")
    return ["TIME"] * args.time + ["TIME(s)"] * args.timestamp + names


def columns(args, record, began, wall):
    """The values for column_names(). began: the first event, wall: what makes Unix time of the kernel's, both ns."""
    _, _, ts, pid, _, laddr, raddr, lport, rport, comm, _ = record
    laddr, raddr = address(laddr), address(raddr)
    row = pid, printable(comm), 6 if ":" in raddr else 4, raddr, laddr, lport
    if args.rport:
        row = row[:4] + (rport,) + row[4:]
    if args.timestamp:
        row = ("%.3f" % (max(0, ts - began) / 1e9),) + row
    if args.time:
        row = (clock((ts + wall) // 10 ** 9),) + row
    return row


def json_object(record, wall):
    _, _, ts, pid, netns, laddr, raddr, lport, rport, comm, _ = record
    laddr, raddr = address(laddr), address(raddr)
    return {"ts": (ts + wall) / 1e9, "pid": pid,
            "comm": comm.partition(b"\0")[0].decode(errors="surrogateescape"), "ip": 6 if ":" in raddr else 4,
            "raddr": raddr, "rport": rport, "laddr": laddr, "lport": lport, "netns": netns}


def form_of(args):
    """The format of a line of text."""
    form = "%-6s %-12.12s %-2s %-16s " + args.rport * "%-5s " + "%-16s %s\n"
    return args.time * "%-8s " + args.timestamp * "%-8s " + form


def render(args, records, began):
    """Whole lines for these records."""
    wall = time.time_ns() - time.monotonic_ns()     # each time anew: the clock may be set meanwhile
    if args.json:
        return "".join([json.dumps(json_object(record, wall)) + "\n" for record in records])
    form = form_of(args)
    return "".join([form % columns(args, record, began, wall) for record in records])


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
    """Print accepts until a signal comes, the time is over or nobody reads any more."""
    read = open_ring(bpf) if has_ring_buffer() else open_perf(bpf)
    began, first, told = time.monotonic_ns(), None, {}
    end = began + args.duration * 1e9 if args.duration else math.inf
    if not args.json:
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
        if records:
            first = first or records[0][2]
            write(render(args, records, first))
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
