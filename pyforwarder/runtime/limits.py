"""Limits on connections that hold across all workers, without a lock and without a system call.

Each worker writes only its own column of shared memory and reads all of them. Two workers that
admit at the same instant may overshoot by one each; nothing else is approximate but the rate of a
client, see `admit_client`.

What is counted belongs to a *scope*: all TCP listeners, all UDP listeners, or one listener, whose
scope is the index of its first counter (see `counters.Directory`), so that it outlives a reload.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

TCP: Final = 0
UDP: Final = 1
_SCOPES: Final = 16_384  # as many as there are counters

_TABLE_ENTRIES: Final = 1 << 15  # clients with open connections, per worker and scope they count in
_PROBES: Final = 16
_ENTRY_WORDS: Final = 2  # a client's 64-bit key, its count
_RATE_ROWS: Final = 4
_RATE_BUCKETS: Final = 1 << 14  # in each row

_PAIRS: Final = 0  # by scope
_SECONDS: Final = _PAIRS + _SCOPES  # by scope: a clock second, and how many were admitted in it
_HELD: Final = _SECONDS + _SCOPES  # by scope: bytes that pairs hold in memory
_TABLE: Final = _HELD + _SCOPES
_RATES: Final = _TABLE + _TABLE_ENTRIES * _ENTRY_WORDS
_COLUMN_WORDS: Final = _RATES + _RATE_ROWS * _RATE_BUCKETS
# Whole pages, also where those have 64 KiB: a column is given back to the kernel by itself.
_LARGEST_PAGE_BYTES: Final = 1 << 16
COLUMN_BYTES: Final = -(-_COLUMN_WORDS * 8 // _LARGEST_PAGE_BYTES) * _LARGEST_PAGE_BYTES

_COUNT_BITS: Final = 32  # of a word of _SECONDS; the second is above them
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
_SECOND_US: Final = 1_000_000
_KEY: Final = struct.Struct("=Q")
_MOST_KNOWN: Final = 4096

# Addresses of IPv4 clients as IPv6 writes them: on a socket for both (RFC 4291 2.5.5.2), and behind
# a translator of the well-known prefix (RFC 6052 2.1). As one prefix of 64 bits they would all be
# one client.
_CARRY_IPV4: Final = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))


class Limit(enum.Enum):
    """What a connection was one too many for; the configuration's words, where it has any."""

    PAIRS = "pairs"
    PAIRS_PER_CLIENT = "pairs_per_client"
    SESSIONS = "sessions"
    SESSIONS_PER_CLIENT = "sessions_per_client"
    NEW_PER_SECOND = "new_per_second"
    NEW_PER_SECOND_PER_CLIENT = "new_per_second_per_client"
    MEMORY = "memory"
    DESCRIPTORS = "descriptors"  # of this worker: open files

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one scope; 0 means none."""

    scope: int
    most: int = 0  # pairs or sessions
    per_client: int = 0
    per_second: int = 0
    per_second_per_client: int = 0
    ipv4_bits: int = 32  # how much of an address is one client
    ipv6_bits: int = 64
    is_udp: bool = False

    @property
    def asks(self) -> bool:
        """Whether anything has to be asked about a new connection, beside `most`."""
        return bool(self.per_client or self.per_second or self.per_second_per_client)


def network_of(host: str, *, ipv4_bits: int, ipv6_bits: int) -> bytes:
    """What of a client's address counts as one client.

    IPv4 inside of IPv6 counts as IPv4. Link-local addresses count whole, with their zone: a whole
    network has one prefix there.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_link_local:
            return host.encode()
        if any(address in network for network in _CARRY_IPV4):
            address = ipaddress.IPv4Address(address.packed[12:])
    bits = ipv4_bits if address.version == 4 else ipv6_bits
    whole = len(address.packed) * 8
    kept = int.from_bytes(address.packed, "big") >> (whole - bits)
    return b"%d %x" % (address.version, kept)


def shared_memory(workers: int) -> list[mmap.mmap]:
    """A column for each worker, shared with children made by fork."""
    return [mmap.mmap(-1, COLUMN_BYTES) for _ in range(workers)]


class SharedLimits:
    """One worker's view of the limits."""

    def __init__(self, memory: Sequence[mmap.mmap], *, worker: int, secret: bytes) -> None:
        """`memory` is a column for each worker, of which only this worker's need be writable.

        `secret` keys the hash of client addresses, the same for all workers.
        """
        self._columns = [memoryview(column).cast("Q") for column in memory]
        self._own = self._columns[worker]
        self._own_memory = memory[worker]
        self._secret = secret
        self._keys: dict[tuple[str, Bounds], int] = {}

    def reset_own(self) -> None:
        """Forget what this worker's dead predecessor had counted."""
        self._own_memory.madvise(mmap.MADV_REMOVE)

    # Pairs and sessions

    @property
    def pairs(self) -> int:
        """TCP pairs of all workers."""
        return self.count(TCP)

    @property
    def sessions(self) -> int:
        """UDP sessions of all workers."""
        return self.count(UDP)

    def count(self, scope: int) -> int:
        """Pairs or sessions of the scope, of all workers."""
        total = 0
        for column in self._columns:
            total += column[scope]
        return total

    def add_pair_below(self, most: int, listener: int, most_here: int = 0) -> bool:
        """Count one more TCP pair of this worker, unless all workers have too many already.

        `listener` is the scope of its listener, which may have `most_here`; 0: no limit.
        """
        total = 0
        for column in self._columns:
            total += column[TCP]
        if total >= most or (most_here and self.count(listener) >= most_here):
            return False
        own = self._own
        own[TCP] += 1
        own[listener] += 1
        return True

    def add_pair(self, listener: int) -> None:
        """This worker has one more TCP pair, of that listener."""
        self._own[TCP] += 1
        self._own[listener] += 1

    def remove_pair(self, listener: int) -> None:
        """This worker has one TCP pair less."""
        own = self._own
        if own[TCP] and own[listener]:
            own[TCP] -= 1
            own[listener] -= 1
        else:
            self._lower(TCP, listener)

    def _lower(self, *scopes: int) -> None:
        """One less; a number that is wrong by one must not end the worker."""
        own = self._own
        for scope in scopes:
            count = own[scope]
            if count:
                own[scope] = count - 1

    def add_session(self, listener: int) -> None:
        """This worker has one more UDP session, of that listener."""
        self._own[UDP] += 1
        self._own[listener] += 1

    def remove_session(self, listener: int) -> None:
        """This worker has one UDP session less."""
        self._lower(UDP, listener)

    # Memory

    def set_held(self, scope: int, held_bytes: int) -> None:
        """What this worker's pairs of the scope hold in memory."""
        self._own[_HELD + scope] = held_bytes

    def held(self, scope: int) -> int:
        """What the pairs of the scope hold in memory, in bytes, as all workers last saw it."""
        return sum(column[_HELD + scope] for column in self._columns)

    # Rates

    def admit_this_second(self, most: int, now_s: float, scope: int = TCP) -> bool:
        """Whether a new connection is within `most` per clock second; counts it if so."""
        second = int(now_s)
        at = _SECONDS + scope
        total = 0
        for column in self._columns:
            word = column[at]
            if word >> _COUNT_BITS == second:
                total += word & _COUNT_MASK
        if total >= most:
            return False
        own = self._own[at]
        count = own & _COUNT_MASK if own >> _COUNT_BITS == second else 0
        self._own[at] = second << _COUNT_BITS | (count + 1)
        return True

    def admit_client(self, key: int, per_second: int, now_s: float) -> bool:
        """Whether a new connection is within the client's rate; counts it if so.

        A token bucket for each client, filled `per_second` times a second and never fuller than
        that, kept as the time at which it will be full again (the generic cell rate algorithm, ITU
        I.371). The time only moves on, so the latest that any worker has written is the one.

        The memory is fixed: a client's bucket is four entries that it shares with others whose
        keys fall there, of which the one with most tokens counts. So nobody can make it grow or
        push another's debt out, a client never gets more than its rate, and it gets less only
        while others use up all its four.
        """
        now_us = int(now_s * _SECOND_US)
        full_us = None
        seen = []
        for row in range(_RATE_ROWS):
            at = _RATES + row * _RATE_BUCKETS + (key >> 16 * row & (_RATE_BUCKETS - 1))
            latest_us = 0
            for column in self._columns:
                latest_us = max(latest_us, column[at])
            seen.append((at, latest_us))
            full_us = latest_us if full_us is None else min(full_us, latest_us)
        assert full_us is not None
        full_us = max(full_us, now_us) + max(1, _SECOND_US // per_second)
        if full_us > now_us + _SECOND_US:
            return False
        for at, latest_us in seen:
            if latest_us < full_us:
                self._own[at] = full_us
        return True

    # Clients

    def key(self, host: str, bounds: Bounds) -> int:
        """Under what number a client counts in that scope."""
        known = self._keys.get((host, bounds))
        if known is None:
            if len(self._keys) >= _MOST_KNOWN:
                self._keys.clear()
            network = network_of(host, ipv4_bits=bounds.ipv4_bits, ipv6_bits=bounds.ipv6_bits)
            text = b"%d %s" % (bounds.scope, network)
            digest = hashlib.blake2b(text, digest_size=8, key=self._secret).digest()
            known = self._keys[host, bounds] = _KEY.unpack(digest)[0] or 1
        return known

    def client_count(self, key: int) -> int:
        """How many connections of this client there are, at all workers."""
        total = 0
        for column in self._columns:
            at = self._find(column, key)
            if at is not None:
                total += column[at + 1]
        return total

    def add_client(self, key: int, most: int) -> bool:
        """Count one more connection of this client; False if it has `most` already.

        Every True is given back with `remove_client`.
        """
        if self.client_count(key) >= most:
            return False
        at = self._find(self._own, key)
        if at is None:
            at = self._vacant(key)
            if at is None:
                return False  # 16 clients hash together: refusing is the bounded answer
            # The count first: a reader must not see this key with another client's count.
            self._own[at + 1] = 0
            self._own[at] = key
        self._own[at + 1] += 1
        return True

    def remove_client(self, key: int) -> None:
        """One connection of this client less."""
        at = self._find(self._own, key)
        if at is not None and self._own[at + 1]:
            self._own[at + 1] -= 1

    # Each key has a step of its own (double hashing). With one step for all, entries form long
    # runs: of 12,000 clients in 16,384 entries 156 found none of their 16 places free, now 3.
    @staticmethod
    def _find(column: memoryview, key: int) -> int | None:
        step = key >> 32 | 1
        for probe in range(_PROBES):
            at = _TABLE + ((key + probe * step) % _TABLE_ENTRIES) * _ENTRY_WORDS
            if column[at] == key:
                return at
        return None

    def _vacant(self, key: int) -> int | None:
        step = key >> 32 | 1
        for probe in range(_PROBES):
            at = _TABLE + ((key + probe * step) % _TABLE_ENTRIES) * _ENTRY_WORDS
            if self._own[at] == 0 or self._own[at + 1] == 0:
                return at
        return None

    # All that is asked about a new connection, beside the number of pairs

    def admit(
        self, host: str | None, scopes: Sequence[Bounds], now_s: float
    ) -> Limit | tuple[int, ...]:
        """The limit of these scopes that the connection is one too many for, if any.

        Else the keys to give back with `give_back`. `host` is None where it is not known (yet).
        The first scope has its say first: what it refuses uses up no rate of the next.
        """
        keys: Limit | tuple[int, ...] = ()
        if host is not None:
            keys = self.admit_host(host, scopes, now_s)
        if isinstance(keys, Limit):
            return keys
        # After the client's own limits: what they refuse uses nothing up that others want.
        for bounds in scopes:
            if bounds.per_second and not self.admit_this_second(
                bounds.per_second, now_s, bounds.scope
            ):
                self.give_back(keys)
                return Limit.NEW_PER_SECOND
        return keys

    def admit_host(
        self, host: str, scopes: Sequence[Bounds], now_s: float
    ) -> Limit | tuple[int, ...]:
        """The part of `admit` that concerns the client's address.

        Rates come after all counts: one too many in any scope has used up no rate.
        """
        keys: tuple[int, ...] = ()
        for bounds in scopes:
            if bounds.per_client:
                key = self.key(host, bounds)
                if not self.add_client(key, bounds.per_client):
                    self.give_back(keys)
                    return Limit.SESSIONS_PER_CLIENT if bounds.is_udp else Limit.PAIRS_PER_CLIENT
                keys += (key,)
        for bounds in scopes:
            per_second = bounds.per_second_per_client
            if per_second and not self.admit_client(self.key(host, bounds), per_second, now_s):
                self.give_back(keys)
                return Limit.NEW_PER_SECOND_PER_CLIENT
        return keys

    def give_back(self, keys: Sequence[int]) -> None:
        """A connection that was admitted with these keys has ended."""
        for key in keys:
            self.remove_client(key)


def new_secret() -> bytes:
    """A secret for `SharedLimits`, so that nobody can choose addresses that hash together."""
    return os.urandom(16)
