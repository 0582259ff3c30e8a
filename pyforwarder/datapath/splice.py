"""The splice datapath: the two ends talk TCP end to end, we rewrite the packets' numbers.

bpf/splice.c does that; splice_keeper.py begins and ends it. This is the worker's half: it has a
pair begin, copies the last bytes that had come before, and follows what the programs say of its
end.

A pair begins at whatever moment. Bytes that had come to our sockets by then are still ours to read
and to write; what comes later is in nobody's queue here, and must not be read.
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
from pyforwarder.datapath.copying import BULK_READ_BYTES, CopyDatapath
from pyforwarder.datapath.ringbuf import RingBuffer
from pyforwarder.datapath.splice_abi import SPLICE_BYTES, Splice, SpliceEvent
from pyforwarder.datapath.splice_keeper import KeeperClient, KeeperError, splice_memory
from pyforwarder.datapath.splice_maps import RING_BYTES
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, received
from pyforwarder.loop import EPOLLERR, EPOLLET, EPOLLIN, EPOLLOUT
from pyforwarder.reasons import CloseReason

if TYPE_CHECKING:
    import _socket
    from collections.abc import Iterator

    from pyforwarder.datapath.splice_maps import SpliceMaps
    from pyforwarder.datapath.table import PairWindow

# socket(7) has not got it yet: which buffers the kernel leaves as they are, since Linux 5.14.
_SO_BUF_LOCK: Final = 72
_SOCK_RCVBUF_LOCK: Final = 2
# An acknowledgement that came at the very moment at which a pair began has told nobody that its
# tail has come; so it is looked after such pairs so long afterwards, then twice as long, and so on.
_LOOK_S: Final = 1.0
# After a keeper that did not answer, none is asked for so long.
_KEEPER_PAUSE_S: Final = 5.0
_RESET_BY: Final = {
    1: CloseReason.CLIENT_RESET,
    2: CloseReason.SERVER_RESET,
    3: CloseReason.INTERNAL,
}


class _Expected:
    """A pair that is to begin before long."""

    __slots__ = ("locks",)

    def __init__(self, locks: list[tuple[_socket.socket, int]]) -> None:
        self.locks = locks  # what was locked before of the sockets' buffers


class _Spliced:
    """A pair's place among the splices."""

    __slots__ = ("index", "is_mute", "left_bytes", "look_s", "pause_s")

    def __init__(self, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        self.index = index
        self.left_bytes = left_bytes  # to read, for each direction: they came before it began
        self.is_mute = is_mute  # closing its sockets says nothing to anybody
        self.pause_s = _LOOK_S
        self.look_s = time.monotonic() + _LOOK_S


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
        self._copying = CopyDatapath(host)
        self._memory = splice_memory(maps)
        self._ring = RingBuffer(maps.ring_fds[worker], RING_BYTES)
        self._by_index: dict[int, Pair] = {}
        self._with_tail: dict[int, Pair] = {}  # of these: not mute when last looked at
        self._is_looking = False  # a timer is set
        self._keeper_from_s = 0.0  # not asked before
        self._loop.watch(self._ring.fd, EPOLLIN, self._rung, None)

    def expect(self, pair: Pair) -> None:
        """The pair, which is copied now, will be asked for: let its sockets promise no more.

        What a peer has under way to us when a pair begins goes to the other end at once, and is
        lost if that has no room for it. Peers may send what we have receive buffers for, which the
        kernel makes larger and larger as long as we copy.
        """
        assert pair.server is not None
        option = socket.SOL_SOCKET, _SO_BUF_LOCK
        locks = [(sock, sock.getsockopt(*option)) for sock in (pair.client, pair.server)]
        for sock, lock in locks:
            sock.setsockopt(*option, lock | _SOCK_RCVBUF_LOCK)
        pair.state = _Expected(locks)

    @staticmethod
    def _expect_no_more(pair: Pair) -> None:
        """Another datapath gets the pair as it was."""
        if isinstance(pair.state, _Expected):
            for sock, lock in pair.state.locks:
                sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, lock)
        pair.state = None

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over; UNREAD_BYTES: a later moment may be better."""
        obstacle = self._obstacle(pair)
        if obstacle is None:
            obstacle = self._begin(pair)
        # One that has ended meanwhile has no sockets any more.
        if obstacle not in (None, PairReason.UNREAD_BYTES) and pair.datapath is not None:
            self._expect_no_more(pair)
        return obstacle

    def _begin(self, pair: Pair) -> PairReason | None:
        """Have the keeper take the pair."""
        assert pair.server is not None
        fds = [pair.client_fd, pair.server_fd]
        self._acknowledge(pair)
        # The program counts in the record only while it bears this number.
        self._window.words[pair.slot * self._window.WORDS + table.ID] = pair.id
        slot = self._window.first_slot + pair.slot
        pending = [len(flow.pending or b"") for flow in (pair.up, pair.down)]
        try:
            answer = self._keeper.ask("join", fds, id=pair.id, slot=slot, pending=pending)
        except KeeperError:
            self._keeper_from_s = time.monotonic() + _KEEPER_PAUSE_S
            answer = {"error": "none"}
        if "refused" in answer:
            return PairReason(answer["refused"])
        if "error" in answer:
            # How far it came is not known, so nobody may go on with these sockets.
            self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        if answer["busy"]:
            return PairReason.UNREAD_BYTES
        self._take(pair, answer["index"], answer["unread"], is_mute=answer["mute"])
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                break
        return None

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
        self._take(pair, orphan.index, [0, 0], is_mute=True)
        self._look(pair)

    def _obstacle(self, pair: Pair) -> PairReason | None:
        if pair.slot < 0:
            return PairReason.MAP_FULL
        if time.monotonic() < self._keeper_from_s:
            return PairReason.NOT_AVAILABLE
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

    def _take(self, pair: Pair, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        pair.state = _Spliced(index, left_bytes, is_mute=is_mute)
        if not is_mute:
            self._with_tail[index] = pair
            self._look_later()
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
        """Copy what had come before the pair began, and no byte more; False: the pair has ended."""
        state = pair.state
        assert isinstance(state, _Spliced)
        while flow.pending is not None or state.left_bytes[flow.direction]:
            if flow.pending is None:
                left_bytes = state.left_bytes[flow.direction]
                try:
                    flow.pending = os.read(flow.source_fd, min(left_bytes, BULK_READ_BYTES))
                except OSError:
                    flow.pending = b""
                if not flow.pending:
                    # A reset has emptied its queue.
                    return self._fail(pair, flow.source_fd)
                flow.read_bytes += len(flow.pending)
                flow.carried_packets += 1
                state.left_bytes[flow.direction] -= len(flow.pending)
            if not self._copying.write_pending(pair, flow):
                break
        return pair.datapath is self

    def _fail(self, pair: Pair, fd: int) -> bool:
        side = CloseReason.CLIENT_RESET if fd == pair.client_fd else CloseReason.SERVER_RESET
        self._host.broken(pair, side)
        return False

    def ready(self, pair: Pair, fd: int, mask: int) -> None:
        """Our sockets are told nothing any more, but of room for what is left, and of errors."""
        outward = pair.down if fd == pair.client_fd else pair.up
        if mask & EPOLLERR:
            sock = pair.client if fd == pair.client_fd else pair.server
            assert sock is not None
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            # A reset right before the pair began; or nobody has taken the tail. Any other error is
            # the socket's own: a FIN that it may not send, say, is given up after a while.
            way = self._record(pair).way[1 - outward.direction]
            if error == errno.ECONNRESET or (error and way.tail_open):
                self._fail(pair, fd)
                return
        if mask & EPOLLOUT and outward.blocked:
            outward.blocked = False
            self._copy_rest(pair, outward)

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """What was copied before, and what the two ends have said since.

        Nothing waits here for long: at first, what had come before the pair began.
        """
        at = pair.slot * self._window.WORDS
        spliced = self._window.words[at + table.REDIRECTED[flow.direction]]
        packets = self._window.words[at + table.REDIRECTED_PACKETS[flow.direction]]
        state = pair.state
        left_bytes = state.left_bytes[flow.direction] if isinstance(state, _Spliced) else 0
        left_bytes += len(flow.pending or b"")
        return flow.carried_bytes + spliced, flow.carried_packets + packets, left_bytes

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
        ended = all(way.fin_acked for way in record.way)
        # A peer's own reset may have a number that the other does not expect yet.
        ended |= record.reset in (1, 2) and not any(way.tail_open for way in record.way)
        del self._by_index[state.index]
        pair.state = None
        try:
            fds = [pair.client_fd, pair.server_fd]
            self._keeper.ask("leave" if ended else "reset", fds, index=state.index)
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
            self._mute(pair, state)
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

    def _mute(self, pair: Pair, state: _Spliced) -> None:
        """If no tail is left, closing our sockets says nothing, so that the pair outlives us."""
        # Without an answer it goes on all the same, as long as we live.
        with contextlib.suppress(KeeperError):
            answer = self._keeper.ask("mute", [pair.client_fd, pair.server_fd], index=state.index)
            state.is_mute = bool(answer.get("mute"))

    def _look_after_tails(self) -> None:
        """Once a second, as long as there is a pair whose sockets are not mute."""
        now_s = time.monotonic()
        self._is_looking = False
        for index, pair in list(self._with_tail.items()):
            state = pair.state
            if not isinstance(state, _Spliced) or state.index != index or state.is_mute:
                del self._with_tail[index]
            elif now_s >= state.look_s:
                self._mute(pair, state)
                state.pause_s *= 2
                state.look_s = now_s + state.pause_s
        self._look_later()

    def _look_later(self) -> None:
        if self._with_tail and not self._is_looking:
            self._is_looking = True
            self._loop.after(_LOOK_S, self._look_after_tails)

    def close(self) -> None:
        """Unmap the records and the ring."""
        self._ring.close()
        self._memory.close()
