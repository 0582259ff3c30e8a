"""What the splice datapath keeps in the kernel, and the process that may change it.

Beginning and ending a splice needs privileges (TCP_REPAIR, BPF_PROG_TEST_RUN) and must be quick, so
it is neither the worker's nor the supervisor's: the keeper is a process of its own that does only
this. A worker asks over its own socket and waits for the answer. It is not trusted: addresses come
from the sockets that it hands over, never from its words, and it reaches only splices it began.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pyforwarder.datapath import bpf, btf
from pyforwarder.datapath.abi import Direction
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.loading import load_programs
from pyforwarder.datapath.splice_abi import (
    SPLICE_BYTES,
    Splice,
    SpliceFlow,
    SpliceKey,
    SpliceState,
)
from pyforwarder.errors import DatapathError, LoadError

FIELDS: Final = {
    "tcp_sock": (
        "rcv_nxt",
        "copied_seq",
        "snd_una",
        "write_seq",
        "out_of_order_queue",
        "rx_opt",
    ),
    "tcp_options_received": ("ts_recent",),
    "sock_common": ("skc_state",),
}
RING_BYTES: Final = 1 << 18

_TCP_REPAIR: Final = 19  # linux/tcp.h; Python has no names for these
_TCP_TIMESTAMP: Final = 24
_REPAIR_ON, _REPAIR_OFF_WITHOUT_PROBE = 1, -1
_PR_SET_PDEATHSIG: Final = 1
_ASK_TIMEOUT_S: Final = 2.0
# TCP keeps a closed connection's ports for TIME_WAIT: so long a FIN may come again.
_LINGER_S: Final = 60.0
_RESET_LINGER_S: Final = 2.0

# struct tcp_info: options and both window scales at 5, the path's MTU at 60, our MSS at 84.
_INFO: Final = struct.Struct("=5xBB53xI20xI")
_OPTION_TIMESTAMPS, _OPTION_ECN = 1, 8
_HEADERS_BYTES: Final = 40

_CONTROL: Final = struct.Struct("=14xI46x")
_KEY: Final = struct.Struct("=4s4sHH")
_FLOW: Final = struct.Struct("=II")
_STATE_AT: Final = Splice.state.offset
_ID_AT: Final = Splice.id.offset
_CLOCKS_AT: Final = Splice.client_clock.offset


class KeeperError(DatapathError):
    """The keeper did not answer."""


@dataclass(frozen=True, slots=True)
class SpliceMaps:
    """The maps, the programs and their links to the interfaces; they end with the descriptors."""

    flows_fd: int
    splices_fd: int
    rings_fd: int
    ring_fds: tuple[int, ...]
    control_fd: int
    link_fds: tuple[int, ...]
    entries: int
    slots: int  # pairs per worker

    @classmethod
    def load(cls, *, workers: int, slots: int, pairs_fd: int) -> SpliceMaps:
        """Make the maps, load the programs and link them to `lo`.

        `pairs_fd` is the pair table, where the programs count.

        Raises:
            LoadError: this host cannot; the message says why and what would help.
        """
        defines = btf.defines(btf.field_offsets(FIELDS))
        # Some more than pairs: one that has ended keeps its place for a while.
        entries = 4 * workers * slots
        opened: list[int] = []
        try:
            flows = bpf.create_map(
                bpf.MapType.HASH,
                key_bytes=_KEY.size,
                value_bytes=_FLOW.size,
                entries=2 * entries,
                flags=bpf.F_NO_PREALLOC,
                name="pf_flows",
            )
            opened.append(flows)
            splices = bpf.create_map(
                bpf.MapType.ARRAY,
                key_bytes=4,
                value_bytes=SPLICE_BYTES,
                entries=entries,
                flags=bpf.F_MMAPABLE,
                name="pf_splices",
            )
            opened.append(splices)
            rings_of: list[int] = []
            for _ in range(workers):
                rings_of.append(
                    bpf.create_map(
                        bpf.MapType.RINGBUF,
                        key_bytes=0,
                        value_bytes=0,
                        entries=RING_BYTES,
                        name="pf_splice_ring",
                    )
                )
                opened.append(rings_of[-1])
            rings = bpf.create_map(
                bpf.MapType.ARRAY_OF_MAPS,
                key_bytes=4,
                value_bytes=4,
                entries=workers,
                inner_map_fd=rings_of[0],
                name="pf_splice_rings",
            )
            opened.append(rings)
            table = bpf.Map(rings, key_bytes=4, value_bytes=4)
            for worker, ring in enumerate(rings_of):
                table.update(worker.to_bytes(4, "little"), ring.to_bytes(4, "little"))
            fds = {
                "MAP_FLOWS_FD": flows,
                "MAP_SPLICES_FD": splices,
                "MAP_RINGS_FD": rings,
                "MAP_PAIRS_FD": pairs_fd,
            }
            ingress, egress, control = load_programs(
                "splice.c",
                [("ingress", "sched_cls"), ("egress", "sched_cls"), ("control", "sched_cls")],
                defines={**defines, **fds},
                map_fds=list(fds.values()),
            )
            opened += [ingress, egress, control]
            lo = socket.if_nametoindex("lo")
            links = []
            for program, kind in (
                (ingress, bpf.AttachType.TCX_INGRESS),
                (egress, bpf.AttachType.TCX_EGRESS),
            ):
                links.append(bpf.link_interface(program, lo, kind))
                opened.append(links[-1])
                os.close(program)
                opened.remove(program)
        except (LoadError, OSError) as error:
            for fd in opened:
                os.close(fd)
            if isinstance(error, LoadError):
                raise
            raise LoadError(
                f"make ready for splice: {error.strerror}",
                advice="it needs root and Linux 6.6 or later (tcx)",
            ) from error
        return cls(flows, splices, rings, tuple(rings_of), control, tuple(links), entries, slots)

    def close(self) -> None:
        """Close the descriptors; the programs leave the interfaces."""
        for fd in (
            *self.link_fds,
            self.flows_fd,
            self.splices_fd,
            self.rings_fd,
            *self.ring_fds,
            self.control_fd,
        ):
            os.close(fd)


class KeeperClient:
    """A worker's end: asks, and waits for the answer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._number = 0

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        """The keeper's answer.

        Raises:
            KeeperError: there was none.
        """
        self._number += 1
        # What another worker, dead by now, asked over this socket may still be answered.
        number = os.getpid() << 32 | self._number
        try:
            self._sock.settimeout(_ASK_TIMEOUT_S)
            socket.send_fds(
                self._sock, [json.dumps({"do": do, "n": number, **fields}).encode()], list(fds)
            )
            while True:
                data = self._sock.recv(4096)
                if not data:
                    raise KeeperError("ask the splice keeper", 32)
                answer: dict[str, Any] = json.loads(data)
                if answer["n"] == number:
                    return answer
        except OSError as error:
            raise KeeperError("ask the splice keeper", error.errno or 0) from error


class Keeper:
    """The keeper's process: serves until all clients are gone or it is killed."""

    def __init__(self, maps: SpliceMaps, socks: Sequence[socket.socket]) -> None:
        """`socks[n]` is where worker n asks."""
        self._socks = list(socks)
        self._flows = bpf.Map(maps.flows_fd, key_bytes=_KEY.size, value_bytes=_FLOW.size)
        self._control_fd = maps.control_fd
        self._memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=True)
        self._slots = maps.slots
        self._free = deque(range(maps.entries))
        self._owner: dict[int, int] = {}  # index -> worker
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        # Ended, oldest first, each with the moment at which its ports are forgotten.
        self._lingering: deque[tuple[float, int]] = deque()
        self._resetting: deque[tuple[float, int]] = deque()

    def serve(self) -> None:
        """Answer until every worker's end is closed."""
        poll = select.poll()
        workers = {}
        for worker, sock in enumerate(self._socks):
            poll.register(sock, select.POLLIN)
            workers[sock.fileno()] = worker
        while workers:
            for fd, _ in poll.poll(1000):
                if not self._hear(workers[fd]):
                    poll.unregister(fd)
                    del workers[fd]
            self._forget_due()

    def _hear(self, worker: int) -> bool:
        sock = self._socks[worker]
        try:
            data, fds, _, _ = socket.recv_fds(sock, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        if not data:
            return False
        sockets: list[socket.socket] = []
        try:
            request = json.loads(data)
            answer: dict[str, object] = {"n": request["n"]}
            try:
                sockets.extend(socket.socket(fileno=os.dup(fd)) for fd in fds)
                answer.update(self._obey(worker, request, sockets))
            except (OSError, ValueError, TypeError, KeyError) as error:
                answer["error"] = repr(error)
            sock.send(json.dumps(answer).encode())
        except (OSError, ValueError, TypeError, KeyError):
            pass  # no sense, or nobody is there any more
        finally:
            for given in sockets:
                given.close()
            for fd in fds:
                os.close(fd)
        return True

    def _obey(
        self, worker: int, request: dict[str, Any], sockets: list[socket.socket]
    ) -> dict[str, object]:
        do = request["do"]
        if do == "hello":
            for index in [i for i, owner in self._owner.items() if owner == worker]:
                self._forget(index)
            return {}
        if do == "join":
            slot = int(request["slot"])
            if slot // self._slots != worker:
                raise ValueError("not yours")
            return self._join(worker, int(request["id"]), slot, *sockets, hold=request["hold"])
        index = int(request["index"])
        if self._owner.get(index) != worker:
            raise ValueError("not yours")
        if do == "switch":
            return {"busy": self._switch(index, *sockets)}
        if do == "abort":
            self._forget(index)
        elif do == "leave":
            del self._owner[index]
            # The pair's record may be another's now: nothing is counted in it any more.
            struct.pack_into("=Q", self._memory, index * SPLICE_BYTES + _ID_AT, 0)
            self._lingering.append((time.monotonic() + _LINGER_S, index))
        elif do == "reset":
            self._set_state(index, SpliceState.RESET)
            for sock in sockets:
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_WITHOUT_PROBE)
            del self._owner[index]
            self._resetting.append((time.monotonic() + _RESET_LINGER_S, index))
        else:
            raise ValueError(do)
        return {}

    def _join(
        self,
        worker: int,
        pair_id: int,
        slot: int,
        client: socket.socket,
        server: socket.socket,
        *,
        hold: bool,
    ) -> dict[str, object]:
        try:
            obstacle, client_info, server_info = _eligible(client, server)
            ends = [_addresses(sock) for sock in (client, server)]
        except OSError:
            # A peer's reset is on its way to the worker.
            return {"refused": int(PairReason.REFUSED_BY_KERNEL)}
        if obstacle is not None:
            return {"refused": int(obstacle)}
        index = self._allocate()
        if index < 0:
            return {"refused": int(PairReason.MAP_FULL)}
        base = index * SPLICE_BYTES
        self._memory[base : base + SPLICE_BYTES] = bytes(SPLICE_BYTES)
        record = Splice()
        record.id, record.worker, record.slot = pair_id, worker, slot
        record.state = SpliceState.HOLD
        scales = (client_info, server_info)
        for direction in Direction:
            way = record.way[direction]
            here, there = ends[direction], ends[1 - direction]
            # A packet comes from the peer of one socket, and goes on as if the other had sent it.
            way.from_.source, way.from_.target = here.peer, here.local
            way.from_.sport, way.from_.dport = here.peer_port, here.local_port
            way.source, way.target = there.local, there.peer
            way.sport, way.dport = there.local_port, there.peer_port
            left, right = scales[direction].peer_scale, scales[1 - direction].own_scale
            both = min(left, right)
            way.shift_left, way.shift_right = left - both, right - both
        self._memory[base : base + SPLICE_BYTES] = bytes(record)
        keys = (bytes(record.way[0].from_), bytes(record.way[1].from_))
        self._owner[index] = worker
        self._keys[index] = keys
        for direction, key in zip(Direction, keys, strict=True):
            self._flows.update(key, _FLOW.pack(index, direction))
        try:
            busy = self._switch(index, client, server)
        except OSError:
            self._forget(index)
            raise
        if busy and not hold:
            self._forget(index)
        return {"busy": busy, "index": index}

    def _switch(self, index: int, client: socket.socket, server: socket.socket) -> int:
        """Let it begin if both sockets are at rest; 0, or why not."""
        struct.pack_into(
            "=II",
            self._memory,
            index * SPLICE_BYTES + _CLOCKS_AT,
            client.getsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP) & 0xFFFFFFFF,
            server.getsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP) & 0xFFFFFFFF,
        )
        busy = bpf.run_program(self._control_fd, _CONTROL.pack(index))
        if busy == 0:
            for sock in (client, server):
                # Closing it is silent from here on; it has no more to say.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
        return busy

    def _set_state(self, index: int, state: SpliceState) -> None:
        struct.pack_into("=I", self._memory, index * SPLICE_BYTES + _STATE_AT, state)

    def _allocate(self) -> int:
        if not self._free and self._lingering:
            self._forget(self._lingering.popleft()[1])
        return self._free.popleft() if self._free else -1

    def _forget(self, index: int) -> None:
        """Take it out of the kernel's sight; what its peers still send is answered with RST."""
        for key in self._keys.pop(index):
            # The ports may serve another pair by now.
            with contextlib.suppress(FileNotFoundError):
                if _FLOW.unpack(self._flows.lookup(key))[0] == index:
                    self._flows.delete(key)
        self._set_state(index, SpliceState.FREE)
        self._owner.pop(index, None)
        self._free.append(index)

    def _forget_due(self) -> None:
        now_s = time.monotonic()
        for queue in (self._lingering, self._resetting):
            while queue and queue[0][0] <= now_s:
                self._forget(queue.popleft()[1])


@dataclass(frozen=True, slots=True)
class _Addresses:
    local: int
    peer: int
    local_port: int
    peer_port: int


def _addresses(sock: socket.socket) -> _Addresses:
    """In wire order, as the machine sees the bytes."""
    local, peer = sock.getsockname(), sock.getpeername()
    here, there = (struct.unpack("=I", socket.inet_aton(host))[0] for host in (local[0], peer[0]))
    return _Addresses(here, there, socket.htons(local[1]), socket.htons(peer[1]))


@dataclass(frozen=True, slots=True)
class _Info:
    timestamps: bool
    ecn: bool
    peer_scale: int  # of the windows that come from the peer
    own_scale: int
    path_bytes: int
    own_mss: int


def _info(sock: socket.socket) -> _Info:
    options, scales, path_bytes, own_mss = _INFO.unpack_from(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    )
    return _Info(
        bool(options & _OPTION_TIMESTAMPS),
        bool(options & _OPTION_ECN),
        scales & 15,
        scales >> 4,
        path_bytes,
        own_mss,
    )


def _eligible(
    client: socket.socket, server: socket.socket
) -> tuple[PairReason | None, _Info, _Info]:
    """Why these two cannot be one connection, or None; and what their TCP has agreed on."""
    for sock in (client, server):
        if sock.family != socket.AF_INET or sock.type != socket.SOCK_STREAM:
            raise ValueError("not TCP over IPv4")
    one, other = _info(client), _info(server)
    fits = (
        one.own_mss + _HEADERS_BYTES <= other.path_bytes
        and other.own_mss + _HEADERS_BYTES <= one.path_bytes
    )
    same = one.timestamps == other.timestamps and not one.ecn and not other.ecn
    near = all(_is_local(sock.getpeername()[0]) for sock in (client, server))
    obstacle = None if fits and same and near else PairReason.NOT_ELIGIBLE
    return obstacle, one, other


def _is_local(host: str) -> bool:
    if host.startswith("127."):
        return True
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


class KeeperProcess:
    """The keeper, from fork to wait."""

    def __init__(
        self, maps: SpliceMaps, *, workers: int, close_in_child: Callable[[], None]
    ) -> None:
        """Fork it; `clients[n]` is worker n's end, which its replacement inherits."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.clients = [ours for ours, _ in pairs]
        self.pid = os.fork()
        if self.pid == 0:
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
                close_in_child()
                Keeper(maps, [theirs for _, theirs in pairs]).serve()
                code = 0
            finally:
                os._exit(code)
        for _, theirs in pairs:
            theirs.close()

    def has_died(self) -> bool:
        """Whether it has ended by itself since the last call; reaps it."""
        if not self.pid:
            return False
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.pid = 0
        return bool(pid)

    def close(self) -> None:
        """End it."""
        for sock in self.clients:
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
        for other, sock in enumerate(self.keeper.clients):
            if other != worker:
                sock.close()
        for fd in (
            *self.maps.link_fds,
            self.maps.flows_fd,
            self.maps.splices_fd,
            self.maps.rings_fd,
            self.maps.control_fd,
            *(fd for other, fd in enumerate(self.maps.ring_fds) if other != worker),
        ):
            os.close(fd)

    def forget_worker(self, worker: int) -> None:
        """A worker died: its pairs end, with a RST for whoever still speaks.

        Raises:
            KeeperError: the keeper does not answer.
        """
        self.client(worker).ask("hello")

    def close(self) -> None:
        """End the keeper; the programs leave the interfaces."""
        self.keeper.close()
        self.maps.close()


def splice_memory(maps: SpliceMaps) -> mmap.mmap:
    """The records, for reading."""
    return bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=False)


assert SpliceKey.dport.offset + 2 == _KEY.size
assert SpliceFlow.direction.offset + 4 == _FLOW.size
