"""What the keeper has to tell workers: of connections that have ended, and of pairs to adopt.

Each place has its worker, which is told of the ends there, also by the next keeper. A worker that
does not read loses nothing, and costs the others nothing: its places wait.

Where the log is to say what a rule has read in a first packet, the worker gets that packet, and
reads it: the keeper, which is root, looks into none.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express

# In one message, which is taken whole or not at all; and its bytes, of which a worker takes 64 KiB.
MOST_TOLD: Final = 24
_MOST_BYTES: Final = 1 << 15
# In one turn, to one worker.
_MESSAGES_AT_ONCE: Final = 8
# That have ended, and their worker has not read of yet: then its places wait.
MOST_UNREPORTED: Final = 4096


class _Report(NamedTuple):
    place: int
    word: int
    text: str


class Telling:
    """One keeper's."""

    def __init__(
        self,
        express: Express,
        workers: int,
        told: Callable[[int, int], None],
        first_of: Callable[[int, int], bytes] = lambda _place, _word: b"",
    ) -> None:
        """`told` is called with place and word of each that its worker has been told of.

        `first_of` gives the first packet of such a connection, if its worker is to know it.
        """
        self._express = express
        self._connecting = express.connecting
        self._told = told
        self._first_of = first_of
        # Of pairs to adopt, those whose first packets go ahead of them.
        self._named: list[deque[_Report]] = [deque() for _ in range(workers)]
        self._unreported: list[deque[_Report]] = [deque() for _ in range(workers)]
        self._is_waking = [False] * workers  # to be told that there is a pair to adopt

    def has_room(self, place: int) -> bool:
        """Whether the end of a connection there may be told of."""
        return len(self._unreported[place % len(self._unreported)]) < MOST_UNREPORTED

    def ended(self, place: int, word: int, text: str) -> None:
        """A worker is to be told this, in JSON, of the connection that has a place."""
        self._unreported[place % len(self._unreported)].append(_Report(place, word, text))

    def wake(self, worker: int) -> None:
        """A worker is to be told that there is a pair for it to adopt."""
        self._is_waking[worker] = True

    def name(self, worker: int, place: int, word: int, said: list[object]) -> None:
        """Before a worker is told to adopt a pair it gets this, and the first packet."""
        self._named[worker].append(_Report(place, word, json.dumps(said)))

    @property
    def is_done(self) -> bool:
        """Whether all has been told."""
        return not any(self._unreported) and not any(self._is_waking)

    def go_on(self) -> bool:
        """Tell some of it; True: there is more that may be told now."""
        is_more = [self._tell(worker) for worker in range(len(self._unreported))]
        return any(is_more)

    def _tell(self, worker: int) -> bool:
        unreported, named = self._unreported[worker], self._named[worker]
        for _ in range(_MESSAGES_AT_ONCE):
            self._drop_counted(unreported)
            if not unreported and not self._is_waking[worker]:
                return False
            first, room = self._texts(named, _MOST_BYTES)
            ended, _ = self._texts(unreported, room)
            # By these a worker knows what a keeper that has died has told it already.
            of = [f"[{one.place}, {one.word}]" for one in itertools.islice(unreported, len(ended))]
            for one in itertools.islice(unreported, len(ended)):
                # Before that, as we may die right behind it: it is in no sum from here on.
                self._connecting.mark_counted(one.place)
            is_waking = self._is_waking[worker] and len(first) == len(named)
            message = (
                f'{{"adopt": {int(is_waking)}, "first": [{", ".join(first)}], '
                f'"of": [{", ".join(of)}], "ended": [{", ".join(ended)}]}}'
            )
            if not self._express.send(worker, message):
                return False
            if is_waking:
                self._is_waking[worker] = False
            for _ in first:
                named.popleft()
            for _ in ended:
                one = unreported.popleft()
                self._told(one.place, one.word)
        return True

    def _drop_counted(self, unreported: deque[_Report]) -> None:
        """Of the next message: ends that the programs have counted meanwhile (`ends`).

        Another connection of their kind has ended since, of which nobody needs to be told.
        """
        kept: list[_Report] = []
        while unreported and len(kept) < MOST_TOLD:
            one = unreported.popleft()
            if self._connecting.word(one.place) == one.word:
                kept.append(one)
        unreported.extendleft(reversed(kept))

    def _texts(self, queue: deque[_Report], room: int) -> tuple[list[str], int]:
        """As many of these as there is room for, one at least; and what room is left."""
        found: list[str] = []
        for one in itertools.islice(queue, MOST_TOLD):
            text = f'{one.text[:-1]}, "{self._first_of(one.place, one.word).hex()}"]'
            if found and len(text) > room:
                break
            found.append(text)
            room -= len(text)
        return found, room
