"""Limits on connections that hold across all workers, without a lock and without a system call.

Each worker writes only its own column of shared memory and reads all of them. Two workers that
admit at the same instant may overshoot by one each; nothing else is approximate but the rate of a
client, see `admit_client`.

What is counted belongs to a *scope*: all TCP listeners, all UDP listeners, or one listener, whose
scope is the index of its first counter (see `counters.Directory`), so that it outlives a reload.

Each worker also notes a client's network. Where clients count in a whole fleet, `ClientCounts`
(fleet_counts.py) reads that in another process, which writes what other machines have into
`OtherMachines` (see fleet/limits.py). Wrong numbers there make workers refuse clients, and do
nothing else. The memory's layout is in limits_memory.py.
"""

from __future__ import annotations

import enum
import mmap
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.client_network import ClientNetwork, fleet_network_of, network_of
from pyforwarder.runtime.limits_memory import (
    COLUMN_BYTES,
    EDITION_AT,
    ENTRIES_AT,
    ENTRY_WORDS,
    HELD_AT,
    MACHINES_AT,
    MOST_MACHINES,
    MOST_OTHERS,
    OTHERS_AT,
    PROBES,
    RATE_BUCKETS,
    RATE_ROWS,
    RATES_AT,
    SECOND_US,
    SECONDS_AT,
    TABLE_AT,
    TABLE_ENTRIES,
    UNTIL_AT,
    WORD_MASK,
    key_of,
    name_place,
    share_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

TCP: Final = 0
UDP: Final = 1

# What other machines have is believed for no longer than this: its process says six seconds at most
# (see fleet/reporting.py), and a worker may be a moment late.
_LONGEST_S: Final = 7.0
# A worker reads it again after so long at the earliest, however often it changes.
_READ_EVERY_S: Final = 0.05

_COUNT_BITS: Final = 32  # of a word at SECONDS_AT; the second is above them
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
_MOST_KNOWN: Final = 4096


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
    # With what other machines of the fleet have besides.
    PAIRS_PER_CLIENT_IN_FLEET = "pairs_per_client in the fleet"
    SESSIONS_PER_CLIENT_IN_FLEET = "sessions_per_client in the fleet"

    __hash__ = object.__hash__

    @property
    def counted_as(self) -> Limit:
        """The limit under whose name this one is counted: the one of the configuration."""
        return _COUNTED_AS.get(self, self)


_COUNTED_AS: Final = {
    Limit.PAIRS_PER_CLIENT_IN_FLEET: Limit.PAIRS_PER_CLIENT,
    Limit.SESSIONS_PER_CLIENT_IN_FLEET: Limit.SESSIONS_PER_CLIENT,
}


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
    # Whether a client's connections at other machines of the fleet count, too.
    in_fleet: bool = field(default=False, compare=False)

    @property
    def asks(self) -> bool:
        """Whether anything has to be asked about a new connection, beside `most`."""
        return bool(self.per_client or self.per_second or self.per_second_per_client)

    def fits(self, network: ClientNetwork) -> bool:
        """Whether a network is what counts as one client here."""
        return network.bits == (self.ipv4_bits if network.version == 4 else self.ipv6_bits)


def shared_memory(workers: int) -> list[mmap.mmap]:
    """A column for each worker, shared with children made by fork."""
    return [mmap.mmap(-1, COLUMN_BYTES) for _ in range(workers)]


class SharedLimits:
    """The limits, as one worker asks them and counts for them."""

    def __init__(
        self,
        memory: Sequence[mmap.mmap],
        *,
        worker: int,
        secret: bytes,
        others: mmap.mmap | None = None,
    ) -> None:
        """`memory` is a column for each worker, of which only this worker's need be writable.

        `secret` keys the hash of client addresses, the same for all workers. `others` is what other
        machines have (`OtherMachines`), for reading; without it no limit holds in a fleet.
        """
        self._columns = [memoryview(column).cast("Q") for column in memory]
        self._own = self._columns[worker]
        self._own_memory = memory[worker]
        self._secret = secret
        self._keys: dict[tuple[str, Bounds], int] = {}
        self._others_memory = memoryview(others).cast("Q") if others is not None else None
        self._others: dict[int, int] = {}
        self._machines = 1
        self._edition = -1  # of what is in `_others`
        self._read_s = 0.0  # not before

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
        """Count one more TCP pair of this worker, of that listener."""
        self._own[TCP] += 1
        self._own[listener] += 1

    def remove_pair(self, listener: int) -> None:
        """Count one TCP pair of this worker less."""
        own = self._own
        pairs, here = own[TCP], own[listener]
        if pairs and here:
            own[TCP] = pairs - 1
            own[listener] = here - 1
        else:
            self._lower(TCP, listener)

    def _lower(self, *scopes: int) -> None:
        """Take one off each count; a number that is wrong by one must not end the worker."""
        own = self._own
        for scope in scopes:
            count = own[scope]
            if count:
                own[scope] = count - 1

    def add_session(self, listener: int) -> None:
        """Count one more UDP session of this worker, of that listener."""
        self._own[UDP] += 1
        self._own[listener] += 1

    def remove_session(self, listener: int) -> None:
        """Count one UDP session of this worker less."""
        self._lower(UDP, listener)

    # Memory

    def set_held(self, scope: int, held_bytes: int) -> None:
        """What this worker's pairs of the scope hold in memory."""
        self._own[HELD_AT + scope] = held_bytes

    def held(self, scope: int) -> int:
        """What the pairs of the scope hold in memory, in bytes, as all workers last saw it."""
        return sum(column[HELD_AT + scope] for column in self._columns)

    # Rates

    def admit_this_second(self, most: int, now_s: float, scope: int = TCP) -> bool:
        """Whether a new connection is within `most` per clock second; counts it if so."""
        second = int(now_s)
        at = SECONDS_AT + scope
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
        now_us = int(now_s * SECOND_US)
        full_us = None
        seen = []
        for row in range(RATE_ROWS):
            at = RATES_AT + row * RATE_BUCKETS + (key >> 16 * row & (RATE_BUCKETS - 1))
            latest_us = 0
            for column in self._columns:
                latest_us = max(latest_us, column[at])
            seen.append((at, latest_us))
            full_us = latest_us if full_us is None else min(full_us, latest_us)
        assert full_us is not None
        full_us = max(full_us, now_us) + max(1, SECOND_US // per_second)
        if full_us > now_us + SECOND_US:
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
            known = self._keys[host, bounds] = key_of(text, self._secret)
        return known

    def client_count(self, key: int) -> int:
        """How many connections of this client there are, at all workers."""
        total = 0
        for column in self._columns:
            at = self._find(column, key)
            if at is not None:
                total += column[at + 1]
        return total

    def add_client(self, key: int, most: int) -> int | None:
        """Count one more connection of this client: where; None if it has `most` already.

        It is given back with `remove_client`.
        """
        if self.client_count(key) >= most:
            return None
        at = self._find(self._own, key)
        if at is None:
            at = self._vacant(key)
            if at is None:
                return None  # 16 clients hash together: refusing is the bounded answer
            # The count first: a reader must not see this key with another client's count.
            self._own[at + 1] = 0
            self._own[at] = key
        self._own[at + 1] += 1
        return at

    def remove_client(self, key: int) -> None:
        """Count one connection of this client less."""
        at = self._find(self._own, key)
        if at is not None and self._own[at + 1]:
            self._own[at + 1] -= 1

    # Each key has a step of its own (double hashing). With one step for all, entries form long
    # runs: of 12,000 clients in 16,384 entries 156 found none of their 16 places free, now 3.
    @staticmethod
    def _find(column: memoryview, key: int) -> int | None:
        step = key >> 32 | 1
        for probe in range(PROBES):
            at = TABLE_AT + ((key + probe * step) % TABLE_ENTRIES) * ENTRY_WORDS
            if column[at] == key:
                return at
        return None

    def _vacant(self, key: int) -> int | None:
        step = key >> 32 | 1
        for probe in range(PROBES):
            at = TABLE_AT + ((key + probe * step) % TABLE_ENTRIES) * ENTRY_WORDS
            if self._own[at] == 0 or self._own[at + 1] == 0:
                return at
        return None

    # All that is asked about a new connection, beside the number of pairs

    def admit(
        self,
        host: str | None,
        scopes: Sequence[Bounds],
        now_s: float,
        *,
        is_new: bool = True,
    ) -> Limit | tuple[int, ...]:
        """The limit of these scopes that the connection is one too many for, if any.

        Else the keys to give back with `give_back`. `host` is None where it is not known (yet).
        The first scope has its say first: what it refuses uses up no rate of the next. One that is
        not new was admitted before, and other machines are not asked.
        """
        keys: Limit | tuple[int, ...] = ()
        if host is not None:
            keys = self.admit_host(host, scopes, now_s, is_new=is_new)
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
        self, host: str, scopes: Sequence[Bounds], now_s: float, *, is_new: bool = True
    ) -> Limit | tuple[int, ...]:
        """The part of `admit` that concerns the client's address.

        Rates come after all counts: one too many in any scope has used up no rate.
        """
        keys: tuple[int, ...] = ()
        for bounds in scopes:
            if bounds.per_client:
                key = self.key(host, bounds)
                at = self.add_client(key, bounds.per_client)
                if at is None:
                    self.give_back(keys)
                    return Limit.SESSIONS_PER_CLIENT if bounds.is_udp else Limit.PAIRS_PER_CLIENT
                keys += (key,)
                # Also where the fleet does not count yet: after a reload it may.
                if self._others_memory is not None and self._own[name_at := name_place(at)] != key:
                    self._name(name_at, key, host, bounds)
                if is_new and self.is_beyond(key, bounds, now_s):
                    self.give_back(keys)
                    return (
                        Limit.SESSIONS_PER_CLIENT_IN_FLEET
                        if bounds.is_udp
                        else Limit.PAIRS_PER_CLIENT_IN_FLEET
                    )
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

    # The fleet

    def has_room(self, key: int, bounds: Bounds, now_s: float) -> bool:
        """Whether the client could have one more connection in that scope."""
        if self.client_count(key) >= bounds.per_client:
            return False
        return not self.is_beyond(key, bounds, now_s, more=1)

    def is_beyond(self, key: int, bounds: Bounds, now_s: float, *, more: int = 0) -> bool:
        """Whether the client, with `more` here, has too many with those that others have reported.

        Its share of this machine it has in any case.
        """
        memory = self._others_memory
        if memory is None or not bounds.in_fleet:
            return False
        if not 0 < memory[UNTIL_AT] - now_s * SECOND_US <= _LONGEST_S * SECOND_US:
            return False
        if memory[EDITION_AT] != self._edition and now_s >= self._read_s:
            self._read_s = now_s + _READ_EVERY_S
            self._read_others(memory)
        others = self._others.get(key)
        if not others:
            return False
        count = self.client_count(key) + more
        share = share_of(bounds.per_client, self._machines)
        return count > share and count + others > bounds.per_client

    def _read_others(self, memory: memoryview) -> None:
        edition = memory[EDITION_AT]
        if edition & 1:
            return  # it is being written
        count = min(memory[ENTRIES_AT], MOST_OTHERS)
        machines = memory[MACHINES_AT]
        words = memory[OTHERS_AT : OTHERS_AT + 2 * count].tolist()
        if memory[EDITION_AT] == edition:
            self._others = dict(zip(words[::2], words[1::2], strict=True))
            self._machines = max(1, min(machines, MOST_MACHINES))
            self._edition = edition

    def _name(self, at: int, key: int, host: str, bounds: Bounds) -> None:
        """Note there the name of a client that this worker counts."""
        network = fleet_network_of(host, ipv4_bits=bounds.ipv4_bits, ipv6_bits=bounds.ipv6_bits)
        first = high = low = 0
        if network is not None:
            first = bounds.scope << 16 | network.version << 8 | network.bits
            high, low = network.number >> 64, network.number & WORD_MASK
        own = self._own
        own[at], own[at + 1], own[at + 2], own[at + 3] = key, first, high, low


def new_secret() -> bytes:
    """A secret for `SharedLimits`, so that nobody can choose addresses that hash together."""
    return os.urandom(16)
