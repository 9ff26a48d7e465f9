"""Every tool refuses invalid arguments: exit status 2 and argparse's usage, before anything is loaded."""
import contextlib
import importlib
import io
import os
import signal
import tempfile
import threading
import unittest

import ctext

PID = ["", "abc", "-1", "0", "1.5", "99999999", "\u0661", "1_0", "+1", "0x10"]
PORTS = ["", "0", "99999", "65536", "80,x", "80,", ",80", "-80", "80;81", "80-90", "8e1", "http", "\u0661"]
SECONDS = ["", "0", "-1", "1e3", "inf", "nan", "abc", "\u0661", "1_0", "99999999999"]
NETNS = ["", "0", "-1", "99999999999", "nosuchnamespace", "/etc/passwd", "/proc/self/ns/mnt", "/nonexistent",
         "../../etc/passwd"]
NETWORKS = ["", "host", "1.2.3", "10.0.0.0/33", "300.1.1.1", "::1/129", "fe80::x", "fe80::1%no/interface", "fe80::1%",
            "fe80::1%lo/64", "fe80::1%-1", "fe80::1%\u0661", "fe80::1%4294967296", "fe80::1%99999999999999999999",
            "10.0.0.1%lo", "\u0661.0.0.1", "10.0.0.1,"]
MAP = ["", "nosuch", "/sys/fs/bpf/nosuch", '/etc/pass"wd']
ALL = {"--netns": NETNS, "--duration": SECONDS}
ALL_LINES = ["--nosuch", "-z", "word", "--no-kprobe=yes", "--probes kprobe", "--ebpf=yes", "-h=yes"]
# By tool: values that an option refuses, by option ("": without a value); and other wrong command lines.
WRONG = {
    "tcplife": ({**ALL, "-p": PID, "-L": PORTS, "-D": PORTS, "--owner": ["", "nobody"]},
                ["-4 -6", "-s -w", "-s --json", "-w --json", "--prometheus a.txt", "--prometheus", "--prometheus=",
                 *["--prometheus a.prom " + option for option in (
                     "-w", "-s", "--json", "-c", "-x", "-T", "-t", "--rows 5", "--by-peer", "--histogram")]]),
    "tcpaccept": ({**ALL, "-p": PID, "-P": PORTS, "--cgroupmap": MAP, "--mntnsmap": MAP}, ["-4 -6"]),
    "tcpv4connect": ({**ALL, "-p": PID, "-P": PORTS, "-u": ["", "-1", "root", "4294967296", "1.0", "\u0661"]},
                     ["--failed", "--no-kprobe"]),
    "tcpchurn": ({**ALL, "-w": ["", "0", "-1", "x", "1,,2", "1,2,", "inf", "1e3", "0.0001,9999999"], "-i": SECONDS},
                 ["", "1 2", "-w 5", "1 -c --json", "1 --json --prometheus a.prom", "1 --prometheus a.txt",
                  "1 --prometheus", *PID[1:]]),
    "deeptcptracer": ({**ALL, "-N": NETNS, "-p": PID, "-s": NETWORKS, "-d": NETWORKS, "-S": PORTS, "-D": PORTS,
                       "-e": ["", "nosuch", "tcp_fin,", "tcp_fin(garbage", "tcp_fin -R"]}, ["-4 -6", "-m 5"]),
}


class Wrong(unittest.TestCase):
    def refused(self, tool, argv):
        """What the tool says of these arguments, which it has to refuse."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as caught:
            importlib.import_module(tool).parse_args(argv)
        self.assertEqual(caught.exception.code, 2)
        self.assertRegex(said.getvalue(), "(?s)^usage: %s .*\n%s: error: " % (tool, tool))
        return said.getvalue()

    def test_wrong_arguments(self):
        for tool, (options, lines) in WRONG.items():
            rest = ["1"] if tool == "tcpchurn" else []
            commands = [rest + [option, *value.split()] for option, values in options.items() for value in values]
            commands += [rest + line.split() for line in ALL_LINES]
            for argv in commands + [line.split() for line in lines]:
                with self.subTest(tool=tool, argv=argv):
                    self.refused(tool, argv)

    def test_all_tools(self):
        self.assertEqual(set(WRONG), set(ctext.NAMES.split()))

    def test_a_thread_is_no_process(self):
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        self.addCleanup(over.set)
        for tool in WRONG:
            with self.subTest(tool=tool):
                argv = [str(thread.native_id)] if tool == "tcpchurn" else ["-p", str(thread.native_id)]
                self.assertIn("%d is a thread of process %d\n" % (thread.native_id, os.getpid()),
                              self.refused(tool, argv))

    def test_a_process_may_have_any_name(self):
        """One that is not UTF-8, and looks like a line of /proc/PID/status."""
        def rename(name):
            with open("/proc/self/comm", "wb") as comm:
                comm.write(name)
        with open("/proc/self/comm", "rb") as comm:
            self.addCleanup(rename, comm.read()[:-1])
        rename(b"x Tgid:\t1 \xff")
        for tool in WRONG:
            argv = [str(os.getpid())] if tool == "tcpchurn" else ["-p", str(os.getpid())]
            self.assertEqual(importlib.import_module(tool).parse_args(argv).pid, [os.getpid()], tool)

    def test_a_fifo_is_no_namespace(self):
        """And nobody waits until it is written to."""
        def too_late(*_):
            raise AssertionError("the tool waits")
        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, too_late))
        self.addCleanup(signal.alarm, 0)
        with tempfile.TemporaryDirectory() as folder:
            os.mkfifo(folder + "/fifo")
            for tool in WRONG:
                with self.subTest(tool=tool):
                    signal.alarm(5)
                    self.refused(tool, ["--netns", folder + "/fifo"] + ["1"] * (tool == "tcpchurn"))


if __name__ == "__main__":
    unittest.main()
