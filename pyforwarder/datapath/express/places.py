"""The keeper's work on connections that the kernel has opened: those that end, and those that last.

The programs open them by themselves. A connection that has ended keeps its place for a while, as a
FIN may be repeated. One that was never joined keeps its place until no program can still use it.
One that lasts is given to a worker, as if that worker's predecessor had died, and is a spliced pair
like any other from then on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express.connect_abi import NO_WORKER, STATE_MASK, Ask, AskState
from pyforwarder.datapath.express.grace import Grace
from pyforwarder.datapath.express.pace import Pace
from pyforwarder.datapath.splice.abi import Splice, SpliceState

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.abi import Direction
    from pyforwarder.datapath.express.connection_maps import ConnectionMaps

# A server that has not answered by then probably never will, or the client would give up: a worker
# tries. The time is shorter if `connect_timeout` is.
ANSWER_TIMEOUT_S: Final = 3.0
# Then for so long only workers connect to it.
UNANSWERED_FOR_S: Final = 10.0
# A connection that is older than this counts as lasting.
LASTS_AFTER_S: Final = 1.0
# The least between two rounds: places that become LEAVING in one wait for other programs than those
# of the round before.
_APART_S: Final = 1e-6


class Ended(NamedTuple):
    """A connection that has begun and ended without a worker."""

    place: int
    ask: Ask
    record: Splice

    @property
    def ended_ns(self) -> int:
        """When the second FIN was acknowledged, by CLOCK_MONOTONIC."""
        return int(self.record.clocks.end_noticed_ns)

    def carried_bytes(self, direction: Direction) -> int:
        """The bytes that a direction has carried, from the number of its FIN.

        A program that was interrupted may have stored an older count over the last one.
        """
        from_peer = self.record.direction[direction]
        counted = int(from_peer.bytes)
        rest = (int(from_peer.fin_seq) - 1 - (int(from_peer.begin_seq) + counted)) & 0xFFFFFFFF
        return counted + (rest - (1 << 32) if rest >= 1 << 31 else rest)


class Seen(NamedTuple):
    """What a look has found."""

    ended: list[Ended]
    lasting: list[int]  # places whose connections are given to a worker
    asked: list[int]  # places whose servers have not answered yet


class Places:
    """All places, for one keeper."""

    def __init__(
        self,
        connections: ConnectionMaps,
        record: Callable[[int], Splice],
        grace: Grace | None = None,
    ) -> None:
        """`record` reads the splice of an index; `grace` waits for programs."""
        self._connections = connections
        self._record = record
        self._grace = grace or Grace(connections.wait_for_programs)
        self._pace = Pace(connections.places, connections.taken())
        self._round_s = 0.0  # when the last round began
        self._known: dict[int, int] = {}  # place -> word of connections that were reported
        self._next = 0  # where in `_busy` the next look continues
        # Places that were neither free nor resting when the round began, each with its word.
        self._busy: list[tuple[int, int]] = []
        self._unused = connections.places  # that were free at that time
        # Ends that the programs have counted in all rounds; increased, too, where that is not
        # known.
        self.counted = 0
        # Whether the last round has walked all places; otherwise ends may remain uncounted.
        self.is_counting = True
        self._has_complained = False

    @property
    def is_through(self) -> bool:
        """Whether the last look has finished."""
        return self._next == 0

    @property
    def is_short(self) -> bool:
        """Whether places are so short that they rest only briefly."""
        return self._pace.is_short

    @property
    def used(self) -> int:
        """How many places were taken when the last round was complete."""
        return self._connections.places - self._unused

    def glance(self, now_s: float) -> float:
        """See how fast places are taken, and free some if they are short; returns the seconds to
        the next glance.

        It may be called at any time, also between two parts of a look. `now_s` is CLOCK_MONOTONIC.
        """
        self._pace.glance(now_s, self._connections.taken())
        if self.is_short:
            self._go_round(now_s)
        return self._pace.pause_s

    def begin_anew(self) -> None:
        """Let the next look begin with a round, even if the last one has not finished."""
        self._next = 0

    def look(
        self,
        now_s: float,
        *,
        lasts_after_s: float = LASTS_AFTER_S,
        has_room: Callable[[int], bool] = lambda _place: True,
        at_once: int = 1 << 32,
    ) -> Seen:
        """Do what is due; call it about twice a second. `now_s` is CLOCK_MONOTONIC.

        It begins with a round, in which the programs count the ends that need no report of their
        own, and free places that have rested or were never joined. The end of a connection is left
        for later if there is no room for its report (`has_room`). After `at_once` places that took
        some time the look pauses, and the next call continues there (`is_through`).
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
            if self._connections.word(place) != word:
                continue  # it has changed since the round began: the next look handles it
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
            gone = self._connections.go_round(
                now_s, is_short=self.is_short, passed_ns=self._grace.passed_ns
            )
        except OSError as error:
            # The next round may succeed. Until then all ends are reported one by one.
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
        self._pace.glance(now_s, self._connections.taken())
        self._go_round(now_s)
        if self.is_counting and self._unused == self._connections.places:
            self._busy = []  # the usual case on an idle host
            self._known = {}
            return
        rests = int(AskState.RESTING)
        self._busy = [
            (place, word)
            for place, word in enumerate(self._connections.words())
            if 0 < word & STATE_MASK < rests
        ]
        if len(self._known) > len(self._busy):
            self._known = {
                place: word for place, word in self._busy if self._known.get(place) == word
            }

    def _give_up_late(self, place: int, word: int, now_s: float) -> None:
        ask = self._connections.ask(place)
        answer_s = ask.answer_ms / 1000 or ANSWER_TIMEOUT_S
        if now_s - ask.begun_ns / 1e9 > answer_s:
            until_ns = int((now_s + UNANSWERED_FOR_S) * 1e9)
            # If the kernel cannot run the program now, the next look tries again.
            with contextlib.suppress(OSError):
                self._connections.end_connection(place, word, not_before_ns=until_ns)

    def _look_at(
        self,
        place: int,
        word: int,
        now_s: float,
        seen: Seen,
        lasts_after_s: float,
        has_room: Callable[[int], bool],
    ) -> None:
        record = self._record(self._connections.first_splice + place)
        if record.state == SpliceState.FREE:
            # An earlier keeper had ended the pair, and died before it freed the place.
            self.leave(place, word, now_s)
            return
        if record.worker != NO_WORKER:
            self._known[place] = word  # an earlier keeper has given it to that worker
            return
        if not record.id:
            self._connections.rest(place, word, now_s)  # an earlier keeper has reported its end
            return
        ask = self._connections.ask(place)
        if all(direction.fin_acked for direction in record.direction):
            if has_room(place):
                self._known[place] = word
                seen.ended.append(Ended(place, ask, record))
        elif record.reset or now_s - ask.begun_ns / 1e9 >= lasts_after_s:
            # After a reset, too: it is not known whether the other end has accepted it.
            self._known[place] = word
            seen.lasting.append(place)

    def forget(self, place: int) -> None:
        """Handle a place again that was reported."""
        self._known.pop(place, None)

    def told(self, place: int, word: int, now_s: float) -> None:
        """The end of a connection was reported to its worker: the place rests, and becomes free
        afterwards.
        """
        self._connections.rest(place, word, now_s)

    def leave(self, place: int, word: int, now_s: float) -> None:
        """No packet finds the connection any more: its place becomes free a little later."""
        self._connections.rest(place, word, now_s)
