"""UDP sessions: the keeper's part. They are begun, ended, and given to their worker's successor.

A worker is not trusted here either. It hands over the socket that receives its client's datagrams,
and the one that is connected to the server; their addresses are read from the sockets. The worker
itself names only its client's address, and the local address that the client uses, as no connection
has them. So the kernel is asked which socket receives such datagrams: it must be the one that was
handed over. A worker can only have forwarded what it could copy.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import NO_SLOT
from pyforwarder.datapath.splice.keeper_replies import (
    Declined,
    GivenSession,
    NoneLeft,
    NotYoursError,
    Opened,
    Words,
)
from pyforwarder.datapath.splice.keeper_requests import FaultyRequestError
from pyforwarder.datapath.splice.records import FLOW, KEY_BYTES, forget_flows, shown_of
from pyforwarder.datapath.splice.session_abi import (
    SESSION_BYTES,
    SessionRecord,
    SessionState,
)
from pyforwarder.datapath.splice.session_maps import (
    SessionMaps,
    record_of,
    store,
    store_wide,
    used_indexes,
)
from pyforwarder.datapath.splice.session_rerouting import SessionRerouting
from pyforwarder.datapath.splice.session_sockets import (
    describe,
    has_peer,
    host_of,
    is_of_one_host,
    is_udp,
    revive,
    socket_name,
)
from pyforwarder.runtime.own_addresses import this_host_has

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.interfaces import Links

# A program that has looked up a session may still count in its record.
_LINGER_S: Final = 1.0
_BOTH: Final = 3  # FOUND_CLIENT and FOUND_SERVER of bpf/splice_udp.h
_INDEX: Final = struct.Struct("=14xI46x")  # the packet from which the program reads the index
# Only privileged processes may set an SO_PRIORITY this large (socket(7)).
_LEAST_MARK: Final = 1 << 24
# A worker checks a silent session several times within `idle` (IDLE_CHECKS), and ends it within
# that and an eighth. The programs end it later than that, in case no worker does.
_IDLE_GRACE: Final = 0.25
_IDLE_GRACE_S: Final = 2.0


class SessionKeeper:
    """The sessions of one keeper."""

    def __init__(
        self,
        maps: SessionMaps,
        links: Links,
        *,
        workers: int,
        slots: int,
        pairs: mmap.mmap,
    ) -> None:
        """`pairs` is the whole pair table. The sessions that `maps` has found continue, and wait
        for their workers.
        """
        self._maps = maps
        self._workers = workers
        self._slots = slots
        self._pairs = pairs
        self._flows = bpf.Map(maps.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        self._memory = bpf.map_memory(maps.sessions_fd, maps.entries * SESSION_BYTES, write=True)
        self._owner: dict[int, int] = {}  # index -> worker
        self._rerouting = SessionRerouting(links, self._memory, self._owner)
        self._count = [0] * workers
        # By worker: sessions of its predecessor that wait for it: index -> what `show` printed.
        self._orphans: list[dict[int, bytes]] = [{} for _ in range(workers)]
        # Likewise those that were given to a worker, which has not confirmed it: if it dies before,
        # its successor gets them.
        self._given: dict[int, bytes] = {}
        # Ended sessions, oldest first: when the record may be used again, and its index.
        self._lingering: deque[tuple[float, int]] = deque()
        used = set(used_indexes(self._memory))
        self._free = deque(index for index in range(maps.entries) if index not in used)
        for index in sorted(used):
            record = record_of(self._memory, index)
            if record.state != SessionState.ACTIVE:
                self._forget(index)  # its worker has given up before it began
                continue
            self._own(index, record.worker % workers)
            if record.slot == NO_SLOT:  # no worker has it
                shown = next((one.record for one in maps.found if one.id == record.id), b"")
                shown = shown or shown_of(pairs, record, len(pairs) // PAIR_BYTES)
                self._orphans[record.worker % workers][index] = shown
        self._obeys: Mapping[str, Callable[..., dict[str, object]]] = {
            "open_session": self._open,
            "close_sessions": self._close,
            "adopt_session": self._adopt,
            "session_adopted": self._adopted,
        }

    def knows(self, do: str) -> bool:
        """Whether a request concerns sessions."""
        return do in self._obeys

    def obey(
        self,
        worker: int,
        request: dict[str, Any],
        sockets: Sequence[socket.socket],
        given: list[socket.socket],
    ) -> dict[str, object]:
        """Handle a worker's request; sockets that are appended to `given` are sent to it.

        Raises:
            FaultyRequestError: the request is not allowed at all.
            NotYoursError: the session is not, or no longer, the worker's.
            OSError: the kernel refuses.
        """
        return self._obeys[request["do"]](worker, request, sockets, given)

    # Beginning

    def _open(
        self,
        worker: int,
        request: dict[str, Any],
        sockets: Sequence[socket.socket],
        _given: list[socket.socket],
    ) -> Words:
        slot = request["slot"]
        if slot // self._slots != worker:
            raise FaultyRequestError("a slot of another worker's")
        listener, server = sockets
        record = SessionRecord()
        record.id, record.worker, record.slot = request["id"], worker, slot
        record.mark = _LEAST_MARK + secrets.randbits(30)
        record.idle_ns, record.began_ns = _idle_ns(request["idle_s"]), time.monotonic_ns()
        obstacle = self._describe(record, request, listener, server)
        if obstacle is not None:
            return Declined(obstacle).words()
        index = self._allocate(worker)
        if index < 0:
            return Declined(PairReason.MAP_FULL).words()
        keys = [bytes(from_peer.from_) for from_peer in record.direction]
        try:
            record.state = SessionState.PREPARED
            self._write(index, record)
            is_taken = keys[0] == keys[1] or any(map(self._is_taken, keys))
            if is_taken or self._found(index, record, sockets) != _BOTH:
                self._forget(index)
                return Declined(PairReason.OTHER_SOCKET).words()
            self._own(index, worker)
            for direction in Direction:
                self._flows.update(keys[direction], FLOW.pack(index, direction))
            # Only from here on the programs use it.
            store(self._memory, index, "state", SessionState.ACTIVE)
        except OSError:
            self._forget(index)
            return Declined(PairReason.REFUSED_BY_KERNEL).words()
        return Opened(index).words()

    def _describe(
        self,
        record: SessionRecord,
        request: dict[str, Any],
        listener: socket.socket,
        server: socket.socket,
    ) -> PairReason | None:
        """Fill in the record of a session; returns why that is not possible, or None."""
        try:
            if not all(map(is_udp, sockets := (listener, server))):
                return PairReason.NOT_ELIGIBLE
            if not all(map(splice_sockets.is_of_our_network, sockets)):
                # In a network namespace of its own a worker could give its sockets any addresses.
                return PairReason.NOT_ELIGIBLE
            if has_peer(listener):
                # While this socket is connected to the client, this worker would get the client's
                # datagrams, even where it is another worker's client, which the session would take
                # away from that worker.
                return PairReason.OTHER_SOCKET
            own = socket_name(listener.getsockname())
            ends = (
                (socket_name((request["client"], request["client_port"])), own),
                (socket_name(server.getpeername()), socket_name(server.getsockname())),
            )
        except (OSError, ValueError):
            return PairReason.REFUSED_BY_KERNEL
        if own[0].is_unspecified:
            ends = (ends[0][0], (ipaddress.ip_address(request["local"]), own[1])), ends[1]
        elif ipaddress.ip_address(request["local"]) != own[0]:
            raise FaultyRequestError("an address that is not its listener's")
        every = [end for pair in ends for end in pair]
        if len({ip.version for ip, _ in every}) != 1:
            return PairReason.TWO_FAMILIES
        if any(ip.version == 6 and ip.is_link_local for ip, _ in every):
            return PairReason.LINK_LOCAL
        if any(not port or not is_of_one_host(ip) for ip, port in every):
            return PairReason.NOT_ELIGIBLE
        # Datagrams of other hosts must not be taken.
        if not all(this_host_has(local) for _, (local, _) in ends):
            return PairReason.NOT_ELIGIBLE
        describe(record, *ends)
        status = os.fstat(server.fileno())
        record.owner, record.group = status.st_uid, status.st_gid
        is_any = bool(request["any_interface"])
        try:
            return self._rerouting.find_interfaces(record, any_interface=is_any)
        except OSError:
            return PairReason.REFUSED_BY_KERNEL

    def _is_taken(self, key: bytes) -> bool:
        """Whether another session has these addresses already."""
        try:
            self._flows.lookup(key)
        except FileNotFoundError:
            return False
        return True

    def _found(self, index: int, record: SessionRecord, sockets: Sequence[socket.socket]) -> int:
        """Which of the sockets would receive the session's datagrams, as bits."""
        before = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) for sock in sockets]
        try:
            for sock in sockets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, record.mark)
            return bpf.run_program(self._maps.find_fd, _INDEX.pack(index))
        finally:
            for sock, priority in zip(sockets, before, strict=True):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)

    # Changes of interfaces and routes: see session_rerouting.py

    def routes_changed(self) -> None:
        """Interfaces, addresses, routes or rules have changed: each session is checked again."""
        self._rerouting.begin()

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due, if nothing changes."""
        return self._rerouting.wait_s(most_s)

    # Ending

    def _close(
        self,
        worker: int,
        request: dict[str, Any],
        _sockets: Sequence[socket.socket],
        _given: list[socket.socket],
    ) -> dict[str, object]:
        """Forget sessions of a worker; returns what each has carried, None for one that is not the
        worker's.
        """
        carried: list[object] = []
        for index, number in request["places"]:
            if not self._is_owner(worker, index, number):
                carried.append(None)
                continue
            forget_flows(self._flows, index, record_of(self._memory, index))
            record = record_of(self._memory, index)
            # The slot may get another pair from now on.
            store(self._memory, index, "slot", NO_SLOT)
            store(self._memory, index, "state", SessionState.PREPARED)
            self._disown(index)
            self._lingering.append((time.monotonic() + _LINGER_S, index))
            carried.append([[direction.bytes, direction.packets] for direction in record.direction])
        return {"carried": carried}

    def clear(self, worker: int) -> None:
        """Forget a worker's sessions, except those that wait for it."""
        for index in self._of(worker):
            if index not in self._orphans[worker]:
                self._forget(index)

    # Sessions without their worker

    def worker_died(self, worker: int) -> None:
        """A worker has died: its sessions continue, and go to its successor."""
        for index in self._of(worker):
            if index in self._orphans[worker]:
                continue
            record = record_of(self._memory, index)
            shown = shown_of(self._pairs, record, len(self._pairs) // PAIR_BYTES)
            self._orphans[worker][index] = self._given.pop(index, shown)
            if record.slot != NO_SLOT:
                store(self._memory, index, "last_slot", record.slot)  # for another keeper
            store(self._memory, index, "slot", NO_SLOT)

    def _adopt(
        self,
        worker: int,
        _request: dict[str, Any],
        _sockets: Sequence[socket.socket],
        given: list[socket.socket],
    ) -> dict[str, object]:
        """Give a worker one session that waits for it, with a new socket to its server."""
        waiting = self._orphans[worker]
        while waiting:
            index, shown = waiting.popitem()
            record = record_of(self._memory, index)
            try:
                given.append(revive(record))
            except OSError:
                # Another socket has the port by now.
                self._forget(index)
                continue
            self._given[index] = shown
            key = record.direction[Direction.UP].from_
            return GivenSession(
                index,
                record.id,
                shown,
                (host_of(key.source, record.family), socket.ntohs(key.sport)),
                (host_of(key.target, record.family), socket.ntohs(key.dport)),
            ).words()
        return NoneLeft().words()

    def take_back(self, worker: int, index: int) -> None:
        """A session that was given to a worker did not reach it: it waits again."""
        if index in self._given:
            self._orphans[worker][index] = self._given.pop(index)

    def _adopted(
        self,
        worker: int,
        request: dict[str, Any],
        _sockets: Sequence[socket.socket],
        _given: list[socket.socket],
    ) -> dict[str, object]:
        index, slot = request["index"], request["slot"]
        if not self._is_owner(worker, index, request["id"]):
            raise NotYoursError
        # An earlier keeper may have given it to the worker: until now it was an orphan to this one.
        self._orphans[worker].pop(index, None)
        if slot // self._slots != worker:
            raise FaultyRequestError("a slot of another worker's")
        self._given.pop(index, None)
        store(self._memory, index, "worker", worker)
        store(self._memory, index, "slot", slot)
        # By the present configuration; and its new sockets may have received datagrams already.
        store_wide(self._memory, index, "idle_ns", _idle_ns(request["idle_s"]))
        store_wide(self._memory, index, "began_ns", time.monotonic_ns())
        return {}

    # Records

    def _is_owner(self, worker: int, index: int, number: int) -> bool:
        """Whether the session still exists, and is the worker's."""
        is_its = self._owner.get(index) == worker
        return is_its and record_of(self._memory, index).id == number

    def _of(self, worker: int) -> list[int]:
        return [index for index, owner in self._owner.items() if owner == worker]

    def _own(self, index: int, worker: int) -> None:
        self._owner[index] = worker
        self._count[worker] += 1

    def _disown(self, index: int) -> None:
        worker = self._owner.pop(index, None)
        if worker is not None:
            self._count[worker] -= 1
            self._orphans[worker].pop(index, None)
        self._given.pop(index, None)
        self._rerouting.forget(index)

    def _write(self, index: int, record: SessionRecord) -> None:
        base = index * SESSION_BYTES
        self._memory[base : base + SESSION_BYTES] = bytes(record)

    def _allocate(self, worker: int) -> int:
        """A free record's index; -1 if none is left, or the worker has used up its share."""
        if self._count[worker] >= self._maps.entries // self._workers:
            return -1
        if not self._free and self._lingering:
            self._forget(self._lingering.popleft()[1])
        return self._free.popleft() if self._free else -1

    def _forget(self, index: int) -> None:
        with contextlib.suppress(OSError):
            forget_flows(self._flows, index, record_of(self._memory, index))
        store(self._memory, index, "state", SessionState.FREE)
        self._disown(index)
        self._free.append(index)

    def run_due(self, now_s: float) -> None:
        """Free the records of sessions that ended a while ago, and check changed routes."""
        self._rerouting.run_due(now_s)
        while self._lingering and self._lingering[0][0] <= now_s:
            self._forget(self._lingering.popleft()[1])


def _idle_ns(idle_s: float) -> int:
    """The idle timeout of the programs, for a session that its worker ends after `idle_s`."""
    return int((idle_s * (1 + _IDLE_GRACE) + _IDLE_GRACE_S) * 1e9)
