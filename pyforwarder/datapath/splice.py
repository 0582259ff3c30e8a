"""The splice datapath: the two ends talk TCP end to end, we rewrite the packets' numbers.

bpf/splice.c does that; splice_keeper.py begins and ends it. This is the worker's half: it brings a
pair to the moment at which it can begin, and follows what the programs say of its end.

A pair begins when both sockets are at rest: read empty, everything acknowledged. First that is only
hoped for (a client that waits for its answer leaves both at rest). Where bytes never stop, the pair
is held for some milliseconds: what comes is dropped, and comes again, while the last bytes are
copied. If that is not enough, the pair goes on as it was, copied, and nothing has changed.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.connection import Phase
from pyforwarder.datapath import table
from pyforwarder.datapath.abi import DatapathKind, Direction
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ringbuf import RingBuffer
from pyforwarder.datapath.splice_abi import SPLICE_BYTES, Splice, SpliceEvent
from pyforwarder.datapath.splice_keeper import RING_BYTES, KeeperClient, KeeperError, splice_memory
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, rest
from pyforwarder.loop import EPOLLERR, EPOLLET, EPOLLIN
from pyforwarder.reasons import CloseReason

if TYPE_CHECKING:
    from pyforwarder.datapath.splice_keeper import SpliceMaps
    from pyforwarder.datapath.table import PairWindow

# A pair that is not at rest is looked at so often before it is held; for how long; and how long
# after each hold it is left alone, because every hold costs its peers a retransmission. After the
# last, rest is only waited for.
_LOOKS: Final = 2
_HOLD_S: Final = 0.005
_LOOK_AGAIN_S: Final = 0.0002
_PAUSES_S: Final = (0.02, 0.1, 0.5, 5.0)
_RESET_BY: Final = {
    1: CloseReason.CLIENT_RESET,
    2: CloseReason.SERVER_RESET,
    3: CloseReason.INTERNAL,
}


class _Tries:
    """What a pair that is still copied remembers."""

    __slots__ = ("holds", "looks", "next_s")

    def __init__(self) -> None:
        self.looks = 0
        self.holds = 0
        self.next_s = 0.0


class _Spliced:
    """A pair's place among the splices."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


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
        self._copying = CopyDatapath(host)
        self._by_index: dict[int, Pair] = {}
        self._keeper_is_gone = False
        keeper.ask("hello")
        self._loop.watch(self._ring.fd, EPOLLIN, self._rung, None)

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over; UNREAD_BYTES: it was not at rest, a later try may find it so."""
        obstacle = self._obstacle(pair)
        if obstacle is not None:
            return obstacle
        if self._keeper_is_gone:
            return PairReason.NOT_AVAILABLE
        assert pair.server is not None
        hold = False
        if not self._is_at_rest(pair):
            hold = self._may_hold(pair)
            if not hold:
                return PairReason.UNREAD_BYTES
        for sock in (pair.client, pair.server):
            # An acknowledgement that TCP has put off would never be sent.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        fds = [pair.client_fd, pair.server_fd]
        # The program counts in the record only while it bears this number.
        self._window.words[pair.slot * self._window.WORDS + table.ID] = pair.id
        slot = self._window.first_slot + pair.slot
        try:
            answer = self._keeper.ask("join", fds, id=pair.id, slot=slot, hold=hold)
            if "refused" in answer:
                pair.state = None
                return PairReason(answer["refused"])
            if "error" in answer:
                # How far it came is not known, so nobody may go on with these sockets.
                self._host.broken(pair, CloseReason.INTERNAL)
                return PairReason.REFUSED_BY_KERNEL
            if answer["busy"] and not (hold and self._settle(pair, answer["index"], fds)):
                return PairReason.UNREAD_BYTES
        except KeeperError:
            # It may have begun to hold the pair, which nobody will let go any more.
            self._keeper_is_gone = True
            if pair.datapath is not None:
                self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        self._begin(pair, answer["index"])
        return None

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
            if sock.family != socket.AF_INET:
                return PairReason.NOT_ELIGIBLE
            if rest(sock).state != TCP_ESTABLISHED:
                return PairReason.HALF_CLOSED
        return None

    @staticmethod
    def _is_at_rest(pair: Pair) -> bool:
        """Whether it is worth asking; `control` looks again."""
        assert pair.server is not None
        for sock, flow in ((pair.client, pair.up), (pair.server, pair.down)):
            now = rest(sock)
            if now.unacked_packets or now.unsent_bytes or now.bytes_received != flow.read_bytes:
                return False
        return True

    @staticmethod
    def _may_hold(pair: Pair) -> bool:
        """Whether to make a pair rest that does not by itself."""
        if pair.state is None:
            pair.state = _Tries()
        tries = pair.state
        assert isinstance(tries, _Tries)
        tries.looks += 1
        now_s = time.monotonic()
        if tries.looks < _LOOKS or tries.holds >= len(_PAUSES_S) or now_s < tries.next_s:
            return False
        assert pair.server is not None
        if rest(pair.client).unsent_bytes or rest(pair.server).unsent_bytes:
            return False  # a peer is slow: no short hold would change that
        tries.next_s = now_s + _PAUSES_S[tries.holds]
        tries.holds += 1
        return True

    def _settle(self, pair: Pair, index: int, fds: list[int]) -> bool:
        """The pair is held: copy what is left, until it begins; False if it goes on as it was."""
        deadline_s = time.monotonic() + _HOLD_S
        while time.monotonic() < deadline_s:
            for flow in (pair.up, pair.down):
                flow.readable = True
                self._copying.pump(pair, flow)
                if pair.datapath is None:
                    break
            if pair.datapath is None:
                break
            obstacle = self._obstacle(pair)
            if obstacle is None and self._is_at_rest(pair):
                assert pair.server is not None
                for sock in (pair.client, pair.server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                answer = self._keeper.ask("switch", fds, index=index)
                if "error" in answer:
                    self._host.broken(pair, CloseReason.INTERNAL)
                    break
                if not answer["busy"]:
                    return True
            elif obstacle not in (None, PairReason.UNREAD_BYTES):
                break
            # Nothing here tells when a peer has read or acknowledged; it is soon, or not at all.
            time.sleep(_LOOK_AGAIN_S)
        self._keeper.ask("abort", index=index)
        return False

    def _begin(self, pair: Pair, index: int) -> None:
        pair.state = _Spliced(index)
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
            if ended or record.reset in (1, 2):
                self._keeper.ask("leave", index=state.index)
            else:
                fds = [pair.client_fd, pair.server_fd]
                self._keeper.ask("reset", fds, index=state.index)
        except KeeperError:
            return  # it ends with the keeper

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
        """Do what is due after a FIN, its acknowledgement or a reset."""
        record = self._record(pair)
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
