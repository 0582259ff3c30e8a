"""Connections that the kernel has opened by itself: a worker adopts those that last, counts the
others.

Short connections begin and end without a socket in userspace. The keeper reports them afterwards,
so that counters and the log treat them like all others.
"""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Final, NamedTuple

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
    count_passed,
)
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.worker.client import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.core.routing import Rule as RoutedRule
    from pyforwarder.core.upstreams import ServerState
    from pyforwarder.worker.generation import Generation, ListenerState, UpstreamState
    from pyforwarder.worker.server import Server

_MOST_MESSAGE_BYTES: Final = 1 << 16
# Pairs whose first packet is known, and which have not been adopted yet.
_MOST_REMEMBERED: Final = 4096
# Rules, ports and servers that are looked up once for many ends.
_MOST_LOOKED_UP: Final = 1024
# Sums that may be reported again: as many as the kernel has, and some earlier ones.
_MOST_SUMS: Final = 8192
# In one turn of the loop, which has other work, too.
_MESSAGES_AT_ONCE: Final = 16


class _RuleAndServer(NamedTuple):
    """What connections of one rule from one port to one server have in common."""

    generation: Generation
    state: ListenerState
    rule: RoutedRule
    destination: Address


class _Passed(Client):
    """A client without a socket: for the log only, and never among the clients."""

    __slots__ = ()

    def source_address(self) -> Address | None:
        """The address from which the program has connected."""
        return self.source


class Opened:
    """Receives the keeper's reports of connections that the kernel has opened, for one worker."""

    def __init__(self, server: Server, sock: socket.socket, adopt: Callable[[], object]) -> None:
        """The keeper reports on `sock`; `adopt` adopts the connections that last."""
        self._server = server
        self._sock = sock
        self._adopt = adopt
        self._looked_up: dict[tuple[object, ...], _RuleAndServer] = {}
        # By place: the last connection that was reported, as the keeper numbers it.
        self._last: dict[int, int] = {}
        # By sum of ends: the round that was reported last, and what was counted in it.
        self._sums: dict[str, tuple[int, list[int]]] = {}
        self._facts: dict[int, Facts] = {}  # of pairs that will be adopted, by id
        sock.setblocking(False)
        server.loop.watch(sock.fileno(), EPOLLIN, self._readable, None)

    def _readable(self, _owner: object, _fd: int, _mask: int) -> None:
        self.receive(_MESSAGES_AT_ONCE)

    def receive(self, most: int = 1 << 32) -> None:
        """Receive and handle the keeper's messages, `most` of them at most."""
        for _ in range(most):
            try:
                data = self._sock.recv(_MOST_MESSAGE_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._server.loop.forget(self._sock.fileno())
                return
            message = json.loads(data)
            for first in message.get("first", ()):
                try:
                    self._remember(*first)
                except Exception as error:
                    self._server.log.internal_error(error)
            # Before the ends: these pairs go on, and need a worker, even if the message of an end
            # is wrong.
            if message["adopt"]:
                self._adopt()
            for counted in message.get("counted", ()):
                try:
                    self._count_sum(*counted)
                except Exception as error:
                    self._server.log.internal_error(error)
            with self._server.log.log.together():
                for (place, word), ended in zip(message["of"], message["ended"], strict=True):
                    if self._last.get(place) == word:
                        continue  # reported before, by a keeper that died before it had stored that
                    self._last[place] = word
                    try:
                        self._count(*ended)
                    except Exception as error:
                        # Only this connection loses its log line and its counts.
                        self._server.log.internal_error(error)

    def _remember(self, number: int, listener: str, rule: str, port: int, first: str) -> None:
        if len(self._facts) >= _MOST_REMEMBERED:
            del self._facts[next(iter(self._facts))]  # it may have ended without being adopted
        state, route_rule = self._server.generation.listener_and_rule(listener, port, rule)
        self._facts[number] = state.ruleset.facts(route_rule, bytes.fromhex(first))

    def facts_of(self, number: int) -> Facts:
        """What was read of the first packet of a pair that is adopted now; returned once."""
        return self._facts.pop(number, ())

    def _count(
        self,
        listener: str,
        rule: str,
        client_side: list[list[object]],
        server_side: list[list[object]],
        begun_ns: int,
        ended_ns: int,
        carried: list[int],
        first: str = "",
    ) -> None:
        """Count and log a connection that has ended. `first`: its first packet, if the log line
        needs it.
        """
        server = self._server
        _, state, route_rule, destination = self._look_up(
            listener, client_side[1], rule, server_side[1]
        )
        number = server.next_id()
        count_opened(server, state, route_rule)
        counters = server.counters
        up_bytes, up_packets, down_bytes, down_packets = carried
        self._count_finished(state, 1, up_bytes, down_bytes)
        found = server_of(server, route_rule, destination)
        if found is not None:
            upstream, chosen = found
            upstream.balancer.opened(chosen)
            upstream.balancer.closed(chosen)
            count_connect(counters, chosen.counter)
            count_disconnect(counters, chosen.counter)
        if not server.log.picks(CloseReason.FINISHED):
            return  # the rest is for the log line only
        client = _Passed(server, state, None, -1, _address(client_side[0]), begun_ns / 1e9)
        client.id = number
        client.destination, client.source = destination, _address(server_side[0])
        client.route = Route(route_rule, leads_to(route_rule, destination), 0, None, False)
        client.kind, client.pair_reason = DatapathKind.SPLICE, PairReason.DECIDED
        client.reason = CloseReason.FINISHED
        client.facts = state.ruleset.facts(route_rule, bytes.fromhex(first)) if first else ()
        server.log.closed(
            client,
            (up_bytes, up_packets),
            (down_bytes, down_packets),
            age_s=(ended_ns - begun_ns) / 1e9,
            is_picked=True,
        )

    def _count_sum(
        self,
        key: str,
        round_: int,
        listener: str,
        rule: str,
        port: int,
        to: list[object],
        totals: list[int],
    ) -> None:
        """Count connections that have ended, and are reported as a sum.

        A keeper that replaces one that died may report a round again, with more in it.
        """
        before_round, before = self._sums.pop(key, (0, [0] * len(totals)))
        if before_round != round_:
            before = [0] * len(totals)
        self._sums[key] = round_, totals
        if len(self._sums) > _MOST_SUMS:
            del self._sums[next(iter(self._sums))]
        pairs, up_bytes, down_bytes = (now - then for now, then in zip(totals, before, strict=True))
        if not pairs:
            return
        server = self._server
        _, state, route_rule, destination = self._look_up(listener, ["", port], rule, to)
        server.pass_ids(pairs)
        count_opened(server, state, route_rule, pairs)
        self._count_finished(state, pairs, up_bytes, down_bytes)
        found = server_of(server, route_rule, destination)
        if found is not None:
            upstream, chosen = found
            upstream.balancer.passed(chosen, pairs)
            count_passed(server.counters, chosen.counter, pairs)

    def _count_finished(
        self, listener: ListenerState, pairs: int, up_bytes: int, down_bytes: int
    ) -> None:
        counters = self._server.counters
        counters[CLOSED_INDEX[CloseReason.FINISHED]] += pairs
        counters[Counter.UP_BYTES] += up_bytes
        counters[Counter.DOWN_BYTES] += down_bytes
        counters[listener.counter + ListenerCounter.UP_BYTES] += up_bytes
        counters[listener.counter + ListenerCounter.DOWN_BYTES] += down_bytes

    def _look_up(
        self, listener: str, local: list[object], rule: str, destination: list[object]
    ) -> _RuleAndServer:
        """The rule and server in the configuration in force; looked up once for many ends."""
        generation = self._server.generation
        key = (listener, local[1], rule, *destination)
        entry = self._looked_up.get(key)
        if entry is None or entry.generation is not generation:
            if len(self._looked_up) >= _MOST_LOOKED_UP:
                self._looked_up.clear()
            found = generation.listener_and_rule(listener, int(str(local[1])), rule)
            entry = self._looked_up[key] = _RuleAndServer(generation, *found, _address(destination))
        return entry


def count_opened(server: Server, listener: ListenerState, rule: RoutedRule, count: int = 1) -> None:
    """Count connections that the kernel has opened, and that no worker has counted yet.

    `next_id` or `pass_ids` counts them as accepted.
    """
    counters = server.counters
    counters[listener.counter + ListenerCounter.ACCEPTED] += count
    counters[listener.rule_counters[rule.index] + RuleCounter.TAKEN] += count
    counters[Counter.PAIRS_OPENED] += count
    counters[Counter.JOINED_EXPRESS] += count


def leads_to(rule: RoutedRule, destination: Address) -> str | Address:
    """Where a rule leads, for the log: an upstream's name, or the server."""
    return rule.to if isinstance(rule.to, str) else destination


def server_of(
    server: Server, rule: RoutedRule, destination: Address
) -> tuple[UpstreamState, ServerState] | None:
    """The upstream of a rule and its server with this address, if both still exist."""
    upstream = server.generation.upstreams.get(rule.to) if isinstance(rule.to, str) else None
    if upstream is not None:
        for one in upstream.balancer.servers:
            if one.name == str(destination):
                return upstream, one
    return None


def _address(host_and_port: list[object]) -> Address:
    host, port = host_and_port
    ip = ipaddress.IPv6Address(bytes.fromhex(str(host)))
    return Address(str(ip.ipv4_mapped or ip), int(str(port)))
