"""Connections of one worker: real loopback sockets, a fake datapath, one process.

The event loop runs only while a play waits for something, so what happens between two waits is the
play's choice; so is what time it is for the loop, beside what really passes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast
from unittest import mock

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.ebpf.pair_table import PairWindow, read_records
from pyforwarder.runtime import askers, loop, resolver
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    Counters,
    ListenerCounter,
)
from pyforwarder.runtime.limits import SharedLimits, shared_memory
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.generation import Generation
from pyforwarder.worker.handover import Handover
from pyforwarder.worker.log import ConnectionLog, Log
from pyforwarder.worker.server import Server
from tests.helpers.fake_datapath import FakeDatapath
from tests.helpers.generations import settings_of
from tests.helpers.instruction import ACK, instruction

if TYPE_CHECKING:
    import pytest

    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
    from pyforwarder.worker.client import Client

T = TypeVar("T")


DEADLINE_S: Final = scaled_s(25.0)


SLOTS: Final = 64


LINGER_RESET: Final = struct.pack("ii", 1, 0)


NAMED: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    first_packet: {{timeout: 5s}}
    rules: [{{name: named, match: instruction, allow: [loopback]}}]
{more}
"""

# A part of such a configuration: pairs are handed over as soon as they are joined.
EAGER: Final = "handover: {after_bytes: 0}"


def named(more: str = "") -> str:
    """One listener that takes instructions to loopback, and `more` of the configuration."""
    return NAMED.format(more=more)


def to(address: str, more: str = "", *, timeout: str = "5s") -> str:
    """One listener that connects every client, once it has said something."""
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    first_packet: {{timeout: {timeout}}}
    rules: [{{name: fixed, match: {{regex: "."}}, to: "{address}"}}]
{more}
"""


def listening_socket() -> socket.socket:
    """A listener as the supervisor binds them: accepted sockets inherit what is set here."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.listen(128)
    sock.setblocking(False)
    return sock


def watched_for_nobody(loop: Loop) -> list[int]:
    """Descriptors that epoll tells the loop of, and nobody there wants to hear of.

    It knows open files, not descriptors: one that is closed here, and open elsewhere, is told of by
    its old number, which is another's by then.
    """
    text = Path(f"/proc/self/fdinfo/{loop._epoll.fileno()}").read_text()
    watched = [int(line.split()[1]) for line in text.splitlines() if line.startswith("tfd:")]
    return [fd for fd in watched if loop._callbacks[fd] is None]


class Play:
    """A server with one listener, the peers that a play makes, and a look at what they left."""

    def __init__(self, config: str) -> None:
        self._stack = contextlib.ExitStack()
        self._ahead_s = 0.0
        self._stack.enter_context(mock.patch.object(loop, "time", self))
        self.loop = Loop()
        self.listener = self._stack.enter_context(listening_socket())
        self.address: tuple[str, int] = self.listener.getsockname()
        settings = settings_of(config, binds={"main": ("{}:{}".format(*self.address),)})
        self.generation = Generation(settings, worker=0)
        self.counters = Counters(Counters.memory(1)).block(0)
        self.limits = SharedLimits(shared_memory(1), worker=0, secret=b"s" * 16)
        self._memory = mmap.mmap(-1, SLOTS * PAIR_BYTES)
        self.window = PairWindow(self._memory, first_slot=0, worker_index=0)
        self.asked: list[str] = []
        self.lent: list[int] = []  # copies of what it was asked with: the supervisor hangs
        self.server = Server(
            self.loop,
            generation=self.generation,
            counters=self.counters,
            limits=self.limits,
            window=self.window,
            log=ConnectionLog(Log(level="error", form="text", fd=os.dup(2))),
            worker=0,
            workers=1,
            most_clients=1000,
            ask_supervisor=self._ask_supervisor,
        )
        self._stack.callback(self._give_back)
        self._stack.callback(os.close, self.server.log.log._fd)
        self.fake = FakeDatapath(self.server)
        self.server.handover = Handover(self.server, cast("SockmapDatapath", self.fake))
        self.server.handover.settle(sockmap=True, splice=False)
        self.state = self.generation.listeners["main"]
        self.server.accepting.listen(self.listener, self.state)

    def _ask_supervisor(self, what: str, fds: list[int], _number: int) -> None:
        self.asked.append(what)
        self.lent += map(os.dup, fds)

    def _give_back(self) -> None:
        for fd in self.lent:
            os.close(fd)

    # Peers

    def own(self, sock: socket.socket) -> socket.socket:
        """A peer's socket: never blocks the loop, closed at the end of the play."""
        sock.setblocking(False)
        return self._stack.enter_context(sock)

    def dial(self) -> socket.socket:
        """A client; it is accepted when the loop runs next."""
        return self.own(socket.create_connection(self.address, timeout=DEADLINE_S))

    def accept(self, listening: socket.socket) -> socket.socket:
        """The next connection of a server."""

        def look() -> socket.socket | None:
            with contextlib.suppress(BlockingIOError):
                return listening.accept()[0]
            return None

        found = self.run_until(look, "connection at the server")
        assert found is not None
        return self.own(found)

    def read(self, sock: socket.socket, size: int) -> bytes:
        """So many bytes."""
        data = b""

        def look() -> bool:
            nonlocal data
            with contextlib.suppress(BlockingIOError):
                chunk = sock.recv(size - len(data))
                assert chunk, f"the end after {data!r}"
                data += chunk
            return len(data) == size

        self.run_until(look, f"{size} bytes")
        return data

    def read_end(self, sock: socket.socket) -> tuple[bytes, str]:
        """What is still to come, and how it ends: `eof` or `reset`."""
        data = b""
        ended = ""

        def look() -> bool:
            nonlocal data, ended
            try:
                chunk = sock.recv(1 << 16)
                data += chunk
                ended = "" if chunk else "eof"
            except BlockingIOError:
                pass
            except ConnectionResetError:
                ended = "reset"
            return bool(ended)

        self.run_until(look, "the end")
        return data, ended

    # The server

    def run_until(self, look: Callable[[], T], what: str) -> T:
        """Serve until `look` says something true; that."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (value := look()):
            assert time.monotonic() < deadline_s, f"no {what} within {DEADLINE_S:.0f} s"
            self.loop.run_once(0.002)
        return value

    def monotonic(self) -> float:
        """The loop's clock."""
        return time.monotonic() + self._ahead_s

    def pass_time(self, seconds: float) -> None:
        """Let the loop's clock go on by so much at once, and serve what is due then."""
        self._ahead_s += seconds
        self.loop.run_once(0)

    def closed(self, reason: CloseReason) -> int:
        """How many connections have ended for this reason."""
        return int(self.counters[CLOSED_INDEX[reason]])

    def wait_for_end(self, reason: CloseReason, count: int = 1) -> None:
        self.run_until(lambda: self.closed(reason) == count, f"end: {reason.value}")

    def only_client(self) -> Client:
        (client,) = self.server.clients.values()
        return client

    def joined(self, server: socket.socket, address: str) -> tuple[socket.socket, socket.socket]:
        """A client and a server that are joined by instruction."""
        client = self.dial()
        client.sendall(instruction(address))
        accepted = self.accept(server)
        assert self.read(client, len(ACK)) == ACK
        return client, accepted

    def close(self) -> None:
        """End what is left, then look for what is left behind."""
        self.server.reset_all(CloseReason.SHUTDOWN)
        self.server.accepting.unlisten(self.listener)
        self.loop.run_once(0)
        assert self.server.clients == {}
        assert watched_for_nobody(self.loop) == []
        for gauge in (
            Counter.OPEN,
            Counter.PAIRS_OPEN,
            self.state.counter + ListenerCounter.OPEN,
        ):
            assert self.counters[gauge] == 0
        assert self.limits.pairs == 0
        assert self.server.accepting._busy_clients == 0
        assert len(self.window._free) == SLOTS
        assert list(read_records(self._memory)) == []
        assert self.loop.deadlines.next_s() is None
        assert self.fake.joined == self.fake.left
        self.server.names.close()
        self.server.pressure.close()
        self.loop.dispose()
        self._stack.close()
        self.window.close()


Servers = Callable[[], tuple[socket.socket, str]]


StartPlay = Callable[[str], Play]


class SlowNames:
    """Holds every name lookup back until `release`, then answers with the loopback address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: list[str] | None = None) -> None:
        self._go = threading.Event()
        self.asked: list[str] = []
        answer = ["127.0.0.1"] if hosts is None else hosts

        def lookup(name: str) -> list[str]:
            self.asked.append(name)
            assert self._go.wait(DEADLINE_S)
            return answer

        monkeypatch.setattr(askers, "lookup", lookup)
        monkeypatch.setattr(resolver, "cares_knows_all_sources", lambda: False)

    def release(self) -> None:
        self._go.set()
