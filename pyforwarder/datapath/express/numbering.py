"""The numbers of servers in the programs' maps, and how a number passes to another server.

The supervisor gives the numbers. One that it has not used for a minute it gives back: no program
has read it since. Then the keeper deletes what it knows of the route to that server, and marks the
number as forgotten as soon as no connection waits for the server's answer. Only after that another
server may get the number.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import socket
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf.abi import MAPPED
from pyforwarder.datapath.express.connection_maps import MOST_TARGETS

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable

    from pyforwarder.core.address import Address

_REST_S: Final = 60.0
# By then the keeper has marked a number as forgotten, unless it hangs.
_TURN_S: Final = 1.0
# Address, port in wire order, IP version, source.
_RECORD: Final = struct.Struct("=16sHH16s")
_RECORD_BYTES: Final = 40
NUMBERS_BYTES: Final = MOST_TARGETS * (1 + _RECORD_BYTES)


# `source` of a server that is reached from the address of the route.
NO_SOURCE: Final = bytes(16)


class Server(NamedTuple):
    """The address of a server, as the maps have it, and the one that connections come from."""

    address: bytes  # 16 bytes in wire order
    port_be: int
    version: int
    source: bytes = NO_SOURCE  # likewise, where the upstream says it

    @classmethod
    def of(cls, address: Address, source: str = "") -> Server:
        """From an IP address and port; the address must have no scope."""
        return _server_of(address, source)


def packed(host: str) -> bytes:
    """An address as 16 bytes in wire order; IPv4 as ::ffff:a.b.c.d."""
    found = ipaddress.ip_address(host).packed
    return found if len(found) == 16 else MAPPED + found


@lru_cache(2 * MOST_TARGETS)
def _server_of(address: Address, source: str) -> Server:
    version = 6 if address.is_ipv6 else 4
    came_from = packed(source) if source else NO_SOURCE
    return Server(packed(address.host), socket.htons(address.port), version, came_from)


class _State(enum.IntEnum):
    """The state of a number, one byte."""

    NEW = 0
    USED = 1  # its record does not change
    GIVEN_BACK = 2
    FORGOTTEN = 3  # by the keeper: the number may be used again


class Numbers:
    """The numbers, in memory that supervisor and keeper share; 0 belongs to no server."""

    def __init__(
        self, memory: mmap.mmap | bytearray, at: int, anew: Callable[[int], object]
    ) -> None:
        """They take `NUMBERS_BYTES` from `at` on; `anew` is called with a number that gets another
        server.
        """
        self._memory, self._at, self._records_at = memory, at, at + MOST_TARGETS
        self._anew = anew
        self._given: dict[Server, int] = {}
        self._resting: dict[int, float] = {}  # until when
        self._seen = b""
        self._found: dict[Server, int] = {}  # by then

    def _states(self) -> bytes:
        return bytes(self._memory[self._at : self._at + MOST_TARGETS])

    def _is_now(self, number: int, state: _State) -> None:
        self._memory[self._at + number] = state

    # The supervisor

    def give(self, server: Server) -> int:
        """Give a server a number, until `keep` is called without it; 0: none is left."""
        number = self._given.get(server)
        if number is None:
            states = self._states()
            number = states.find(_State.NEW, 1)
            if number < 0:
                number = states.find(_State.FORGOTTEN, 1)
                if number < 0:
                    return 0
                self._anew(number)
            at = self._records_at + number * _RECORD_BYTES
            _RECORD.pack_into(self._memory, at, *server)
            # After the record: the keeper reads the records of used numbers.
            self._is_now(number, _State.USED)
            self._given[server] = number
        self._resting.pop(number, None)
        return number

    def given(self, server: Server) -> int:
        """The number of a server; 0: it has none."""
        return self._given.get(server, 0)

    def keep(self, servers: Iterable[Server], now_s: float) -> None:
        """These servers are in use; the numbers of others are given back after a minute."""
        kept = {self.given(server) for server in servers}
        for server, number in list(self._given.items()):
            if number in kept:
                self._resting.pop(number, None)
            elif self._resting.setdefault(number, now_s + _REST_S) <= now_s:
                del self._given[server], self._resting[number]
                self._is_now(number, _State.GIVEN_BACK)

    def rests_until_s(self, now_s: float) -> float:
        """When another number may become free; infinity if all are in use."""
        if _State.GIVEN_BACK in self._states():
            return now_s + _TURN_S
        return min((one for one in self._resting.values() if one > now_s), default=math.inf)

    # The keeper

    def find(self, server: Server) -> int:
        """The number that the supervisor has given a server; 0: none."""
        states = self._states()
        if states != self._seen:
            # Rebuilt when a state has changed: no number passes to another server without that.
            self._found = {
                Server(
                    *_RECORD.unpack_from(self._memory, self._records_at + number * _RECORD_BYTES)
                ): number
                for number, state in enumerate(states)
                if state == _State.USED
            }
            self._seen = states
        return self._found.get(server, 0)

    def most(self) -> int:
        """The highest number that was ever given; 0: none."""
        return max(0, len(self._states().rstrip(b"\0")) - 1)

    def given_back(self) -> list[int]:
        """The numbers that the keeper must forget."""
        states = self._states()
        if _State.GIVEN_BACK not in states:
            return []
        return [number for number, state in enumerate(states) if state == _State.GIVEN_BACK]

    def mark_forgotten(self, number: int) -> None:
        """Mark a number that was given back: nothing in the keeper refers to it any more."""
        self._is_now(number, _State.FORGOTTEN)
        self._seen = b""
