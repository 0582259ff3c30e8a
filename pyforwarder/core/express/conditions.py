"""The conditions that a program in the kernel can evaluate on a connection's first packet.

`Matcher.in_kernel` expresses a matcher by these conditions, or raises `UserspaceOnly`. A condition
holds, does not hold, or is unknown from this packet: the three outcomes of a matcher. So `Every`,
`Some` and `Negated` are and, or, not in Kleene's three-valued logic, in which the laws of De Morgan
and of distribution hold.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.glob import Globs

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class UserspaceOnly(Exception):
    """Only userspace can decide whether this matches; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The same for every first packet that has bytes."""

    holds: bool


@dataclass(frozen=True, slots=True)
class BytesAt:
    """One of `alternatives` is at `offset`."""

    offset: int
    alternatives: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ClientNetworks:
    """The client's address is in one of these networks."""

    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class TlsHello:
    """The record and message header of a TLS ClientHello."""


@dataclass(frozen=True, slots=True)
class NamePatterns:
    """Names: whole ones, and suffixes that stand for every name with that suffix; in lower case."""

    exact: frozenset[bytes]
    endings: frozenset[bytes]

    def include(self, name: bytes) -> bool:
        """Whether a name, in lower case, matches."""
        return name in self.exact or any(name.endswith(ending) for ending in self.endings)


def name_patterns(globs: Globs) -> NamePatterns:
    """The same patterns, if a program can compare them.

    Raises:
        UserspaceOnly: it cannot.
    """
    endings = globs.endings
    if endings is None:
        raise UserspaceOnly("userspace alone compares a `*` that does not stand in front")
    if "" in globs.exact:
        raise UserspaceOnly("userspace alone takes an empty name")
    return NamePatterns(
        frozenset(name.encode() for name in globs.exact),
        frozenset(ending.encode() for ending in endings),
    )


@dataclass(frozen=True, slots=True)
class ServerName:
    """A complete ClientHello whose server name is one of these."""

    names: NamePatterns


@dataclass(frozen=True, slots=True)
class Alpn:
    """A complete ClientHello that offers one of these protocols (ALPN, RFC 7301)."""

    names: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request line of HTTP/1 with one of these methods; with any method if there are none."""

    methods: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class HttpHost:
    """A complete head of an HTTP/1 request for one of these hosts."""

    names: NamePatterns


Leaf = BytesAt | ClientNetworks | TlsHello | ServerName | Alpn | HttpRequest | HttpHost


@dataclass(frozen=True, slots=True)
class Every:
    """All of them hold."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """At least one of them holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Negated:
    """It does not hold."""

    part: Condition


Condition = Constant | Leaf | Every | Some | Negated
