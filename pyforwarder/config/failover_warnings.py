"""What keeps pairs from going on through another machine (`fleet.failover`), in a configuration.

A pair moves if it is spliced, its client came to an address that moves, its server sees one, and
none of its packets pass `lo`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, HostPort, SamePort, UnixAddress

if TYPE_CHECKING:
    from pyforwarder.config.listener import Listener, Rule
    from pyforwarder.config.model import Config
    from pyforwarder.config.upstream import Upstream
    from pyforwarder.core.address import ServerAddress

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
_Warning = tuple[tuple[str | int, ...], str]

_END: Final = "end with this machine"
_SPLICED: Final = ("auto", "express", "splice")


@dataclass(slots=True)
class _Taken:
    """Which of the addresses that move listeners are bound to."""

    moving: tuple[_Ip, ...]
    by_tcp: set[_Ip] = field(default_factory=set)
    by_udp: set[_Ip] = field(default_factory=set)
    named: set[_Ip] = field(default_factory=set)  # all that listeners name: no wildcard's others
    is_known: bool = True  # False: a listener has sockets whose addresses are known elsewhere

    def add(self, listener: Listener) -> None:
        taken = self.by_tcp if listener.protocol == "tcp" else self.by_udp
        self.is_known &= not listener.takes_systemd_sockets
        for ip in _hosts(listener):
            self.named.add(ip)
            taken.update(one for one in self.moving if one == ip or _is_any_of(ip, one))


def failover_warnings(config: Config) -> Iterator[_Warning]:
    """Yield for each listener, rule, upstream and address that does not fit where it stands and
    why; nothing without `fleet.failover`.
    """
    failover = config.fleet.failover if config.fleet is not None else None
    if failover is None:
        return
    moving = tuple(ipaddress.ip_address(address) for address in failover.addresses)
    taken = _Taken(moving)
    for listener in config.listeners:
        taken.add(listener)
    may_take = bool(taken.by_tcp) or not taken.is_known
    for position, listener in enumerate(config.listeners):
        if listener.protocol != "tcp":
            continue
        for at, reason in (
            *_unspliced(config, listener),
            *_bound_elsewhere(listener, moving, may_take=may_take),
            *_without_upstream(listener),
        ):
            yield ("listeners", position, *at), reason
    yield from _unused(config, taken, may_take=may_take)
    for name, upstream in config.upstreams.items():
        if _protocols(config, name) != {"udp"}:
            for at_key, reason in _upstream(upstream, taken):
                yield ("upstreams", name, *at_key), reason


def _unused(config: Config, taken: _Taken, *, may_take: bool) -> Iterator[_Warning]:
    """Addresses that move to no purpose, as far as that is known here."""
    at = ("fleet", "failover", "addresses")
    if not config.listeners:
        return  # they may all be in the fleet's store
    if not may_take:
        yield at, "no listener is bound to one of them, so no pair can move"
    elif taken.is_known:
        sources = {
            ipaddress.ip_address(ip) for one in config.upstreams.values() for ip in one.source
        }
        for index, ip in enumerate(taken.moving):
            if ip not in taken.by_tcp | taken.by_udp | sources:
                yield (
                    (*at, index),
                    f"nothing uses {ip}: neither is a listener bound to it nor is it a `source`",
                )


def _protocols(config: Config, upstream: str) -> set[str]:
    """Of the listeners that connect to it."""
    return {
        listener.protocol
        for listener in config.listeners
        if any(rule.to == upstream for rule in listener.rules)
    }


def _hosts(listener: Listener) -> list[_Ip]:
    """The IP addresses that a listener is bound to, each once."""
    hosts = [bind.host for bind in listener.addresses if isinstance(bind, Address)]
    return list(dict.fromkeys(ipaddress.ip_address(host.partition("%")[0]) for host in hosts))


def _is_any_of(ip: _Ip, other: _Ip) -> bool:
    """Whether it is the wildcard that takes connections to the other address."""
    return ip.is_unspecified and ip.version == other.version


def _unspliced(config: Config, listener: Listener) -> Iterator[_Warning]:
    connecting = [(n, rule) for n, rule in enumerate(listener.rules) if rule.reject is None]
    found: list[tuple[tuple[str | int, ...], str]] = []
    for index, rule in connecting:
        datapath = rule.datapath or listener.datapath or config.datapath
        at = ("rules", index, *(("datapath",) if rule.datapath else ()))
        if not listener.splice:
            found.append((at, "`splice: false`"))
        elif datapath not in _SPLICED:
            found.append((at, f"`datapath: {datapath}`"))
    if len(found) == len(connecting):
        # Of the whole listener, once for each reason.
        found = [((), why) for why in dict.fromkeys(why for _, why in found)]
    for at, why in found:
        yield at, f"its pairs {_END}: {why}, and only spliced ones move"


def _bound_elsewhere(
    listener: Listener, moving: tuple[_Ip, ...], *, may_take: bool
) -> Iterator[_Warning]:
    """`may_take` is whether a listener is bound to an address that moves: else that is said."""
    at = ("bind",)
    for ip in _hosts(listener):
        if ip in moving:
            if not listener.freebind:
                yield at, f"{ip} moves to this machine later: it wants `freebind: true`"
        elif not may_take:
            continue
        elif not ip.is_unspecified:
            yield at, f"pairs of clients of {ip} {_END}: it is not in `fleet.failover`"
        elif any(_is_any_of(ip, one) for one in moving):
            yield (
                at,
                f"of {ip} only pairs of clients of an address in `fleet.failover` move: those of "
                f"other addresses {_END}",
            )
        else:
            yield at, f"pairs of {ip} {_END}: `fleet.failover` has no IPv{ip.version} address"
    if any(isinstance(bind, UnixAddress) for bind in listener.addresses):
        yield at, f"pairs of clients of `unix:` {_END}"


def _without_upstream(listener: Listener) -> Iterator[_Warning]:
    """An upstream alone has a `source`."""
    for index, rule in enumerate(listener.rules):
        if rule.reject is None and not isinstance(rule.to, str):
            key = () if rule.to is None else ("to",)
            yield ("rules", index, *key), f"its pairs {_END}: {_why_no_source(rule)}"


def _why_no_source(rule: Rule) -> str:
    if isinstance(rule.to, UnixAddress):
        return "no packets go to a unix socket"
    if rule.to is None:
        return "the client names the destination, and only an upstream has a `source` that moves"
    return "only an upstream has a `source` that moves"


def _upstream(upstream: Upstream, taken: _Taken) -> Iterator[_Warning]:
    if upstream.transparent:
        yield ("transparent",), f"its pairs {_END}: servers see the client's address"
        return
    # A server without weight gets no pairs.
    servers = [(n, one.address) for n, one in enumerate(upstream.servers) if one.weight]
    here = [(n, one) for n, one in servers if _is_here(one, taken.moving)]
    elsewhere = [(n, one) for n, one in servers if not _is_here(one, taken.moving)]
    yield from _about(here, "no packets of theirs leave it")
    sources = [ipaddress.ip_address(one) for one in upstream.source]
    if not sources:
        if elsewhere or upstream.registered:
            yield (), f"its pairs {_END}: {_wanted([one for _, one in elsewhere], taken)}"
        return
    stays = [one for one in sources if one not in taken.moving]
    if stays:
        yield ("source",), f"pairs from {stays[0]} {_END}: it is not in `fleet.failover`"
    for version in sorted({4, 6} - {one.version for one in sources}):
        unfit = [(n, one) for n, one in elsewhere if _version_of(one) == version]
        yield from _about(unfit, f"`source` has no IPv{version} address")


def _about(servers: list[tuple[int, ServerAddress]], why: str) -> Iterator[_Warning]:
    """One sentence for all servers with the same reason, where the first one stands."""
    if servers:
        index, first = servers[0]
        more = f" and {len(servers) - 1} more" if servers[1:] else ""
        yield ("servers", index), f"pairs to {first}{more} {_END}: {why}"


def _wanted(servers: list[ServerAddress], taken: _Taken) -> str:
    """What is to be written for connections to these servers."""
    versions = {version for one in servers if (version := _version_of(one))}
    fit = [one for one in taken.moving if not versions or one.version in versions]
    if not fit:
        missing = " and ".join(f"IPv{version}" for version in sorted(versions))
        return f"it wants a `source` in `fleet.failover`, which has no {missing} address"
    # Rather one that no listener names; one of each version.
    fit.sort(key=lambda one: one in taken.named)
    by_version = {one.version: str(one) for one in reversed(fit)}
    chosen = ", ".join(text for _, text in sorted(by_version.items()))
    return f"it wants `source: [{chosen}]`, of the addresses in `fleet.failover`"


def _host(server: ServerAddress) -> str:
    """Its IP address or its name; empty: it has neither."""
    match server:
        case Address() | SamePort():
            return server.host
        case HostPort():
            return server.name
    return ""


def _ip_of(server: ServerAddress) -> _Ip | None:
    try:
        return ipaddress.ip_address(_host(server).partition("%")[0])
    except ValueError:
        return None  # a name, or a path


def _version_of(server: ServerAddress) -> int:
    """4 or 6; 0: not known here."""
    ip = _ip_of(server)
    return ip.version if ip is not None else 0


def _is_here(server: ServerAddress, moving: tuple[_Ip, ...]) -> bool:
    """Whether connections to it stay in this machine: a path, or packets on `lo`."""
    ip = _ip_of(server)
    if ip is not None:
        return ip.is_loopback or ip.is_unspecified or ip in moving
    name = _host(server).rstrip(".").lower()
    return not name or name == "localhost" or name.endswith(".localhost")
