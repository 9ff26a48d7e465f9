"""What the unit tests share: the tools, and what of their C text is plain C, compiled with cc."""
import ctypes
import importlib
import ipaddress
import re
import struct
import subprocess
import tempfile

import btfheaders
import live

NAMES = subprocess.run(["make", "-s", "tools"], cwd=live.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
TOOLS = [importlib.import_module(name) for name in NAMES.split()]
RINGS = [tool for tool in TOOLS if hasattr(tool, "open_events")]        # those that print events
HEAD = btfheaders.BEFORE + """
#define TASK_COMM_LEN 16
#define true 1
#define false 0
#define htonl(x) (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap32(x) : (x))
"""


def address(text, scope=0):
    """Returns struct address. scope: number of an interface."""
    ip = ipaddress.ip_address(text)
    return (ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed) + struct.pack("=I", scope)


def owner(pid, comm, cgroup=0):
    """Returns struct owner."""
    return struct.pack("=I16sIQ", pid, comm, 1, cgroup)


def parse(tool, *options):
    """Returns the arguments for these options, with what the tool cannot do without."""
    return tool.parse_args([*options, *["1"] * (tool.PROGRAM == "tcpchurn")])


def macros(tool, *options):
    """Returns what the options are in the C text: {name: text}."""
    return dict(re.fullmatch(r"-D(.*?)=\((.*)\)", flag).groups() for flag in tool.cflags(parse(tool, *options))[1:])


def plain_c(tool):
    """Returns the structs of the C text, and the macros for conditions."""
    return "\n".join(re.findall(r"(?ms)^struct \w+ \{.*?^\};|^#define IS_\w+\(.*?$", tool.shared_text + tool.bpf_text))


def compile_c(path, text, *flags):
    """Compiles C text as a library. Returns what the compiler says, "" if that is nothing."""
    return subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused", "-Werror", *flags, "-x", "c",
                           "-o", path, "-"], input=HEAD + text, stderr=subprocess.PIPE, text=True).stderr


def library_of(text, *flags):
    """Returns the C functions in this text, to be called by their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/library.so"
        said = compile_c(path, text, *flags)
        assert not said, said
        return ctypes.CDLL(path)


def library(tool, text, *options):
    """The same, for text that uses parts of the tool's and its macros with these options."""
    return library_of(plain_c(tool) + "\n" + text, *tool.cflags(parse(tool, *options)))
