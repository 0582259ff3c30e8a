"""A pair on loopback with a client and a server that are ours: what a datapath is proven with.

    client <-> [accepted ... outgoing] <-> server

The middle two sockets are the pair, run by an event loop in the calling thread; the outer two are
driven by threads, as real peers are: at their own pace.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Phase, Step, next_phase
from pyforwarder.datapath.base import Flow, Pair, PairReason
from pyforwarder.datapath.copying import WATCHED, CopyDatapath
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.sockmap.send_buffer import enlarge_send_buffer
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.loop import EPOLLPRI, EPOLLRDHUP, Loop
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import protocol_of

if TYPE_CHECKING:
    import _socket

    from pyforwarder.core.reasons import CloseReason
    from pyforwarder.datapath.base import Datapath
    from pyforwarder.datapath.ebpf.pair_table import PairWindow

DEADLINE_S: Final = 15.0
SMALL_BUFFER_BYTES: Final = 128 << 10  # the kernel takes twice that, for its own records


class RigError(AssertionError):
    """A datapath did not do what it must; the message says what happened instead."""


class RigPair(Pair):
    """A pair without a connection around it."""

    __slots__ = ("ended", "reason")

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        super().__init__(client, client.fileno())
        self.attach_server(server, server.fileno())
        self.ended = False
        self.reason: CloseReason | None = None  # None: it ended in order


class Rig:
    """The host of one datapath: makes pairs, runs the loop, closes what it made."""

    def __init__(self, window: PairWindow) -> None:
        self.loop = Loop()
        self.window = window
        self.copying = CopyDatapath(self)
        self.datapath: Datapath = self.copying
        self._next_id = 1
        self._sockets: list[socket.socket] = []
        self._pairs: list[RigPair] = []

    # PairHost

    def fin_seen(self, pair: Pair, flow: Flow) -> None:
        """Half of a close has come."""
        flow.phase = next_phase(flow.phase, Step.FIN)

    def delivered(self, pair: Pair, flow: Flow) -> None:
        """Carry the FIN on; the second one ends the pair in order."""
        assert isinstance(pair, RigPair)
        flow.phase = next_phase(flow.phase, Step.DELIVERED)
        target = pair.server if flow is pair.up else pair.client
        assert target is not None
        if pair.kind is not DatapathKind.SPLICE:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        if pair.up.phase is Phase.CLOSED and pair.down.phase is Phase.CLOSED:
            self._end(pair, orderly=True)

    def ended(self, pair: Pair, flow: Flow) -> None:
        """Both at once."""
        self.fin_seen(pair, flow)
        self.delivered(pair, flow)

    def broken(self, pair: Pair, reason: CloseReason) -> None:
        """Reset both ends."""
        assert isinstance(pair, RigPair)
        pair.reason = reason
        self._end(pair, orderly=False)

    def moved(self, pair: Pair, flow: Flow) -> None:
        """Nothing depends on it here."""

    def enlarge(self, pair: Pair | None, sock: _socket.socket, by_bytes: int) -> None:
        """At once, where we may."""
        with contextlib.suppress(PermissionError):
            enlarge_send_buffer(sock, by_bytes)

    def _end(self, pair: RigPair, *, orderly: bool) -> None:
        if pair.ended:
            return
        pair.ended = True
        if pair.datapath is not None:
            pair.datapath.leave(pair)
            pair.datapath = None
        for sock in (pair.client, pair.server):
            assert sock is not None
            if orderly:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            self.loop.close(sock.detach())
        if pair.slot >= 0:
            self.window.release(pair.slot)

    # Making and joining

    def connect(
        self, *, small_buffers: bool = False
    ) -> tuple[socket.socket, RigPair, socket.socket]:
        """A client, the pair between, and a server; nothing has been sent or read yet.

        With small buffers a stalled reader blocks its sender soon, also on a host whose tcp_rmem
        and tcp_wmem were tuned to hold 100 MB.
        """
        client, accepted = loopback_pair()
        outgoing, server = loopback_pair()
        if small_buffers:
            for sock in (client, accepted, outgoing, server):
                for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER_BYTES)
        return client, self.between(client, accepted, outgoing, server), server

    def between(
        self,
        client: socket.socket,
        accepted: socket.socket,
        outgoing: socket.socket,
        server: socket.socket,
    ) -> RigPair:
        """The pair of the two middle sockets, set up as the worker's are; all four are ours now."""
        self._sockets += [client, server]
        for sock in (accepted, outgoing):
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reset_at_close(sock.fileno())
            if protocol_of(sock) == socket.IPPROTO_TCP:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        pair = RigPair(accepted, outgoing)
        pair.id = self._next_id
        self._next_id += 1
        pair.slot = self.window.allocate()
        pair.client_mask = pair.server_mask = WATCHED
        self.loop.watch(pair.client_fd, WATCHED, _early, pair)
        self.loop.watch(pair.server_fd, WATCHED, _early, pair)
        self._pairs.append(pair)
        return pair

    def copy(self, pair: RigPair) -> None:
        """Let the pair begin as every pair does: copied."""
        pair.datapath = self.copying
        self.copying.join(pair)

    def hand_over(self, pair: RigPair) -> PairReason | None:
        """Give the pair to the datapath, trying again while bytes keep coming in between."""
        if self.datapath is self.copying:
            return None
        deadline_s = time.monotonic() + scaled_s(DEADLINE_S)
        while True:
            reason = self.datapath.join(pair)
            if reason is not PairReason.UNREAD_BYTES or pair.ended:
                return reason
            if time.monotonic() > deadline_s:
                return reason
            self.loop.run_once(0.001)

    def join(self, pair: RigPair) -> None:
        """Both: copied for a moment, then handed over.

        Raises:
            RigError: the datapath refused the pair.
        """
        self.copy(pair)
        reason = self.hand_over(pair)
        if reason is not None:
            raise RigError(f"refused the pair: {reason.text}")

    def run_until(self, done: Callable[[], bool], what: str) -> None:
        """Serve until `done`.

        Raises:
            RigError: not within the deadline.
        """
        deadline_s = time.monotonic() + scaled_s(DEADLINE_S)
        is_late = False
        while not done():
            if is_late:
                raise RigError(f"no {what} within {scaled_s(DEADLINE_S):.0f} s")
            # One turn is due after the deadline, too: the whole machine may have stood still.
            is_late = time.monotonic() > deadline_s
            self.loop.run_once(0.01)

    def finish(self, pair: RigPair, *peers: Peer) -> None:
        """Serve until the pair has ended and the peers are done."""
        self.run_until(
            lambda: pair.ended and not any(p.is_alive() for p in peers), "end of the pair"
        )
        for peer in peers:
            if peer.error is not None:
                raise RigError(f"{peer.name}: {peer.error!r}")

    def close(self) -> None:
        """Reset what is left and close everything."""
        for pair in self._pairs:
            self._end(pair, orderly=False)
        self.loop.run_once(0)
        for sock in self._sockets:
            sock.close()
        self.loop.dispose()


def _early(pair: Pair, fd: int, mask: int) -> None:
    """Before the join nobody reads; what is known is kept for the datapath."""
    flow = pair.up if fd == pair.client_fd else pair.down
    flow.readable = True
    if mask & EPOLLRDHUP:
        flow.end_seen = True
    if mask & EPOLLPRI:
        flow.urgent = True


def loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets: the connecting one and the accepted one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        connections = socket.create_connection(listener.getsockname(), timeout=scaled_s(DEADLINE_S))
        accepted, _ = listener.accept()
    accepted.settimeout(scaled_s(DEADLINE_S))
    return connections, accepted


class Peer(threading.Thread):
    """A client or a server doing one thing in a thread; what went wrong is in `error`."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._action = action
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Do it."""
        try:
            self._action()
        except Exception as error:
            self.error = error


class Reader(Peer):
    """Reads everything until the end; `ended` is "eof" or the error's name."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.data = bytearray()
        self.ended = ""
        self._sock = sock
        super().__init__(name, self._read)

    def _read(self) -> None:
        while True:
            try:
                chunk = self._sock.recv(1 << 18)
            except OSError as error:
                self.ended = type(error).__name__
                return
            if not chunk:
                self.ended = "eof"
                return
            self.data += chunk


def chunks(data: bytes, seed: int) -> Iterator[bytes]:
    """The data cut at random: single bytes, odd sizes, large pieces."""
    source = random.Random(seed)
    at = 0
    while at < len(data):
        size = source.choice((1, 7, 100, 1461, 4096, 65536, 300_001))
        yield data[at : at + size]
        at += size


def send_all(sock: socket.socket, data: bytes, *, seed: int, then_close: bool) -> None:
    """Send the data in random pieces; with `then_close` a FIN behind it."""
    for chunk in chunks(data, seed):
        sock.sendall(chunk)
    if then_close:
        sock.shutdown(socket.SHUT_WR)
