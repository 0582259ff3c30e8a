"""Spliced pairs: the worker's part until they end.

The programs (bpf/splice.c) translate their packets. The worker copies the last bytes that had
arrived before a pair began, follows what the programs record of its end, and tells the keeper when
it has ended.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.connection import Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason, error_of, failure
from pyforwarder.datapath.copying import BULK_READ_BYTES, CopyDatapath
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.ebpf.ringbuf import RingBuffer
from pyforwarder.datapath.splice.abi import (
    MAX_REPEATED_BYTES,
    SPLICE_BYTES,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceEvent,
    SpliceState,
)
from pyforwarder.datapath.splice.making import ring_bytes
from pyforwarder.datapath.splice.records import splice_memory
from pyforwarder.runtime.loop import EPOLLERR, EPOLLET, EPOLLIN, EPOLLOUT
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.maps import SpliceMaps


# The acknowledgement of a tail may arrive at the very moment at which a pair begins, and no event
# reports it. So such pairs are checked after so long, then after twice as long, and so on.
_POLL_S: Final = 1.0
_RESET_BY: Final = {
    ResetBy.CLIENT: CloseReason.CLIENT_RESET,
    ResetBy.SERVER: CloseReason.SERVER_RESET,
    ResetBy.NO_ROUTE: CloseReason.NO_ROUTE,
    ResetBy.CLIENT_TIMEOUT: CloseReason.CLIENT_TIMEOUT,
    ResetBy.SERVER_TIMEOUT: CloseReason.SERVER_TIMEOUT,
    ResetBy.MOVED: CloseReason.MOVED,
}
# A peer whose packets stay longer than the next interface's MTU, although it was told repeatedly,
# ignores that: its pair is reset, or it would hang.
_NARROW_S: Final = 15.0
# The peer is told no more often than this: each time costs a packet, and a request to the keeper.
_NARROW_PAUSE_S: Final = 1.0
# Of the pairs whose end could not be reported to the keeper, so many are reported at once.
_ENDS_IN_A_TURN: Final = 8
# A worker that is about to end waits so long without an answer of the keeper, and so long at most.
_SILENT_S: Final = 1.0
_LAST_ENDS_S: Final = 3.0


class Spliced:
    """The state of a spliced pair."""

    __slots__ = (
        "asks_mute",
        "end_reported",
        "index",
        "is_mute",
        "left_bytes",
        "narrow",
        "narrow_told_s",
        "pause_s",
        "poll_s",
        "reports_narrow",
    )

    def __init__(self, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        self.index = index
        # To be read, for each direction: they arrived before the pair began.
        self.left_bytes = left_bytes
        self.is_mute = is_mute  # closing its sockets sends nothing
        self.asks_mute = False  # the keeper is asked to make them mute
        self.end_reported = False  # the keeper was told that the pair has ended
        self.reports_narrow = False  # the keeper is asked to send an ICMP error to a peer
        self.pause_s = _POLL_S
        self.poll_s = time.monotonic() + _POLL_S
        # By direction whose packets were too long: the bytes that had passed, and since when.
        self.narrow: dict[Direction, tuple[int, float]] = {}
        self.narrow_told_s = -_NARROW_PAUSE_S  # when their sender was told last


class SplicedPairs(ABC):
    """The spliced pairs of one worker. `SpliceDatapath` begins them."""

    kind = DatapathKind.SPLICE

    def __init__(
        self,
        host: PairHost,
        maps: SpliceMaps,
        keeper: KeeperAsker,
        *,
        window: PairWindow,
        worker: int,
    ) -> None:
        """Use the inherited maps, and the keeper."""
        self._host = host
        self._loop = host.loop
        self._keeper = keeper
        self._window = window
        self._copying = CopyDatapath(host)
        self._memory = splice_memory(maps)
        self._ring = RingBuffer(maps.ring_fds[worker], ring_bytes(maps.slots))
        self._by_index: dict[int, Pair] = {}
        # Of these, those that were not mute at the last check.
        self._with_tail: dict[int, Pair] = {}
        self._is_polling = False  # a timer is set
        # Pairs whose end must still be reported to the keeper, oldest first, and what is called
        # then.
        self._ends: dict[Pair, Callable[[Pair], None]] = {}
        self._loop.watch(self._ring.fd, EPOLLIN, self._rung, None)

    @abstractmethod
    def join(self, pair: Pair) -> PairReason | None:
        """Splice a pair."""

    @property
    def unsettled(self) -> int:
        """How many requests to the keeper are not sent, or not answered."""
        return self._keeper.unsettled + len(self._ends)

    def _take(self, pair: Pair, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        pair.datapath_record = Spliced(index, left_bytes, is_mute=is_mute)
        if not is_mute:
            self._with_tail[index] = pair
            self._poll_tails_later()
        pair.is_shared = True
        pair.kind = DatapathKind.SPLICE
        pair.datapath = self
        self._by_index[index] = pair
        pair.client_mask = pair.server_mask = EPOLLET
        for fd in (pair.client_fd, pair.server_fd):
            self._loop.redirect(fd, self.ready)
            self._loop.change(fd, EPOLLET)
        for flow in (pair.up, pair.down):
            flow.blocked = False

    def _copy_rest(self, pair: Pair, flow: Flow) -> bool:
        """Copy the bytes that had arrived before the pair began, and no byte more; False: the pair
        has ended.
        """
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        while flow.pending is not None or state.left_bytes[flow.direction]:
            if flow.pending is None:
                left_bytes = state.left_bytes[flow.direction]
                error = 0
                try:
                    flow.pending = os.read(flow.source_fd, min(left_bytes, BULK_READ_BYTES))
                except OSError as raised:
                    flow.pending, error = b"", raised.errno or 0
                if not flow.pending:
                    # A reset has emptied its receive queue.
                    return self._fail(pair, flow.source_fd, error)
                flow.read_bytes += len(flow.pending)
                flow.carried_packets += 1
                state.left_bytes[flow.direction] -= len(flow.pending)
            if not self._copying.write_pending(pair, flow):
                break
        return pair.datapath is self

    def _fail(self, pair: Pair, fd: int, error: int) -> bool:
        self._host.broken(pair, failure(pair, fd, error))
        return False

    def ready(self, pair: Pair, fd: int, mask: int) -> None:
        """Handle an event of our sockets: room for the last bytes, or an error."""
        outward = pair.down if fd == pair.client_fd else pair.up
        if mask & EPOLLERR:
            error = error_of(pair, fd)
            state = pair.datapath_record
            assert isinstance(state, Spliced)
            # A reset right before the pair began; or the tail was not acknowledged, or our socket
            # missed the acknowledgement, and has given up. Its port would be free.
            direction = self._record(pair).direction[1 - outward.direction]
            if error == errno.ECONNRESET or (error and (direction.tail_open or not state.is_mute)):
                self._fail(pair, fd, error)
                return
        if mask & EPOLLOUT and outward.blocked:
            outward.blocked = False
            self._copy_rest(pair, outward)

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """The counts of what was copied before, and of what the two ends have sent since.

        Nothing waits here for long: only, at first, what had arrived before the pair began.
        """
        state = pair.datapath_record
        if isinstance(state, Spliced) and not state.end_reported:
            self._catch_up(pair)
        at = pair.slot * self._window.WORDS64
        spliced = self._window.words64[at + table.REDIRECTED[flow.direction]]
        packets = self._window.words64[at + table.REDIRECTED_PACKETS[flow.direction]]
        left_bytes = state.left_bytes[flow.direction] if isinstance(state, Spliced) else 0
        left_bytes += len(flow.pending or b"")
        return flow.carried_bytes + spliced, flow.carried_packets + packets, left_bytes

    def _catch_up(self, pair: Pair) -> None:
        """Update the pair's slot from the counts of its record.

        The programs count in the record, and store the sum in the slot that the record names. While
        a pair is being adopted, that is another slot for a moment, and no later packet may come
        that stores the sum in this one. Nor do two processors store their sums in order.
        """
        record = self._record(pair)
        if record.id != pair.id:
            return
        words, at = self._window.words64, pair.slot * self._window.WORDS64
        for direction in Direction:
            from_peer = record.direction[direction]
            for column, counted in (
                (table.REDIRECTED, shown_bytes(from_peer)),
                (table.REDIRECTED_PACKETS, int(from_peer.packets)),
            ):
                place = at + column[direction]
                if words[place] < counted:
                    words[place] = counted

    def trips(self, pair: Pair) -> int:
        """Never: there is no backlog."""
        return 0

    def active_s(self, pair: Pair) -> float:
        """When the last byte passed; packets without payload (keepalives) do not count."""
        at = pair.slot * self._window.WORDS64
        seen_ns = max(self._window.words64[at + table.LAST_NS[d]] for d in Direction)
        return max(pair.active_s, seen_ns / 1e9)

    def leave(self, pair: Pair) -> None:
        """Release the pair: silently if its ends have closed it, else our sockets reset it.

        Also after a peer's own reset: it is not known whether the other end has accepted that, and
        a pair that is no longer counted must not continue.
        """
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        self._ends.pop(pair, None)
        if not state.end_reported and not self._report_end(pair, state):
            # The end was not reported: from now on a peer that still sends gets the kernel's RST.
            self.forget(state.index, pair.id)
        del self._by_index[state.index]
        pair.datapath_record = None

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Report the pair's end to the keeper, with our sockets; the caller calls `leave` at once.

        Only these sockets can reset a peer that only listens. False: too many such reports are
        waiting. Then the pair stays as it is, with its sockets, until its turn; `then` is called
        with it, to call `leave`.
        """
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        if not self._ends and self._may_go(pair, state):
            return True
        self._ends[pair] = then
        self._keeper.when_there_is_room(self._end_some)
        return False

    def _may_go(self, pair: Pair, state: Spliced) -> bool:
        """Whether the end is reported to the keeper, or can never be."""
        return self._report_end(pair, state) or not self._keeper.lacks_room

    def _end_some(self) -> bool:
        """Report some of the waiting ends; returns whether any is left."""
        told = 0
        while self._ends and (told < _ENDS_IN_A_TURN or self._keeper.is_over):
            pair = next(iter(self._ends))
            state = pair.datapath_record
            assert isinstance(state, Spliced)
            if not self._may_go(pair, state):
                break
            told += 1
            then = self._ends.pop(pair)
            try:
                then(pair)
            except Exception as error:
                self._loop.on_error(pair, error)
        return bool(self._ends)

    def finish_ends(self) -> bool:
        """Wait until all ends are reported, as long as the keeper answers at all; returns whether
        they are.

        For a worker that is about to end, or to hand its pairs over.
        """
        return self._keeper.finish_while_heard(scaled_s(_SILENT_S), scaled_s(_LAST_ENDS_S))

    def _report_end(self, pair: Pair, state: Spliced) -> bool:
        ended = all(direction.fin_acked for direction in self._record(pair).direction)
        index, pair_id = state.index, pair.id
        self._catch_up(pair)  # from then on the keeper may reuse the record

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, pair_id)

        fds = [pair.client_fd, pair.server_fd]
        do = "leave" if ended else "reset"
        # Our sockets may be closed from then on: the message holds them, wherever it is.
        state.end_reported = self._keeper.ask(do, answered, fds, index=index, id=pair_id)
        return state.end_reported

    def forget(self, index: int, pair_id: int) -> None:
        """Release a pair that this worker cannot continue: its peers' next packets get a RST."""

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, pair_id)

        self._keeper.ask("abort", answered, index=index, id=pair_id)

    def _record(self, pair: Pair) -> Splice:
        assert isinstance(pair.datapath_record, Spliced)
        return Splice.from_buffer_copy(self._memory, pair.datapath_record.index * SPLICE_BYTES)

    def _rung(self, _owner: object, _fd: int, _mask: int) -> None:
        for data in self._ring.records():
            event = SpliceEvent.from_buffer_copy(data)
            pair = self._by_index.get(event.index)
            if pair is not None and pair.id == event.id:
                try:
                    self._check_record(pair)
                except Exception as error:
                    # All pairs share the ring: an error ends only the pair that it concerns.
                    self._loop.on_error(pair, error)

    def _check_record(self, pair: Pair) -> None:
        """Act on the end of a tail, a FIN, its acknowledgement or a reset."""
        record = self._record(pair)
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        if not state.is_mute and not any(direction.tail_open for direction in record.direction):
            self._mute(pair, state)
        for flow in (pair.up, pair.down):
            direction = record.direction[flow.direction]
            if direction.fin and flow.phase is Phase.OPEN:
                self._host.fin_seen(pair, flow)
            if direction.fin_acked and flow.phase is Phase.FIN_SEEN:
                self._host.delivered(pair, flow)
                if pair.datapath is not self:
                    return
        if record.reset:
            self._host.broken(pair, _RESET_BY[ResetBy(record.reset)])
            return
        if record.state == SpliceState.RESET:
            # A firewall rule of this host has reset one end in the name of our socket.
            self._host.broken(pair, CloseReason.INTERNAL)
            return
        if any(direction.narrow_mtu for direction in record.direction):
            self._report_narrow_interface(pair, state, record)

    def _report_narrow_interface(self, pair: Pair, state: Spliced, record: Splice) -> None:
        """A peer's packet was longer than our interface's MTU, and is lost: have the keeper tell
        the peer, as a router would.
        """
        now_s = time.monotonic()
        if now_s - state.narrow_told_s < _NARROW_PAUSE_S:
            # Until then the program sends no event, however many such packets come.
            self._loop.after(_NARROW_PAUSE_S, lambda: self._check_again(pair, state))
            return
        state.narrow_told_s = now_s
        for direction in Direction:
            from_peer = record.direction[direction]
            if not from_peer.narrow_mtu:
                continue
            passed_bytes, since_s = state.narrow.get(direction, (-1, now_s))
            if from_peer.bytes != passed_bytes:
                state.narrow[direction] = from_peer.bytes, now_s
            elif now_s - since_s >= _NARROW_S:
                self._host.broken(pair, CloseReason.INTERNAL)
                return
        if state.reports_narrow:
            return

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            state.reports_narrow = False
            if answer is None:  # the next such packet would send no event
                self._check_again(pair, state)

        state.reports_narrow = self._keeper.ask("narrow", answered, index=state.index, id=pair.id)

    def _check_again(self, pair: Pair, state: Spliced) -> None:
        if pair.datapath is self and pair.datapath_record is state:
            self._check_record(pair)

    def _mute(self, pair: Pair, state: Spliced) -> bool:
        """Have our sockets made mute if no tail is left, so that the pair outlives this worker.

        Without an answer the pair continues all the same, as long as this worker lives. False: the
        keeper cannot be asked at the moment.
        """
        if state.asks_mute:
            return True

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            state.asks_mute = False
            state.is_mute = answer is not None and bool(answer.get("mute"))

        fds = [pair.client_fd, pair.server_fd]
        asked = self._keeper.ask_now("mute", fds, index=state.index, id=pair.id)
        if asked is not None:
            asked.then = answered
            state.asks_mute = True
        return state.asks_mute

    def _poll_tails(self) -> None:
        """Check pairs whose sockets are not mute, as long as there are any."""
        now_s = time.monotonic()
        self._is_polling = False
        for index, pair in list(self._with_tail.items()):
            state = pair.datapath_record
            if not isinstance(state, Spliced) or state.index != index or state.is_mute:
                del self._with_tail[index]
            elif now_s >= state.poll_s and self._mute(pair, state):
                state.pause_s *= 2
                state.poll_s = now_s + state.pause_s
        self._poll_tails_later()

    def _poll_tails_later(self) -> None:
        if self._with_tail and not self._is_polling:
            self._is_polling = True
            self._loop.after(_POLL_S, self._poll_tails)

    def close(self) -> None:
        """Unmap the records and the ring; no more requests are sent."""
        self._keeper.close()
        self._ring.close()
        self._memory.close()


def shown_bytes(direction: SpliceDirection) -> int:
    """The bytes that a direction has carried, as the programs count them (`visible_bytes` in
    splice_valid.h).
    """
    return max(int(direction.bytes), int(direction.repeated_bytes) - MAX_REPEATED_BYTES)
