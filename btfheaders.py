#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The authors of tcp-tracers
#
# btfheaders  Kernel types for bcc from the running kernel's own BTF.
#
# usage: btfheaders.py [-h] [-t TYPES] [DIR]
#
# bcc compiles a tool's C against the kernel headers of the running kernel, which are often not installed. It needs them
# for types and a few constants only, and the kernel describes its own types in /sys/kernel/btf/vmlinux. libbpf, which
# bcc itself links, prints them as C. This writes a directory of them that bcc takes for a kernel source tree, so that
# any bcc program compiles, with the layouts of exactly this kernel:
#
#     ./btfheaders.py /root/tree && BCC_KERNEL_SOURCE=/root/tree ./some-bcc-tool
#
# A tool in the same directory as this file needs no such directory, and starts in half the time:
#
#     fds = btfheaders.compiled(["tcp_sock"], lambda: {"events": BPF(text=...)["events"].map_fd})
#
# CAVEATS: only types and the constants below; a program that uses a kernel macro or an inline function needs the real
# headers. Types that live in modules only are not in vmlinux's BTF.

import contextlib
import ctypes
import mmap
import os
import pickle
import re
import socket
import sys

VMLINUX_BTF = "/sys/kernel/btf/vmlinux"

# What bcc needs, whatever the program is: a type for its own headers, and two functions whose presence it checks.
BCC_TYPES = ["pt_regs"]
BCC_FUNCTIONS = ["bpf_probe_read_kernel", "bpf_probe_read_user"]
# For the command line: what bcc's own tools use.
COMMON_TYPES = """
    bio blk_opf_t block_device bpf_perf_event_data cmsghdr compact_control compact_priority compact_result cred dentry
    dev_t device_driver dst_entry fd fdtable file file_operations files_struct fs_struct gendisk gfp_t iattr icmphdr
    inet_bind_bucket inet_request_sock inet_timewait_sock inode iov_iter iovec iphdr ipv6hdr irq_desc irqaction key
    kiocb kmem_cache linux_binprm loff_t mm_struct mptcp_sock msghdr net net_device nfs_inode nsproxy oom_control
    open_how page path perf_event pglist_data pid pid_namespace qstr req_op req_opf request request_queue request_sock
    rq scatterlist signal_struct sk_buff skb_drop_reason sock_type sockaddr_in sockaddr_in6 sockaddr_un socket
    super_block task_struct tcp6_sock tcp_ca_state tcp_request_sock tcp_skb_cb tcp_sock tcphdr timespec64 tty_struct
    udp_sock udphdr umode_t unix_sock upid user_msghdr user_namespace uts_namespace vfsmount virtio_device virtqueue
    vm_area_struct zone
""".split()

# What bcc's headers and its tools include: each of these becomes a file that includes vmlinux.h.
HEADERS = {
    "asm": "page types",
    "linux": """
        bio blk-mq blk_types blkdev bpf bpf_common compaction cred dcache delay errno errqueue ethtool fcntl fdtable fs
        fs_struct icmp if_ether if_packet if_vlan in in6 init_task interrupt ip ipv6 irq irqdesc kasan kernel log2 mm
        mm_types mmzone mount net netdevice nfs_fs ns_common nsproxy oom pid pid_namespace ptrace sched security skbuff
        slab slab_def slub_def socket stat stddef string tcp time time64 topology types uaccess udp uio un utsname
        virtio workqueue""",
    "linux/sched": "signal task",
    "net": "inet_connection_sock inet_hashtables inet_sock ip ipv6 net_namespace request_sock sock tcp tcp_states udp",
    "uapi/linux": "bpf_perf_event if_ether if_packet in in6 ip ipv6 limits openat2 ptrace sched tcp types udp un",
}

# BTF has no macros, and an enum without a name cannot be looked up. These are the same in every kernel, most of them
# because user space relies on it.
MACROS = """
    AF_INET6=10 AF_INET=2 AF_UNIX=1 BITS_PER_LONG=(8*sizeof(long)) CONFIG_BPF_SYSCALL=1 DISK_NAME_LEN=32
    DNAME_INLINE_LEN=32 E2BIG=7 EEXIST=17 EINVAL=22 ENOENT=2 ENOMEM=12 EPERM=1 ETH_ALEN=6 ETH_HLEN=14 ETH_P_ARP=0x806
    ETH_P_IP=0x800 ETH_P_IPV6=0x86dd false=0 FMODE_CREATED=0x100000 IFNAMSIZ=16 IPPROTO_ICMP=1 IPPROTO_MPTCP=262
    IPPROTO_TCP=6 IPPROTO_UDP=17 NAME_MAX=255 NULL=((void*)0) PAGE_OFFSET=0xffff000000000000 PATH_MAX=4096
    PF_IO_WORKER=0x10 PF_KTHREAD=0x200000 REQ_OP_MASK=0xff s6_addr=in6_u.u6_addr8 SCM_RIGHTS=1 SO_EE_ORIGIN_ICMP=2
    SO_EE_ORIGIN_ICMP6=3 TASK_COMM_LEN=16 TASK_RUNNING=0 true=1
""".split()
# Members of struct sock_common that kernel sources call sk_<name>, or inet_<name> with a struct inet_sock.
SOCK_MEMBERS = "bound_dev_if daddr dport family hash net num prot rcv_saddr reuse state v6_daddr v6_rcv_saddr".split()
INET_MEMBERS = "daddr dport num rcv_saddr".split()
BEFORE = """\
#define __aligned_u64 __u64 __attribute__((aligned(8)))
#define __always_inline inline __attribute__((always_inline))
#define __user
typedef signed char __s8, s8;
typedef unsigned char __u8, u8, u_int8_t;
typedef short __s16, s16;
typedef unsigned short __u16, u16;
typedef int __s32, s32;
typedef unsigned int __u32, u32;
typedef long long __s64, s64;
typedef unsigned long long __u64, u64;
typedef __u16 __be16, __sum16;
typedef __u32 __be32, __wsum;
typedef __u64 __be64;
typedef unsigned long uintptr_t, size_t;
typedef long ssize_t;
typedef _Bool bool;
"""
AFTER = """\
struct sockaddr;
enum { TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT, TCP_CLOSE,
       TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING, TCP_NEW_SYN_RECV };
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define offsetof(type, member) __builtin_offsetof(type, member)
#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
#define roundup_pow_of_two(n) ((n) <= 1 ? 1UL : 1UL << (64 - __builtin_clzl((n) - 1)))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define unlikely(x) __builtin_expect(!!(x), 0)
#define S_ISREG(mode) (((mode) & 0170000) == 0100000)
#define S_ISSOCK(mode) (((mode) & 0170000) == 0140000)
#define TCP_SKB_CB(skb) ((struct tcp_skb_cb *)(skb)->cb)
#define tcp_sk(sk) ((struct tcp_sock *)(sk))
#define inet_sk(sk) ((struct inet_sock *)(sk))
#define skb_rx_queue_recorded(skb) ((skb)->queue_mapping != 0)
#define skb_get_rx_queue(skb) ((skb)->queue_mapping - 1)
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohs(x) __builtin_bswap16(x)
#define ntohl(x) __builtin_bswap32(x)
#else
#define ntohs(x) (x)
#define ntohl(x) (x)
#endif
#define htons(x) ntohs(x)
#define htonl(x) ntohl(x)
"""

STRUCT, UNION, ENUM, TYPEDEF, FUNC = 4, 5, 6, 8, 12     # BTF_KIND_*, include/uapi/linux/btf.h
PRINTF = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000     # include/uapi/linux/mount.h
CAP_SYS_ADMIN, NEEDED = 1 << 21, 1 << 38 | 1 << 39      # CAP_PERFMON and CAP_BPF, include/uapi/linux/capability.h
SCRATCH = "/proc/bus"           # on every kernel, and nothing here needs its contents


def load_libbpf():
    """Returns libbpf, with the signatures used here. Raises OSError if it is missing or too old."""
    try:
        lib = ctypes.CDLL("libbpf.so.1")
    except OSError:
        lib = ctypes.CDLL("libbpf.so.0")
    try:
        # The loader was renamed in 0.5. The old name was never a public promise, but bcc 0.18 ships with such a libbpf.
        load = getattr(lib, "btf__load_vmlinux_btf", None) or lib.libbpf_find_kernel_btf
        load.restype = ctypes.c_void_p
        lib.load_btf = load
        lib.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
        lib.btf__free.argtypes = lib.btf_dump__free.argtypes = [ctypes.c_void_p]
        lib.btf_dump__dump_type.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        lib.btf_dump__new.restype = ctypes.c_void_p
    except AttributeError as error:
        raise OSError("libbpf is too old: %s" % error) from error
    return lib


def new_dump(lib, btf, emit):
    """Returns a btf_dump that passes its text to emit. libbpf 0.6 changed the order of the arguments."""
    if hasattr(lib, "libbpf_major_version"):
        lib.btf_dump__new.argtypes = [ctypes.c_void_p, PRINTF, ctypes.c_void_p, ctypes.c_void_p]
        return lib.btf_dump__new(btf, emit, None, None)
    lib.btf_dump__new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, PRINTF]
    return lib.btf_dump__new(btf, None, ctypes.create_string_buffer(64), emit)


def declarations(names):
    """Returns C declarations of the named kernel types and of everything they consist of.

    For each name that the kernel has, a macro BTF_HAS_<name> is defined, and nothing more for one of BCC_FUNCTIONS.
    Other names are left out. Raises OSError if the kernel has no BTF or libbpf is missing.
    """
    if not os.path.exists(VMLINUX_BTF):
        raise OSError("this kernel has no BTF (%s)" % VMLINUX_BTF)
    lib, libc = load_libbpf(), ctypes.CDLL(None)
    libc.vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    text, buffer = [], ctypes.create_string_buffer(1 << 16)

    @PRINTF
    def emit(_context, form, va_list):      # a va_list is passed as a pointer on every 64-bit ABI of Linux
        libc.vsnprintf(buffer, len(buffer), form, va_list)
        text.append(buffer.value)

    btf = lib.load_btf()
    if not btf or btf > 2 ** 64 - 4096:     # libbpf before 1.0 returns an error as a pointer
        raise OSError("libbpf cannot read %s" % VMLINUX_BTF)
    dump = new_dump(lib, btf, emit)
    for name in filter(None, names):
        for kind in (FUNC,) if name in BCC_FUNCTIONS else (STRUCT, UNION, ENUM, TYPEDEF):
            type_id = lib.btf__find_by_name_kind(btf, os.fsencode(name), kind)
            if type_id > 0:
                if kind != FUNC:
                    lib.btf_dump__dump_type(dump, type_id)
                text.append(b"#define BTF_HAS_%s 1\n" % os.fsencode(name))
                break
    lib.btf_dump__free(dump)
    lib.btf__free(btf)
    # libbpf writes padding as bit fields. LLVM takes a run of them for one large integer, aligned wrongly: split it.
    return without_tagged_members(b"".join(text).decode().replace("long: 64;", "long: 64, : 0;"))


def without_tagged_members(text):
    """Returns the text with each `struct name;` among a struct's members replaced by the members of that struct.

    Linux has such members since 6.19, and compiles with -fms-extensions. bcc does since 0.37.
    """
    def members(match):
        body = re.search(r"^%s %s (\{$.*?^\}.*?;)$" % match.groups(), text, re.MULTILINE | re.DOTALL)
        return "\t%s %s" % (match[1], body[1]) if body else match[0]
    before = None
    while text != before:
        before, text = text, re.sub(r"^\t+(struct|union) (\w+);$", members, text, flags=re.MULTILINE)
    return text


def write_tree(root, types):
    """Writes the tree for these types below the directory root. Returns the text of the types; raises OSError."""
    version = (re.findall(r"\d+", os.uname().release) + ["0", "0"])[:3]
    macros = [macro.replace("=", " ", 1) for macro in MACROS]
    macros += ["sk_%s __sk_common.skc_%s" % (name, name) for name in SOCK_MEMBERS]
    macros += ["inet_%s sk.__sk_common.skc_%s" % (name, name) for name in INET_MEMBERS]
    macros += ["PAGE_SHIFT %d" % (mmap.PAGESIZE.bit_length() - 1), "BTF_HEADERS 1"]
    text = declarations(BCC_TYPES + BCC_FUNCTIONS + list(types))
    header = os.path.join(root, "include/vmlinux.h")
    if os.path.lexists(os.path.dirname(header)):
        with open(header, errors="replace") as file:
            if "#define BTF_HEADERS" not in file.read():
                raise FileExistsError("%s is not from btfheaders: give another directory" % header)
    files = {"vmlinux": "#pragma once\n" + BEFORE + text + "".join("#define %s\n" % macro for macro in macros) + AFTER}
    for directory, names in HEADERS.items():
        os.makedirs(os.path.join(root, "include", directory), exist_ok=True)
        files.update(("%s/%s" % (directory, name), "#include <vmlinux.h>\n") for name in names.split())
    files["uapi/linux/bpf"] = files["linux/kconfig"] = ""       # bcc brings a bpf.h of its own
    files["linux/version"] = ("#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))\n"
                              "#define LINUX_VERSION_CODE KERNEL_VERSION(%s, %s, %s)\n" % tuple(version))
    for name, content in files.items():
        with open(os.path.join(root, "include", name + ".h"), "w") as file:
            file.write(content)
    return text


@contextlib.contextmanager
def kernel_source(types, directory=None):
    """While this context lasts, bcc finds the named kernel types. Yields their text; raises OSError.

    They are written to the directory, or to a temporary one. If the user has set BCC_KERNEL_SOURCE, nothing is done.
    """
    if "BCC_KERNEL_SOURCE" in os.environ:
        yield ""
        return
    with contextlib.ExitStack() as stack:
        if not directory:
            import glob         # takes 3 ms together, and root does not need it
            import shutil
            import tempfile
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="btfheaders-"))
            for old in glob.glob(os.path.join(os.path.dirname(directory), "btfheaders-*")):
                with contextlib.suppress(OSError):      # left by kill -9, an hour ago or more
                    if os.stat(directory).st_mtime - os.lstat(old).st_mtime > 3600:
                        shutil.rmtree(old)
        text = write_tree(directory, types)
        os.environ["BCC_KERNEL_SOURCE"] = directory
        stack.callback(os.environ.pop, "BCC_KERNEL_SOURCE")
        yield text


def compiled(types, compile_it):
    """Returns what compile_it() returns: {name: file descriptor, or something else that can be pickled}.

    compile_it compiles, loads and attaches a program with bcc. It runs in a child process, whose memory goes with it.
    Descriptors come over, and with them all that is open in the kernel: programs, maps and what they are attached to.
    bcc finds the named kernel types in the kernel's BTF, or else in the installed headers. What it prints is held back.
    Raises what compile_it raises, with the reason that bcc printed; OSError if the child is killed.

    With CAP_SYS_ADMIN, the child has mounts of its own. It must not look up kernel symbols: it sees a short list.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            socket.send_fds(theirs, *result_of(types, compile_it))
        finally:
            os._exit(0)         # nothing of the parent's is to be cleaned up here
    theirs.close()
    with ours:
        reply, fds, _, _ = socket.recv_fds(ours, 1 << 18, 253)          # SCM_MAX_FD
    status = os.waitpid(child, 0)[1]
    if not reply:
        raise OSError("the compiler was killed by signal %d" % (status & 0x7f))
    result, names = pickle.loads(reply)         # noqa: S301 - from the child
    if isinstance(result, BaseException):
        raise result
    return {**result, **dict(zip(names, fds))}


def result_of(types, compile_it):
    """Returns what the child sends: (what compile_it() returned or raised, names), pickled; and these descriptors."""
    no_types, result = [], {}
    with captured_output() as output:
        try:
            with contextlib.ExitStack() as stack:
                directory = private_mounts()
                try:
                    shorten_kallsyms(directory, stack.enter_context(kernel_source(types, directory)))
                except OSError as error:
                    no_types.append(error)
                result = compile_it()
        except BaseException as error:
            result = error
    if isinstance(result, BaseException):
        return [pickle.dumps((explained(result, output, no_types), []))], []
    fds = {name: value for name, value in result.items() if type(value) is int}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink("/proc/self/fd/" + fd).startswith("anon_inode:") and int(fd) not in fds.values():
                fds["fd " + fd] = int(fd)
    return [pickle.dumps((result, [*fds]))], [*fds.values()]


def private_mounts():
    """Gives this process mounts of its own: tracefs wherever bcc looks for it, and an empty directory.

    Returns the path of that directory; None without CAP_SYS_ADMIN. The mounts end with the process.
    """
    libc, slave = ctypes.CDLL(None), MS_REC | MS_SLAVE
    if libc.unshare(CLONE_NEWNS) or any(libc.mount(None, top, None, slave, None) for top in (b"/proc", b"/sys")):
        return None         # slaves: nothing that is mounted here gets out
    for kind, path, events in ((b"tracefs", b"/sys/kernel/tracing", b"/events"),
                               (b"debugfs", b"/sys/kernel/debug", b"/tracing/events")):
        if not os.path.isdir(path + events):
            libc.mount(kind, path, kind, 0, None)
    return None if libc.mount(b"tmpfs", SCRATCH.encode(), b"tmpfs", 0, b"mode=700") else SCRATCH


def shorten_kallsyms(directory, text):
    """Lets this process see a /proc/kallsyms with the two functions that bcc looks for: it needs 0.1 s to parse all."""
    if directory and all("BTF_HAS_%s " % name in text for name in BCC_FUNCTIONS):
        path = os.path.join(directory, "kallsyms")
        with open(path, "w") as file:       # bcc ignores addresses that are not the kernel's
            file.writelines("ffffffffff000000 T %s\n" % name for name in BCC_FUNCTIONS)
        ctypes.CDLL(None).mount(path.encode(), b"/proc/kallsyms", None, MS_BIND, None)


@contextlib.contextmanager
def captured_output():
    """Holds back what is written to file descriptors 1 and 2; yields a list, in which its lines are at the end."""
    lines, file, saved = [], os.memfd_create("output"), [os.dup(1), os.dup(2)]
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield lines
    finally:
        ctypes.CDLL(None).fflush(None)      # libbcc uses C's stdout as well
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        lines += os.pread(file, 1 << 20, 0).decode(errors="replace").split("\n")
        for fd in [file] + saved:
            os.close(fd)


def explained(error, output, no_types):
    """Returns the exception with the reason for it that bcc has printed: its own messages seldom say why."""
    if any("Unable to find kernel headers" in line for line in output):
        if not no_types:
            return OSError("no kernel headers in BCC_KERNEL_SOURCE (%s)" % os.environ.get("BCC_KERNEL_SOURCE"))
        return OSError("no kernel types (%s): install linux-headers-%s (Debian, Ubuntu) or kernel-devel (Fedora, RHEL)"
                       % (no_types[0], os.uname().release))
    lines = [line.strip() for line in output if re.search("error:|fail|denied|not permitted|unable|such", line, re.I)]
    reasons = lines[:1]
    reasons += missing(": ".join([str(error), *reasons]))
    with contextlib.suppress(OSError), open("/sys/kernel/security/lockdown") as lockdown:
        if "[confidentiality]" in lockdown.read():
            reasons = ["the kernel is in lockdown (confidentiality) and lets nobody read its memory"]
    if isinstance(error, Exception):
        error.args = (": ".join([str(error), *reasons]),)
    return error


def missing(reason):
    """Returns a list of what this process lacks for what the kernel has refused; empty if that cannot be seen."""
    with open("/proc/self/status") as status, open("/proc/self/uid_map") as uid_map:
        fields = dict(re.findall(r"(\w+):\s*(\w+)", status.read()))
        is_initial = uid_map.read().split() == ["0", "0", "4294967295"]
    capabilities = int(fields["CapEff"], 16)
    eperm, eacces = "not permitted" in reason, "Permission denied" in reason
    hints = [hint for is_so, hint in (
        (capabilities & NEEDED != NEEDED and not capabilities & CAP_SYS_ADMIN,
         "needs root, or the capabilities CAP_BPF and CAP_PERFMON (in a container: --cap-add=BPF --cap-add=PERFMON)"),
        (eperm and not is_initial, "needs root outside of a user namespace (a container that is not rootless)"),
        (eperm and fields.get("Seccomp") == "2",
         "a seccomp filter forbids it (in a container: --security-opt=seccomp=unconfined)"),
        (eacces and "perf_event_open(" in reason, "needs CAP_SYS_ADMIN while kernel.perf_event_paranoid is 3 or more"),
        ("/tracing/" in reason and "No such file" in reason,
         "needs tracefs (in a container: --volume=/sys/kernel/tracing:/sys/kernel/tracing:ro)"),
        (eacces and "/tracing/" in reason, "needs CAP_DAC_READ_SEARCH to read tracefs")) if is_so]
    return hints[:1]


def main():
    import argparse
    parser = argparse.ArgumentParser(
        description="Kernel types for bcc from the running kernel's BTF.",
        epilog="Without DIR the declarations are printed. Then start any bcc program with BCC_KERNEL_SOURCE=DIR.")
    parser.add_argument("-t", "--types", help="comma-separated names of types (default: what bcc's own tools use)")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="write a kernel source tree for bcc here")
    args = parser.parse_args()
    types = args.types.split(",") if args.types else COMMON_TYPES
    try:
        with captured_output():
            text = write_tree(args.directory, types) if args.directory else declarations(types)
        if not args.directory:
            print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit("btfheaders: %s" % error)
    missing = [name for name in types if args.types and "BTF_HAS_%s " % name not in text]
    if missing:
        sys.exit("btfheaders: this kernel does not have %s" % ", ".join(map(repr, missing)))


if __name__ == "__main__":
    main()
