"""The splice datapath: the two ends talk TCP end to end, we rewrite the packets' numbers.

bpf/splice.c does that; splice_keeper.py begins and ends it. This is the worker's half: it has a
pair begin, copies the last bytes that had come before, and follows what the programs say of its
end.

A pair begins at whatever moment. Bytes that had come to our sockets by then are still ours to read
and to write; what comes later is in nobody's queue here, and must not be read.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.connection import Phase
from pyforwarder.core.keepalive import OFF
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason, error_of, failure
from pyforwarder.datapath.copying import BULK_READ_BYTES, CopyDatapath
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairRecord
from pyforwarder.datapath.ebpf.ringbuf import RingBuffer
from pyforwarder.datapath.splice.abi import (
    MOST_AGAIN,
    SPLICE_BYTES,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceEvent,
    SpliceState,
)
from pyforwarder.datapath.splice.keeper import splice_memory
from pyforwarder.datapath.splice.maps import ring_bytes, used_indexes
from pyforwarder.datapath.splice.question import Question
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, received
from pyforwarder.errors import DatapathError
from pyforwarder.runtime.loop import EPOLLERR, EPOLLET, EPOLLIN, EPOLLOUT, Timed
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.datapath.splice.question import Then

# socket(7) has not got it yet: which buffers the kernel leaves as they are, since Linux 5.14.
_SO_BUF_LOCK: Final = 72
_SOCK_RCVBUF_LOCK: Final = 2
# An acknowledgement that came at the very moment at which a pair began has told nobody that its
# tail has come; so it is looked after such pairs so long afterwards, then twice as long, and so on.
_LOOK_S: Final = 1.0
# A program that lets a pair begin is done in microseconds, if it is not interrupted.
_BEGINNING_S: Final = 0.5
_BEGINNING_LOOK_S: Final = 0.001
# Pairs that the keeper is asked for at the same time. It does one after the other, and they stand
# still meanwhile; fewer would wait for a turn of our loop in between.
MOST_QUESTIONS: Final = 8
# A keeper that has not heard by then whose pair it is from now on, sees nobody idle.
_ADOPTED_S: Final = 10.0
_RESET_BY: Final = {
    ResetBy.CLIENT: CloseReason.CLIENT_RESET,
    ResetBy.SERVER: CloseReason.SERVER_RESET,
    ResetBy.NO_ROUTE: CloseReason.NO_ROUTE,
    ResetBy.CLIENT_TIMEOUT: CloseReason.CLIENT_TIMEOUT,
    ResetBy.SERVER_TIMEOUT: CloseReason.SERVER_TIMEOUT,
    ResetBy.MOVED: CloseReason.MOVED,
}
# A peer whose packets are too long for the interface in front of them, and that has been told so
# again and again meanwhile, does not listen: its pair is reset, or it would hang.
_NARROW_S: Final = 15.0
# It is told at most so often: each time is a packet of ours, and a question to the keeper.
_NARROW_PAUSE_S: Final = 1.0
# Of the pairs whose end the keeper had no room to be told of, so many are told at once.
_ENDS_IN_A_TURN: Final = 8
# Who is about to end waits so long without an answer of the keeper, and so long at most.
_SILENT_S: Final = 1.0
_LAST_ENDS_S: Final = 3.0


class _Expected:
    """A pair that is to begin before long."""

    __slots__ = ("locks",)

    def __init__(self, locks: list[tuple[_socket.socket, int]]) -> None:
        self.locks = locks  # what was locked before of the sockets' buffers


class _Spliced:
    """A pair's place among the splices."""

    __slots__ = (
        "asks_mute",
        "end_told",
        "index",
        "is_mute",
        "left_bytes",
        "look_s",
        "narrow",
        "narrow_told_s",
        "pause_s",
        "tells_narrow",
    )

    def __init__(self, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        self.index = index
        self.left_bytes = left_bytes  # to read, for each direction: they came before it began
        self.is_mute = is_mute  # closing its sockets says nothing to anybody
        self.asks_mute = False  # the keeper is asked for that
        self.end_told = False  # the keeper is told that the pair has ended
        self.tells_narrow = False  # the keeper is asked to tell its peers
        self.pause_s = _LOOK_S
        self.look_s = time.monotonic() + _LOOK_S
        # For each direction whose packets were too long: the bytes that had passed, and since when.
        self.narrow: dict[Direction, tuple[int, float]] = {}
        self.narrow_told_s = -_NARROW_PAUSE_S  # when their sender was told last


class _Adoption(Timed):
    """A pair that the keeper is told to be this worker's, until it has heard that."""

    __slots__ = ("_overdue", "pair", "state")

    def __init__(
        self, pair: Pair, state: _Spliced, overdue: Callable[[Pair, _Spliced], None]
    ) -> None:
        Timed.__init__(self)
        self._overdue = overdue
        self.pair = pair
        self.state = state

    def expired(self) -> None:
        """It has not heard it."""
        self._overdue(self.pair, self.state)


@dataclass(frozen=True, slots=True)
class Orphan:
    """A spliced pair whose worker is gone: sockets in their place, and what is known of it."""

    index: int
    id: int
    client: socket.socket
    server: socket.socket
    record: PairRecord | None  # what `show` said of it


def _orphan_of(answer: dict[str, Any], fds: list[int]) -> Orphan:
    """The pair that the keeper gives, with the sockets that it has sent, which are taken.

    Raises:
        DatapathError: there was no descriptor left for one of them.
    """
    if len(fds) != 2:
        raise DatapathError("take in a spliced pair", errno.EMFILE)
    said = table.inherited(bytes.fromhex(answer["record"]), answer["id"])
    client, server = (socket.socket(fileno=fds.pop(0)) for _ in range(2))
    return Orphan(answer["index"], answer["id"], client, server, said)


class SpliceDatapath:
    """Pairs that are one TCP connection from end to end, for one worker."""

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
        """Work on inherited maps, and on what the keeper does for us."""
        self._host = host
        self._loop = host.loop
        self._keeper = keeper
        self._window = window
        self._copying = CopyDatapath(host)
        self._memory = splice_memory(maps)
        self._ring = RingBuffer(maps.ring_fds[worker], ring_bytes(maps.slots))
        self._by_index: dict[int, Pair] = {}
        self._with_tail: dict[int, Pair] = {}  # of these: not mute when last looked at
        self._is_looking = False  # a timer is set
        self._questions: dict[Question, None] = {}  # the oldest first
        self.adopts_later = False  # who adopts has a timer set (see `adopt`)
        # Pairs whose end the keeper has still to be told of, the oldest first, and what follows.
        self._ends: dict[Pair, Callable[[Pair], None]] = {}
        # Packets of pairs that begin from now on may come by whatever interface.
        self.takes_any_interface = False
        self.keepalive = OFF  # of pairs that begin from now on
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
        """Take the pair over, and wait until that is done: for who serves nobody else.

        UNREAD_BYTES, NO_KEEPER: a later moment may be better.
        """
        reasons: list[PairReason | None] = []
        reason = self.ask(pair, lambda _, reason: reasons.append(reason))
        if reason is not None:
            return reason
        self.finish_questions()
        return reasons[0]

    def _request(self, pair: Pair) -> tuple[list[int], dict[str, object]]:
        """What `join` is told: descriptors and fields; right before it is."""
        pair.is_shared = True
        self._acknowledge(pair)
        # The program counts in the record only while it bears this number.
        self._window.words[pair.slot * self._window.WORDS + table.ID] = pair.id
        return [pair.client_fd, pair.server_fd], {
            "id": pair.id,
            "slot": self._window.first_slot + pair.slot,
            "pending": [len(flow.pending or b"") for flow in (pair.up, pair.down)],
            "any_interface": int(self.takes_any_interface),
            "keepalive": self.keepalive,
        }

    def _conclude(self, pair: Pair, answer: dict[str, Any]) -> PairReason | None:
        """Do what the keeper's answer says, or what has been found out without it."""
        if "refused" in answer:
            return PairReason(answer["refused"])
        if "error" in answer:
            # How far it came is not known, so nobody may go on with these sockets. If it has begun
            # only the keeper can have them say so.
            index, begun = self._find(pair), self._look_once(pair)
            if begun is not None and "index" in begun:
                self._take(pair, begun["index"], begun["unread"], is_mute=False)
            elif index is not None:
                self.forget(index, pair.id)
            self._host.broken(pair, CloseReason.INTERNAL)
            return PairReason.REFUSED_BY_KERNEL
        if answer["busy"]:
            return PairReason.UNREAD_BYTES
        self._take(pair, answer["index"], answer["unread"], is_mute=answer["mute"])
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                break
        return None

    def _look_once(self, pair: Pair) -> dict[str, Any] | None:
        """What the keeper would have answered: the pair has begun by now, or will not any more.

        None: a program is running in this very moment.
        """
        index = self._find(pair)
        if index is None:
            return {"refused": int(PairReason.NO_KEEPER)}
        record = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
        if record.state in (SpliceState.FREE, SpliceState.ARMED):
            return {"refused": int(PairReason.NO_KEEPER)}
        if record.state == SpliceState.ACTIVE:
            unread = [int(way.unread) for way in record.way]
            return {"busy": 0, "index": index, "unread": unread, "mute": False}
        return None

    def _find(self, pair: Pair) -> int | None:
        """The place that a keeper has given to the pair, whether it has begun there or not."""
        slot = self._window.first_slot + pair.slot
        for index in used_indexes(self._memory):
            found = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
            if (found.id, found.slot) == (pair.id, slot):
                return index
        return None

    # Asking without waiting

    def teach(self, pair: Pair) -> None:
        """Let the keeper see how the pair's server is reached; nobody waits for what it says."""
        if not self._keeper.is_over:
            pair.is_shared = True
            self._keeper.ask_now("learn", [pair.client_fd, pair.server_fd])

    @property
    def is_busy(self) -> bool:
        """The keeper is asked for as many pairs at once as it may be."""
        return len(self._questions) >= MOST_QUESTIONS

    @property
    def questions(self) -> int:
        """For how many pairs the keeper is asked; each may be spliced before long."""
        return len(self._questions)

    @property
    def unsettled(self) -> int:
        """How many requests the keeper has still to hear of, or to answer."""
        return self._keeper.unsettled + len(self._ends)

    def ask(self, pair: Pair, then: Then) -> PairReason | None:
        """`join` of a pair that is copied, without waiting for the keeper.

        None: it stands still, and `then` is called with what `join` would have said, within
        `KeeperAsker.longest_s`; the pair may have ended by then. Else what `join` would have said
        at once, and nothing has changed. Not while this `is_busy`.
        """
        obstacle = self._obstacle(pair)
        if obstacle is None:
            before = pair.datapath
            assert isinstance(before, CopyDatapath)
            fds, fields = self._request(pair)
            asked = self._keeper.ask_now("join", fds, **fields)
            if asked is not None:
                question = Question(self._loop, pair, before, asked, then, self._overdue)
                asked.then = partial(self._answered, question)
                self._questions[question] = None
                # By a clock that is later than the question; the loop's is that of its turn.
                now_s = time.monotonic()
                self._loop.deadlines.start(question, self._keeper.longest_s, now_s)
                return None
            obstacle = PairReason.NO_KEEPER
        if obstacle is not PairReason.UNREAD_BYTES:
            self._expect_no_more(pair)
        return obstacle

    def _answered(self, question: Question, answer: dict[str, Any] | None, _fds: list[int]) -> None:
        if answer is None:
            # A keeper has died over it, and what it has done stands in the records.
            self._look_at(question)
        else:
            if "late" in answer:
                answer = {"refused": int(PairReason.NO_KEEPER)}
            self._end_question(question, answer)

    def _overdue(self, question: Question) -> None:
        """The keeper has not answered: what has become of the pair stands in its record."""
        self._keeper.hear()  # the answer may be here, if we are late ourselves
        if question in self._questions:
            self._keeper.give_up(question.asked)
            self._look_at(question)

    def _look_at(self, question: Question) -> None:
        """Neither a keeper nor a program will begin the pair any more: has one done so?"""
        pair = question.pair
        answer = self._look_once(pair) if pair is not None else {"error": "none"}
        if answer is None:
            now_s = time.monotonic()
            question.looks += 1
            if question.looks * _BEGINNING_LOOK_S < scaled_s(_BEGINNING_S):
                self._loop.deadlines.start(question, _BEGINNING_LOOK_S, now_s)
                return
            answer = {"error": "none"}
        self._end_question(question, answer)

    def _end_question(self, question: Question, answer: dict[str, Any]) -> None:
        del self._questions[question]
        self._loop.deadlines.stop(question)
        pair = question.pair
        if pair is None:
            if "index" in answer:
                self.forget(answer["index"], question.id)
            return
        reason: PairReason | None = PairReason.NO_KEEPER
        try:
            question.release(pair)
            reason = self._conclude(pair, answer)
            if pair.datapath is self:
                self._look(pair)  # what the programs said meanwhile was nobody's
            elif pair.datapath is not None:
                question.go_on(pair)
                if reason is not PairReason.UNREAD_BYTES:
                    self._expect_no_more(pair)
            if question.ends_with is not None and pair.datapath is not None:
                self._host.broken(pair, question.ends_with)
        except Exception as error:
            self._loop.on_error(pair, error)
        question.then(pair, reason)

    def finish_questions(self) -> None:
        """Wait until none is open: who calls it is about to end, or to give its pairs away."""
        while self._questions:
            question = next(iter(self._questions))
            wait_s = question.due_s - time.monotonic()
            if wait_s <= 0:
                self._overdue(question)
                time.sleep(_BEGINNING_LOOK_S)
            elif self._keeper.is_over:
                time.sleep(min(wait_s, _BEGINNING_LOOK_S))
            else:
                self._keeper.wait_until(partial(self._is_known, question), wait_s)

    def _is_known(self, question: Question) -> bool:
        return question not in self._questions

    @staticmethod
    def _acknowledge(pair: Pair) -> None:
        """Have TCP send what it has put off: such an acknowledgement would never be sent."""
        assert pair.server is not None
        for sock in (pair.client, pair.server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def adopt(
        self,
        take: Callable[[Orphan], None],
        done: Callable[[], None],
        later: Callable[[], None] = lambda: None,
    ) -> None:
        """Have `take` called with each spliced pair that has lost its worker and is ours now.

        Then `done`, once; both by the loop, or while the keeper's answers are waited for. Each must
        be given to `go_on_with` or closed, its sockets are the callee's. Before `done`, `later` is
        called if there are some that cannot be had yet, as their old sockets are still there: ask
        again in a while.
        """

        def heard(answer: dict[str, Any] | None, fds: list[int]) -> None:
            if answer is not None and "more" not in answer:
                if "index" not in answer:
                    if "later" in answer:
                        later()
                    done()
                    return
                try:
                    take(_orphan_of(answer, fds))
                except Exception as error:
                    self._loop.on_error(take, error)
                    if answer["index"] not in self._by_index:
                        self.forget(answer["index"], answer["id"])  # it costs this pair alone
            ask()

        def ask() -> None:
            # Behind what was said of the one before: it is not given to us once more.
            if not self._keeper.tell("adopt", heard):
                done()

        ask()

    @staticmethod
    def peek(pair: Pair) -> tuple[int, list[int], bool]:
        """Its index, the bytes that are left to be read in each direction, and if it is mute.

        With the pair's `pending` that is all that another daemon has to know.
        """
        state = pair.state
        assert isinstance(state, _Spliced)
        return state.index, state.left_bytes, state.is_mute

    def let_go(self, pair: Pair) -> None:
        """The pair is another daemon's from here on, and goes on meanwhile."""
        state = pair.state
        assert isinstance(state, _Spliced)
        self._ends.pop(pair, None)
        del self._by_index[state.index]
        pair.state = None

    def take_over(
        self,
        index: int,
        client: socket.socket,
        server: socket.socket,
        then: Callable[[Orphan | None], None],
    ) -> bool:
        """Go on with a pair that another daemon has let go of, with the sockets that it has sent.

        `then` gets the orphan, or None: the pair is not there any more. The sockets stay the
        caller's until then. False: the keeper cannot be asked just now.
        """

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                if not self.take_over(index, client, server, then):
                    then(None)
            elif "index" not in answer:
                then(None)
            else:
                said = table.inherited(bytes.fromhex(answer["record"]), answer["id"])
                then(Orphan(index, answer["id"], client, server, said))

        fds = [client.fileno(), server.fileno()]
        return self._keeper.tell("take_over", heard, fds, index=index)

    def go_on_with(
        self,
        pair: Pair,
        orphan: Orphan,
        *,
        left_bytes: Sequence[int] = (0, 0),
        is_mute: bool = True,
    ) -> None:
        """The pair, with the orphan's sockets, id and a slot, is the orphan from here on.

        What it carried before is added to its counts. `left_bytes` are still to be read, and
        `pending` to be written; with such sockets that are not mute, see `let_go`.
        """
        words, at = self._window.words, pair.slot * self._window.WORDS
        words[at + table.ID] = pair.id
        # From here on the program stores the same here, with every packet.
        record = Splice.from_buffer_copy(self._memory, orphan.index * SPLICE_BYTES)
        for direction in Direction:
            words[at + table.REDIRECTED[direction]] = _shown_bytes(record.way[direction])
            words[at + table.REDIRECTED_PACKETS[direction]] = record.way[direction].packets
        self._take(pair, orphan.index, list(left_bytes), is_mute=is_mute)
        state = pair.state
        assert isinstance(state, _Spliced)
        adoption = _Adoption(pair, state, self._check_adopted)
        self._loop.deadlines.start(adoption, scaled_s(_ADOPTED_S), time.monotonic())
        self._say_adopted(adoption)
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                return
        self._look(pair)

    def _say_adopted(self, adoption: _Adoption) -> None:
        """Have what is carried counted in this pair's slot. Meanwhile the pair goes on."""
        pair, state = adoption.pair, adoption.state

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            is_there = pair.datapath is self and pair.state is state
            if is_there and answer is None:
                self._say_adopted(adoption)
                return
            self._loop.deadlines.stop(adoption)
            if is_there and answer is not None and "error" in answer:
                self._host.broken(pair, CloseReason.INTERNAL)  # it is not ours, or no more

        slot = self._window.first_slot + pair.slot
        self._keeper.tell("adopted", heard, index=state.index, id=pair.id, slot=slot)

    def _check_adopted(self, pair: Pair, state: _Spliced) -> None:
        if pair.datapath is self and pair.state is state:
            # Nobody would see it idle.
            self._host.broken(pair, CloseReason.INTERNAL)

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

    def _take(self, pair: Pair, index: int, left_bytes: list[int], *, is_mute: bool) -> None:
        pair.state = _Spliced(index, left_bytes, is_mute=is_mute)
        if not is_mute:
            self._with_tail[index] = pair
            self._look_later()
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
        """Copy what had come before the pair began, and no byte more; False: the pair has ended."""
        state = pair.state
        assert isinstance(state, _Spliced)
        while flow.pending is not None or state.left_bytes[flow.direction]:
            if flow.pending is None:
                left_bytes = state.left_bytes[flow.direction]
                error = 0
                try:
                    flow.pending = os.read(flow.source_fd, min(left_bytes, BULK_READ_BYTES))
                except OSError as raised:
                    flow.pending, error = b"", raised.errno or 0
                if not flow.pending:
                    # A reset has emptied its queue.
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
        """Our sockets are told nothing any more, but of room for what is left, and of errors."""
        outward = pair.down if fd == pair.client_fd else pair.up
        if mask & EPOLLERR:
            error = error_of(pair, fd)
            state = pair.state
            assert isinstance(state, _Spliced)
            # A reset right before the pair began; or nobody has taken the tail, or has ever told
            # our socket so. It is gone, and its port would be another's.
            way = self._record(pair).way[1 - outward.direction]
            if error == errno.ECONNRESET or (error and (way.tail_open or not state.is_mute)):
                self._fail(pair, fd, error)
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
        """When a byte last went through; packets without one (keepalives) do not count."""
        at = pair.slot * self._window.WORDS
        seen_ns = max(self._window.words[at + table.LAST_NS[d]] for d in Direction)
        return max(pair.active_s, seen_ns / 1e9)

    def leave(self, pair: Pair) -> None:
        """Let go of the pair: silently if its ends have ended it, else our sockets reset it.

        Also after a peer's own reset: whether the other end has believed that nobody knows, and
        what we do not count any more must not go on.
        """
        state = pair.state
        assert isinstance(state, _Spliced)
        self._ends.pop(pair, None)
        if not state.end_told and not self._tell_end(pair, state):
            # Nobody has waited for room: from that moment on a peer that still speaks gets the
            # kernel's RST.
            self.forget(state.index, pair.id)
        del self._by_index[state.index]
        pair.state = None

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Tell the keeper that the pair ends, with our sockets; `leave` is to follow at once.

        Only they can tell a peer that listens in silence. False: too many such wait to be told.
        The pair stays as it is, and keeps its sockets, until it is its turn; `then` is called with
        it, for `leave`.
        """
        state = pair.state
        assert isinstance(state, _Spliced)
        if not self._ends and self._may_go(pair, state):
            return True
        self._ends[pair] = then
        self._keeper.when_there_is_room(self._end_some)
        return False

    def _may_go(self, pair: Pair, state: _Spliced) -> bool:
        """The keeper is told of the end; or it cannot be, however long the pair waits."""
        return self._tell_end(pair, state) or not self._keeper.lacks_room

    def _end_some(self) -> bool:
        """There may be room for the ends that wait; whether any is left."""
        told = 0
        while self._ends and (told < _ENDS_IN_A_TURN or self._keeper.is_over):
            pair = next(iter(self._ends))
            state = pair.state
            assert isinstance(state, _Spliced)
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
        """Wait until the keeper has heard of all that has ended, while it says that it hears.

        For who is about to end, or to give its pairs away. Whether it has.
        """
        return self._keeper.finish_while_heard(scaled_s(_SILENT_S), scaled_s(_LAST_ENDS_S))

    def _tell_end(self, pair: Pair, state: _Spliced) -> bool:
        ended = all(way.fin_acked for way in self._record(pair).way)
        index, pair_id = state.index, pair.id

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, pair_id)

        fds = [pair.client_fd, pair.server_fd]
        do = "leave" if ended else "reset"
        # Our sockets may be closed from then on: the message has them, wherever it is.
        state.end_told = self._keeper.tell(do, heard, fds, index=index, id=pair_id)
        return state.end_told

    def forget(self, index: int, pair_id: int) -> None:
        """Let go of one that nobody here can speak for: its peers' next packets get a RST."""

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, pair_id)

        self._keeper.tell("abort", heard, index=index, id=pair_id)

    def _record(self, pair: Pair) -> Splice:
        assert isinstance(pair.state, _Spliced)
        return Splice.from_buffer_copy(self._memory, pair.state.index * SPLICE_BYTES)

    def _rung(self, _owner: object, _fd: int, _mask: int) -> None:
        for data in self._ring.records():
            event = SpliceEvent.from_buffer_copy(data)
            pair = self._by_index.get(event.index)
            if pair is not None and pair.id == event.id:
                try:
                    self._look(pair)
                except Exception as error:
                    # The ring is everybody's: a fault costs the pair it happened to.
                    self._loop.on_error(pair, error)

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
            self._host.broken(pair, _RESET_BY[ResetBy(record.reset)])
            return
        if record.state == SpliceState.RESET:
            # This host has reset one end in the name of our socket: a rule of its firewall.
            self._host.broken(pair, CloseReason.INTERNAL)
            return
        if any(way.narrow_mtu for way in record.way):
            self._tell_of_narrow_interface(pair, state, record)

    def _tell_of_narrow_interface(self, pair: Pair, state: _Spliced, record: Splice) -> None:
        """A peer's packet was too long for our own interface, and is lost: say so, as a router."""
        now_s = time.monotonic()
        if now_s - state.narrow_told_s < _NARROW_PAUSE_S:
            # Until then the program does not ring again, however many such packets come.
            self._loop.after(_NARROW_PAUSE_S, lambda: self._look_again(pair, state))
            return
        state.narrow_told_s = now_s
        for direction in Direction:
            way = record.way[direction]
            if not way.narrow_mtu:
                continue
            passed_bytes, since_s = state.narrow.get(direction, (-1, now_s))
            if way.bytes != passed_bytes:
                state.narrow[direction] = way.bytes, now_s
            elif now_s - since_s >= _NARROW_S:
                self._host.broken(pair, CloseReason.INTERNAL)
                return
        if state.tells_narrow:
            return

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            state.tells_narrow = False
            if answer is None:  # the next such packet would not ring
                self._look_again(pair, state)

        state.tells_narrow = self._keeper.tell("narrow", heard, index=state.index, id=pair.id)

    def _look_again(self, pair: Pair, state: _Spliced) -> None:
        if pair.datapath is self and pair.state is state:
            self._look(pair)

    def _mute(self, pair: Pair, state: _Spliced) -> bool:
        """If no tail is left, closing our sockets says nothing, so that the pair outlives us.

        Without an answer it goes on all the same, as long as we live. False: the keeper cannot be
        asked just now.
        """
        if state.asks_mute:
            return True

        def heard(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            state.asks_mute = False
            state.is_mute = answer is not None and bool(answer.get("mute"))

        fds = [pair.client_fd, pair.server_fd]
        asked = self._keeper.ask_now("mute", fds, index=state.index, id=pair.id)
        if asked is not None:
            asked.then = heard
            state.asks_mute = True
        return state.asks_mute

    def _look_after_tails(self) -> None:
        """Once a second, as long as there is a pair whose sockets are not mute."""
        now_s = time.monotonic()
        self._is_looking = False
        for index, pair in list(self._with_tail.items()):
            state = pair.state
            if not isinstance(state, _Spliced) or state.index != index or state.is_mute:
                del self._with_tail[index]
            elif now_s >= state.look_s and self._mute(pair, state):
                state.pause_s *= 2
                state.look_s = now_s + state.pause_s
        self._look_later()

    def _look_later(self) -> None:
        if self._with_tail and not self._is_looking:
            self._is_looking = True
            self._loop.after(_LOOK_S, self._look_after_tails)

    def close(self) -> None:
        """Unmap the records and the ring; nothing is asked any more."""
        self._keeper.close()
        self._ring.close()
        self._memory.close()


def _shown_bytes(way: SpliceDirection) -> int:
    """What a direction has carried, as the programs say it (`shown_bytes` in splice_valid.h)."""
    return max(int(way.bytes), int(way.again) - MOST_AGAIN)
