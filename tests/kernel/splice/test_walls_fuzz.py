"""Thousands of packets that are nearly right, of a stranger and of the peers themselves.

A stranger changes nothing at all. A peer may spoil its own connection; what its forwarder says of
it, and what the other end gets, must agree all the same.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.forged import (
    ACK,
    FIN,
    PSH,
    RST,
    SYN,
    UNKNOWN_OPTION,
    URG,
    Forger,
    Segment,
    clock_of,
    next_of,
    timestamp,
)
from tests.helpers.netns import Network
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.topology import lay_wire, topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
PACKETS: Final = 4000
# How far a number may be off: around everything that is compared with something.
OFF: Final = (0, 1, -1, 2, 1000, -1000, 65_535, -65_536, 1 << 20, -(1 << 20), 1 << 30, 1 << 31)


@pytest.fixture(scope="module")
def hosts(network: None) -> Iterator[Topology]:
    """Whose TCP gets wrong checksums here."""
    del network
    with topology() as made:
        yield made


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config()))


def spoilt(rng: random.Random, sock: socket.socket, right: Segment) -> Segment:
    """One that TCP refuses, or that tells it nothing new; the other fields are anything."""
    segment = Segment(
        right.version,
        right.source,
        right.target,
        right.seq + rng.choice(OFF),
        right.ack + rng.choice(OFF),
        flags=rng.choice((ACK, ACK | FIN, ACK | PSH, RST, RST | ACK, SYN, SYN | ACK, FIN, 0, URG)),
        window=rng.randrange(65_536),
        options=rng.choice((b"", right.options, UNKNOWN_OPTION, rng.randbytes(12))),
        data=b"#" * rng.choice((0, 0, 1, 100, 1400)),
    )
    match rng.randrange(4):
        case 0:
            segment.spoil_checksum = rng.randrange(1, 65_535)
        case 1:
            segment.seq = right.seq + (1 << 30) + rng.randrange(1 << 30)
        case 2:
            segment.ack = right.ack + (1 << 30) + rng.randrange(1 << 30)
            segment.flags = ACK | rng.choice((0, FIN, PSH))
        case _:
            segment.flags = ACK | rng.choice((0, FIN, PSH))
            segment.options = timestamp(clock_of(sock) - (1 << 29) - rng.randrange(1 << 29))
    return segment


@pytest.mark.parametrize("version", VERSIONS)
def test_what_strangers_send_on_the_wires_of_both_ends(site: Site, version: int) -> None:
    """There is traffic all the while, and it arrives as it was sent."""
    hosts = site.topology
    rng = random.Random(version)
    with contextlib.ExitStack() as stack:
        client, server, pair_id = stack.enter_context(site.spliced(hosts.way(), version))
        wires = [
            (sock, stack.enter_context(contextlib.closing(Forger(net, out, hosts.forwarder, into))))
            for sock, net, out, into in (
                (client, hosts.client, "c0", "f0"),
                (server, hosts.server, "s0", "f1"),
            )
        ]
        sent = 1000
        with ThreadPoolExecutor(1) as pool:
            for _ in range(20):
                right = [next_of(sock) for sock, _ in wires]
                forged = [
                    (wire, spoilt(rng, sock, segment))
                    for (sock, wire), segment in zip(wires, right, strict=True)
                    for _ in range(PACKETS // 40)
                ]
                traffic = pool.submit(exchange, client, server, 10_007)
                for wire, segment in forged:
                    wire.send(segment)
                traffic.result()
                sent += 10_007
        row = site.row(client)
        assert row is not None
        assert (row["id"], row["state"], row["datapath"]) == (pair_id, "joined", DATAPATH)
        assert (row["up_bytes"], row["down_bytes"]) == (sent, sent)
        site.forwarder.control().flush([pair_id])
        for sock in (client, server):
            wait_for(lambda sock=sock: is_closed(sock), "reset")  # type: ignore[misc]


@pytest.mark.parametrize("version", VERSIONS)
def test_random_bytes_by_a_wire_of_a_third_host(site: Site, version: int) -> None:
    """With the right addresses in front, and also without."""
    hosts = site.topology
    rng = random.Random(10 + version)
    with contextlib.ExitStack() as stack:
        third = stack.enter_context(contextlib.closing(Network()))
        net, into = (7, "f7") if version == 4 else (9, "f9")
        lay_wire(third, "x0", hosts.forwarder, into, mtu=1500, net=net)
        forger = stack.enter_context(contextlib.closing(Forger(third, "x0", hosts.forwarder, into)))
        client, server, pair_id = stack.enter_context(site.spliced(hosts.way(), version))
        ends = [next_of(sock) for sock in (client, server)]
        for _ in range(PACKETS):
            packet = bytearray(rng.choice(ends).packet() + rng.randbytes(rng.randrange(40)))
            for _ in range(rng.randrange(8)):
                packet[rng.randrange(len(packet))] = rng.randrange(256)
            forger.send_packet(bytes(packet), version)
        for size in (1000, 100_003):
            exchange(client, server, size)
        row = site.row(client)
        assert row is not None
        assert (row["id"], row["up_bytes"], row["down_bytes"]) == (pair_id, 102_003, 102_003)


def is_closed(sock: socket.socket) -> bool:
    """Whether its TCP has ended the connection, or was told to (TCP_INFO: tcpi_state)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"  # TCP_CLOSE


@pytest.mark.skipif(DATAPATH != "splice", reason="copied, the server hears nothing of it")
@pytest.mark.parametrize("seed", range(6))
def test_what_a_client_says_against_its_own_connection(site: Site, seed: int) -> None:
    """It may add bytes and an end; `show` and the server agree on what the server took."""
    hosts = site.topology
    rng = random.Random(100 + seed)
    version = VERSIONS[seed % 2]
    site.wait_for_no_pairs()
    with (
        site.spliced(hosts.way(), version) as (client, server, pair_id),
        contextlib.closing(Forger(hosts.client, "c0", hosts.forwarder, "f0")) as forger,
    ):
        for _ in range(500):
            segment = next_of(
                client,
                flags=rng.choice((ACK, ACK, ACK, ACK | PSH, ACK | FIN, RST | ACK, SYN)),
                # Bytes may overlap with those that are due.
                seq=rng.choice((-2000, -1, 3, 1000, 40_000)),
                window=rng.randrange(65_536),
                data=rng.randbytes(rng.choice((0, 10, 1000))),
            )
            if segment.flags & RST:
                segment.seq += 20_011  # neither due now nor when all has come
            forger.send(segment)

        def agrees() -> bool:
            row = site.row(client)
            assert row is not None
            assert row["id"] == pair_id
            state = "half-closed" if has_ended(server) else "joined"
            return (row["state"], row["up_bytes"]) == (state, received_bytes(server))

        wait_for(agrees, "show says what the server has got")
        assert not is_closed(server)
        site.forwarder.control().flush([pair_id])
        wait_for(lambda: is_closed(server), "reset")


def has_ended(sock: socket.socket) -> bool:
    """Whether the peer's FIN has come in order."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x08"  # TCP_CLOSE_WAIT


def received_bytes(sock: socket.socket) -> int:
    """What has come in order (TCP_INFO: tcpi_bytes_received), a FIN left out."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int.from_bytes(info[128:136], sys.byteorder) - has_ended(sock)  # it counts as a byte
