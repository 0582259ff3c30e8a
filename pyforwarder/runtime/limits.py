"""Limits on connections that hold across all workers, without a lock and without a system call.

Each worker writes only its own column of shared memory and reads all of them. Two workers that
admit at the same instant may overshoot by one each; nothing else is approximate but the rate of a
client, see `admit_client`.

What is counted belongs to a *scope*: all TCP listeners, all UDP listeners, or one listener, whose
scope is the index of its first counter (see `counters.Directory`), so that it outlives a reload.

Each worker also notes a client's network. Where clients count in a whole fleet, `ClientCounts`
reads that in another process, which writes what other machines have into `OtherMachines` (see
fleet/limits.py). Wrong numbers there make workers refuse clients, and do nothing else.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import itertools
import mmap
import os
import struct
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
_NAMES: Final = _RATES + _RATE_ROWS * _RATE_BUCKETS  # by entry of _TABLE: that client's name
_NAME_WORDS: Final = 4  # key; scope, version and bits of the network; its leading bits, high, low
_COLUMN_WORDS: Final = _NAMES + _TABLE_ENTRIES * _NAME_WORDS
# Whole pages, also where those have 64 KiB: a column is given back to the kernel by itself.
_LARGEST_PAGE_BYTES: Final = 1 << 16
COLUMN_BYTES: Final = -(-_COLUMN_WORDS * 8 // _LARGEST_PAGE_BYTES) * _LARGEST_PAGE_BYTES

# What other machines of the fleet have, for all workers.
_EDITION: Final = 0  # odd while it is written
_UNTIL: Final = 1  # microseconds of the steady clock: what stands here is good until then
_MACHINES: Final = 2  # of the fleet, with this one
_ENTRIES: Final = 3
_OTHERS: Final = 4  # a client's key, its count
OTHERS_BYTES: Final = 2 * _LARGEST_PAGE_BYTES
MOST_OTHERS: Final = (OTHERS_BYTES // 8 - _OTHERS) // 2
MOST_MACHINES: Final = 256
# What stands there is believed for no longer than this: its process says six seconds at most (see
# fleet/reporting.py), and a worker may be a moment late.
_LONGEST_S: Final = 7.0
# A worker reads it again after so long at the earliest, however often it changes.
_READ_EVERY_S: Final = 0.05

_COUNT_BITS: Final = 32  # of a word of _SECONDS; the second is above them
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
_SECOND_US: Final = 1_000_000
_KEY: Final = struct.Struct("=Q")
_WORD_MASK: Final = (1 << 64) - 1
_MOST_KNOWN: Final = 4096
_MOST_NAMED: Final = 1 << 16

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
    # By what other machines of the fleet have besides.
    PAIRS_PER_CLIENT_IN_FLEET = "pairs_per_client in the fleet"
    SESSIONS_PER_CLIENT_IN_FLEET = "sessions_per_client in the fleet"

    __hash__ = object.__hash__

    @property
    def counted_as(self) -> Limit:
        """The one by which it is counted: that of the configuration, wherever the others are."""
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
        """Whether that is one client here."""
        return network.bits == (self.ipv4_bits if network.version == 4 else self.ipv6_bits)


class FleetScope(NamedTuple):
    """A scope in which clients count in the whole fleet: kind and name are what others call it."""

    kind: str  # "tcp" or "udp": all listeners; "listener"
    name: str  # of the listener
    bounds: Bounds


class ClientNetwork(NamedTuple):
    """What of an address counts as one client."""

    version: int  # of IP
    bits: int
    number: int  # these leading bits

    def __str__(self) -> str:
        width = 32 if self.version == 4 else 128
        make = ipaddress.IPv4Network if self.version == 4 else ipaddress.IPv6Network
        return str(make((self.number << (width - self.bits), self.bits)))

    @classmethod
    def parse(cls, text: str) -> ClientNetwork:
        """The network that `str` gives.

        Raises:
            ValueError: it is written in another way, or is none.
        """
        network = ipaddress.ip_network(text)
        if str(network) != text or "%" in text:
            raise ValueError(f"{text!r} is {network}")
        bits = network.prefixlen
        number = int(network.network_address) >> (network.max_prefixlen - bits)
        return cls(network.version, bits, number)


def network_of(host: str, *, ipv4_bits: int, ipv6_bits: int) -> bytes:
    """What of a client's address counts as one client.

    IPv4 inside of IPv6 counts as IPv4. Link-local addresses count whole, with their zone: a whole
    network has one prefix there.
    """
    address = _counted_address(host)
    if address.version == 6 and address.is_link_local:
        return host.encode()
    network = _network(address, ipv4_bits, ipv6_bits)
    return b"%d %x" % (network.version, network.number)


def fleet_network_of(host: str, *, ipv4_bits: int, ipv6_bits: int) -> ClientNetwork | None:
    """The same for other machines; None where the address means somebody else there."""
    address = _counted_address(host)
    if address.is_link_local or address.is_loopback or address.is_unspecified:
        return None
    return _network(address, ipv4_bits, ipv6_bits)


def _counted_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4 or not any(address in network for network in _CARRY_IPV4):
        return address
    return ipaddress.IPv4Address(address.packed[12:])


def _network(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, ipv4_bits: int, ipv6_bits: int
) -> ClientNetwork:
    bits = ipv4_bits if address.version == 4 else ipv6_bits
    return ClientNetwork(address.version, bits, int(address) >> (address.max_prefixlen - bits))


def shared_memory(workers: int) -> list[mmap.mmap]:
    """A column for each worker, shared with children made by fork."""
    return [mmap.mmap(-1, COLUMN_BYTES) for _ in range(workers)]


class SharedLimits:
    """One worker's view of the limits."""

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
        """This worker has one more TCP pair, of that listener."""
        self._own[TCP] += 1
        self._own[listener] += 1

    def remove_pair(self, listener: int) -> None:
        """This worker has one TCP pair less."""
        own = self._own
        pairs, here = own[TCP], own[listener]
        if pairs and here:
            own[TCP] = pairs - 1
            own[listener] = here - 1
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
            known = self._keys[host, bounds] = _key_of(text, self._secret)
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
        return self._add_client(key, most) is not None

    def _add_client(self, key: int, most: int) -> int | None:
        """The same; where this worker counts it."""
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
                at = self._add_client(key, bounds.per_client)
                if at is None:
                    self.give_back(keys)
                    return Limit.SESSIONS_PER_CLIENT if bounds.is_udp else Limit.PAIRS_PER_CLIENT
                keys += (key,)
                # Also where the fleet does not count yet: after a reload it may.
                if self._others_memory is not None and self._own[name_at := _name_at(at)] != key:
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
        if not 0 < memory[_UNTIL] - now_s * _SECOND_US <= _LONGEST_S * _SECOND_US:
            return False
        if memory[_EDITION] != self._edition and now_s >= self._read_s:
            self._read_s = now_s + _READ_EVERY_S
            self._read_others(memory)
        others = self._others.get(key)
        if not others:
            return False
        count = self.client_count(key) + more
        share = share_of(bounds.per_client, self._machines)
        return count > share and count + others > bounds.per_client

    def _read_others(self, memory: memoryview) -> None:
        edition = memory[_EDITION]
        if edition & 1:
            return  # it is being written
        count = min(memory[_ENTRIES], MOST_OTHERS)
        machines = memory[_MACHINES]
        words = memory[_OTHERS : _OTHERS + 2 * count].tolist()
        if memory[_EDITION] == edition:
            self._others = dict(zip(words[::2], words[1::2], strict=True))
            self._machines = max(1, min(machines, MOST_MACHINES))
            self._edition = edition

    def _name(self, at: int, key: int, host: str, bounds: Bounds) -> None:
        """Note there the name of a client that this worker counts."""
        network = fleet_network_of(host, ipv4_bits=bounds.ipv4_bits, ipv6_bits=bounds.ipv6_bits)
        first = high = low = 0
        if network is not None:
            first = bounds.scope << 16 | network.version << 8 | network.bits
            high, low = network.number >> 64, network.number & _WORD_MASK
        own = self._own
        own[at], own[at + 1], own[at + 2], own[at + 3] = key, first, high, low


def share_of(most: int, machines: int) -> int:
    """What a client may have at each machine of a fleet, however many it has at others.

    No machine reports a client that has no more than this.
    """
    return most // (2 * machines)


def fleet_key(scope: int, network: ClientNetwork, secret: bytes) -> int:
    """Under what number workers with that secret count a client in that scope."""
    return _key_of(b"%d %d %x" % (scope, network.version, network.number), secret)


def _key_of(text: bytes, secret: bytes) -> int:
    digest = hashlib.blake2b(text, digest_size=8, key=secret).digest()
    key: int = _KEY.unpack(digest)[0]
    return key or 1


def _name_at(entry: int) -> int:
    """Where the client is named whose entry begins there."""
    return _NAMES + (entry - _TABLE) * (_NAME_WORDS // _ENTRY_WORDS)


class ClientCount(NamedTuple):
    """What all workers together have of a client."""

    scope: int
    network: ClientNetwork
    connections: int


class ClientCounts:
    """Which clients workers count, for a process that reads their columns.

    A worker's numbers of its own clients are believed, as by other workers.
    """

    def __init__(self, memory: Sequence[mmap.mmap], *, secret: bytes) -> None:
        """`memory` is a column for each worker, `secret` that of `SharedLimits`."""
        self._columns = [memoryview(column).cast("Q") for column in memory]
        self._secret = secret
        self._known: dict[int, tuple[int, ClientNetwork]] = {}

    def more_than(self, least: int) -> list[ClientCount]:
        """Those that have more than `least` connections, and that are known by their networks."""
        totals: dict[int, int] = {}
        places: dict[int, tuple[memoryview, int]] = {}
        for column in self._columns:
            counts = column[_TABLE + 1 : _RATES : _ENTRY_WORDS].tolist()
            for n in itertools.compress(range(_TABLE_ENTRIES), counts):
                at = _TABLE + n * _ENTRY_WORDS
                key = column[at]
                totals[key] = totals.get(key, 0) + counts[n]
                # Not each worker need have named the client.
                if key not in places or column[_name_at(at)] == key:
                    places[key] = column, at
        found = []
        for key, count in totals.items():
            if count > least:
                who = self._known.get(key) or self._identify(key, *places[key])
                if who is not None:
                    found.append(ClientCount(*who, count))
        return found

    def _identify(
        self, key: int, column: memoryview, entry: int
    ) -> tuple[int, ClientNetwork] | None:
        at = _name_at(entry)
        first, high, low = column[at + 1], column[at + 2], column[at + 3]
        network = ClientNetwork(first >> 8 & 255, first & 255, high << 64 | low)
        scope = first >> 16
        # Not yet written, or already of the next client there.
        if not first or fleet_key(scope, network, self._secret) != key:
            return None
        width = {4: 32, 6: 128}.get(network.version, 0)
        if network.bits > width or network.number >> network.bits:
            return None
        if len(self._known) >= _MOST_NAMED:
            self._known.clear()
        self._known[key] = scope, network
        return scope, network


class OtherMachines:
    """What other machines of the fleet have of clients: one process writes, all workers read."""

    def __init__(self, memory: mmap.mmap) -> None:
        """`memory` has OTHERS_BYTES; what a process before us has left there is replaced."""
        self._words = memoryview(memory).cast("Q")
        self._words[_UNTIL] = 0

    def hold_until(self, until_s: float) -> None:
        """What was written is good until then (time.monotonic())."""
        self._words[_UNTIL] = int(until_s * _SECOND_US)

    def write(self, counts: Mapping[int, int], machines: int) -> None:
        """Of each client by its key (`fleet_key`): those of all other machines together.

        `machines` is how many there are, with this one. Of more than MOST_OTHERS clients those that
        have most are written.
        """
        entries = list(counts.items())
        if len(entries) > MOST_OTHERS:
            entries = sorted(entries, key=lambda entry: entry[1], reverse=True)[:MOST_OTHERS]
        flat = array("Q", itertools.chain.from_iterable(entries))
        words = self._words
        words[_EDITION] = edition = words[_EDITION] | 1
        words[_OTHERS : _OTHERS + len(flat)] = memoryview(flat)
        words[_ENTRIES] = len(entries)
        words[_MACHINES] = machines
        words[_EDITION] = edition + 1 & _WORD_MASK


def new_secret() -> bytes:
    """A secret for `SharedLimits`, so that nobody can choose addresses that hash together."""
    return os.urandom(16)
