"""Which ports of ours the programs look for flows of."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Iterator

import pytest

from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SplicePorts, SpliceState
from pyforwarder.datapath.splice.our_ports import TIDY_S, OurPorts

RECORDS = 4


class Memory:
    """The map and the records, without a kernel."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("our_ports")
        os.ftruncate(self.fd, ctypes.sizeof(SplicePorts))
        self._shared = mmap.mmap(self.fd, ctypes.sizeof(SplicePorts))
        self.ports = SplicePorts.from_buffer(self._shared)
        self.splices = mmap.mmap(-1, RECORDS * SPLICE_BYTES)

    def record(self, index: int, *ports: int) -> Splice:
        """One with these ports of ours, the client's connection's and the server's."""
        record = Splice.from_buffer(self.splices, index * SPLICE_BYTES)
        for way, port in zip(record.way, ports, strict=True):
            way.from_.dport = socket.htons(port)
            way.from_.sport = socket.htons(9)
        return record

    def kept(self) -> list[int]:
        return [number for number, port in enumerate(self.ports.port) if port.kept]

    def opened(self) -> list[int]:
        return [number for number, port in enumerate(self.ports.port) if port.opened]


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    os.close(made.fd)


def test_both_ports_of_a_pair_are_marked_and_no_others(memory: Memory) -> None:
    OurPorts(memory.fd, memory.splices).mark(memory.record(0, 443, 40000))
    assert memory.kept() == [443, 40000]
    assert memory.opened() == []


@pytest.mark.parametrize("port", [0, 1, 255, 256, 65535])
def test_every_port_has_a_mark_of_its_own(memory: Memory, port: int) -> None:
    OurPorts(memory.fd, memory.splices).mark(memory.record(0, port, port))
    assert memory.kept() == [port]


def test_a_keeper_that_begins_marks_the_ports_of_pairs_that_go_on(memory: Memory) -> None:
    """All were: of a daemon that has just attached its programs, or by a keeper that has died."""
    for port in memory.ports.port:
        port.kept = 1
    memory.record(1, 10, 20).state = SpliceState.ACTIVE
    memory.record(2, 30, 40).state = SpliceState.RESET
    memory.record(3, 50, 60)
    OurPorts(memory.fd, memory.splices)
    assert memory.kept() == [10, 20, 30, 40]


def test_marks_are_taken_back_a_minute_after_pairs_are_forgotten(memory: Memory) -> None:
    ports = OurPorts(memory.fd, memory.splices)
    for index, pair in enumerate([(443, 40000), (443, 40001), (80, 40002)]):
        record = memory.record(index, *pair)
        record.state = SpliceState.ACTIVE
        ports.mark(record)
    for index in (0, 2):
        memory.record(index, 443, 40000).state = SpliceState.FREE
        ports.forgotten(index)
    now_s = time.monotonic()
    ports.run_due(now_s + TIDY_S - 1.0)
    assert memory.kept() == [80, 443, 40000, 40001, 40002]
    ports.run_due(now_s + TIDY_S + 1.0)
    assert memory.kept() == [443, 40001]


def test_a_mark_of_a_program_stays(memory: Memory) -> None:
    memory.ports.port[443].opened = 1
    memory.ports.port[443].kept = 1
    OurPorts(memory.fd, memory.splices)
    assert (memory.kept(), memory.opened()) == ([], [443])
