"""Where QUIC connection ids lead, known to all workers.

A client whose address changes may come to another worker. So each has a part of a table that all
can read: the ids that servers of its sessions have said, and where those servers are. It can write
no other part. What stands in another's part is believed as far as the rules allow it
(`DatagramServer` asks them).
"""

from __future__ import annotations

import ipaddress
import math
import mmap
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from pyforwarder.core.address import Address, ip_text
from pyforwarder.core.first_packet.quic_ids import LONGEST, SHORTEST, id_of_client
from pyforwarder.runtime.one_store import store32

# An id is known so long after its session has ended: clients come back after a silence.
KEEP_S: Final = 120.0

_BUCKETS: Final = 1024
_WAYS: Final = 16
# length, id, is_ipv6, address, port, listener, rule, server's number, until when
_ENTRY: Final = struct.Struct("=B20sB16sHIIhd6x")
_UNTIL: Final = struct.Struct("=d")
_UNTIL_AT: Final = _ENTRY.size - 6 - _UNTIL.size
_HEAD_BYTES: Final = 1 + LONGEST
_BUCKET_BYTES: Final = _WAYS * _ENTRY.size
_LENGTHS: Final = struct.Struct("=I")  # at the beginning of a part: bit n, ids of n bytes
_FIRST_BUCKET: Final = mmap.PAGESIZE
PART_BYTES: Final = _FIRST_BUCKET + _BUCKETS * _BUCKET_BYTES


class SessionTarget(NamedTuple):
    """Where an id leads: what a session was opened by, in numbers that reloads do not change."""

    server: Address
    listener: int  # its number among the counters
    rule: int  # likewise
    number: int  # of the server in its upstream; -1: the rule says one itself, or its client did


class ConnectionIds:
    """The connection ids that a worker knows: its own, and those of others."""

    def __init__(self, parts: Sequence[mmap.mmap], worker: int) -> None:
        """`parts` have PART_BYTES each; this worker's is writable, and is emptied."""
        self._parts = parts
        self._own = parts[worker]
        self._held: dict[bytes, int] = {}  # ids of open sessions, and how many have each
        if _LENGTHS.unpack_from(self._own)[0]:  # a worker before this one has left something
            self._own[:] = bytes(PART_BYTES)

    def learn(self, connection_id: bytes, target: SessionTarget, now_s: float) -> None:
        """The id leads there, until `forget` has been called as often."""
        length = len(connection_id)
        assert SHORTEST <= length <= LONGEST
        self._held[connection_id] = self._held.get(connection_id, 0) + 1
        at = self._place(connection_id, now_s)
        entry = _ENTRY.pack(
            length,
            connection_id,
            target.server.is_ipv6,
            ipaddress.ip_address(target.server.host).packed,
            target.server.port,
            target.listener,
            target.rule,
            target.number,
            math.inf,
        )
        # Its head last: others look for that, and must not find it in front of an old rest.
        self._own[at] = 0
        self._own[at + _HEAD_BYTES : at + _ENTRY.size] = entry[_HEAD_BYTES:]
        self._own[at + 1 : at + _HEAD_BYTES] = entry[1:_HEAD_BYTES]
        self._own[at] = length
        (lengths,) = _LENGTHS.unpack_from(self._own)
        if not lengths >> length & 1:
            store32(self._own, 0, lengths | 1 << length)

    def forget(self, connection_id: bytes, now_s: float) -> None:
        """A session with it has ended; it leads there for a while still."""
        self._held[connection_id] -= 1
        if self._held[connection_id]:
            return
        del self._held[connection_id]
        at = _find(self._own, connection_id)
        if at is not None:
            _UNTIL.pack_into(self._own, at + _UNTIL_AT, now_s + KEEP_S)

    def find(
        self, datagram: bytes, *, listener: int, now_s: float
    ) -> tuple[bytes, SessionTarget] | None:
        """The id in a client's short header, and where it leads."""
        lengths = 0
        for part in self._parts:
            lengths |= _LENGTHS.unpack_from(part)[0]
        for length in range(SHORTEST, LONGEST + 1):
            if not lengths >> length & 1:
                continue
            connection_id = id_of_client(datagram, length)
            if not connection_id:
                return None
            for part in self._parts:
                at = _find(part, connection_id)
                if at is None:
                    continue
                target, until_s = _read(part, at)
                if target.listener == listener and until_s >= now_s:
                    return connection_id, target
        return None

    def _place(self, connection_id: bytes, now_s: float) -> int:
        """Where the id stands or may stand: in a free place, else in that of the oldest."""
        at = _find(self._own, connection_id)
        if at is not None:
            return at
        start = _bucket(connection_id)
        places = range(start, start + _BUCKET_BYTES, _ENTRY.size)
        free = next((place for place in places if not self._own[place]), None)
        if free is not None:
            return free
        return min(places, key=lambda place: _until(self._own, place))

    def close(self) -> None:
        """Unmap the memory."""
        for part in self._parts:
            part.close()


def _bucket(connection_id: bytes) -> int:
    return _FIRST_BUCKET + zlib.crc32(connection_id) % _BUCKETS * _BUCKET_BYTES


def _find(part: mmap.mmap, connection_id: bytes) -> int | None:
    """Where the id stands in a worker's part."""
    start = _bucket(connection_id)
    wanted = bytes((len(connection_id),)) + connection_id
    at = part.find(wanted, start, start + _BUCKET_BYTES)
    while at >= 0:
        if not (at - start) % _ENTRY.size:
            return at
        at = part.find(wanted, at + 1, start + _BUCKET_BYTES)
    return None


def _until(part: mmap.mmap, at: int) -> float:
    return float(_UNTIL.unpack_from(part, at + _UNTIL_AT)[0])


def _read(part: mmap.mmap, at: int) -> tuple[SessionTarget, float]:
    _, _, is_ipv6, packed, port, listener, rule, number, until_s = _ENTRY.unpack_from(part, at)
    server = Address(ip_text(ipaddress.ip_address(packed if is_ipv6 else packed[:4])), port)
    return SessionTarget(server, listener, rule, number), until_s
