"""A spliced pair ends when its ends have ended it, and no sooner and no later than a copied one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.attach.clsact import ClsactAttacher
from pyforwarder.datapath.ebpf.loading import load_programs
from tests.helpers.forged import ACK, FIN, RST, Forger, checksum, clock_of, next_of, timestamp
from tests.helpers.netns import Network
from tests.helpers.peers import (
    dial_through,
    ends_with_reset,
    pattern,
    push_until_blocked,
    read_exactly,
)
from tests.helpers.segments import TCP_REPAIR, sequence_numbers
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.stateful import invalid_packets, stateful_filter
from tests.helpers.topology import topology
from tests.helpers.waiting import DEADLINE_S, stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
ENDS: Final = ("client", "server")


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config()))


@contextlib.contextmanager
def forger_at(site: Site, end: str) -> Iterator[Forger]:
    """Of the wire of the client or the server."""
    out, into = ("c0", "f0") if end == "client" else ("s0", "f1")
    forwarder = site.topology.forwarder
    with contextlib.closing(Forger(network_of(site, end), out, forwarder, into)) as forger:
        yield forger


def network_of(site: Site, end: str) -> Network:
    return site.topology.client if end == "client" else site.topology.server


# ---------------------------------------------------------------------------- for all or for nobody


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_does_not_get_out_of_its_limit(site: Site, version: int) -> None:
    """By ending its pair for us alone: a reset or a FIN that the server does not take."""
    with (
        site.configured("limits: {pairs_per_client: 1}"),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        with forger_at(site, "client") as forger, site.topology.client.entered():
            for seq in (-(50 << 20), -1, 1, 1000, 50 << 20, 1 << 31):
                forger.send(next_of(client, flags=RST, seq=seq))
                forger.send(next_of(client, flags=ACK | FIN, seq=seq + 5000))
            for ack in (1, 1 << 20, 1 << 31):
                forger.send(next_of(client, flags=ACK | FIN, ack=ack))
        exchange(client, server)
        row = site.row(client)
        assert row is not None
        assert (row["id"], row["state"]) == (pair_id, "joined")
        assert (row["up_bytes"], row["down_bytes"]) == (2000, 2000)
        with pytest.raises((ConnectionError, AssertionError, OSError)):  # noqa: SIM117
            with (
                site.topology.client.entered(),
                dial_through(site.via(site.topology.way(), version), SOMEWHERE),
            ):
                pass
        site.forwarder.control().flush([pair_id])
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""


SOMEWHERE: Final = ("127.0.0.1", 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", ENDS)
def test_a_reset_that_counts_resets_both_ends(site: Site, end: str, version: int) -> None:
    """Its sender, too, goes on as if it had sent none: what we do not show is not there."""
    with site.spliced(site.topology.way(), version) as (client, server, pair_id):
        with network_of(site, end).entered(), forger_at(site, end) as forger:
            forger.send(next_of(client if end == "client" else server, flags=RST))
        site.wait_until_gone(pair_id)
        sender, other = (client, server) if end == "client" else (server, client)
        assert ends_with_reset(other) == b""
        if DATAPATH == "splice":  # copied, it is answered when it speaks
            assert ends_with_reset(sender) == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_peer_that_has_not_acknowledged_yet_is_reset_as_well(site: Site, version: int) -> None:
    """It has more than the number of our reset says: it asks, and the kernel answers."""
    way = site.topology.way(client_local=True, server_local=True)
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for _ in range(20)]
        for client, server, pair_id in pairs:
            exchange(client, server)
            # Its acknowledgement comes 40 ms later (TCP_DELACK_MIN), and nothing else.
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            client.sendall(b"x")
            assert read_exactly(server, 1) == b"x"
            site.forwarder.control().flush([pair_id])
        for client, server, _ in pairs:
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_starts_anew_gets_rid_of_its_pair(site: Site, version: int) -> None:
    """It has forgotten the connection, and says so when it is challenged."""
    with site.spliced(site.topology.way(), version, alone=True) as (client, server, pair_id):
        here, there = client.getsockname(), client.getpeername()
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        client.close()
        with site.topology.client.entered(), socket.socket(client.family) as anew:
            anew.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            anew.bind(here)
            anew.settimeout(DEADLINE_S)
            anew.connect(there)
            site.wait_until_gone(pair_id)
            assert ends_with_reset(server) == b""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", ENDS)
def test_a_challenge_passes_a_stateful_filter(site: Site, end: str, version: int) -> None:
    """A reset behind bytes that were lost: its sender says again, at the right number, that it is
    gone.
    """
    forwarder = site.topology.forwarder
    with (
        stateful_filter(forwarder),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        gone, left = (client, server) if end == "client" else (server, client)
        with network_of(site, end).entered(), forger_at(site, end) as forger:
            last = next_of(gone, flags=RST, seq=1000)
            gone.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            gone.close()
            forger.send(last)
        site.wait_until_gone(pair_id)
        assert ends_with_reset(left) == b""
        assert invalid_packets(forwarder) == 0


@pytest.mark.parametrize("end", ENDS)
def test_a_peer_that_is_gone_is_found_out_by_the_first_packet(site: Site, end: str) -> None:
    with site.spliced(site.topology.way(), 4) as (client, server, pair_id):
        gone, left = (client, server) if end == "client" else (server, client)
        gone.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        gone.close()
        left.sendall(pattern(1000))
        assert ends_with_reset(left) == b""
        site.wait_until_gone(pair_id)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_said_in_old_numbers_is_counted(site: Site, version: int) -> None:
    """Two ends that have agreed on it could speak so for ever; what was lost comes again less."""
    most, size, number = 1 << 20, 1400, 800
    with site.spliced(site.topology.way(), version) as (client, server, pair_id):
        exchange(client, server, 2000)
        with site.topology.client.entered(), forger_at(site, "client") as forger:
            said = next_of(client, data=pattern(size), seq=-size)
            for _ in range(number):
                forger.send(said)

            def is_counted() -> bool:
                # What was copied before the pair began counts besides.
                up_bytes = int((site.row(client) or {})["up_bytes"])
                return 0 <= up_bytes - (number * size - most) <= 3000

            wait_for(is_counted, "counted")
            clock = clock_of(client)
            for end in (client, server):
                end.shutdown(socket.SHUT_WR)
            assert (client.recv(1), server.recv(1)) == (b"", b"")
            site.wait_until_gone(pair_id)
            # Its ports linger, and a FIN that comes again passes; but nothing is missing any more.
            before = site.stats()["splice_invalid"].get("sequence", 0)
            said.options = timestamp(clock + 60_000)
            forger.send(said)
            wait_for(
                lambda: site.stats()["splice_invalid"].get("sequence", 0) == before + 1, "dropped"
            )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fin_behind_missing_bytes_is_one_when_they_have_come(site: Site, version: int) -> None:
    with site.spliced(site.topology.way(), version) as (client, server, _):
        with site.topology.client.entered(), forger_at(site, "client") as forger:
            last = next_of(client, data=b"bc", seq=1, flags=ACK | FIN)
            forger.send(last)
            stays(lambda: (site.row(client) or {})["state"] == "joined", "not ended", for_s=0.3)
            row = site.row(client)
            assert row is not None
            assert row["up_bytes"] == 1000
            forger.send(next_of(client, data=b"a"))
        assert read_exactly(server, 3) == b"abc"
        assert server.recv(1) == b""
        wait_for(lambda: (site.row(client) or {}).get("state") == "half-closed", "half-closed")
        row = site.row(client)
        assert row is not None
        assert row["up_bytes"] == 1003
        site.forwarder.control().flush([row["id"]])
        wait_for(lambda: is_closed(server), "reset")


# ---------------------------------------------------------------------------- idle


def keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


@pytest.mark.parametrize("how", ["open", "half-closed", "stalled"])
def test_empty_packets_keep_no_pair_from_being_idle(site: Site, how: str) -> None:
    site.wait_for_no_pairs()
    before = site.stats()["closed"]
    with (
        site.configured("timeouts: {connect: 30s, idle: 4s, half_closed: 4s}"),
        site.spliced(site.topology.way(), 4) as (client, server, pair_id),
    ):
        for sock in (client, server):
            keep_alive(sock)
        if how == "half-closed":
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
        elif how == "stalled":
            push_until_blocked(server, most=1 << 28, quiet_s=0.5)
        site.wait_until_gone(pair_id)
        reason = "half_closed" if how == "half-closed" else "idle"
        assert site.stats()["closed"].get(reason, 0) == before.get(reason, 0) + 1
        for sock in (client, server):
            wait_for(lambda sock=sock: is_closed(sock), "reset")  # type: ignore[misc]


def is_closed(sock: socket.socket) -> bool:
    """Whether its TCP has ended the connection, or was told to (TCP_INFO: tcpi_state)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"  # TCP_CLOSE


def test_bytes_do_keep_it(site: Site) -> None:
    with (
        site.configured("timeouts: {connect: 30s, idle: 3s, half_closed: 3s}"),
        site.spliced(site.topology.way(), 4) as (client, server, pair_id),
    ):
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""

        def goes_on() -> bool:
            server.sendall(b"x")
            return read_exactly(client, 1) == b"x"

        stays(goes_on, "bytes pass", for_s=6.0)
        assert [row["id"] for row in site.pairs()] == [pair_id]


# ---------------------------------------------------------------------------- tags and marks


@contextlib.contextmanager
def tagged(network: Network, name: str) -> Iterator[None]:
    """What leaves there bears a tag of VLAN 0 meanwhile: a priority, and no VLAN (IEEE 802.1Q)."""
    (program_fd,) = load_programs(
        str(Path(__file__).parents[2] / "helpers" / "priority.c"),
        [("tag", "sched_cls")],
        defines={},
    )
    try:
        with network.entered():
            attacher = ClsactAttacher(None)
            attacher.attach(program_fd, socket.if_nametoindex(name), "out")
        try:
            yield
        finally:
            with network.entered():
                attacher.close()
    finally:
        os.close(program_fd)


@pytest.mark.parametrize("version", VERSIONS)
def test_priority_tags_in_mid_connection(site: Site, version: int) -> None:
    way = site.topology.way()
    with site.spliced(way, version) as (client, server, pair_id):
        with tagged(site.topology.client, "c0"), tagged(site.topology.server, "s0"):
            exchange(client, server, 300_007)
        exchange(client, server)
        row = site.row(client)
        assert row is not None
        assert row["id"] == pair_id


# ---------------------------------------------------------------------------- ports


def states_of_our_sockets(site: Site, peer: socket.socket) -> list[str]:
    """Those of the forwarder that are connected with this one."""
    ports = f"( sport = :{peer.getpeername()[1]} and dport = :{peer.getsockname()[1]} )"
    listed = site.topology.forwarder.run("ss", "-tnaH", ports)
    return [line.split()[0] for line in listed.splitlines()]


def connect_from(own: tuple[str, int], other: tuple[str, int]) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(own)
        sock.connect(other)


@pytest.mark.skipif(DATAPATH != "splice", reason="a copied pair's sockets say their FIN")
@pytest.mark.parametrize("first", ENDS)
def test_a_long_half_close_keeps_its_ports(site: Site, first: str) -> None:
    """Longer than TCP would repeat a FIN that nobody answers."""
    site.topology.forwarder.set(ipv4__tcp_retries2=1)
    with site.spliced(site.topology.way(), 4) as (client, server, pair_id):
        one, other = (client, server) if first == "client" else (server, client)
        one.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""

        def goes_on() -> bool:
            other.sendall(b"x" * 100)
            assert read_exactly(one, 100) == b"x" * 100
            return all(states_of_our_sockets(site, s) == ["ESTAB"] for s in (client, server))

        stays(goes_on, "bytes pass, and the ports are held", for_s=5.0)
        with site.topology.forwarder.entered(), pytest.raises(OSError, match="ddress") as raised:
            connect_from(server.getpeername(), server.getsockname())
        assert raised.value.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
        other.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
        site.wait_until_gone(pair_id)


# ---------------------------------------------------------------------------- narrow interfaces


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sender", ENDS)
def test_an_interface_of_ours_becomes_narrower(site: Site, sender: str, version: int) -> None:
    """With packets that are segments, and with aggregates."""
    for wire in ("wide", "plain"):
        site.topology.wire(wire)
        with site.spliced(site.topology.way(), version) as (client, server, _):
            one, other = (client, server) if sender == "client" else (server, client)
            narrow = ((site.topology.forwarder, "f1"), (site.topology.server, "s0"))
            if sender == "server":
                narrow = ((site.topology.forwarder, "f0"), (site.topology.client, "c0"))
            try:
                for network, name in narrow:
                    network.ip(f"link set {name} mtu 1300")
                for size in (1400, 500_009):
                    exchange(one, other, size)
            finally:
                for network, name in narrow:
                    network.ip(f"link set {name} mtu 1500")


def errors_counted(site: Site) -> int:
    kinds = site.stats().get("splice_invalid", {})
    return int(kinds.get("error", 0) + kinds.get("checksum", 0))


def path_bytes(sock: socket.socket) -> int:
    """The path's MTU as its TCP knows it (TCP_INFO: tcpi_pmtu)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 60)[0])


@pytest.mark.skipif(DATAPATH != "splice", reason="of a copied pair they reach our own socket")
def test_a_router_s_error_must_be_about_what_is_under_way(site: Site) -> None:
    """Else anybody could make a connection's segments tiny."""
    before = errors_counted(site)
    with site.spliced(site.topology.way(), 4) as (client, server, _):
        with site.topology.server.entered():
            _, received = sequence_numbers(server)
        here, there = server.getsockname(), server.getpeername()

        def error(seq: int, spoil: int = 0) -> bytes:
            addresses = socket.inet_aton(there[0]) + socket.inet_aton(here[0])
            quoted = struct.pack("!BBHHHBBH", 0x45, 0, 1500, 1, 0x4000, 64, 6, 0) + addresses
            quoted += struct.pack("!HHI", there[1], here[1], (received + seq) & 0xFFFFFFFF)
            body = struct.pack("!BBHHH", 3, 4, 0, 0, 600) + quoted
            total = (checksum(body) + spoil) & 0xFFFF
            body = body[:2] + struct.pack("!H", total) + body[4:]
            outer = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0)
            outer += socket.inet_aton(here[0]) + socket.inet_aton(there[0])
            return outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:] + body

        with forger_at(site, "server") as forger:
            for seq in (-1, -(1 << 20), 1, 1 << 20, 1 << 31):
                forger.send_packet(error(seq), 4)
            forger.send_packet(error(0, spoil=1), 4)
            wait_for(lambda: errors_counted(site) == before + 6, "all are counted")
            exchange(client, server, 100_003)
            assert path_bytes(client) == 1500
            # One about the next byte to be sent is taken for what it says, as TCP itself takes it.
            with site.topology.server.entered():
                _, received = sequence_numbers(server)
            forger.send_packet(error(0), 4)
            wait_for(lambda: path_bytes(client) == 600, "the client knows of a narrow path")
        exchange(client, server, 100_003)


# ---------------------------------------------------------------------------- bridges


def test_a_port_of_the_same_bridge(start_forwarder: StartForwarder) -> None:
    """Client and stranger are behind one interface of the forwarder: numbers alone tell them."""
    with topology() as hosts:
        hosts.forwarder.ip(
            "address flush dev f0",
            "link add b0 type bridge",
            "link set f0 master b0",
            "address add 10.1.0.1/24 dev b0",
            "address add fd01::1/64 dev b0 nodad",
            "link set b0 up",
        )
        with contextlib.closing(Network()) as stranger:
            hosts.forwarder.ip(
                f"link add f3 type veth peer name x0 netns {stranger.path}",
                "link set f3 master b0",
                "link set f3 up",
                # As the kernel gives one to a port that was up before.
                "address add fe80::77/64 dev f3 nodad",
                "address add fe80::78/64 dev f0 nodad",
            )
            stranger.ip("link set x0 up")
            with hosts.forwarder.entered():
                site = Site(hosts, start_forwarder(config()))
            with (
                contextlib.closing(Forger(stranger, "x0", hosts.forwarder, "b0")) as forger,
                site.spliced(hosts.way(), 4) as (client, server, pair_id),
            ):
                with hosts.client.entered():
                    forged = [
                        next_of(client, flags=RST, seq=1),
                        next_of(client, flags=ACK | FIN, seq=1 << 30),
                        next_of(client, flags=ACK, ack=1),
                        next_of(client, flags=RST, spoil_checksum=1),
                    ]

                def all_counted() -> bool:
                    # Again: a bridge may lose what comes while it still learns who is where.
                    forger.send(*forged)
                    forger.send(*forged, target=b"\2\0\0\0\0\x77")
                    kinds = {"reset", "sequence", "acknowledgement", "checksum"}
                    return set(site.stats().get("splice_invalid", {})) >= kinds

                if DATAPATH == "splice":
                    wait_for(all_counted, "counted")
                else:
                    all_counted()
                exchange(client, server)
                row = site.row(client)
                assert row is not None
                assert (row["id"], row["state"], row["up_bytes"]) == (pair_id, "joined", 2000)
