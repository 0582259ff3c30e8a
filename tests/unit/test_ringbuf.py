"""Reading a BPF ring buffer: a file with the same pages stands for the kernel's."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final

import pytest

from pyforwarder.datapath.ebpf.ringbuf import RingBuffer

SIZE: Final = mmap.PAGESIZE
BUSY, DISCARDED = 1 << 31, 1 << 30


class Producer:
    """The kernel's side: consumer page, producer page, and the data, seen twice in a row."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.memory = mmap.mmap(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.position = 0

    def write(self, data: bytes, *, flags: int = 0) -> int:
        """Append a record; where its header stands."""
        at = self.position % SIZE
        record = struct.pack("=II", len(data) | flags, 0) + data
        self._store(at, record)
        self.position += (len(record) + 7) & ~7
        struct.pack_into("=Q", self.memory, mmap.PAGESIZE, self.position)
        return at

    def _store(self, at: int, data: bytes) -> None:
        for offset, byte in enumerate(data):
            place = (at + offset) % SIZE
            for copy in (0, SIZE):
                self.memory[2 * mmap.PAGESIZE + copy + place] = byte

    def commit(self, at: int, size: int, *, flags: int = 0) -> None:
        self._store(at, struct.pack("=I", size | flags))

    @property
    def consumed(self) -> int:
        """What the consumer has told the kernel."""
        return int(struct.unpack_from("=Q", self.memory, 0)[0])

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def producer() -> Iterator[Producer]:
    producer = Producer()
    yield producer
    producer.close()


@pytest.fixture
def ring(producer: Producer) -> Iterator[RingBuffer]:
    ring = RingBuffer(producer.fd, SIZE)
    yield ring
    ring.close()


def test_records_come_in_order_and_once(producer: Producer, ring: RingBuffer) -> None:
    assert list(ring.records()) == []
    producer.write(b"first of all")
    producer.write(b"16 bytes exactly")
    assert list(ring.records()) == [b"first of all", b"16 bytes exactly"]
    assert list(ring.records()) == []
    assert producer.consumed == producer.position


def test_record_that_is_still_being_written_is_waited_for(
    producer: Producer, ring: RingBuffer
) -> None:
    producer.write(b"done")
    at = producer.write(b"not done", flags=BUSY)
    producer.write(b"behind")
    assert list(ring.records()) == [b"done"]
    producer.commit(at, 8)
    assert list(ring.records()) == [b"not done", b"behind"]


def test_discarded_record_is_skipped(producer: Producer, ring: RingBuffer) -> None:
    producer.write(b"kept")
    producer.write(b"discarded", flags=DISCARDED)
    producer.write(b"kept too")
    assert list(ring.records()) == [b"kept", b"kept too"]
    assert producer.consumed == producer.position


def test_record_across_the_end_is_whole(producer: Producer, ring: RingBuffer) -> None:
    wrapped = 0
    for number in range(1000):
        data = bytes([number % 256]) * (16 + number % 24)
        wrapped += producer.position % SIZE + 8 + len(data) > SIZE
        producer.write(data)
        assert list(ring.records()) == [data]
    assert wrapped >= 3


def test_space_is_given_back_record_by_record(producer: Producer, ring: RingBuffer) -> None:
    for _ in range(3):
        producer.write(b"12345678")
    assert [producer.consumed for _ in ring.records()] == [0, 16, 32]
    assert producer.consumed == 48


def test_closed_ring_leaves_the_descriptor_open(producer: Producer) -> None:
    RingBuffer(producer.fd, SIZE).close()
    os.fstat(producer.fd)
