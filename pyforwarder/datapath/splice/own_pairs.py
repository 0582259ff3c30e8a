"""The spliced pairs that this machine forwards, from the maps, which are only read.

A scan looks at those records only of which something has changed, and finds them in the memory of
many records at once: pairs that stand still cost nothing each. What begins and ends it finds in
each scan, in a few bytes of every record that is in use; what moves, once a second, in all bytes.
"""

from __future__ import annotations

import ctypes
import heapq
import ipaddress
import itertools
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.express.connect_abi import NO_WORKER
from pyforwarder.datapath.splice.abi import (
    HELD,
    SPLICE_BYTES,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.packing import pack
from pyforwarder.datapath.splice.replicas import boot_unix_s
from pyforwarder.fleet.failover.ledger import MOVING_S, Own, Scan
from pyforwarder.fleet.failover.record import key_of

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.splice.maps import SpliceMaps

# The most records that are read again in one scan.
READ_AT_ONCE: Final = 256
# Records, and slots of the pair table, are compared in groups of so many.
_GROUP: Final = 256

# Pairs of other machines; and those of express that are younger than a second: most end before
# that, and would be written for nothing.
_NOT_OWN: Final = (HELD, NO_WORKER)

_ACTIVE: Final = int(SpliceState.ACTIVE)
_HEAD: Final = struct.Struct("=Q8xII4xI")  # id, state, worker, reset
_HEAD_AT: Final = Splice.id.offset
assert Splice.reset.offset == _HEAD_AT + 28
_SLOT: Final = struct.Struct("=I")
_SLOT_AT: Final = Splice.slot.offset
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)
_FINS_AT: Final = [n * _DIRECTION_BYTES + SpliceDirection.fin_seq.offset for n in (0, 1)]
assert SpliceDirection.fin_acked.offset == SpliceDirection.fin_seq.offset + 12
# Bytes of a record of which at least one changes when the pair begins, has no tail any more, gets
# an owner, is reset, or ends, or one direction of it does; and the lowest bytes of its id. Of the
# worker it is the second byte: the lowest one of HELD and NO_WORKER may be a worker's number; of
# the slot, where the names of listener and rule are, the highest one: NO_SLOT has all bits.
_LOW, _SECOND, _HIGH = (0, 1, 3) if sys.byteorder == "little" else (3, 2, 0)
_STATE_AT: Final = Splice.state.offset + _LOW
_WATCHED: Final = (
    _STATE_AT,
    *(Splice.id.offset + n for n in ((0, 1, 2) if sys.byteorder == "little" else (7, 6, 5))),
    Splice.worker.offset + _SECOND,
    Splice.slot.offset + _HIGH,
    Splice.reset.offset + _LOW,
    *(at + _LOW + 4 * n for at in _FINS_AT for n in range(4)),
    *(n * _DIRECTION_BYTES + SpliceDirection.tail_open.offset + _LOW for n in (0, 1)),
)


class _Seen:
    """A record as it was looked at last."""

    __slots__ = ("id", "key", "looked_s", "own", "raw", "shown", "slot")

    id: int
    key: str
    own: Own | None  # None: other machines cannot take it over
    slot: int  # in the pair table; -1: none
    raw: bytes  # the record, and the one in the pair table
    shown: bytes
    looked_s: float


class _Group:
    """Records that follow each other, or slots of the pair table."""

    __slots__ = ("before", "due_s", "first", "live", "watched")

    def __init__(self, first: int) -> None:
        self.first = first
        self.live: dict[int, int] = {}  # those that are a pair's -> the index of its record
        self.before = b""  # all bytes when they were compared last, if none was looked at since
        self.due_s = 0.0  # when that is done again
        self.watched: list[bytes] = []  # in the scan before; empty: all records were free


class _Memory:
    """Records or slots in groups, and which of them have changed since they were looked at."""

    def __init__(self, memory: mmap.mmap, size: int, count: int) -> None:
        self._memory, self._size = memory, size
        self.groups = [_Group(first) for first in range(0, count, _GROUP)]

    def take(self, number: int, index: int) -> bytes:
        """The bytes of a record or slot, which is one of the record `index` from now on."""
        group = self.groups[number // _GROUP]
        group.live[number] = index
        group.before = b""
        at = number * self._size
        return self._memory[at : at + self._size]

    def drop(self, number: int, index: int) -> None:
        """It is none of this record's any more."""
        live = self.groups[number // _GROUP].live
        if live.get(number) == index:
            del live[number]

    def due(self, now_s: float) -> Iterator[tuple[int, bytes]]:
        """Those of groups with other bytes than a second ago: records' indexes, and their bytes."""
        size = self._size
        for group in self.groups:
            if not group.live or now_s < group.due_s:
                continue
            group.due_s = now_s + MOVING_S
            now = self._memory[group.first * size : (group.first + _GROUP) * size]
            if now != group.before:
                group.before = now
                for number, index in group.live.items():
                    at = (number - group.first) * size
                    yield index, now[at : at + size]


class OwnPairs:
    """All records; the expensive part is done once a second for each pair that moves.

    Of those that are due to be read again only some are read in a scan, those that have waited
    longest first.
    """

    def __init__(self, maps: SpliceMaps, addresses: Collection[str]) -> None:
        """Map the records for reading; no descriptor is kept. `addresses` are those that move
        between machines.
        """
        self._memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)
        self._slots = maps.workers * maps.slots
        self._table = bpf.map_memory(maps.pairs_fd, self._slots * PAIR_BYTES, write=False)
        self._records = _Memory(self._memory, SPLICE_BYTES, maps.entries)
        self._shown = _Memory(self._table, PAIR_BYTES, self._slots)
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)
        self._seen: dict[int, _Seen] = {}  # by index
        self._own: dict[str, Own] = {}
        self._index: dict[str, int] = {}  # of the record that `_own` has
        self._others: dict[str, set[int]] = {}  # more records with the same ports
        self._changed: dict[str, None] = {}  # keys, since the scan before
        # The ids of those that other machines know; the same by key; keys that may have others now.
        self._ids: set[int] = set()
        self._ids_of: dict[str, list[int]] = {}
        self._named: dict[str, None] = {}
        self._again_s: dict[int, float] = {}  # when a record that has moved is read again, by index
        self._due: list[tuple[float, int]] = []  # the same as a heap, and past ones
        self._boot_unix_s = boot_unix_s()

    def scan(self, now_s: float) -> Scan:
        """The pairs that another machine could take over, by key; valid until the next scan."""
        self._changed = {}
        for index in self._begun_or_ended():
            self._look(index, now_s)
        for index, raw in self._records.due(now_s):
            if raw != self._seen[index].raw:
                self._look_later(index)
        for index, shown in self._shown.due(now_s):
            if shown != self._seen[index].shown:
                self._look_later(index)
        left = READ_AT_ONCE
        while left and self._due and self._due[0][0] <= now_s:
            again_s, index = heapq.heappop(self._due)
            if self._again_s.get(index) == again_s:
                self._look(index, now_s)
                left -= 1
        self._named.update(self._changed)
        return Scan(self._own, self._changed)

    def ids(self, known: Collection[str], changed: Iterable[str]) -> set[int]:
        """The ids of the pairs in the last scan that another machine can take over.

        `known` are the keys of the pairs that other machines know; with `changed` it is said which
        ones have come or gone there since the last call.
        """
        self._named.update(dict.fromkeys(changed))
        for key in self._named:
            for pair_id in self._ids_of.pop(key, ()):
                self._ids.discard(pair_id)
        for key in self._named:
            if key in known and key in self._index:
                indexes = (self._index[key], *self._others.get(key, ()))
                self._ids_of[key] = ids = [self._seen[index].id for index in indexes]
                self._ids.update(ids)
        self._named = {}
        return self._ids

    def _begun_or_ended(self) -> Iterator[int]:
        """The indexes of the records that differ from the last scan in what is watched."""
        memory = self._memory
        free = bytes(_GROUP)
        for group in self._records.groups:
            first = group.first * SPLICE_BYTES
            end = first + _GROUP * SPLICE_BYTES
            states = memory[first + _STATE_AT : end : SPLICE_BYTES]
            if not group.watched:
                if states == free[: len(states)]:
                    continue
                group.watched = [bytes(len(states))] * len(_WATCHED)
            changed = 0
            for number, at in enumerate(_WATCHED):
                before = group.watched[number]
                now = memory[first + at : end : SPLICE_BYTES]
                if now != before:
                    group.watched[number] = now
                    changed |= int.from_bytes(now) ^ int.from_bytes(before)
            if changed:
                indexes = range(group.first, group.first + len(states))
                yield from itertools.compress(indexes, changed.to_bytes(len(states)))
            if group.watched[0] == free[: len(states)]:
                group.watched = []

    def _look_later(self, index: int) -> None:
        """Once a second has passed since the last look."""
        if index not in self._again_s:
            again_s = self._again_s[index] = self._seen[index].looked_s + MOVING_S
            heapq.heappush(self._due, (again_s, index))

    def _look(self, index: int, now_s: float) -> None:
        """Take notice of a record as it is now."""
        pair_id, state, worker, reset = _HEAD.unpack_from(
            self._memory, index * SPLICE_BYTES + _HEAD_AT
        )
        self._again_s.pop(index, None)
        seen = self._seen.get(index)
        if state != _ACTIVE or worker in _NOT_OWN or reset or not pair_id:
            if seen is not None:
                self._forget(index, seen)
                self._records.drop(index, index)
                if seen.slot >= 0:
                    self._shown.drop(seen.slot, index)
                del self._seen[index]
            return
        if seen is None:
            seen = self._seen[index] = _Seen()
            seen.own, seen.slot = None, -1
        elif seen.id != pair_id:
            self._forget(index, seen)
        seen.id, seen.looked_s = pair_id, now_s
        seen.raw = self._records.take(index, index)
        (slot,) = _SLOT.unpack_from(seen.raw, _SLOT_AT)
        if slot >= self._slots:
            slot = -1
        if slot != seen.slot:
            if seen.slot >= 0:
                self._shown.drop(seen.slot, index)
            seen.slot = slot
        seen.shown = self._shown.take(slot, index) if slot >= 0 else b""
        self._read(index, seen)

    def _read(self, index: int, seen: _Seen) -> None:
        """What others are to know of the record's pair."""
        packed = pack(seen.raw, seen.id, seen.shown, self._addresses, boot_unix_s=self._boot_unix_s)
        if packed is None:
            self._forget(index, seen)
            return
        claim, data, ends = packed
        own = Own(claim or 1, data)
        if seen.own is None:
            seen.key = key_of(*ends)
        elif seen.own == own:
            return
        seen.own = own
        key = seen.key
        before = self._index.get(key, index)
        if before != index:
            others = self._others.setdefault(key, set())
            others.add(before)
            others.discard(index)
        self._index[key] = index
        self._own[key] = own
        self._changed[key] = None

    def _forget(self, index: int, seen: _Seen) -> None:
        """It is no pair any more that another machine could take over."""
        if seen.own is None:
            return
        key, seen.own = seen.key, None
        others = self._others.get(key)
        if self._index[key] != index:  # another record has these ports by now
            if others is not None:
                others.discard(index)
            return
        self._changed[key] = None
        del self._own[key], self._index[key]
        if others:
            # The record that had these ports before, and that is there still, is the pair.
            before = others.pop()
            own = self._seen[before].own
            assert own is not None
            self._own[key], self._index[key] = own, before
        if not others:
            self._others.pop(key, None)

    def close(self) -> None:
        """Unmap the records."""
        self._memory.close()
        self._table.close()
