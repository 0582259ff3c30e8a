"""Which ports of ours the programs look for flows of."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Iterator

import pytest

from pyforwarder.datapath.splice import our_ports
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SplicePorts, SpliceState
from pyforwarder.datapath.splice.our_ports import (
    PORTS_AT_ONCE,
    RECORDS_AT_ONCE,
    TIDY_S,
    OurPorts,
)
from pyforwarder.datapath.splice.records import used_indexes

RECORDS = 4


class Memory:
    """The map and the records, without a kernel."""

    def __init__(self, records: int = RECORDS) -> None:
        self.fd = os.memfd_create("our_ports")
        os.ftruncate(self.fd, ctypes.sizeof(SplicePorts))
        self._shared = mmap.mmap(self.fd, ctypes.sizeof(SplicePorts))
        self.ports = SplicePorts.from_buffer(self._shared)
        self.splices = mmap.mmap(-1, records * SPLICE_BYTES)

    def record(self, index: int, *ports: int) -> Splice:
        """One with these ports of ours, the client's connection's and the server's."""
        record = Splice.from_buffer(self.splices, index * SPLICE_BYTES)
        for direction, port in zip(record.direction, ports, strict=True):
            direction.from_.dport = socket.htons(port)
            direction.from_.sport = socket.htons(9)
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
    finish(ports, now_s + TIDY_S + 1.0)
    assert memory.kept() == [443, 40001]


def finish(ports: OurPorts, now_s: float) -> int:
    """Tidy until that is done; in how many turns of the loop."""
    ports.run_due(now_s)
    turns = 1
    while ports.wait_s(1.0) == 0.0:
        ports.run_due(now_s)
        turns += 1
    return turns


@pytest.fixture
def large() -> Iterator[Memory]:
    """Three times as many records as are looked at in one turn."""
    made = Memory(3 * RECORDS_AT_ONCE)
    yield made
    os.close(made.fd)


def test_a_turn_of_the_loop_looks_at_some_records_or_some_marks(
    large: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = OurPorts(large.fd, large.splices)
    for index in range(3 * RECORDS_AT_ONCE):
        large.record(index, 443, index).state = SpliceState.ACTIVE
    ports.forgotten(0)
    looked: list[int] = []

    def used(*arguments: object, **more: int) -> Iterator[int]:
        found = list(used_indexes(*arguments, **more))
        looked.append(len(found))
        return iter(found)

    monkeypatch.setattr(our_ports, "used_indexes", used)
    assert ports.wait_s(7.0) == 7.0
    turns = finish(ports, time.monotonic() + TIDY_S + 1.0)
    assert looked == [RECORDS_AT_ONCE] * 3
    # One more, in which there was nothing left.
    assert turns == 3 + (1 << 16) // PORTS_AT_ONCE + 1
    assert ports.wait_s(7.0) == 7.0


def test_a_pair_that_begins_between_two_turns_keeps_its_marks(large: Memory) -> None:
    """Also one whose record was looked at before, when it was free."""
    ports = OurPorts(large.fd, large.splices)
    gone = large.record(0, 443, 40000)
    ports.mark(gone)
    ports.forgotten(0)
    later_s = time.monotonic() + TIDY_S + 1.0
    ports.run_due(later_s)
    began = large.record(1, 80, 40001)
    began.state = SpliceState.ACTIVE
    ports.mark(began)
    finish(ports, later_s)
    assert large.kept() == [80, 40001]


def test_a_pair_that_ends_between_two_turns_keeps_its_marks_for_another_minute(
    large: Memory,
) -> None:
    ports = OurPorts(large.fd, large.splices)
    record = large.record(0, 443, 40000)
    record.state = SpliceState.ACTIVE
    ports.mark(record)
    ports.forgotten(1)
    now_s = time.monotonic()
    ports.run_due(now_s + TIDY_S + 1.0)
    record.state = SpliceState.FREE
    ports.forgotten(0)
    finish(ports, now_s + TIDY_S + 1.0)
    # The first part of the next one is due in a minute from then.
    assert large.kept() == [443, 40000]
    finish(ports, time.monotonic() + TIDY_S + 1.0)
    assert large.kept() == []


def test_a_mark_of_a_program_stays(memory: Memory) -> None:
    memory.ports.port[443].opened = 1
    memory.ports.port[443].kept = 1
    OurPorts(memory.fd, memory.splices)
    assert (memory.kept(), memory.opened()) == ([], [443])
