"""Active health checks: a connection to every server, every interval.

A check is what a worker would do for a client, from the same user and source address, and nothing
more: connect, say that it is a check where a PROXY header is due, close. It runs in a process of
its own (supervisor/processes/health_process.py), so a server that answers slowly holds nobody up.
"""

from __future__ import annotations

import _socket
import errno
import functools
import os
import socket
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address, HostPort, SamePort, UnixAddress
from pyforwarder.core.eyeballs import Liveness
from pyforwarder.core.health import CheckSchedule, Health
from pyforwarder.runtime.loop import EPOLLERR, EPOLLOUT, Timed
from pyforwarder.runtime.resolver import Wait, addresses_of, configured_names
from pyforwarder.runtime.sockaddr import sockaddr
from pyforwarder.worker.connector import IP_BIND_ADDRESS_NO_PORT
from pyforwarder.worker.race import SHORTAGES, Race, outcome_of

if TYPE_CHECKING:
    from pyforwarder.config import Upstream
    from pyforwarder.runtime.loop import Loop

_LOCAL: Final = {
    "off": b"",
    "v1": proxy_protocol.build_v1(None, None),
    "v2": proxy_protocol.build_v2(None, None, is_local=True),
}


class HealthResult(NamedTuple):
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
        report: Callable[[HealthResult], None],
        *,
        only: Collection[tuple[str, str]] | None = None,
        known: Mapping[tuple[str, str], bool] | None = None,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        """Check the servers in `only` of these upstreams (None: all); see `check_only`.

        `known` has the servers that an earlier process has checked, and whether each was up.
        `finished` is called each time when all servers that are checked have been once more.
        """
        self._loop = loop
        self._report = report
        self._finished = finished
        self.names = configured_names(loop, stale_wait_s=0.0)  # a check is short, and comes again
        self.liveness = Liveness()
        self._checked = [
            _Upstream(name, upstream, loop.now_s)
            for name, upstream in upstreams.items()
            if upstream.health is not None
        ]
        for checked in self._checked:
            for server in checked.servers.values():
                server.was_up = (known or {}).get((checked.name, server.name))
                server.begin()
        self._left = self._wanted()  # of this round
        if only is not None:
            self.check_only(only)
        self._begin_due()

    def check_only(self, only: Collection[tuple[str, str]]) -> None:
        """Check the servers in `only`, by upstream and address, and no others. Servers that are
        checked already go on with their checks.
        """
        for upstream in self._checked:
            for server in upstream.servers.values():
                is_wanted = (upstream.name, server.name) in only
                if server.is_wanted and not is_wanted:
                    server.was_up = None  # when it is checked again that is long past
                elif is_wanted and not server.is_wanted:
                    server.begin()
                server.is_wanted = is_wanted
        self._left = self._left & self._wanted() or self._wanted()

    def _wanted(self) -> set[tuple[str, str]]:
        return {
            (upstream.name, server.name)
            for upstream in self._checked
            for server in upstream.servers.values()
            if server.is_wanted
        }

    def _begin_due(self) -> None:
        """Begin the checks that are due, and come again for the next."""
        now_s = self._loop.now_s
        next_s = now_s + 3600.0
        for upstream in self._checked:
            for name in upstream.schedule.take_due(now_s):
                server = upstream.servers[name]
                # With a timeout longer than the interval the last one may still be running.
                if server.is_wanted and not server.is_busy:
                    _Check(self, self._loop, upstream, server).begin()
            next_s = min(next_s, upstream.schedule.next_s())
        self._loop.after(max(0.0, next_s - now_s), self._begin_due)

    def ended(self, upstream: _Upstream, server: _Server, *, passed: bool, why: str) -> None:
        """Count the result of one check, and report it if the server is up or down by it now."""
        if not server.is_wanted:
            return
        self._count(upstream.name, server.name)
        changed = server.health.observe(passed=passed)
        # The first is told in any case: workers may know of a time before this process.
        if changed or not server.was_told:
            server.was_told = True
            self._report(HealthResult(upstream.name, server.name, server.health.is_up, why))

    def _count(self, upstream: str, server: str) -> None:
        """A round is over when each has had a result in it."""
        self._left.discard((upstream, server))
        if not self._left:
            self._left = self._wanted()
            self._finished()


class _Server:
    """One server, from its first check to the process's end."""

    health: Health

    def __init__(
        self, address: Address | HostPort | UnixAddress, make_health: Callable[..., Health]
    ) -> None:
        self.address = address
        self.name = str(address)
        self.is_busy = False
        self.is_wanted = True
        self.was_up: bool | None = None  # before it is looked at here
        self._make_health = make_health
        self.begin()

    def begin(self) -> None:
        """Forget what earlier checks have found of the server."""
        self.health = self._make_health(was_up=self.was_up)
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
            _Server(server.address, functools.partial(Health, rise=health.rise, fall=health.fall))
            for server in upstream.servers
            if not isinstance(server.address, SamePort)  # an error in the configuration
        )
        self.servers = {server.name: server for server in servers}
        self.schedule = CheckSchedule(list(self.servers), interval_s=health.interval_s, now_s=now_s)


class _Check(Timed):
    """One check: passed once one of the server's addresses has accepted a connection."""

    __slots__ = (
        "_approach",
        "_checker",
        "_has_ended",
        "_loop",
        "_server",
        "_sock",
        "_upstream",
        "_watched",
    )

    def __init__(self, checker: Checker, loop: Loop, upstream: _Upstream, server: _Server) -> None:
        super().__init__()
        self._checker = checker
        self._loop = loop
        self._upstream = upstream
        self._server = server
        self._approach: Wait | Race | None = None
        self._sock: _socket.socket | None = None
        self._watched = False
        self._has_ended = False

    def begin(self) -> None:
        """Resolve, if there is a name, and connect."""
        server = self._server
        server.is_busy = True
        # Also for the name: a resolver that does not answer is a server that cannot be reached.
        self._loop.deadlines.start(self, self._upstream.timeout_s, self._loop.now_s)
        address = server.address
        if isinstance(address, UnixAddress):
            self._connect_to_path(address.path)
        elif isinstance(address, Address):
            self._connect([address])
        else:
            port = address.port

            def answer(hosts: list[str]) -> None:
                self._approach = None
                self._connect(addresses_of(hosts, port))

            wait = self._checker.names.resolve(
                address.name, answer, keep_s=self._upstream.resolve_every_s
            )
            # None: `answer` has been called, and what it began must not be lost.
            if wait is not None:
                self._approach = wait

    def _connect(self, addresses: list[Address]) -> None:
        """Connect to all of the addresses, a moment apart: the server is up if any answers."""
        if not addresses:
            self._end(passed=False, why="no address")
            return
        race = self._approach = Race(
            self._loop,
            self,
            addresses,
            self._checker.liveness,
            within_s=self._upstream.timeout_s,
            pair=self,
        )
        race.begin()

    def dial(self, address: Address) -> tuple[_socket.socket, int]:
        """Begin to connect to an address; called by the race, see `Racer`."""
        family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        sock = _socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            source = next(
                (h for h in self._upstream.sources if (":" in h) == address.is_ipv6), None
            )
            if source is not None:
                # As for clients: a port that others use to another server is free.
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((source, 0))
            return sock, outcome_of(sock.connect_ex(sockaddr(address)), address)
        except OSError:
            sock.close()
            raise

    def connected(self, sock: _socket.socket, address: Address) -> None:
        """Go on with the socket that was connected first; called by the race, see `Racer`."""
        del address
        self._approach = None
        self._sock = sock
        self._accepted()

    def lost(self, code: int) -> None:
        """End the check, as no address has answered; called by the race, see `Racer`."""
        self._approach = None
        self._failed(code, "TCP: ")

    def _failed(self, code: int, by: str = "") -> None:
        """End the check without a connection. If this host lacks something (descriptors, ports),
        nothing is known of the server.
        """
        self._end(passed=None if code in SHORTAGES else False, why=f"{by}{os.strerror(code)}")

    def _connect_to_path(self, path: str) -> None:
        try:
            self._sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            code = self._sock.connect_ex(path)
        except OSError as error:
            code = error.errno or errno.EIO
        if code == 0:
            self._accepted()
        elif code == errno.EINPROGRESS and self._sock is not None:
            self._loop.watch(self._sock.fileno(), EPOLLOUT, _Check._ready, self)
            self._watched = True
        else:
            self._failed(code)

    def _ready(self, _fd: int, mask: int) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code or mask & EPOLLERR:
            self._end(passed=False, why=os.strerror(code))
        else:
            self._accepted()

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
        by = ""
        if isinstance(self._approach, Race):
            by = "TCP: "  # of a server for UDP, too
            self._approach.stop(timed_out=True)
            if self._approach.code in SHORTAGES:  # not all addresses have been asked
                self._failed(self._approach.code)
                return
        self._end(passed=False, why=f"{by}no answer in time")

    def _end(self, *, passed: bool | None, why: str) -> None:
        """Give everything back and tell the result: the first one, a check has no other.

        None: there is none.
        """
        if self._has_ended:
            return
        self._has_ended = True
        self._loop.deadlines.stop(self)
        if self._approach is not None:
            self._approach.stop()
            self._approach = None
        self._hang_up()
        self._server.is_busy = False
        if passed is not None:
            self._checker.ended(self._upstream, self._server, passed=passed, why=why)
