"""The splice datapath: the two ends talk TCP end to end, we rewrite the packets' numbers.

bpf/splice.c does that; splice_keeper.py begins and ends it. This is the worker's half: it brings a
pair to the moment at which it can begin, and follows what the programs say of its end.

A pair begins when both sockets are at rest: read empty, and everything that was read has been sent
on. First that is only hoped for, because it is so between any two messages. Where bytes never stop,
the pair is held for some milliseconds: what comes is dropped, and comes again, while the last bytes
are copied. If that is not enough, the pair goes on as it was, copied, and nothing has changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.connection import Phase
from pyforwarder.datapath import table
from pyforwarder.datapath.abi import DatapathKind, Direction, PairRecord
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason
from pyforwarder.datapath.ringbuf import RingBuffer
from pyforwarder.datapath.splice_abi import SPLICE_BYTES, Splice, SpliceEvent
from pyforwarder.datapath.splice_keeper import KeeperClient, KeeperError, splice_memory
from pyforwarder.datapath.splice_maps import RING_BYTES
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, rest
from pyforwarder.loop import EPOLLERR, EPOLLET, EPOLLIN
from pyforwarder.reasons import CloseReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.datapath.splice_maps import SpliceMaps
    from pyforwarder.datapath.table import PairWindow

# A pair is looked at whenever bytes have moved. After so many looks, the next one is this long
# after the last, then twice that, and so on.
_FREE_LOOKS: Final = 4
_LOOK_AGAIN_S: Final = 0.001
_MOST_SELDOM_S: Final = 0.1
# How long it is held then, at least, and for how many looks: a busy worker has not even read what
# had come before, else. After each hold it is left alone for so long, because every hold costs its
# peers a retransmission. After the last it is given up.
_HOLD_S: Final = 0.005
_HOLD_LOOKS: Final = 4
_PAUSES_S: Final = (0.02, 0.1, 0.5, 5.0)
# After a keeper that did not answer, none is asked for so long.
_KEEPER_PAUSE_S: Final = 5.0
_RESET_BY: Final = {
    1: CloseReason.CLIENT_RESET,
    2: CloseReason.SERVER_RESET,
    3: CloseReason.INTERNAL,
}


class _Tries:
    """What a pair that is still copied remembers."""

    __slots__ = (
        "held",
        "held_since",
        "held_until_s",
        "holds",
        "is_timed",
        "looks",
        "next_hold_s",
        "next_look_s",
        "pause_s",
    )

    def __init__(self) -> None:
        self.looks = 0
        self.holds = 0
        self.pause_s = _LOOK_AGAIN_S
        self.next_look_s = 0.0
        self.next_hold_s = 0.0
        self.is_timed = False  # the next look comes by the clock, if not before
        self.held = -1  # its place among the splices while it is held
        self.held_since = 0  # after so many looks
        self.held_until_s = 0.0


class _Spliced:
    """A pair's place among the splices."""

    __slots__ = ("index", "is_mute")

    def __init__(self, index: int, *, is_mute: bool) -> None:
        self.index = index
        self.is_mute = is_mute  # closing its sockets says nothing to anybody


@dataclass(frozen=True, slots=True)
class Orphan:
    """A spliced pair whose worker is gone: sockets in their place, and what is known of it."""

    index: int
    id: int
    client: socket.socket
    server: socket.socket
    record: PairRecord | None  # what `show` said of it


class SpliceDatapath:
    """Pairs that are one TCP connection from end to end, for one worker."""

    kind = DatapathKind.SPLICE

    def __init__(
        self,
        host: PairHost,
        maps: SpliceMaps,
        keeper: KeeperClient,
        *,
        window: PairWindow,
        worker: int,
    ) -> None:
        """Work on inherited maps, and on what the keeper does for us."""
        self._host = host
        self._loop = host.loop
        self._keeper = keeper
        self._window = window
        self._memory = splice_memory(maps)
        self._ring = RingBuffer(maps.ring_fds[worker], RING_BYTES)
        self._by_index: dict[int, Pair] = {}
        self._keeper_from_s = 0.0  # not asked before
        self._loop.watch(self._ring.fd, EPOLLIN, self._rung, None)

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over; UNREAD_BYTES: it was not at rest, a later try may find it so."""
        tries = pair.state
        if tries is None:
            tries = pair.state = _Tries()
        assert isinstance(tries, _Tries)
        now_s = time.monotonic()
        if tries.held < 0 and tries.looks >= _FREE_LOOKS and now_s < tries.next_look_s:
            self._look_by_the_clock(pair, tries, now_s)
            return PairReason.UNREAD_BYTES
        tries.looks += 1
        obstacle = self._obstacle(pair)
        if obstacle is None and now_s < self._keeper_from_s:
            obstacle = PairReason.NOT_AVAILABLE
        if obstacle not in (None, PairReason.UNREAD_BYTES):
            self._give_up(pair, tries)
            return obstacle
        at_rest = obstacle is None and self._is_at_rest(pair)
        try:
            if tries.held >= 0:
                begun = self._go_on_holding(pair, tries, now_s, at_rest=at_rest)
            elif at_rest or self._may_hold(pair, tries, now_s):
                begun = self._begin(pair, tries, now_s, hold=not at_rest)
            elif tries.holds >= len(_PAUSES_S) and now_s >= tries.next_hold_s:
                begun = PairReason.NEVER_AT_REST
            else:
                begun = PairReason.UNREAD_BYTES
        except KeeperError:
            # It may have begun to hold the pair, which nobody would let go.
            self._keeper_from_s = now_s + _KEEPER_PAUSE_S
            if pair.datapath is not None:
                self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        if begun is PairReason.UNREAD_BYTES:
            self._look_later(pair, tries, now_s)
        elif begun is not None:
            pair.state = None
        return begun

    def _begin(self, pair: Pair, tries: _Tries, now_s: float, *, hold: bool) -> PairReason | None:
        """Ask the keeper to take the pair; with `hold` also if it does not rest yet."""
        assert pair.server is not None
        fds = [pair.client_fd, pair.server_fd]
        self._acknowledge(pair)
        # The program counts in the record only while it bears this number.
        self._window.words[pair.slot * self._window.WORDS + table.ID] = pair.id
        slot = self._window.first_slot + pair.slot
        answer = self._keeper.ask("join", fds, id=pair.id, slot=slot, hold=hold)
        if "refused" in answer:
            return PairReason(answer["refused"])
        if "error" in answer:
            # How far it came is not known, so nobody may go on with these sockets.
            self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        if not answer["busy"]:
            self._take(pair, answer["index"], is_mute=answer["mute"])
            return None
        if hold:
            tries.held = answer["index"]
            tries.held_since = tries.looks
            tries.held_until_s = now_s + _HOLD_S
        return PairReason.UNREAD_BYTES

    def _go_on_holding(
        self, pair: Pair, tries: _Tries, now_s: float, *, at_rest: bool
    ) -> PairReason | None:
        """The pair is held, and still copied: begin, wait on, or let it go as it was."""
        fds = [pair.client_fd, pair.server_fd]
        if at_rest:
            self._acknowledge(pair)
            answer = self._keeper.ask("switch", fds, index=tries.held)
            if "error" in answer:
                self._host.broken(pair, CloseReason.INTERNAL)
                return PairReason.REFUSED_BY_KERNEL
            if not answer["busy"]:
                self._take(pair, tries.held, is_mute=answer["mute"])
                return None
        if now_s >= tries.held_until_s and tries.looks - tries.held_since >= _HOLD_LOOKS:
            tries.next_hold_s = now_s + _PAUSES_S[tries.holds - 1]
            self._let_go(pair, tries)
        return PairReason.UNREAD_BYTES

    def _look_later(self, pair: Pair, tries: _Tries, now_s: float) -> None:
        pause_s = _LOOK_AGAIN_S
        if tries.held < 0 and tries.looks > _FREE_LOOKS:
            pause_s = tries.pause_s
            tries.pause_s = min(2 * pause_s, _MOST_SELDOM_S)
        tries.next_look_s = now_s + pause_s
        self._look_by_the_clock(pair, tries, now_s)

    def _look_by_the_clock(self, pair: Pair, tries: _Tries, now_s: float) -> None:
        """Because nothing tells when TCP has sent the last byte."""
        if not tries.is_timed:
            tries.is_timed = True
            self._loop.after(tries.next_look_s - now_s, lambda: self._look_now(pair, tries))

    def _look_now(self, pair: Pair, tries: _Tries) -> None:
        tries.is_timed = False
        if pair.state is not tries:
            return
        if pair.datapath is not None:
            self._host.try_again(pair)
            if tries.held >= 0:
                # It may end before it is its turn, and then somebody must still let go of it.
                tries.next_look_s = time.monotonic() + _LOOK_AGAIN_S
                self._look_by_the_clock(pair, tries, time.monotonic())
        elif tries.held >= 0:
            # It ended meanwhile. Its sockets are gone, and with them what they had to say.
            self._let_go(pair, tries)

    def _let_go(self, pair: Pair, tries: _Tries) -> None:
        index, tries.held = tries.held, -1
        fds = [pair.client_fd, pair.server_fd] if pair.datapath is not None else []
        try:
            self._keeper.ask("abort", fds, index=index)
        except KeeperError:
            # The next keeper lets go of whatever was held.
            self._keeper_from_s = time.monotonic() + _KEEPER_PAUSE_S

    def _give_up(self, pair: Pair, tries: _Tries) -> None:
        if tries.held >= 0:
            self._let_go(pair, tries)
        pair.state = None

    @staticmethod
    def _acknowledge(pair: Pair) -> None:
        """Have TCP send what it has put off: such an acknowledgement would never be sent."""
        assert pair.server is not None
        for sock in (pair.client, pair.server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def adopt(self) -> Iterator[Orphan]:
        """Spliced pairs that have lost their worker and are ours now, until there is none left.

        Each must be given to `go_on_with` or closed, its sockets are the caller's.
        """
        while True:
            try:
                answer, fds = self._keeper.ask_for_sockets("adopt")
            except KeeperError:
                return
            if "index" not in answer or len(fds) != 2:
                for fd in fds:
                    os.close(fd)
                return
            record = bytes.fromhex(answer["record"])
            said = PairRecord.from_buffer_copy(record) if record else None
            if said is not None and said.id != answer["id"]:
                said = None  # the table's place was another's by then
            client, server = (socket.socket(fileno=fd) for fd in fds)
            yield Orphan(answer["index"], answer["id"], client, server, said)

    def go_on_with(self, pair: Pair, orphan: Orphan) -> None:
        """The pair, with the orphan's sockets, id and a slot, is the orphan from here on.

        What it carried before is added to its counts.

        Raises:
            KeeperError: the keeper does not answer.
        """
        words, at = self._window.words, pair.slot * self._window.WORDS
        words[at + table.ID] = pair.id
        # From here on the program stores the same here, with every packet.
        record = Splice.from_buffer_copy(self._memory, orphan.index * SPLICE_BYTES)
        for direction in Direction:
            words[at + table.REDIRECTED[direction]] = record.way[direction].bytes
            words[at + table.REDIRECTED_PACKETS[direction]] = record.way[direction].packets
        self._keeper.ask("adopted", index=orphan.index, slot=self._window.first_slot + pair.slot)
        self._take(pair, orphan.index, is_mute=True)
        self._look(pair)

    def _obstacle(self, pair: Pair) -> PairReason | None:
        if pair.slot < 0:
            return PairReason.MAP_FULL
        up, down = pair.up, pair.down
        if up.phase is not Phase.OPEN or down.phase is not Phase.OPEN:
            return PairReason.HALF_CLOSED
        if up.end_seen or down.end_seen:
            return PairReason.HALF_CLOSED
        if up.pending is not None or down.pending is not None:
            return PairReason.UNREAD_BYTES
        assert pair.server is not None
        for sock in (pair.client, pair.server):
            if sock.family == socket.AF_UNIX:
                return PairReason.UNIX_SOCKET
            if rest(sock).state != TCP_ESTABLISHED:
                return PairReason.HALF_CLOSED
        return None

    @staticmethod
    def _is_at_rest(pair: Pair) -> bool:
        """Whether it is worth asking; `control` looks again."""
        assert pair.server is not None
        for sock, flow in ((pair.client, pair.up), (pair.server, pair.down)):
            now = rest(sock)
            if now.unsent_bytes or now.bytes_received != flow.read_bytes:
                return False
        return True

    @staticmethod
    def _may_hold(pair: Pair, tries: _Tries, now_s: float) -> bool:
        """Whether to make a pair rest that does not by itself."""
        if tries.holds >= len(_PAUSES_S) or now_s < tries.next_hold_s:
            return False
        # Where bytes come in bulk, waiting for rest is in vain, and a lost packet comes again soon.
        is_bulk = pair.up.bulk or pair.down.bulk
        if tries.looks <= (1 if is_bulk else _FREE_LOOKS):
            return False
        if pair.up.blocked or pair.down.blocked:
            return False  # a reader is slow: no short hold would change that
        tries.holds += 1
        return True

    def _take(self, pair: Pair, index: int, *, is_mute: bool) -> None:
        pair.state = _Spliced(index, is_mute=is_mute)
        pair.kind = DatapathKind.SPLICE
        pair.datapath = self
        self._by_index[index] = pair
        pair.client_mask = pair.server_mask = EPOLLET
        for fd in (pair.client_fd, pair.server_fd):
            self._loop.redirect(fd, self.ready)
            self._loop.change(fd, EPOLLET)

    def ready(self, pair: Pair, fd: int, mask: int) -> None:
        """Our sockets are told nothing any more, but for a reset right before the pair began.

        Other errors are their own: a FIN that they may not send, say, is given up after a while.
        """
        if not mask & EPOLLERR:
            return
        sock = pair.client if fd == pair.client_fd else pair.server
        assert sock is not None
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET:
            side = CloseReason.CLIENT_RESET if fd == pair.client_fd else CloseReason.SERVER_RESET
            self._host.broken(pair, side)

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """What was copied before, and what the two ends have said since; nothing waits here."""
        at = pair.slot * self._window.WORDS
        spliced = self._window.words[at + table.REDIRECTED[flow.direction]]
        packets = self._window.words[at + table.REDIRECTED_PACKETS[flow.direction]]
        return flow.carried_bytes + spliced, flow.carried_packets + packets, 0

    def trips(self, pair: Pair) -> int:
        """Never: nothing waits here."""
        return 0

    def active_s(self, pair: Pair) -> float:
        """When a packet last went through."""
        at = pair.slot * self._window.WORDS
        seen_ns = max(self._window.words[at + table.LAST_NS[d]] for d in Direction)
        return max(pair.active_s, seen_ns / 1e9)

    def leave(self, pair: Pair) -> None:
        """Let go of the pair: silently if its ends have ended it, else our sockets reset it."""
        state = pair.state
        assert isinstance(state, _Spliced)
        record = self._record(pair)
        ended = all(record.way[d].fin_acked for d in Direction)
        del self._by_index[state.index]
        pair.state = None
        try:
            fds = [pair.client_fd, pair.server_fd]
            do = "leave" if ended or record.reset in (1, 2) else "reset"
            self._keeper.ask(do, fds, index=state.index)
        except KeeperError:
            # Later, then: from that moment on whoever still speaks gets the kernel's RST.
            self._loop.after(_KEEPER_PAUSE_S, lambda: self.forget(state.index))

    def forget(self, index: int) -> None:
        """Let go of one that nobody here can speak for: its peers' next packets get a RST."""
        try:
            self._keeper.ask("abort", index=index)
        except KeeperError:
            self._loop.after(_KEEPER_PAUSE_S, lambda: self.forget(index))

    def _record(self, pair: Pair) -> Splice:
        assert isinstance(pair.state, _Spliced)
        return Splice.from_buffer_copy(self._memory, pair.state.index * SPLICE_BYTES)

    def _rung(self, _owner: object, _fd: int, _mask: int) -> None:
        for data in self._ring.records():
            event = SpliceEvent.from_buffer_copy(data)
            pair = self._by_index.get(event.index)
            if pair is not None and pair.id == event.id:
                self._look(pair)

    def _look(self, pair: Pair) -> None:
        """Do what is due after the tail's end, a FIN, its acknowledgement or a reset."""
        record = self._record(pair)
        state = pair.state
        assert isinstance(state, _Spliced)
        if not state.is_mute and not any(way.tail_open for way in record.way):
            fds = [pair.client_fd, pair.server_fd]
            # Without an answer it goes on all the same, as long as we live.
            with contextlib.suppress(KeeperError):
                state.is_mute = bool(self._keeper.ask("mute", fds, index=state.index).get("mute"))
        for flow in (pair.up, pair.down):
            way = record.way[flow.direction]
            if way.fin and flow.phase is Phase.OPEN:
                self._host.fin_seen(pair, flow)
            if way.fin_acked and flow.phase is Phase.DRAINING:
                self._host.delivered(pair, flow)
                if pair.datapath is not self:
                    return
        if record.reset:
            self._host.broken(pair, _RESET_BY[record.reset])

    def close(self) -> None:
        """Unmap the records and the ring."""
        self._ring.close()
        self._memory.close()
