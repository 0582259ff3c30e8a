"""What the keeper does about connections that the kernel has opened: those that end, or go on.

The programs begin them by themselves. A connection that has ended keeps its place for a while, as a
FIN may come again; one that lasts is given to a worker, as if its own had died, and is a spliced
pair like any other from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express.connect_abi import NO_WORKER, STATE_MASK, Ask, AskState
from pyforwarder.datapath.splice.abi import Splice, SpliceState

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.abi import Direction
    from pyforwarder.datapath.express.connecting import Connecting

# A server that has not answered by then will not, or the client gives up: a worker tries.
ANSWER_TIMEOUT_S: Final = 3.0
# And for so long it is a worker's alone.
UNANSWERED_FOR_S: Final = 10.0
# A connection that is older than this lasts.
LASTS_AFTER_S: Final = 1.0
# TCP keeps a closed connection's ports for TIME_WAIT: so long a FIN may come again.
LINGER_S: Final = 60.0
# Where places are short, less; no program that has looked at the old one runs any more by then.
LEAST_LINGER_S: Final = 1.0


class Ended(NamedTuple):
    """A connection that has begun and ended without a worker."""

    place: int
    ask: Ask
    record: Splice

    @property
    def ended_ns(self) -> int:
        """When the second end was acknowledged, by CLOCK_MONOTONIC."""
        return int(self.record.client_clock) | int(self.record.server_clock) << 32

    def carried_bytes(self, direction: Direction) -> int:
        """What a direction has carried, by the number of its FIN.

        A program that was interrupted may have stored an older count over the last one.
        """
        way = self.record.way[direction]
        counted = int(way.bytes)
        rest = (int(way.fin_seq) - 1 - (int(way.begin) + counted)) & 0xFFFFFFFF
        return counted + (rest - (1 << 32) if rest >= 1 << 31 else rest)


class Seen(NamedTuple):
    """What has become known since the last look."""

    ended: list[Ended]
    lasting: list[int]  # places whose connections are to be given to a worker
    asked: list[int]  # places whose servers have not answered yet


class _Lingering(NamedTuple):
    since_s: float
    place: int
    word: int


class Places:
    """Looks after all places; one keeper's."""

    def __init__(self, connecting: Connecting, record: Callable[[int], Splice]) -> None:
        """`record` is the splice of that index as it is now."""
        self._connecting = connecting
        self._record = record
        self._lingering: deque[_Lingering] = deque()
        self._known: dict[int, int] = {}  # place -> word of what was told of

    def look(
        self, now_s: float, *, lasts_after_s: float = LASTS_AFTER_S, most: int = 1 << 32
    ) -> Seen:
        """Do what is due; call it about twice a second. `now_s` is of CLOCK_MONOTONIC.

        At most so many connections that have ended are told of; the others wait for another look.
        """
        seen = Seen([], [], [])
        used = 0
        for place, word in enumerate(self._connecting.words()):
            state = word & STATE_MASK
            if state == AskState.FREE:
                self._known.pop(place, None)
                continue
            used += 1
            if state == AskState.ASKED:
                seen.asked.append(place)
                self._give_up_late(place, word, now_s)
            elif state == AskState.FILLING:
                seen.asked.append(place)
            elif state == AskState.JOINED and self._known.get(place) != word:
                self._look_at(place, word, now_s, seen, lasts_after_s, most)
        self._free(now_s, self._connecting.places - used)
        return seen

    def _give_up_late(self, place: int, word: int, now_s: float) -> None:
        begun_s = self._connecting.ask(place).begun_ns / 1e9
        if now_s - begun_s > ANSWER_TIMEOUT_S:
            until_ns = int((now_s + UNANSWERED_FOR_S) * 1e9)
            self._connecting.let_go(place, word, not_before_ns=until_ns)

    def _look_at(
        self, place: int, word: int, now_s: float, seen: Seen, lasts_after_s: float, most: int
    ) -> None:
        record = self._record(self._connecting.first_splice + place)
        if record.state != SpliceState.ACTIVE:
            return  # never: it is the last thing that is written
        if record.worker != NO_WORKER:
            self._known[place] = word  # an earlier keeper has given it to that one
            return
        if not record.id:
            # An earlier keeper has told of its end.
            self._known[place] = word
            self._lingering.append(_Lingering(now_s, place, word))
            return
        ask = self._connecting.ask(place)
        if all(way.fin_acked for way in record.way):
            if len(seen.ended) < most:
                self._known[place] = word
                self._lingering.append(_Lingering(now_s, place, word))
                seen.ended.append(Ended(place, ask, record))
        elif record.reset or now_s - ask.begun_ns / 1e9 >= lasts_after_s:
            # After a reset, too: whether the other end has believed it nobody knows.
            self._known[place] = word
            seen.lasting.append(place)

    def _free(self, now_s: float, free: int) -> None:
        """The places of those that ended long ago; or of the first, while places are short."""
        while self._lingering:
            since_s, place, word = self._lingering[0]
            is_short = free < self._connecting.places // 2
            if now_s - since_s < (LEAST_LINGER_S if is_short else LINGER_S):
                return
            self._lingering.popleft()
            free += self._connecting.let_go(place, word)

    def let_go(self, place: int) -> None:
        """A connection that lasted is over, and its ports have lingered."""
        word = self._known.get(place)
        if word is not None:
            self._connecting.let_go(place, word)
