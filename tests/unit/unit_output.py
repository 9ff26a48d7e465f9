"""How the tools write: all of it, at whatever pace it is read, and never so that they wait for ever."""
import fcntl
import os
import re
import socket
import subprocess
import sys
import time
import unittest

import ctext

TOOL = ctext.TOOLS[0]           # the text is the same in all of them
STOP = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {0}.STOP_SIGNALS); signal.raise_signal(signal.SIGINT)\n"
LINES = "".join(["%07d\n" % n for n in range(1 << 17)])         # 1 MB


def start(code, **files):
    return subprocess.Popen([sys.executable, "-c", "import sys, %s\n%s" % (TOOL.PROGRAM, code.format(TOOL.PROGRAM))],
                            stdin=subprocess.PIPE, **files)


def full_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


class Output(unittest.TestCase):
    WRITE = "sys.exit({0}.write(''.join(['%07d\\n' % n for n in range(1 << 17)])))"

    def read_slowly(self, read):
        text = b""
        while True:
            part = read(50000)
            if not part:
                return text.decode()
            text += part
            time.sleep(0.005)

    def test_a_slow_reader(self):
        reader, writer = os.pipe()
        with start(self.WRITE, stdout=writer) as process:
            time.sleep(0.2)
            self.assertFalse(fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK)        # for those who share it
            os.close(writer)
            self.assertEqual(self.read_slowly(lambda size: os.read(reader, size)), LINES)
        os.close(reader)
        self.assertEqual(process.returncode, 0)

    def test_a_socket(self):
        ours, theirs = socket.socketpair()
        with ours, start(self.WRITE, stdout=theirs) as process:
            theirs.close()
            self.assertEqual(self.read_slowly(ours.recv), LINES)
        self.assertEqual(process.returncode, 0)

    def test_a_file(self):
        file = os.memfd_create("output")
        with start(self.WRITE, stdout=file) as process:
            pass
        self.assertEqual((os.pread(file, 2 << 20, 0).decode(), process.returncode), (LINES, 0))
        os.close(file)

    def test_nobody_reads_when_it_is_to_stop(self):
        reader, writer = full_pipe()
        before = time.monotonic()
        with start(STOP + self.WRITE, stdout=writer, stderr=subprocess.PIPE) as process:
            said = process.stderr.read().decode()
        self.assertEqual((said, process.returncode), ("%s: the output was not read to its end\n" % TOOL.PROGRAM, 1))
        self.assertLess(time.monotonic() - before, 20)
        os.close(reader)
        os.close(writer)

    def test_the_reader_has_gone(self):
        reader, writer = os.pipe()
        os.close(reader)
        with start("try: {0}.write('x')\nexcept BrokenPipeError: sys.exit(7)", stdout=writer) as process:
            os.close(writer)
        self.assertEqual(process.returncode, 7)


class Messages(unittest.TestCase):
    def test_standard_error_is_full(self):
        """The tool does not wait for it, and each message is printed then, or counted as missing."""
        reader, writer = full_pipe()
        code = "for n in range(5): {0}.say('no ' + str(n))\nprint(flush=True)\ninput()\n{0}.say('after')"
        with start(code, stdout=subprocess.PIPE, stderr=writer) as process:
            self.assertEqual(process.stdout.readline(), b"\n")
            os.read(reader, 1 << 20)
            time.sleep(0.5)
            process.communicate(b"\n")
        said = os.read(reader, 4096).decode().replace(TOOL.PROGRAM + ": ", "")
        missing = re.search(r"(\d+) messages missing here: standard error was full\nafter\n$", said)
        self.assertTrue(missing, said)
        self.assertEqual(said.count("no ") + int(missing[1]), 5)
        os.close(reader)
        os.close(writer)

    def test_standard_error_has_no_reader(self):
        reader, writer = os.pipe()
        os.close(reader)
        with start("{0}.say('x')\nsys.exit(7)", stderr=writer) as process:
            os.close(writer)
        self.assertEqual(process.returncode, 7)

    def test_the_last_message(self):
        with start("{0}.die('a: ü')", stderr=subprocess.PIPE) as process:
            said = process.stderr.read().decode()
        self.assertEqual((said, process.returncode), ("%s: a: ü\n" % TOOL.PROGRAM, 1))


if __name__ == "__main__":
    unittest.main()
