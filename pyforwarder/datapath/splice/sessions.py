"""UDP sessions of the splice datapath, the worker's part: begun, watched, ended.

bpf/splice_udp.h forwards the datagrams, session_keeper.py begins and ends sessions. Until a
direction is *latched*, its datagrams come to our sockets, and are copied. The program latches it as
soon as all of them were copied: it counts itself how many have come, and the pair's record has how
many were copied.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction, PairRecord
from pyforwarder.datapath.splice.keeper_replies import (
    Declined,
    GivenSession,
    Late,
    NoneLeft,
    Opened,
    adopt_session_reply,
    has_failed,
    open_reply,
)
from pyforwarder.datapath.splice.session_abi import (
    NOW,
    SESSION_BYTES,
    SessionDirection,
    SessionRecord,
    SessionState,
)
from pyforwarder.datapath.splice.session_maps import record_of, used_indexes
from pyforwarder.errors import DatapathError
from pyforwarder.runtime.loop import Timed
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.session_maps import SessionMaps
    from pyforwarder.runtime.loop import Loop

# Called with the outcome: the session in the kernel, or why there is none.
WhenOpened: TypeAlias = "Callable[[KernelSession | PairReason], None]"
Counted: TypeAlias = "Callable[[list[Carried]], None]"
# How many were copied is unknown: the program's count never has this value.
_UNKNOWN: Final = (1 << 64) - 1
_DIRECTION: Final = [
    SessionRecord.direction.offset + d * SessionRecord.direction.size // 2 for d in Direction
]
_LATCHED: Final = [at + SessionDirection.latched.offset for at in _DIRECTION]
_PASSED: Final = [at + SessionDirection.passed.offset for at in _DIRECTION]
_LAST_NS: Final = [at + SessionDirection.last_ns.offset for at in _DIRECTION]
_CARRIED: Final = [at + SessionDirection.bytes.offset for at in _DIRECTION]
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")
_TWO_U64: Final = struct.Struct("=QQ")
# After a request without an answer, no session is requested for so long.
_KEEPER_PAUSE_S: Final = 1.0
# How long the keeper's final counts of a session are awaited.
_COUNT_S: Final = 1.0
# Bytes and datagrams, up and down.
Carried = tuple[tuple[int, int], tuple[int, int]]


class KernelSession:
    """A session that the kernel's programs carry."""

    __slots__ = ("behind_s", "copied", "id", "index", "slot")

    def __init__(self, index: int, session_id: int, slot: int) -> None:
        self.index = index
        self.id = session_id
        self.slot = slot  # within the worker's window
        self.copied = [0, 0]  # datagrams that our sockets have received since, and that were copied
        # Since when the program has been waiting for the copied datagrams; 0: it is not.
        self.behind_s = [0.0, 0.0]


class PendingSession:
    """A session while the keeper is asked to begin it."""

    __slots__ = ("id", "slot", "then")

    def __init__(self, session_id: int, slot: int, then: WhenOpened) -> None:
        self.id = session_id
        self.slot = slot
        self.then: WhenOpened | None = then  # None: the session has ended meanwhile


class _Ending(Timed):
    """Sessions that the keeper is asked to end, until their final counts are known."""

    __slots__ = ("_overdue", "carried", "sessions", "then")

    def __init__(
        self,
        sessions: Sequence[KernelSession],
        carried: list[Carried],
        then: Counted,
        overdue: Callable[[_Ending], None],
    ) -> None:
        Timed.__init__(self)
        self._overdue = overdue
        self.sessions = sessions
        self.carried = carried  # counts when they ended here
        self.then: Counted | None = then  # None: it was called

    def expired(self) -> None:
        """The keeper has not answered in time."""
        self._overdue(self)


@dataclass(frozen=True, slots=True)
class SessionOrphan:
    """A session whose worker is gone: a socket to its server, and its record."""

    index: int  # in the kernel; -1: it was copied
    id: int
    server: socket.socket
    client: tuple[str, int]
    local: tuple[str, int]  # the local address that the client uses
    record: PairRecord | None  # what `show` printed for it


def _orphan_of(given: GivenSession, fds: list[int]) -> SessionOrphan:
    """The session in an answer of the keeper, with the socket that came with it, which is removed
    from `fds`.

    Raises:
        DatapathError: the process had no descriptor left for it.
    """
    if len(fds) != 1:
        raise DatapathError("take in a session", errno.EMFILE)
    return SessionOrphan(
        given.index,
        given.id,
        socket.socket(fileno=fds.pop()),
        given.client,
        given.local,
        table.inherited(given.record, given.id),
    )


class SpliceSessions:
    """The sessions of one worker in the kernel."""

    def __init__(
        self, maps: SessionMaps, keeper: KeeperAsker, loop: Loop, *, window: PairWindow
    ) -> None:
        """Use the inherited maps, and the keeper."""
        self._keeper = keeper
        self._loop = loop
        self._window = window
        self._memory = bpf.map_memory(maps.sessions_fd, maps.entries * SESSION_BYTES, write=False)
        self._keeper_from_s = 0.0  # no session is requested before
        self._abandoned = 0  # sessions that ended before the keeper had answered
        self._uncounted: dict[_Ending, None] = {}  # oldest first

    def open(
        self,
        *,
        session_id: int,
        slot: int,
        client: tuple[str, int],
        local: str,
        sockets: tuple[socket.socket, socket.socket],
        any_interface: bool,
        idle_s: float,
        now_s: float,
        then: WhenOpened,
    ) -> PendingSession | PairReason:
        """Ask the keeper to begin a session; `then` is called with it, or why there is none.

        Returns why it is not even asked, or None. After `idle_s` of silence the session is over; if
        no process ends it, it expires by itself. `local` is the local address that the client uses;
        `sockets` are the listener's and the one to the server. The caller keeps them, and must read
        them as before.
        """
        # The kernel may still have the addresses of one that has ended.
        if now_s < self._keeper_from_s or self._abandoned:
            return PairReason.NO_KEEPER
        at = slot * self._window.WORDS64
        # The program compares with these from the beginning.
        self._window.words64[at + table.ID] = session_id
        for direction in Direction:
            self._window.words64[at + table.CONSUMED[direction]] = _UNKNOWN
            self._window.words32[2 * at + table.ARMED[direction]] = 0
        asked = self._keeper.ask_now(
            "open_session",
            [sock.fileno() for sock in sockets],
            id=session_id,
            slot=self._window.first_slot + slot,
            client=client[0],
            client_port=client[1],
            local=local,
            any_interface=int(any_interface),
            idle_s=idle_s,
        )
        if asked is None:
            self._keeper_from_s = now_s + _KEEPER_PAUSE_S
            return PairReason.NO_KEEPER
        pending = PendingSession(session_id, slot, then)
        asked.then = partial(self._opened, pending)
        return pending

    def abandon(self, pending: PendingSession) -> None:
        """The session has ended: if the keeper has begun it, it is ended there, too."""
        if pending.then is not None:
            pending.then = None
            self._abandoned += 1

    def _opened(
        self, pending: PendingSession, answer: dict[str, Any] | None, _fds: list[int]
    ) -> None:
        reply = Late() if answer is None else open_reply(answer)
        index = reply.index if isinstance(reply, Opened) else -1
        if answer is None:
            index = self._look_up(pending)
        then = pending.then
        if then is None:
            self._abandoned -= 1
            if index >= 0:
                self.forget(index, pending.id)
            return
        pending.then = None
        if index >= 0:
            then(KernelSession(index, pending.id, pending.slot))
        elif isinstance(reply, Late):
            self._keeper_from_s = time.monotonic() + _KEEPER_PAUSE_S
            then(PairReason.NO_KEEPER)
        else:
            then(reply.reason if isinstance(reply, Declined) else PairReason.REFUSED_BY_KERNEL)

    def _look_up(self, pending: PendingSession) -> int:
        """Its index if a keeper has begun it, and died after that; else -1: no keeper will begin
        it.
        """
        slot = self._window.first_slot + pending.slot
        for index in used_indexes(self._memory):
            found = record_of(self._memory, index)
            if (found.id, found.slot) == (pending.id, slot):
                return index if found.state == SessionState.ACTIVE else -1
        return -1

    # What the programs have stored

    def is_latched(self, session: KernelSession, direction: int) -> bool:
        """Whether the kernel forwards this direction by itself."""
        at = session.index * SESSION_BYTES + _LATCHED[direction]
        return bool(_U32.unpack_from(self._memory, at)[0])

    def passed(self, session: KernelSession, direction: int) -> int:
        """How many datagrams were passed to our socket before the direction was latched."""
        at = session.index * SESSION_BYTES + _PASSED[direction]
        return int(_U64.unpack_from(self._memory, at)[0])

    def carried(self, session: KernelSession, direction: int) -> tuple[int, int]:
        """Bytes and datagrams that the kernel has forwarded."""
        at = session.index * SESSION_BYTES + _CARRIED[direction]
        carried_bytes, packets = _TWO_U64.unpack_from(self._memory, at)
        return carried_bytes, packets

    def last_s(self, session: KernelSession, direction: int) -> float:
        """When the kernel forwarded the last datagram, up to a second late (monotonic clock)."""
        at = session.index * SESSION_BYTES + _LAST_NS[direction]
        return float(_U64.unpack_from(self._memory, at)[0]) / 1e9

    # What the worker stores for the programs

    def caught_up(self, session: KernelSession, direction: int, passed: int) -> None:
        """All datagrams that were passed to our socket by the time of `passed` were copied."""
        at = session.slot * self._window.WORDS64
        self._window.words64[at + table.CONSUMED[direction]] = passed
        # The keeper unlatches the direction when its route changes.
        self._window.words32[session.slot * self._window.WORDS32 + table.ARMED[direction]] = 0
        session.copied[direction] = max(session.copied[direction], passed)
        session.behind_s[direction] = 0.0

    def latch_now(self, session: KernelSession) -> None:
        """The queue is never empty: let the program latch; datagrams in our sockets may be
        overtaken.
        """
        at = session.slot * self._window.WORDS32
        for direction in Direction:
            self._window.words32[at + table.ARMED[direction]] = NOW

    # The end

    def close(self, sessions: Sequence[KernelSession], then: Counted) -> None:
        """End sessions; `then` is called, once, with what the kernel has forwarded of each.

        There are MOST_CLOSED_AT_ONCE of them at most. The counts are the keeper's; after a second
        without its answer, those of the records.
        """
        ending = _Ending(
            sessions, [self._carried(session) for session in sessions], then, self._count
        )
        self._uncounted[ending] = None
        self._end(ending)
        if self._keeper.is_over:
            self._count(ending)
        else:
            self._loop.deadlines.start(ending, scaled_s(_COUNT_S), time.monotonic())

    def _end(self, ending: _Ending) -> None:
        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self._end(ending)  # it may still exist
                return
            # The final counts: no datagram is being forwarded any more.
            for number, carried in enumerate(answer.get("carried", ())):
                if carried is not None:
                    up, down = carried
                    ending.carried[number] = (up[0], up[1]), (down[0], down[1])
            self._report_end(ending)

        places = [[session.index, session.id] for session in ending.sessions]
        self._keeper.ask("close_sessions", answered, places=places)

    def _count(self, ending: _Ending) -> None:
        """The keeper has not answered: take the counts of the records, if they are still the
        sessions'.
        """
        for number, session in enumerate(ending.sessions):
            if record_of(self._memory, session.index).id == session.id:
                ending.carried[number] = self._carried(session)
        self._report_end(ending)

    def _report_end(self, ending: _Ending) -> None:
        then, ending.then = ending.then, None
        if then is None:
            return
        del self._uncounted[ending]
        self._loop.deadlines.stop(ending)
        try:
            then(ending.carried)
        except Exception as error:
            self._loop.on_error(then, error)

    def _carried(self, session: KernelSession) -> Carried:
        return self.carried(session, Direction.UP), self.carried(session, Direction.DOWN)

    def count_now(self) -> None:
        """Wait for no final counts any more: take those of the records."""
        while self._uncounted:
            self._count(next(iter(self._uncounted)))

    # Adoption

    def adopt(self, take: Callable[[SessionOrphan], None], done: Callable[[], None]) -> None:
        """Adopt sessions: `take` is called with each that has lost its worker and is this worker's
        now.

        Then `done` is called, once. Both are called by the loop, or while the keeper's answers are
        awaited. Each session must be given to `resume` or `forget`; its socket belongs to the
        callee.
        """

        def answered(answer: dict[str, Any] | None, fds: list[int]) -> None:
            if answer is not None:
                reply = adopt_session_reply(answer)
                if isinstance(reply, NoneLeft):
                    done()
                    return
                try:
                    take(_orphan_of(reply, fds))
                except Exception as error:
                    self._loop.on_error(take, error)
                    self.forget(reply.index, reply.id)  # only this session is lost
            ask()

        def ask() -> None:
            if not self._keeper.ask("adopt_session", answered):
                done()

        ask()

    def resume(
        self, orphan: SessionOrphan, slot: int, idle_s: float, lost: Callable[[], None]
    ) -> KernelSession:
        """Continue an orphan as this session, whose slot has its id.

        After `idle_s` of silence it is over, as in `open`. `lost` is called if the keeper does not
        know it any more.
        """
        session = KernelSession(orphan.index, orphan.id, slot)
        at = slot * self._window.WORDS64
        for direction in Direction:
            self._window.words64[at + table.CONSUMED[direction]] = _UNKNOWN
        self._show(session)
        self._confirm_adoption(session, idle_s, lost)
        return session

    def _confirm_adoption(
        self, session: KernelSession, idle_s: float, lost: Callable[[], None]
    ) -> None:
        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if self._window.words64[session.slot * self._window.WORDS64 + table.ID] != session.id:
                return  # it has ended, and another session has the slot
            if answer is None:
                self._confirm_adoption(session, idle_s, lost)
            elif has_failed(answer):
                lost()
            else:
                # From here on the program stores these counts with every datagram.
                self._show(session)

        self._keeper.ask(
            "session_adopted",
            answered,
            index=session.index,
            id=session.id,
            slot=self._window.first_slot + session.slot,
            idle_s=idle_s,
        )

    def _show(self, session: KernelSession) -> None:
        """Write into its slot what the kernel has carried so far."""
        at = session.slot * self._window.WORDS64
        for direction in Direction:
            carried_bytes, packets = self.carried(session, direction)
            self._window.words64[at + table.REDIRECTED[direction]] = carried_bytes
            self._window.words64[at + table.REDIRECTED_PACKETS[direction]] = packets
            self._window.words64[at + table.LAST_NS[direction]] = int(
                self.last_s(session, direction) * 1e9
            )

    def forget(self, index: int, session_id: int) -> None:
        """Release a session that this worker cannot continue."""

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, session_id)

        self._keeper.ask("close_sessions", answered, places=[[index, session_id]])

    def dispose(self) -> None:
        """Unmap the records."""
        self._memory.close()
