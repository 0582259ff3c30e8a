"""The process that begins and ends splices.

That needs privileges (TCP_REPAIR, BPF_PROG_TEST_RUN) and must be quick, so it is neither the
worker's nor the supervisor's: the keeper is a process of its own that does only this. A worker asks
over its own socket; for a pair that is to begin it does not wait meanwhile. It is not trusted:
addresses come from the sockets that it hands over, never from its words, and it reaches only
splices it began.

All the keeper knows stands in the records, too. So one that died is replaced by one that reads
them, and pairs whose worker or whole daemon died go on, and are given to the successor.

Nobody waits long for a keeper that hangs: a request says until when it must have been read, and is
not obeyed any more later on. No pair begins later than soon after that, as the program sees to that
lets it begin (`control` in splice.c). So the records say then what has become of it, whether the
keeper answers or not. The supervisor replaces such a keeper.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Direction
from pyforwarder.datapath.express.connect_abi import Target as ExpressTarget
from pyforwarder.datapath.express.keeping import ExpressKeeper
from pyforwarder.datapath.express.sharing import Express
from pyforwarder.datapath.express.sharing import Server as ExpressServer
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import (
    HELD,
    NO_SLOT,
    SPLICE_BYTES,
    Busy,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceHandshake,
    SpliceState,
)
from pyforwarder.datapath.splice.keepalive import Keepalives
from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
from pyforwarder.datapath.splice.keeper_client import (
    MOST_MESSAGE_BYTES,
    KeeperClient,
    begins_until_s,
)
from pyforwarder.datapath.splice.keeper_requests import FaultyRequestError, understand
from pyforwarder.datapath.splice.maps import (
    FLOW,
    ID_AT,
    KEY_BYTES,
    LOOPBACK,
    SLOT_AT,
    WORKER_AT,
    Found,
    Programs,
    SpliceMaps,
    forget_flows,
    mtu_of,
    set_state,
    unpin,
    used_indexes,
)
from pyforwarder.datapath.splice.session_keeper import SessionKeeper
from pyforwarder.datapath.splice.standby import Standby
from pyforwarder.datapath.splice.standby_requests import FaultyStandbyError
from pyforwarder.datapath.splice.ways import Ways
from pyforwarder.runtime.children import fork
from pyforwarder.runtime.descriptors import close_given, duplicate_socket
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

_PR_SET_PDEATHSIG: Final = 1
# It shows at least so often that it lives.
_PULSE_S: Final = 1.0
# TCP keeps a closed connection's ports for TIME_WAIT: so long a FIN may come again.
_LINGER_S: Final = 60.0
# Two sockets of the same addresses cannot be. How long the old ones of a pair may be there that has
# no worker (one of the daemon before closes them, or sends them), after what pause each is tried
# again, the more seldom the more there are, and how many are tried for one request.
_IN_USE: Final = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
_IN_USE_S: Final = 60.0
_TRY_AGAIN_S: Final = 0.5
_TRY_EACH_S: Final = 0.0005
_TRIED_AT_ONCE: Final = 16
_RESET_LINGER_S: Final = 2.0
# How often a pair is looked at whose handshake seems to be another's.
_LOOKS: Final = 4
_PULSE: Final = struct.Struct("=I")
# What the programs that are run read: the pair, and whether its worker is to look at it.
_INDEX: Final = struct.Struct("=14xII42x")
# And until when it may begin.
_BEGINNING: Final = struct.Struct("=14xIIQ34x")
_NEVER_NS: Final = 1 << 63  # some centuries after the start of the host
_COOKIES: Final = struct.Struct("=QQ")  # of the client's socket and the server's
_HANDSHAKE_BYTES: Final = ctypes.sizeof(SpliceHandshake)
_CLOCKS_AT: Final = Splice.client_clock.offset
_RESET_AT: Final = Splice.reset.offset


class Keeper:
    """The keeper's process: serves until all clients are gone or it is killed."""

    def __init__(
        self,
        maps: SpliceMaps,
        socks: Sequence[socket.socket],
        found: Sequence[Found],
        pulse: mmap.mmap,
        cookies: mmap.mmap,
        complaints_fd: int,
        standby_sock: socket.socket | None = None,
        standby_addresses: Sequence[str] = (),
        express: Express | None = None,
    ) -> None:
        """`socks[n]` is where worker n asks; `found` is what goes on from an earlier daemon.

        `pulse` is a number that grows as long as this works; `cookies` are those of every pair's
        sockets, which another keeper goes on with. A worker that asks for what it may not is
        written to `complaints_fd`, one byte for each time. By `standby_sock` pairs of other
        machines are told of, which come here if these addresses do.
        """
        self._standby_sock = standby_sock
        self._cookies = cookies
        self._complaints_fd = complaints_fd
        self._socks = list(socks)
        self._pulse = pulse
        self._maps = maps
        self._flows = bpf.Map(maps.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        self._handshakes = bpf.Map(
            maps.handshakes_fd, key_bytes=KEY_BYTES, value_bytes=_HANDSHAKE_BYTES
        )
        self._memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=True)
        self._pairs = bpf.map_memory(
            maps.pairs_fd, maps.workers * maps.slots * PAIR_BYTES, write=False
        )
        self._sessions = SessionKeeper(
            maps.sessions, maps.links, workers=maps.workers, slots=maps.slots, pairs=self._pairs
        )
        self._owner: dict[int, int] = {}  # index -> worker
        # Pairs without a worker: index -> what `show` said of them. Each has an owner, too: the
        # worker that is to adopt it.
        self._orphans: dict[int, bytes] = {}
        # The same of those that their owner was given and has no place for yet: if it dies before,
        # they are its successor's.
        self._given: dict[int, bytes] = {}
        # Orphans whose old sockets are still there: when that was seen first, and last.
        self._in_use: dict[int, tuple[float, float]] = {}
        # Ended, oldest first, each with the moment at which its ports are forgotten.
        self._lingering: deque[tuple[float, int]] = deque()
        self._resetting: deque[tuple[float, int]] = deque()
        used = set(used_indexes(self._memory))
        # Those of places are not ours to give.
        self._first_place = express.connecting.first_splice if express else maps.entries
        self._free = deque(index for index in range(self._first_place) if index not in used)
        self._keepalives = Keepalives(self._memory, self._end)
        self._ways = Ways(maps.links, self._memory, lambda: list(self._owner), self._end)
        self._standby = Standby(
            _StandbyOwner(self),
            self._memory,
            self._flows,
            maps.links,
            self._keepalives,
            addresses=standby_addresses,
            most=maps.entries // 2,
        )
        self._express: ExpressKeeper | None = None
        if express is not None:
            self._express = ExpressKeeper(
                express, self._memory, _ExpressOwner(self), workers=maps.workers
            )
            self._express.begin(lambda index: index in used)
        now_s = time.monotonic()
        # Of these some may have ended since they were found.
        said_of = {one.index: one.record for one in found}
        for index in sorted(used):
            record = self._record(index)
            if self._express is not None and self._express.owns(index, record):
                continue  # no worker has been told of it yet
            if record.worker == HELD:
                self._forget(index)  # we shall be told of it again
            elif record.state == SpliceState.RESET:
                self._resetting.append((now_s + _RESET_LINGER_S, index))
            elif record.state != SpliceState.ACTIVE:
                self._forget(index)  # its worker has given up before it began
            elif not record.id:
                self._lingering.append((now_s + _LINGER_S, index))
            else:
                self._owner[index] = worker = record.worker % maps.workers
                self._store(index, WORKER_AT, worker)
                if self._express is not None:
                    self._express.adopted(index, worker)
                if index in said_of:
                    self._orphans[index] = said_of[index]
                elif record.slot == NO_SLOT:  # another keeper had not given it to anybody yet
                    self._orphans[index] = self._express.said(index) if self._express else b""
                self._standby.unsettled(index, record)
        self._keepalives.watch(self._owner)

    def serve(self) -> None:
        """Answer until every worker's end is closed."""
        poll = select.poll()
        workers = {}
        for worker, sock in enumerate(self._socks):
            poll.register(sock, select.POLLIN)
            workers[sock.fileno()] = worker
        poll.register(self._ways, select.POLLIN)
        if self._standby_sock is not None and self._standby.is_wanted:
            poll.register(self._standby_sock, select.POLLIN)
        if self._express is not None:
            poll.register(self._express.wake_fd, select.POLLIN)
        while workers:
            wait_s = self._sessions.wait_s(self._keepalives.wait_s(self._ways.wait_s(_PULSE_S)))
            wait_s = self._standby.wait_s(wait_s)
            if self._express is not None:
                wait_s = self._express.wait_s(wait_s)
            for fd, mask in poll.poll(math.ceil(wait_s * 1000)):
                if fd == self._ways.fileno():
                    self._ways.changed()
                    self._sessions.ways_changed()
                    self._standby.ways_changed()
                    if self._express is not None:
                        self._express.ways_changed()
                elif self._express is not None and fd == self._express.wake_fd:
                    self._express.woken()
                elif fd not in workers:
                    if not self._answer_standby():
                        poll.unregister(fd)
                elif not self._answer(workers[fd], mask):
                    poll.unregister(fd)
                    del workers[fd]
            self._forget_due()
            self._ways.go_on()
            self._standby.go_on()
            if self._express is not None:
                self._express.go_on()
            self._keepalives.go_on()
            (number,) = _PULSE.unpack_from(self._pulse)
            _PULSE.pack_into(self._pulse, 0, number + 1)

    def _answer(self, worker: int, mask: int) -> bool:
        """Serve one request; False once the worker's end is gone for good."""
        sock = self._socks[worker]
        try:
            data, fds, flags, _ = socket.recv_fds(sock, MOST_MESSAGE_BYTES, 4)
        except OSError:
            return False
        if not data and mask & select.POLLHUP:
            return False
        sockets: list[socket.socket] = []
        given: list[socket.socket] = []
        try:
            if flags & socket.MSG_TRUNC:
                raise FaultyRequestError("too long")
            request = understand(data, len(fds))
            answer: dict[str, object] = {"n": request["n"]}
            try:
                sockets.extend(duplicate_socket(fd) for fd in fds)
                # Asked now, as it was read before: a worker that finds it unread may give it up.
                if time.monotonic() > request["until"]:
                    answer["late"] = True
                else:
                    answer.update(self._obey(worker, request, sockets, given))
            except (OSError, ValueError) as error:
                answer["error"] = repr(error)
            rights = array.array("i", [one.fileno() for one in given])
            said = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if given else []
            # A worker that reads no answers must not keep the others waiting.
            try:
                sock.sendmsg([json.dumps(answer).encode()], said, socket.MSG_DONTWAIT)
            except OSError:
                self._take_back(worker, request["do"], answer)
        except Exception as error:
            # Whatever is noticed where: it is the fault of who asked, and costs nobody else.
            self._complain(worker, error)
        finally:
            for one in (*sockets, *given):
                one.close()
            close_given(fds)
        return True

    def _answer_standby(self) -> bool:
        """Serve who tells of other machines' pairs; False once nobody will any more."""
        sock = self._standby_sock
        assert sock is not None
        try:
            data, fds, flags, _ = socket.recv_fds(sock, MOST_MESSAGE_BYTES, 4)
        except OSError:
            return False
        close_given(fds)
        if not data:
            return False
        try:
            if fds or flags & socket.MSG_TRUNC:
                raise FaultyStandbyError("too much")
            answer = self._standby.answer(data)
        except FaultyStandbyError as error:
            answer = {"fault": str(error)}
        except (OSError, ValueError):
            traceback.print_exc(file=sys.stderr)
            answer = {"fault": "it failed"}
        with contextlib.suppress(OSError):
            sock.sendmsg([json.dumps(answer).encode()], [], socket.MSG_DONTWAIT)
        return True

    def _complain(self, worker: int, error: Exception) -> None:
        """Have the supervisor replace a worker that has asked for nonsense."""
        if not isinstance(error, FaultyRequestError):
            traceback.print_exc(file=sys.stderr)
        # If there is no room, the supervisor has been told often enough.
        with contextlib.suppress(OSError):
            os.write(self._complaints_fd, bytes([worker]))

    def _obey(
        self,
        worker: int,
        request: dict[str, Any],
        sockets: list[socket.socket],
        given: list[socket.socket],
    ) -> dict[str, object]:
        """Do what a worker asks; what is appended to `given` goes to it."""
        if self._sessions.knows(request["do"]):
            return self._sessions.obey(worker, request, sockets, given)
        match request["do"]:
            case "learn":
                return {"learned": int(self._learn(*sockets))}
            case "clear":
                for index in self._of(worker):
                    if index not in self._orphans:
                        self._forget(index)
                self._sessions.clear(worker)
                return {}
            case "here":
                return {}
            case "bury":
                self._bury(worker)
                self._sessions.bury(worker)
                return {}
            case "adopt":
                return self._adopt(worker, given)
            case "take_over":
                return self._take_over(worker, request["index"], sockets)
            case "join":
                slot = request["slot"]
                if slot // self._maps.slots != worker:
                    raise FaultyRequestError("a slot of another worker's")
                return self._join(
                    worker,
                    request["id"],
                    slot,
                    request["pending"],
                    *sockets,
                    until_s=request["until"],
                    any_interface=bool(request["any_interface"]),
                    keepalive=request["keepalive"],
                )
        index = request["index"]
        if self._owner.get(index) != worker or self._record(index).id != request["id"]:
            raise ValueError("not yours")  # or no more: it was reset meanwhile
        if sockets and not self._are_joined(index, sockets):
            # Mute sockets can do what others cannot (TCP_REPAIR): only those that were joined.
            raise FaultyRequestError("sockets that are not the pair's")
        match request["do"]:
            case "adopted":
                slot = request["slot"]
                if slot // self._maps.slots != worker:
                    raise FaultyRequestError("a slot of another worker's")
                self._is_had(index)
                self._store(index, WORKER_AT, worker)
                self._store(index, SLOT_AT, slot)
            case "narrow":
                self._tell_of_narrow_interface(index)
            case "mute":
                return {"mute": self._mute(index, sockets)}
            case "abort":
                self._forget(index)
            case "leave":
                for sock in sockets:
                    splice_sockets.mute(sock)
                del self._owner[index]
                self._is_had(index)
                # The pair's record may be another's now: nothing is counted in it any more.
                struct.pack_into("=Q", self._memory, index * SPLICE_BYTES + ID_AT, 0)
                self._lingering.append((time.monotonic() + _LINGER_S, index))
            case "reset" if self._record(index).reset == ResetBy.MOVED or self._standby.is_away(
                index
            ):
                self._forget(index)  # its sockets are mute, and stay so
            case "reset":
                set_state(self._memory, index, SpliceState.RESET)
                for sock in sockets:
                    splice_sockets.unmute(sock)
                del self._owner[index]
                self._is_had(index)
                self._resetting.append((time.monotonic() + _RESET_LINGER_S, index))
            case unknown:
                raise ValueError(unknown)
        return {}

    # Beginning

    def _join(
        self,
        worker: int,
        pair_id: int,
        slot: int,
        pending: list[int],
        client: socket.socket,
        server: socket.socket,
        *,
        until_s: float,
        any_interface: bool,
        keepalive: list[int],
    ) -> dict[str, object]:
        try:
            ends = splice_sockets.End.of(client), splice_sockets.End.of(server)
        except OSError:
            # A peer's reset is on its way to the worker.
            return {"refused": int(PairReason.REFUSED_BY_KERNEL)}
        obstacle = splice_sockets.obstacle(*ends)
        if obstacle is not None:
            return {"refused": int(obstacle)}
        if not all(map(splice_sockets.is_of_our_network, (client, server))):
            # In a network of its own a worker could give its sockets any addresses.
            return {"refused": int(PairReason.NOT_ELIGIBLE)}
        index = self._allocate()
        if index < 0:
            return {"refused": int(PairReason.MAP_FULL)}
        record = Splice()
        record.id, record.worker, record.slot = pair_id, worker, slot
        record.keep_idle_s, record.keep_interval_s, record.keep_count = keepalive
        splice_sockets.describe(record, *ends)
        try:
            try:
                obstacle = self._find_ways(index, record, any_interface=any_interface)
            except OSError:  # no program can be attached there; nothing has begun
                obstacle = PairReason.REFUSED_BY_KERNEL
            if obstacle is not None:
                self._free.append(index)
                return {"refused": int(obstacle)}
            # Before the look at the peers: of two forwarders that join at the same moment, one
            # behind the other, at least one sees the other's mark.
            for sock in (client, server):
                splice_sockets.mark(sock)
            for direction in Direction:
                record.way[direction].pending = pending[direction]
            record.state = SpliceState.ARMED
            self._write(index, record)
            self._owner[index] = worker
            self._remember_joined(index, (client, server))
            for direction in Direction:
                self._flows.update(bytes(record.way[direction].from_), FLOW.pack(index, direction))
            busy = self._switch(index, client, server, until_s=until_s)
        except OSError:
            if index in self._owner:
                self._forget(index)
            else:
                self._free.append(index)
            raise
        if busy:
            self._forget(index)
            for sock in (client, server):
                splice_sockets.unmark(sock)
            if busy & Busy.LATE:
                return {"late": True}
            if busy & Busy.FOREIGN:
                return {"refused": int(PairReason.CHAINED)}
            if busy & Busy.COARSE:
                return {"refused": int(PairReason.SMALL_WINDOW)}
            return {"busy": busy}
        self._keepalives.watch([index])
        unread = [way.unread for way in self._record(index).way]
        mute = False
        # It has begun, whatever becomes of that: it is asked for again.
        with contextlib.suppress(OSError):
            mute = self._mute(index, (client, server))
        return {"busy": 0, "index": index, "unread": unread, "mute": mute}

    def _learn(self, client: socket.socket, server: socket.socket) -> bool:
        """How the server of a pair is reached, for express; whether that is of use to it.

        By what makes a pair be spliced: packets that come from there were seen, under these
        addresses.
        """
        if self._express is None or not all(
            map(splice_sockets.is_of_our_network, (client, server))
        ):
            return False
        ends = splice_sockets.End.of(client), splice_sockets.End.of(server)
        there = ends[1]
        if splice_sockets.obstacle(*ends) is not None or there.mark or there.routing:
            return False
        index = self._allocate()
        if index < 0:
            return False
        record = Splice()
        splice_sockets.describe(record, *ends)
        try:
            if self._find_ways(index, record, any_interface=False) is not None:
                return False
        finally:
            self._write(index, Splice())
            self._free.append(index)
        way = record.way[Direction.UP]
        out = record.out[Direction.DOWN]
        headers = splice_sockets.HEADERS_BYTES[there.family]
        target = ExpressTarget(port=way.dport, mss=min(mtu_of(out), 0xFFFF) - headers, out=out)
        target.source[:], target.server[:] = way.source, way.target
        target.by[:] = record.way[Direction.DOWN].by
        found = ExpressServer(there.peer, way.dport, there.family)
        return self._express.learn(found, target, time.monotonic())

    def _find_ways(self, index: int, record: Splice, *, any_interface: bool) -> PairReason | None:
        """Write by which interfaces the packets go; or why the programs would not see them.

        And by which they may come: that of the handshake, and that of our route to the peer.
        """
        self._write(index, record)  # FREE: for the probe alone
        handshakes = [self._handshake(bytes(way.from_)) for way in record.way]
        for _ in range(_LOOKS):
            bpf.run_program(self._maps.probe_fd, _INDEX.pack(index, 0))
            seen = self._record(index)
            # The same addresses may have been those of another connection, before.
            is_its_own = [
                handshake is not None and handshake.isn == isn
                for handshake, isn in zip(handshakes, seen.isn, strict=True)
            ]
            # A byte that comes just now is in one of the numbers that make up the ISN and not yet
            # in the other.
            if all(is_its_own) or None in handshakes:
                break
        out = list(seen.out)
        if not all(out):
            return PairReason.REFUSED_BY_KERNEL  # a route has just changed
        came_by = [
            handshake.interface if handshake is not None and is_own else 0
            for handshake, is_own in zip(handshakes, is_its_own, strict=True)
        ]
        for interface in out:
            if not self._maps.links.add(interface):
                is_taken = interface in self._maps.links.refusals
                return PairReason.INTERFACE_TAKEN if is_taken else PairReason.NOT_ETHERNET
        if not all(came_by):
            for interface in out:
                self._maps.links.put_back(interface)
            return PairReason.HANDSHAKE_UNSEEN
        for direction in Direction:
            stays = came_by[direction] == LOOPBACK and out[1 - direction] == LOOPBACK
            record.way[direction].interface = 0 if stays else out[1 - direction]
            record.out[direction] = out[direction]
            if not any_interface:
                record.way[direction].by[:] = came_by[direction], out[direction]
        return None

    def _handshake(self, key: bytes) -> SpliceHandshake | None:
        """How the last connection began whose packets came from these addresses, if it was seen."""
        try:
            return SpliceHandshake.from_buffer_copy(self._handshakes.lookup(key))
        except FileNotFoundError:
            return None

    def _switch(
        self, index: int, client: socket.socket, server: socket.socket, *, until_s: float
    ) -> int:
        """Let it begin, soon after `until_s` at the latest; 0, or why not."""
        struct.pack_into(
            "=II",
            self._memory,
            index * SPLICE_BYTES + _CLOCKS_AT,
            splice_sockets.clock(client),
            splice_sockets.clock(server),
        )
        # The worker may have said anything.
        until_ns = int(min(begins_until_s(until_s) * 1e9, _NEVER_NS))
        return bpf.run_program(self._maps.control_fd, _BEGINNING.pack(index, 0, until_ns))

    def _mute(self, index: int, sockets: Sequence[socket.socket]) -> bool:
        """Make the sockets mute if nothing is left to be sent again; whether that was done.

        Until then closing them resets the pair, as long as the peers lack some of it: that is what
        must happen if we all die.
        """
        if any(way.tail_open for way in self._record(index).way):
            bpf.run_program(self._maps.probe_fd, _INDEX.pack(index, 0))
            if any(way.tail_open for way in self._record(index).way):
                return False
        said = [splice_sockets.mute(sock) for sock in sockets]  # also the second, if not the first
        return all(said)

    def _tell_of_narrow_interface(self, index: int) -> None:
        """Have the peers know whose packets our own interfaces do not take any more."""
        record = self._record(index)
        for direction in Direction:
            way = record.way[direction]
            if way.narrow_mtu:
                at = Splice.way.offset + direction * ctypes.sizeof(SpliceDirection)
                self._store(index, at + SpliceDirection.narrow_mtu.offset, 0)
                splice_sockets.send_too_long(way, record.family)

    def _end(self, index: int, why: ResetBy) -> None:
        """Have the worker reset a pair, or the one that adopts it."""
        self._store(index, _RESET_AT, why)
        bpf.run_program(self._maps.probe_fd, _INDEX.pack(index, 1))

    # Going on without those who began it

    def _bury(self, worker: int) -> None:
        """A worker died: its spliced pairs go on, and are its successor's."""
        for index in self._of(worker):
            record = self._record(index)
            if record.state == SpliceState.ACTIVE:
                at = record.slot * PAIR_BYTES
                said = self._pairs[at : at + PAIR_BYTES] if record.slot != NO_SLOT else b""
                self._orphans[index] = self._given.pop(index, said)
                self._store(index, SLOT_AT, NO_SLOT)
            else:
                self._forget(index)

    def _adopt(self, worker: int, given: list[socket.socket]) -> dict[str, object]:
        """One pair that has no worker, with two new sockets; {} if there is none left.

        `later`: some are left whose old sockets are still there, with a worker that hands them
        over, or ends. `more`: there may be others that can be had now.
        """
        now_s = time.monotonic()
        for _ in range(_TRIED_AT_ONCE):
            index = next((one for one in self._orphans if self._is_due(one, worker, now_s)), None)
            if index is None:
                is_left = any(self._owner.get(one) == worker for one in self._orphans)
                return {"later": True} if is_left else {}
            said = self._orphans.pop(index)
            record = self._record(index)
            try:
                given.extend(self._standby.sockets_of(index) or ())
                if not given:
                    given.extend(splice_sockets.revive(way, record.family) for way in record.way)
                self._remember_joined(index, given)
            except OSError as error:
                for sock in given:
                    sock.close()
                given.clear()
                first_s, _ = self._in_use.get(index, (now_s, now_s))
                if error.errno in _IN_USE and now_s - first_s < scaled_s(_IN_USE_S):
                    self._orphans[index] = said  # behind all others
                    self._in_use[index] = first_s, now_s
                else:
                    # Nobody could end it any more: it ends now, by the kernel's RST.
                    self._forget(index)
                continue
            self._in_use.pop(index, None)
            self._given[index] = said
            return {"index": index, "id": record.id, "record": said.hex()}
        return {"more": True}

    def _is_due(self, index: int, worker: int, now_s: float) -> bool:
        """Whether it is the worker's, and has not been tried a moment ago."""
        if self._owner.get(index) != worker:
            return False
        tried = self._in_use.get(index)
        pause_s = _TRY_AGAIN_S + _TRY_EACH_S * len(self._in_use)
        return tried is None or now_s - tried[1] >= pause_s

    def _take_back(self, worker: int, do: str, answer: dict[str, object]) -> None:
        """What was to be given to a worker it has not got: it is given when it asks again."""
        index = answer.get("index")
        if not isinstance(index, int):
            return
        if do == "adopt" and index in self._given:
            self._orphans[index] = self._given.pop(index)
        elif do == "adopt_session":
            self._sessions.take_back(worker, index)

    def _is_had(self, index: int) -> None:
        """A pair's worker has it, and needs not be given it any more.

        What the keeper before had given it is an orphan to this one, until it hears so.
        """
        self._given.pop(index, None)
        self._orphans.pop(index, None)
        self._in_use.pop(index, None)

    def _take_over(
        self, worker: int, index: int, sockets: Sequence[socket.socket]
    ) -> dict[str, object]:
        """The same of one whose sockets its worker has, from the daemon before.

        {}: it is not the worker's, or these are not its sockets.
        """
        # A worker that has not heard the answer asks again.
        is_due = index in self._orphans or index in self._given
        if not is_due or self._owner[index] != worker:
            return {}
        record, seen = self._record(index), Splice()
        splice_sockets.describe(seen, *map(splice_sockets.End.of, sockets))
        are_its = all(
            bytes(was.from_) == bytes(now.from_)
            for was, now in zip(record.way, seen.way, strict=True)
        )
        if not are_its or not all(map(splice_sockets.is_of_our_network, sockets)):
            # Not the fault of who asks: it hands on what a worker of the daemon before has sent.
            return {}
        self._in_use.pop(index, None)
        said = self._given[index] = self._orphans.pop(index, b"") or self._given.get(index, b"")
        self._remember_joined(index, sockets)
        return {"index": index, "id": record.id, "record": said.hex()}

    # Other machines' pairs (see `_StandbyOwner`)

    def take_in(self, index: int, said: bytes, worker: int | None = None) -> int:
        """It was another machine's, and is a worker's from now on, which is to adopt it."""
        if worker is None:
            worker = index % self._maps.workers
        self._store(index, WORKER_AT, worker)
        self._owner[index], self._orphans[index] = worker, said
        self._ways.changed()
        return worker

    def keep_alive(self, index: int) -> None:
        """Its peers are asked from now on, if they are to be."""
        self._keepalives.watch([index])

    def owns(self, index: int) -> bool:
        """Whether a worker has it, or is to adopt it."""
        return index in self._owner

    def let_go(self, index: int) -> None:
        """It goes through another machine: nothing is said to its ends any more."""
        forget_flows(self._flows, index, self._record(index))
        if index in self._orphans:
            self._forget(index)
        else:
            self._end(index, ResetBy.MOVED)

    # Sockets

    def _remember_joined(self, index: int, sockets: Sequence[socket.socket]) -> None:
        cookies = [splice_sockets.cookie(sock) for sock in sockets]
        _COOKIES.pack_into(self._cookies, index * _COOKIES.size, *cookies)

    def _are_joined(self, index: int, sockets: Sequence[socket.socket]) -> bool:
        """Whether these are the sockets of the pair, client's and server's."""
        joined = _COOKIES.unpack_from(self._cookies, index * _COOKIES.size)
        return joined == tuple(map(splice_sockets.cookie, sockets))

    # Records

    def _of(self, worker: int) -> list[int]:
        return [index for index, owner in self._owner.items() if owner == worker]

    def _record(self, index: int) -> Splice:
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)

    def _write(self, index: int, record: Splice) -> None:
        base = index * SPLICE_BYTES
        self._memory[base : base + SPLICE_BYTES] = bytes(record)

    def _store(self, index: int, at: int, number: int) -> None:
        struct.pack_into("=I", self._memory, index * SPLICE_BYTES + at, number)

    def _allocate(self) -> int:
        while not self._free and self._lingering:
            self._forget(self._lingering.popleft()[1])
        return self._free.popleft() if self._free else -1

    def _forget(self, index: int) -> None:
        """Take it out of the kernel's sight; what its peers still send is answered with RST."""
        forget_flows(self._flows, index, self._record(index))
        set_state(self._memory, index, SpliceState.FREE)
        self._standby.forgotten(index)
        self._owner.pop(index, None)
        self._orphans.pop(index, None)
        self._given.pop(index, None)
        self._in_use.pop(index, None)
        if self._express is not None and index >= self._first_place:
            self._express.freed(index)
        else:
            self._free.append(index)

    def _forget_due(self) -> None:
        now_s = time.monotonic()
        for queue in (self._lingering, self._resetting):
            while queue and queue[0][0] <= now_s:
                self._forget(queue.popleft()[1])
        self._sessions.go_on(now_s)


class _StandbyOwner:
    """What `Standby` may have the keeper do."""

    def __init__(self, keeper: Keeper) -> None:
        self.allocate = keeper._allocate
        self.take_in = keeper.take_in
        self.owns = keeper.owns
        self.let_go = keeper.let_go
        self.forget = keeper._forget
        self.end = keeper._end
        self.remember_joined = keeper._remember_joined


class _ExpressOwner:
    """What `ExpressKeeper` may have the keeper do."""

    def __init__(self, keeper: Keeper) -> None:
        self.take_in = keeper.take_in
        self.keep_alive = keeper.keep_alive


class KeeperProcess:
    """The keeper, from fork to wait, and again if it dies."""

    def __init__(
        self,
        maps: SpliceMaps,
        *,
        workers: int,
        close_in_child: Callable[[], None],
        express: Express | None = None,
    ) -> None:
        """Make what it and the workers share; `start` forks it.

        `clients[n]` is worker n's end, which its replacement inherits.
        """
        self._maps = maps
        self._express = express
        self._close_in_child = close_in_child
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.clients = [ours for ours, _ in pairs]
        # Kept for the keeper that comes after one that died.
        self._ends = [theirs for _, theirs in pairs]
        self._pulse = mmap.mmap(-1, _PULSE.size)
        self._cookies = mmap.mmap(-1, maps.entries * _COOKIES.size)
        # Readable: a byte for each time that a worker has asked for what it may not.
        self.complaints_fd, self._complaints_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Where other machines' pairs are told of, and their addresses; set before `start`.
        self.standby, self._standby_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.standby_addresses: Sequence[str] = ()
        self._last_pulse = -1
        self._still = 0  # looks at it that found it as it was before
        self.pid = 0

    def start(self) -> None:
        """Fork it, once the programs are attached; it takes over what they have found."""
        self._start(self._maps.found)

    def _start(self, found: Sequence[Found]) -> None:
        self.pid = fork(lambda: self._child(found))

    def _child(self, found: Sequence[Found]) -> int:
        # It ends with us, however we end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for ours in (*self.clients, self.standby):
            ours.close()
        # A reader of our output waits for an end of file that the last holder brings.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)
        self._close_in_child()
        os.close(self.complaints_fd)
        Keeper(
            self._maps,
            self._ends,
            found,
            self._pulse,
            self._cookies,
            self._complaints_end,
            self._standby_end,
            self.standby_addresses,
            self._express if self._express and self._express.has_begun else None,
        ).serve()
        return 0

    def restart(self) -> None:
        """Put another in the place of one that died; it knows what that one knew."""
        self._still = 0
        self._start(())

    def complaints(self) -> set[int]:
        """The workers that have asked for what they may not, since the last call."""
        found: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self.complaints_fd, 4096):
                found.update(said)
        return found

    def has_died(self) -> bool:
        """Whether it has ended by itself since the last call; reaps it."""
        if not self.pid:
            return False
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.pid = 0
        return bool(pid)

    def hangs(self) -> bool:
        """Whether it has done nothing since the last call but one.

        One such look is not enough: the whole daemon may have been stopped, and the first to go on
        is the one who looks. Call it more seldom than every `_PULSE_S`.
        """
        (pulse,) = _PULSE.unpack_from(self._pulse)
        self._still = self._still + 1 if self.pid and pulse == self._last_pulse else 0
        self._last_pulse = pulse
        return self._still >= 2

    def kill(self) -> None:
        """End one that hangs; `has_died` tells of it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def keep_only(self, worker: int) -> None:
        """In a worker: close the ends of all others."""
        for other, sock in enumerate(self.clients):
            if other != worker:
                sock.close()
        for sock in (*self._ends, self.standby, self._standby_end):
            sock.close()
        for fd in (self.complaints_fd, self._complaints_end):
            os.close(fd)
        self._pulse.close()
        self._cookies.close()

    def close(self) -> None:
        """End it."""
        for sock in (*self.clients, *self._ends, self.standby, self._standby_end):
            sock.close()
        for fd in (self.complaints_fd, self._complaints_end):
            os.close(fd)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Splicing:
    """The kernel's part and the keeper, as the supervisor has them and its workers inherit them."""

    def __init__(
        self,
        maps: SpliceMaps,
        *,
        workers: int,
        close_in_child: Callable[[], None] = lambda: None,
        express: Express | None = None,
    ) -> None:
        """The maps are ours to close from here on; where programs are attached the keeper starts.

        Otherwise it does with `begin`. What workers need they can inherit before.
        """
        self.maps = maps
        self.express = express
        self.keeper = KeeperProcess(
            maps, workers=workers, close_in_child=close_in_child, express=express
        )
        self.has_begun = maps.is_attached
        if self.has_begun:
            self.keeper.start()

    def begin(self, programs: Programs) -> None:
        """Attach the programs, which are ours from here on, and start the keeper.

        Raises:
            LoadError: they cannot be attached.
        """
        self.maps.attach(programs)
        self.keeper.start()
        self.has_begun = True

    def asker(self, worker: int, loop: Loop, *, is_patient: bool = False) -> KeeperAsker:
        """Where this worker asks; `is_patient`: where nobody else is served meanwhile."""
        return KeeperAsker(loop, self.keeper.clients[worker], is_patient=is_patient)

    def client(self, worker: int) -> KeeperClient:
        """Where is asked in the name of a worker that is not there."""
        return KeeperClient(self.keeper.clients[worker])

    def patient_client(self, worker: int) -> KeeperClient:
        """The same for where nobody else waits meanwhile."""
        return KeeperClient(self.keeper.clients[worker], is_patient=True)

    def keep_only(self, worker: int) -> None:
        """In a worker, which has its datapath: close what could be used against other pairs."""
        self.keeper.keep_only(worker)
        self.maps.keep_only(worker)
        if self.express is not None:
            self.express.keep_only(worker)

    def clear(self, worker: int) -> None:
        """Forget what a worker has spliced, as if it had never been.

        Raises:
            KeeperError: the keeper does not answer.
        """
        self.patient_client(worker).ask("clear")

    def bury(self, worker: int) -> None:
        """A worker died: its pairs wait for the next; call it while its table is as it left it.

        Raises:
            KeeperError: the keeper does not answer.
        """
        if self.has_begun:
            self.client(worker).ask("bury")

    def hand_over(self) -> None:
        """End the keeper, and leave everything else to the daemon that takes our place."""
        self.keeper.close()
        self.maps.close()
        if self.express is not None:
            self.express.close()

    def close(self) -> None:
        """End the keeper; the programs leave the interfaces, and pairs that are left get a RST."""
        self.keeper.close()
        if (
            self.maps.is_attached
            and self.maps.links.is_pinned
            and self.maps.links.directory is not None
        ):
            unpin(self.maps.links.directory)
        self.maps.close()
        if self.express is not None:
            self.express.close()


def splice_memory(maps: SpliceMaps) -> mmap.mmap:
    """The records, for reading."""
    return bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)


def pins_of(directory: Path) -> Path:
    """Where an instance whose pins are in `directory` has those of splice."""
    return directory / "splice"
