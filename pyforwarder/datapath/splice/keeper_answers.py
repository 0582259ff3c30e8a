"""What the keeper does for each request of a worker, and what it answers.

A request has been checked against the table of allowed requests (keeper_requests.py). Here it is
checked that a pair is the worker's own, and that sockets are the pair's.
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
from pyforwarder.datapath.splice.keeper_replies import NotYoursError
from pyforwarder.datapath.splice.keeper_requests import FaultyRequestError
from pyforwarder.datapath.splice.records import ID_AT, SLOT_AT, WORKER_AT, set_state
from pyforwarder.runtime.one_store import store64

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.express.keeping import ExpressKeeper
    from pyforwarder.datapath.splice.keeper_adoption import KeeperAdoption
    from pyforwarder.datapath.splice.keeper_joining import Joining
    from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
    from pyforwarder.datapath.splice.session_keeper import SessionKeeper


class Answers:
    """The answers of one keeper."""

    def __init__(
        self,
        pairs: KeeperPairs,
        joining: Joining,
        adoption: KeeperAdoption,
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
        """Handle a worker's request; sockets that are appended to `given` are sent to it.

        Raises:
            FaultyRequestError: no worker of this version sends such a request.
            NotYoursError: the pair is not the worker's, or has ended meanwhile.
            OSError: a step failed.
        """
        if self._sessions.knows(request["do"]):
            return self._sessions.obey(worker, request, list(sockets), given)
        match request["do"]:
            case "here":
                return {}
            case "learn":
                learned = self._express is not None and self._joining.learn(
                    self._express, *sockets, has_source=bool(request["has_source"])
                )
                return {"learned": int(learned)}
            case "join":
                self._check_slot(worker, request["slot"])
                return self._joining.join(worker, request, *sockets).words()
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
                return self._adoption.adopt(worker, given).words()
            case "take_over":
                return self._adoption.take_over(worker, request["index"], sockets).words()
        return self._answer_of_pair(worker, request, sockets)

    def _answer_of_pair(
        self, worker: int, request: dict[str, Any], sockets: Sequence[socket.socket]
    ) -> dict[str, object]:
        """Handle a request about a pair that the worker has."""
        index = request["index"]
        if self._pairs.owners.get(index) != worker:
            raise NotYoursError  # or no longer: it was reset meanwhile
        record = self._pairs.record(index)
        if record.id != request["id"]:
            raise NotYoursError
        if sockets and not self._pairs.are_joined(index, sockets):
            # Mute sockets have abilities that others lack (TCP_REPAIR): only sockets that were
            # joined may become mute.
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
                raise FaultyRequestError(f"{unknown} is about no pair")
        return {}

    def _check_slot(self, worker: int, slot: int) -> None:
        if slot // self._slots != worker:
            raise FaultyRequestError("a slot of another worker's")

    def _report_narrow_interface(self, index: int, record: Splice) -> None:
        """Send an ICMP error to peers whose packets are longer than our interface's MTU."""
        for direction in Direction:
            from_peer = record.direction[direction]
            if from_peer.narrow_mtu:
                at = Splice.direction.offset + direction * ctypes.sizeof(SpliceDirection)
                self._pairs.store(index, at + SpliceDirection.narrow_mtu.offset, 0)
                splice_sockets.send_too_long(from_peer, record.family)

    def _leave(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """The pair has ended: both FINs are acknowledged, and only retransmissions may come."""
        for sock in sockets:
            splice_sockets.mute(sock)
        del self._pairs.owners[index]
        self._adoption.adopted(index)
        # The slot may belong to another pair now: without the id nothing is counted in it any more.
        store64(self._pairs.memory, index * SPLICE_BYTES + ID_AT, 0)
        self._pairs.linger(index)

    def _reset(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """The programs forward no more of the pair; closing its sockets resets its ends."""
        set_state(self._pairs.memory, index, SpliceState.RESET)
        for sock in sockets:
            splice_sockets.unmute(sock)
        del self._pairs.owners[index]
        self._adoption.adopted(index)
        self._pairs.linger_reset(index)
