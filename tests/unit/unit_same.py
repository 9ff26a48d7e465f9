"""tests/static/same.py: whatever differs between the tools is noticed, and put right with --copy."""
import contextlib
import io
import pathlib
import tempfile
import unittest
from unittest import mock

import ctext
import live
import same

FILES = [name + ".py" for name in ctext.NAMES.split()]
HEADING = "# -------- Shared from here on"
PART = "# ---- arguments ----\n"
FOR_C = 'shared_text = r"""\n'


class Same(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.texts = {name: (live.ROOT / name).read_bytes() for name in FILES}
        self.restore()

    def restore(self):
        for name, text in self.texts.items():
            (self.folder / name).write_bytes(text)

    def same(self, *options):
        """Returns the exit status and what is printed."""
        argv = ["same.py", *options, *FILES]
        argv = [str(self.folder / word) if word in FILES else word for word in argv]
        with mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                return int(same.main()), said.getvalue()
            except SystemExit:
                return 1, said.getvalue()

    def change(self, before, after, file="tcpaccept.py"):
        """Changes the first such text in the shared parts, or above them if it is not in there."""
        self.restore()
        text = self.texts[file].decode()
        place = text.find(before, text.index(HEADING))
        place = text.index(before) if place < 0 else place
        (self.folder / file).write_text(text[:place] + after + text[place + len(before):])

    def is_as_before(self):
        return all((self.folder / name).read_bytes() == text for name, text in self.texts.items())

    def test_the_tools(self):
        status, said = self.same()
        self.assertEqual((status, said.count("\n")), (0, len(FILES)), said)
        for line, name in zip(said.splitlines(), FILES):
            self.assertRegex(line, r"^%s +%d lines: +\d+ shared, +\d+ its own$" % (name, self.texts[name].count(b"\n")))
            total, shared, its_own = (int(word) for word in line.split() if word.isdigit())
            self.assertEqual(total, shared + its_own)

    CHANGES = [
        ("    u64 place, event;", "    u64 event, place;"),                                 # a struct
        ("#define READ(p, member)", "#define READ(p,member)"),                              # a macro
        ("bpf_probe_read_kernel(&value, sizeof(value)", "bpf_probe_read_kernel(&value, 4"), # in its second line
        ("#include <net/sock.h>", "#include <net/tcp.h>"),
        ("import select\n", "import select, ast\n"),
        ("import struct\n", ""),
        ("#else\n    return bpf_get_current_pid_tgid() >> 32;", "#else\n    return bpf_get_current_pid_tgid();"),
        ("/* The process ID that", "/* A process ID that"),                                 # a comment
        ("def say(", "def tell("),
        ("\n\ndef say(", "\n\n\ndef say("),                                                 # an empty line
        ("    add(\"--ebpf\"", "     add(\"--ebpf\""),
        ("if __name__ == \"__main__\":      # blocked", "if __name__ == '__main__':      # blocked"),
        ("    main()\n", "    main()\n    main()\n"),                                       # the very end
        ("# ---- main ----\n", ""),                     # a heading goes: its text is at the end of another part
        ("# ---- main ----\n", "# --- main ----\n"),
    ]

    def test_changes_of_a_part(self):
        for before, after in self.CHANGES:
            self.change(before, after)
            status, said = self.same()
            self.assertEqual(status, 1, (before, said))
            self.assertIn("tcpaccept.py", said.split("\n", len(FILES))[-1])

    def test_copy(self):
        """Restores them byte for byte, from any of the tools that have them."""
        for before, after in self.CHANGES[:-2]:
            self.change(before, after)
            self.assertEqual(self.same("--copy", "tcplife.py")[0], 0, before)
            self.assertTrue(self.is_as_before(), before)

    def test_copy_of_a_change(self):
        self.change("def say(", "def tell(")
        changed = (self.folder / "tcpaccept.py").read_bytes()
        self.assertEqual(self.same("--copy", "tcpaccept.py")[0], 0)
        for name, text in self.texts.items():
            self.assertEqual((self.folder / name).read_bytes(), text.replace(b"def say(", b"def tell("))
        self.assertEqual((self.folder / "tcpaccept.py").read_bytes(), changed)

    def test_nothing_to_copy(self):
        for name in FILES:
            for _ in range(2):
                self.assertEqual(self.same("--copy", name)[0], 0)
                self.assertTrue(self.is_as_before(), name)

    def test_odd_characters_stay(self):
        """Python knows more ends of a line than an editor does."""
        for file in FILES[:2]:
            self.texts[file] = self.texts[file].replace(PART.encode(), (PART + "# \f \x1c \u2028\n").encode())
        self.restore()
        self.same("--copy", FILES[0])
        self.assertEqual((self.folder / FILES[0]).read_bytes(), self.texts[FILES[0]])
        self.assertEqual((self.folder / FILES[1]).read_bytes(), self.texts[FILES[1]])

    def test_wrong_headings(self):
        """They are noticed, and nothing is copied from there."""
        twice = self.texts["tcpaccept.py"].decode()
        twice = twice[twice.index(PART):twice.index("# ---- filters ----")]
        for before, after, why in (
                (PART, "# ---- argumnts ----\n", "in no other tool: # ---- argumnts ----"),
                (PART, "# ---- arguments ---\n", "neither a part nor a comment: # ---- arguments ---"),
                (PART, "#---- arguments ----\n", "neither a part nor a comment: #---- arguments ----"),
                (PART, twice + PART, "more than once: # ---- arguments ----"),
                ("/* ---- losses ---- */", "/* --- losses -- */", "neither a part nor a comment: /* --- losses -- */"),
                ("# ---- starting ----\n", "", "in no part: import signal"),
                ("# ---- tcpaccept ----\n", "# ---- tcpacept ----\n", "not once: # ---- tcpaccept ----"),
                ("# ---- tcpaccept ----\n", "", "not once: # ---- tcpaccept ----"),
                (HEADING, "# Shared from here on", "not once: " + HEADING),
                (FOR_C, FOR_C + "int x;\n", "in no part: int x;"),
                (FOR_C + "/* ---- members ---- */\n", FOR_C, "in no part: #include <linux/errqueue.h>"),
                ("\nprobes_text", "import ast\n\nprobes_text", "in no part: import ast"),
                (FOR_C, "import ast\n" + FOR_C, "in no part: import ast")):
            with self.subTest(before=before, after=after):
                self.change(before, after)
                changed = (self.folder / "tcpaccept.py").read_bytes()
                status, said = self.same()
                self.assertEqual(status, 1)
                self.assertIn("tcpaccept.py: %s\n" % why, said)
                if "in no other tool" not in why:
                    self.assertEqual(self.same("--copy", "tcpaccept.py")[0], 1)
                    self.assertEqual((self.folder / "tcplife.py").read_bytes(), self.texts["tcplife.py"])
                self.assertEqual((self.folder / "tcpaccept.py").read_bytes(), changed)


if __name__ == "__main__":
    unittest.main()
