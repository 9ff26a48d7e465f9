"""What the tools say was lost, while the kernel goes on counting between any two steps of theirs."""
import io
import random
import re
import types
import unittest
from unittest import mock

import ctext

FIRST, SECOND, DESTROY = b"tracepoint_set_state_first", b"tracepoint_set_state_second", b"tracepoint_destroy"
ACCEPT = b"kprobe_accept"
FUNCTIONS = [FIRST, SECOND, DESTROY, ACCEPT]


class Kernel:
    """Programs that are skipped, each with the number of its descriptor, and the counters of the C text."""

    def __init__(self, tool, chance):
        self.tool, self.chance = tool, chance
        flags = ctext.macros(tool)
        self.counters = [0] * (int(flags["STARTED"]) + 1)
        self.rescued, self.skipped = int(flags["RESCUED"]), int(flags["SKIPPED"])
        self.funcs = {name: types.SimpleNamespace(fd=fd) for fd, name in enumerate(FUNCTIONS)}
        self.misses = dict.fromkeys(FUNCTIONS, 0)
        self.lost = dict.fromkeys(tool.LOSSES, 0)       # the truth
        self.second = 0         # events whose first program was skipped, and whose second has not run yet
        self.said = []

    def go_on(self):
        """Between two steps of the tool. A second program runs right after the first: it has by the next of these."""
        self.rescue()
        for _ in range(self.chance.randrange(4)):
            self.chance.choice([self.skip, self.mark_taken, self.rescue, self.lose, self.skip_harmless])()

    def skip(self):
        self.misses[FIRST] += 1
        self.second += 1

    def mark_taken(self):
        self.counters[self.skipped] += 1
        self.second += 1

    def rescue(self):
        self.counters[self.rescued] += self.second
        self.second = 0

    def lose(self):
        what = self.chance.choice(list(self.lost))
        self.lost[what] += 1
        if what != "SKIPPED":
            self.counters[list(self.lost).index(what)] += 1
        elif self.chance.random() < 0.5:
            self.misses[ACCEPT] += 1
        else:                   # both programs
            self.misses[FIRST] += 1
            self.misses[SECOND] += 1

    def skip_harmless(self):
        self.misses[self.chance.choice([SECOND, DESTROY])] += 1

    def open(self, path):
        self.go_on()
        text = io.StringIO("prog_type:\ttracing\nrecursion_misses:\t%d\n" %
                           self.misses[FUNCTIONS[int(path.rpartition("/")[2])]])
        self.go_on()
        return text

    def __getitem__(self, name):
        assert name == "lost", name
        return self

    def values(self):
        for n in range(len(self.counters)):
            yield types.SimpleNamespace(value=self.counters[n])
            self.go_on()

    def report(self, *in_all):
        with mock.patch.object(self.tool, "open", self.open, create=True), \
                mock.patch.object(self.tool, "say", self.said.append):
            self.tool.report(self, *in_all)

    def is_calm(self):
        """From now on, nothing happens any more."""
        self.rescue()
        self.go_on = lambda: None


class Losses(unittest.TestCase):
    def kernels(self, seeds=1):
        for tool in ctext.TOOLS:
            for seed in range(seeds):
                with mock.patch.dict(tool.LOST, clear=True), mock.patch.object(tool, "SKIPS", []):
                    kernel = Kernel(tool, random.Random(seed))              # noqa: S311
                    kernel.misses[FIRST] = 7            # before all programs were attached: see load()
                    with mock.patch.object(kernel, "go_on"):
                        kernel.report()
                    yield kernel, tool

    def test_nothing(self):
        for kernel, tool in self.kernels():
            kernel.is_calm()
            kernel.report()
            kernel.report(True)
            self.assertEqual((kernel.said, set(tool.LOST.values())), ([], {0}))

    def test_each_once_and_at_the_end_in_all(self):
        for kernel, tool in self.kernels():
            kernel.is_calm()
            texts = list(tool.LOSSES.values())
            for number in 3, 0, 2:
                kernel.counters[0] += number
                kernel.misses[FIRST] += number
                kernel.report()
            kernel.misses[FIRST] += 4
            kernel.report(True)
            self.assertEqual(kernel.said, ["3 " + texts[0], "3 " + texts[-1], "2 " + texts[0], "2 " + texts[-1],
                                           "4 " + texts[-1], "in all 5 " + texts[0], "in all 9 " + texts[-1]])

    def test_what_the_second_program_did_is_not_lost(self):
        for kernel, _ in self.kernels():
            for change in kernel.skip, kernel.mark_taken, kernel.skip_harmless:
                change()
            kernel.is_calm()
            kernel.report(True)
            self.assertEqual(kernel.said, [])

    def test_while_it_goes_on(self):
        """Never more than the truth, no number falls, and at the end it is the truth."""
        for kernel, tool in self.kernels(seeds=20):
            before = {}
            for _ in range(100):
                kernel.report()
                counts = dict(zip(tool.LOSSES, tool.LOST.values()))
                for what, count in counts.items():
                    if what != "SKIPPED":
                        self.assertLessEqual(count, kernel.lost[what])
                    self.assertGreaterEqual(count, before.get(what, 0))
                self.assertLessEqual(counts["SKIPPED"], kernel.lost["SKIPPED"])
                before = counts
            kernel.is_calm()
            kernel.report(True)
            self.assertEqual(dict(zip(tool.LOSSES, tool.LOST.values())), kernel.lost)
            for what, text in tool.LOSSES.items():
                numbers = [int(said.split()[0]) for said in kernel.said if said.split(" ", 1)[1] == text]
                self.assertEqual(sum(numbers), kernel.lost[what], text)
                self.assertEqual(kernel.said.count("in all %d %s" % (kernel.lost[what], text)), 1)
                self.assertNotIn(0, numbers)

    def test_the_names_of_the_harmless(self):
        programs = {tool: set(re.findall(r"(?m)^int (\w+)\(", tool.program(ctext.parse(tool)))) for tool in ctext.TOOLS}
        for tool in ctext.TOOLS:
            harmless = {name.decode() for name in tool.HARMLESS}
            self.assertLessEqual(harmless, set.union(*programs.values()))
            self.assertLessEqual({name for name in programs[tool] if name.endswith("_second")}, harmless)


if __name__ == "__main__":
    unittest.main()
