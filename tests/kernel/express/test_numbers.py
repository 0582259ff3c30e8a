"""With which numbers the kernel's connections to servers begin (RFC 6528)."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.datapath.ebpf.abi import Direction
from tests.helpers.connections import Kernel
from tests.helpers.express_site import ANY, Site, opener
from tests.helpers.peers import Waiting
from tests.helpers.siphash import siphash
from tests.helpers.topology import Topology, topology

if TYPE_CHECKING:
    from tests.helpers.express_site import Open


@pytest.fixture(scope="module")
def hosts() -> Iterator[Topology]:
    with topology() as made:
        yield made


@pytest.fixture
def site(hosts: Topology) -> Iterator[Open]:
    with (
        contextlib.closing(Kernel(hosts.forwarder, places=1)) as kernel,
        opener(hosts, kernel) as made,
    ):
        yield made


def offsets(here: Site) -> tuple[int, int]:
    """What the connection's first numbers are beside the clocks."""
    connections = here.kernel.connections
    ask, way = connections.ask(0), here.kernel.record(0).direction[Direction.UP]
    ends = bytes(way.source) + bytes(way.target) + struct.pack("=HH", way.sport, way.dport)
    secret = siphash(struct.pack("=4I", *connections.secret), ends)
    number = (ask.own_isn - (ask.begun_ns >> 6)) % (1 << 32)
    stamp = (way.tsval_delta + ask.client_tsval - ask.begun_ns // 1_000_000) % (1 << 32)
    assert (number, stamp) == (secret & 0xFFFFFFFF, secret >> 32)
    return number, stamp


def test_siphash_is_as_its_authors_have_it() -> None:
    assert siphash(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


@pytest.mark.parametrize("version", [4, 6])
def test_no_server_can_tell_what_another_one_is_told(site: Open, version: int) -> None:
    """From the same port of ours: each has its own, and of each it rises."""
    here = site((False, False), version)
    assert len(set(here.kernel.connections.secret)) > 1
    with here.way.server.entered():
        other = Waiting(here.way.destination[version])
    with other:
        found: dict[socket.socket, list[tuple[int, int]]] = {}
        numbers: dict[socket.socket, list[int]] = {}
        for waiting in (here.waiting, other) * 2:
            here.kernel.decide(here.listener, ANY, [here.target(waiting.address)])
            with here.dial(b"hello"), waiting.accept():
                found.setdefault(waiting.listener, []).append(offsets(here))
                i0 = int(here.kernel.connections.ask(0).own_isn)
                numbers.setdefault(waiting.listener, []).append(i0)
            here.kernel.free_all()
    (one, again), (another, once_more) = found.values()
    assert one == again
    assert another == once_more
    assert one[0] != another[0]
    assert one[1] != another[1]
    for first, second in numbers.values():
        assert (second - first) % (1 << 32) < 1 << 31
