"""Makes a session's socket from its route, connected to the server: choice, names, policy,
addresses.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address, HostPort, SamePort, UnixAddress
from pyforwarder.core.eyeballs import MOST_ATTEMPTS, interleave
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.session import SessionEvent
from pyforwarder.datapath.ebpf.abi import PairState
from pyforwarder.runtime.counters import (
    Counter,
    count_connect,
    count_failure,
)
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.resolver import KEEP_S, MOST_ADDRESSES, TooManyNamesError, addresses_of
from pyforwarder.runtime.sockaddr import sockaddr
from pyforwarder.worker.connector import CONNECT_ERRORS
from pyforwarder.worker.udp.icmp_errors import want_errors
from pyforwarder.worker.udp.runs import want_runs

if TYPE_CHECKING:
    from pyforwarder.runtime.resolver import Names
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

# A server says its connection id in its first answers, until the handshake is done.
LEARN_FROM: Final = 16


class ConnectionMaps:
    """Gives sessions their servers."""

    def __init__(self, server: DatagramServer, names: Names) -> None:
        self._server = server
        self._counters = server.counters
        self._loop = server.loop
        self._names = names

    def choose(self, session: Session) -> None:
        """Find the server of a new session and connect to it, or refuse the session."""
        to = session.route.to
        generation = session.listener.generation
        timeout_s = generation.connect_s
        if isinstance(to, str):
            session.upstream = upstream = generation.upstreams[to]
            timeout_s = upstream.timeout_s
            chosen = (
                upstream.balancer.servers[session.target.number]
                if session.target is not None
                else upstream.balancer.choose(session.peer.host, self._loop.now_s)
            )
            if chosen is None:
                why = upstream.balancer.why_none(self._loop.now_s)
                cause = f"no server of upstream {to}: {why}"
                self._server.refuse(session, CloseReason.UNREACHABLE, cause)
                return
            session.server_state = chosen
            upstream.balancer.hold(chosen)
            to = chosen.address
        if isinstance(to, SamePort):
            to = to.at(session.listener.local_port)
        session.destination = to
        self._loop.deadlines.start(session, timeout_s, self._loop.now_s)
        if isinstance(to, UnixAddress):
            self._server.refuse(session, CloseReason.UNREACHABLE, f"{to} takes no datagrams")
        elif isinstance(to, HostPort):
            self._resolve(session, to)
        else:
            self._connect(session, [to])

    def _resolve(self, session: Session, to: HostPort) -> None:
        route = session.route
        by_client = route.named_by_client
        allow = route.rule.allow
        if by_client and allow is not None and not allow.permits_port(to.port):
            self._server.refuse(session, CloseReason.DENIED, f"allow does not list port {to.port}")
            return

        def answer(hosts: list[str]) -> None:
            # Deferred, so that what goes wrong is this session's and nobody else's.
            self._loop.defer(lambda _: self._resolved(session, to, hosts), session)

        resolver = self._names.of(named_by_client=by_client, by_datagram=True)
        keep_s = session.upstream.keep_s if session.upstream is not None else KEEP_S
        client = session.peer.host if by_client else None
        try:
            session.asking = resolver.resolve(to.name, answer, keep_s=keep_s, client=client)
        except TooManyNamesError:
            self._counters[Counter.NAMES_REFUSED] += 1
            self._server.refuse(session, CloseReason.BUSY, "too many names at once")

    def _resolved(self, session: Session, to: HostPort, hosts: list[str]) -> None:
        """Connect to one of the addresses, unless the session has ended in the meantime."""
        if session.has_ended:
            return
        session.asking = None
        if session.route.named_by_client and len(hosts) > MOST_ADDRESSES:
            self._server.refuse(session, CloseReason.UNRESOLVED, "the name has too many addresses")
            return
        addresses = addresses_of(hosts, to.port)
        if session.target is not None and session.target.server in addresses:
            addresses = [session.target.server]
        if addresses:
            self._connect(session, addresses)
        else:
            self._server.refuse(session, CloseReason.UNRESOLVED, "the name has no address")

    def _deny(self, session: Session, address: Address) -> None:
        """The client may not be connected to the address."""
        allow = session.route.rule.allow
        cause = allow.refusal(address.host, address.port) if allow is not None else None
        self._server.refuse(session, CloseReason.DENIED, cause or f"{address} is this forwarder")

    def _connect(self, session: Session, addresses: Sequence[Address]) -> None:
        generation, rule = session.listener.generation, session.route.rule
        for address in addresses:
            if not generation.permits(rule, address, self._loop.now_s, protocol="udp"):
                self._deny(session, address)
                return
        if session.upstream is not None and session.upstream.transparent:
            is_ipv6 = session.peer.is_ipv6
            same = [address for address in addresses if address.is_ipv6 == is_ipv6]
            if same:
                self._ask_for_clients_address(session, same[0])
                return
        code = 0
        for address in interleave(addresses)[:MOST_ATTEMPTS]:
            family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                code = error.errno or errno.EIO
                break
            try:
                if session.upstream is not None:
                    source = session.upstream.source_for(session.id, family)
                    if source:
                        sock.bind((source, 0))
                sock.connect(sockaddr(address))
                want_errors(sock)
                want_runs(sock)
                name = sock.getsockname()
            except OSError as error:
                sock.close()
                code = error.errno or errno.EIO
                continue
            self._connected(session, sock, address, name)
            return
        self._not_connected(session, code)

    def _ask_for_clients_address(self, session: Session, address: Address) -> None:
        """Have the supervisor prepare a socket; what the client sends meanwhile waits."""
        family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._not_connected(session, error.errno or errno.EIO)
            return
        session.destination = address

        def granted(sock: socket.socket, done: bool) -> None:
            session.address_asked = 0
            # Deferred, so that what goes wrong is this session's and nobody else's.
            self._loop.defer(
                lambda _: self._connect_as_client(session, sock, address, done=done), session
            )

        session.address_asked = self._server.client_addresses.ask_for(
            sock, granted, now_s=self._loop.now_s
        )
        if not session.address_asked:
            sock.close()
            cause = "too many sessions at once that are to have their client's address"
            self._server.refuse(session, CloseReason.BUSY, cause)

    def _connect_as_client(
        self, session: Session, sock: socket.socket, address: Address, *, done: bool
    ) -> None:
        """Connect from the client's address, unless the session has ended in the meantime."""
        if session.has_ended:
            sock.close()
            return
        if not done:
            sock.close()
            cause = "this host does not let a socket have the client's address"
            self._server.refuse(session, CloseReason.UNREACHABLE, cause)
            return
        host, _, _, scope = session.key
        try:
            sock.bind((host, 0, 0, scope) if address.is_ipv6 else (host, 0))
            sock.connect(sockaddr(address))
            want_errors(sock)
            want_runs(sock)
            name = sock.getsockname()
        except OSError as error:
            sock.close()
            # No server is to blame: the address may be made up, and none that can be used.
            reason = CONNECT_ERRORS.get(error.errno or errno.EIO, CloseReason.UNREACHABLE)
            self._server.refuse(session, reason, os.strerror(error.errno or errno.EIO))
            return
        self._connected(session, sock, address, name)

    def _connected(
        self, session: Session, sock: socket.socket, address: Address, name: tuple[str, int]
    ) -> None:
        """The session has a socket to its server, of this name."""
        session.happen(SessionEvent.CONNECTED)
        session.sock = sock
        session.source = Address(name[0], name[1])
        session.destination = address
        self._established(session)

    def _not_connected(self, session: Session, code: int) -> None:
        """Refuse the session, as this host has no way to its server."""
        reason = CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE)
        if session.upstream is not None and session.server_state is not None:
            session.upstream.balancer.failed(session.server_state, self._loop.now_s)
            count_failure(self._counters, session.server_state.counter, reason)
        self._server.refuse(session, reason, os.strerror(code))

    def _established(self, session: Session) -> None:
        assert session.sock is not None
        if session.upstream is not None and session.server_state is not None:
            session.upstream.balancer.opened(session.server_state)
            count_connect(self._counters, session.server_state.counter)
            session.server_opened = True
        self._loop.watch(session.sock.fileno(), EPOLLIN, self._server.copying.answered, session)
        self._server.watch_idle(session)
        self._server.handover.established(session)
        self._server.records.show(session, PairState.JOINED)
        self._counters[Counter.JOINED_COPY] += 1
        if session.route.rule.index in session.listener.ruleset.followed:
            session.learning = LEARN_FROM
        negotiation = session.route.negotiation
        if negotiation is not None:
            assert session.source is not None
            answer = negotiation.granted(session.source)
            if answer:
                self._server.copying.send_to_client(session, answer)
        if session.listener.send_proxy is not None:
            session.proxy_header = _proxy_header(session)
        self._server.copying.send_waiting(session)


def _proxy_header(session: Session) -> bytes:
    forms = session.listener.send_proxy
    if forms is None or forms[session.route.rule.index] == "off":
        return b""
    # The id that `show` and the log know the session by, as for TCP.
    unique_id = (proxy_protocol.TLV_UNIQUE_ID, b"%d" % session.id)
    return proxy_protocol.build_v2(
        session.peer, session.asked_address(), [unique_id], datagrams=True
    )
