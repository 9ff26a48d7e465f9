"""What the tools say was lost, while the kernel goes on counting between any two steps of theirs."""
import mmap
import os
import random
import re
import unittest
from unittest import mock

import ctext

FIRST, SECOND, DESTROY = "tracepoint_set_state_first", "tracepoint_set_state_second", "tracepoint_destroy"
ACCEPT = "kprobe_accept"
FUNCTIONS = [FIRST, SECOND, DESTROY, ACCEPT]


class Kernel:
    """Programs that are skipped, each with an open file for its number, and the counters of the C text."""

    def __init__(self, tool, chance):
        self.tool, self.chance = tool, chance
        flags = ctext.macros(tool)
        lost = os.memfd_create("lost")
        os.ftruncate(lost, mmap.PAGESIZE)
        self.counters = memoryview(mmap.mmap(lost, 0)).cast("Q")
        self.fds = {"lost": lost, **{name: os.memfd_create(name) for name in FUNCTIONS}}
        self.rescued, self.skipped = int(flags["RESCUED"]), int(flags["SKIPPED"])
        self.misses = dict.fromkeys(FUNCTIONS, 0)
        self.lost = dict.fromkeys(tool.LOSSES, 0)       # the truth
        self.second = 0         # events whose first program was skipped, and whose second has not run yet
        self.said, self.now = [], 10 ** 9

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

    def open(self, path, _flags):
        """Returns the descriptor itself, for pread()."""
        return int(path.rpartition("/")[2])

    def pread(self, fd, *_):
        self.go_on()
        name, = [name for name in FUNCTIONS if self.fds[name] == fd]
        text = b"prog_type:\ttracing\nrecursion_misses:\t%d\n" % self.misses[name]
        self.go_on()
        return text

    def start(self):
        with mock.patch("os.open", self.open), mock.patch("os.pread", self.pread), mock.patch.object(self, "go_on"):
            self.reporter = self.tool.open_losses(self.fds)

    def report(self, *in_all):
        """A second later."""
        self.now += 1
        with mock.patch("os.pread", self.pread), mock.patch.object(self.tool, "say", self.said.append), \
                mock.patch("time.monotonic", lambda: self.now):
            self.reporter(*in_all)

    def is_calm(self):
        """From now on, nothing happens any more."""
        self.rescue()
        self.go_on = lambda: None


class Losses(unittest.TestCase):
    def kernels(self, seeds=1):
        for tool in ctext.TOOLS:
            for seed in range(seeds):
                with mock.patch.dict(tool.LOST, clear=True):
                    kernel = Kernel(tool, random.Random(seed))              # noqa: S311
                    kernel.misses[FIRST] = 7            # before all programs were attached
                    kernel.start()
                    yield kernel, tool
                    for fd in kernel.fds.values():
                        os.close(fd)

    def test_not_twice_in_a_second(self):
        for kernel, _ in self.kernels():
            kernel.is_calm()
            kernel.report()
            kernel.counters[0] += 1
            kernel.now -= 0.5
            kernel.report()         # half a second after the one before
            self.assertEqual(kernel.said, [])
            kernel.report()
            self.assertEqual(len(kernel.said), 1)

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
            self.assertLessEqual(tool.HARMLESS, set.union(*programs.values()))
            self.assertLessEqual({name for name in programs[tool] if name.endswith("_second")}, tool.HARMLESS)


if __name__ == "__main__":
    unittest.main()
