"""Reading and writing of the maps of splice, for pairs and sessions: keys, flows, records."""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord
from pyforwarder.datapath.splice.abi import (
    NO_SLOT,
    SPLICE_BYTES,
    Splice,
    SpliceFlow,
    SpliceKey,
    SpliceState,
)
from pyforwarder.runtime.one_store import store32

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.datapath.splice.session_abi import SessionRecord

KEY_BYTES: Final = 36  # struct splice_key
FLOW: Final = struct.Struct("=II")  # struct splice_flow
assert SpliceKey.dport.offset + 2 == KEY_BYTES
assert SpliceFlow.direction.offset + 4 == FLOW.size

# Offsets in a record.
STATE_AT: Final = Splice.state.offset
ID_AT: Final = Splice.id.offset
WORKER_AT: Final = Splice.worker.offset
SLOT_AT: Final = Splice.slot.offset
LAST_SLOT_AT: Final = Splice.last_slot.offset


def splice_memory(maps: SpliceMaps) -> mmap.mmap:
    """The records of pairs, mapped for reading."""
    return bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)


def id_of(table: mmap.mmap, at: int) -> int:
    """The id of the pair that a record of the pair table describes."""
    (pair_id,) = struct.unpack_from("=Q", table, at + PairRecord.id.offset)
    return int(pair_id)


def shown_slot(table: mmap.mmap, record: Splice | SessionRecord, slots: int) -> int:
    """The slot of the pair table with what `show` has printed for a pair, or a session.

    Its slot, or the last one that it had: before a worker that has died, or a daemon that ended
    while it started. NO_SLOT: there is none, or it is another pair's by now. `slots` is the size of
    the table.
    """
    for slot in (record.slot, record.last_slot):
        if slot < slots and id_of(table, slot * PAIR_BYTES) == record.id:
            return int(slot)
    return NO_SLOT


def shown_of(table: mmap.mmap, record: Splice | SessionRecord, slots: int) -> bytes:
    """What stands in `shown_slot`; empty: nothing."""
    slot = shown_slot(table, record, slots)
    return b"" if slot == NO_SLOT else table[slot * PAIR_BYTES : (slot + 1) * PAIR_BYTES]


def used_indexes(
    memory: object,
    *,
    state_at: int = STATE_AT,
    record_bytes: int = SPLICE_BYTES,
    first: int = 0,
    most: int | None = None,
) -> Iterator[int]:
    """The indexes of records that are not free: of pairs, or of others with their state elsewhere.

    `most`: only so many records from `first` on are looked at.
    """
    end = None if most is None else (first + most) * record_bytes
    at = first * record_bytes + state_at
    states = memoryview(memory)[at:end:record_bytes]  # type: ignore[arg-type]
    try:
        yield from [index for index, state in enumerate(states, first) if state != SpliceState.FREE]
    finally:
        states.release()


def set_state(memory: object, index: int, state: SpliceState) -> None:
    """Change a record's state with one store."""
    store(memory, index, STATE_AT, state)


def store(memory: object, index: int, at: int, number: int) -> None:
    """Write a 32-bit field, `at` bytes into a record, with one store."""
    store32(memory, index * SPLICE_BYTES + at, number)


def forget_flows(flows: bpf.Map, index: int, record: Splice | SessionRecord) -> None:
    """Delete the flows of a pair or session: the programs do not find it any more.

    Later packets of its peers go to the stack, and so to our sockets.
    """
    for direction in record.direction:
        key = bytes(direction.from_)
        # The addresses may belong to another pair by now.
        with contextlib.suppress(FileNotFoundError):
            if FLOW.unpack(flows.lookup(key))[0] == index:
                flows.delete(key)
