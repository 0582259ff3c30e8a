"""A table of rules as the program reads it: one record, and entries of two maps.

The maps of names and networks return the entry with the longest matching prefix. So each entry has
the bits of all conditions that hold for keys of which it is the longest match.
"""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.core.express.conditions import (
    Alpn,
    BytesAt,
    ClientNetworks,
    HttpHost,
    HttpRequest,
    NamePatterns,
    Network,
    ServerName,
    TlsHello,
)
from pyforwarder.core.express.reading import MOST_BYTES
from pyforwarder.core.express.request_grammar import AUTOMATON
from pyforwarder.datapath.express import abi
from pyforwarder.datapath.express.abi import NameKey, NetworkKey

if TYPE_CHECKING:
    from pyforwarder.core.express.table import Table

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# The part of a key in front of name or address: the number of the table, and one byte.
_KEY_BITS: Final = 8 * (4 + 1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The contents of the maps; keys and values in the machine's byte order."""

    record: bytes
    names: Mapping[bytes, int]
    networks: Mapping[bytes, int]


def encode(table: Table, number: int) -> Encoded:
    """Encode a table that gets this number."""
    record = abi.Table()
    record.targets = sum(1 << rule for rule in table.targets)
    record.most_bytes = min(table.most_bytes, MOST_BYTES)
    record.clause_count = len(table.clauses)
    for place, clause in enumerate(table.clauses):
        record.clause[place] = abi.Clause(clause.holds, clause.fails, clause.rule)
    prefixes: list[abi.Prefix] = []
    methods: dict[bytes, int] = {}
    offered: dict[bytes, int] = {}
    names: dict[int, list[tuple[int, NamePatterns]]] = {abi.IN_HELLO: [], abi.IN_REQUEST: []}
    networks: list[tuple[int, tuple[Network, ...]]] = []
    for place, condition in enumerate(table.conditions):
        bit = 1 << place
        match condition:
            case TlsHello():
                record.hello |= bit
            case ServerName():
                record.server_names |= bit
                names[abi.IN_HELLO].append((bit, condition.names))
            case Alpn():
                record.alpn |= bit
                for protocol in condition.names:
                    offered[protocol] = offered.get(protocol, 0) | bit
            case HttpHost():
                record.hosts |= bit
                names[abi.IN_REQUEST].append((bit, condition.names))
            case ClientNetworks():
                record.networks |= bit
                networks.append((bit, condition.networks))
            case BytesAt():
                record.prefixes |= bit
                prefixes += (_prefix(bit, condition.offset, one) for one in condition.alternatives)
            case HttpRequest():
                record.requests |= bit
                if not condition.methods:
                    record.any_method |= bit
                for method in condition.methods:
                    methods[method] = methods.get(method, 0) | bit
    record.prefix_count = len(prefixes)
    for place, prefix in enumerate(prefixes):
        record.prefix[place] = prefix
    record.method_count = len(methods)
    for place, (method, bits) in enumerate(methods.items()):
        record.method[place].bits = bits
        record.method[place].bytes = len(method)
        ctypes.memmove(record.method[place].text, method, len(method))
    return Encoded(
        bytes(record),
        {
            key: bits
            for kind, patterns in names.items()
            for key, bits in _name_entries(number, kind, patterns)
        }
        | {
            _name_key(number, abi.IN_ALPN, bytes([len(protocol)]) + protocol): bits
            for protocol, bits in offered.items()
        },
        dict(_network_entries(number, networks)),
    )


def grammar() -> bytes:
    """The automaton for a request's head, as the value of its map."""
    record = abi.Grammar()
    ctypes.memmove(record.class_, AUTOMATON.classes, len(AUTOMATON.classes))
    rows = b"".join(AUTOMATON.following)
    ctypes.memmove(record.following, rows, len(rows))
    return bytes(record)


def network_key(number: int, address: IpAddress, prefix: int | None = None) -> bytes:
    """A key of the map of networks: for a lookup, or with a number of bits for an entry."""
    key = NetworkKey()
    packed = address.packed
    key.prefix_bits = _KEY_BITS + (128 if prefix is None else prefix)
    key.table = number
    key.family = address.version
    ctypes.memmove(key.address, packed, len(packed))
    return bytes(key)


def _prefix(bit: int, offset: int, wanted: bytes) -> abi.Prefix:
    prefix = abi.Prefix(bit=bit, end=offset + len(wanted))
    for place, byte in enumerate(wanted, start=offset):
        prefix.value[place] = byte
        prefix.mask[place] = 0xFF
    return prefix


def _name_entries(
    number: int, kind: int, patterns: Iterable[tuple[int, NamePatterns]]
) -> Iterator[tuple[bytes, int]]:
    """The entries of whole names, and of suffixes."""
    patterns = tuple(patterns)
    for name in {name for _, names in patterns for name in names.exact}:
        bits = sum(bit for bit, names in patterns if names.include(name))
        yield _name_key(number, kind, name[::-1] + b"\0"), bits
    for ending in {ending for _, names in patterns for ending in names.endings}:
        # A name with this suffix has every suffix of this suffix, too.
        bits = sum(bit for bit, names in patterns if any(map(ending.endswith, names.endings)))
        yield _name_key(number, kind, ending[::-1]), bits


def _name_key(number: int, kind: int, text: bytes) -> bytes:
    key = NameKey()
    key.prefix_bits = _KEY_BITS + 8 * len(text)
    key.table = number
    key.kind = kind
    ctypes.memmove(key.name, text, len(text))
    return bytes(key)


def _network_entries(
    number: int, conditions: Iterable[tuple[int, tuple[Network, ...]]]
) -> Iterator[tuple[bytes, int]]:
    conditions = tuple(conditions)
    for network in {network for _, networks in conditions for network in networks}:
        bits = sum(
            bit
            for bit, networks in conditions
            if any(_is_inside(network, other) for other in networks)
        )
        yield network_key(number, network.network_address, network.prefixlen), bits


def _is_inside(network: Network, other: Network) -> bool:
    if isinstance(network, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and network.subnet_of(other)
    return isinstance(other, ipaddress.IPv6Network) and network.subnet_of(other)
