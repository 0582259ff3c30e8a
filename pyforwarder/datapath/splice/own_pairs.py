"""The spliced pairs that this machine forwards, from the maps, which are only read."""

from __future__ import annotations

import ctypes
import ipaddress
import struct
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice.abi import (
    HELD,
    SPLICE_BYTES,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.records import used_indexes
from pyforwarder.datapath.splice.replicas import boot_unix_s, is_replicable, pair_of, said_of
from pyforwarder.fleet.failover.ledger import MOVING_S, Own

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.fleet.failover.record import Pair

# The most records that are read again in one scan.
READ_AT_ONCE: Final = 256

_NUMBER: Final = struct.Struct("=Q")
_FINS: Final = struct.Struct("=IIII")  # fin_seq, fin_due, fin, fin_acked
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)
_FINS_AT: Final = [n * _DIRECTION_BYTES + SpliceDirection.fin_seq.offset for n in (0, 1)]
assert SpliceDirection.fin_acked.offset == SpliceDirection.fin_seq.offset + 12
_STATE_TO_RESET: Final = struct.Struct("=IIII")  # state, worker, slot, reset
assert Splice.reset.offset == Splice.state.offset + 12


class _Seen(NamedTuple):
    id: int
    ends: tuple[object, ...]  # the state of its FINs
    until_s: float  # its numbers are not read again before
    key: str
    own: Own | None  # None: other machines cannot take it over


class OwnPairs:
    """All records; the expensive part is done once a second for each pair that moves.

    Of those that are due in one scan only some are read again, those that have waited longest
    first: a pair that has just begun, or has ended, waits for few others.
    """

    def __init__(self, maps: SpliceMaps, addresses: Collection[str]) -> None:
        """Map the records for reading; no descriptor is kept. `addresses` are those that move
        between machines.
        """
        self._memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)
        self._slots = maps.workers * maps.slots
        self._table = bpf.map_memory(maps.pairs_fd, self._slots * PAIR_BYTES, write=False)
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)
        self._seen: dict[int, _Seen] = {}
        self._boot_unix_s = boot_unix_s()

    def scan(self, now_s: float) -> dict[str, Own]:
        """The pairs that another machine could take over, by key."""
        seen = dict(self._scan(now_s))
        self._seen = seen
        return {one.key: one.own for one in seen.values() if one.own is not None}

    def ids(self, known: Collection[str]) -> set[int]:
        """The ids of the pairs in the last scan that another machine can take over.

        `known` are the keys of the pairs that other machines know.
        """
        seen = self._seen.values()
        return {one.id for one in seen if one.own is not None and one.key in known}

    def _scan(self, now_s: float) -> Iterator[tuple[int, _Seen]]:
        memory = self._memory
        due: list[tuple[float, int, _Seen]] = []
        for index in used_indexes(memory):
            at = index * SPLICE_BYTES
            state, worker, _, reset = _STATE_TO_RESET.unpack_from(memory, at + Splice.state.offset)
            if state != SpliceState.ACTIVE or worker == HELD or reset:
                continue
            (pair_id,) = _NUMBER.unpack_from(memory, at + Splice.id.offset)
            if not pair_id:
                continue
            ends = tuple(_FINS.unpack_from(memory, at + fins_at) for fins_at in _FINS_AT)
            known = self._seen.get(index)
            if known is None or (known.id, known.ends) != (pair_id, ends):
                yield index, self._read(index, pair_id, ends, now_s, known)
            elif now_s >= known.until_s:
                due.append((known.until_s, index, known))
            else:
                yield index, known
        due.sort(key=lambda one: one[0])
        for n, (_, index, known) in enumerate(due):
            if n < READ_AT_ONCE:
                known = self._read(index, known.id, known.ends, now_s, known)
            yield index, known

    def _read(
        self,
        index: int,
        pair_id: int,
        ends: tuple[object, ...],
        now_s: float,
        known: _Seen | None,
    ) -> _Seen:
        record = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
        own = None
        key = ""
        if record.id == pair_id and is_replicable(record):
            pair = self._pair_of(record)
            if {pair.ends.listener.ip, pair.ends.source.ip} <= self._addresses:
                is_same = known is not None and known.id == pair_id and known.own is not None
                key = known.key if is_same and known is not None else pair.key
                own = Own(record.direction[0].claim, pair)
        return _Seen(pair_id, ends, now_s + MOVING_S, key, own)

    def _pair_of(self, record: Splice) -> Pair:
        shown = said_of(record, self._table, self._slots)
        return pair_of(record, shown, boot_unix_s=self._boot_unix_s)

    def close(self) -> None:
        """Unmap the records."""
        self._memory.close()
        self._table.close()
