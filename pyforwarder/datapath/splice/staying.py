"""The connections that no other machine could continue, from the pair table, which is only read.

All but spliced pairs that other machines know: copied ones, those in a sockmap, those whose server
is not connected yet.
"""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import itertools
import struct
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf import abi
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Family, PairRecord, PairState
from pyforwarder.fleet.failover.record import Endpoint
from pyforwarder.fleet.failover.stays import GROUP_PAIRS, Connection

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

_STATE_AT: Final = PairRecord.state.offset
_ID_AT: Final = PairRecord.id.offset
assert PairRecord.sequence.offset == _ID_AT + 8


class _Group(NamedTuple):
    slots: list[int]  # of these connections
    described: tuple[int, ...]  # id and sequence of all records of the group
    connections: list[Connection]


class Staying:
    """The records of the pair table."""

    def __init__(self, maps: SpliceMaps, addresses: Collection[str]) -> None:
        """Map the table for reading; no descriptor is kept. `addresses` are those that move between
        machines.
        """
        self._slots = maps.workers * maps.slots
        self._table = bpf.map_memory(maps.pairs_fd, self._slots * PAIR_BYTES, write=False)
        self._found: dict[int, _Group] = {}  # in the scan before
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)

    def scan(self, replicated: set[int]) -> dict[int, list[Connection]]:
        """The connections of all pairs except those with these ids, by group.

        A group with the same connections as before is the same object.
        """
        found: dict[int, _Group] = {}
        states = self._table[_STATE_AT : self._slots * PAIR_BYTES : PAIR_BYTES]
        free = bytes(GROUP_PAIRS)
        for first in range(0, len(states), GROUP_PAIRS):
            group = states[first : first + GROUP_PAIRS]
            if group == free[: len(group)]:
                continue
            described = _described(len(group)).unpack_from(self._table, first * PAIR_BYTES)
            ids = described[::2]
            # Mostly all of a group are pairs that other machines know.
            if replicated.issuperset(itertools.compress(ids, group)):
                continue
            slots = [
                first + n
                for n, (state, pair_id) in enumerate(zip(group, ids, strict=True))
                if state != PairState.FREE and pair_id not in replicated
            ]
            number = first // GROUP_PAIRS
            before = self._found.get(number)
            if before is None or (before.slots, before.described) != (slots, described):
                connections = [one for slot in slots for one in self._connections(slot)]
                before = _Group(slots, described, connections)
            found[number] = before
        self._found = found
        return {number: one.connections for number, one in found.items() if one.connections}

    def _connections(self, slot: int) -> list[Connection]:
        record = PairRecord.from_buffer_copy(self._table, slot * PAIR_BYTES)
        if record.sequence & 1 or record.protocol:  # it is being written at this moment, or UDP
            return []
        found = []
        for own, peer, peer_connected in (
            (record.listener, record.client, True),
            (record.source, record.server, False),
        ):
            ours, theirs = _endpoint(own), _endpoint(peer)
            if ours is None or theirs is None or ours.ip not in self._addresses:
                continue
            if len(ours.ip) == len(theirs.ip) and ours.port and theirs.port:
                found.append(Connection(ours, theirs, peer_connected))
        return found

    def close(self) -> None:
        """Unmap the table."""
        self._table.close()


@functools.cache  # all groups but the last have as many
def _described(count: int) -> struct.Struct:
    """Id and sequence of so many records: who describes a connection changes both."""
    return struct.Struct("=" + count * f"{_ID_AT}xQQ{PAIR_BYTES - _ID_AT - 16}x")


def _endpoint(endpoint: abi.Endpoint) -> Endpoint | None:
    if endpoint.family == Family.IPV4:
        return Endpoint(bytes(endpoint.ip)[12:], endpoint.port)
    return Endpoint(bytes(endpoint.ip), endpoint.port) if endpoint.family == Family.IPV6 else None


assert ctypes.sizeof(PairRecord) == PAIR_BYTES
