"""The spliced pairs that this machine forwards, from the maps, which are only read."""

from __future__ import annotations

import ctypes
import ipaddress
import struct
import sys
from collections import deque
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

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
from pyforwarder.datapath.splice.replicas import boot_unix_s, is_replicable, pair_of, said_of
from pyforwarder.fleet.failover.ledger import MOVING_S, Own

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.fleet.failover.record import Pair

# The most records that are read again in one scan.
READ_AT_ONCE: Final = 256
# Records are compared in groups of so many.
_GROUP: Final = 64

# Pairs of other machines; and those of express that are younger than a second: most end before
# that, and would be written for nothing.
_NOT_OWN: Final = (HELD, NO_WORKER)

_NUMBER: Final = struct.Struct("=Q")
_FINS: Final = struct.Struct("=IIII")  # fin_seq, fin_due, fin, fin_acked
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)
_FINS_AT: Final = [n * _DIRECTION_BYTES + SpliceDirection.fin_seq.offset for n in (0, 1)]
assert SpliceDirection.fin_acked.offset == SpliceDirection.fin_seq.offset + 12
_STATE_TO_RESET: Final = struct.Struct("=IIII")  # state, worker, slot, reset
assert Splice.reset.offset == Splice.state.offset + 12
# Bytes of a record of which at least one changes when the pair begins, has no tail any more, gets
# an owner, is reset, or ends, or one direction of it does; and the lowest bytes of its id. Of the
# worker it is the second byte: the lowest one of HELD and NO_WORKER may be a worker's number.
_LOW, _SECOND = (0, 1) if sys.byteorder == "little" else (3, 2)
_WATCHED: Final = (
    *(Splice.id.offset + n for n in ((0, 1, 2) if sys.byteorder == "little" else (7, 6, 5))),
    *(field.offset + _LOW for field in (Splice.state, Splice.reset)),
    Splice.worker.offset + _SECOND,
    *(at + _LOW + 4 * n for at in _FINS_AT for n in range(4)),
    *(n * _DIRECTION_BYTES + SpliceDirection.tail_open.offset + _LOW for n in (0, 1)),
)


class _Seen(NamedTuple):
    id: int
    ends: tuple[object, ...]  # the state of its FINs
    key: str
    own: Own | None  # None: other machines cannot take it over
    read: int  # hash of all that `own` was made of: its record, and the one in the pair table


class OwnPairs:
    """All records; the expensive part is done once a second for each pair that moves.

    A scan compares a few bytes of every record with those of the scan before, and looks at those
    records only that differ: pairs that begin and end. Of those that are due to be read again only
    some are read, those that have waited longest first.
    """

    def __init__(self, maps: SpliceMaps, addresses: Collection[str]) -> None:
        """Map the records for reading; no descriptor is kept. `addresses` are those that move
        between machines.
        """
        self._memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)
        self._slots = maps.workers * maps.slots
        self._table = bpf.map_memory(maps.pairs_fd, self._slots * PAIR_BYTES, write=False)
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)
        self._watched = [bytes(maps.entries) for _ in _WATCHED]  # in the scan before
        self._seen: dict[int, _Seen] = {}
        self._own: dict[str, Own] = {}
        self._again_s: dict[int, float] = {}  # when a record is read again, by index
        self._due: deque[tuple[float, int]] = deque()  # the same, the soonest first, and past ones
        self._boot_unix_s = boot_unix_s()

    def scan(self, now_s: float) -> Mapping[str, Own]:
        """The pairs that another machine could take over, by key; valid until the next scan."""
        for index in self._changed():
            self._look(index, now_s)
        left = READ_AT_ONCE
        while left and self._due and self._due[0][0] <= now_s:
            again_s, index = self._due.popleft()
            if self._again_s.get(index) == again_s:
                self._look(index, now_s)
                left -= 1
        return self._own

    def ids(self, known: Collection[str]) -> set[int]:
        """The ids of the pairs in the last scan that another machine can take over.

        `known` are the keys of the pairs that other machines know.
        """
        seen = self._seen.values()
        return {one.id for one in seen if one.own is not None and one.key in known}

    def _changed(self) -> set[int]:
        """The indexes of the records that differ from the last scan in what is watched."""
        changed: set[int] = set()
        for number, at in enumerate(_WATCHED):
            before = self._watched[number]
            now = self._memory[at::SPLICE_BYTES]
            if now == before:
                continue
            self._watched[number] = now
            for first in range(0, len(now), _GROUP):
                old, new = before[first : first + _GROUP], now[first : first + _GROUP]
                if old != new:
                    pairs = enumerate(zip(old, new, strict=True), first)
                    changed.update(index for index, (was, is_) in pairs if was != is_)
        return changed

    def _look(self, index: int, now_s: float) -> None:
        """Take notice of a record as it is now."""
        memory, at = self._memory, index * SPLICE_BYTES
        state, worker, _, reset = _STATE_TO_RESET.unpack_from(memory, at + Splice.state.offset)
        (pair_id,) = _NUMBER.unpack_from(memory, at + Splice.id.offset)
        known = self._seen.get(index)
        is_own = state == SpliceState.ACTIVE and worker not in _NOT_OWN
        if not is_own or reset or not pair_id:
            if known is not None:
                del self._seen[index], self._again_s[index]
                self._forget(known)
            return
        ends = tuple(_FINS.unpack_from(memory, at + fins_at) for fins_at in _FINS_AT)
        seen = self._read(index, pair_id, ends, known)
        if seen is not known:
            if known is not None and known.key != seen.key:
                self._forget(known)
            self._seen[index] = seen
            if seen.own is not None:
                self._own[seen.key] = seen.own
        elif seen.own is not None:
            # If another record with these ports was the later one, and has ended, it is the pair.
            self._own.setdefault(seen.key, seen.own)
        self._again_s[index] = now_s + MOVING_S
        self._due.append((now_s + MOVING_S, index))

    def _forget(self, seen: _Seen) -> None:
        """It is no pair any more that another machine could take over."""
        if seen.own is not None and self._own.get(seen.key) is seen.own:
            del self._own[seen.key]  # else another record has these ports by now

    def _read(
        self, index: int, pair_id: int, ends: tuple[object, ...], known: _Seen | None
    ) -> _Seen:
        """The record as it is now; `known` itself if nothing of it has changed."""
        at = index * SPLICE_BYTES
        raw = self._memory[at : at + SPLICE_BYTES]
        record = Splice.from_buffer_copy(raw)
        at = record.slot * PAIR_BYTES
        read = hash(raw + self._table[at : at + PAIR_BYTES])
        if known is not None and (known.id, known.read) == (pair_id, read):
            return known
        own = None
        key = ""
        if record.id == pair_id and is_replicable(record):
            pair = self._pair_of(record)
            if {pair.ends.listener.ip, pair.ends.source.ip} <= self._addresses:
                is_same = known is not None and known.id == pair_id and known.own is not None
                key = known.key if is_same and known is not None else pair.key
                own = Own(record.direction[0].claim, pair)
        return _Seen(pair_id, ends, key, own, read)

    def _pair_of(self, record: Splice) -> Pair:
        shown = said_of(record, self._table, self._slots)
        return pair_of(record, shown, boot_unix_s=self._boot_unix_s)

    def close(self) -> None:
        """Unmap the records."""
        self._memory.close()
        self._table.close()
