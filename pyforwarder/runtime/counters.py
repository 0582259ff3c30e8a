"""Counters that every process of a daemon can read: 64-bit numbers in shared memory.

Each worker adds to a block of its own, so no addition is ever lost; a reader sums the blocks.
The block of a worker that died is kept and its replacement goes on adding to it.
"""

from __future__ import annotations

import bisect
import enum
import mmap
from collections.abc import Iterator, Sequence
from typing import Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.limits import Limit

# Whole pages, also where those have 64 KiB: a worker's block is mapped by itself.
BLOCK_WORDS: Final = 16_384
BLOCK_BYTES: Final = BLOCK_WORDS * 8
_MOST: Final = (1 << 64) - 1
# No worker counts so far. What is beyond is set to the second: ids, which are made of a count, do
# not recur, and nothing overflows.
_MOST_COUNTED: Final = 1 << 57
_INSTEAD: Final = 1 << 56


class Counter(enum.IntEnum):
    """The fixed counters; OPEN, PAIRS_OPEN and HELD_BYTES are gauges, the rest only grow."""

    ACCEPTED = 0
    OPEN = 1  # clients, from accept to close
    PAIRS_OPEN = 2  # of those, the ones with a destination
    PAIRS_OPENED = 3
    UP_BYTES = 4  # of closed connections
    DOWN_BYTES = 5
    JOINED_COPY = 6
    JOINED_SOCKMAP = 7
    JOINED_SPLICE = 8
    FIRST_PACKET_FULL = 9  # "need more" ended by max_bytes
    FIRST_PACKET_TIMEOUT = 10  # ... by the timeout
    ACCEPT_PAUSED = 11  # descriptors or memory ran out
    CONNECT_FAILED = 12
    BACKLOG_TRIPS = 13  # of connections that have ended
    DATAGRAMS_LOST = 14  # a queue was full, or the name of a server not resolved yet
    NAMES_REFUSED = 15  # as many of that client, of its network or in all were being resolved
    DATAGRAMS_HELD_BACK = 16  # answers that `amplification` does not let go out
    HELD_BYTES = 17  # a gauge: what pairs hold in memory, as last measured
    PAIRS_SLOWED = 18  # got buffers of a fixed size because memory was tight
    SESSIONS_UNSPLICED = 19  # of UDP: there was no room for another in the kernel
    DATAGRAMS_OVERTAKEN = 20  # by the first ones that the kernel sent on
    ERRORS_DOUBTED = 21  # of ICMP about a session, which did not end it
    JOINED_EXPRESS = 22


class ListenerCounter(enum.IntEnum):
    """Per listener."""

    ACCEPTED = 0
    OPEN = 1
    REFUSED = 2
    UP_BYTES = 3  # of closed connections
    DOWN_BYTES = 4


class RuleCounter(enum.IntEnum):
    """Per rule."""

    TAKEN = 0
    REFUSED = 1


class ServerCounter(enum.IntEnum):
    """Per server of an upstream."""

    HELD = 0  # a gauge: pairs that it has, and connections that are being made to it
    PAIRS = 1  # a gauge
    DOWN = 2  # a gauge: 1 in a worker that takes it for down
    DRAINED = 3  # a gauge: 1 in a worker that gives it no new pairs
    CONNECTS = 4
    FAILURES = 5  # the first of `ServerFailure`


class ServerFailure(enum.IntEnum):
    """Why a connection to a server failed."""

    REFUSED = 0
    TIMEOUT = 1
    UNREACHABLE = 2
    UNRESOLVED = 3
    LOCAL = 4  # no descriptor, memory or port of ours
    # A server refused the kernel (`express`), or did not answer it, and a worker went on. The
    # supervisor counts them, in the first worker's block.
    EXPRESS = 5


SERVER_WORDS: Final = ServerCounter.FAILURES + len(ServerFailure)
FAILURE_BY_REASON: Final = {
    CloseReason.REFUSED: ServerFailure.REFUSED,
    CloseReason.TIMEOUT: ServerFailure.TIMEOUT,
    CloseReason.UNRESOLVED: ServerFailure.UNRESOLVED,
}


# The words of a block, one range behind the other; a test compares their ends.
REASONS: Final = tuple(CloseReason)
# Words that `observe` needs besides one for each bound: beyond the last of them, and the sum.
_TIME_WORDS: Final = 2
# Times, as `observe` counts them. The bounds are a few per decade, where networks differ.
DECISION_BOUNDS_S: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CONNECT_BOUNDS_S: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_CONNECT_WORDS: Final = len(CONNECT_BOUNDS_S) + _TIME_WORDS
# How many kinds `datapath.splice.abi.Invalid` and `datapath.express.connect_abi.Count` have at
# most: this package does not import them.
INVALID_WORDS: Final = 16
EXPRESS_WORDS: Final = 24
# How often each limit has said no.
LIMITED_FIRST: Final = max(Counter) + 1
LIMITED_INDEX: Final = {
    limit: LIMITED_FIRST + n for n, limit in enumerate(Limit) if limit.counted_as is limit
}
CLOSED_FIRST: Final = LIMITED_FIRST + len(Limit)
CLOSED_INDEX: Final = {reason: CLOSED_FIRST + n for n, reason in enumerate(REASONS)}
# Packets that splice did not believe; written by its programs.
INVALID_FIRST: Final = CLOSED_FIRST + len(REASONS)
DECISION_FIRST: Final = INVALID_FIRST + INVALID_WORDS
# To servers that belong to no upstream.
CONNECT_FIRST: Final = DECISION_FIRST + len(DECISION_BOUNDS_S) + _TIME_WORDS
# Plain numbers for the path of every connection, which adding a member of an enum would slow down.
_SERVER_CONNECTS: Final = int(ServerCounter.CONNECTS)
_SERVER_PAIRS: Final = int(ServerCounter.PAIRS)
# The keeper writes these for the whole daemon, into the first worker's block: ports of express, and
# what its programs have counted.
EXPRESS_PORTS: Final = CONNECT_FIRST + _CONNECT_WORDS  # a gauge, as the two behind it
EXPRESS_PORTS_USED: Final = EXPRESS_PORTS + 1
EXPRESS_PORTS_MOST: Final = EXPRESS_PORTS + 2  # used at once, as seen at least twice a second
EXPRESS_CONNECT_FAILED: Final = EXPRESS_PORTS + 3  # to any server
EXPRESS_FIRST: Final = EXPRESS_PORTS + 4
NAMED_FIRST: Final = EXPRESS_FIRST + EXPRESS_WORDS  # from here on: what a Directory hands out


class Directory:
    """Which words belong to which listener, rule and server: the same ones across reloads.

    A name keeps its words for the daemon's life, so counts survive a reload; when all words are
    given out (some thousands of names), later ones share the last.
    """

    def __init__(self) -> None:
        self._indexes: dict[tuple[str, ...], int] = {}
        self._next = NAMED_FIRST

    def index(self, *name: str) -> int:
        """The first of the words of a listener (one name) or rule (two names)."""
        size = len(ListenerCounter) if len(name) == 1 else len(RuleCounter)
        index = self._find(name, size)
        return BLOCK_WORDS - len(ListenerCounter) if index is None else index

    def server_index(self, upstream: str, server: str) -> int | None:
        """The first of a server's words; None: all are given out, and these cannot be shared."""
        return self._find(("upstream", upstream, server), SERVER_WORDS)

    def upstream_index(self, upstream: str) -> int | None:
        """The first of the words for an upstream's connect times; None: all are given out."""
        return self._find(("upstream", upstream, "", ""), _CONNECT_WORDS)

    def gauges(self) -> Iterator[int]:
        """The words of listeners and servers that go with the worker that has written them."""
        for name, index in self._indexes.items():
            if len(name) == 1:
                yield index + ListenerCounter.OPEN
            elif len(name) == 3:
                yield index + ServerCounter.HELD
                yield index + ServerCounter.PAIRS
                yield index + ServerCounter.DOWN
                yield index + ServerCounter.DRAINED

    def _find(self, name: tuple[str, ...], size: int) -> int | None:
        index = self._indexes.get(name)
        if index is None and self._next + size <= BLOCK_WORDS - len(ListenerCounter):
            index = self._indexes[name] = self._next
            self._next += size
        return index


class Counters:
    """All workers' blocks."""

    def __init__(self, memory: Sequence[mmap.mmap]) -> None:
        """`memory` is a block of BLOCK_BYTES for each worker; the caller keeps them."""
        self._blocks = [memoryview(block).cast("Q") for block in memory]

    @classmethod
    def memory(cls, workers: int) -> list[mmap.mmap]:
        """Anonymous memory of the right size, shared with children made by fork."""
        return [mmap.mmap(-1, BLOCK_BYTES) for _ in range(workers)]

    def block(self, worker: int) -> memoryview:
        """Return a worker's words, for that worker to add to."""
        return self._blocks[worker]

    def total(self, index: int) -> int:
        """The sum over all workers."""
        return sum(block[index] for block in self._blocks)

    def forget_gauges(self, worker: int, directory: Directory) -> None:
        """A worker died with its connections: what counted them as open is 0 again.

        What no worker can have counted is bounded: one that was taken over has written it, and its
        successor goes on adding to it.
        """
        block = self.block(worker)
        for index, word in enumerate(block):
            if word > _MOST_COUNTED:
                block[index] = _INSTEAD
        block[Counter.OPEN] = block[Counter.PAIRS_OPEN] = block[Counter.HELD_BYTES] = 0
        for index in directory.gauges():
            block[index] = 0


def change(block: memoryview, index: int, by: int) -> None:
    """Add to a word; it stays at 0, or at its highest, instead of leaving its 64 bits.

    A number that is wrong by one must not end a worker, and all its connections with it.
    """
    try:
        block[index] += by
    except ValueError:
        block[index] = 0 if by < 0 else _MOST


def observe(block: memoryview, first: int, bounds_s: tuple[float, ...], took_s: float) -> None:
    """Count a time in a worker's block: a word for each bound, one beyond them, the sum in ns."""
    block[first + bisect.bisect_left(bounds_s, took_s)] += 1
    if took_s > 0.0:
        block[first + len(bounds_s) + 1] += int(took_s * 1e9)


def count_connect(block: memoryview, server: int) -> None:
    """Count an established connection to the server whose words begin there; 0: no server of an
    upstream.
    """
    if server:
        block[server + _SERVER_CONNECTS] += 1
        block[server + _SERVER_PAIRS] += 1


def count_passed(block: memoryview, server: int, count: int) -> None:
    """Count so many connections to the server that have begun and ended."""
    if server:
        block[server + ServerCounter.CONNECTS] += count


def count_disconnect(block: memoryview, server: int) -> None:
    """Count a connection to the server that has ended."""
    if server:
        change(block, server + ServerCounter.PAIRS, -1)


def count_failure(
    block: memoryview, server: int, reason: CloseReason, *, is_ours: bool = False
) -> None:
    """Count a connection to the server that could not be made."""
    if server:
        cause = FAILURE_BY_REASON.get(reason, ServerFailure.UNREACHABLE)
        if is_ours or reason is CloseReason.BUSY:
            cause = ServerFailure.LOCAL
        block[server + ServerCounter.FAILURES + cause] += 1


class SharedHeld:
    """The `ServerCounter.HELD` of one server: this worker's to change, everybody's to read."""

    __slots__ = ("_counters", "_index", "_own")

    def __init__(self, counters: Counters, worker: int, index: int) -> None:
        self._counters = counters
        self._own = counters.block(worker)
        self._index = index

    def add(self, by: int) -> None:
        """Change this worker's part."""
        try:
            self._own[self._index] += by
        except ValueError:
            change(self._own, self._index, by)

    def total(self) -> int:
        """The sum over all workers."""
        return self._counters.total(self._index)
