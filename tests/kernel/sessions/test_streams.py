"""What a session's direction waits for before the kernel has it: proof that nothing is in between.

A datagram that our socket has sent on must have left with the addresses that the kernel would give
it. Neither an answer nor anything that somebody forges takes the place of that.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.ebpf.abi import Direction
from tests.helpers.forged import Forger, checksum
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import address_text, pattern
from tests.helpers.sessions import SessionSite, Talk, config, datagram, datagram_socket, numbered
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
LATER_BYTES: Final = 1024


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> SessionSite:
    text = config("handover: {after_bytes: 64KiB}", datapath="splice")
    with hosts.forwarder.entered():
        return SessionSite(hosts, start_shared_forwarder(text))


@contextlib.contextmanager
def stream(site: SessionSite, way: Way, version: int) -> Iterator[Talk]:
    """A client that only sends, spliced; its server has said nothing."""
    local = {4: "0.0.0.0", 6: "::"}[version]
    with (
        datagram_socket(way.server, way.destination[version]) as server,
        datagram_socket(way.client, local) as client,
    ):
        client.connect(site.via(way, version))
        client.send(instruction(address_text(server.getsockname()[:2])) + b"first")
        assert client.recv(1 << 16) == ACK
        data, source = server.recvfrom(1 << 16)
        assert data == b"first"
        server.connect(source[:2])
        row = wait_for(lambda: site.row(client), "it is shown")
        assert row is not None
        sent = 0

        def is_there() -> bool:
            nonlocal sent
            for _ in range(8):
                client.send(numbered(sent, LATER_BYTES))
                assert server.recv(1 << 16) == numbered(sent, LATER_BYTES)
                sent += 1
            shown = site.row(client)
            assert shown is not None
            if shown["datapath"] == "splice":
                assert sent * LATER_BYTES >= 64 << 10
                return True
            return False

        wait_for(is_there, "it is spliced")
        yield Talk(client, server, row["id"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("local", [False, True], ids=["elsewhere", "lo"])
def test_a_client_that_only_sends_is_spliced(site: SessionSite, version: int, local: bool) -> None:
    """Once it has spoken for two seconds, and sent as much as pays for it."""
    way = site.topology.way(client_local=local, server_local=local)
    with stream(site, way, version) as talk:
        for number in range(3):  # the first ones may be copied still
            talk.client.send(numbered(number, 10))
            assert talk.server.recv(100) == numbered(number, 10)
        before = site.copies()
        for number in range(50):
            talk.client.send(numbered(number, 1 + 29 * number))
            assert talk.server.recv(1 << 16) == numbered(number, 1 + 29 * number)
        got = site.copies() - before
        # On `lo` the server's own socket is one of this host.
        assert got == (50 if local else 0)
        record = site.record(talk)
        assert record.direction[Direction.UP].latched
        assert not record.direction[Direction.DOWN].latched
        talk.server.send(b"an answer after all")
        assert talk.client.recv(100) == b"an answer after all"
        talk.exchange()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stream_ends_when_its_server_is_gone(site: SessionSite, version: int) -> None:
    """It has never answered, so that the first error is enough."""
    with stream(site, site.topology.way(), version) as talk:
        talk.server.close()

        def is_gone() -> bool:
            with contextlib.suppress(ConnectionRefusedError):  # of the one before
                talk.client.send(b"is anybody there?")
            return talk.id not in [row["id"] for row in site.rows()]

        wait_for(is_gone, "it is gone")


@pytest.fixture
def neighbour(site: SessionSite) -> Iterator[Forger]:
    """By the server's wire."""
    hosts = site.topology
    with contextlib.closing(Forger(hosts.server, "s0", hosts.forwarder, "f1")) as forger:
        yield forger


SNAT: Final = """
table {family} changed {{
chain c {{
type nat hook postrouting priority 100;
oifname "f1" meta l4proto udp snat to {to}:21000-21999
}}
}}
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_what_leaves_with_other_addresses_stays_copied(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    """Also where somebody says that the server knows our socket's own."""
    network = site.topology.forwarder
    family, to = {4: ("ip", "10.2.0.1"), 6: ("ip6", "[fd02::1]")}[version]
    network.run("nft", "-f", "-", stdin=SNAT.format(family=family, to=to))
    try:
        with site.copied(site.topology.way(), version) as talk:

            def is_handed_over() -> bool:
                talk.exchange()
                row = site.row(talk.client)
                assert row is not None
                return bool(row["datapath"] == "splice")

            wait_for(is_handed_over, "the kernel has its addresses")
            record = site.record(talk)
            source = socket.ntohs(record.direction[Direction.DOWN].from_.dport)
            assert talk.server.getpeername()[1] != source
            forged = datagram(talk.server, b"forged", to=(talk.server.getpeername()[0], source))
            for number in range(20):
                neighbour.send_packet(forged, version)
                talk.client.send(numbered(number, 100))
                assert talk.server.recv(1000) == numbered(number, 100)
            record = site.record(talk)
            assert record.direction[Direction.DOWN].last_ns > record.began_ns  # it was heard
            assert not record.direction[Direction.UP].has_left
            assert not record.direction[Direction.UP].latched
    finally:
        network.run("nft", "flush", "ruleset")


def first_piece(packet: bytes, version: int) -> bytes:
    """The packet as the first of several pieces, of which no other comes."""
    if version == 4:
        ip = packet[:6] + b"\x20\x00" + packet[8:10] + bytes(2) + packet[12:20]
        return ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:] + packet[20:]
    # The next header is a fragment's, whose next is UDP; more are to come (RFC 8200, 4.5).
    head = packet[:4] + (len(packet) - 32).to_bytes(2, "big") + b"\x2c" + packet[7:40]
    return head + b"\x11\0\0\x01\0\0\0\x07" + packet[40:]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_piece_that_is_never_whole_is_no_sign_of_its_sender(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    way = site.topology.way()
    with site.spliced(way, version) as talk, site.spliced(way, version) as other:
        before = site.record(talk, silent_ns=int(10e9))
        for number in range(10):
            piece = first_piece(datagram(talk.server, pattern(800)), version)
            neighbour.send_packet(piece, version)
            other.exchange(numbered(number, 100))  # behind it, by the same wire
        now = site.record(talk)
        assert now.direction[Direction.DOWN].last_ns == before.direction[Direction.DOWN].last_ns
        # One that is whole is one.
        neighbour.send_packet(datagram(talk.server, b"whole"), version)
        assert talk.client.recv(100) == b"whole"
        assert (
            site.record(talk).direction[Direction.DOWN].last_ns
            > now.direction[Direction.DOWN].last_ns
        )
