"""What the kernel has opened by itself, as a worker sees it: pairs to adopt, and ends to count.

Connections that were short have begun and ended without a socket of ours. The keeper tells of them
afterwards, so that counters and the log say of them what they say of any other.
"""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    ListenerCounter,
    RuleCounter,
    count_connect,
    count_disconnect,
)
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.worker.client import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pyforwarder.core.routing import Rule as RoutedRule
    from pyforwarder.core.upstreams import ServerState
    from pyforwarder.worker.generation import UpstreamState
    from pyforwarder.worker.server import Server

_MOST_MESSAGE_BYTES: Final = 1 << 16
# In one turn of the loop: others have their turn, too.
_MESSAGES_AT_ONCE: Final = 16


class _Passed(Client):
    """One that has no socket: for the log alone, and never among the clients."""

    __slots__ = ()

    def source_address(self) -> Address | None:
        """What the program has connected from."""
        return self.source


class Opened:
    """Hears of the connections that the kernel has opened, for one worker."""

    def __init__(self, server: Server, sock: socket.socket, adopt: Callable[[], object]) -> None:
        """`sock` is where the keeper tells of them; `adopt` takes in those that last."""
        self._server = server
        self._sock = sock
        self._adopt = adopt
        sock.setblocking(False)
        server.loop.watch(sock.fileno(), EPOLLIN, self._heard, None)

    def _heard(self, _owner: object, _fd: int, _mask: int) -> None:
        self.hear(_MESSAGES_AT_ONCE)

    def hear(self, most: int = 1 << 32) -> None:
        """Do what it has said, all of it or so many messages."""
        for _ in range(most):
            try:
                data = self._sock.recv(_MOST_MESSAGE_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._server.loop.forget(self._sock.fileno())
                return
            message = json.loads(data)
            for ended in message["ended"]:
                self._count(*ended)
            if message["adopt"]:
                self._adopt()

    def _count(
        self,
        listener: str,
        rule: str,
        client_side: list[list[object]],
        server_side: list[list[object]],
        begun_ns: int,
        ended_ns: int,
        carried: list[int],
    ) -> None:
        server = self._server
        peer, local = map(_address, client_side)
        source, destination = map(_address, server_side)
        state, route_rule = server.generation.listener_and_rule(listener, local.port, rule)
        client = _Passed(server, state, None, -1, peer, begun_ns / 1e9)
        client.id = server.next_id()
        client.destination, client.source = destination, source
        client.route = Route(route_rule, leads_to(route_rule, destination), 0, None, False)
        client.kind, client.pair_reason = DatapathKind.SPLICE, PairReason.DECIDED
        client.reason = CloseReason.FINISHED
        count_opened(server, client, route_rule)
        counters = server.counters
        up_bytes, up_packets, down_bytes, down_packets = carried
        counters[CLOSED_INDEX[CloseReason.FINISHED]] += 1
        counters[Counter.UP_BYTES] += up_bytes
        counters[Counter.DOWN_BYTES] += down_bytes
        counters[state.counter + ListenerCounter.UP_BYTES] += up_bytes
        counters[state.counter + ListenerCounter.DOWN_BYTES] += down_bytes
        found = server_of(server, route_rule, destination)
        if found is not None:
            upstream, chosen = found
            upstream.balancer.opened(chosen)
            upstream.balancer.closed(chosen)
            count_connect(counters, chosen.counter)
            count_disconnect(counters, chosen.counter)
        if server.log.tells:
            server.log.closed(
                client,
                (up_bytes, up_packets),
                (down_bytes, down_packets),
                age_s=(ended_ns - begun_ns) / 1e9,
            )


def count_opened(server: Server, client: Client, rule: RoutedRule) -> None:
    """Count a connection that the kernel has opened, and no worker has counted yet.

    `next_id` has counted it as accepted, or is to.
    """
    counters, state = server.counters, client.listener
    counters[state.counter + ListenerCounter.ACCEPTED] += 1
    counters[state.rule_counters[rule.index] + RuleCounter.TAKEN] += 1
    counters[Counter.PAIRS_OPENED] += 1
    counters[Counter.JOINED_EXPRESS] += 1


def leads_to(rule: RoutedRule, destination: Address) -> str | Address:
    """Where a rule leads, for the log: an upstream's name, or the server."""
    return rule.to if isinstance(rule.to, str) else destination


def server_of(
    server: Server, rule: RoutedRule, destination: Address
) -> tuple[UpstreamState, ServerState] | None:
    """The upstream of a rule and its server with this address, if it has them still."""
    upstream = server.generation.upstreams.get(rule.to) if isinstance(rule.to, str) else None
    if upstream is not None:
        for one in upstream.balancer.servers:
            if one.name == str(destination):
                return upstream, one
    return None


def _address(said: list[object]) -> Address:
    host, port = said
    ip = ipaddress.IPv6Address(bytes.fromhex(str(host)))
    return Address(str(ip.ipv4_mapped or ip), int(str(port)))
