"""Finds the addresses of a server for a route: choice of a server, names, policy, the next try."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyforwarder.core.address import Address, HostPort, SamePort
from pyforwarder.core.connection import Life
from pyforwarder.core.eyeballs import Liveness
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.resolver import KEEP_S, MOST_ADDRESSES, TooManyNamesError, addresses_of
from pyforwarder.worker.race import Race

if TYPE_CHECKING:
    import _socket

    from pyforwarder.core.address import ServerAddress, UnixAddress
    from pyforwarder.runtime.resolver import Names
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.connector import Connector
    from pyforwarder.worker.host import Host


class Answered:
    """A name's answer that is to be obeyed after the running batch, unless it is stopped."""

    __slots__ = ("is_stopped",)

    def __init__(self) -> None:
        self.is_stopped = False

    def stop(self) -> None:
        """Nobody wants it any more: the client is gone, or has been given another server."""
        self.is_stopped = True


class _Dialing:
    """Receives for one client what its race between the addresses of its server comes to."""

    __slots__ = ("_client", "_connector")

    def __init__(self, connector: Connector, client: Client) -> None:
        self._connector = connector
        self._client = client

    def dial(self, address: Address) -> tuple[_socket.socket, int]:
        """See `Racer`."""
        return self._connector.dial(self._client, address)

    def connected(self, sock: _socket.socket, address: Address) -> None:
        """See `Racer`."""
        self._connector.connected(self._client, sock, address)

    def lost(self, code: int) -> None:
        """See `Racer`."""
        self._connector.lost(self._client, code)


class Destinations:
    """Finds where clients are to be connected, and has them connected there."""

    def __init__(self, host: Host, names: Names, connector: Connector) -> None:
        self._host = host
        self._loop = host.loop
        self._names = names
        self._connector = connector
        # By whether a client has named the server: what clients try tells nothing of upstreams.
        self._liveness = {True: Liveness(), False: Liveness()}

    def start(self, client: Client) -> None:
        """The client's route is known: find an address and connect to it."""
        route = client.route
        assert route is not None
        to = route.to
        if isinstance(to, str):
            client.upstream = client.listener.generation.upstreams[to]
            self._choose_server(client)
        else:
            client.connecting_s = time.monotonic()
            self.approach(client, to)

    def next(self, client: Client) -> None:
        """The last attempt failed: another address, another server, or no hope.

        Not from here: connect(2) may fail at once, and many servers that do would be a stack of
        calls as deep as their number.
        """
        self._loop.defer(self._try_next, client)

    def _try_next(self, client: Client) -> None:
        if client.life is not Life.CONNECTING:
            return
        if client.candidates:
            address, *client.candidates = client.candidates
            self._connector.connect(client, address, timeout_s=client.each_timeout_s)
        elif client.upstream is not None:
            self._choose_server(client)
        else:
            self._host.refuse(client, client.reason or CloseReason.UNREACHABLE)

    def _choose_server(self, client: Client) -> None:
        assert client.upstream is not None
        host = client.peer.host if client.peer is not None else None
        chosen = client.upstream.balancer.choose(host, self._loop.now_s, client.tried)
        if chosen is None:
            cause = ""  # what the last one that was tried has said
            if not client.tried:
                assert client.route is not None
                why = client.upstream.balancer.why_none(self._loop.now_s)
                cause = f"no server of upstream {client.route.to}: {why}"
            self._host.refuse(client, client.reason or CloseReason.UNREACHABLE, cause)
            return
        client.server_state = chosen
        client.connecting_s = time.monotonic()
        client.upstream.balancer.hold(chosen)
        self.approach(client, chosen.address)

    def approach(self, client: Client, to: ServerAddress) -> None:
        """The client's server is known: find its address, and connect to it if that may be."""
        if isinstance(to, SamePort):
            port = client.listener.local_port
            if not port:
                cause = f"no port for {to}"
                self._connector.failed(client, CloseReason.UNREACHABLE, cause, is_ours=True)
                return
            to = to.at(port)
        client.destination = to
        if isinstance(to, HostPort):
            self._resolve(client, to)
        elif self._may(client, to):
            self._connector.connect(client, to, timeout_s=self._connector.timeout_s(client))
        else:
            self._deny(client, to)

    def _resolve(self, client: Client, to: HostPort) -> None:
        """Find the name's addresses; not if the policy denies all that it may have."""
        route = client.route
        assert route is not None
        by_client = route.named_by_client
        allow = route.rule.allow
        if by_client and allow is not None and not allow.permits_port(to.port):
            cause = f"allow does not list port {to.port}"
            self._host.refuse(client, CloseReason.DENIED, cause)
            return
        # One deadline for the name and the connection, however many addresses there are.
        self._loop.deadlines.start(client, self._connector.timeout_s(client), self._loop.now_s)

        def answer(hosts: list[str]) -> None:
            # Deferred, so that what goes wrong is this client's and nobody else's. Its deadline may
            # pass before that; the end of this attempt stops what it waits for.
            answered = client.approach = Answered()
            self._loop.defer(lambda _: proceed(hosts, answered), client)

        def proceed(hosts: list[str], answered: Answered) -> None:
            if client.life is Life.CONNECTING and not answered.is_stopped:
                client.approach = None
                if by_client and len(hosts) > MOST_ADDRESSES:
                    cause = "the name has too many addresses"
                    self._connector.failed(client, CloseReason.UNRESOLVED, cause)
                    return
                self._resolved(client, addresses_of(hosts, to.port))

        keep_s = client.upstream.keep_s if client.upstream is not None else KEEP_S
        peer = client.peer.host if by_client and client.peer is not None else None
        try:
            wait = self._names.of(named_by_client=by_client).resolve(
                to.name, answer, keep_s=keep_s, client=peer
            )
            # None: `answer` has been called, and has set it.
            if wait is not None:
                client.approach = wait
        except TooManyNamesError:
            self._host.counters[Counter.NAMES_REFUSED] += 1
            self._host.refuse(client, CloseReason.BUSY, "too many names at once")

    def _resolved(self, client: Client, addresses: list[Address]) -> None:
        """Connect to one of the addresses of the client's server, if all of them may be."""
        assert client.route is not None
        by_client = client.route.named_by_client
        if not addresses:
            self._connector.failed(client, CloseReason.UNRESOLVED, "the name has no address")
            return
        # Every one of them is asked about, because the client may control the name, and which
        # one is used is chance.
        for address in addresses:
            if not self._may(client, address):
                self._deny(client, address)
                return
        if len(addresses) == 1:
            self._connector.connect(client, addresses[0], timeout_s=None)
        elif client.upstream is not None and client.upstream.transparent:
            # The supervisor prepares these sockets, one at a time.
            first, *rest = self._liveness[by_client].order(addresses, self._loop.now_s)
            client.each_timeout_s = self._connector.timeout_s(client) / (1 + len(rest))
            client.candidates = rest
            self._connector.connect(client, first, timeout_s=client.each_timeout_s)
        else:
            race = client.approach = Race(
                self._loop,
                _Dialing(self._connector, client),
                addresses,
                self._liveness[by_client],
                within_s=self._connector.timeout_s(client),
                pair=client,
            )
            race.begin()

    def _deny(self, client: Client, address: Address | UnixAddress) -> None:
        """The client may not be connected to the address."""
        assert client.route is not None
        allow, cause = client.route.rule.allow, None
        if allow is not None and isinstance(address, Address):
            cause = allow.refusal(address.host, address.port)
        self._host.refuse(client, CloseReason.DENIED, cause or f"{address} is this forwarder")

    def _may(self, client: Client, address: Address | UnixAddress) -> bool:
        """Whether the client may be connected to the address."""
        route = client.route
        assert route is not None
        return client.listener.generation.permits(route.rule, address, self._loop.now_s)
