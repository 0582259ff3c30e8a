"""From a route to a connected server: names, policy, choice of server, deadlines, the next try."""

from __future__ import annotations

import _socket
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.address import Address, HostPort, UnixAddress
from pyforwarder.connection import Event, Life
from pyforwarder.counters import Counter
from pyforwarder.datapath.copying import WATCHED
from pyforwarder.loop import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from pyforwarder.reasons import CloseReason
from pyforwarder.worker.linger import reset_at_close
from pyforwarder.worker.resolver import KEEP_S, addresses_of

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.resolver import Resolver
    from pyforwarder.worker.server import Server

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
    # Ours to be short of: local ports, descriptors, memory, a unix listener's backlog.
    errno.EADDRNOTAVAIL: CloseReason.BUSY,
    errno.EMFILE: CloseReason.BUSY,
    errno.ENFILE: CloseReason.BUSY,
    errno.ENOBUFS: CloseReason.BUSY,
    errno.ENOMEM: CloseReason.BUSY,
    errno.EAGAIN: CloseReason.BUSY,
}


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
            client.upstream = client.listener.generation.upstreams[to]
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
            address, *client.candidates = client.candidates
            self._connect(client, address)
        elif client.upstream is not None:
            self._choose_server(client)
        else:
            self._server.refuse(client, client.reason or CloseReason.UNREACHABLE)

    def _choose_server(self, client: Client) -> None:
        assert client.upstream is not None
        host = client.peer.host if client.peer is not None else None
        chosen = client.upstream.balancer.choose(host, self._loop.now_s, client.tried)
        if chosen is None:
            self._server.refuse(client, client.reason or CloseReason.UNREACHABLE)
            return
        client.server_state = chosen
        client.upstream.balancer.hold(chosen)
        self._approach(client, chosen.address)

    def _approach(self, client: Client, to: Address | HostPort | UnixAddress) -> None:
        client.destination = to
        if isinstance(to, HostPort):
            self._resolve(client, to)
        elif self._may(client, to):
            self._connect(client, to)
        else:
            self._server.refuse(client, CloseReason.DENIED)

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
            # Every one of them is asked about, because the client may control the name, and which
            # one is used is chance.
            if not addresses:
                self.failed(client, CloseReason.UNRESOLVED)
            elif all(self._may(client, address) for address in addresses):
                address, *client.candidates = addresses
                self._connect(client, address)
            else:
                self._server.refuse(client, CloseReason.DENIED)

        keep_s = client.upstream.keep_s if client.upstream is not None else KEEP_S
        if not self._resolver.resolve(to.name, answer, keep_s=keep_s):
            self._server.refuse(client, CloseReason.BUSY)

    def _may(self, client: Client, address: Address | UnixAddress) -> bool:
        """Whether the client may be connected to the address."""
        route = client.route
        assert route is not None
        return client.listener.generation.permits(route.rule, address, self._loop.now_s)

    @staticmethod
    def _timeout_s(client: Client) -> float:
        if client.upstream is not None:
            return client.upstream.timeout_s
        return client.listener.generation.connect_s

    def _connect(self, client: Client, address: Address | UnixAddress) -> None:
        """Begin to connect to a server, and go on at once if it is there already.

        A TCP of this host answers within connect(2); asking it again tells so, and costs less than
        the event would. A server that is further away answers by an event.
        """
        client.destination = address
        try:
            if isinstance(address, UnixAddress):
                family, protocol = _socket.AF_UNIX, 0
            else:
                family = _socket.AF_INET6 if ":" in address.host else _socket.AF_INET
                protocol = _socket.IPPROTO_TCP  # never MPTCP, see supervisor/listeners.py
            sock = _socket.socket(family, _STREAM, protocol)
        except OSError as error:
            self.failed(client, CONNECT_ERRORS.get(error.errno or 0, CloseReason.UNREACHABLE))
            return
        fd = sock.fileno()
        client.attach_server(sock, fd)
        try:
            if isinstance(address, UnixAddress):
                code = sock.connect_ex(address.path)
            else:
                # What accepted sockets inherit from their listener: a crash is a reset, urgent
                # bytes stay in the stream, and a small write never waits for an ACK (the kernel's
                # worker writes packet by packet, too).
                reset_at_close(fd)
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)
                sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
                segment_bytes = client.listener.segment_bytes
                if segment_bytes is not None:
                    sock.setsockopt(
                        _socket.IPPROTO_TCP,
                        _socket.TCP_MAXSEG,
                        segment_bytes[family == _socket.AF_INET6],
                    )
                upstream = client.upstream
                if upstream is not None and not upstream.is_plain:
                    if upstream.transparent and self._has_address(client, family):
                        self._ask_for_own_address(client, fd)
                        return
                    self._bind_source(sock, upstream.source_for(client.id, family))
                code = sock.connect_ex(address)
                if code == errno.EINPROGRESS:
                    code = sock.connect_ex(address)
        except OSError as error:
            code = error.errno or errno.EIO
        if code == 0:
            client.server_mask = WATCHED
            self._loop.watch(fd, WATCHED, self._ready, client)
            self._connected(client)
        elif code == errno.EALREADY:
            self._loop.deadlines.start(client, self._timeout_s(client), self._loop.now_s)
            client.server_mask = CONNECTING
            self._loop.watch(fd, CONNECTING, self._ready, client)
        else:
            self._refused(client, code)

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
        self._loop.deadlines.start(client, self._timeout_s(client), self._loop.now_s)
        # A socket that is neither connected nor listening reports EPOLLHUP, once.
        client.server_mask = EPOLLET
        self._loop.watch(fd, EPOLLET, self._ready, client)
        self._asked += 1
        self._waiting_for_address[self._asked] = (client, client.server)
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
            self._refused(client, code)
            return
        client.server_mask = CONNECTING
        self._loop.change(client.server_fd, CONNECTING)

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
                self._refused(client, code)
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
        if isinstance(to, Address) and to.port >= self._first_ephemeral_port:
            assert client.server is not None
            name = client.server.getsockname()
            client.source = Address(name[0], name[1])
            if client.source == to:
                # Nobody listens there: the connection is its own server.
                self.failed(client, CloseReason.REFUSED)
                return
        if client.server_state is not None:
            assert client.upstream is not None
            client.upstream.balancer.opened(client.server_state)
            client.server_opened = True
        self._server.happen(client, Event.CONNECTED)

    def _refused(self, client: Client, code: int) -> None:
        """The connect has failed, with this errno."""
        if code in RESET_SINCE and not client.candidates and client.upstream is None:
            # It is no refusal: a client that is connected directly would see this reset.
            self._drop(client)
            self._server.broken(client, CloseReason.SERVER_RESET)
        else:
            self.failed(client, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))

    def timed_out(self, client: Client) -> None:
        """The deadline of a resolve or a connect has passed."""
        self.failed(client, CloseReason.TIMEOUT)

    def failed(self, client: Client, reason: CloseReason) -> None:
        """This address will not do; the next one may."""
        self._drop(client)
        self._server.counters[Counter.CONNECT_FAILED] += 1
        client.reason = reason
        if client.server_state is not None and not client.candidates:
            assert client.upstream is not None
            client.upstream.balancer.failed(client.server_state, self._loop.now_s)
            client.upstream.balancer.release(client.server_state)
            client.tried = [*client.tried, client.server_state]
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
