"""Active health checks: a connection to every server, every interval.

A check is what a worker would do for a client, from the same user and source address, and nothing
more: connect, say that it is a check where a PROXY header is due, close. It runs in a process of
its own (supervisor/checking.py), so a server that answers slowly holds nobody up.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder import proxy_protocol
from pyforwarder.address import Address, HostPort, UnixAddress
from pyforwarder.loop import EPOLLERR, EPOLLOUT, Timed
from pyforwarder.upstreams import CheckSchedule, Health
from pyforwarder.worker.resolver import Resolver, addresses_of

if TYPE_CHECKING:
    from pyforwarder.config import Upstream
    from pyforwarder.loop import Loop

_LOCAL: Final = {
    "off": b"",
    "v1": proxy_protocol.build_v1(None, None),
    "v2": proxy_protocol.build_v2(None, None, is_local=True),
}


class Verdict(NamedTuple):
    """A server went up or down, or was looked at for the first time."""

    upstream: str
    server: str
    up: bool
    why: str  # what the last check met


class Checker:
    """Checks the servers of all upstreams that want it; `report` gets what changes."""

    def __init__(
        self,
        loop: Loop,
        upstreams: Mapping[str, Upstream],
        report: Callable[[Verdict], None],
    ) -> None:
        self._loop = loop
        self._report = report
        self.resolver = Resolver(loop)
        self._checked = [
            _Upstream(name, upstream, loop.now_s)
            for name, upstream in upstreams.items()
            if upstream.health is not None
        ]
        self._look()

    def _look(self) -> None:
        """Begin the checks that are due, and come again for the next."""
        now_s = self._loop.now_s
        next_s = now_s + 3600.0
        for upstream in self._checked:
            for name in upstream.schedule.take_due(now_s):
                server = upstream.servers[name]
                # With a timeout longer than the interval the last one may still be running.
                if not server.is_busy:
                    _Check(self, self._loop, upstream, server).begin()
            next_s = min(next_s, upstream.schedule.next_s())
        self._loop.after(max(0.0, next_s - now_s), self._look)

    def ended(self, upstream: _Upstream, server: _Server, *, passed: bool, why: str) -> None:
        """One check's result."""
        changed = server.health.observe(passed=passed)
        # The first is told whatever it is: who listens may know of a time before this process.
        if changed or not server.was_told:
            server.was_told = True
            self._report(Verdict(upstream.name, server.name, server.health.is_up, why))


class _Server:
    """One server, from its first check to the process's end."""

    def __init__(self, address: Address | HostPort | UnixAddress, health: Health) -> None:
        self.address = address
        self.name = str(address)
        self.health = health
        self.is_busy = False
        self.was_told = False


class _Upstream:
    """What the checks of one upstream have in common."""

    def __init__(self, name: str, upstream: Upstream, now_s: float) -> None:
        health = upstream.health
        assert health is not None
        self.name = name
        self.timeout_s = health.timeout_s
        self.resolve_every_s = upstream.resolve_every_s
        self.sources = [str(host) for host in upstream.source]
        self.greeting = _LOCAL[upstream.send_proxy]
        servers = (
            _Server(server.address, Health(rise=health.rise, fall=health.fall))
            for server in upstream.servers
        )
        self.servers = {server.name: server for server in servers}
        self.schedule = CheckSchedule(list(self.servers), interval_s=health.interval_s, now_s=now_s)


class _Check(Timed):
    """One check: passed once one of the server's addresses has accepted a connection."""

    __slots__ = ("_checker", "_left", "_loop", "_server", "_sock", "_upstream", "_watched", "_why")

    def __init__(self, checker: Checker, loop: Loop, upstream: _Upstream, server: _Server) -> None:
        super().__init__()
        self._checker = checker
        self._loop = loop
        self._upstream = upstream
        self._server = server
        self._left: list[Address | UnixAddress] = []
        self._sock: socket.socket | None = None
        self._watched = False
        self._why = "no address"

    def begin(self) -> None:
        """Resolve, if there is a name, and connect."""
        server = self._server
        server.is_busy = True
        # Also for the name: a resolver that does not answer is a server that cannot be reached.
        self._loop.deadlines.start(self, self._upstream.timeout_s, self._loop.now_s)
        address = server.address
        if not isinstance(address, HostPort):
            self._left = [address]
            self._connect()
            return

        def answer(hosts: list[str]) -> None:
            if server.is_busy and self._queue is not None:
                self._left = list(addresses_of(hosts, address.port))
                self._connect()

        if not self._checker.resolver.resolve(
            address.name, answer, keep_s=self._upstream.resolve_every_s
        ):
            self._end(passed=False, why="too many names to resolve")

    def _connect(self) -> None:
        while self._left:
            address = self._left.pop(0)
            try:
                self._sock, code = self._dial(address)
            except OSError as error:
                self._why = f"{address}: {error.strerror}"
                continue
            if code == 0:
                self._accepted()
            elif code == errno.EINPROGRESS:
                self._loop.watch(self._sock.fileno(), EPOLLOUT, _Check._ready, self)
                self._watched = True
            else:
                self._failed(os.strerror(code))
                continue
            return
        self._end(passed=False, why=self._why)

    def _dial(self, address: Address | UnixAddress) -> tuple[socket.socket, int]:
        if isinstance(address, UnixAddress):
            family, target = socket.AF_UNIX, address.path
        else:
            family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if isinstance(address, UnixAddress):
                return sock, sock.connect_ex(target)
            source = next(
                (h for h in self._upstream.sources if (":" in h) == address.is_ipv6), None
            )
            if source is not None:
                sock.bind((source, 0))
            return sock, sock.connect_ex(address)
        except OSError:
            sock.close()
            raise

    def _ready(self, _fd: int, mask: int) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code or mask & EPOLLERR:
            self._failed(os.strerror(code))
            self._connect()
        elif self._sock.getsockname() == self._sock.getpeername():
            # Nobody listens there, and the port we were given is the one we asked for (RFC 9293
            # section 3.5, simultaneous open).
            self._failed("connected to itself")
            self._connect()
        else:
            self._accepted()

    def _failed(self, why: str) -> None:
        """This address does not answer; another may."""
        self._why = why
        self._hang_up()

    def _hang_up(self) -> None:
        if self._sock is None:
            return
        fd = self._sock.detach()
        self._sock = None
        if self._watched:
            self._watched = False
            self._loop.close(fd)
        else:
            os.close(fd)

    def _accepted(self) -> None:
        assert self._sock is not None
        if self._upstream.greeting:
            try:
                self._sock.send(self._upstream.greeting)
            except OSError as error:
                self._end(passed=False, why=error.strerror or "no greeting could be sent")
                return
        self._end(passed=True, why="connected")

    def expired(self) -> None:
        """Nobody has answered in time."""
        self._end(passed=False, why="no answer in time")

    def _end(self, *, passed: bool, why: str) -> None:
        self._loop.deadlines.stop(self)
        self._hang_up()
        self._server.is_busy = False
        self._checker.ended(self._upstream, self._server, passed=passed, why=why)
