"""A retransmission that begins with bytes already received must not double them.

TCP queues such a packet whole (net/ipv4/tcp_input.c, tcp_data_queue(), "Partial packet"); recv()
skips the old bytes, the sockmap's tcp_read_skb() does not. Seen in heavy uploads as one doubled
segment in every some gigabytes; here the packet is made by hand, so it happens every time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.pair_table import PairTable
from pyforwarder.datapath.proof.rig import Reader, Rig
from pyforwarder.datapath.sockmap.maps import KernelMaps
from tests.helpers.segments import FIN, PSH
from tests.helpers.sent_again import send_again

SLOTS = 16


@pytest.fixture
def maps() -> Iterator[KernelMaps]:
    loaded = KernelMaps.load(workers=1, slots=SLOTS)
    yield loaded
    loaded.close()


@pytest.fixture
def rig(maps: KernelMaps) -> Iterator[Rig]:
    table = PairTable(workers=1, slots=SLOTS, fd=maps.pairs_fd)
    made = Rig(table.take_window(0))
    made.datapath = maps.datapath(made, made.window, 0)
    yield made
    made.close()


@pytest.mark.parametrize("size", [10, 4095, 4096, 60_000])
@pytest.mark.parametrize("armed", [True, False], ids=["redirected", "passed"])
def test_bytes_that_come_again_are_delivered_once(rig: Rig, size: int, armed: bool) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    if not armed:
        rig.window.words32[pair.slot * rig.window.WORDS32 + table.ARMED[0]] = 0
    reader = Reader("server", server)
    first, old, new = os.urandom(500), os.urandom(size), os.urandom(100)
    client.sendall(first + old)
    rig.run_until(lambda: len(reader.data) == len(first + old), "first bytes")
    send_again(client, old[-min(size, 60_000) :], new)
    rig.run_until(lambda: len(reader.data) >= len(first + old + new), "new bytes")
    assert bytes(reader.data) == first + old + new


@pytest.mark.parametrize("size", [1, 10, 5000])
@pytest.mark.parametrize("armed", [True, False], ids=["redirected", "passed"])
def test_bytes_that_come_again_with_a_fin_end_the_direction(
    rig: Rig, size: int, armed: bool
) -> None:
    """TCP joins a lost FIN and what was not acknowledged before it (tcp_retrans_try_collapse)."""
    client, pair, server = rig.connect()
    rig.join(pair)
    if not armed:
        rig.window.words32[pair.slot * rig.window.WORDS32 + table.ARMED[0]] = 0
    reader = Reader("server", server)
    first, old = os.urandom(500), os.urandom(size)
    client.sendall(first + old)
    rig.run_until(lambda: len(reader.data) == len(first + old), "first bytes")
    send_again(client, old, b"", flags=PSH | FIN)
    rig.run_until(lambda: bool(reader.ended), "the end")
    assert (bytes(reader.data), reader.ended) == (first + old, "eof")
    assert pair.reason is None
