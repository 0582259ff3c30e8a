"""The connections that no other machine could continue, from the pair table, which is only read.

All but spliced pairs that other machines know: copied ones, those in a sockmap, those whose server
is not connected yet.
"""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import abi
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Family, PairRecord, PairState
from pyforwarder.fleet.failover.record import Endpoint
from pyforwarder.fleet.failover.stays import GROUP_PAIRS, Connection

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

_STATE_AT: Final = PairRecord.state.offset


class Staying:
    """The records of the pair table."""

    def __init__(self, maps: SpliceMaps, addresses: Collection[str]) -> None:
        """Map the table for reading; no descriptor is kept. `addresses` are those that move between
        machines.
        """
        self._slots = maps.workers * maps.slots
        self._table = bpf.map_memory(maps.pairs_fd, self._slots * PAIR_BYTES, write=False)
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)

    def scan(self, replicated: Collection[int]) -> dict[int, list[Connection]]:
        """The connections of all pairs except those with these ids, by group."""
        found: dict[int, list[Connection]] = {}
        view = memoryview(self._table)
        try:
            states = bytes(view[_STATE_AT : self._slots * PAIR_BYTES : PAIR_BYTES])
        finally:
            view.release()
        free = bytes(GROUP_PAIRS)
        for first in range(0, len(states), GROUP_PAIRS):
            group = states[first : first + GROUP_PAIRS]
            if group == free[: len(group)]:
                continue
            connections = [
                one
                for n, state in enumerate(group)
                if state != PairState.FREE
                for one in self._connections(first + n, replicated)
            ]
            if connections:
                found[first // GROUP_PAIRS] = connections
        return found

    def _connections(self, slot: int, replicated: Collection[int]) -> list[Connection]:
        record = PairRecord.from_buffer_copy(self._table, slot * PAIR_BYTES)
        if (
            record.sequence & 1  # it is being written at this moment
            or record.protocol
            or record.id in replicated
        ):
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


def _endpoint(endpoint: abi.Endpoint) -> Endpoint | None:
    if endpoint.family == Family.IPV4:
        return Endpoint(bytes(endpoint.ip)[12:], endpoint.port)
    return Endpoint(bytes(endpoint.ip), endpoint.port) if endpoint.family == Family.IPV6 else None


assert ctypes.sizeof(PairRecord) == PAIR_BYTES
