"""From a route to a connected server: names, policy, choice of server, deadlines, the next try."""

from __future__ import annotations

import _socket
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pyforwarder.address import Address, HostPort, UnixAddress
from pyforwarder.connection import Event, Life
from pyforwarder.counters import Counter
from pyforwarder.loop import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from pyforwarder.reasons import CloseReason
from pyforwarder.worker.resolver import KEEP_S, addresses_of

if TYPE_CHECKING:
    from pyforwarder.config import Upstream
    from pyforwarder.routing import Route
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.generation import Generation
    from pyforwarder.worker.resolver import Resolver
    from pyforwarder.worker.server import Server

CONNECTING: Final = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; Python 3.11 has no name for it
LINGER_RESET: Final = b"\1\0\0\0\0\0\0\0"  # struct linger {1, 0}: close() sends RST


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
    # Ours to be short of: local ports, descriptors, memory, a unix listener's backlog.
    errno.EADDRNOTAVAIL: CloseReason.BUSY,
    errno.EMFILE: CloseReason.BUSY,
    errno.ENFILE: CloseReason.BUSY,
    errno.ENOBUFS: CloseReason.BUSY,
    errno.ENOMEM: CloseReason.BUSY,
    errno.EAGAIN: CloseReason.BUSY,
}


def is_permitted(
    generation: Generation,
    route: Route,
    address: Address | UnixAddress,
    now_s: float,
    *,
    protocol: Literal["tcp", "udp"] = "tcp",
) -> bool:
    """Whether the rule's client may be connected to the address: it is allowed, and not us."""
    if generation.is_own(address, now_s, protocol=protocol):
        return False
    allow = route.rule.allow
    if allow is None:
        return True
    return isinstance(address, Address) and allow.permits(address.host, address.port)


def source_for(upstream: Upstream, number: int, family: int) -> str | None:
    """Which of the upstream's `source` addresses the connection of this number takes, if any."""
    sources = [
        host for host in map(str, upstream.source) if (":" in host) == (family == _socket.AF_INET6)
    ]
    return sources[number % len(sources)] if sources else None


class Connector:
    """Connects clients to servers, one attempt after the other."""

    def __init__(self, server: Server, resolver: Resolver) -> None:
        self._server = server
        self._loop = server.loop
        self._resolver = resolver
        self._first_ephemeral_port = _first_ephemeral_port()
        self._asked = 0
        self._waiting_for_address: dict[int, tuple[Client, _socket.socket]] = {}

    def start(self, client: Client) -> None:
        """The client's route is known: find an address and connect to it."""
        route = client.route
        assert route is not None
        to = route.to
        if isinstance(to, str):
            generation = client.listener.generation
            client.balancer = generation.balancers[to]
            self._choose_server(client)
        else:
            self._approach(client, to)

    def next(self, client: Client) -> None:
        """The last attempt failed: another address, another server, or no hope.

        Not from here: connect(2) may fail at once, and many servers that do would be a stack of
        calls as deep as their number.
        """
        self._loop.defer(self._go_on, client)

    def _go_on(self, client: Client) -> None:
        if client.life is not Life.CONNECTING:
            return
        if client.candidates:
            self._connect(client)
        elif client.balancer is not None:
            self._choose_server(client)
        else:
            self._server.refuse(client, client.reason or CloseReason.UNREACHABLE)

    def _choose_server(self, client: Client) -> None:
        assert client.balancer is not None
        host = client.peer.host if client.peer is not None else None
        chosen = client.balancer.choose(host, self._loop.now_s, client.tried)
        if chosen is None:
            self._server.refuse(client, client.reason or CloseReason.UNREACHABLE)
            return
        client.server_state = chosen
        client.balancer.hold(chosen)
        client.tried.append(chosen)
        self._approach(client, chosen.address)

    def _approach(self, client: Client, to: Address | HostPort | UnixAddress) -> None:
        client.destination = to
        if isinstance(to, HostPort):
            self._resolve(client, to)
        elif self._may(client, [to]):
            client.candidates = [to]
            self._connect(client)

    def _resolve(self, client: Client, to: HostPort) -> None:
        self._loop.deadlines.start(client, self._timeout_s(client), self._loop.now_s)

        def answer(hosts: list[str]) -> None:
            # Deferred, so that what goes wrong is this client's and nobody else's.
            self._loop.defer(lambda _: proceed(hosts), client)

        def proceed(hosts: list[str]) -> None:
            # The client may be gone, or already with its next server.
            if client.life is not Life.CONNECTING or client.destination is not to:
                return
            addresses = addresses_of(hosts, to.port)
            if not addresses:
                self.failed(client, CloseReason.UNRESOLVED)
            elif self._may(client, addresses):
                client.candidates = list(addresses)
                self._connect(client)

        upstream = self._upstream(client)
        keep_s = upstream.resolve_every_s if upstream is not None else KEEP_S
        if not self._resolver.resolve(to.name, answer, keep_s=keep_s):
            self._server.refuse(client, CloseReason.BUSY)

    def _may(self, client: Client, addresses: list[Address] | list[Address | UnixAddress]) -> bool:
        """Whether every one of the addresses is permitted; refuses the client if not.

        Every one, because the client may control the name, and which address is used is chance.
        """
        route = client.route
        assert route is not None
        generation = client.listener.generation
        for address in addresses:
            if not is_permitted(generation, route, address, self._loop.now_s):
                self._server.refuse(client, CloseReason.DENIED)
                return False
        return True

    def _upstream(self, client: Client) -> Upstream | None:
        route = client.route
        if route is None or not isinstance(route.to, str):
            return None
        return client.listener.generation.config.upstreams[route.to]

    def _timeout_s(self, client: Client) -> float:
        if client.balancer is not None:
            upstream = self._upstream(client)
            if upstream is not None and upstream.connect_timeout_s is not None:
                return upstream.connect_timeout_s
        return client.listener.generation.connect_s

    def _connect(self, client: Client) -> None:
        """Begin to connect to the next candidate."""
        address = client.candidates.pop(0)
        client.destination = address
        try:
            if isinstance(address, UnixAddress):
                family, protocol = _socket.AF_UNIX, 0
            else:
                family = _socket.AF_INET6 if ":" in address.host else _socket.AF_INET
                protocol = _socket.IPPROTO_TCP  # never MPTCP, see supervisor/listeners.py
            sock = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK, protocol)
        except OSError as error:
            self.failed(client, CONNECT_ERRORS.get(error.errno or 0, CloseReason.UNREACHABLE))
            return
        fd = sock.fileno()
        try:
            if isinstance(address, UnixAddress):
                code = sock.connect_ex(address.path)
            else:
                # What accepted sockets inherit from their listener: a crash is a reset, urgent
                # bytes stay in the stream, and a small write never waits for an ACK (the kernel's
                # worker writes packet by packet, too).
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, LINGER_RESET)
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)
                sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
                segment_bytes = client.listener.segment_bytes
                if segment_bytes is not None:
                    sock.setsockopt(
                        _socket.IPPROTO_TCP,
                        _socket.TCP_MAXSEG,
                        segment_bytes[family == _socket.AF_INET6],
                    )
                if client.balancer is not None:
                    if self._wants_own_address(client, family):
                        self._ask_for_own_address(client, sock, fd)
                        return
                    self._bind_source(client, sock, family)
                code = sock.connect_ex(address)
        except OSError as error:
            code = error.errno or errno.EIO
        client.attach_server(sock, fd)
        if code not in (0, errno.EINPROGRESS):
            self.failed(client, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))
            return
        self._loop.deadlines.start(client, self._timeout_s(client), self._loop.now_s)
        client.server_mask = CONNECTING
        self._loop.watch(fd, CONNECTING, self._ready, client)

    def _wants_own_address(self, client: Client, family: int) -> bool:
        """Whether the server is to see the client's own address as the source."""
        upstream = self._upstream(client)
        if upstream is None or not upstream.transparent or client.peer is None:
            return False
        return (":" in client.peer.host) == (family == _socket.AF_INET6)

    def _ask_for_own_address(self, client: Client, sock: _socket.socket, fd: int) -> None:
        """Binding to an address that is not ours takes a privilege: the supervisor has it.

        It sets IP_TRANSPARENT on this one socket; `granted` goes on from there.
        """
        client.attach_server(sock, fd)
        self._loop.deadlines.start(client, self._timeout_s(client), self._loop.now_s)
        # A socket that is neither connected nor listening reports EPOLLHUP, once.
        client.server_mask = EPOLLET
        self._loop.watch(fd, EPOLLET, self._ready, client)
        self._asked += 1
        self._waiting_for_address[self._asked] = (client, sock)
        self._server.ask_supervisor("transparent", [fd], self._asked)

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer; the client may be gone, or already with its next server."""
        client, sock = self._waiting_for_address.pop(number)
        if client.life is not Life.CONNECTING or client.server is not sock:
            return
        peer, address = client.peer, client.destination
        assert peer is not None
        assert isinstance(address, Address)
        if not done:
            self.failed(client, CloseReason.UNREACHABLE)
            return
        try:
            sock.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((peer.host, 0))
            code = sock.connect_ex(address)
        except OSError as error:
            code = error.errno or errno.EIO
        if code not in (0, errno.EINPROGRESS):
            self.failed(client, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))
            return
        client.server_mask = CONNECTING
        self._loop.change(client.server_fd, CONNECTING)

    def _bind_source(self, client: Client, sock: _socket.socket, family: int) -> None:
        """Connect from one of the upstream's `source` addresses.

        With IP_BIND_ADDRESS_NO_PORT the port is chosen at connect, so that one port serves
        different servers at the same time (ip(7)).
        """
        upstream = self._upstream(client)
        source = upstream and source_for(upstream, client.id, family)
        if source:
            sock.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))

    def _ready(self, client: Client, fd: int, mask: int) -> None:
        """The outcome of a connect: writable and no error means connected (connect(2))."""
        if mask & (EPOLLERR | EPOLLHUP) or not mask & EPOLLOUT:
            assert client.server is not None
            code = client.server.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
            if code in RESET_SINCE and not client.candidates and client.balancer is None:
                # It is no refusal: a client that is connected directly would see this reset.
                self._server.broken(client, CloseReason.SERVER_RESET)
                return
            if code or mask & EPOLLERR:
                self.failed(client, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))
                return
            if not mask & EPOLLOUT:
                return
        if self._met_itself(client):
            self.failed(client, CloseReason.REFUSED)
            return
        if client.balancer is not None and client.server_state is not None:
            client.balancer.opened(client.server_state)
            client.server_opened = True
        # What came with the connect (a server that speaks first) is found by the first read.
        if mask & (EPOLLIN | EPOLLRDHUP):
            client.down.readable = True
            client.down.end_seen = bool(mask & EPOLLRDHUP)
            client.down.urgent = bool(mask & EPOLLPRI)
        self._server.happen(client, Event.CONNECTED)

    def _met_itself(self, client: Client) -> bool:
        """Whether the connection is its own server: connected to the port it was given itself."""
        to = client.destination
        if not isinstance(to, Address) or to.port < self._first_ephemeral_port:
            return False
        assert client.server is not None
        name = client.server.getsockname()
        client.source = Address(name[0], name[1])
        return client.source.port == to.port and client.source.host == to.host

    def timed_out(self, client: Client) -> None:
        """The deadline of a resolve or a connect has passed."""
        self.failed(client, CloseReason.TIMEOUT)

    def failed(self, client: Client, reason: CloseReason) -> None:
        """This address will not do; the next one may."""
        self._drop(client)
        self._server.counters[Counter.CONNECT_FAILED] += 1
        client.reason = reason
        if (
            not client.candidates
            and client.balancer is not None
            and client.server_state is not None
        ):
            client.balancer.failed(client.server_state, self._loop.now_s)
            client.balancer.release(client.server_state)
            client.server_state = None
        self._server.happen(client, Event.SERVER_FAILED)

    def _drop(self, client: Client) -> None:
        """Give up the server's socket, if there is one."""
        sock = client.server
        if sock is not None:
            fd = sock.detach()
            if client.server_mask:
                self._loop.close(fd)
            else:
                os.close(fd)
            client.server = client.source = None
            client.server_fd = -1
            client.server_mask = 0
        self._loop.deadlines.stop(client)
