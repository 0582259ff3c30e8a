"""Connections to several addresses of one server, a moment apart; the first that stands wins."""

from __future__ import annotations

import errno
import os
import resource
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

from pyforwarder.core.eyeballs import ATTEMPT_DELAY_S
from pyforwarder.runtime.loop import EPOLLERR, EPOLLHUP, EPOLLOUT, Timed
from pyforwarder.runtime.sockaddr import sockaddr

if TYPE_CHECKING:
    import _socket
    from collections.abc import Sequence

    from pyforwarder.core.address import Address
    from pyforwarder.core.eyeballs import Liveness
    from pyforwarder.runtime.loop import Loop

# Ours to be short of: descriptors, memory, local ports. They say nothing of the server.
SHORTAGES: Final = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EADDRINUSE,  # no local port, see `outcome_of`
    }
)
_UNANSWERED: Final = (0, errno.EINPROGRESS, errno.EALREADY)


def outcome_of(code: int, address: Address) -> int:
    """What connect(2) said, but EADDRINUSE where there was no local port.

    It says EADDRNOTAVAIL then, and also where this host has no address from which the server could
    be reached (IPv6 is disabled), which is not for want of anything. A datagram socket tells them
    apart: it has other ports, and says EAGAIN without one (inet_autobind).
    """
    if code != errno.EADDRNOTAVAIL:
        return code
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            has_source = probe.connect_ex(sockaddr(address)) != errno.EADDRNOTAVAIL
    except OSError:
        return code
    return errno.EADDRINUSE if has_source else code


class Racer(Protocol):
    """The client, or session, that a race is run for."""

    def dial(self, address: Address) -> tuple[_socket.socket, int]:
        """A socket, and what connect(2) said: an errno, EINPROGRESS, or 0 if it stands.

        Raises:
            OSError: there is no socket.
        """
        ...

    def connected(self, sock: _socket.socket, address: Address) -> None:
        """Take the connection that was established first; the socket is the callee's, and not
        watched by the loop.
        """
        ...

    def lost(self, code: int) -> None:
        """Learn that none of the addresses answers; `code` is the errno of the last that failed.

        One of `SHORTAGES` if there was any: then not all of them have been asked.
        """
        ...


class _Attempt:
    """A connection that is being made."""

    __slots__ = ("address", "fd", "pair", "race", "sock")

    def __init__(self, race: Race, address: Address, sock: _socket.socket) -> None:
        self.race = race
        self.pair = race.pair
        self.address = address
        self.sock = sock
        self.fd = sock.fileno()


def _descriptors() -> int:
    """How many this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Race(Timed):
    """Happy Eyeballs (RFC 8305 section 5): the next address after 250 ms, or once one has failed.

    Who runs it has the deadline for all of it, and ends it with `stop`. `pair` is whose fault a
    fault in here is, for the loop.

    While more than half of the descriptors are in use there is one connection at a time, each with
    its share of the time: a client is counted as two descriptors (`room_for`).
    """

    __slots__ = (
        "_delay_s",
        "_left",
        "_liveness",
        "_loop",
        "_racer",
        "_running",
        "_share_s",
        "_short_from_fd",
        "code",
        "pair",
    )

    def __init__(
        self,
        loop: Loop,
        racer: Racer,
        addresses: Sequence[Address],
        liveness: Liveness,
        *,
        within_s: float,
        pair: Any,
    ) -> None:
        """`within_s` is how much time there is: all that are tried get some of it."""
        super().__init__()
        self._loop = loop
        self._racer = racer
        self._liveness = liveness
        self._left = liveness.order(addresses, loop.now_s)
        self._share_s = within_s / (len(self._left) + 1)
        self._delay_s = min(ATTEMPT_DELAY_S, self._share_s)
        # The kernel gives the lowest number that is free.
        self._short_from_fd = _descriptors() // 2
        self._running: list[_Attempt] = []
        self.code = errno.EHOSTUNREACH
        self.pair = pair

    def begin(self) -> None:
        """Try the first address; `connected` or `lost` may be called before this returns."""
        self._next()

    def expired(self) -> None:
        """The last attempt has had its time alone."""
        self._next()

    def _next(self) -> None:
        """Begin another attempt; those that fail at once are passed over."""
        while self._left:
            address = self._left.pop(0)
            try:
                sock, code = self._racer.dial(address)
            except OSError as error:
                self._fail(address, error.errno or errno.EIO)
                continue
            attempt = _Attempt(self, address, sock)
            if code == 0 and not self._is_own(attempt):
                self._win(attempt, self._running)
                return
            if code not in _UNANSWERED or code == 0:
                os.close(sock.detach())
                self._fail(address, code or errno.ECONNREFUSED)
                continue
            delay_s = self._delay_s
            if attempt.fd >= self._short_from_fd:
                delay_s = self._share_s
                for earlier in list(self._running):
                    self._hang_up(earlier)
            self._running.append(attempt)
            self._loop.watch(attempt.fd, EPOLLOUT, Race._ready, attempt)
            if self._left:
                self._loop.deadlines.start(self, delay_s, self._loop.now_s)
            return
        if not self._running:
            self._racer.lost(self.code)

    @staticmethod
    def _ready(attempt: _Attempt, fd: int, mask: int) -> None:
        del fd
        race = attempt.race
        code = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and mask & (EPOLLERR | EPOLLHUP):
            code = errno.ECONNRESET
        if not code and not race._is_own(attempt):
            earlier = race._running[: race._running.index(attempt)]
            race._running.remove(attempt)
            race._loop.forget(attempt.fd)
            race._win(attempt, earlier)
            return
        race._hang_up(attempt)
        race._fail(attempt.address, code or errno.ECONNREFUSED)
        race._loop.deadlines.stop(race)
        race._next()

    @staticmethod
    def _is_own(attempt: _Attempt) -> bool:
        """Nobody listens there, and the port we were given is the one we asked for.

        RFC 9293 section 3.5, simultaneous open.
        """
        host, port = attempt.sock.getsockname()[:2]
        return (host, port) == attempt.address

    def _win(self, attempt: _Attempt, earlier: Sequence[_Attempt]) -> None:
        self._liveness.worked(attempt.address)
        for other in earlier:
            # It had more time, and has not answered.
            self._liveness.failed(other.address, self._loop.now_s)
        self._end()
        self._racer.connected(attempt.sock, attempt.address)

    def _fail(self, address: Address, code: int) -> None:
        if code in SHORTAGES:
            self.code = code
            return
        if self.code not in SHORTAGES:
            self.code = code
        self._liveness.failed(address, self._loop.now_s)

    def _hang_up(self, attempt: _Attempt) -> None:
        self._running.remove(attempt)
        self._loop.close(attempt.sock.detach())

    def _end(self) -> None:
        self._left = []
        self._loop.deadlines.stop(self)
        for attempt in list(self._running):
            self._hang_up(attempt)

    def stop(self, *, timed_out: bool = False) -> None:
        """Close what is being made; those that had their time and did not answer are remembered."""
        if timed_out:
            for attempt in self._running:
                self._liveness.failed(attempt.address, self._loop.now_s)
        self._end()
