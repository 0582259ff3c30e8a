"""UDP sessions of one worker: real loopback sockets, one process, time as the play says."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar
from unittest import mock

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.runtime import loop
from pyforwarder.runtime.counters import CLOSED_INDEX, Counter, Counters, Directory, ListenerCounter
from pyforwarder.runtime.limits import SharedLimits, shared_memory
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.resolver import Names
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.generation import Generation
from pyforwarder.worker.log import ConnectionLog, Log
from pyforwarder.worker.udp.connection_ids import PART_BYTES, ConnectionIds
from pyforwarder.worker.udp.server import DatagramServer
from pyforwarder.worker.udp.sockets import datagram_socket_from_fd
from tests.helpers.generations import settings_of

T = TypeVar("T")

DEADLINE_S: Final = scaled_s(25.0)
SLOTS: Final = 64


class DatagramPlay:
    """A worker with one UDP listener `main`, and its clients.

    The first address of the configuration's `bind` is replaced. `close` it at the end.
    """

    def __init__(self, config: str, *, most_sessions: int = 1000) -> None:
        self._stack = contextlib.ExitStack()
        self._ahead_s = 0.0
        self._stack.enter_context(mock.patch.object(loop, "time", self))
        self.loop = Loop()
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self._directory = Directory()
        settings = settings_of(
            config, binds={"main": ("{}:{}".format(*self.address),)}, directory=self._directory
        )
        self.generation = Generation(settings, worker=0)
        self.counters = Counters(Counters.memory(1)).block(0)
        self.limits = SharedLimits(shared_memory(1), worker=0, secret=b"s" * 16)
        self._memory = mmap.mmap(-1, SLOTS * PAIR_BYTES)
        self.window = PairWindow(self._memory, first_slot=0, worker_index=0)
        read_fd, self._log_fd = os.pipe()
        self._log = self._stack.enter_context(os.fdopen(read_fd, "rb", buffering=0))
        os.set_blocking(read_fd, False)
        self._accepted = 0
        self.names = Names(self.loop)
        self.asked: list[tuple[str, list[int], int]] = []  # of the supervisor
        self.ids = ConnectionIds([mmap.mmap(-1, PART_BYTES)], 0)
        self.server = DatagramServer(
            self.loop,
            counters=self.counters,
            limits=self.limits,
            window=self.window,
            log=ConnectionLog(Log(level="info", form="json", fd=self._log_fd)),
            next_id=self._next_id,
            names=self.names,
            most_sessions=most_sessions,
            most_shown=SLOTS,
            ids=self.ids,
            ask_supervisor=lambda *asked: self.asked.append(asked),
        )
        self.state = self.generation.listeners["main"]
        fd = listener.detach()
        sock = datagram_socket_from_fd(fd, ipv6=False, wildcard=False)
        self.server.listen("main", sock, self.state)

    def reload(self, config: str, *, bind: str = "") -> None:
        """Another configuration from here on, as after a reload; `bind`: `main` listens there."""
        host, port = self.address
        settings = settings_of(
            config, binds={"main": (bind or f"{host}:{port}",)}, directory=self._directory
        )
        self.generation = Generation(settings, worker=0, previous=self.generation)
        self.state = self.generation.listeners["main"]
        self.listen("main")

    def listen(self, name: str) -> tuple[str, int]:
        """Serve a socket of its own for this listener of the configuration; its address."""
        state = self.generation.listeners[name]
        assert isinstance(state.bind, Address)
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((state.bind.host, state.bind.port))
        address: tuple[str, int] = listener.getsockname()
        wildcard = state.endpoint is None
        sock = datagram_socket_from_fd(listener.detach(), ipv6=False, wildcard=wildcard)
        self.server.listen(name, sock, state)
        return address

    def _next_id(self) -> int:
        self._accepted += 1
        return self._accepted

    def client(
        self, host: str = "127.0.0.1", *, to: tuple[str, int] | None = None
    ) -> socket.socket:
        """A client of its own address, of `main` or of `to`, that never blocks the loop."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((host, 0))
        sock.connect(to or self.address)
        sock.setblocking(False)
        return sock

    def upstream(self) -> tuple[socket.socket, str]:
        """A UDP server, and how the configuration writes it."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        host, port = sock.getsockname()
        return sock, f"{host}:{port}"

    def run_until(self, look: Callable[[], T], what: str) -> T:
        """Serve until `look` says something true; that."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (value := look()):
            assert time.monotonic() < deadline_s, f"no {what} within {DEADLINE_S:.0f} s"
            self.loop.run_once(0.002)
        return value

    def receive(self, sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
        """The next datagram of a peer, and where it came from."""

        def look() -> tuple[bytes, tuple[str, int]] | None:
            with contextlib.suppress(BlockingIOError):
                return sock.recvfrom(1 << 16)
            return None

        found = self.run_until(look, "datagram")
        assert found is not None
        return found

    def settle(self) -> None:
        """Serve all that has arrived: loopback delivers before send returns."""
        for _ in range(3):
            self.loop.run_once(0)

    def pass_time(self, seconds: float) -> None:
        """Let the loop's clock go on by so much at once, and serve what is due then."""
        self._ahead_s += seconds
        self.settle()

    def monotonic(self) -> float:
        """The loop's clock."""
        return time.monotonic() + self._ahead_s

    def count(self, counter: ListenerCounter) -> int:
        """A counter of the listener."""
        return int(self.counters[self.state.counter + counter])

    def closed(self, reason: CloseReason) -> int:
        """How many sessions, and datagrams without one, have ended for this reason."""
        return int(self.counters[CLOSED_INDEX[reason]])

    def said(self) -> list[dict[str, Any]]:
        """The lines of the log since the last look."""
        return [json.loads(line) for line in (self._log.read(1 << 20) or b"").splitlines()]

    def close(self) -> None:
        """End what is left, then look for what is left behind."""
        self.server.end_all(CloseReason.SHUTDOWN)
        self.loop.run_once(0)
        for gauge in (
            Counter.OPEN,
            Counter.PAIRS_OPEN,
            self.state.counter + ListenerCounter.OPEN,
        ):
            assert self.counters[gauge] == 0
        assert (self.limits.pairs, self.limits.sessions) == (0, 0)
        assert len(self.window._free) == SLOTS
        self.names.close()
        assert not self.ids._held
        self.ids.close()
        assert self.loop.deadlines.next_s() is None
        self.loop.dispose()
        self._stack.close()
        os.close(self._log_fd)
        self.window.close()
