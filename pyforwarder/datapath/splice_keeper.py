"""The process that begins and ends splices.

That needs privileges (TCP_REPAIR, BPF_PROG_TEST_RUN) and must be quick, so it is neither the
worker's nor the supervisor's: the keeper is a process of its own that does only this. A worker asks
over its own socket and waits for the answer. It is not trusted: addresses come from the sockets
that it hands over, never from its words, and it reaches only splices it began.

All the keeper knows stands in the records, too. So one that died is replaced by one that reads
them, and pairs whose worker or whole daemon died go on, and are given to whoever comes next.

Nobody waits long for a keeper that hangs: a request says until when it must have been read, and is
not obeyed any more later on. So whoever waited knows that nothing was begun, and goes on without.
The supervisor replaces such a keeper.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import select
import signal
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pyforwarder.datapath import bpf, splice_sockets
from pyforwarder.datapath.abi import PAIR_BYTES, Direction
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.splice_abi import (
    NO_SLOT,
    SPLICE_BYTES,
    Busy,
    Splice,
    SpliceHandshake,
    SpliceState,
)
from pyforwarder.datapath.splice_maps import (
    FLOW,
    ID_AT,
    KEY_BYTES,
    LOOPBACK,
    SLOT_AT,
    WORKER_AT,
    Found,
    SpliceMaps,
    forget_flows,
    set_state,
    unpin,
    used_indexes,
)
from pyforwarder.descriptors import duplicate_socket
from pyforwarder.errors import DatapathError

_PR_SET_PDEATHSIG: Final = 1
# Within that a request must have been read; whatever was read in time is done soon.
_READ_TIMEOUT_S: Final = 0.25
_ANSWER_TIMEOUT_S: Final = 2.0
# It shows at least so often that it lives.
_PULSE_S: Final = 1.0
# TCP keeps a closed connection's ports for TIME_WAIT: so long a FIN may come again.
_LINGER_S: Final = 60.0
_RESET_LINGER_S: Final = 2.0
_MOST_MESSAGE_BYTES: Final = 8192

_numbers: Final = itertools.count()  # of what this process has asked, whoever in it
# How often a pair is looked at whose handshake seems to be another's.
_LOOKS: Final = 4
_PULSE: Final = struct.Struct("=I")
_INDEX: Final = struct.Struct("=14xI46x")  # what the programs that are run read it from
_HANDSHAKE_BYTES: Final = ctypes.sizeof(SpliceHandshake)
_CLOCKS_AT: Final = Splice.client_clock.offset


class KeeperError(DatapathError):
    """The keeper did not answer."""


class KeeperClient:
    """A worker's end: asks, and waits for the answer.

    While the keeper has not even read what it was asked last, it is not asked again, and nobody
    waits.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_silent = False

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        """The keeper's answer; a `join` that it has not read in time is refused.

        Raises:
            KeeperError: there was none.
        """
        answer, given = self.ask_for_sockets(do, fds, **fields)
        for fd in given:
            os.close(fd)
        return answer

    def ask_for_sockets(
        self, do: str, fds: Sequence[int] = (), **fields: object
    ) -> tuple[dict[str, Any], list[int]]:
        """The same, and the descriptors that came with it, which are the caller's."""
        try:
            if not (self._is_silent and self._is_unread()):
                answer, given = self._ask(do, fds, fields)
                self._is_silent = "late" in answer
                if not self._is_silent:
                    return answer, given
        except OSError as error:
            raise KeeperError("ask the splice keeper", error.errno or errno.ETIMEDOUT) from error
        if do == "join":  # nothing was begun
            return {"refused": int(PairReason.NO_KEEPER)}, []
        raise KeeperError("ask the splice keeper", errno.ETIMEDOUT)

    def _ask(
        self, do: str, fds: Sequence[int], fields: dict[str, object]
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer; {"late": ...} if the request has not been and will not be obeyed."""
        # What was given up, or asked by another worker, dead by now, may still be answered.
        number = os.getpid() << 32 | next(_numbers)
        request = {"do": do, "n": number, "until": time.monotonic() + _READ_TIMEOUT_S, **fields}
        self._sock.settimeout(_READ_TIMEOUT_S)
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
            return self._answer(number)
        except TimeoutError:
            if self._is_unread():
                return {"late": True}, []
        self._sock.settimeout(_ANSWER_TIMEOUT_S)
        return self._answer(number)

    def _answer(self, number: int) -> tuple[dict[str, Any], list[int]]:
        while True:
            data, given, _, _ = socket.recv_fds(self._sock, _MOST_MESSAGE_BYTES, 2)
            for fd in given:
                os.set_inheritable(fd, False)
            if not data:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            answer: dict[str, Any] = json.loads(data)
            if answer["n"] == number:
                return answer, given
            for fd in given:
                os.close(fd)

    def _is_unread(self) -> bool:
        """Whether anything that was asked is still in the keeper's queue."""
        left = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return any(left)


class Keeper:
    """The keeper's process: serves until all clients are gone or it is killed."""

    def __init__(
        self,
        maps: SpliceMaps,
        socks: Sequence[socket.socket],
        found: Sequence[Found],
        pulse: mmap.mmap,
    ) -> None:
        """`socks[n]` is where worker n asks; `found` is what goes on from an earlier daemon.

        `pulse` is a number that grows as long as this works.
        """
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
        self._owner: dict[int, int] = {}  # index -> worker
        # Pairs without a worker: index -> what `show` said of them.
        self._orphans: dict[int, bytes] = {one.index: one.record for one in found}
        # Ended, oldest first, each with the moment at which its ports are forgotten.
        self._lingering: deque[tuple[float, int]] = deque()
        self._resetting: deque[tuple[float, int]] = deque()
        used = set(used_indexes(self._memory))
        self._free = deque(index for index in range(maps.entries) if index not in used)
        now_s = time.monotonic()
        for index in sorted(used):
            record = self._record(index)
            if record.state == SpliceState.RESET:
                self._resetting.append((now_s + _RESET_LINGER_S, index))
            elif record.state != SpliceState.ACTIVE:
                self._forget(index)  # whoever was about to begin it has given up
            elif not record.id:
                self._lingering.append((now_s + _LINGER_S, index))
            else:
                self._owner[index] = record.worker % maps.workers
                if record.slot == NO_SLOT:  # another keeper had not given it to anybody yet
                    self._orphans.setdefault(index, b"")

    def serve(self) -> None:
        """Answer until every worker's end is closed."""
        poll = select.poll()
        workers = {}
        for worker, sock in enumerate(self._socks):
            poll.register(sock, select.POLLIN)
            workers[sock.fileno()] = worker
        while workers:
            for fd, _ in poll.poll(_PULSE_S * 1000):
                if not self._answer(workers[fd]):
                    poll.unregister(fd)
                    del workers[fd]
            self._forget_due()
            (number,) = _PULSE.unpack_from(self._pulse)
            _PULSE.pack_into(self._pulse, 0, number + 1)

    def _answer(self, worker: int) -> bool:
        """Serve one request; False once the worker's end is gone for good."""
        sock = self._socks[worker]
        try:
            data, fds, _, _ = socket.recv_fds(sock, _MOST_MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        if not data:
            return False
        sockets: list[socket.socket] = []
        given: list[socket.socket] = []
        try:
            request = json.loads(data)
            answer: dict[str, object] = {"n": request["n"]}
            try:
                sockets.extend(duplicate_socket(fd) for fd in fds)
                # Asked now, as it was read before: whoever finds it unread then may give it up.
                if time.monotonic() > request["until"]:
                    answer["late"] = True
                else:
                    answer.update(self._obey(worker, request, sockets, given))
            except (OSError, ValueError, TypeError, KeyError) as error:
                answer["error"] = repr(error)
            rights = array.array("i", [one.fileno() for one in given])
            said = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if given else []
            # A worker that reads no answers must not keep the others waiting.
            sock.sendmsg([json.dumps(answer).encode()], said, socket.MSG_DONTWAIT)
        except (OSError, ValueError, TypeError, KeyError):
            pass  # no sense, or nobody is there any more
        finally:
            for one in (*sockets, *given):
                one.close()
            for fd in fds:
                os.close(fd)
        return True

    def _obey(
        self,
        worker: int,
        request: dict[str, Any],
        sockets: list[socket.socket],
        given: list[socket.socket],
    ) -> dict[str, object]:
        """Do what a worker asks; what is appended to `given` goes to it."""
        match request["do"]:
            case "clear":
                for index in self._of(worker):
                    if index not in self._orphans:
                        self._forget(index)
                return {}
            case "bury":
                self._bury(worker)
                return {}
            case "adopt":
                return self._adopt(worker, given)
            case "join":
                slot = int(request["slot"])
                if slot // self._maps.slots != worker:
                    raise ValueError("not yours")
                pending = [int(count) for count in request["pending"]]
                return self._join(worker, int(request["id"]), slot, pending, *sockets)
        index = int(request["index"])
        if self._owner.get(index) != worker or index in self._orphans:
            raise ValueError("not yours")
        match request["do"]:
            case "adopted":
                slot = int(request["slot"])
                if slot // self._maps.slots != worker:
                    raise ValueError("not yours")
                self._store(index, WORKER_AT, worker)
                self._store(index, SLOT_AT, slot)
            case "mute":
                return {"mute": self._mute(index, sockets)}
            case "abort":
                self._forget(index)
                for sock in sockets:
                    splice_sockets.unmark(sock)
            case "leave":
                for sock in sockets:
                    splice_sockets.mute(sock)
                del self._owner[index]
                # The pair's record may be another's now: nothing is counted in it any more.
                struct.pack_into("=Q", self._memory, index * SPLICE_BYTES + ID_AT, 0)
                self._lingering.append((time.monotonic() + _LINGER_S, index))
            case "reset":
                set_state(self._memory, index, SpliceState.RESET)
                for sock in sockets:
                    splice_sockets.unmute(sock)
                del self._owner[index]
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
    ) -> dict[str, object]:
        try:
            ends = splice_sockets.End.of(client), splice_sockets.End.of(server)
        except OSError:
            # A peer's reset is on its way to the worker.
            return {"refused": int(PairReason.REFUSED_BY_KERNEL)}
        obstacle = splice_sockets.obstacle(*ends)
        if obstacle is not None:
            return {"refused": int(obstacle)}
        index = self._allocate()
        if index < 0:
            return {"refused": int(PairReason.MAP_FULL)}
        record = Splice()
        record.id, record.worker, record.slot = pair_id, worker, slot
        splice_sockets.describe(record, *ends)
        try:
            obstacle = self._find_ways(index, record)
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
            for direction in Direction:
                self._flows.update(bytes(record.way[direction].from_), FLOW.pack(index, direction))
            busy = self._switch(index, client, server)
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
            if busy & Busy.FOREIGN:
                return {"refused": int(PairReason.CHAINED)}
            return {"busy": busy}
        unread = [way.unread for way in self._record(index).way]
        mute = self._mute(index, (client, server))
        return {"busy": 0, "index": index, "unread": unread, "mute": mute}

    def _find_ways(self, index: int, record: Splice) -> PairReason | None:
        """Write by which interfaces the packets go; or why the programs would not see them."""
        self._write(index, record)  # FREE: for the probe alone
        handshakes = [self._handshake(bytes(way.from_)) for way in record.way]
        for _ in range(_LOOKS):
            bpf.run_program(self._maps.probe_fd, _INDEX.pack(index))
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
                return PairReason.NOT_ETHERNET
        if not all(came_by):
            for interface in out:
                self._maps.links.put_back(interface)
            return PairReason.HANDSHAKE_UNSEEN
        for direction in Direction:
            stays = came_by[direction] == LOOPBACK and out[1 - direction] == LOOPBACK
            record.way[direction].interface = 0 if stays else out[1 - direction]
            record.out[direction] = out[direction]
        return None

    def _handshake(self, key: bytes) -> SpliceHandshake | None:
        """How the last connection began whose packets came from these addresses, if it was seen."""
        try:
            return SpliceHandshake.from_buffer_copy(self._handshakes.lookup(key))
        except FileNotFoundError:
            return None

    def _switch(self, index: int, client: socket.socket, server: socket.socket) -> int:
        """Let it begin; 0, or why not."""
        struct.pack_into(
            "=II",
            self._memory,
            index * SPLICE_BYTES + _CLOCKS_AT,
            splice_sockets.clock(client),
            splice_sockets.clock(server),
        )
        return bpf.run_program(self._maps.control_fd, _INDEX.pack(index))

    def _mute(self, index: int, sockets: Sequence[socket.socket]) -> bool:
        """Make the sockets mute if nothing is left to be sent again; whether that was done.

        Until then closing them resets the pair: that is what must happen if we all die.
        """
        if any(way.tail_open for way in self._record(index).way):
            bpf.run_program(self._maps.probe_fd, _INDEX.pack(index))
            if any(way.tail_open for way in self._record(index).way):
                return False
        for sock in sockets:
            splice_sockets.mute(sock)
        return True

    # Going on without those who began it

    def _bury(self, worker: int) -> None:
        """A worker died: what it had spliced goes on, and is its successor's."""
        for index in self._of(worker):
            record = self._record(index)
            if record.state == SpliceState.ACTIVE:
                at = record.slot * PAIR_BYTES
                self._orphans[index] = self._pairs[at : at + PAIR_BYTES]
                self._store(index, SLOT_AT, NO_SLOT)
            else:
                self._forget(index)

    def _adopt(self, worker: int, given: list[socket.socket]) -> dict[str, object]:
        """One pair that has no worker, with two new sockets; {} if there is none left."""
        for index in [index for index in self._orphans if self._owner[index] == worker]:
            said = self._orphans.pop(index)
            record = self._record(index)
            try:
                given.extend(splice_sockets.revive(way, record.family) for way in record.way)
            except OSError:
                # Nobody could end it any more: it ends now, by the kernel's RST.
                for sock in given:
                    sock.close()
                given.clear()
                self._forget(index)
                continue
            return {"index": index, "id": record.id, "record": said.hex()}
        return {}

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
        if not self._free and self._lingering:
            self._forget(self._lingering.popleft()[1])
        return self._free.popleft() if self._free else -1

    def _forget(self, index: int) -> None:
        """Take it out of the kernel's sight; what its peers still send is answered with RST."""
        forget_flows(self._flows, index, self._record(index))
        set_state(self._memory, index, SpliceState.FREE)
        self._owner.pop(index, None)
        self._orphans.pop(index, None)
        self._free.append(index)

    def _forget_due(self) -> None:
        now_s = time.monotonic()
        for queue in (self._lingering, self._resetting):
            while queue and queue[0][0] <= now_s:
                self._forget(queue.popleft()[1])


class KeeperProcess:
    """The keeper, from fork to wait, and again if it dies."""

    def __init__(
        self, maps: SpliceMaps, *, workers: int, close_in_child: Callable[[], None]
    ) -> None:
        """Fork it; `clients[n]` is worker n's end, which its replacement inherits."""
        self._maps = maps
        self._close_in_child = close_in_child
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.clients = [ours for ours, _ in pairs]
        # Kept for the keeper that comes after one that died.
        self._ends = [theirs for _, theirs in pairs]
        self._pulse = mmap.mmap(-1, _PULSE.size)
        self._last_pulse = -1
        self._still = 0  # looks at it that found it as it was before
        self.pid = 0
        self._start(maps.found)

    def _start(self, found: Sequence[Found]) -> None:
        self.pid = os.fork()
        if self.pid != 0:
            return
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            # It ends with us, however we end.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for ours in self.clients:
                ours.close()
            # Whoever reads our output waits for an end of file that the last holder brings.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (null, 0, 1):
                os.dup2(null, fd)
            self._close_in_child()
            Keeper(self._maps, self._ends, found, self._pulse).serve()
            code = 0
        finally:
            os._exit(code)

    def restart(self) -> None:
        """Put another in the place of one that died; it knows what that one knew."""
        self._still = 0
        self._start(())

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
        for sock in self._ends:
            sock.close()
        self._pulse.close()

    def close(self) -> None:
        """End it."""
        for sock in (*self.clients, *self._ends):
            sock.close()
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
    ) -> None:
        """Start the keeper; the maps are ours to close from here on."""
        self.maps = maps
        self.keeper = KeeperProcess(maps, workers=workers, close_in_child=close_in_child)

    def client(self, worker: int) -> KeeperClient:
        """Where this worker asks."""
        return KeeperClient(self.keeper.clients[worker])

    def keep_only(self, worker: int) -> None:
        """In a worker, which has its datapath: close what could be used against other pairs."""
        self.keeper.keep_only(worker)
        self.maps.keep_only(worker)

    def clear(self, worker: int) -> None:
        """Forget what a worker has spliced, as if it had never been.

        Raises:
            KeeperError: the keeper does not answer.
        """
        self.client(worker).ask("clear")

    def bury(self, worker: int) -> None:
        """A worker died: its pairs wait for the next; call it while its table is as it left it.

        Raises:
            KeeperError: the keeper does not answer.
        """
        self.client(worker).ask("bury")

    def close(self) -> None:
        """End the keeper; the programs leave the interfaces, and pairs that are left get a RST."""
        self.keeper.close()
        self.maps.close()
        if self.maps.links.is_pinned and self.maps.links.directory is not None:
            unpin(self.maps.links.directory)


def splice_memory(maps: SpliceMaps) -> mmap.mmap:
    """The records, for reading."""
    return bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)


def pins_of(directory: Path) -> Path:
    """Where an instance whose pins are in `directory` has those of splice."""
    return directory / "splice"
