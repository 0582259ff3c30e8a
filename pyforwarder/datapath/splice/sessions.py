"""UDP sessions of the splice datapath, the worker's half: begun, looked after, ended.

bpf/splice_udp.h sends the datagrams on, session_keeper.py begins and ends it. Until a direction is
*latched* its datagrams still come to our sockets, and are copied. The program latches it as soon as
it sees that all of them have been: how many came it counts itself, how many were copied stands in
the pair's record.
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

# What has become of it: its place, or why it has none.
Opened: TypeAlias = "Callable[[Place | PairReason], None]"
Counted: TypeAlias = "Callable[[list[Carried]], None]"
# Nothing is known of what was copied: no count of the program's is like it.
_UNKNOWN: Final = (1 << 64) - 1
_WAY: Final = [SessionRecord.way.offset + d * SessionRecord.way.size // 2 for d in Direction]
_LATCHED: Final = [at + SessionDirection.latched.offset for at in _WAY]
_PASSED: Final = [at + SessionDirection.passed.offset for at in _WAY]
_LAST_NS: Final = [at + SessionDirection.last_ns.offset for at in _WAY]
_CARRIED: Final = [at + SessionDirection.bytes.offset for at in _WAY]
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")
_TWO_U64: Final = struct.Struct("=QQ")
# After a keeper that did not answer, none is asked to begin one for so long.
_KEEPER_PAUSE_S: Final = 1.0
# What a session has carried in the end is waited for so long.
_COUNT_S: Final = 1.0
# Bytes and datagrams, up and down.
Carried = tuple[tuple[int, int], tuple[int, int]]


class Place:
    """One session's place among those of the kernel."""

    __slots__ = ("behind_s", "copied", "id", "index", "slot")

    def __init__(self, index: int, session_id: int, slot: int) -> None:
        self.index = index
        self.id = session_id
        self.slot = slot  # within the worker's window
        self.copied = [0, 0]  # datagrams that our sockets got since, and that went on
        # Since when the program waits to know that what it passed was copied; 0: it does not.
        self.behind_s = [0.0, 0.0]


class Opening:
    """A session that the keeper is asked to begin."""

    __slots__ = ("id", "slot", "then")

    def __init__(self, session_id: int, slot: int, then: Opened) -> None:
        self.id = session_id
        self.slot = slot
        self.then: Opened | None = then  # None: it has ended meanwhile


class _Ending(Timed):
    """Sessions that the keeper is asked to end, until it is known what they have carried."""

    __slots__ = ("_overdue", "carried", "places", "then")

    def __init__(
        self,
        places: Sequence[Place],
        carried: list[Carried],
        then: Counted,
        overdue: Callable[[_Ending], None],
    ) -> None:
        Timed.__init__(self)
        self._overdue = overdue
        self.places = places
        self.carried = carried  # when they ended here
        self.then: Counted | None = then  # None: it has been told

    def expired(self) -> None:
        """The keeper has not said it."""
        self._overdue(self)


@dataclass(frozen=True, slots=True)
class SessionOrphan:
    """A session whose worker is gone: a socket to its server, and what is known of it."""

    index: int  # in the kernel; -1: it was copied
    id: int
    server: socket.socket
    client: tuple[str, int]
    local: tuple[str, int]  # the address of ours to which the client speaks
    record: PairRecord | None  # what `show` said of it


def _orphan_of(answer: dict[str, Any], fds: list[int]) -> SessionOrphan:
    """The session that the keeper gives, with the socket that it has sent, which is taken.

    Raises:
        DatapathError: there was no descriptor left for it.
    """
    if len(fds) != 1:
        raise DatapathError("take in a session", errno.EMFILE)
    return SessionOrphan(
        answer["index"],
        answer["id"],
        socket.socket(fileno=fds.pop()),
        (answer["client"], answer["client_port"]),
        (answer["local"], answer["local_port"]),
        table.inherited(bytes.fromhex(answer["record"]), answer["id"]),
    )


class SpliceSessions:
    """The kernel's sessions of one worker."""

    def __init__(
        self, maps: SessionMaps, keeper: KeeperAsker, loop: Loop, *, window: PairWindow
    ) -> None:
        """Work on inherited maps, and on what the keeper does for us."""
        self._keeper = keeper
        self._loop = loop
        self._window = window
        self._memory = bpf.map_memory(maps.sessions_fd, maps.entries * SESSION_BYTES, write=False)
        self._keeper_from_s = 0.0  # not asked before
        self._abandoned = 0  # have ended before it was known whether they had begun
        self._uncounted: dict[_Ending, None] = {}  # the oldest first

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
        then: Opened,
    ) -> Opening | PairReason:
        """Have the keeper begin it, and `then` called with its place, or why it has none.

        Or why that is not even asked. After `idle_s` of silence it is over; if nobody ends it, it
        ends by itself. `local` is the address of ours to which the client speaks; `sockets` are the
        listener's and the one to the server. They stay the caller's, and must be read as before.
        """
        # Of one that has ended the kernel may still have the addresses.
        if now_s < self._keeper_from_s or self._abandoned:
            return PairReason.NO_KEEPER
        at = slot * self._window.WORDS
        # The program compares with these as soon as it begins.
        self._window.words[at + table.ID] = session_id
        for direction in Direction:
            self._window.words[at + table.CONSUMED[direction]] = _UNKNOWN
            self._window.halves[2 * at + table.ARMED[direction]] = 0
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
        opening = Opening(session_id, slot, then)
        asked.then = partial(self._opened, opening)
        return opening

    def abandon(self, opening: Opening) -> None:
        """The session has ended: if it is begun all the same, it is ended there, too."""
        if opening.then is not None:
            opening.then = None
            self._abandoned += 1

    def _opened(self, opening: Opening, answer: dict[str, Any] | None, _fds: list[int]) -> None:
        index = self._look_up(opening) if answer is None else answer.get("index", -1)
        then = opening.then
        if then is None:
            self._abandoned -= 1
            if index >= 0:
                self.forget(index, opening.id)
            return
        opening.then = None
        if index >= 0:
            then(Place(index, opening.id, opening.slot))
        elif answer is None or "late" in answer:
            self._keeper_from_s = time.monotonic() + _KEEPER_PAUSE_S
            then(PairReason.NO_KEEPER)
        else:
            then(PairReason(answer.get("refused", PairReason.REFUSED_BY_KERNEL)))

    def _look_up(self, opening: Opening) -> int:
        """Its place if a keeper has begun it before that died; else -1, and none will."""
        slot = self._window.first_slot + opening.slot
        for index in used_indexes(self._memory):
            found = record_of(self._memory, index)
            if (found.id, found.slot) == (opening.id, slot):
                return index if found.state == SessionState.ACTIVE else -1
        return -1

    # What the programs say of it

    def is_latched(self, place: Place, direction: int) -> bool:
        """Whether the kernel sends this direction on by itself."""
        at = place.index * SESSION_BYTES + _LATCHED[direction]
        return bool(_U32.unpack_from(self._memory, at)[0])

    def passed(self, place: Place, direction: int) -> int:
        """How many datagrams our socket was to get before the direction was latched."""
        at = place.index * SESSION_BYTES + _PASSED[direction]
        return int(_U64.unpack_from(self._memory, at)[0])

    def carried(self, place: Place, direction: int) -> tuple[int, int]:
        """Bytes and datagrams that the kernel has sent on."""
        at = place.index * SESSION_BYTES + _CARRIED[direction]
        carried_bytes, packets = _TWO_U64.unpack_from(self._memory, at)
        return carried_bytes, packets

    def last_s(self, place: Place, direction: int) -> float:
        """When the kernel last sent a datagram on, a second late at most (monotonic clock)."""
        at = place.index * SESSION_BYTES + _LAST_NS[direction]
        return float(_U64.unpack_from(self._memory, at)[0]) / 1e9

    # What the programs are told

    def caught_up(self, place: Place, direction: int, passed: int) -> None:
        """All datagrams that our socket was to get when `passed` said so many have gone on."""
        at = place.slot * self._window.WORDS
        self._window.words[at + table.CONSUMED[direction]] = passed
        # The keeper has the direction begin again where the way has changed.
        self._window.halves[place.slot * self._window.HALVES + table.ARMED[direction]] = 0
        place.copied[direction] = max(place.copied[direction], passed)
        place.behind_s[direction] = 0.0

    def latch_now(self, place: Place) -> None:
        """There is no quiet moment: what is still with our sockets will be overtaken."""
        at = place.slot * self._window.HALVES
        for direction in Direction:
            self._window.halves[at + table.ARMED[direction]] = NOW

    # The end

    def close(self, places: Sequence[Place], then: Counted) -> None:
        """End them; `then` is called, once, with what the kernel has sent on of each.

        There are MOST_CLOSED_AT_ONCE of them at most. What they have carried in the end the keeper
        says; a second later it is what the records say.
        """
        ending = _Ending(places, [self._carried(place) for place in places], then, self._count)
        self._uncounted[ending] = None
        self._end(ending)
        if self._keeper.is_over:
            self._count(ending)
        else:
            self._loop.deadlines.start(ending, scaled_s(_COUNT_S), time.monotonic())

    def _end(self, ending: _Ending) -> None:
        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self._end(ending)  # it may be there still
                return
            # Its last word: none is under way any more.
            for number, said in enumerate(answer.get("carried", ())):
                if said is not None:
                    up, down = said
                    ending.carried[number] = (up[0], up[1]), (down[0], down[1])
            self._report_end(ending)

        places = [[place.index, place.id] for place in ending.places]
        self._keeper.ask("close_sessions", answered, places=places)

    def _count(self, ending: _Ending) -> None:
        """The keeper does not say what they have carried: their records do, if they have them."""
        for number, place in enumerate(ending.places):
            if record_of(self._memory, place.index).id == place.id:
                ending.carried[number] = self._carried(place)
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

    def _carried(self, place: Place) -> Carried:
        return self.carried(place, Direction.UP), self.carried(place, Direction.DOWN)

    def count_now(self) -> None:
        """Nothing is waited for any more: what ended sessions have carried, their records say."""
        while self._uncounted:
            self._count(next(iter(self._uncounted)))

    # Going on

    def adopt(self, take: Callable[[SessionOrphan], None], done: Callable[[], None]) -> None:
        """Have `take` called with each session that has lost its worker and is ours now.

        Then `done`, once; both by the loop, or while the keeper's answers are waited for. Each must
        be given to `resume` or `forget`; its socket is the callee's.
        """

        def answered(answer: dict[str, Any] | None, fds: list[int]) -> None:
            if answer is not None:
                if "index" not in answer:
                    done()
                    return
                try:
                    take(_orphan_of(answer, fds))
                except Exception as error:
                    self._loop.on_error(take, error)
                    self.forget(answer["index"], answer["id"])  # it costs this session alone
            ask()

        def ask() -> None:
            if not self._keeper.ask("adopt_session", answered):
                done()

        ask()

    def resume(
        self, orphan: SessionOrphan, slot: int, idle_s: float, lost: Callable[[], None]
    ) -> Place:
        """The session, with a slot that bears its id, is the orphan from here on.

        After `idle_s` of silence it is over, as in `open`. `lost` is called if the keeper does not
        know it any more.
        """
        place = Place(orphan.index, orphan.id, slot)
        at = slot * self._window.WORDS
        for direction in Direction:
            self._window.words[at + table.CONSUMED[direction]] = _UNKNOWN
        self._show(place)
        self._confirm_adoption(place, idle_s, lost)
        return place

    def _confirm_adoption(self, place: Place, idle_s: float, lost: Callable[[], None]) -> None:
        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if self._window.words[place.slot * self._window.WORDS + table.ID] != place.id:
                return  # it has ended, and the slot is another's
            if answer is None:
                self._confirm_adoption(place, idle_s, lost)
            elif "error" in answer:
                lost()
            else:
                # From here on the program stores the same here, with every datagram.
                self._show(place)

        self._keeper.ask(
            "session_adopted",
            answered,
            index=place.index,
            id=place.id,
            slot=self._window.first_slot + place.slot,
            idle_s=idle_s,
        )

    def _show(self, place: Place) -> None:
        """Write into its slot what the kernel has carried so far."""
        at = place.slot * self._window.WORDS
        for direction in Direction:
            carried_bytes, packets = self.carried(place, direction)
            self._window.words[at + table.REDIRECTED[direction]] = carried_bytes
            self._window.words[at + table.REDIRECTED_PACKETS[direction]] = packets
            self._window.words[at + table.LAST_NS[direction]] = int(
                self.last_s(place, direction) * 1e9
            )

    def forget(self, index: int, session_id: int) -> None:
        """Release one that nobody here can speak for."""

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                self.forget(index, session_id)

        self._keeper.ask("close_sessions", answered, places=[[index, session_id]])

    def dispose(self) -> None:
        """Unmap the records."""
        self._memory.close()
