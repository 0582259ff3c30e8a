"""What a process needs that takes turns at a fleet's store: a thread that watches, and pauses.

The main thread of such a process looks, decides and writes; it takes what the watching one has
received at the beginning of each turn, and tells the supervisor what follows.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.fleet.store import (
    Change,
    CompactedError,
    Echo,
    MessageFault,
    StoreError,
    changes_in,
)

if TYPE_CHECKING:
    from pyforwarder.fleet.echoes import Echoes
    from pyforwarder.fleet.store import Store

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_WATCH_S: Final = 60.0
# What the watching thread may be ahead of the other, in bytes; each change counts as some at least.
_MOST_WAITING_BYTES: Final = 16 << 20
_LEAST_BYTES: Final = 512
# So long may one value be, where nothing else is said.
_MOST_BYTES: Final = 1 << 20
# What is written comes by the process's own watch within this time, or that is of no use.
_HEARD_AFTER_S: Final = 5.0
UNHEARD: Final = "the watch does not tell what was written"


class Pause:
    """Says how long to wait before a store that did not answer is asked again: each time longer."""

    def __init__(self) -> None:
        self._pause_s = _FIRST_PAUSE_S

    @property
    def is_first(self) -> bool:
        """Whether the store has answered last."""
        return self._pause_s == _FIRST_PAUSE_S

    def next_s(self) -> float:
        """How long to wait, after the store did not answer: not the same time on all machines."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)

    def end(self) -> None:
        """Note that the store has answered: the next pause is short again."""
        self._pause_s = _FIRST_PAUSE_S


class All(NamedTuple):
    """Everything that is in the store."""

    entries: list[tuple[str, bytes]]
    revision: int = 0  # as of which


class Lost(NamedTuple):
    error: str


class Received(queue.Queue["All | Lost | Change | Echo"]):
    """What the watching thread has received: no more of it than there is room for.

    What is listed at once is one piece of any size (the store has its own bound of that);
    nothing comes behind it until it is taken, if it has more than there is room for.
    """

    def __init__(self) -> None:
        self._bytes = 0
        super().__init__(_MOST_WAITING_BYTES)

    # The methods by which queue.Queue says what it holds, called with its lock held.

    def _qsize(self) -> int:
        return self._bytes

    def _put(self, item: All | Lost | Change | Echo) -> None:
        super()._put(item)
        self._bytes += _bytes_of(item)

    def _get(self) -> All | Lost | Change | Echo:
        item: All | Lost | Change | Echo = super()._get()
        self._bytes -= _bytes_of(item)
        return item


def _bytes_of(item: All | Lost | Change | Echo) -> int:
    match item:
        case All(entries=entries):
            return _LEAST_BYTES + sum(_entry_bytes(*entry) for entry in entries)
        case Change(key=key, value=value):
            return _entry_bytes(key, value)
        case Echo(message=message):
            return _LEAST_BYTES + len(message)
        case Lost():
            return _LEAST_BYTES


def _entry_bytes(key: str, value: bytes | None) -> int:
    return _LEAST_BYTES + len(key) + len(value or b"")


class Watcher:
    """The thread that watches what is in the store."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        most_bytes: int = _MOST_BYTES,
        echoes: Echoes | None = None,
    ) -> None:
        """`store` is this thread's alone.

        Of a longer value the first `most_bytes` bytes and one are received: it has none of ours.
        What `echoes` knows that the process has written itself is left out.
        """
        self._store = store
        self._prefix = prefix
        self._most_bytes = most_bytes
        self._echoes = echoes
        self.received: Final = Received()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._is_over = False
        self._revision = 0  # up to which all was received
        self._expected: tuple[int, float] | None = None  # a revision, and since when
        self._is_doubted = False  # what the store's member tells

    def start(self) -> None:
        """Begin; it ends with the process, if it is not stopped before."""
        self._thread.start()

    def stop(self, wait_s: float) -> bool:
        """End with the next change or error, for which it is waited; whether it has ended."""
        self._is_over = True
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def changes(self) -> Iterator[All | Lost | Change]:
        """What was received since the last call, as much of it as one turn may take.

        Of a key that has changed again and again, the last change: who writes there all the time
        has nobody read all of it.
        """
        taken: list[All | Lost | Change | Echo] = []
        taken_bytes = 0
        while taken_bytes < _MOST_WAITING_BYTES and not self.received.empty():
            taken.append(self.received.get_nowait())
            taken_bytes += _bytes_of(taken[-1])
        last: dict[str, int] = {}
        for index, one in enumerate(taken):
            if isinstance(one, Change):
                last[one.key] = index
        for index, one in enumerate(taken):
            if isinstance(one, Echo):
                yield from self._read(one)
            elif not isinstance(one, Change):
                if self._echoes is not None and isinstance(one, All):
                    self._echoes.forget()
                yield one
            elif last[one.key] == index and not (self._echoes and self._echoes.is_past(one)):
                yield one

    def _read(self, echo: Echo) -> Iterator[Lost | Change]:
        """What was thought to be our own writing, if it is not."""
        assert self._echoes is not None
        if self._echoes.is_ours(echo.revision):
            return
        try:
            for change in changes_in(echo.message):
                yield self._shortened(change)
        except MessageFault as error:
            self._is_doubted = True
            yield Lost(str(error)[:500])

    def expect(self, revision: int, now_s: float) -> None:
        """We have written something below the prefix at this revision: the watch is to bring it."""
        if self._expected is not None and revision < self._expected[0]:
            self._expected = None  # the store was set up anew, and counts from the beginning
        if self._expected is None and revision > self._revision:
            self._expected = revision, now_s

    def is_lost(self, now_s: float) -> bool:
        """Whether what was expected did not come in time; another member is asked then. Call it in
        each turn.

        Not as long as there is something in `received`: then we are late, not the store.
        """
        if self._expected is None:
            return False
        revision, since_s = self._expected
        if self._revision >= revision:
            self._expected = None
        elif not self.received.empty():
            self._expected = revision, now_s
        elif now_s >= since_s + _HEARD_AFTER_S:
            self._is_doubted = True
            return True
        return False

    def _run(self) -> None:
        pause = Pause()
        while not self._is_over:
            try:
                found = self._store.list(self._prefix)
                entries = [(key, self._cut(value)) for key, value in found.entries]
                self.received.put(All(entries, found.revision))
                self._revision, self._is_doubted = found.revision, False
                pause.end()
                while not self._is_over:
                    if self._is_doubted:
                        raise self._store.distrust(UNHEARD)
                    revision = self._revision
                    until_s = time.monotonic() + _WATCH_S
                    for change in self._events(after=revision, until_s=until_s):
                        self.received.put(change)
                        self._revision = change.revision
                        if self._is_over:
                            return
            except CompactedError:
                pass  # nothing has changed here for long, but elsewhere in the store
            except StoreError as error:
                self.received.put(Lost(str(error)[:500]))
                time.sleep(pause.next_s())

    def _events(self, *, after: int, until_s: float) -> Iterator[Change | Echo]:
        if self._echoes is None:
            for change in self._store.events(self._prefix, after=after, until_s=until_s):
                yield self._shortened(change)
            return
        is_echo = self._echoes.may_be
        for one in self._store.events_or_echoes(
            self._prefix, after=after, until_s=until_s, is_echo=is_echo
        ):
            yield self._shortened(one) if isinstance(one, Change) else one

    def _shortened(self, change: Change) -> Change:
        if change.value is None or len(change.value) <= self._most_bytes:
            return change
        return change._replace(value=self._cut(change.value))

    def _cut(self, value: bytes) -> bytes:
        return value if len(value) <= self._most_bytes else value[: self._most_bytes + 1]
