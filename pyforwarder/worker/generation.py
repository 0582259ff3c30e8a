"""One generation of the configuration, compiled for the loop. A reload makes the next one.

Connections keep the generation they were accepted under, so a reload never touches live pairs.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pyforwarder.config import Config, Listener
from pyforwarder.core.address import Address, UnixAddress, parse_bind
from pyforwarder.core.policy import OwnListeners, parse_ip
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.core.token import FleetUse, TokenKeys, UsedTokens
from pyforwarder.core.upstreams import Balancer
from pyforwarder.datapath.ebpf.abi import pack_endpoint
from pyforwarder.runtime.counters import SharedHeld
from pyforwarder.runtime.fleet_counts import FleetScope
from pyforwarder.runtime.host_memory import available_bytes
from pyforwarder.runtime.limits import TCP, UDP, Bounds
from pyforwarder.runtime.own_addresses import this_host_has
from pyforwarder.runtime.sockaddr import sockaddr

if TYPE_CHECKING:
    from pyforwarder.config import Limits, ListenerLimits, Rule, Timeouts, Upstream
    from pyforwarder.core.policy import Networks
    from pyforwarder.core.routing import Rule as RoutedRule
    from pyforwarder.core.routing import Ruleset
    from pyforwarder.core.token import TokenMemory
    from pyforwarder.core.upstreams import Held
    from pyforwarder.runtime.counters import Counters, Directory
    from pyforwarder.worker.settings import Settings


# How often a joined pair is looked at for idleness, as a part of the shorter timeout.
IDLE_CHECKS: Final = 8
# RFC 4787 REQ-5: a mapping must live for two minutes of silence; a longer one only helps those who
# send from made-up addresses to fill the table.
SESSION_IDLE_S: Final = 120.0
# Which part of the memory that there is pairs may hold, unless `limits.memory` says.
MEMORY_SHARE: Final = 4
# A handover that bytes stand in the way of is tried again as they move, and by this clock.
HANDOVER_RETRY_S: Final = 0.1

_PERMITTED_S: Final = 1.0
_MOST_PERMITTED: Final = 4096

# Where pairs belong that another program hands over (`forward`): a listener that nobody binds.
FOREIGN_LISTENER: Final = Listener.model_validate(
    {
        "name": "forward",
        "bind": "unix:/",
        "rules": [{"name": "forward", "match": "any", "reject": "reset"}],
    }
)


def counter_indexes(config: Config, directory: Directory) -> dict[str, int]:
    """Where each listener, rule and server of this configuration counts."""
    indexes = {}
    for listener in (*config.listeners, FOREIGN_LISTENER):
        indexes[listener.name] = directory.index(listener.name)
        for rule in listener.rules:
            indexes[f"{listener.name} {rule.name}"] = directory.index(listener.name, rule.name)
    for name, upstream in config.upstreams.items():
        for server in upstream.servers:
            index = directory.server_index(name, str(server.address))
            if index is not None:
                indexes[f"upstream {name} {server.address}"] = index
        index = directory.upstream_index(name)
        if index is not None:
            indexes[f"upstream {name}"] = index
    return indexes


@dataclass(frozen=True, slots=True)
class HandoverTerms:
    """`handover:` of the configuration, for a look at every message."""

    after_bytes: int
    splice_after_bytes: int
    after_round_trips: int
    after_s: float
    at_once: bool


class ListenerState:
    """An address of a listener of one generation, with what the accept path needs at hand."""

    __slots__ = (
        "amplification",
        "asks_limits",
        "bind",
        "config",
        "converses",
        "counter",
        "datapaths",
        "decides_at_once",
        "endpoint",
        "express_rules",
        "generation",
        "is_express",
        "is_plain",
        "is_unix",
        "local_port",
        "max_bytes",
        "memory_here",
        "most_here",
        "name",
        "needs_header",
        "prefix",
        "rule_counters",
        "rule_names",
        "ruleset",
        "scopes",
        "segment_bytes",
        "send_proxy",
        "session_idle_s",
        "starts_specially",
        "timeout_s",
        "trusted_proxies",
    )

    def __init__(
        self,
        generation: Generation,
        listener: Listener,
        settings: Settings,
        *,
        bind: Address | UnixAddress,
        ruleset: Ruleset,
    ) -> None:
        """`bind` is where its clients connect to; `ruleset` its rules, compiled."""
        self.generation = generation
        self.config = listener
        self.name = listener.name.encode()
        self.bind = bind
        self.is_unix = isinstance(self.bind, UnixAddress)
        self.local_port = self.bind.port if isinstance(self.bind, Address) else 0
        # A wildcard listener learns the local address from each connection, when it is shown.
        wildcard = isinstance(self.bind, Address) and self.bind.host in ("0.0.0.0", "::")
        self.endpoint = (
            None if wildcard or listener is FOREIGN_LISTENER else pack_endpoint(self.bind)
        )
        self.ruleset = ruleset
        self.max_bytes = listener.first_packet.max_bytes
        self.timeout_s = listener.first_packet.timeout_s
        # Whose PROXY headers are believed; None: there is none to come.
        self.trusted_proxies: Networks | None = (
            listener.proxy_protocol.trusted if listener.proxy_protocol.accept else None
        )
        # A client that sends none is not served, and neither is one that is not trusted.
        self.needs_header = listener.proxy_protocol.accept is True
        # TCP_MAXSEG of outgoing sockets, for IPv4 and IPv6; None: as the route says. What a server
        # sends must fit into the path to the client, too, or the pair could not be spliced.
        mtu = settings.mtus.get(listener.name, 0)
        self.segment_bytes = (mtu - 40, mtu - 60) if mtu else None
        self.counter = settings.indexes[listener.name]
        self.rule_names = [rule.name.encode() for rule in listener.rules]
        self.rule_counters = [
            settings.indexes[f"{listener.name} {rule.name}"] for rule in listener.rules
        ]
        chosen = [
            rule.datapath or listener.datapath or generation.config.datapath
            for rule in listener.rules
        ]
        # What the kernel has not taken by itself is no other pair than the rest. But how its server
        # is reached may be new to the kernel.
        self.is_express = listener.splice and "express" in chosen
        self.datapaths = ["auto" if name == "express" else name for name in chosen]
        self.express_rules = [name == "express" for name in chosen]
        # What the server is told about the client, by the rule's index; None: nothing in any rule.
        send_proxy = [generation.send_proxy_of(rule) for rule in listener.rules]
        self.send_proxy = send_proxy if any(form != "off" for form in send_proxy) else None
        # A first rule that needs no byte (`any`) connects before the client has said anything.
        self.decides_at_once = self.ruleset.may_decide_at_once
        # One question each on the accept path for all that is not the common case.
        self.converses = self.ruleset.begin() is not None
        is_udp = listener.protocol == "udp"
        limits, in_fleet = generation.limits, generation.config.shares_limits
        own = bounds_of(listener.limits, limits, self.counter, udp=is_udp, in_fleet=in_fleet)
        of_all = UDP if is_udp else TCP
        shared = bounds_of(limits, limits, of_all, udp=is_udp, in_fleet=in_fleet)
        # For who counts as one client, and what the listener's pairs may hold; 0: no limit.
        self.prefix = listener.limits.client_prefix or generation.limits.client_prefix
        self.memory_here = int(listener.limits.memory_bytes)
        self.most_here = own.most  # pairs or sessions of this listener; 0: no limit
        # The listener's own first: what it refuses must use up no second that the others want.
        self.scopes = tuple(bounds for bounds in (own, shared) if bounds.asks)
        self.asks_limits = bool(self.scopes)
        self.amplification = listener.amplification
        idle_s = min(SESSION_IDLE_S, generation.config.timeouts.idle_s)
        self.session_idle_s = idle_s if listener.idle_s is None else listener.idle_s
        self.starts_specially = self.decides_at_once or self.trusted_proxies is not None
        # Whether its connections may take the straight path: see worker/plain.py.
        self.is_plain = not (
            self.asks_limits
            or self.converses
            or self.is_unix
            or self.trusted_proxies is not None
            or self.send_proxy is not None
            or generation.handover.at_once
            or not {"copy", "auto"}.issuperset(self.datapaths)
        )


def bounds_of(
    limits: ListenerLimits, shared: Limits, scope: int, *, udp: bool, in_fleet: bool
) -> Bounds:
    """The limits of one scope as they are asked; `shared` are those of all listeners."""
    most, per_client = limits.pairs, limits.pairs_per_client
    if udp:
        most = most if limits.sessions is None else limits.sessions
        if limits.sessions_per_client is not None:
            per_client = limits.sessions_per_client
    prefix = limits.client_prefix or shared.client_prefix
    return Bounds(
        scope=scope,
        most=most,
        per_client=per_client,
        per_second=limits.new_per_second,
        per_second_per_client=limits.new_per_second_per_client,
        ipv4_bits=prefix.ipv4,
        ipv6_bits=prefix.ipv6,
        is_udp=udp,
        in_fleet=in_fleet,
    )


def fleet_scopes(config: Config, indexes: Mapping[str, int]) -> list[FleetScope]:
    """The scopes of a configuration in which clients count so; `indexes` as `Settings` has them."""
    if not config.shares_limits:
        return []
    shared = config.limits
    protocols = {listener.protocol for listener in config.listeners}
    scopes = [
        FleetScope(protocol, "", bounds_of(shared, shared, scope, udp=udp, in_fleet=True))
        for protocol, scope, udp in (("tcp", TCP, False), ("udp", UDP, True))
        if protocol in protocols
    ]
    for listener in config.listeners:
        udp, scope = listener.protocol == "udp", indexes[listener.name]
        bounds = bounds_of(listener.limits, shared, scope, udp=udp, in_fleet=True)
        scopes.append(FleetScope("listener", listener.name, bounds))
    return [scope for scope in scopes if scope.bounds.per_client]


class UpstreamState:
    """An upstream of one generation: who chooses a server, and how it is connected to."""

    __slots__ = (
        "balancer",
        "connect_times",
        "is_plain",
        "keep_s",
        "sources",
        "timeout_s",
        "transparent",
    )

    def __init__(
        self, upstream: Upstream, balancer: Balancer, timeouts: Timeouts, *, connect_times: int
    ) -> None:
        """`connect_times` is where they are counted; 0: nowhere."""
        self.balancer = balancer
        self.connect_times = connect_times
        given_s = upstream.connect_timeout_s
        self.timeout_s = timeouts.connect_s if given_s is None else given_s
        self.transparent = upstream.transparent
        self.keep_s = upstream.resolve_every_s  # what a server's name stands for
        hosts = [str(host) for host in upstream.source]
        self.sources: dict[int, list[str]] = {
            socket.AF_INET: [host for host in hosts if ":" not in host],
            socket.AF_INET6: [host for host in hosts if ":" in host],
        }
        # One question on the path of every connection: nothing is to be done before the connect.
        self.is_plain = not self.transparent and not hosts

    def has_source(self, address: Address) -> bool:
        """Whether connections to this server come from one of the `source` addresses."""
        return bool(self.sources[socket.AF_INET6 if address.is_ipv6 else socket.AF_INET])

    def source_for(self, number: int, family: int) -> str | None:
        """Which of the `source` addresses the connection of this number takes, if any."""
        sources = self.sources[family]
        return sources[number % len(sources)] if sources else None


class Generation:
    """The configuration in force, compiled."""

    def __init__(
        self,
        settings: Settings,
        *,
        worker: int,
        previous: Generation | None = None,
        used_tokens: TokenMemory | None = None,
        counters: Counters | None = None,
    ) -> None:
        """Compile `settings`; balancers of upstreams that stay keep their state.

        `used_tokens` outlives generations: a reload makes no token good again.  In `counters`
        the workers tell each other how many pairs a server has; without, each knows its own.

        Raises:
            ConfigError: the configuration cannot be used (the supervisor has checked it before).
        """
        self.settings = settings
        self.config = settings.config()
        # What every connection asks for, without walking through the models.
        handover = self.config.handover
        self.handover = HandoverTerms(
            handover.after_bytes,
            handover.splice_after_bytes,
            handover.after_round_trips,
            handover.after_s,
            not (handover.after_bytes and handover.after_round_trips and handover.after_s),
        )
        self.limits = self.config.limits
        self.most_pairs = self.limits.pairs
        self.most_sessions = self.limits.most_sessions
        memory = self.limits.memory_bytes
        self.memory_bytes = available_bytes() // MEMORY_SHARE if memory == "auto" else memory
        self.keepalive = self.config.keepalive.terms
        timeouts = self.config.timeouts
        self.connect_s = timeouts.connect_s
        self.idle_check_s = min(timeouts.idle_s, timeouts.half_closed_s) / IDLE_CHECKS
        # How often a pair is checked that waits for its handover, which may be a matter of age.
        self.young_check_s = min(self.idle_check_s, max(self.handover.after_s, HANDOVER_RETRY_S))
        self.backlog_limit_bytes = self.config.backlog_limit_bytes
        self._permitted: dict[tuple[object, str, Address | UnixAddress], bool] = {}
        self._permitted_until_s = 0.0
        tokens = self.config.tokens
        self.keys = (
            TokenKeys(
                settings.keys,
                clock_skew_s=tokens.clock_skew_s,
                max_lifetime_s=tokens.longest_life_s,
                audience=tokens.audience,
                audience_required=tokens.audience_required,
                used=(used_tokens or UsedTokens()) if tokens.single_use else None,
                in_fleet=self._fleet_use(),
            )
            if settings.keys
            else None
        )
        # By name, in the order of their sockets.
        self.addresses = {
            listener.name: self._states_of(
                listener,
                settings.binds.get(listener.name) or tuple(map(str, listener.addresses)),
            )
            for listener in self.config.listeners
        }
        # Each listener's first.
        self.listeners = {name: states[0] for name, states in self.addresses.items()}
        self.foreign_listener = self._states_of(FOREIGN_LISTENER, (str(UnixAddress("/")),))[0]
        self.own = {
            protocol: OwnListeners(
                state.bind
                for states in self.addresses.values()
                for state in states
                if state.config.protocol == protocol
            )
            for protocol in ("tcp", "udp")
        }
        status = self.config.status
        self._page = OwnListeners([status.bind] if status is not None else [])
        self.balancers: dict[str, Balancer] = {}
        for name, upstream in self.config.upstreams.items():
            shared: dict[str, Held] = {}
            for server in upstream.servers:
                index = settings.indexes.get(f"upstream {name} {server.address}")
                if counters is not None and index is not None:
                    shared[str(server.address)] = SharedHeld(counters, worker, index)
            balancer = previous.balancers.get(name) if previous else None
            if balancer is None:
                balancer = Balancer(upstream, worker=worker, shared=shared)
            else:
                balancer.reconfigure(upstream, shared=shared)
            self.balancers[name] = balancer
            balancer.drain({server for upstream, server in settings.drained if upstream == name})
            for state in balancer.servers:
                state.counter = settings.indexes.get(f"upstream {name} {state.name}", 0)
        self.upstreams = {
            name: UpstreamState(
                upstream,
                self.balancers[name],
                timeouts,
                connect_times=settings.indexes.get(f"upstream {name}", 0),
            )
            for name, upstream in self.config.upstreams.items()
        }

    def listener_and_rule(
        self, listener: str, local_port: int, rule: str
    ) -> tuple[ListenerState, RoutedRule]:
        """The listener and the rule by which an older pair came, as far as the configuration still
        has them.

        Else the listener is that of joined sockets, its address the first, and the rule its first.
        """
        states = self.addresses.get(listener, (self.foreign_listener,))
        state = next((state for state in states if state.local_port == local_port), states[0])
        rules = state.ruleset.rules
        return state, next((known for known in rules if known.name == rule), rules[0])

    def _fleet_use(self) -> FleetUse | None:
        fleet = self.config.fleet
        if fleet is None or not self.config.claims_tokens:
            return None
        return FleetUse(fleet.tokens.wait_s, fleet.tokens.store_lost == "machine")

    def _states_of(self, listener: Listener, binds: tuple[str, ...]) -> tuple[ListenerState, ...]:
        ruleset = compile_rules(
            listener,
            self.keys,
            passwords=self.settings.passwords,
            path=f"listeners.{listener.name}",
        )
        return tuple(
            ListenerState(self, listener, self.settings, bind=parse_bind(bind), ruleset=ruleset)
            for bind in binds
        )

    def send_proxy_of(self, rule: Rule) -> str:
        """Which PROXY header a rule's servers get: what it says, else what its upstream says."""
        if rule.send_proxy is not None:
            return rule.send_proxy
        upstream = self.config.upstreams.get(rule.to) if isinstance(rule.to, str) else None
        return upstream.send_proxy if upstream is not None else "off"

    def permits(
        self,
        rule: RoutedRule,
        address: Address | UnixAddress,
        now_s: float,
        protocol: Literal["tcp", "udp"] = "tcp",
    ) -> bool:
        """Whether the rule's client may be connected to the address: it is allowed, and not us.

        Remembered for a moment, not for long: this host's addresses may change.
        """
        permitted = self._permitted
        if now_s > self._permitted_until_s or len(permitted) >= _MOST_PERMITTED:
            permitted.clear()
            self._permitted_until_s = now_s + _PERMITTED_S
        key = (rule, protocol, address)
        known = permitted.get(key)
        if known is None:
            known = permitted[key] = self._judge(rule, address, protocol)
        return known

    def _judge(self, rule: RoutedRule, address: Address | UnixAddress, protocol: str) -> bool:
        if self.own[protocol].includes(address, is_local=is_local):
            return False
        if rule.allow is None:
            return True
        # From this host, as whom we would connect, the page asks for no password.
        if protocol == "tcp" and self._page.includes(address, is_local=is_local):
            return False
        return isinstance(address, Address) and rule.allow.permits(address.host, address.port)


def is_local(host: str) -> bool:
    """Whether this host answers for the address: it is its own, or a group's.

    What is sent to a group comes back to us as well, if this host is in it. There may be a zone.
    """
    try:
        ip = parse_ip(host)
        name = sockaddr(Address(host, 0))
        return ip.is_multicast or this_host_has(ip, name[3] if len(name) == 4 else 0)
    except (OSError, ValueError):
        return False
