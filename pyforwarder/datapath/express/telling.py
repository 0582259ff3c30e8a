"""The keeper's reports to workers: connections that have ended, and pairs to adopt.

Each place belongs to a worker, which gets the reports about it, also from the next keeper. A worker
that does not read its socket loses nothing, and delays no other worker: its places wait.

Where the log says what a rule has read of a first packet, the worker gets that packet, and parses
it: the keeper, which is root, parses none.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express

# Reports in one message, which is sent whole or not at all; and its size, of which a worker
# receives 64 KiB.
MOST_TOLD: Final = 24
_MOST_BYTES: Final = 1 << 15
# Messages to one worker in one turn.
_MESSAGES_AT_ONCE: Final = 8
# Ends that a worker has not read yet: at this number its places wait.
MOST_UNREPORTED: Final = 4096


class _Report(NamedTuple):
    place: int
    word: int
    text: str


class Telling:
    """The reports of one keeper."""

    def __init__(
        self,
        express: Express,
        workers: int,
        told: Callable[[int, int], None],
        first_of: Callable[[int, int], bytes] = lambda _place, _word: b"",
    ) -> None:
        """`told` is called with place and word of each connection whose end was reported.

        `first_of` gives the first packet of such a connection, if its worker needs it.
        """
        self._express = express
        self._connections = express.connections
        self._told = told
        self._first_of = first_of
        # Pairs to adopt whose first packets must be reported before.
        self._named: list[deque[_Report]] = [deque() for _ in range(workers)]
        self._unreported: list[deque[_Report]] = [deque() for _ in range(workers)]
        self._is_waking = [False] * workers  # whether the worker must be told to adopt pairs

    def has_room(self, place: int) -> bool:
        """Whether there is room for a report about this place."""
        return len(self._unreported[place % len(self._unreported)]) < MOST_UNREPORTED

    def ended(self, place: int, word: int, text: str) -> None:
        """Queue the report of an end, as JSON, for the worker of the place."""
        self._unreported[place % len(self._unreported)].append(_Report(place, word, text))

    def wake(self, worker: int) -> None:
        """Have a worker told that there is a pair to adopt."""
        self._is_waking[worker] = True

    def name(self, worker: int, place: int, word: int, facts: list[object]) -> None:
        """Queue a pair's description and first packet, which its worker gets before it is told to
        adopt the pair.
        """
        self._named[worker].append(_Report(place, word, json.dumps(facts)))

    @property
    def is_done(self) -> bool:
        """Whether everything was reported."""
        return not any(self._unreported) and not any(self._is_waking)

    def go_on(self) -> bool:
        """Send some reports; True: there are more that can be sent now."""
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
            # By place and word a worker recognizes what an earlier keeper has reported already.
            of = [f"[{one.place}, {one.word}]" for one in itertools.islice(unreported, len(ended))]
            for one in itertools.islice(unreported, len(ended)):
                # Before the report, as the keeper may die right after it: from here on the end is
                # added to no sum.
                self._connections.mark_counted(one.place)
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
        """Remove ends from the next message that the programs have counted meanwhile (`ends`).

        Another connection of their kind has ended since, and made a sum for it.
        """
        kept: list[_Report] = []
        while unreported and len(kept) < MOST_TOLD:
            one = unreported.popleft()
            if self._connections.word(one.place) == one.word:
                kept.append(one)
        unreported.extendleft(reversed(kept))

    def _texts(self, queue: deque[_Report], room: int) -> tuple[list[str], int]:
        """The texts for which there is room, one at least; and the room that is left."""
        found: list[str] = []
        for one in itertools.islice(queue, MOST_TOLD):
            text = f'{one.text[:-1]}, "{self._first_of(one.place, one.word).hex()}"]'
            if found and len(text) > room:
                break
            found.append(text)
            room -= len(text)
        return found, room
