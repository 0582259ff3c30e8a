"""Pairs that were taken over from another machine, until their peers have answered and continue.

Both peers are probed until a packet of each has come, so that the record has present numbers
(`replicas.narrow`). A peer that never answers has no such connection any more, and the pair is
reset.

A peer that has sent into the void has doubled its retransmission timeout each time. If all it lacks
is an acknowledgement, it gets an ICMP error, as from a router that had no route for a moment: then
it retransmits at once, instead of in a second or a minute (RFC 6069).
"""

from __future__ import annotations

import ctypes
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import (
    SPLICE_BYTES,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.replicas import heard, narrow
from pyforwarder.runtime.one_store import store32

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.splice.keepalive import Keepalives

_MASK: Final = 0xFFFFFFFF
# The neighbours may only now be learning where the addresses are: so the second probe follows soon.
_FIRST_PAUSE_S: Final = 0.1
_MOST_PAUSE_S: Final = 4.0
# How often a pair is checked for an answer.
_LOOK_S: Final = 0.03
_LATE_S: Final = 1.0
_LOOK_LATE_S: Final = 0.2
# A peer that has not answered for so long after the takeover has no such connection any more.
_GIVE_UP_S: Final = 30.0
# How many such errors a peer gets, and how many doublings each takes back.
_TELLS: Final = 8
_TOLD_AT_ONCE: Final = 2
_AT_ONCE: Final = 64
# A pair without new segments for so long has had none since its numbers were reported.
_MOVED_S: Final = 30.0
_IN_DOUBT: Final = 2  # after so many probes without an answer that is uncertain
# The numbers are reported once a second, with a delay.
_TOLD_LATE_S: Final = 2.0
_TICKS_PER_S: Final = 1000  # of nearly all timestamp clocks (RFC 7323, 5.4)
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)
_GIVEN_UP: Final = {Direction.UP: ResetBy.CLIENT_TIMEOUT, Direction.DOWN: ResetBy.SERVER_TIMEOUT}


@dataclass(slots=True, order=True)
class _Unsettled:
    """A pair that was taken over, and whose numbers are still those of the report."""

    next_s: float
    index: int
    id: int = field(compare=False)
    since_s: float = field(compare=False)
    ask_s: float = field(compare=False)
    pause_s: float = field(default=_FIRST_PAUSE_S, compare=False)
    asked: int = field(default=0, compare=False)
    is_narrow: bool = field(default=False, compare=False)
    tells: int = field(default=0, compare=False)
    # By direction: what its peer had no acknowledgement for when both had answered.
    lacked: dict[Direction, int] = field(default_factory=dict, compare=False)


class Settling:
    """The pairs of one keeper that were just taken over."""

    def __init__(
        self,
        memory: mmap.mmap,
        keepalives: Keepalives,
        end: Callable[[int, ResetBy], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[..., None] = splice_sockets.send_was_unreachable,
    ) -> None:
        """`memory` has the records; `end` resets a pair; `tell` sends an ICMP error."""
        self._memory = memory
        self._keepalives = keepalives
        self._end = end
        self._clock = clock
        self._send_acks = tell
        self._due: list[_Unsettled] = []  # a heap

    def begin(self, index: int, pair_id: int) -> None:
        """A pair was taken over."""
        now_s = self._clock()
        heapq.heappush(self._due, _Unsettled(now_s, index, pair_id, now_s, now_s))

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due."""
        if not self._due:
            return most_s
        return min(most_s, max(0.0, self._due[0].next_s - self._clock()))

    def run_due(self) -> None:
        """Do some of what is due."""
        now_s = self._clock()
        for _ in range(_AT_ONCE):
            if not self._due or self._due[0].next_s > now_s:
                return
            one = heapq.heappop(self._due)
            record = Splice.from_buffer_copy(self._memory, one.index * SPLICE_BYTES)
            if record.state != SpliceState.ACTIVE or record.id != one.id or record.reset:
                continue
            is_done = (
                self._has_gone_on(one, record) if heard(record) else self._ask(one, record, now_s)
            )
            if not is_done:
                late = now_s - one.since_s >= _LATE_S
                one.next_s = now_s + (_LOOK_LATE_S if late else _LOOK_S)
                heapq.heappush(self._due, one)

    def _ask(self, one: _Unsettled, record: Splice, now_s: float) -> bool:
        """Probe the silent peers; returns whether the pair was reset for their silence."""
        silent = [n for n in Direction if not record.direction[n].last_received_s]
        if now_s - one.since_s >= _GIVE_UP_S:
            self._end(one.index, _GIVEN_UP[silent[0]])
            return True
        if now_s >= one.ask_s:
            for direction in silent:
                self._advance_clock(one, record, direction, now_s)
                self._keepalives.ask(one.index, record, direction)
            one.asked += 1
            one.ask_s = now_s + one.pause_s
            one.pause_s = min(2 * one.pause_s, _MOST_PAUSE_S)
        return False

    def _advance_clock(
        self, one: _Unsettled, record: Splice, direction: Direction, now_s: float
    ) -> None:
        """Give a probe a timestamp that is not older than the last one that the peer has got from
        the other end.

        Linux since 6.14 does not answer a probe that looks old (PAWS, RFC 7323). From here on the
        other end's timestamps are not less than this one, until its clock has caught up
        (`monotonic_tsval` in splice_options.h).
        """
        other = record.direction[1 - direction]
        for_s = now_s - other.ts_recent_s
        if not other.ts_recent or (for_s > _MOVED_S and one.asked < _IN_DOUBT):
            return  # the number is exact, while a clock may be slower than most
        late = int((for_s + _TOLD_LATE_S) * _TICKS_PER_S) & _MASK
        at = one.index * SPLICE_BYTES + Splice.direction.offset + direction * _DIRECTION_BYTES
        stamp = (other.ts_recent + other.tsval_delta + late) & _MASK
        store32(self._memory, at + SpliceDirection.last_tsval.offset, stamp)
        store32(self._memory, at + SpliceDirection.has_last_tsval.offset, 1)

    def _has_gone_on(self, one: _Unsettled, record: Splice) -> bool:
        """Whether all bytes from before are acknowledged, or no more errors are sent about them."""
        if not one.is_narrow:
            one.is_narrow = True
            narrow(self._memory, one.index)
            self._keepalives.watch([one.index])
            one.lacked = {n: acked for n in Direction if (acked := _lacking(record, n)) is not None}
        one.lacked = {n: acked for n, acked in one.lacked.items() if _lacking(record, n) == acked}
        if not one.lacked or one.tells == _TELLS:
            return True
        one.tells += 1
        for direction, acked in one.lacked.items():
            self._send_acks(record.direction[direction], record.family, acked, _TOLD_AT_ONCE)
        return False


def _lacking(record: Splice, direction: Direction) -> int | None:
    """The first byte that this peer must retransmit, in its own numbers; None: all are
    acknowledged.
    """
    from_peer, back = record.direction[direction], record.direction[1 - direction]
    acked = (int(back.last_ack) + back.ack_delta) & _MASK
    return acked if acked != int(from_peer.last_end) & _MASK else None
