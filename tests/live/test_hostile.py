"""Names that want to do harm: comm is any 15 bytes a user likes."""
import csv
import json
import socket
import subprocess

import live
import workload

NAMES = [b"\x1b[2J\x1b[31mred", b"two\nlines", b"tab\there", b'quote"\'', b"a,b=c;d", b"back\\slash",
         b"\xff\xfe\x80 bad", "gr\u00fc\u00df \u2192".encode(), b"\x7f\x9b31m", b"=cmd|'/C'!A0", b"%s%n%d",
         b"  spaces  ", b"{\"pid\": 1}", b"a\rb"]
# Each tool, and in how many ways it prints text.
FORMS = {"tcplife": [["-w"], ["-s"], []], "tcpaccept": [[], ["-t"]], "tcpv4connect": [[], ["-U"]],
         "deeptcptracer": [[], ["-K"]]}


def visit(port):
    """Connections by processes of these names, to a server that takes each name in turn, too."""
    def client(name):
        with open("/proc/self/comm", "wb") as comm:
            comm.write(name)
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.recv(1)
    for name in NAMES:
        workload.wait(workload.spawn("to be named", None, client, name))


def serve(listener):
    for name in NAMES:
        with open("/proc/thread-self/comm", "wb") as comm:
            comm.write(name)
        sock = listener.accept()[0]
        sock.send(b"x")
        sock.close()


class Hostile(live.Alone):
    def trace(self, *commands):
        """Tracers of these commands that have seen the names."""
        tracers = [live.Tracer(tool, *options, "--netns", self.netns) for tool, *options in commands]
        with socket.create_server(("127.0.0.1", 0)) as listener, live.tracing(*tracers):
            server = workload.spawn("server", None, serve, listener)
            visit(listener.getsockname()[1])
            workload.wait(server)
        return tracers

    def test_a_terminal_sees_only_printable_characters(self):
        for tracer in self.trace(*[(tool, *form) for tool, forms in FORMS.items() for form in forms]):
            text = "".join(tracer.lines)
            self.assertTrue(text.isascii() and text.isprintable(), repr(text))
            self.assertIn("\\x1b", text)

    def test_json_gives_the_name_back(self):
        for tracer in self.trace(*[(tool, "--json") for tool in FORMS]):
            lines = [line for line in tracer.objects if line["comm"] is not None]
            self.assertLessEqual(set(NAMES), set(map(live.comm, lines)), tracer.command)
            for line in lines:
                self.assertEqual(line["comm"], live.comm(line).decode(errors="backslashreplace"))
                self.assertEqual("comm_hex" in line, "\\x" in line["comm"] and b"\\x" not in live.comm(line))
            self.assertTrue(tracer.stdout.isascii())
            strings = subprocess.run(["jq", "-r", ".comm // empty | @json"], input=tracer.stdout, capture_output=True,
                                     text=True, check=True).stdout.splitlines()
            self.assertEqual([json.loads(text) for text in strings], [line["comm"] for line in lines])

    def test_csv_gives_the_name_back(self):
        tracer, = self.trace(("tcplife", "-s"))
        rows = list(csv.reader(tracer.stdout.splitlines(keepends=True)))
        self.assertEqual({len(row) for row in rows}, {10})
        names = {row[1].encode("ascii").decode("unicode_escape").encode("latin-1") for row in rows[1:]}
        self.assertLessEqual(set(NAMES), names)
