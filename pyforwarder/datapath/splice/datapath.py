"""The splice datapath: the two ends talk TCP end to end, the programs rewrite the packets' numbers.

bpf/splice.c does that; keeper.py begins and ends it. This is the worker's part: it requests that
pairs begin. What it does for a pair that has begun is in spliced.py, and how it continues those of
other workers in adopted.py.

A pair can begin at any moment. Bytes that have arrived at our sockets by then are read and written
by the worker; later bytes are in no queue here, and must not be read.
"""

from __future__ import annotations

import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.connection import Phase
from pyforwarder.core.keepalive import OFF
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Pair, PairHost, PairReason
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SpliceState
from pyforwarder.datapath.splice.adopted import AdoptedPairs
from pyforwarder.datapath.splice.keeper_replies import (
    Begun,
    Declined,
    Failed,
    JoinReply,
    Late,
    NotNow,
    join_reply,
)
from pyforwarder.datapath.splice.paused_pair import PausedPair
from pyforwarder.datapath.splice.records import used_indexes
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, received
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import SO_BUF_LOCK

if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.datapath.splice.paused_pair import Then

# Not in socket(7) yet: the kernel does not resize the locked buffers, since Linux 5.14.
_SOCK_RCVBUF_LOCK: Final = 2
# The program that lets a pair begin takes microseconds, unless it is interrupted.
_BEGINNING_S: Final = 0.5
_BEGINNING_POLL_S: Final = 0.001
# Pairs that are requested of the keeper at the same time. It handles one after the other, and they
# are paused meanwhile; with fewer requests it would wait for a turn of our loop in between.
MOST_PAUSED: Final = 8
# The longest pause of a pair while the keeper reads how its server is reached.
_SHOW_ROUTE_S: Final = 0.05


class _Expected:
    """A pair that will be spliced soon."""

    __slots__ = ("locks",)

    def __init__(self, locks: list[tuple[_socket.socket, int]]) -> None:
        self.locks = locks  # which buffers of the sockets were locked before


class SpliceDatapath(AdoptedPairs):
    """Pairs that are one TCP connection from end to end, for one worker."""

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
        super().__init__(host, maps, keeper, window=window, worker=worker)
        self._paused: dict[PausedPair, None] = {}  # oldest first
        self._showing_routes: dict[
            PausedPair, None
        ] = {}  # pairs whose servers the keeper is reading
        # Packets of pairs that begin from now on may arrive by any interface.
        self.takes_any_interface = False
        self.keepalive = OFF  # of pairs that begin from now on

    def expect(self, pair: Pair) -> None:
        """The pair, which is copied now, will be spliced: keep the receive buffers of its sockets
        from growing.

        What a peer has under way to us when a pair begins goes to the other end at once, and is
        lost if that end has no room for it. Peers may send what our receive buffers have room for,
        and the kernel enlarges these as long as we copy.
        """
        assert pair.server is not None
        option = socket.SOL_SOCKET, SO_BUF_LOCK
        locks = [(sock, sock.getsockopt(*option)) for sock in (pair.client, pair.server)]
        for sock, lock in locks:
            sock.setsockopt(*option, lock | _SOCK_RCVBUF_LOCK)
        pair.datapath_record = _Expected(locks)

    @staticmethod
    def _expect_no_more(pair: Pair) -> None:
        """Undo `expect`, for another datapath."""
        if isinstance(pair.datapath_record, _Expected):
            for sock, lock in pair.datapath_record.locks:
                sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, lock)
        pair.datapath_record = None

    def join(self, pair: Pair) -> PairReason | None:
        """Splice the pair, and wait until that is done: for a caller that serves no other pairs.

        UNREAD_BYTES, NO_KEEPER: a later try may succeed.
        """
        reasons: list[PairReason | None] = []
        reason = self.ask(pair, lambda _, reason: reasons.append(reason))
        if reason is not None:
            return reason
        self.finish_paused()
        return reasons[0]

    def _request(self, pair: Pair) -> tuple[list[int], dict[str, object]]:
        """The descriptors and fields of a `join` request; built right before it is sent."""
        pair.is_shared = True
        self._acknowledge(pair)
        # The program counts in the slot only while it has this id.
        self._window.words64[pair.slot * self._window.WORDS64 + table.ID] = pair.id
        return [pair.client_fd, pair.server_fd], {
            "id": pair.id,
            "slot": self._window.first_slot + pair.slot,
            "pending": [len(flow.pending or b"") for flow in (pair.up, pair.down)],
            "any_interface": int(self.takes_any_interface),
            "keepalive": self.keepalive,
        }

    def _conclude(self, pair: Pair, reply: JoinReply) -> PairReason | None:
        """Act on the keeper's answer, or on what was read from the record instead."""
        if isinstance(reply, Declined):
            return reply.reason
        if isinstance(reply, Late):
            return PairReason.NO_KEEPER
        if isinstance(reply, NotNow):
            return PairReason.UNREAD_BYTES
        if isinstance(reply, Failed):
            # It is not known how far it came, so no datapath may use these sockets again. If the
            # pair has begun, only the keeper can have them reset their ends.
            index, begun = self._find(pair), self._read_begun(pair)
            if isinstance(begun, Begun):
                self._take(pair, begun.index, begun.unread_bytes, is_mute=False)
            elif index is not None:
                self.forget(index, pair.id)
            self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        self._take(pair, reply.index, reply.unread_bytes, is_mute=reply.is_mute)
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                break
        return None

    def _read_begun(self, pair: Pair) -> JoinReply | None:
        """The answer that the keeper would have given: whether the pair has begun, or will not any
        more.

        None: the program is running at this moment.
        """
        index = self._find(pair)
        if index is None:
            return Declined(PairReason.NO_KEEPER)
        record = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
        if record.state in (SpliceState.FREE, SpliceState.ARMED):
            return Declined(PairReason.NO_KEEPER)
        if record.state == SpliceState.ACTIVE:
            unread = [int(direction.unread) for direction in record.direction]
            return Begun(index, unread, is_mute=False)
        return None

    def _find(self, pair: Pair) -> int | None:
        """The record that a keeper has allocated for the pair, whether it has begun or not."""
        slot = self._window.first_slot + pair.slot
        for index in used_indexes(self._memory):
            found = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
            if (found.id, found.slot) == (pair.id, slot):
                return index
        return None

    # Requests without waiting

    @property
    def can_show_route(self) -> bool:
        """Whether another server can be shown to the keeper now; otherwise soon."""
        return len(self._showing_routes) < MOST_PAUSED

    def show_route(
        self, pair: Pair, then: Callable[[Pair], None], *, has_source: bool = False
    ) -> bool:
        """Let the keeper read how the server of a pair that is copied is reached.

        `has_source`: the upstream names the address from which that server was connected to.

        The pair is paused until the keeper has looked: a connection that ends at once would be over
        before that, and nothing could be read of it. `then` is called afterwards, some hundredths
        of a second later at most; the pair may have ended by then. False: the keeper cannot be
        asked at the moment, and nothing has changed.
        """
        if not self.can_show_route:
            return False
        before = pair.datapath
        assert isinstance(before, CopyDatapath)
        pair.is_shared = True
        sockets = [pair.client_fd, pair.server_fd]
        asked = self._keeper.ask_now("learn", sockets, has_source=int(has_source))
        if asked is None:
            return False
        paused = PausedPair(
            self._loop, pair, before, asked, lambda pair, _: then(pair), self._end_showing_route
        )
        asked.then = lambda _answer, _fds: self._end_showing_route(paused)
        self._showing_routes[paused] = None
        self._loop.deadlines.start(paused, scaled_s(_SHOW_ROUTE_S), time.monotonic())
        return True

    def _end_showing_route(self, paused: PausedPair) -> None:
        """The keeper has looked, or is late: it only reads, so the pair continues either way."""
        if paused not in self._showing_routes:
            return
        del self._showing_routes[paused]
        self._loop.deadlines.stop(paused)
        pair = paused.pair
        if pair is None:
            return
        try:
            paused.release(pair)
            paused.resume_copy(pair)
            if paused.ends_with is not None:
                self._host.broken(pair, paused.ends_with)
        except Exception as error:
            self._loop.on_error(pair, error)
        paused.then(pair, None)

    @property
    def is_busy(self) -> bool:
        """Whether as many pairs are requested of the keeper as are allowed at once."""
        return len(self._paused) >= MOST_PAUSED

    @property
    def paused(self) -> int:
        """How many pairs are requested of the keeper; each may be spliced soon."""
        return len(self._paused)

    def ask(self, pair: Pair, then: Then) -> PairReason | None:
        """`join` of a pair that is copied, without waiting for the keeper.

        None: the pair is paused, and `then` is called with the result of `join` within
        `KeeperAsker.longest_s`; the pair may have ended by then. Otherwise the result of `join` is
        returned at once, and nothing has changed. Not while this `is_busy`.
        """
        obstacle = self._obstacle(pair)
        if obstacle is None:
            before = pair.datapath
            assert isinstance(before, CopyDatapath)
            fds, fields = self._request(pair)
            asked = self._keeper.ask_now("join", fds, **fields)
            if asked is not None:
                paused = PausedPair(self._loop, pair, before, asked, then, self._overdue)
                asked.then = partial(self._answered, paused)
                self._paused[paused] = None
                # By a clock that is read after the request; the loop's is that of its turn.
                now_s = time.monotonic()
                self._loop.deadlines.start(paused, self._keeper.longest_s, now_s)
                return None
            obstacle = PairReason.NO_KEEPER
        if obstacle is not PairReason.UNREAD_BYTES:
            self._expect_no_more(pair)
        return obstacle

    def _answered(self, paused: PausedPair, answer: dict[str, Any] | None, _fds: list[int]) -> None:
        if answer is None:
            # A keeper has died during the request: the records say how far it came.
            self._check_begun(paused)
        else:
            self._end_pause(paused, join_reply(answer))

    def _overdue(self, paused: PausedPair) -> None:
        """The keeper has not answered: the pair's record says how far it came."""
        self._keeper.receive()  # the answer may be here, if this worker is late itself
        if paused in self._paused:
            self._keeper.give_up(paused.asked)
            self._check_begun(paused)

    def _check_begun(self, paused: PausedPair) -> None:
        """Neither a keeper nor a program will begin the pair any more: check whether one has done
        so.
        """
        pair = paused.pair
        reply = self._read_begun(pair) if pair is not None else Failed("the pair is gone")
        if reply is None:
            now_s = time.monotonic()
            paused.polls += 1
            if paused.polls * _BEGINNING_POLL_S < scaled_s(_BEGINNING_S):
                self._loop.deadlines.start(paused, _BEGINNING_POLL_S, now_s)
                return
            reply = Failed("the program that begins it does not end")
        self._end_pause(paused, reply)

    def _end_pause(self, paused: PausedPair, reply: JoinReply) -> None:
        del self._paused[paused]
        self._loop.deadlines.stop(paused)
        pair = paused.pair
        if pair is None:
            if isinstance(reply, Begun):
                self.forget(reply.index, paused.id)
            return
        reason: PairReason | None = PairReason.NO_KEEPER
        try:
            paused.release(pair)
            reason = self._conclude(pair, reply)
            if pair.datapath is self:
                self._check_record(pair)  # the programs' events meanwhile were for no pair
            elif pair.datapath is not None:
                paused.resume_copy(pair)
                if reason is not PairReason.UNREAD_BYTES:
                    self._expect_no_more(pair)
            if paused.ends_with is not None and pair.datapath is not None:
                self._host.broken(pair, paused.ends_with)
        except Exception as error:
            self._loop.on_error(pair, error)
        paused.then(pair, reason)

    def finish_paused(self) -> None:
        """Wait until no request is open: the worker is about to end, or to hand its pairs over."""
        for paused in list(self._showing_routes):
            self._end_showing_route(paused)
        while self._paused:
            paused = next(iter(self._paused))
            wait_s = paused.due_s - time.monotonic()
            if wait_s <= 0:
                self._overdue(paused)
                time.sleep(_BEGINNING_POLL_S)
            elif self._keeper.is_over:
                time.sleep(min(wait_s, _BEGINNING_POLL_S))
            else:
                self._keeper.wait_until(partial(self._is_known, paused), wait_s)

    def _is_known(self, paused: PausedPair) -> bool:
        return paused not in self._paused

    @staticmethod
    def _acknowledge(pair: Pair) -> None:
        """Have TCP send a delayed acknowledgement now: once the pair is spliced, it would never be
        sent.
        """
        assert pair.server is not None
        for sock in (pair.client, pair.server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _obstacle(self, pair: Pair) -> PairReason | None:
        if pair.slot < 0:
            return PairReason.MAP_FULL
        for flow in (pair.up, pair.down):
            if flow.phase is not Phase.OPEN or flow.end_seen:
                return PairReason.HALF_CLOSED
        assert pair.server is not None
        for sock in (pair.client, pair.server):
            if sock.family == socket.AF_UNIX:
                return PairReason.UNIX_SOCKET
            if received(sock).state != TCP_ESTABLISHED:
                return PairReason.HALF_CLOSED
        return None
