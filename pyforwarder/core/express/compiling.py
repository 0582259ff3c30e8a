"""Compile the rules of a listener to the table of those that a program in the kernel can decide.

These are the listener's first rules: the table ends at the first rule whose match the program
cannot decide, since a later rule may take a connection only once that rule has not matched. A rule
whose match the program can decide, but whose action it cannot take, stays in the table: a
connection that it takes is left to userspace, and later rules are still decided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.core.address import Address, NameIn, SamePort
from pyforwarder.core.express import choosing
from pyforwarder.core.express.conditions import (
    Alpn,
    BytesAt,
    Condition,
    Constant,
    Every,
    HttpHost,
    HttpRequest,
    Leaf,
    Negated,
    ServerName,
    Some,
    UserspaceOnly,
)
from pyforwarder.core.express.reading import MOST_ALPN_BYTES, MOST_NAME_BYTES
from pyforwarder.core.express.table import (
    MOST_CLAUSES,
    MOST_CONDITIONS,
    MOST_METHODS,
    Clause,
    Table,
)

if TYPE_CHECKING:
    from pyforwarder.core.address import ServerAddress
    from pyforwarder.core.routing import Rule, Ruleset

MOST_RULES: Final = 64
MOST_PREFIX_BYTES: Final = 64  # of `bytes`, with their offset
MOST_PREFIXES: Final = 64

# The datapaths with which either the kernel or userspace may decide.
_OPEN_CHOICES: Final = (None, "auto", "express")


class ServerConfig(Protocol):
    """The keys of a server that are read here."""

    @property
    def address(self) -> ServerAddress: ...
    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...


class UpstreamConfig(Protocol):
    """The keys of an upstream that are read here."""

    @property
    def servers(self) -> Sequence[ServerConfig]: ...
    @property
    def balance(self) -> str: ...
    @property
    def send_proxy(self) -> str: ...
    @property
    def transparent(self) -> bool: ...
    @property
    def slow_start_s(self) -> float: ...
    @property
    def source(self) -> Sequence[object]: ...


class ProxyConfig(Protocol):
    """The keys of a listener's `proxy_protocol` that are read here."""

    @property
    def accept(self) -> object: ...


class FirstPacketConfig(Protocol):
    """The keys of a listener's `first_packet` that are read here."""

    @property
    def max_bytes(self) -> int: ...


class LimitsConfig(Protocol):
    """The limits that are read here."""

    @property
    def pairs(self) -> int: ...
    @property
    def pairs_per_client(self) -> int: ...
    @property
    def new_per_second(self) -> int: ...
    @property
    def new_per_second_per_client(self) -> int: ...
    @property
    def memory_bytes(self) -> object: ...


class RuleConfig(Protocol):
    """The keys of a rule that are read here, besides its compiled form."""

    @property
    def send_proxy(self) -> str | None: ...


class ListenerConfig(Protocol):
    """The keys of a listener that are read here."""

    @property
    def protocol(self) -> str: ...
    @property
    def is_unix(self) -> bool: ...
    @property
    def splice(self) -> bool: ...
    @property
    def datapath(self) -> str | None: ...
    @property
    def proxy_protocol(self) -> ProxyConfig: ...
    @property
    def first_packet(self) -> FirstPacketConfig: ...
    @property
    def limits(self) -> LimitsConfig: ...
    @property
    def rules(self) -> Sequence[RuleConfig]: ...


class Config(Protocol):
    """The keys of the whole configuration that are read here."""

    @property
    def datapath(self) -> str: ...
    @property
    def limits(self) -> LimitsConfig: ...
    @property
    def splice_interfaces(self) -> str: ...
    @property
    def upstreams(self) -> Mapping[str, UpstreamConfig]: ...


@dataclass(frozen=True, slots=True)
class Compiled:
    """A listener's table for one port, and why rules are missing in it."""

    table: Table | None  # None: the kernel decides no rule of this listener
    # For each rule of the listener, why userspace decides it; empty: the kernel can.
    reasons: tuple[str, ...]


def compile_table(
    config: Config,
    listener: ListenerConfig,
    ruleset: Ruleset,
    local: Address | None,
    *,
    is_own: Callable[[Address], bool],
) -> Compiled:
    """The table for connections to one address of a listener, whose compiled rules are `ruleset`.

    `local` is None if it is not known, or no IP address. `is_own` says whether an address is one of
    the forwarder's own, to which clients are never connected.
    """
    why_none = _why_not_listener(config, listener)
    if local is None and not why_none:
        why_none = "the listener's address is not known"
    if local is None or why_none:
        return Compiled(None, (why_none,) * len(ruleset.rules))
    conditions: dict[Leaf, int] = {}
    clauses: list[Clause] = []
    reasons: list[str] = []
    targets: set[int] = set()
    ended_by = ""
    matches = ruleset.conditions(local.port)
    for rule, condition in zip(ruleset.rules, matches, strict=True):
        if not ended_by:
            ended_by = _add(rule, condition, conditions, clauses)
            if ended_by:
                reasons.append(ended_by)
                ended_by = f"userspace decides the rule {rule.name} in front of it"
                continue
        if ended_by:
            reasons.append(ended_by)
            continue
        why = _why_not_target(config, listener, rule, local, is_own)
        reasons.append(why)
        if not why:
            targets.add(rule.index)
    table = Table(
        tuple(conditions),
        tuple(clauses),
        rules=len({clause.rule for clause in clauses}),
        targets=frozenset(targets),
        most_bytes=listener.first_packet.max_bytes,
    )
    return Compiled(table if targets else None, tuple(reasons))


def _why_not_listener(config: Config, listener: ListenerConfig) -> str:
    """Why userspace must decide all connections of a listener; empty: the kernel may."""
    if listener.protocol != "tcp":
        return "only TCP connections begin with a packet that can wait"
    if listener.is_unix:
        return "connections to a unix socket have no packets"
    if not listener.splice:
        return "the listener says `splice: off`"
    if listener.proxy_protocol.accept:
        return "userspace alone reads PROXY headers"
    for limits in (config.limits, listener.limits):
        if limits.pairs_per_client or limits.new_per_second or limits.new_per_second_per_client:
            return "userspace alone counts for `pairs_per_client` and `new_per_second`"
    if listener.limits.memory_bytes or listener.limits.pairs:
        return "userspace alone counts for the listener's `memory` and `pairs`"
    if config.splice_interfaces == "any":
        return "the configuration says `splice_interfaces: any`"
    return ""


def _why_not_target(
    config: Config,
    listener: ListenerConfig,
    rule: Rule,
    local: Address,
    is_own: Callable[[Address], bool],
) -> str:
    """Why userspace must handle connections that this rule takes; empty: the kernel can."""
    datapath = rule.datapath or listener.datapath or config.datapath
    if datapath not in _OPEN_CHOICES:
        return f"the configuration says `datapath: {datapath}`"
    if rule.reject is not None:
        return "userspace alone refuses"
    if rule.to is None or isinstance(rule.to, NameIn):
        return "the client names the destination"
    if rule.allow is not None:
        return "userspace alone judges by `allow`"
    send_proxy = listener.rules[rule.index].send_proxy
    servers: list[ServerAddress] = []
    if isinstance(rule.to, str):
        upstream = config.upstreams[rule.to]
        why = _why_not_upstream(upstream, is_ipv6=local.is_ipv6)
        if why:
            return f"upstream {rule.to}: {why}"
        send_proxy = send_proxy or upstream.send_proxy
        servers += [server.address for server in upstream.servers]
    else:
        servers.append(rule.to)
    if send_proxy not in (None, "off"):
        return "userspace alone sends PROXY headers"
    for server in servers:
        address = server.at(local.port) if isinstance(server, SamePort) else server
        if not isinstance(address, Address) or "%" in address.host:
            return "userspace alone connects to names, unix sockets and link-local addresses"
        if address.is_ipv6 is not local.is_ipv6:
            return "one connection is IPv4, the other IPv6"
        if is_own(address):
            return f"{address} is the forwarder itself"
    return ""


def _why_not_upstream(upstream: UpstreamConfig, *, is_ipv6: bool) -> str:
    why = choosing.why_not(upstream.balance, upstream.servers)
    if why:
        return why
    if len(choosing.sources_for(upstream.source, is_ipv6=is_ipv6)) > 1:
        return "userspace alone chooses among several addresses of `source`"
    if upstream.transparent:
        return "userspace alone connects from the client's address"
    if upstream.slow_start_s:
        return "userspace alone knows `slow_start`"
    return ""


def _add(
    rule: Rule,
    condition: Condition | str,
    conditions: dict[Leaf, int],
    clauses: list[Clause],
) -> str:
    """Add a rule's clauses to the table; returns why that is not possible, or an empty string."""
    if isinstance(condition, str):
        return condition
    if rule.index >= MOST_RULES:
        return f"more than {MOST_RULES} rules"
    try:
        terms = _terms(condition, negated=False)
        leaves = dict.fromkeys(leaf for term in terms for leaf in (*term[0], *term[1]))
        for leaf in leaves:
            _check(leaf)
        new = [leaf for leaf in leaves if leaf not in conditions]
        wanted = (*conditions, *new)
        prefixes = sum(len(leaf.alternatives) for leaf in wanted if isinstance(leaf, BytesAt))
        methods = {one for leaf in wanted if isinstance(leaf, HttpRequest) for one in leaf.methods}
        if (
            len(clauses) + len(terms) > MOST_CLAUSES
            or len(wanted) > MOST_CONDITIONS
            or prefixes > MOST_PREFIXES
            or len(methods) > MOST_METHODS
        ):
            raise UserspaceOnly("the rules up to here have too many conditions")
    except UserspaceOnly as error:
        return str(error)
    for leaf in new:
        conditions[leaf] = len(conditions)
    for holds, fails in terms:
        clauses.append(Clause(rule.index, _bits(holds, conditions), _bits(fails, conditions)))
    return ""


def _bits(leaves: tuple[Leaf, ...], conditions: Mapping[Leaf, int]) -> int:
    return sum(1 << conditions[leaf] for leaf in leaves)


def _check(leaf: Leaf) -> None:
    """Check that a condition fits into the program's table.

    Raises:
        UserspaceOnly: it does not.
    """
    if isinstance(leaf, BytesAt):
        longest = leaf.offset + max(map(len, leaf.alternatives))
        if longest > MOST_PREFIX_BYTES:
            raise UserspaceOnly(f"`bytes` that reach behind the first {MOST_PREFIX_BYTES}")
    if isinstance(leaf, Alpn) and any(len(name) > MOST_ALPN_BYTES for name in leaf.names):
        raise UserspaceOnly(f"a protocol's name of more than {MOST_ALPN_BYTES} bytes")
    if isinstance(leaf, ServerName | HttpHost):
        names = leaf.names.exact | leaf.names.endings
        if any(len(name) > MOST_NAME_BYTES for name in names):
            raise UserspaceOnly(f"a name of more than {MOST_NAME_BYTES} bytes")


# One conjunction: the leaves that must hold, and those that must not.
Term = tuple[tuple[Leaf, ...], tuple[Leaf, ...]]


def _terms(condition: Condition, *, negated: bool) -> list[Term]:
    """The disjunctive normal form of a condition, or of its negation.

    Raises:
        UserspaceOnly: it has too many terms.
    """
    match condition:
        case Constant():
            return [((), ())] if condition.holds is not negated else []
        case Negated():
            return _terms(condition.part, negated=not negated)
        case Every() | Some():
            parts = [_terms(part, negated=negated) for part in condition.parts]
            if isinstance(condition, Some) is not negated:
                found = [term for part in parts for term in part]
            else:
                found = [((), ())]
                for part in parts:
                    if len(found) * len(part) > MOST_CLAUSES * MOST_CLAUSES:
                        raise UserspaceOnly("it has too many conditions inside each other")
                    found = list(
                        dict.fromkeys(
                            (_union(one[0], other[0]), _union(one[1], other[1]))
                            for one, other in itertools.product(found, part)
                        )
                    )
            if len(found) > MOST_CLAUSES:
                raise UserspaceOnly("it has too many conditions inside each other")
            return found
        case _:
            return [((), (condition,)) if negated else ((condition,), ())]


def _union(some: tuple[Leaf, ...], others: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    return tuple(dict.fromkeys((*some, *others)))
