"""Clients that count in a whole fleet: workers' counts for others, and others' for workers."""

from __future__ import annotations

import itertools
import mmap
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.runtime.client_network import ClientNetwork
from pyforwarder.runtime.limits_memory import (
    EDITION_AT,
    ENTRIES_AT,
    ENTRY_WORDS,
    MACHINES_AT,
    MOST_OTHERS,
    OTHERS_AT,
    RATES_AT,
    SECOND_US,
    TABLE_AT,
    TABLE_ENTRIES,
    UNTIL_AT,
    WORD_MASK,
    key_of,
    name_place,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.runtime.limits import Bounds

_MOST_NAMED: Final = 1 << 16


class FleetScope(NamedTuple):
    """A scope in which clients count in the whole fleet: kind and name are what others call it."""

    kind: str  # "tcp" or "udp": all listeners; "listener"
    name: str  # of the listener
    bounds: Bounds


def fleet_key(scope: int, network: ClientNetwork, secret: bytes) -> int:
    """Under what number workers with that secret count a client in that scope."""
    return key_of(b"%d %d %x" % (scope, network.version, network.number), secret)


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
        """Return the clients that have more than `least` connections, if their networks are
        known.
        """
        totals: dict[int, int] = {}
        places: dict[int, tuple[memoryview, int]] = {}
        for column in self._columns:
            counts = column[TABLE_AT + 1 : RATES_AT : ENTRY_WORDS].tolist()
            for n in itertools.compress(range(TABLE_ENTRIES), counts):
                at = TABLE_AT + n * ENTRY_WORDS
                key = column[at]
                totals[key] = totals.get(key, 0) + counts[n]
                # Not each worker need have named the client.
                if key not in places or column[name_place(at)] == key:
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
        at = name_place(entry)
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
    """The counts of clients at other machines of the fleet: one process writes them, all workers
    read.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        """`memory` has OTHERS_BYTES; what a process before us has left there is replaced."""
        self._words = memoryview(memory).cast("Q")
        self._words[UNTIL_AT] = 0

    def hold_until(self, until_s: float) -> None:
        """Let what was written count until then (time.monotonic())."""
        self._words[UNTIL_AT] = int(until_s * SECOND_US)

    def write(self, counts: Mapping[int, int], machines: int) -> None:
        """Write how many connections each client has at all other machines together; clients by
        their keys (`fleet_key`).

        `machines` is how many there are, with this one. Of more than MOST_OTHERS clients those that
        have most are written.
        """
        entries = list(counts.items())
        if len(entries) > MOST_OTHERS:
            entries = sorted(entries, key=lambda entry: entry[1], reverse=True)[:MOST_OTHERS]
        flat = array("Q", itertools.chain.from_iterable(entries))
        words = self._words
        words[EDITION_AT] = edition = words[EDITION_AT] | 1
        words[OTHERS_AT : OTHERS_AT + len(flat)] = memoryview(flat)
        words[ENTRIES_AT] = len(entries)
        words[MACHINES_AT] = machines
        words[EDITION_AT] = edition + 1 & WORD_MASK
