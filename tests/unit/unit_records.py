"""The records of the tools: struct event of the C text has the layout that its reader expects, and its names."""
import ast
import ctypes
import inspect
import re
import struct
import tempfile
import unittest

import ctext

# Where a line() calls a member other than the C text does; _: it does not need it.
OTHER_NAMES = {"tcplife": {"syn": "_", "listed": "_"}}
LEAVES = {"owner", "address"}           # structs that stay packed: owner_text() and address() take them so


def members(tool, name):
    """Returns the members of a struct in the C text, with those of the structs in it: ["session.born", ...]."""
    body = re.search(r"(?s)^struct %s \{(.*?)^\};" % name, ctext.plain_c(tool), re.MULTILINE)[1]
    found = []
    for declaration in re.sub(r"(?s)/\*.*?\*/", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*((?:struct )?\w+)\s+(.*)", declaration).groups()
        inner = kind.startswith("struct ") and kind[7:] not in LEAVES and members(tool, kind[7:])
        for member in re.findall(r"(\w+)(?:\[.*?\])?(?:, *|$)", names):
            found += ["%s.%s" % (member, name) for name in inner] if inner else [member]
    return found


def places_in_c(tool, name, *options):
    """Returns offset and size of each member, and the size of the struct, as the compiler has them."""
    names = members(tool, name)
    lib = ctext.library(tool, "int places[] = {%ssizeof(struct %s)};" % ("".join([
        "__builtin_offsetof(struct {0}, {1}), sizeof(((struct {0} *)0)->{1}), ".format(name, member)
        for member in names]), name), *options)
    *places, size = (ctypes.c_int * (2 * len(names) + 1)).in_dll(lib, "places")
    return list(zip(places[::2], places[1::2])), size


def places_in_python(form, header=0):
    """Returns the same of a struct.Struct, without the ring buffer's header."""
    pieces = re.findall(r"\d*s|\d*[A-Za-z]", form.format[1:])
    pieces = [piece for text in pieces for piece in ([text] if text[-1] in "sx" else [text[-1]] * int(text[:-1] or 1))]
    sizes = [struct.calcsize(form.format[0] + piece) for piece in pieces]
    places = [(sum(sizes[:n]) - header, size) for n, size in enumerate(sizes) if pieces[n][-1] != "x"]
    return places, form.size - header


class Layout(unittest.TestCase):
    def test_the_compiler_agrees(self):
        for tool in ctext.RINGS:
            options = [[], ["-m"], ["-K"], ["-m", "-K"]] if tool.PROGRAM == "deeptcptracer" else [[]]
            for option in options:
                with self.subTest(tool=tool.PROGRAM, option=option):
                    args = ctext.parse(tool, *option)
                    form = tool.record_of(args) if hasattr(tool, "record_of") else tool.RECORD
                    self.assertEqual(places_in_python(form, 8), places_in_c(tool, "event", *option))

    def test_signs(self):
        """A number below zero is one in C and in Python."""
        for tool in ctext.RINGS:
            letters = re.findall(r"\d*[A-Za-z]", tool.RECORD.format[1:])[1:]
            letters = zip(members(tool, "event"), letters)
            signed = {name: letter.islower() for name, letter in letters if len(letter) == 1}
            lib = ctext.library(tool, "int signs[] = {%s};" % ",".join([
                "(__typeof__(((struct event *)0)->%s))-1 < 1" % name for name in signed]))
            self.assertEqual([*map(bool, (ctypes.c_int * len(signed)).in_dll(lib, "signs"))], [*signed.values()])

    def test_buckets_of_tcpchurn(self):
        tool = next(tool for tool in ctext.TOOLS if hasattr(tool, "BUCKET"))
        number, *counts = places_in_python(tool.BUCKET)[0]
        places, size = places_in_c(tool, "bucket")
        self.assertEqual((places, size), ([number, (counts[0][0], 8 * len(tool.COUNTS))], tool.BUCKET.size))

    def test_the_names_of_line(self):
        """Python unpacks the members in their order."""
        for tool in ctext.RINGS:
            tree = ast.parse(inspect.getsource(tool.line))
            unpacked, = (node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign) and
                         isinstance(node.value, ast.Name) and node.value.id == "record")
            names = [name.rpartition(".")[2] for name in members(tool, "event")]
            other = {"pad": "_", **OTHER_NAMES.get(tool.PROGRAM, {})}
            self.assertEqual([name.id for name in unpacked.elts], [other.get(name, name) for name in names], tool)

    def test_another_size_is_refused(self):
        """By the compiler: with a gap between two members, or with a member whose type has no format."""
        def said(tool, text, size):
            with tempfile.TemporaryDirectory() as folder:
                return ctext.compile_c(folder + "/a.so", text + check, *tool.cflags(ctext.parse(tool)),
                                       "-URECORD_SIZE", "-DRECORD_SIZE=%d" % size)
        for tool in ctext.RINGS:
            check, = re.findall(r"(?m)^_Static_assert\(.*\);$", tool.program(ctext.parse(tool)))
            text, size = ctext.plain_c(tool), int(ctext.macros(tool)["RECORD_SIZE"])
            self.assertEqual(said(tool, text, size), "")
            for wrong_text, wrong_size in ((text, size - 8), (text, size + 4), (re.sub(
                    r"(?m)^struct event \{$", "struct event { u8 gap;", text), size)):
                self.assertIn(re.search(r'"(.+)"', check)[1], said(tool, wrong_text, wrong_size), tool)


if __name__ == "__main__":
    unittest.main()
