"""btfheaders: the tree it makes, what compiled() does for a tool, and that nothing of it stays."""
import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import btfheaders
import live

HAS_BTF = os.path.exists(btfheaders.VMLINUX_BTF)
MAY_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0
TYPES = ["tcphdr"]


@unittest.skipUnless(HAS_BTF, "needs a kernel with BTF")
class Tree(unittest.TestCase):
    def test_only_the_types_asked_for(self):
        text = btfheaders.declarations(["tcphdr"])
        self.assertIn("struct tcphdr {", text)
        self.assertIn("#define BTF_HAS_tcphdr 1", text)
        self.assertNotIn("struct tcp_sock", text)

    def test_names_the_kernel_lacks_are_left_out(self):
        self.assertEqual(btfheaders.declarations(["no_such_type"]), "")

    def test_a_function_has_no_declaration(self):
        with mock.patch.object(btfheaders, "BCC_FUNCTIONS", ["tcp_v4_connect"]):
            self.assertEqual(btfheaders.declarations(["tcp_v4_connect"]), "#define BTF_HAS_tcp_v4_connect 1\n")

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_sizes_are_those_of_the_btf(self):
        import bcc
        text, lib = btfheaders.declarations(btfheaders.COMMON_TYPES), btfheaders.load_libbpf()
        lib.btf__type_by_id.restype = ctypes.POINTER(ctypes.c_uint32)       # struct btf_type: name, info, size
        lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        btf, asserts = lib.load_btf(), []
        for kind, name in re.findall(r"^(struct|union) (\w+) \{$", text, re.MULTILINE):
            number = btfheaders.STRUCT if kind == "struct" else btfheaders.UNION
            size = lib.btf__type_by_id(btf, lib.btf__find_by_name_kind(btf, name.encode(), number))[2]
            asserts.append('_Static_assert(sizeof(%s %s) == %d, "%s");' % (kind, name, size, name))
        program = "\n".join(["#include <net/sock.h>", *asserts, "int program(void *ctx) { return 0; }"])
        self.assertGreater(len(asserts), 100)

        def compile_it():
            return {"program": bcc.BPF(text=program).load_func("program", bcc.BPF.KPROBE).fd}
        os.close(btfheaders.compiled(btfheaders.COMMON_TYPES, compile_it)["program"])

    def test_set_and_unset(self):
        with btfheaders.kernel_source(TYPES):
            tree = pathlib.Path(os.environ["BCC_KERNEL_SOURCE"])
            self.assertEqual(tree.stat().st_mode & 0o777, 0o700)
            self.assertTrue((tree / "include/linux/kconfig.h").exists())
            self.assertIn("tcphdr", (tree / "include/vmlinux.h").read_text())
        self.assertNotIn("BCC_KERNEL_SOURCE", os.environ)
        self.assertFalse(tree.exists())

    def test_the_users_own_tree_is_left_alone(self):
        with mock.patch.dict(os.environ, BCC_KERNEL_SOURCE="/mine"), btfheaders.kernel_source(TYPES):
            self.assertEqual(os.environ["BCC_KERNEL_SOURCE"], "/mine")

    def test_gone_after_an_error(self):
        with self.assertRaises(KeyError), btfheaders.kernel_source(TYPES):
            path = os.environ["BCC_KERNEL_SOURCE"]
            raise KeyError
        self.assertFalse(os.path.exists(path))

    def test_left_by_a_process_that_was_killed(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
            ages = {"btfheaders-old": 4000, "btfheaders-new": 10, "other": 4000}
            for name, age in ages.items():
                os.makedirs(os.path.join(folder, name, "include"))
                os.utime(os.path.join(folder, name), (time.time() - age,) * 2)
            with btfheaders.kernel_source(TYPES):
                self.assertNotIn("btfheaders-old", os.listdir(folder))
            self.assertEqual(sorted(os.listdir(folder)), ["btfheaders-new", "other"])


@unittest.skipUnless(HAS_BTF, "needs a kernel with BTF")
class Command(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def run_it(self, *args):
        run = subprocess.run([live.PYTHON, live.ROOT / "btfheaders.py", *args], capture_output=True, text=True,
                             check=False)
        return run.returncode, run.stdout, run.stderr

    def test_prints_types(self):
        status, out, err = self.run_it("-t", "tcphdr")
        self.assertIn("struct tcphdr {", out)
        self.assertEqual((status, err), (0, ""))

    def test_makes_a_tree_and_makes_it_anew(self):
        for _ in range(2):
            self.assertEqual(self.run_it(self.folder), (0, "", ""))
            self.assertTrue(os.path.exists(self.folder + "/include/linux/version.h"))

    def test_leaves_other_headers_alone(self):
        mine = pathlib.Path(self.folder, "include/linux/tcp.h")
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        for _ in range(2):
            status, _, err = self.run_it(self.folder)
            self.assertEqual((status, err.count("\n"), mine.read_text()), (1, 1, "mine"))
            (mine.parent.parent / "vmlinux.h").write_text("mine too")

    def test_cannot_write(self):
        status, _, err = self.run_it("/proc/nowhere")
        self.assertEqual((status, err.count("\n")), (1, 1))

    def test_names_that_the_kernel_lacks(self):
        for names in "tpchdr", "tcphdr,tpchdr", "tcphdr,,", os.fsdecode(b"\xff"):
            status, out, err = self.run_it("-t", names)
            self.assertEqual((status, err.count("\n"), "struct tcphdr {" in out), (1, 1, "tcphdr" in names))
            self.assertRegex(err, "^btfheaders: this kernel does not have ")


class Missing(unittest.TestCase):
    @unittest.skipUnless(MAY_MOUNT, "needs CAP_SYS_ADMIN")
    def test_an_empty_btf(self):
        script = "mount --bind /dev/null %s && %s %s/btfheaders.py" % (
            btfheaders.VMLINUX_BTF, live.PYTHON, live.ROOT)
        run = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
        self.assertEqual((run.returncode, run.stdout, run.stderr),
                         (1, "", "btfheaders: libbpf cannot read %s\n" % btfheaders.VMLINUX_BTF))

    def test_no_btf(self):
        with mock.patch.object(btfheaders, "VMLINUX_BTF", "/nonexistent"), self.assertRaises(OSError):
            btfheaders.declarations(TYPES)

    @unittest.skipUnless(HAS_BTF, "needs a kernel with BTF")
    def test_an_old_libbpf(self):
        with mock.patch("ctypes.CDLL", return_value=object()), self.assertRaisesRegex(OSError, "too old"):
            btfheaders.load_libbpf()


class TaggedMembers(unittest.TestCase):
    """Linux 6.19 has `struct name;` among the members of a struct."""
    TEXT = "struct node {\n\tu64 id;\n};\n\nunion both {\n\tstruct node;\n\tu32 half;\n};\n\n" \
           "struct common {\n\tu32 stashed;\n\tunion both;\n\tu32 inum;\n};\n\nstruct other;\n"

    def test_written_out(self):
        text = btfheaders.without_tagged_members(self.TEXT)
        self.assertNotRegex(text, "\t(struct|union) [a-z]+;")
        self.assertIn("struct other;", text)

    def test_the_compiler_agrees(self):
        program = "typedef unsigned int u32; typedef unsigned long long u64;\n%s\n" \
                  "int main(void) { return !(__builtin_offsetof(struct common, inum) == 16 && " \
                  "__builtin_offsetof(struct common, half) == 8); }\n"
        with tempfile.TemporaryDirectory() as folder:
            for text, right in (self.TEXT, False), (btfheaders.without_tagged_members(self.TEXT), True):
                compiled = subprocess.run(["cc", "-w", "-x", "c", "-o", folder + "/a", "-"], input=program % text,
                                          text=True, capture_output=True, check=False)
                self.assertEqual(right, not compiled.returncode and not subprocess.call(folder + "/a"))

    def test_an_unknown_name(self):
        text = "struct common {\n\tstruct unknown;\n};\n"
        self.assertEqual(btfheaders.without_tagged_members(text), text)


def setUpModule():
    tempfile.tempdir = tempfile.mkdtemp()       # where nobody else has files


def tearDownModule():
    os.rmdir(tempfile.tempdir)
    tempfile.tempdir = None


def descriptors():
    """The open ones, without those of the namespace in which bcc finds tracefs, where there is none otherwise."""
    paths = {fd: os.readlink(fd.path) for fd in os.scandir("/proc/self/fd") if os.path.exists(fd.path)}
    return sorted(fd.name for fd, path in paths.items() if not path.startswith("mnt:"))


def process_state():
    """What a compiler in another process must leave as it was."""
    return (os.getcwd(), os.readlink("/proc/self/root"), os.readlink("/proc/self/ns/mnt"),
            os.readlink("/proc/thread-self/ns/mnt"), pathlib.Path("/proc/self/mounts").read_text(),
            descriptors(), dict(os.environ), os.listdir(tempfile.gettempdir()))


class Compiled(unittest.TestCase):
    """compile_it is a stand-in for bcc here."""
    def fails(self, compile_it, kind, message, needed=0):
        """As root with the capabilities that are needed. needed: others. Returns the exception."""
        with mock.patch("os.geteuid", return_value=0), mock.patch.object(btfheaders, "NEEDED", needed), \
                mock.patch.object(btfheaders, "CAP_SYS_ADMIN", 0), self.assertRaisesRegex(kind, message) as failed:
            btfheaders.compiled(TYPES, compile_it)
        return failed.exception

    @unittest.skipUnless(HAS_BTF, "needs a kernel with BTF")
    def test_its_result_and_its_types(self):
        def compile_it():
            return {"text": pathlib.Path(os.environ["BCC_KERNEL_SOURCE"], "include/vmlinux.h").read_text()}
        before = process_state()
        self.assertIn("struct tcphdr {", btfheaders.compiled(TYPES, compile_it)["text"])
        self.assertEqual(before, process_state())

    @unittest.skipUnless(HAS_BTF and MAY_MOUNT, "needs BTF and CAP_SYS_ADMIN")
    def test_private_mounts(self):
        def compile_it():
            os.chdir("/")
            return {"tracefs": os.listdir("/sys/kernel/tracing/events"),
                    "debugfs": os.listdir("/sys/kernel/debug/tracing/events"),
                    "symbols": pathlib.Path("/proc/kallsyms").read_text()}
        before = process_state()
        tracefs, debugfs, symbols = btfheaders.compiled(TYPES, compile_it).values()
        self.assertEqual(before[:5], process_state()[:5])
        self.assertTrue(tracefs and debugfs)
        if all("BTF_HAS_" + name in btfheaders.declarations([name]) for name in btfheaders.BCC_FUNCTIONS):
            self.assertEqual([line.split()[2] for line in symbols.splitlines()], btfheaders.BCC_FUNCTIONS)
        else:
            self.assertGreater(symbols.count("\n"), 1000)

    @unittest.skipUnless(HAS_BTF and MAY_MOUNT, "needs BTF and CAP_SYS_ADMIN")
    def test_functions_that_btf_does_not_name(self):
        with mock.patch.object(btfheaders, "BCC_FUNCTIONS", ["bpf_probe_read_kernel", "no_such_function"]):
            symbols = btfheaders.compiled(TYPES, lambda: {"": pathlib.Path("/proc/kallsyms").read_text()[:1 << 17]})[""]
        self.assertGreater(symbols.count("\n"), 1000)

    def mounts(self):
        """What is mounted of the kinds that btfheaders mounts; others mount network namespaces meanwhile."""
        lines = pathlib.Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if line.split()[2] in ("tmpfs", "tracefs", "debugfs")]

    @unittest.skipUnless(MAY_MOUNT, "needs CAP_SYS_ADMIN")
    def test_nothing_stays_after_kill(self):
        with tempfile.TemporaryDirectory() as folder:
            program = "import btfheaders, os; btfheaders.compiled(%r, lambda: os.kill(os.getpid(), 9))" % TYPES
            before = self.mounts()
            killed = subprocess.run([live.PYTHON, "-c", program], env={**os.environ, "TMPDIR": folder}, check=False,
                                    stderr=subprocess.PIPE, text=True)
            self.assertIn("\nOSError: the compiler was killed by signal 9\n", killed.stderr)
            self.assertEqual(os.listdir(folder), [])
            self.assertEqual(before, self.mounts())

    def test_without_a_mount_namespace(self):
        def compile_it():
            return {"tree": os.environ.get("BCC_KERNEL_SOURCE", "")}
        with mock.patch.object(btfheaders, "private_mounts", return_value=None):
            before = process_state()
            tree = btfheaders.compiled(TYPES, compile_it)["tree"]
            self.assertTrue(tree.startswith(tempfile.gettempdir()) or not HAS_BTF)
            self.assertEqual(before, process_state())

    def test_errors_keep_their_kind_and_get_a_reason(self):
        def compile_it():
            os.write(2, b"first\nsome.c:1:2: error: no such thing\n")
            raise ValueError("bcc failed")
        before = process_state()
        self.fails(compile_it, ValueError, "^bcc failed: some.c:1:2: error: no such thing$")
        self.assertEqual(before, process_state())

    def test_without_capabilities(self):
        def compile_it():
            raise OSError("bcc failed")
        self.fails(compile_it, OSError, "^bcc failed: needs root, or the capabilities CAP_BPF and CAP_PERFMON",
                   needed=1 << 60)

    def test_a_reason_on_stdout(self):
        def compile_it():
            ctypes.CDLL(None).printf(b"it failed for a reason\n")
            raise OSError("bcc failed")
        self.fails(compile_it, OSError, "^bcc failed: it failed for a reason$")

    def test_errors_that_say_it_themselves(self):
        def compile_it():
            return open("/nonexistent", encoding="ascii")
        self.assertEqual(str(self.fails(compile_it, FileNotFoundError, "")),
                         "[Errno 2] No such file or directory: '/nonexistent'")

    def test_exceptions_that_end_a_program(self):
        self.fails(sys.exit, SystemExit, "")
        def interrupted():
            raise KeyboardInterrupt
        self.fails(interrupted, KeyboardInterrupt, "")

    def test_interrupted_meanwhile(self):
        def compile_it():
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(10)
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        before = descriptors()
        self.fails(compile_it, KeyboardInterrupt, "")       # by the handler: a background job ignores the signal
        self.assertEqual(before, descriptors())

    def test_descriptors(self):
        """Those with a name, and what bcc has opened in the kernel; nothing else."""
        def compile_it():
            ends = os.pipe()
            return {"end": ends[0], "text": "7", "event": os.eventfd(7)} if hasattr(os, "eventfd") else {"end": ends[0]}
        before = descriptors()
        found = btfheaders.compiled(TYPES, compile_it)
        self.assertEqual(found.pop("text", "7"), "7")
        self.assertEqual(sorted(map(str, found.values())), sorted({*descriptors()} - {*before}))
        for fd in found.values():
            os.close(fd)

    def test_what_is_printed_is_held_back(self):
        program = ("import btfheaders, os, ctypes\n"
                   "btfheaders.compiled(%r, lambda: {'': (os.write(1, b'a'), os.write(2, b'b'),"
                   " ctypes.CDLL(None).printf(b'c'))})\n"
                   "print('out'); os.write(2, b'err')" % TYPES)
        run = subprocess.run([live.PYTHON, "-c", program], capture_output=True, text=True, check=True)
        self.assertEqual((run.stdout, run.stderr), ("out\n", "err"))

    def test_no_types_at_all(self):
        def compile_it():
            ctypes.CDLL(None).printf(b"Unable to find kernel headers. Try something.\n")
            raise Exception("Failed to compile BPF module <text>")
        for what, why in ({"VMLINUX_BTF": "/nonexistent"}, "this kernel has no BTF (/nonexistent)"), (
                          {"load_libbpf": mock.Mock(side_effect=OSError("no libbpf"))}, "no libbpf"):
            with mock.patch.multiple(btfheaders, **what):
                if not os.path.exists(btfheaders.VMLINUX_BTF) and "libbpf" in why:
                    continue
                error = self.fails(compile_it, OSError, "no kernel types")
                self.assertEqual(str(error), "no kernel types (%s): install linux-headers-%s (Debian, Ubuntu) or "
                                             "kernel-devel (Fedora, RHEL)" % (why, os.uname().release))

    def test_a_tree_of_the_user_that_is_none(self):
        def compile_it():
            ctypes.CDLL(None).printf(b"Unable to find kernel headers. Try something.\n")
            raise Exception("Failed to compile BPF module <text>")
        with mock.patch.dict(os.environ, BCC_KERNEL_SOURCE="/nonexistent"):
            self.fails(compile_it, OSError, r"^no kernel headers in BCC_KERNEL_SOURCE \(/nonexistent\)$")

    def test_headers_instead(self):
        with mock.patch.object(btfheaders, "VMLINUX_BTF", "/nonexistent"):
            self.assertIsNone(btfheaders.compiled(TYPES, lambda: {"": os.environ.get("BCC_KERNEL_SOURCE")})[""])

    def test_no_process(self):
        with mock.patch("os.fork", side_effect=BlockingIOError(11, "Resource temporarily unavailable")):
            before = process_state()
            self.fails(print, BlockingIOError, "temporarily")
            self.assertEqual(before, process_state())


if __name__ == "__main__":
    unittest.main()
