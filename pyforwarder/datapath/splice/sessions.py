"""UDP sessions of the splice datapath, the worker's half: begun, looked after, ended.

bpf/splice_udp.h sends the datagrams on, session_keeper.py begins and ends it. Until a direction is
*latched* its datagrams still come to our sockets, and are copied. The program latches it as soon as
it sees that all of them have been: how many came it counts itself, how many were copied stands in
the pair's record.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction, PairRecord
from pyforwarder.datapath.splice.keeper_client import KeeperClient, KeeperError
from pyforwarder.datapath.splice.keeper_requests import MOST_CLOSED_AT_ONCE
from pyforwarder.datapath.splice.session_abi import (
    NOW,
    SESSION_BYTES,
    SessionDirection,
    SessionRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.session_maps import SessionMaps

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
# After a keeper that did not answer, none is asked for so long.
_KEEPER_PAUSE_S: Final = 5.0
# Bytes and datagrams, up and down.
Carried = tuple[tuple[int, int], tuple[int, int]]


class Place:
    """One session's place among those of the kernel."""

    __slots__ = ("behind_s", "copied", "index", "slot")

    def __init__(self, index: int, slot: int) -> None:
        self.index = index
        self.slot = slot  # within the worker's window
        self.copied = [0, 0]  # datagrams that our sockets got since, and that went on
        # Since when the program waits to know that what it passed was copied; 0: it does not.
        self.behind_s = [0.0, 0.0]


@dataclass(frozen=True, slots=True)
class SessionOrphan:
    """A session whose worker is gone: a socket to its server, and what is known of it."""

    index: int  # in the kernel; -1: it was copied
    id: int
    server: socket.socket
    client: tuple[str, int]
    local: tuple[str, int]  # the address of ours to which the client speaks
    record: PairRecord | None  # what `show` said of it


class SpliceSessions:
    """The kernel's sessions of one worker."""

    def __init__(self, maps: SessionMaps, keeper: KeeperClient, *, window: PairWindow) -> None:
        """Work on inherited maps, and on what the keeper does for us."""
        self._keeper = keeper
        self._window = window
        self._memory = bpf.map_memory(maps.sessions_fd, maps.entries * SESSION_BYTES, write=False)
        self._keeper_from_s = 0.0  # not asked before
        self._unforgotten: dict[int, None] = {}  # ended while the keeper did not answer

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
    ) -> Place | PairReason:
        """Have the keeper begin it; or why not.

        After `idle_s` of silence it is over; if nobody ends it, it ends by itself. `local` is the
        address of ours to which the client speaks; `sockets` are the listener's and the one to the
        server. They stay the caller's, and must be read as before.
        """
        if now_s < self._keeper_from_s:
            return PairReason.NO_KEEPER
        self._forget_the_unforgotten()
        if self._unforgotten:
            # The keeper may have forgotten them all the same, and would give us one's number again.
            return PairReason.NO_KEEPER
        at = slot * self._window.WORDS
        # The program compares with these as soon as it begins.
        self._window.words[at + table.ID] = session_id
        for direction in Direction:
            self._window.words[at + table.CONSUMED[direction]] = _UNKNOWN
            self._window.halves[2 * at + table.ARMED[direction]] = 0
        try:
            answer = self._keeper.ask(
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
        except KeeperError:
            # If it has begun it goes on beside what is copied, until its client is silent.
            self._keeper_from_s = now_s + _KEEPER_PAUSE_S
            return PairReason.NO_KEEPER
        if "refused" in answer:
            return PairReason(answer["refused"])
        if "index" not in answer:
            return PairReason.REFUSED_BY_KERNEL
        return Place(answer["index"], slot)

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
        place.behind_s[direction] = 0.0

    def latch_now(self, place: Place) -> None:
        """There is no quiet moment: what is still with our sockets will be overtaken."""
        at = place.slot * self._window.HALVES
        for direction in Direction:
            self._window.halves[at + table.ARMED[direction]] = NOW

    # The end

    def close(self, places: Sequence[Place]) -> list[Carried]:
        """End them; what the kernel has sent on of each.

        There are MOST_CLOSED_AT_ONCE of them at most: the keeper is asked once, and waited for.
        """
        carried: list[Carried] = [
            (self.carried(place, Direction.UP), self.carried(place, Direction.DOWN))
            for place in places
        ]
        indexes = [place.index for place in places]
        try:
            answer = self._keeper.ask("close_sessions", indexes=indexes)
        except KeeperError:
            self._unforgotten |= dict.fromkeys(indexes)
            return carried
        # Its last word: none is under way any more.
        for number, said in enumerate(answer.get("carried", ())):
            if said is not None:
                up, down = said
                carried[number] = (up[0], up[1]), (down[0], down[1])
        return carried

    def _forget_the_unforgotten(self) -> None:
        while self._unforgotten:
            some = list(self._unforgotten)[:MOST_CLOSED_AT_ONCE]
            try:
                self._keeper.ask("close_sessions", indexes=some)
            except KeeperError:
                return
            for index in some:
                del self._unforgotten[index]

    # Going on

    def adopt(self) -> Iterator[SessionOrphan]:
        """Sessions that have lost their worker and are ours now, until there is none left.

        Each must be given to `go_on_with` or `forget`; its socket is the caller's.
        """
        while True:
            try:
                answer, fds = self._keeper.ask_for_sockets("adopt_session")
            except KeeperError:
                return
            if "index" not in answer or len(fds) != 1:
                for fd in fds:
                    os.close(fd)
                return
            said = table.inherited(bytes.fromhex(answer["record"]), answer["id"])
            yield SessionOrphan(
                answer["index"],
                answer["id"],
                socket.socket(fileno=fds[0]),
                (answer["client"], answer["client_port"]),
                (answer["local"], answer["local_port"]),
                said,
            )

    def go_on_with(self, orphan: SessionOrphan, slot: int, idle_s: float) -> Place:
        """The session, with a slot that bears its id, is the orphan from here on.

        After `idle_s` of silence it is over, as in `open`.

        Raises:
            KeeperError: the keeper does not answer.
        """
        place = Place(orphan.index, slot)
        at = slot * self._window.WORDS
        for direction in Direction:
            self._window.words[at + table.CONSUMED[direction]] = _UNKNOWN
        self._keeper.ask(
            "session_adopted",
            index=orphan.index,
            slot=self._window.first_slot + slot,
            idle_s=idle_s,
        )
        # From here on the program stores the same here, with every datagram.
        for direction in Direction:
            carried_bytes, packets = self.carried(place, direction)
            self._window.words[at + table.REDIRECTED[direction]] = carried_bytes
            self._window.words[at + table.REDIRECTED_PACKETS[direction]] = packets
            self._window.words[at + table.LAST_NS[direction]] = int(
                self.last_s(place, direction) * 1e9
            )
        return place

    def forget(self, index: int) -> None:
        """Let go of one that nobody here can speak for."""
        self._unforgotten[index] = None
        self._forget_the_unforgotten()

    def dispose(self) -> None:
        """Unmap the records."""
        self._memory.close()
