"""The rules of a listener as a table, and what the table decides about a first packet.

Each condition of the rules is a bit. Two sets of bits say what is known of a packet: the conditions
that hold, and those that do not. A clause is a set of conditions that must hold and a set of
conditions that must not; each clause belongs to a rule, and the clauses are tried in the order of
the rules.

Networks and names are stored so that a program in the kernel needs only arrays and longest-prefix
maps: the entry of a network has the bits of all networks that contain it, the entry of a name those
of all its suffixes.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final, NamedTuple

from pyforwarder.core.express.conditions import (
    Alpn,
    BytesAt,
    ClientNetworks,
    HttpHost,
    HttpRequest,
    Leaf,
    ServerName,
    TlsHello,
)
from pyforwarder.core.express.reading import (
    MOST_BYTES,
    Hello,
    Request,
    read_hello,
    read_request,
)
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MOST_CONDITIONS: Final = 64
MOST_CLAUSES: Final = 64
MOST_METHODS: Final = 16  # of HTTP methods that rules name


class Clause(NamedTuple):
    """The rule takes the connection if all of `holds` hold, and all of `fails` do not."""

    rule: int
    holds: int  # bits of conditions
    fails: int


class Known(NamedTuple):
    """What is known of a packet, as bits of conditions."""

    holds: int
    fails: int


@dataclass(frozen=True, slots=True)
class Table:
    """The rules of one port of a listener, as far as a program in the kernel can decide them."""

    conditions: tuple[Leaf, ...]  # the bit of each is its index
    clauses: tuple[Clause, ...]
    rules: int  # how many of the listener's first rules are in the clauses
    targets: frozenset[int]  # the rules whose server the program can connect to
    most_bytes: int  # a longer first packet is left to userspace

    def decide(self, data: bytes, client: IpAddress | None) -> int | None:
        """The index of the rule that takes a connection which begins with this packet.

        None: userspace must handle the packet, because no rule is certain, or the rule's action is
        not the program's. `client` is None if it is not known.
        """
        if not data or len(data) > min(self.most_bytes, MOST_BYTES):
            return None
        known = self.known(data, client)
        for clause in self.clauses:
            outcome = _judge(clause, known)
            if outcome is MATCH:
                return clause.rule if clause.rule in self.targets else None
            if outcome is NEED_MORE:
                return None
        return None

    def known(self, data: bytes, client: IpAddress | None) -> Known:
        """Which conditions hold and which do not, for a connection that begins with `data`."""
        hello, request = read_hello(data), read_request(data)
        holds = fails = 0
        for bit, condition in enumerate(self.conditions):
            outcome = _outcome(condition, data, client, hello, request)
            if outcome is MATCH:
                holds |= 1 << bit
            elif outcome is NO_MATCH:
                fails |= 1 << bit
        return Known(holds, fails)


def _judge(clause: Clause, known: Known) -> Outcome:
    if clause.holds & known.fails or clause.fails & known.holds:
        return NO_MATCH
    if clause.holds & ~known.holds or clause.fails & ~known.fails:
        return NEED_MORE
    return MATCH


def _outcome(
    condition: Leaf, data: bytes, client: IpAddress | None, hello: Hello, request: Request
) -> Outcome:
    match condition:
        case BytesAt():
            return _bytes_at(condition, data)
        case ClientNetworks():
            if client is None:
                return NEED_MORE
            return _yes_or_no(any(client in network for network in condition.networks))
        case TlsHello():
            return NEED_MORE if hello.begins is None else _yes_or_no(hello.begins)
        case ServerName():
            if hello.begins is False:
                return NO_MATCH
            if not hello.is_read:
                return NEED_MORE
            return _yes_or_no(hello.name is not None and condition.names.include(hello.name))
        case Alpn():
            if hello.begins is False:
                return NO_MATCH
            if not hello.is_read:
                return NEED_MORE
            return _yes_or_no(not condition.names.isdisjoint(hello.alpn))
        case HttpRequest():
            if not request.method:
                return NEED_MORE if request.method is None else NO_MATCH
            return _yes_or_no(not condition.methods or request.method in condition.methods)
        case HttpHost():
            if request.host is None:
                return NO_MATCH if request.method == b"" else NEED_MORE
            return _yes_or_no(condition.names.include(request.host))


def _yes_or_no(holds: bool) -> Outcome:
    return MATCH if holds else NO_MATCH


def _bytes_at(condition: BytesAt, data: bytes) -> Outcome:
    here = data[condition.offset :]
    if here.startswith(condition.alternatives):
        return MATCH
    may_come = any(wanted.startswith(here) for wanted in condition.alternatives)
    return NEED_MORE if may_come else NO_MATCH
