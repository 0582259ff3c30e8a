"""bpf/express.h and its mirror in Python; and how a table lies in the program's maps."""

from __future__ import annotations

import ctypes
import ipaddress
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.express import choosing, reading, request_grammar
from pyforwarder.core.express.compiling import MOST_PREFIXES
from pyforwarder.core.express.conditions import (
    ClientNetworks,
    HttpHost,
    NamePatterns,
    Network,
    ServerName,
)
from pyforwarder.core.express.request_grammar import State
from pyforwarder.core.express.table import MOST_CLAUSES, MOST_METHODS, Clause, Table
from pyforwarder.datapath.express import abi, choice_abi, connect_abi, connection_maps
from pyforwarder.datapath.express.tables import encode, network_key
from tests.helpers import mirrors

STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "express_grammar": abi.Grammar,
    "express_prefix": abi.Prefix,
    "express_clause": abi.Clause,
    "express_method": abi.Method,
    "express_table": abi.Table,
    "express_name_key": abi.NameKey,
    "express_network_key": abi.NetworkKey,
}
NUMBERS: Final = {
    "PF_EXPRESS_VERSION": abi.VERSION,
    "PF_EXPRESS_BYTES": reading.MOST_BYTES,
    "PF_EXPRESS_NAME_BYTES": reading.MOST_NAME_BYTES,
    "PF_EXPRESS_EXTENSIONS": reading.MOST_EXTENSIONS,
    "PF_EXPRESS_ALPN_NAMES": reading.MOST_ALPN_NAMES,
    "PF_EXPRESS_ALPN_BYTES": reading.MOST_ALPN_BYTES,
    "PF_EXPRESS_HEAD_BYTES": reading.MOST_HEAD_BYTES,
    "PF_EXPRESS_METHOD_BYTES": reading.MOST_METHOD_BYTES,
    "PF_EXPRESS_METHODS": MOST_METHODS,
    "PF_EXPRESS_CLAUSES": MOST_CLAUSES,
    "PF_EXPRESS_PREFIXES": MOST_PREFIXES,
    "PF_EXPRESS_WORDS": abi.WORDS,
    "PF_EXPRESS_IN_HELLO": abi.IN_HELLO,
    "PF_EXPRESS_IN_REQUEST": abi.IN_REQUEST,
    "PF_EXPRESS_IN_ALPN": abi.IN_ALPN,
    "PF_EXPRESS_STATES": request_grammar.MOST_STATES,
    "PF_EXPRESS_CLASSES": request_grammar.MOST_CLASSES,
    "PF_EXPRESS_NO_REQUEST": State.NO_REQUEST,
    "PF_EXPRESS_UNKNOWN": State.UNKNOWN,
    "PF_EXPRESS_READ": request_grammar.LAST_FINAL,
    "PF_EXPRESS_START": State.START,
    "PF_EXPRESS_METHOD": State.METHOD,
    "PF_EXPRESS_LINE": State.LINE,
    "PF_EXPRESS_HOST": State.HOST,
}


CONNECT_STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "express_listener_key": connect_abi.ListenerKey,
    "express_listener": connect_abi.Listener,
    "express_target": connect_abi.Target,
    "express_ask": connect_abi.Ask,
    "express_end_key": connect_abi.EndKey,
    "express_ends": connect_abi.Ends,
    "express_round": connect_abi.Round,
}
CONNECT_NUMBERS: Final = {
    "PF_EXPRESS_SAVED": connect_abi.SAVED_BYTES,
    "PF_EXPRESS_PLACES_AT_ONCE": connect_abi.PLACES_AT_ONCE,
    "PF_EXPRESS_CONTEXT_BYTES": connect_abi.CONTEXT_BYTES,
    "PF_EXPRESS_NEW_PACKET_BYTES": connect_abi.NEW_PACKET_BYTES,
    "PF_EXPRESS_NO_WORKER": connect_abi.NO_WORKER,
    "PF_EXPRESS_ID_BIT": connect_abi.ID_BIT,
    "PF_EXPRESS_RULES": connect_abi.MOST_RULES,
    "PF_EXPRESS_STATE_MASK": connect_abi.STATE_MASK,
    **{f"PF_EXPRESS_{name.upper()}": place for place, name in enumerate(connection_maps.PROGRAMS)},
    **{f"PF_EXPRESS_{state.name}": state for state in connect_abi.AskState},
    **{f"PF_COUNT_{kind.name}": kind for kind in connect_abi.Count},
    "PF_COUNTS": len(connect_abi.Count),
}

CHOICE_STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "express_drawing": choice_abi.Drawing,
    "express_choice": choice_abi.Choice,
    "express_logs": choice_abi.Logs,
    "express_outcome": choice_abi.Outcome,
}
CHOICE_NUMBERS: Final = {
    "PF_EXPRESS_TURNS": choosing.MOST_TURNS,
    "PF_EXPRESS_SERVERS": choosing.MOST_SERVERS,
    "PF_EXPRESS_CHOICE": choice_abi.CHOICE,
    "PF_EXPRESS_LOG_STEPS": choosing.LOG_STEPS,
    "PF_EXPRESS_LOG_ERROR": choosing.LOG_ERROR,
    **{f"PF_EXPRESS_{kind.name}": kind for kind in choice_abi.Kind},
}


@pytest.mark.parametrize(
    ("header", "structures", "numbers"),
    [
        ("express_choice.h", CHOICE_STRUCTURES, CHOICE_NUMBERS),
        ("express.h", STRUCTURES, NUMBERS),
        ("express_connect.h", CONNECT_STRUCTURES, CONNECT_NUMBERS),
    ],
)
def test_the_mirror_is_as_the_compiler_has_it(
    tmp_path: Path,
    header: str,
    structures: Mapping[str, type[ctypes.Structure]],
    numbers: Mapping[str, int],
) -> None:
    assert mirrors.structures_of(header) == structures.keys()
    assert set(re.findall(r"\bPF_\w+", mirrors.without_comments(header))) == numbers.keys()
    expected = mirrors.layout(structures) | dict(numbers)
    assert mirrors.compiled(header, expected, tmp_path) == expected


def longest_prefix(entries: Mapping[bytes, int], asked: bytes) -> int:
    """What a map of longest prefixes (BPF_MAP_TYPE_LPM_TRIE) answers; 0: nothing."""
    found = (0, 0)
    (asked_bits,) = struct.unpack_from("=I", asked)
    text = int.from_bytes(asked[4:], "big")
    for key, value in entries.items():
        (bits,) = struct.unpack_from("=I", key)
        shift = 8 * (len(key) - 4) - bits
        if bits <= asked_bits and int.from_bytes(key[4:], "big") >> shift == text >> shift:
            found = max(found, (bits, value))
    return found[1]


def name_key(number: int, kind: int, name: bytes) -> bytes:
    text = name[::-1] + b"\0"
    padded = text.ljust(reading.MOST_NAME_BYTES + 1 + 2, b"\0")
    return struct.pack("=IIB", 8 * (5 + len(text)), number, kind) + padded


texts = st.text("ab.", max_size=4).map(str.encode)
names = texts.filter(bool)
patterns = st.builds(
    NamePatterns, st.frozensets(names, max_size=4), st.frozensets(texts, max_size=4)
)


def table_of(*conditions: ServerName | HttpHost | ClientNetworks) -> Table:
    clauses = tuple(Clause(0, 1 << n, 0) for n in range(len(conditions)))
    return Table(conditions, clauses, rules=1, targets=frozenset({0}), most_bytes=100)


@given(patterns, patterns, patterns, names)
def test_a_name_has_the_bits_of_all_that_it_fulfils(
    first: NamePatterns, second: NamePatterns, host: NamePatterns, name: bytes
) -> None:
    encoded = encode(table_of(ServerName(first), ServerName(second), HttpHost(host)), 7)
    wanted = first.include(name) | second.include(name) << 1
    assert longest_prefix(encoded.names, name_key(7, abi.IN_HELLO, name)) == wanted
    assert longest_prefix(encoded.names, name_key(7, abi.IN_REQUEST, name)) == (
        host.include(name) << 2
    )
    assert longest_prefix(encoded.names, name_key(8, abi.IN_HELLO, name)) == 0


addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address),
    st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address),
    st.sampled_from([ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("::ffff:0:1")]),
)


def around(address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> Network:
    most = address.max_prefixlen
    network: Network = ipaddress.ip_network(f"{address}/{min(bits, most)}", strict=False)
    return network


networks = st.lists(st.builds(around, addresses, st.integers(0, 128)), max_size=4).map(tuple)


@given(networks, networks, addresses, st.integers(0, 128))
def test_an_address_has_the_bits_of_all_networks_around_it(
    first: tuple[Network, ...],
    second: tuple[Network, ...],
    address: ipaddress.IPv4Address,
    bits: int,
) -> None:
    second = (*second, around(address, bits))
    encoded = encode(table_of(ClientNetworks(first), ClientNetworks(second)), 7)
    wanted = any(address in network for network in first) | (
        any(address in network for network in second) << 1
    )
    assert longest_prefix(encoded.networks, network_key(7, address)) == wanted
    assert longest_prefix(encoded.networks, network_key(8, address)) == 0


def test_the_automaton_has_a_next_state_for_every_byte() -> None:
    automaton = request_grammar.AUTOMATON
    assert len(automaton.classes) == 256
    assert len(automaton.following) == request_grammar.MOST_STATES
    assert {len(row) for row in automaton.following} == {request_grammar.MOST_CLASSES}
    assert max(automaton.classes) < request_grammar.MOST_CLASSES
    assert max(max(row) for row in automaton.following) < request_grammar.MOST_STATES
    for state in range(request_grammar.LAST_FINAL + 1):
        assert {automaton.next(state, byte) for byte in range(256)} == {state}


def test_no_name_stands_in_both_headers() -> None:
    """A macro would take the place of the other's constant, and nothing would say so."""
    assert not NUMBERS.keys() & CONNECT_NUMBERS.keys()
    assert not CHOICE_NUMBERS.keys() & (NUMBERS.keys() | CONNECT_NUMBERS.keys())
