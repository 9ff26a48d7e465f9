#!/usr/bin/python3
#
# btfheaders  Kernel types for bcc from the running kernel's own BTF.
#
# usage: btfheaders.py [-h] [-t TYPES] [DIR]
#
# bcc compiles a tool's C against the kernel headers of the running kernel, which are often not installed. It needs them
# for types and a few constants only, and the kernel describes its own types in /sys/kernel/btf/vmlinux. libbpf, which
# bcc itself links, prints them as C. This makes a folder of that which looks to bcc like a kernel source tree, so that
# any bcc program compiles, with the layouts this very kernel has:
#
#     ./btfheaders.py /root/tree
#     BCC_KERNEL_SOURCE=/root/tree ./some-bcc-tool
#
# A tool that has this file beside it does the same without leaving a folder behind:
#
#     with btfheaders.kernel_source(["tcp_sock"]):
#         bpf = BPF(text=...)
#
# CAVEATS: only types and the constants below; a program that uses a kernel macro or an inline function needs the real
# headers. Types that live in modules only are not in vmlinux's BTF.

import argparse
import contextlib
import ctypes
import os
import re
import sys
import tempfile

VMLINUX_BTF = "/sys/kernel/btf/vmlinux"

# What bcc's own headers need, whatever the program is.
BCC_TYPES = ["pt_regs", "__be16", "__be32", "__be64", "__wsum", "__sum16"]
# What networking and scheduling tools usually look at; for the command line.
COMMON_TYPES = """
    tcp_sock tcp6_sock udp_sock inet_timewait_sock inet_bind_bucket mptcp_sock net sk_buff iphdr ipv6hdr tcphdr udphdr
    sockaddr_in sockaddr_in6 task_struct signal_struct nsproxy files_struct fdtable file socket
""".split()

# Each of these becomes a line that includes vmlinux.h: what bcc's own headers include, and what tools include.
HEADERS = """
    asm/page.h asm/types.h linux/bpf_common.h linux/fdtable.h linux/fs.h linux/in.h linux/in6.h linux/ip.h linux/ipv6.h
    linux/log2.h linux/mount.h linux/net.h linux/netdevice.h linux/ns_common.h linux/nsproxy.h linux/sched.h
    linux/sched/signal.h linux/skbuff.h linux/socket.h linux/tcp.h linux/types.h linux/udp.h net/inet_connection_sock.h
    net/inet_hashtables.h net/inet_sock.h net/ip.h net/ipv6.h net/net_namespace.h net/request_sock.h net/sock.h
    net/tcp.h net/tcp_states.h uapi/linux/bpf_perf_event.h uapi/linux/if_ether.h uapi/linux/if_packet.h
    uapi/linux/in.h uapi/linux/in6.h uapi/linux/ip.h uapi/linux/ipv6.h uapi/linux/ptrace.h uapi/linux/tcp.h
    uapi/linux/types.h uapi/linux/udp.h
""".split()

# BTF has no macros and cannot be asked for an enum without a name: constants that user space relies on, so they are the
# same in every kernel.
BEFORE = """\
#define CONFIG_BPF_SYSCALL 1
#define __aligned_u64 __u64 __attribute__((aligned(8)))
typedef signed char __s8, s8;
typedef unsigned char __u8, u8;
typedef short __s16, s16;
typedef unsigned short __u16, u16;
typedef int __s32, s32;
typedef unsigned int __u32, u32;
typedef long long __s64, s64;
typedef unsigned long long __u64, u64;
typedef unsigned long uintptr_t, size_t;
typedef long ssize_t;
typedef _Bool bool;
#define NULL ((void *)0)
#define true 1
#define false 0
"""
AFTER = """\
struct sockaddr;
enum { TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT, TCP_CLOSE,
       TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING, TCP_NEW_SYN_RECV };
#define TASK_COMM_LEN 16
#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define EPERM 1
#define ENOENT 2
#define E2BIG 7
#define ENOMEM 12
#define EEXIST 17
#define BITS_PER_LONG (8 * sizeof(long))
#define PAGE_SHIFT %d
#define PAGE_SIZE (1UL << PAGE_SHIFT)
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

STRUCT, UNION, ENUM, TYPEDEF = 4, 5, 6, 8       # BTF_KIND_*, include/uapi/linux/btf.h
PRINTF = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def load_libbpf():
    """libbpf with the signatures used here. Raises OSError if it is not installed."""
    try:
        lib = ctypes.CDLL("libbpf.so.1")
    except OSError:
        lib = ctypes.CDLL("libbpf.so.0")
    # The loader's name changed in 0.5; before it was never a public promise, but bcc 0.18 ships with such a libbpf.
    load = getattr(lib, "btf__load_vmlinux_btf", None) or lib.libbpf_find_kernel_btf
    load.restype = ctypes.c_void_p
    lib.load_btf = load
    lib.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
    lib.btf__free.argtypes = lib.btf_dump__free.argtypes = [ctypes.c_void_p]
    lib.btf_dump__dump_type.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    lib.btf_dump__new.restype = ctypes.c_void_p
    return lib


def new_dump(lib, btf, emit):
    """A btf_dump that hands its text to emit. libbpf 0.6 changed the order of the arguments."""
    if hasattr(lib, "libbpf_major_version"):
        lib.btf_dump__new.argtypes = [ctypes.c_void_p, PRINTF, ctypes.c_void_p, ctypes.c_void_p]
        return lib.btf_dump__new(btf, emit, None, None)
    lib.btf_dump__new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, PRINTF]
    options = ctypes.create_string_buffer(64)
    return lib.btf_dump__new(btf, None, options, emit)


def declarations(types):
    """C declarations of the named kernel types and of all they are made of.

    A name that the kernel lacks is left out; for each that it has, a macro BTF_HAS_<name> is defined. Raises OSError if
    the kernel has no BTF or libbpf is missing.
    """
    if not os.path.exists(VMLINUX_BTF):
        raise OSError("this kernel has no BTF (%s)" % VMLINUX_BTF)
    lib, libc = load_libbpf(), ctypes.CDLL(None)
    libc.vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    text, buffer = [], ctypes.create_string_buffer(1 << 16)

    @PRINTF
    def emit(_context, form, va_list):      # a va_list is passed as a pointer on every 64-bit ABI Linux has
        libc.vsnprintf(buffer, len(buffer), form, va_list)
        text.append(buffer.value)

    btf = lib.load_btf()
    if not btf or btf > 2 ** 64 - 4096:     # libbpf before 1.0 returns an error as a pointer
        raise OSError("libbpf cannot read %s" % VMLINUX_BTF)
    dump = new_dump(lib, btf, emit)
    for name in types:
        for kind in (STRUCT, UNION, ENUM, TYPEDEF):
            type_id = lib.btf__find_by_name_kind(btf, name.encode(), kind)
            if type_id > 0:
                lib.btf_dump__dump_type(dump, type_id)
                text.append(b"#define BTF_HAS_%s 1\n" % name.encode())
                break
    lib.btf_dump__free(dump)
    lib.btf__free(btf)
    return b"".join(text).decode()


def kernel_version():
    """(major, minor, patch) of the running kernel, the patch level at most 255 as in the kernel's own macro."""
    numbers = [int(number) for number in re.findall(r"\d+", os.uname().release)[:3]]
    major, minor, patch = (numbers + [0, 0, 0])[:3]
    return major, minor, min(patch, 255)


def write_tree(root, types):
    """Write the tree for these types below the folder root. Raises OSError."""
    page_shift = os.sysconf("SC_PAGE_SIZE").bit_length() - 1
    files = dict.fromkeys(HEADERS, "#include <vmlinux.h>\n")
    files["uapi/linux/bpf.h"] = files["linux/kconfig.h"] = ""       # bcc brings a bpf.h of its own
    files["linux/version.h"] = ("#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
                                "#define LINUX_VERSION_CODE KERNEL_VERSION(%d, %d, %d)\n" % kernel_version())
    files["vmlinux.h"] = "#pragma once\n#define BTF_HEADERS 1\n%s%s%s" % (
        BEFORE, declarations(BCC_TYPES + list(types)), AFTER % page_shift)
    for name, text in files.items():
        path = os.path.join(root, "include", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)


def detached_tmpfs():
    """File descriptor of a tmpfs that is mounted nowhere. Raises OSError (needs Linux 5.2 and CAP_SYS_ADMIN).

    It has no name that others could open, and the kernel drops it with the descriptor, after kill -9 too.
    """
    fsopen, fsconfig, fsmount = 430, 431, 432       # the same numbers on every architecture but alpha
    fsconfig_cmd_create, cloexec = 6, 1
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(fsopen, b"tmpfs", cloexec)
    if context < 0:
        raise OSError(ctypes.get_errno(), "fsopen")
    try:
        mount = -1
        if libc.syscall(fsconfig, context, fsconfig_cmd_create, None, None, 0) == 0:
            mount = libc.syscall(fsmount, context, cloexec, 0)
        if mount < 0:
            raise OSError(ctypes.get_errno(), "fsmount")
        return mount
    finally:
        os.close(context)


@contextlib.contextmanager
def private_directory():
    """The path of an empty folder that only this process uses; it is gone afterwards."""
    try:
        mount = detached_tmpfs()
    except OSError:
        with tempfile.TemporaryDirectory(prefix="btfheaders-") as path:
            yield path
        return
    try:
        yield "/proc/%d/fd/%d" % (os.getpid(), mount)
    finally:
        os.close(mount)


@contextlib.contextmanager
def kernel_source(types):
    """While this context lasts, bcc finds the named kernel types. A BCC_KERNEL_SOURCE set by the user is left alone.

    Raises OSError if the kernel has no BTF or libbpf is missing.
    """
    if "BCC_KERNEL_SOURCE" in os.environ:
        yield
        return
    with private_directory() as path:
        write_tree(path, types)
        os.environ["BCC_KERNEL_SOURCE"] = path
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def main():
    parser = argparse.ArgumentParser(description="Kernel types for bcc from the running kernel's BTF.",
                                     epilog="Without DIR the declarations are printed. With DIR: set "
                                            "BCC_KERNEL_SOURCE=DIR and start any bcc program.")
    parser.add_argument("-t", "--types", help="comma-separated names of structs, unions, enums and typedefs "
                                              "(default: what networking and scheduling tools use)")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="write a kernel source tree for bcc here")
    args = parser.parse_args()
    types = args.types.split(",") if args.types else COMMON_TYPES
    try:
        if args.directory:
            write_tree(args.directory, types)
        else:
            print(declarations(types), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit("btfheaders: %s" % error)


if __name__ == "__main__":
    main()
