"""What the kernel must do with a UDP session, played with real sockets on `lo`: the self-test."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.proof.rig import RigError
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.sessions import Carried, KernelSession, SpliceSessions

HOSTS: Final = {"IPv4": "127.0.0.1", "IPv6": "::1"}
# What a datagram may have at least, at most, and around a packet of Ethernet. One that is longer
# than what `lo` takes comes in fragments, which our sockets get and copy.
SIZES: Final = (0, 1, 1200, 1472, 1473, 9000, 65_507)
FITS_ANYWHERE: Final = 1200
_MOST_BYTES: Final = 1 << 16
_TIMEOUT_S: Final = 5.0
_SO_NO_CHECK: Final = 11  # asm-generic/socket.h


class SessionRig:
    """A client, a server, and a worker's two sockets between them; close it."""

    def __init__(
        self, kernel: SpliceSessions, keeper: KeeperAsker, window: PairWindow, host: str
    ) -> None:
        """Two sessions' worth of sockets on `host`.

        Raises:
            OSError: this host has no such address.
        """
        self._stack = contextlib.ExitStack()
        self._kernel = kernel
        self._keeper = keeper
        self._window = window
        try:
            self.client, self.server = self._socket(host), self._socket(host)
            self.listener, self.upstream = self._socket(host), self._socket(host)
        except OSError:
            self._stack.close()
            raise
        self.client.connect(self.listener.getsockname())
        self.upstream.connect(self.server.getsockname())
        self._slot = window.allocate()
        self.copied = self.copied_bytes = 0

    def _socket(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self._stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((host, 0))
        sock.setblocking(False)
        return sock

    def up(self, data: bytes) -> None:
        """The client sends it, and the server must get it from our socket."""
        self.client.send(data)
        self._expect(self.server, data, self.upstream.getsockname())

    def down(self, data: bytes) -> None:
        """The server answers, and the client must get it from our listener."""
        self.server.sendto(data, self.upstream.getsockname())
        self._expect(self.client, data, self.listener.getsockname())

    def _expect(self, sock: socket.socket, data: bytes, source: object) -> None:
        """The datagram comes there next; what comes to us meanwhile is copied, as a worker does."""
        deadline_s = time.monotonic() + scaled_s(_TIMEOUT_S)
        poll = select.poll()
        for one in (sock, self.listener, self.upstream):
            poll.register(one, select.POLLIN)
        while True:
            with contextlib.suppress(BlockingIOError):
                got, came_from = sock.recvfrom(_MOST_BYTES)
                if (got, came_from) != (data, source):
                    raise RigError(
                        f"{len(got)} bytes from {came_from} instead of {len(data)} from {source}"
                    )
                return
            if not self._copy():
                left_ms = (deadline_s - time.monotonic()) * 1000
                if left_ms <= 0:
                    raise RigError(f"a datagram of {len(data)} bytes did not come")
                poll.poll(left_ms)

    def _copy(self) -> bool:
        """Copy what our sockets have got; whether there was anything."""
        before = self.copied
        with contextlib.suppress(BlockingIOError):
            data = self.listener.recv(_MOST_BYTES)
            self.upstream.send(data)
            self._count(data)
        with contextlib.suppress(BlockingIOError):
            data = self.upstream.recv(_MOST_BYTES)
            self.listener.sendto(data, self.client.getsockname())
            self._count(data)
        return self.copied > before

    def _count(self, data: bytes) -> None:
        self.copied += 1
        self.copied_bytes += len(data)

    def play(self) -> None:
        """Copied first, handed over, and then all by the kernel; the counts are exact."""
        self.up(b"first")
        self.down(b"answer")
        opened: list[KernelSession | PairReason] = []
        pending = self._kernel.open(
            session_id=1 << 32 | self._slot,
            slot=self._slot,
            client=self.client.getsockname()[:2],
            local=self.listener.getsockname()[0],
            sockets=(self.listener, self.upstream),
            any_interface=False,
            idle_s=60.0,
            now_s=time.monotonic(),
            then=opened.append,
        )
        if isinstance(pending, PairReason):
            raise RigError(pending.text)
        self._keeper.finish(scaled_s(_TIMEOUT_S))
        session = opened[0] if opened else PairReason.NO_KEEPER
        if isinstance(session, PairReason):
            raise RigError(session.text)
        for _ in range(2):
            for direction in Direction:
                # Nothing is left in our queues: `_expect` has seen to it.
                passed = self._kernel.passed(session, direction)
                self._kernel.caught_up(session, direction, passed)
            self.up(b"second")
            self.down(b"another")
        self.copied = self.copied_bytes = 0
        before = [self._kernel.carried(session, direction) for direction in Direction]
        total = 0
        for size in SIZES:
            data = bytes(n * 7 & 0xFF for n in range(256)) * (size // 256 + 1)
            self.up(data[:size])
            self.down(data[:size])
            total += 2 * size
            if self.copied and size <= FITS_ANYWHERE:
                raise RigError(f"the kernel did not move a datagram of {size} bytes")
        sent = 2 * len(SIZES)
        if self.client.family == socket.AF_INET:
            # A checksum of 0 stays one, and means that there is none (RFC 768).
            self.client.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
            self.up(b"no checksum")
            self.down(b"no checksum")
            total, sent = total + 2 * len(b"no checksum"), sent + 2
        counted = [self.copied_bytes, self.copied]
        ended: list[Carried] = []
        self._kernel.close([session], ended.extend)
        self._keeper.finish(scaled_s(_TIMEOUT_S))
        if not ended:
            raise RigError(PairReason.NO_KEEPER.text)
        (carried,) = ended
        for direction in Direction:
            for n in range(2):
                counted[n] += carried[direction][n] - before[direction][n]
        if counted != [total, sent]:
            raise RigError(f"counted {counted} instead of {[total, sent]}")

    def close(self) -> None:
        """Close the sockets."""
        self._window.release(self._slot)
        self._stack.close()


def play(kernel: SpliceSessions, keeper: KeeperAsker, window: PairWindow) -> dict[str, float]:
    """Seconds of each version of IP that this host has.

    Raises:
        RigError: a datagram is not as it would be without us.
        OSError: the kernel refuses.
    """
    passed: dict[str, float] = {}
    for name, host in HOSTS.items():
        started_s = time.monotonic()
        try:
            rig = SessionRig(kernel, keeper, window, host)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and passed:
                continue
            raise
        try:
            rig.play()
        except RigError as error:
            raise RigError(f"{name}: {error}") from error
        finally:
            rig.close()
        passed[name] = round(time.monotonic() - started_s, 3)
    return passed
