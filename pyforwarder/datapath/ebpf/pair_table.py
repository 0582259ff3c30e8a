"""The pair table: one 512-byte record per connection, in memory that everybody can look at.

With BPF the table is an mmapable array that the verdict program and the view's iterators read;
without, it is anonymous shared memory of the same layout. A worker sees only its own window, so it
cannot touch another worker's pairs even by mistake. Records are written by plain aligned stores.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

from pyforwarder.datapath.ebpf.abi import (
    NAME_BYTES,
    PAIR_BYTES,
    DatapathKind,
    Direction,
    KernelDirection,
    PairRecord,
    PairState,
    WorkerDirection,
)
from pyforwarder.runtime.shared_memory import SharedBlocks

# A window begins on a page, so a worker can map its own alone: 8 records of 512 bytes.
SLOTS_PER_PAGE: Final = mmap.PAGESIZE // PAIR_BYTES

_WORDS: Final = PAIR_BYTES // 8
_KERNEL: Final = [PairRecord.kernel.offset + d * ctypes.sizeof(KernelDirection) for d in Direction]
_WORKER: Final = [PairRecord.worker.offset + d * ctypes.sizeof(WorkerDirection) for d in Direction]

PASSED: Final = [(at + KernelDirection.passed_bytes.offset) // 8 for at in _KERNEL]
REDIRECTED: Final = [(at + KernelDirection.redirected_bytes.offset) // 8 for at in _KERNEL]
REDIRECTED_PACKETS: Final = [
    (at + KernelDirection.redirected_packets.offset) // 8 for at in _KERNEL
]
LAST_NS: Final = [(at + KernelDirection.last_ns.offset) // 8 for at in _KERNEL]
# `latched` in the lower half, `lost` in the upper one.
LATCHED: Final = [(at + KernelDirection.latched.offset) // 4 for at in _KERNEL]
TRIPS: Final = [(at + KernelDirection.trips.offset) // 4 for at in _KERNEL]
CONSUMED: Final = [(at + WorkerDirection.consumed_bytes.offset) // 8 for at in _WORKER]
CARRIED: Final = [(at + WorkerDirection.carried_bytes.offset) // 8 for at in _WORKER]
CARRIED_PACKETS: Final = [(at + WorkerDirection.carried_packets.offset) // 8 for at in _WORKER]
PEER_COOKIE: Final = [(at + WorkerDirection.peer_cookie.offset) // 8 for at in _WORKER]
ARMED: Final = [(at + WorkerDirection.armed.offset) // 4 for at in _WORKER]
ASLEEP: Final = [(at + WorkerDirection.asleep.offset) // 4 for at in _WORKER]
LIMIT: Final = [(at + WorkerDirection.limit_bytes.offset) // 4 for at in _WORKER]

ID: Final = PairRecord.id.offset // 8
SEQUENCE: Final = PairRecord.sequence.offset // 8
ACTIVE_NS: Final = PairRecord.last_ns.offset // 8
STATE: Final = PairRecord.state.offset
DATAPATH: Final = PairRecord.datapath.offset
_REASON: Final = PairRecord.reason.offset
# More than any pair carries; adding some thousands of them leaves 64 bits alone.
_MOST_CARRIED: Final = 1 << 50
_ZERO_COUNTERS: Final = bytes(PairRecord.id.offset)
_BODY: Final = struct.Struct(f"=BBBBI80s{NAME_BYTES}s{NAME_BYTES}s")


def empty_window(window: mmap.mmap | memoryview) -> None:
    """All slots of a window are free from here on; what stands in them stays."""
    slots = len(window) // PAIR_BYTES
    window[STATE::PAIR_BYTES] = bytes([PairState.FREE]) * slots


class PairWindow:
    """One worker's part of the table, for writing.

    `words64` and `words32` are the window as 64-bit and 32-bit numbers, for those who count per
    packet; index = slot * WORDS64 (WORDS32) + one of the constants above, by the member's size.
    """

    WORDS64: Final = _WORDS
    WORDS32: Final = _WORDS * 2

    def __init__(self, memory: mmap.mmap, *, first_slot: int, worker_index: int) -> None:
        """Take the window over, and empty it; `first_slot` is its place in the whole table."""
        self._memory = memory
        self._bytes = memoryview(memory)
        self.words64 = self._bytes.cast("Q")
        self.words32 = self._bytes.cast("I")
        self.first_slot = first_slot
        self._worker_index = worker_index
        # First in, first out: a slot rests as long as possible, so that a reader who is in the
        # middle of its record does not see the next connection's.
        self._free = deque(range(len(memory) // PAIR_BYTES))
        empty_window(self._bytes)
        for at in range(SEQUENCE, len(self.words64), _WORDS):
            if self.words64[at] & 1:  # a worker was killed while it wrote
                self.words64[at] = 0

    def allocate(self) -> int:
        """A free slot (counted within the window), its counters at 0; -1 if there is none."""
        if not self._free:
            return -1
        slot = self._free.popleft()
        at = slot * PAIR_BYTES
        self._bytes[at : at + len(_ZERO_COUNTERS)] = _ZERO_COUNTERS
        return slot

    def describe(
        self,
        slot: int,
        *,
        pair_id: int,
        started_ns: int,
        endpoints: bytes,
        rule: bytes,
        listener: bytes,
        state: PairState,
        datapath: DatapathKind,
        reason: int,
        protocol: int = 0,
    ) -> None:
        """Write the pair's `endpoints`: client, listener, source, server, 20 bytes each.

        `protocol` is 0 for TCP.
        """
        base = slot * PAIR_BYTES
        words = slot * _WORDS
        self.words64[words + SEQUENCE] += 1  # odd: readers look again
        self.words64[words + ID] = pair_id
        self.words64[words + PairRecord.started_ns.offset // 8] = started_ns
        _BODY.pack_into(
            self._bytes,
            base + STATE,
            state,
            datapath,
            reason,
            self._worker_index,
            protocol,
            endpoints,
            rule[: NAME_BYTES - 1],
            listener[: NAME_BYTES - 1],
        )
        self.words64[words + SEQUENCE] += 1

    def set_state(self, slot: int, state: PairState) -> None:
        """Only the state changes."""
        self._bytes[slot * PAIR_BYTES + STATE] = state

    def set_datapath(self, slot: int, datapath: DatapathKind, reason: int) -> None:
        """Only the datapath and its reason change."""
        self._bytes[slot * PAIR_BYTES + DATAPATH] = datapath
        self._bytes[slot * PAIR_BYTES + _REASON] = reason

    def count(
        self, slot: int, direction: int, carried_bytes: int, packets: int, now_ns: int
    ) -> None:
        """What userspace has carried so far, and that it did so now."""
        at = slot * _WORDS
        self.words64[at + CARRIED[direction]] = carried_bytes
        self.words64[at + CARRIED_PACKETS[direction]] = packets
        self.words64[at + ACTIVE_NS] = now_ns

    def record(self, slot: int) -> bytes:
        """A copy of what stands there."""
        return bytes(self._bytes[slot * PAIR_BYTES : (slot + 1) * PAIR_BYTES])

    def release(self, slot: int) -> None:
        """Give the slot back; nobody sees the record from here on."""
        self._bytes[slot * PAIR_BYTES + STATE] = PairState.FREE
        self._free.append(slot)

    def close(self) -> None:
        """Unmap the window."""
        self.words64.release()
        self.words32.release()
        self._bytes.release()
        self._memory.close()


def read_records(memory: mmap.mmap | memoryview) -> Iterator[PairRecord]:
    """A consistent copy of every record in use, in slot order."""
    return (record for _, record in read_slots(memory))


def read_slots(memory: mmap.mmap | memoryview) -> Iterator[tuple[int, PairRecord]]:
    """The same, each with its slot.

    A record that changes hands while it is copied is read again; one that does so all the time
    (it cannot, for long) is left out.
    """
    view = memoryview(memory)
    for slot in used_slots(view):
        record = read_slot(view, slot)
        if record is not None:
            yield slot, record


def inherited(record: bytes, pair_id: int) -> PairRecord | None:
    """What `show` said of a pair that has lost its worker; None: nothing of that one.

    The worker may have been taken over and have written anything: what comes of its numbers is
    bounded by what can have been.
    """
    if not record:
        return None
    shown = PairRecord.from_buffer_copy(record)
    if shown.id != pair_id:
        return None  # the table's place was another's by then
    now_ns = time.monotonic_ns()
    shown.started_ns = min(shown.started_ns, now_ns)
    shown.last_ns = min(shown.last_ns, now_ns)
    for flow in shown.worker:
        flow.carried_bytes = min(flow.carried_bytes, _MOST_CARRIED)
        flow.carried_packets = min(flow.carried_packets, _MOST_CARRIED)
    return shown


def used_slots(view: memoryview) -> list[int]:
    """The slots of a window that hold a connection now."""
    states = view[STATE::PAIR_BYTES]
    return [n for n, state in enumerate(states) if state != PairState.FREE]


def read_slot(view: memoryview, slot: int) -> PairRecord | None:
    """A consistent copy of one record; None: it is free, or does not hold still."""
    at = slot * PAIR_BYTES
    sequence = view[at + SEQUENCE * 8 : at + SEQUENCE * 8 + 8]
    for _ in range(8):
        # Read before the first byte of the copy and after the last: a copy takes its bytes in
        # no order, so the sequence inside it proves nothing.
        before = bytes(sequence)
        record = PairRecord.from_buffer_copy(bytes(view[at : at + PAIR_BYTES]))
        is_whole = int.from_bytes(before, sys.byteorder) % 2 == 0
        if is_whole and bytes(sequence) == before:
            return record if record.state != PairState.FREE else None
    return None


def slots_for(pairs: int) -> int:
    """A window's size in slots for that many pairs: whole pages."""
    return -(-pairs // SLOTS_PER_PAGE) * SLOTS_PER_PAGE


class PairTable:
    """The whole pair table, as the supervisor has it: one window per worker."""

    def __init__(self, *, workers: int, slots: int, fd: int = -1) -> None:
        """Over the mmapable array `fd`, or over anonymous shared memory."""
        self.slots = slots
        length = slots * PAIR_BYTES
        if fd < 0:
            self._blocks = SharedBlocks.make("pairs", workers, length)
        else:
            self._blocks = SharedBlocks.over(fd, workers, length)
        self.windows = self._blocks.map_all()

    def take_window(self, worker: int) -> PairWindow:
        """In the worker: its own window, emptied; the others are unmapped."""
        for other, memory in enumerate(self.windows):
            if other != worker:
                memory.close()
        self.close()
        return PairWindow(self.windows[worker], first_slot=worker * self.slots, worker_index=worker)

    def read_only(self) -> list[mmap.mmap]:
        """All windows, in memory that cannot be written."""
        return self._blocks.map(writable=())

    def close(self) -> None:
        """Close the descriptors that are the table's own; what is mapped stays."""
        self._blocks.close()
        self._blocks = SharedBlocks(0, (), ())
