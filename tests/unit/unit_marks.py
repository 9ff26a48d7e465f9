"""The two programs of a state change: whatever interrupts whatever, one of them does the work, or it counts as lost."""
import ctypes
import itertools
import random
import re
import unittest
from unittest import mock

import ctext

# bcc's maps, as far as they are used here. There is one CPU.
MAPS = """
#define BPF_ARRAY(name, type, size)                                                                            \\
    type name##_values[size];                                                                                   \\
    static type *name##_lookup(void *key) { return &name##_values[*(u32 *)key]; }                               \\
    static struct { type *(*lookup)(void *); int (*update)(void *, void *); } name = {name##_lookup, 0}
#define BPF_F_TABLE(kind, key_type, type, name, size, flags) BPF_ARRAY(name, type, size)
#define BPF_PERCPU_ARRAY BPF_ARRAY
#define BPF_HASH(name, key_type, type, size)                                                                    \\
    static struct { key_type key; type value; } name##_items[size];                                             \\
    static int name##_count;                                                                                    \\
    static type *name##_lookup(void *key)                                                                       \\
    {                                                                                                           \\
        for (int n = 0; n < name##_count; n++)                                                                  \\
            if (name##_items[n].key == *(key_type *)key)                                                        \\
                return &name##_items[n].value;                                                                  \\
        return NULL;                                                                                            \\
    }                                                                                                           \\
    static int name##_update(void *key, void *value)                                                            \\
    {                                                                                                           \\
        type *old = name##_lookup(key);                                                                         \\
        if (!old && name##_count == size)                                                                       \\
            return -1;                                                                                          \\
        if (!old)                                                                                               \\
            name##_items[name##_count++].key = *(key_type *)key;                                                \\
        *name##_lookup(key) = *(type *)value;                                                                   \\
        return 0;                                                                                               \\
    }                                                                                                           \\
    static struct { type *(*lookup)(void *); int (*update)(void *, void *); } name =                            \\
        {name##_lookup, name##_update}
#define NULL ((void *)0)
"""
PLACES = range(0xffffc90000000000, 0xffffc90000000000 + 40 * 0x68, 0x68)        # where ctx may be


class Kernel:
    """Events that nest, and programs that are skipped while they run. Few sockets and states come again and again."""

    def __init__(self, tool, chance, is_preemptible, marks):
        with mock.patch.multiple(tool, PREEMPTIBLE=is_preemptible, MAX_MARKS=marks):
            flags = tool.cflags(ctext.parse(tool))
            self.macros = {name: int(text) for name, text in ctext.macros(tool).items() if text.isdecimal()}
        text = re.search(r"(?s)/\* ---- losses ---- \*/.*(?=/\* ---- owners)", tool.shared_text)[0]
        self.lib = ctext.library_of(MAPS + text + "int mine(void *ctx, u64 event, int first)\n"
                                    "{\n    return is_mine(ctx, event, first);\n}\n", *flags)
        self.counters = (ctypes.c_ulonglong * (self.macros["STARTED"] + 1)).in_dll(self.lib, "lost_values")
        self.chance, self.running, self.misses = chance, set(), 0
        self.places = list(PLACES)
        self.works = []         # of each event, how often its work was done
        self.number = lambda: chance.randrange(1, 4)

    def start(self):
        self.counters[self.macros["STARTED"]] = 1

    def counted(self):
        return self.misses + self.counters[self.macros["SKIPPED"]] - self.counters[self.macros["RESCUED"]]

    def interrupted(self, depth):
        while depth < 4 and self.chance.random() < 0.3:
            self.event(depth + 1)

    def program(self, is_first, place, event, depth):
        """Returns whether it does the work."""
        if is_first in self.running:
            self.misses += is_first
            return False
        self.running.add(is_first)
        self.interrupted(depth)
        does_it = self.lib.mine(ctypes.c_void_p(place), ctypes.c_ulonglong(event), int(is_first))
        self.interrupted(depth)
        self.running.remove(is_first)
        return does_it

    def event(self, depth=0):
        place, event = self.places.pop(self.chance.randrange(len(self.places))), self.number()
        work = self.program(True, place, event, depth)
        self.interrupted(depth)
        work += self.program(False, place, event, depth)
        self.works.append(work)
        self.places.append(place)


class Marks(unittest.TestCase):
    def kernels(self, *all_marks):
        tool = ctext.TOOLS[0]           # the text is the same in all of them
        for is_preemptible in False, True:
            for marks in all_marks:
                kernel = Kernel(tool, random.Random(marks), is_preemptible, marks)          # noqa: S311
                kernel.start()
                yield kernel

    def test_nothing_nests(self):
        """The first program does it all; with too few marks the second may have to, but nothing is lost."""
        for kernel in self.kernels(256, 8, 1):
            kernel.interrupted = lambda depth: None
            for _ in range(100):
                kernel.event()
            self.assertEqual((set(kernel.works), kernel.counted()), ({1}, 0))
            if len(PLACES) < kernel.macros["MAX_MARKS"]:
                self.assertEqual(kernel.counters[kernel.macros["RESCUED"]], 0)

    def test_before_both_are_attached(self):
        for kernel in self.kernels(256):
            kernel.counters[kernel.macros["STARTED"]] = 0
            kernel.event()
            self.assertEqual((set(kernel.works), sum(kernel.counters)), ({0}, 0))

    def test_each_once_or_counted(self):
        for kernel in self.kernels(256, 8, 1):
            while len(kernel.works) < 10000:
                kernel.event()
                self.assertEqual(kernel.works.count(0), kernel.counted())
            self.assertEqual(set(kernel.works), {0, 1})
            self.assertGreater(kernel.counters[kernel.macros["RESCUED"]], 1000)

    def test_one_level_of_interrupts(self):
        """A softirq that interrupts a system call. Nothing is lost but for marks with the same place in the map."""
        for kernel in self.kernels(256):
            kernel.number = itertools.count(1).__next__
            deeper = kernel.interrupted
            kernel.interrupted = lambda depth, deeper=deeper: None if depth else deeper(3)
            while len(kernel.works) < 10000:
                kernel.event()
            self.assertLessEqual(set(kernel.works), {0, 1})
            self.assertEqual(kernel.works.count(0), kernel.counted())
            self.assertLess(kernel.works.count(0), 100)
            self.assertGreater(kernel.counters[kernel.macros["RESCUED"]], 1000)


if __name__ == "__main__":
    unittest.main()
