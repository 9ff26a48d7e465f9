"""The reader of the ring buffer, on a file with the layout that Documentation/bpf/ringbuf.rst describes."""
import mmap
import os
import random
import struct
import unittest
from unittest import mock

import ctext

BUSY = 1 << 31                  # BPF_RINGBUF_BUSY_BIT, include/uapi/linux/bpf.h
PAGE = mmap.PAGESIZE


class Ring:
    """What the kernel does, for records that hold a number again and again. A record that is not full has ones."""

    def __init__(self, tool, start):
        """start: how many records have been written and read already."""
        self.size, self.length = PAGE, tool.RECORD.size
        self.map_fd = os.memfd_create("ring")
        os.ftruncate(self.map_fd, 2 * PAGE + 2 * self.size)
        self.memory = mmap.mmap(self.map_fd, 0)
        self.busy, self.number, self.produced = [], start, start * self.length
        self.put_position(0)
        self.put_position(PAGE)
        with mock.patch.object(tool, "RING_PAGES", 1):
            self.reader = tool.open_events({"events": self.map_fd}, tool.RECORD)

    def put_position(self, offset):
        struct.pack_into("L", self.memory, offset, self.produced)

    def consumed(self):
        return struct.unpack_from("L", self.memory)[0] // self.length

    def put(self, place, data):
        """The kernel maps the data twice in a row; a file needs two copies."""
        for n, byte in enumerate(data, place):
            self.memory[2 * PAGE + n % self.size] = self.memory[2 * PAGE + self.size + n % self.size] = byte

    def reserve(self):
        if self.produced + self.length - self.consumed() * self.length > self.size - 1:
            return False
        self.put(self.produced, struct.pack("II", self.length - 8 | BUSY, 0) + b"\xff" * (self.length - 8))
        self.busy.append((self.produced, self.number))
        self.number += 1
        self.produced += self.length
        self.put_position(PAGE)
        return True

    def commit(self, nth=0):
        place, number = self.busy.pop(nth)
        self.put(place + 8, struct.pack("Q", number) * (self.length // 8 - 1))
        self.put(place, struct.pack("I", self.length - 8))

    def write(self):
        """Returns whether there was room for one more record."""
        has_room = self.reserve()
        if has_room:
            self.commit()
        return has_room

    def read(self, meanwhile=lambda: None):
        """Returns the numbers of the records that the tool reads. meanwhile: called at each of its barriers."""
        with mock.patch("time.sleep", lambda _: meanwhile()):
            return self.numbers(self.reader())

    def numbers(self, taken):
        found = []
        for length, _, *values in struct.Struct("II%dQ" % (self.length // 8 - 1)).iter_unpack(taken):
            assert length == self.length - 8 and len(set(values)) == 1, (length, values)
            found.append(values[0])
        return found


class Reader(unittest.TestCase):
    def rings(self, start=0):
        for tool in ctext.RINGS:
            ring = Ring(tool, start)
            self.addCleanup(os.close, ring.map_fd)
            yield ring

    def test_nothing(self):
        for ring in self.rings(7):
            self.assertEqual((ring.read(), ring.consumed()), ([], 7))

    def test_a_batch(self):
        for ring in self.rings():
            for _ in range(3):
                ring.write()
            self.assertEqual((ring.read(), ring.consumed()), ([0, 1, 2], 3))
            self.assertEqual((ring.read(), ring.consumed()), ([], 3))

    def test_a_record_that_is_still_written(self):
        """It holds back those behind it, which are whole already."""
        for ring in self.rings():
            for _ in range(4):
                ring.reserve()
            ring.commit(0)
            ring.commit(1)
            self.assertEqual((ring.read(), ring.consumed()), ([0], 1))
            self.assertEqual((ring.read(), ring.consumed()), ([], 1))
            ring.commit(0)
            self.assertEqual((ring.read(), ring.consumed()), ([1, 2], 3))
            ring.commit(0)
            self.assertEqual((ring.read(), ring.consumed()), ([3], 4))

    def test_a_full_ring_that_wraps(self):
        """Wherever in the buffer it starts, and where the positions do not fit into 32 bits any more."""
        for start in 0, 1, 50, 99, 1 << 30:
            for ring in self.rings(start):
                for _ in range(5):
                    before = ring.number
                    while ring.write():
                        pass
                    self.assertEqual(ring.number - before, (ring.size - 1) // ring.length)
                    self.assertEqual(ring.read(), list(range(before, ring.number)))
                    self.assertEqual(ring.consumed(), ring.number)

    def test_what_was_read_stays(self):
        """The kernel writes to that place as soon as the position has moved."""
        for ring in self.rings():
            ring.write()
            taken = ring.reader()
            ring.put(0, b"x" * ring.size)
            self.assertEqual(ring.numbers(taken), [0])

    def test_other_cpus_at_every_moment(self):
        """Each record comes once, whole and in order, whatever happens between two steps of the reader."""
        chance = random.Random(1)               # noqa: S311
        for ring in self.rings():
            def others(ring=ring):
                for _ in range(chance.randrange(5)):
                    if chance.random() < 0.5:
                        ring.reserve()
                    elif ring.busy:
                        ring.commit(chance.randrange(len(ring.busy)))
            numbers = []
            for _ in range(500):
                others()
                numbers += ring.read(others)
            while ring.busy:
                ring.commit()
            numbers += ring.read()
            self.assertGreater(len(numbers), 300)
            self.assertEqual(numbers, list(range(ring.number)))


if __name__ == "__main__":
    unittest.main()
