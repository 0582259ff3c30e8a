"""The numbers by which programs know servers, and how one becomes another server's.

The supervisor gives them. One that it has not used for a minute it gives back: no program has read
it since. Then it is the keeper's turn, which forgets the way to that server, and says so as soon as
no connection waits for its answer; only behind that another server may have the number.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import socket
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express.connecting import MOST_TARGETS

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable

    from pyforwarder.core.address import Address

_REST_S: Final = 60.0
# The keeper has forgotten by then what has been given back, unless it hangs.
_TURN_S: Final = 1.0
_RECORD: Final = struct.Struct("=16sHH")  # address, port in wire order, IP version
_RECORD_BYTES: Final = 32
NUMBERS_BYTES: Final = MOST_TARGETS * (1 + _RECORD_BYTES)
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


class Server(NamedTuple):
    """An address as the maps have it."""

    address: bytes  # 16 bytes in wire order
    port_be: int
    version: int

    @classmethod
    def of(cls, address: Address) -> Server:
        """The same; `address` has an IP address without a scope."""
        return _server_of(address)


def packed(host: str) -> bytes:
    """16 bytes in wire order, of IPv4 as ::ffff:a.b.c.d."""
    found = ipaddress.ip_address(host).packed
    return found if len(found) == 16 else _MAPPED + found


@lru_cache(2 * MOST_TARGETS)
def _server_of(address: Address) -> Server:
    version = 6 if address.is_ipv6 else 4
    return Server(packed(address.host), socket.htons(address.port), version)


class _State(enum.IntEnum):
    """A byte of each number."""

    NEW = 0
    USED = 1  # its record stays as it is
    GIVEN_BACK = 2
    FORGOTTEN = 3  # by the keeper: it may be used again


class Numbers:
    """In memory that supervisor and keeper share; 0 is no server's."""

    def __init__(
        self, memory: mmap.mmap | bytearray, at: int, anew: Callable[[int], object]
    ) -> None:
        """`NUMBERS_BYTES` from `at` on; `anew` is told of a number that gets another server."""
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
        """The number of a server from here on, until `keep` goes without it; 0: none is left."""
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
            self._is_now(number, _State.USED)  # behind that: the keeper reads what is used
            self._given[server] = number
        self._resting.pop(number, None)
        return number

    def given(self, server: Server) -> int:
        """The number that it has; 0: none."""
        return self._given.get(server, 0)

    def keep(self, servers: Iterable[Server], now_s: float) -> None:
        """These are used; what others have rests from here on, and is given back then."""
        kept = {self.given(server) for server in servers}
        for server, number in list(self._given.items()):
            if number in kept:
                self._resting.pop(number, None)
            elif self._resting.setdefault(number, now_s + _REST_S) <= now_s:
                del self._given[server], self._resting[number]
                self._is_now(number, _State.GIVEN_BACK)

    def rests_until_s(self, now_s: float) -> float:
        """When there may be another to give; infinity if all are used."""
        if _State.GIVEN_BACK in self._states():
            return now_s + _TURN_S
        return min((one for one in self._resting.values() if one > now_s), default=math.inf)

    # The keeper

    def find(self, server: Server) -> int:
        """The number of a server that the supervisor has given it; 0: it has none."""
        states = self._states()
        if states != self._seen:
            # No number has got another server meanwhile without our having forgotten it.
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
        """The highest that any server has or had; 0: none."""
        return max(0, len(self._states().rstrip(b"\0")) - 1)

    def given_back(self) -> list[int]:
        """Those that are to be forgotten."""
        states = self._states()
        if _State.GIVEN_BACK not in states:
            return []
        return [number for number, state in enumerate(states) if state == _State.GIVEN_BACK]

    def mark_forgotten(self, number: int) -> None:
        """Nothing of ours refers any more to one that was given back."""
        self._is_now(number, _State.FORGOTTEN)
        self._seen = b""
