"""What the keeper does for each request of a worker, and what it answers.

A request has passed the table of what may be asked (keeper_requests.py). What a worker may do with
a pair of its own is checked here: that it is its own, and that sockets are the pair's.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import (
    SPLICE_BYTES,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.keeper_requests import FaultyRequestError
from pyforwarder.datapath.splice.records import ID_AT, SLOT_AT, WORKER_AT, set_state
from pyforwarder.runtime.one_store import store64

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.express.keeping import ExpressKeeper
    from pyforwarder.datapath.splice.keeper_adoption import Adoption
    from pyforwarder.datapath.splice.keeper_joining import Joining
    from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
    from pyforwarder.datapath.splice.session_keeper import SessionKeeper


class Answers:
    """Of one keeper."""

    def __init__(
        self,
        pairs: KeeperPairs,
        joining: Joining,
        adoption: Adoption,
        sessions: SessionKeeper,
        express: ExpressKeeper | None,
        *,
        is_away: Callable[[int], bool],
        slots: int,
    ) -> None:
        """`is_away`: whether a pair goes through another machine; each worker has `slots`."""
        self._pairs = pairs
        self._joining = joining
        self._adoption = adoption
        self._sessions = sessions
        self._express = express
        self._is_away = is_away
        self._slots = slots

    def answer(
        self,
        worker: int,
        request: dict[str, Any],
        sockets: Sequence[socket.socket],
        given: list[socket.socket],
    ) -> dict[str, object]:
        """Do what a worker asks; what is appended to `given` goes to it.

        Raises:
            FaultyRequestError: no worker of ours asks for that.
            ValueError: the pair is not its own, or has ended meanwhile.
            OSError: a step failed.
        """
        if self._sessions.knows(request["do"]):
            return self._sessions.obey(worker, request, list(sockets), given)
        match request["do"]:
            case "here":
                return {}
            case "learn":
                learned = self._express is not None and self._joining.learn(self._express, *sockets)
                return {"learned": int(learned)}
            case "join":
                self._check_slot(worker, request["slot"])
                return self._joining.join(worker, request, *sockets)
            case "clear":
                for index in self._pairs.of(worker):
                    if not self._adoption.is_orphan(index):
                        self._pairs.forget(index)
                self._sessions.clear(worker)
                return {}
            case "worker_died":
                self._adoption.worker_died(worker)
                self._sessions.worker_died(worker)
                return {}
            case "adopt":
                return self._adoption.adopt(worker, given)
            case "take_over":
                return self._adoption.take_over(worker, request["index"], sockets)
        return self._answer_of_pair(worker, request, sockets)

    def _answer_of_pair(
        self, worker: int, request: dict[str, Any], sockets: Sequence[socket.socket]
    ) -> dict[str, object]:
        """The same of requests about a pair that the worker has."""
        index = request["index"]
        if self._pairs.owners.get(index) != worker:
            raise ValueError("not yours")  # or no more: it was reset meanwhile
        record = self._pairs.record(index)
        if record.id != request["id"]:
            raise ValueError("not yours")
        if sockets and not self._pairs.are_joined(index, sockets):
            # Mute sockets can do what others cannot (TCP_REPAIR): only those that were joined.
            raise FaultyRequestError("sockets that are not the pair's")
        match request["do"]:
            case "adopted":
                self._check_slot(worker, request["slot"])
                self._adoption.adopted(index)
                self._pairs.store(index, WORKER_AT, worker)
                self._pairs.store(index, SLOT_AT, request["slot"])
            case "narrow":
                self._report_narrow_interface(index, record)
            case "mute":
                return {"mute": self._joining.mute(index, sockets)}
            case "abort":
                self._pairs.forget(index)
            case "leave":
                self._leave(index, sockets)
            case "reset" if record.reset == ResetBy.MOVED or self._is_away(index):
                self._pairs.forget(index)  # its sockets are mute, and stay so
            case "reset":
                self._reset(index, sockets)
            case unknown:
                raise ValueError(unknown)
        return {}

    def _check_slot(self, worker: int, slot: int) -> None:
        if slot // self._slots != worker:
            raise FaultyRequestError("a slot of another worker's")

    def _report_narrow_interface(self, index: int, record: Splice) -> None:
        """Have the peers know whose packets our own interfaces do not take any more."""
        for direction in Direction:
            way = record.way[direction]
            if way.narrow_mtu:
                at = Splice.way.offset + direction * ctypes.sizeof(SpliceDirection)
                self._pairs.store(index, at + SpliceDirection.narrow_mtu.offset, 0)
                splice_sockets.send_too_long(way, record.family)

    def _leave(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """It has ended: both ends were said, and only what is sent again may still come."""
        for sock in sockets:
            splice_sockets.mute(sock)
        del self._pairs.owners[index]
        self._adoption.adopted(index)
        # The pair's record may be another's now: nothing is counted in it any more.
        store64(self._pairs.memory, index * SPLICE_BYTES + ID_AT, 0)
        self._pairs.linger(index)

    def _reset(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """The programs forward nothing of it any more; closing its sockets resets its ends."""
        set_state(self._pairs.memory, index, SpliceState.RESET)
        for sock in sockets:
            splice_sockets.unmute(sock)
        del self._pairs.owners[index]
        self._adoption.adopted(index)
        self._pairs.linger_reset(index)
