"""Connects to a server's address: sockets and their options, deadlines, and what came of it."""

from __future__ import annotations

import _socket
import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.connection import Event, Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.copying import WATCHED
from pyforwarder.runtime.counters import (
    CONNECT_BOUNDS_S,
    CONNECT_FIRST,
    Counter,
    count_connect,
    count_failure,
    observe,
)
from pyforwarder.runtime.keepalive import keep_alive
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.loop import (
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
)
from pyforwarder.runtime.raw_sockets import reset_now
from pyforwarder.runtime.sockaddr import sockaddr
from pyforwarder.worker.race import SHORTAGES, Race, outcome_of

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.host import Host

_STREAM: Final = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK
CONNECTING: Final = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; Python 3.11 has no name for it


def _first_ephemeral_port() -> int:
    """The first port that the kernel gives to outgoing connections (ip(7)).

    From there on a connect to a port where nobody listens can meet itself (RFC 9293 section 3.5,
    simultaneous open).
    """
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 1024


# The server was reached and has reset the connection before we looked at it; a reset while the SYN
# is out is ECONNREFUSED, one behind the server's FIN is EPIPE (tcp_reset in net/ipv4/tcp_input.c).
RESET_SINCE: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
# Why a connect(2) failed, in the words of a refusal. What is not here is `unreachable`.
CONNECT_ERRORS: Final[Mapping[int, CloseReason]] = {
    errno.ECONNREFUSED: CloseReason.REFUSED,
    errno.ECONNRESET: CloseReason.REFUSED,
    errno.EPIPE: CloseReason.REFUSED,
    errno.ENOENT: CloseReason.REFUSED,  # unix: no such socket
    errno.ETIMEDOUT: CloseReason.TIMEOUT,
    errno.EADDRNOTAVAIL: CloseReason.BUSY,  # no address to connect from
    errno.EAGAIN: CloseReason.BUSY,  # unix: the server's backlog is full
    **dict.fromkeys(SHORTAGES, CloseReason.BUSY),
}


def _family_of(address: Address) -> int:
    return _socket.AF_INET6 if address.is_ipv6 else _socket.AF_INET


class Connector:
    """Connects clients to servers, one attempt after the other; destinations.py says where to."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = host.loop
        self.first_ephemeral_port = _first_ephemeral_port()
        self._asked = 0
        self._waiting_for_address: dict[int, tuple[Client, _socket.socket]] = {}

    @staticmethod
    def timeout_s(client: Client) -> float:
        """How long a client's server may take to answer."""
        if client.upstream is not None:
            return client.upstream.timeout_s
        return client.listener.generation.connect_s

    def connect(
        self, client: Client, address: Address | UnixAddress, *, timeout_s: float | None
    ) -> None:
        """Begin to connect to a server, and go on at once if it is there already.

        A server that is further away answers by an event, or `timeout_s` passes (None: the deadline
        that is running).
        """
        client.destination = address
        try:
            sock = self._socket_to(address)
        except OSError as error:
            self.refused(client, error.errno or errno.EIO)
            return
        fd = sock.fileno()
        client.attach_server(sock, fd)
        try:
            if isinstance(address, UnixAddress):
                code = sock.connect_ex(address.path)
            else:
                self._set_up(client, sock, address)
                upstream = client.upstream
                if upstream is not None and upstream.transparent:
                    family = _family_of(address)
                    if self._has_address(client, family):
                        self._ask_for_own_address(client, fd)
                        return
                code = self._dial(client, sock, address)
        except OSError as error:
            code = error.errno or errno.EIO
        self.came(client, code, timeout_s=timeout_s)

    def came(self, client: Client, code: int, *, timeout_s: float | None) -> None:
        """What the first connect(2) has said: see `_dial`."""
        fd = client.server_fd
        if code == 0:
            client.server_mask = WATCHED
            self._loop.watch(fd, WATCHED, self._ready, client)
            self._connected(client)
        elif code == errno.EALREADY:
            if timeout_s is not None:
                self._loop.deadlines.start(client, timeout_s, self._loop.now_s)
            client.server_mask = CONNECTING
            self._loop.watch(fd, CONNECTING, self._ready, client)
        else:
            self.refused(client, code)

    @staticmethod
    def _socket_to(address: Address | UnixAddress) -> _socket.socket:
        if isinstance(address, UnixAddress):
            return _socket.socket(_socket.AF_UNIX, _STREAM, 0)
        # never MPTCP, see supervisor/listeners/binding.py
        return _socket.socket(_family_of(address), _STREAM, _socket.IPPROTO_TCP)

    @staticmethod
    def _set_up(client: Client, sock: _socket.socket, address: Address) -> None:
        """What accepted sockets inherit from their listener.

        A crash is a reset, urgent bytes stay in the stream, and a small write never waits for an
        ACK (the kernel's worker writes packet by packet, too).
        """
        reset_at_close(sock.fileno())
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        keepalive = client.listener.generation.keepalive
        if keepalive.idle_s:
            keep_alive(sock, keepalive)
        segment_bytes = client.listener.segment_bytes
        if segment_bytes is not None:
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_MAXSEG, segment_bytes[address.is_ipv6])

    def _dial(self, client: Client, sock: _socket.socket, address: Address) -> int:
        """What connect(2) says: 0, EALREADY as long as nobody has answered, or an error.

        A TCP of this host answers within connect(2); asking it again tells so, and costs less than
        the event would.
        """
        upstream = client.upstream
        if upstream is not None and not upstream.is_plain:
            self._bind_source(sock, upstream.source_for(client.id, _family_of(address)))
        name = address if "%" not in address.host else sockaddr(address)
        code = sock.connect_ex(name)
        return sock.connect_ex(name) if code == errno.EINPROGRESS else outcome_of(code, address)

    def dial(self, client: Client, address: Address) -> tuple[_socket.socket, int]:
        """Begin one of several connections that are made at once; see `Racer`."""
        sock = self._socket_to(address)
        try:
            self._set_up(client, sock, address)
            return sock, self._dial(client, sock, address)
        except OSError as error:
            os.close(sock.detach())
            raise error from None

    def connected(self, client: Client, sock: _socket.socket, address: Address) -> None:
        """Take the first of several connections that is established."""
        fd = sock.fileno()
        client.approach = None
        client.destination = address
        client.attach_server(sock, fd)
        client.server_mask = WATCHED
        # Edge-triggered, but what has come before is reported.
        self._loop.watch(fd, WATCHED, self._ready, client)
        self._connected(client)

    def lost(self, client: Client, code: int) -> None:
        """Fail, as none of several connections can be made."""
        client.approach = None
        self.refused(client, code)

    @staticmethod
    def _has_address(client: Client, family: int) -> bool:
        """Whether the client's own address can be the source of a connection of this family."""
        peer = client.peer
        return peer is not None and (":" in peer.host) == (family == _socket.AF_INET6)

    def _ask_for_own_address(self, client: Client, fd: int) -> None:
        """Binding to an address that is not ours takes a privilege: the supervisor has it.

        It sets IP_TRANSPARENT on this one socket; `granted` goes on from there.
        """
        assert client.server is not None
        self._loop.deadlines.start(client, self.timeout_s(client), self._loop.now_s)
        # A socket that is neither connected nor listening reports EPOLLHUP, once.
        client.server_mask = EPOLLET
        self._loop.watch(fd, EPOLLET, self._ready, client)
        self._asked += 1
        self._waiting_for_address[self._asked] = (client, client.server)
        client.asked = self._asked
        client.is_shared = True
        self._host.ask_supervisor("transparent", [fd], self._asked)

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer; the client may be gone, or already with its next server."""
        waiting = self._waiting_for_address.pop(number, None)
        if waiting is None:
            return  # it was given up
        client, sock = waiting
        client.asked = 0
        if client.life is not Life.CONNECTING or client.server is not sock:
            return
        peer, address = client.peer, client.destination
        assert peer is not None
        assert isinstance(address, Address)
        if not done:
            self.failed(client, CloseReason.UNREACHABLE, is_ours=True)
            return
        try:
            sock.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((peer.host, 0))
            code = outcome_of(sock.connect_ex(sockaddr(address)), address)
        except OSError as error:
            code = error.errno or errno.EIO
        if code not in (0, errno.EINPROGRESS):
            self.refused(client, code)
            return
        client.server_mask = CONNECTING
        self._loop.change(client.server_fd, CONNECTING)

    def forget(self, client: Client) -> None:
        """The client goes on without an answer of the supervisor's, or has ended."""
        if client.asked:
            self._waiting_for_address.pop(client.asked, None)
            client.asked = 0

    @staticmethod
    def _bind_source(sock: _socket.socket, source: str | None) -> None:
        """Connect from one of the upstream's `source` addresses.

        With IP_BIND_ADDRESS_NO_PORT the port is chosen at connect, so that one port serves
        different servers at the same time (ip(7)).
        """
        if source is not None:
            sock.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))

    def _ready(self, client: Client, fd: int, mask: int) -> None:
        """The outcome of a connect: writable and no error means connected (connect(2))."""
        if mask & (EPOLLERR | EPOLLHUP) or not mask & EPOLLOUT:
            assert client.server is not None
            code = client.server.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
            if code or mask & EPOLLERR:
                self.refused(client, code)
                return
            if not mask & EPOLLOUT:
                return
        # What came with the connect (a server that speaks first) is found by the first read.
        if mask & (EPOLLIN | EPOLLRDHUP):
            client.down.readable = True
            client.down.end_seen = bool(mask & EPOLLRDHUP)
            client.down.urgent = bool(mask & EPOLLPRI)
        self._connected(client)

    def _connected(self, client: Client) -> None:
        to = client.destination
        if (
            isinstance(to, Address)
            and to.port >= self.first_ephemeral_port
            and self.is_itself(client)
        ):
            self.met_itself(client)
            return
        client.refusal = ""  # of a server that was tried before
        took_s = time.monotonic() - client.connecting_s
        counters = self._host.counters
        if client.server_state is not None:
            assert client.upstream is not None
            client.upstream.balancer.opened(client.server_state)
            client.server_opened = True
            count_connect(counters, client.server_state.counter)
            if client.upstream.connect_times:
                observe(counters, client.upstream.connect_times, CONNECT_BOUNDS_S, took_s)
        else:
            observe(counters, CONNECT_FIRST, CONNECT_BOUNDS_S, took_s)
        self._host.happen(client, Event.CONNECTED)

    @staticmethod
    def is_itself(client: Client) -> bool:
        """Whether nobody listens at the destination, and the connection is its own server."""
        assert client.server is not None
        name = client.server.getsockname()
        client.source = Address(name[0], name[1])
        return client.source == client.destination

    def met_itself(self, client: Client) -> None:
        """The connection `is_itself`."""
        self.failed(client, CloseReason.REFUSED, os.strerror(errno.ECONNREFUSED))

    def refused(self, client: Client, code: int) -> None:
        """The connect has failed, with this errno."""
        if code in RESET_SINCE and not client.candidates and client.upstream is None:
            # This is no refusal: a client that is connected directly would see this reset.
            self._drop(client)
            self._host.broken(client, CloseReason.SERVER_RESET)
        else:
            reason = CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE)
            self.failed(client, reason, os.strerror(code), is_ours=code in SHORTAGES)

    def timed_out(self, client: Client) -> None:
        """The deadline of a resolve or a connect has passed."""
        is_ours = False
        if isinstance(client.approach, Race):
            client.approach.stop(timed_out=True)
            is_ours = client.approach.code in SHORTAGES  # not all addresses have been asked
        self.failed(client, CloseReason.TIMEOUT, "no answer in time", is_ours=is_ours)

    def failed(
        self, client: Client, reason: CloseReason, cause: str = "", *, is_ours: bool = False
    ) -> None:
        """Give up this address; the next one may do.

        A fault of this host (a shortage, no privilege) is not held against the server: else a
        client that uses up descriptors or ports could have all of them ejected.
        """
        self._drop(client)
        self._host.counters[Counter.CONNECT_FAILED] += 1
        client.reason = reason
        client.refusal = cause
        if client.server_state is not None and not client.candidates:
            assert client.upstream is not None
            if not is_ours:
                client.upstream.balancer.failed(client.server_state, self._loop.now_s)
            count_failure(self._host.counters, client.server_state.counter, reason, is_ours=is_ours)
            client.upstream.balancer.release(client.server_state)
            client.tried = [*client.tried, client.server_state]
            client.server_state = None
        self._host.happen(client, Event.SERVER_FAILED)

    def _drop(self, client: Client) -> None:
        """Give up the server's socket, if there is one, and what was to lead to one."""
        if client.approach is not None:
            client.approach.stop()
            client.approach = None
        self.forget(client)
        sock = client.server
        if sock is not None:
            fd = sock.detach()
            if client.is_shared:
                # The supervisor may have it still, see `Closing`.
                self._loop.forget(fd)
                reset_now(fd)
            if client.server_mask:
                self._loop.close(fd)
            else:
                os.close(fd)
            client.server = client.source = None
            client.is_bare = False  # the next one gets all options at once
            client.server_fd = -1
            client.server_mask = 0
        self._loop.deadlines.stop(client)
