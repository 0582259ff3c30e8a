"""The pair table: slots, windows, and records that are read while they are written."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator

import pytest

from pyforwarder.core.address import Address
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    PairRecord,
    PairState,
    pack_endpoint,
    unpack_endpoint,
)
from pyforwarder.datapath.ebpf.pair_table import (
    SLOTS_PER_PAGE,
    PairTable,
    PairWindow,
    empty_window,
    read_records,
    read_slots,
    slots_for,
)

SLOTS = 16


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, SLOTS * PAIR_BYTES)


@pytest.fixture
def window(memory: mmap.mmap) -> PairWindow:
    return PairWindow(memory, first_slot=32, worker_index=3)


def describe(window: PairWindow, slot: int, *, pair_id: int = 7, name: bytes = b"named") -> None:
    window.describe(
        slot,
        pair_id=pair_id,
        started_ns=1000 + pair_id,
        endpoints=b"".join(
            pack_endpoint(Address(f"10.0.{pair_id % 256}.{n}", 1000 + n)) for n in range(4)
        ),
        rule=name,
        listener=b"main",
        state=PairState.JOINED,
        datapath=DatapathKind.COPY,
        reason=5,
    )


# Slots


def test_every_slot_is_given_out_once_and_then_none(window: PairWindow) -> None:
    assert [window.allocate() for _ in range(SLOTS)] == list(range(SLOTS))
    assert window.allocate() == -1


def test_slot_given_back_first_is_given_out_first(window: PairWindow) -> None:
    for _ in range(SLOTS):
        window.allocate()
    for slot in (5, 2, 9):
        window.release(slot)
    assert [window.allocate() for _ in range(4)] == [5, 2, 9, -1]


def test_slot_given_back_rests_while_others_are_free(window: PairWindow) -> None:
    window.release(window.allocate())
    assert [window.allocate() for _ in range(SLOTS)] == [*range(1, SLOTS), 0]


def test_counters_of_a_slot_begin_at_0_again(window: PairWindow) -> None:
    slot = window.allocate()
    at = slot * window.WORDS64
    places = [
        *(table.PASSED, table.REDIRECTED, table.REDIRECTED_PACKETS, table.LAST_NS),
        *(table.CONSUMED, table.CARRIED, table.CARRIED_PACKETS, table.PEER_COOKIE),
    ]
    for place in places:
        for direction in Direction:
            window.words64[at + place[direction]] = 99
    for place in (table.ARMED, table.ASLEEP, table.LIMIT, table.TRIPS):
        for direction in Direction:
            window.words32[slot * window.WORDS32 + place[direction]] = 99
    window.release(slot)
    while window.allocate() != slot:
        pass
    assert all(window.words64[at + place[d]] == 0 for place in places for d in Direction)
    for place in (table.ARMED, table.ASLEEP, table.LIMIT, table.TRIPS):
        assert [window.words32[slot * window.WORDS32 + place[d]] for d in Direction] == [0, 0]


def test_places_of_numbers_are_those_of_the_record(window: PairWindow) -> None:
    slot = window.allocate()
    describe(window, slot)
    words, halves = slot * window.WORDS64, slot * window.WORDS32
    for direction in Direction:
        window.words64[words + table.PASSED[direction]] = 11 + direction
        window.words64[words + table.REDIRECTED[direction]] = 21 + direction
        window.words64[words + table.CONSUMED[direction]] = 31 + direction
        window.words64[words + table.PEER_COOKIE[direction]] = 41 + direction
        window.words32[halves + table.ARMED[direction]] = 51 + direction
        window.words32[halves + table.ASLEEP[direction]] = 61 + direction
        window.words32[halves + table.LIMIT[direction]] = 71 + direction
        window.words32[halves + table.TRIPS[direction]] = 81 + direction
        window.count(slot, direction, 91 + direction, 101 + direction, 12345)
    (record,) = read_records(window._memory)
    for direction in Direction:
        kernel, worker = record.kernel[direction], record.worker[direction]
        assert (kernel.passed_bytes, kernel.redirected_bytes) == (11 + direction, 21 + direction)
        assert (worker.consumed_bytes, worker.peer_cookie) == (31 + direction, 41 + direction)
        assert (worker.armed, worker.asleep, worker.limit_bytes) == (
            51 + direction,
            61 + direction,
            71 + direction,
        )
        assert kernel.trips == 81 + direction
        assert (worker.carried_bytes, worker.carried_packets) == (91 + direction, 101 + direction)
    assert record.last_ns == 12345


# Records


def test_description_reads_as_it_was_written(window: PairWindow) -> None:
    slot = window.allocate()
    describe(window, slot, pair_id=23)
    ((found, record),) = read_slots(window._memory)
    assert found == slot
    assert (record.id, record.started_ns, record.worker_index) == (23, 1023, 3)
    assert (record.rule, record.listener_name) == (b"named", b"main")
    assert (record.state, record.datapath, record.reason) == (
        PairState.JOINED,
        DatapathKind.COPY,
        5,
    )
    assert [
        unpack_endpoint(e) for e in (record.client, record.listener, record.source, record.server)
    ] == [f"10.0.23.{n}:{1000 + n}" for n in range(4)]


def test_changes_of_state_and_datapath_change_nothing_else(window: PairWindow) -> None:
    slot = window.allocate()
    describe(window, slot)
    window.set_state(slot, PairState.DRAINING)
    window.set_datapath(slot, DatapathKind.SOCKMAP, 1)
    (record,) = read_records(window._memory)
    assert (record.state, record.datapath, record.reason) == (
        PairState.DRAINING,
        DatapathKind.SOCKMAP,
        1,
    )
    assert (record.id, record.rule, record.worker_index) == (7, b"named", 3)


def test_long_name_is_cut_and_still_ends(window: PairWindow) -> None:
    describe(window, window.allocate(), name=b"x" * 200)
    (record,) = read_records(window._memory)
    assert record.rule == b"x" * 63
    assert record.listener_name == b"main"


def test_shorter_name_leaves_nothing_of_the_longer_one(window: PairWindow) -> None:
    slot = window.allocate()
    describe(window, slot, name=b"a-very-long-name")
    describe(window, slot, name=b"b")
    raw = bytes(window._memory)
    assert b"very-long" not in raw
    (record,) = read_records(window._memory)
    assert record.rule == b"b"


def test_free_slots_are_not_read(window: PairWindow) -> None:
    slots = [window.allocate() for _ in range(3)]
    for slot in slots:
        describe(window, slot, pair_id=slot)
    window.release(slots[1])
    assert [slot for slot, _ in read_slots(window._memory)] == [slots[0], slots[2]]


def test_allocated_slot_is_not_read_before_it_is_described(window: PairWindow) -> None:
    window.allocate()
    assert list(read_records(window._memory)) == []


def test_record_in_the_middle_of_a_change_is_not_read(window: PairWindow) -> None:
    slot = window.allocate()
    describe(window, slot)
    sequence = slot * window.WORDS64 + table.SEQUENCE
    assert window.words64[sequence] == 2
    window.words64[sequence] += 1
    assert list(read_records(window._memory)) == []
    window.words64[sequence] += 1
    assert len(list(read_records(window._memory))) == 1


def test_reader_never_sees_halves_of_two_records(memory: mmap.mmap) -> None:
    # A writer changes one slot's owner as fast as it can; its fields all say the same number.
    pid = os.fork()
    if pid == 0:
        window = PairWindow(memory, first_slot=0, worker_index=0)
        slot = window.allocate()
        number = 0
        while True:
            number = (number + 1) % 60000
            describe(window, slot, pair_id=number, name=str(number).encode())
    try:
        seen: set[int] = set()
        deadline_s = time.monotonic() + 20
        while len(seen) < 300 and time.monotonic() < deadline_s:
            for record in read_records(memory):
                assert record.started_ns == 1000 + record.id
                assert record.rule == str(record.id).encode()
                assert unpack_endpoint(record.server) == f"10.0.{record.id % 256}.3:1003"
                seen.add(record.id)
        assert len(seen) >= 300, "the writer wrote too little for this test to prove anything"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Windows


@pytest.fixture
def pair_table() -> Iterator[PairTable]:
    whole = PairTable(workers=3, slots=slots_for(9))
    yield whole
    for memory in whole.windows:
        memory.close()


@pytest.mark.parametrize(("pairs", "slots"), [(1, 8), (8, 8), (9, 16), (10_000, 10_000)])
def test_window_has_whole_pages(pairs: int, slots: int) -> None:
    assert slots_for(pairs) == slots
    assert slots % SLOTS_PER_PAGE == 0
    assert slots * PAIR_BYTES % mmap.PAGESIZE == 0


def test_what_was_shown_of_a_pair_stays_until_another_has_its_slot() -> None:
    """Its worker has died, and so has the next one; even one that was killed while it wrote."""
    memory = mmap.mmap(-1, slots_for(8) * PAIR_BYTES)
    window = PairWindow(memory, first_slot=16, worker_index=1)
    slots = [window.allocate() for _ in range(2)]
    for slot, pair_id in zip(slots, (23, 24), strict=True):
        describe(window, slot, pair_id=pair_id)
        window.count(slot, 0, 5, 1, 99)
    window.words64[slots[1] * window.WORDS64 + table.SEQUENCE] += 1
    empty_window(memory)
    assert list(read_records(memory)) == []
    again = PairWindow(memory, first_slot=16, worker_index=1)
    assert list(read_records(memory)) == []
    for slot, pair_id in zip(slots, (23, 24), strict=True):
        shown = table.inherited(again.record(slot), pair_id)
        assert shown is not None
        assert shown.worker[0].carried_bytes == 5
    assert [again.allocate() for _ in range(2)] == slots
    for slot in slots:
        describe(again, slot, pair_id=30 + slot)
    assert [record.id for record in read_records(memory)] == [30 + slot for slot in slots]
    assert [record.worker[0].carried_bytes for record in read_records(memory)] == [0, 0]


def test_worker_takes_its_window_empty_and_loses_sight_of_the_others(
    pair_table: PairTable,
) -> None:
    for memory in pair_table.windows:
        memory[:] = b"\xff" * len(memory)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        window = pair_table.take_window(1)
        others = [memory.closed for memory in pair_table.windows]
        describe(window, window.allocate(), pair_id=23)
        os.write(write_fd, struct.pack("=I???", window.first_slot, *others))
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert struct.unpack("=I???", said) == (16, True, False, True)
    assert [record.id for record in read_records(pair_table.windows[1])] == [23]
    for other in (0, 2):
        assert bytes(pair_table.windows[other]) == b"\xff" * len(pair_table.windows[other])


def test_window_that_was_closed_is_unmapped(memory: mmap.mmap) -> None:
    window = PairWindow(memory, first_slot=0, worker_index=0)
    window.close()
    assert memory.closed


def test_what_a_dead_worker_left_of_a_pair_is_bounded_by_what_can_have_been() -> None:
    record = PairRecord()
    record.id = 7
    record.started_ns = record.last_ns = (1 << 64) - 1
    for flow in record.worker:
        flow.carried_bytes = flow.carried_packets = (1 << 64) - 1
    before_ns = time.monotonic_ns()
    said = table.inherited(bytes(record), 7)
    assert said is not None
    assert before_ns <= said.started_ns <= time.monotonic_ns()
    assert said.last_ns == said.started_ns
    assert {flow.carried_bytes for flow in said.worker} == {1 << 50}
    assert {flow.carried_packets for flow in said.worker} == {1 << 50}


def test_what_a_dead_worker_left_of_a_pair_is_read_as_it_is() -> None:
    record = PairRecord(id=7, started_ns=5, rule=b"web")
    record.worker[1].carried_bytes = 1000
    said = table.inherited(bytes(record), 7)
    assert said is not None
    assert (said.started_ns, said.rule, said.worker[1].carried_bytes) == (5, b"web", 1000)
    assert table.inherited(bytes(record), 8) is None  # another pair's by now
    assert table.inherited(b"", 7) is None
