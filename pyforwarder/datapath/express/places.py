"""What the keeper does about connections that the kernel has opened: those that end, or go on.

The programs begin them by themselves. A connection that has ended keeps its place for a while, as a
FIN may come again, and one that came to nothing until no program knows it any more; one that lasts
is given to a worker, as if its own had died, and is a spliced pair like any other from then on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express.connect_abi import NO_WORKER, STATE_MASK, AskHead, AskState
from pyforwarder.datapath.express.grace import Grace
from pyforwarder.datapath.express.pace import Pace
from pyforwarder.datapath.splice.abi import Splice, SpliceState

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.abi import Direction
    from pyforwarder.datapath.express.connecting import Connecting

# A server that has not answered by then will not, or the client gives up: a worker tries. Sooner
# where `connect_timeout` says so.
ANSWER_TIMEOUT_S: Final = 3.0
# And for so long it is a worker's alone.
UNANSWERED_FOR_S: Final = 10.0
# A connection that is older than this lasts.
LASTS_AFTER_S: Final = 1.0
# Rounds: what leaves in one waits for other programs than what has left in the one before.
_APART_S: Final = 1e-6


class Ended(NamedTuple):
    """A connection that has begun and ended without a worker."""

    place: int
    ask: AskHead
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


class Places:
    """Looks after all places; one keeper's."""

    def __init__(
        self,
        connecting: Connecting,
        record: Callable[[int], Splice],
        grace: Grace | None = None,
    ) -> None:
        """`record` is the splice of that index as it is now; `grace` waits for programs."""
        self._connecting = connecting
        self._record = record
        self._grace = grace or Grace(connecting.wait_for_programs)
        self._pace = Pace(connecting.places, connecting.taken())
        self._round_s = 0.0  # when the last round began
        self._known: dict[int, int] = {}  # place -> word of what was told of
        self._next = 0  # where in `_busy` the next look begins
        # Places that are neither free nor rest, each with its word, when the round began.
        self._busy: list[tuple[int, int]] = []
        self._unused = connecting.places  # that were free then
        # Ends that the programs have counted in all rounds; more, if it is not known.
        self.counted = 0
        # Whether they come by all places: else what they are to count is never counted.
        self.is_counting = True
        self._has_complained = False

    @property
    def is_through(self) -> bool:
        """Whether the last look has done all that was due."""
        return self._next == 0

    @property
    def is_short(self) -> bool:
        """Whether so many places are taken that they do not rest for long."""
        return self._pace.is_short

    @property
    def used(self) -> int:
        """How many places were taken when the last round was through."""
        return self._connecting.places - self._unused

    def glance(self, now_s: float) -> float:
        """See how quickly places go, and free some if they are short; for how long it is enough.

        It may be called at any time, also between two parts of a look. `now_s` is of
        CLOCK_MONOTONIC.
        """
        self._pace.glance(now_s, self._connecting.taken())
        if self.is_short:
            self._go_round(now_s)
        return self._pace.pause_s

    def begin_anew(self) -> None:
        """The next look begins with a round, however far the last one has come."""
        self._next = 0

    def look(
        self,
        now_s: float,
        *,
        lasts_after_s: float = LASTS_AFTER_S,
        has_room: Callable[[int], bool] = lambda _place: True,
        at_once: int = 1 << 32,
    ) -> Seen:
        """Do what is due; call it about twice a second. `now_s` is of CLOCK_MONOTONIC.

        Before a round the programs count the ends that nobody needs to be told of, and free what
        has rested or came to nothing. Of the end of a connection at a place for which there is no
        room nothing is told before there is. After `at_once` places that took some time the look
        ends, and the next one goes on from there (`is_through`).
        """
        seen = Seen([], [], [])
        if self._next == 0:
            self._begin_look(now_s)
        for at in range(self._next, len(self._busy)):
            place, word = self._busy[at]
            state = word & STATE_MASK
            if state == AskState.FILLING:
                seen.asked.append(place)
                continue
            if state == AskState.JOINED and self._known.get(place) == word:
                continue
            if at_once <= 0:
                self._next = at
                break
            at_once -= 1
            if self._connecting.word(place) != word:
                continue  # it is another's since the round began, or has been answered: the next
            if state == AskState.ASKED:
                seen.asked.append(place)
                self._give_up_late(place, word, now_s)
            else:
                self._look_at(place, word, now_s, seen, lasts_after_s, has_room)
        else:
            self._next = 0
        return seen

    def _go_round(self, now_s: float) -> None:
        if 0 <= now_s - self._round_s < _APART_S:
            now_s = self._round_s + _APART_S
        self._round_s = now_s
        try:
            gone = self._connecting.go_round(
                now_s, is_short=self.is_short, passed_ns=self._grace.passed_ns
            )
        except OSError as error:
            # The next round does it, perhaps. Until then workers are told of all ends.
            self.is_counting = False
            self.counted += 1
            if not self._has_complained:
                self._has_complained = True
                print(f"express: the kernel cannot run go_round: {error}", file=sys.stderr)
            return
        self.is_counting = gone.is_whole
        self.counted += gone.counted
        if gone.leaving:
            self._grace.want(int(now_s * 1e9))
        if gone.is_whole:
            self._unused = gone.unused
            self._pace.went_round(gone.unused)

    def _begin_look(self, now_s: float) -> None:
        self._pace.glance(now_s, self._connecting.taken())
        self._go_round(now_s)
        if self.is_counting and self._unused == self._connecting.places:
            self._busy = []  # as most of the time on an idle host
            self._known = {}
            return
        rests = int(AskState.RESTING)
        self._busy = [
            (place, word)
            for place, word in enumerate(self._connecting.words())
            if 0 < word & STATE_MASK < rests
        ]
        if len(self._known) > len(self._busy):
            self._known = {
                place: word for place, word in self._busy if self._known.get(place) == word
            }

    def _give_up_late(self, place: int, word: int, now_s: float) -> None:
        ask = self._connecting.head(place)
        answer_s = ask.answer_ms / 1000 or ANSWER_TIMEOUT_S
        if now_s - ask.begun_ns / 1e9 > answer_s:
            until_ns = int((now_s + UNANSWERED_FOR_S) * 1e9)
            # If the kernel cannot run the program now, the next look does it.
            with contextlib.suppress(OSError):
                self._connecting.let_go(place, word, not_before_ns=until_ns)

    def _look_at(
        self,
        place: int,
        word: int,
        now_s: float,
        seen: Seen,
        lasts_after_s: float,
        has_room: Callable[[int], bool],
    ) -> None:
        record = self._record(self._connecting.first_splice + place)
        if record.state == SpliceState.FREE:
            # A keeper has died that had ended the pair, and not freed the place yet.
            self.leave(place, word, now_s)
            return
        if record.worker != NO_WORKER:
            self._known[place] = word  # an earlier keeper has given it to that one
            return
        if not record.id:
            self._connecting.rest(place, word, now_s)  # an earlier keeper has told of its end
            return
        ask = self._connecting.head(place)
        if all(way.fin_acked for way in record.way):
            if has_room(place):
                self._known[place] = word
                seen.ended.append(Ended(place, ask, record))
        elif record.reset or now_s - ask.begun_ns / 1e9 >= lasts_after_s:
            # After a reset, too: whether the other end has believed it nobody knows.
            self._known[place] = word
            seen.lasting.append(place)

    def forget(self, place: int) -> None:
        """Look at a place anew that was told of."""
        self._known.pop(place, None)

    def told(self, place: int, word: int, now_s: float) -> None:
        """Its worker knows of the end of a connection: it rests, and its place is free then."""
        self._connecting.rest(place, word, now_s)

    def leave(self, place: int, word: int, now_s: float) -> None:
        """Nothing finds the connection any more: its place is free a little later."""
        self._connecting.rest(place, word, now_s)
