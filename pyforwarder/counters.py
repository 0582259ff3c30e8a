"""Counters that every process of a daemon can read: 64-bit numbers in shared memory.

Each worker adds to a block of its own, so no addition is ever lost; whoever reads sums the blocks.
The block of a worker that died is kept and its replacement goes on adding to it.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Iterator
from typing import Final

from pyforwarder.reasons import CloseReason

BLOCK_WORDS: Final = 4096
BLOCK_BYTES: Final = BLOCK_WORDS * 8


class Counter(enum.IntEnum):
    """The fixed counters; OPEN and PAIRS_OPEN are gauges, the rest only grow."""

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


class ListenerCounter(enum.IntEnum):
    """Per listener."""

    ACCEPTED = 0
    OPEN = 1
    REFUSED = 2


class RuleCounter(enum.IntEnum):
    """Per rule."""

    TAKEN = 0
    REFUSED = 1


class ServerCounter(enum.IntEnum):
    """Per server of an upstream."""

    HELD = 0  # a gauge: pairs that it has, and connections that are being made to it


REASONS: Final = tuple(CloseReason)
CLOSED_FIRST: Final = 64
CLOSED_INDEX: Final = {reason: CLOSED_FIRST + n for n, reason in enumerate(REASONS)}
NAMED_FIRST: Final = 128  # from here on: what a Directory hands out


class Directory:
    """Which words belong to which listener, rule and server: the same ones across reloads.

    A name keeps its words for the daemon's life, so counts survive a reload; when all words are
    given out (about 1,900 names), later ones share the last.
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
        return self._find(("upstream", upstream, server), len(ServerCounter))

    def gauges(self) -> Iterator[int]:
        """The words of listeners and servers that go with the worker that has written them."""
        for name, index in self._indexes.items():
            if len(name) == 1:
                yield index + ListenerCounter.OPEN
            elif len(name) == 3:
                yield index + ServerCounter.HELD

    def _find(self, name: tuple[str, ...], size: int) -> int | None:
        index = self._indexes.get(name)
        if index is None and self._next + size <= BLOCK_WORDS - len(ListenerCounter):
            index = self._indexes[name] = self._next
            self._next += size
        return index


class Counters:
    """All workers' blocks."""

    def __init__(self, memory: mmap.mmap, workers: int) -> None:
        """`memory` holds `workers` blocks of BLOCK_BYTES; the caller keeps it."""
        self._words = memoryview(memory).cast("Q")
        self._workers = workers

    def close(self) -> None:
        """Let go of the memory, so that the caller can close it."""
        self._words.release()

    @classmethod
    def memory(cls, workers: int) -> mmap.mmap:
        """Anonymous memory of the right size, shared with children made by fork."""
        return mmap.mmap(-1, BLOCK_BYTES * workers)

    def block(self, worker: int) -> memoryview:
        """One worker's words, for that worker to add to."""
        return self._words[worker * BLOCK_WORDS : (worker + 1) * BLOCK_WORDS]

    def total(self, index: int) -> int:
        """The sum over all workers."""
        return sum(self._words[worker * BLOCK_WORDS + index] for worker in range(self._workers))

    def forget_gauges(self, worker: int, directory: Directory) -> None:
        """A worker died with its connections: what counted them as open is 0 again."""
        block = self.block(worker)
        block[Counter.OPEN] = block[Counter.PAIRS_OPEN] = 0
        for index in directory.gauges():
            block[index] = 0


class SharedHeld:
    """The `ServerCounter.HELD` of one server: this worker's to change, everybody's to read."""

    __slots__ = ("_counters", "_index", "_own")

    def __init__(self, counters: Counters, worker: int, index: int) -> None:
        self._counters = counters
        self._own = counters.block(worker)
        self._index = index

    def add(self, by: int) -> None:
        """Change this worker's part."""
        self._own[self._index] += by

    def total(self) -> int:
        """The sum over all workers."""
        return self._counters.total(self._index)
