"""Spliced connections whose two legs differ: TCP's options, ECN, windows, MTUs; and what stands in
the way on the forwarder's host or behind it: packet filters, NAT, narrower paths, dead ends.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import transfers as judge
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import Waiting, address_text, pattern, read_exactly
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.topology import topology
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.faults import Faults
    from tests.helpers.topology import Topology, Way
    from tests.helpers.transfers import Transfers
    from tests.kernel.conftest import StartForwarder

SEED: Final = int(
    os.environ.get("PYFORWARDER_TEST_SEED") or random.SystemRandom().randrange(1 << 32)
)
VERSIONS: Final = (4, 6)
TCP_USER_TIMEOUT: Final = 18  # linux/tcp.h
RECVERR: Final = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}  # linux/in.h, in6.h


@pytest.fixture(scope="module")
def hosts(network: None) -> Iterator[Topology]:
    """With a router between forwarder and server, and real segments and checksums."""
    del network
    with topology(router=True) as hosts:
        hosts.wire("plain")
        yield hosts
        assert hosts.checksum_errors() == 0


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config()))


def play(
    transfers: Transfers,
    site: Site,
    version: int,
    *,
    way: Way | None = None,
    spliced: bool = True,
    via: tuple[str, int] | None = None,
    count: int = 21,
    **options: int,
) -> None:
    """Transfers from when all of them are spliced, or of which none is: all of them whole.

    Those that are not to be are silent for a while first.
    """
    way = way or site.topology.way()
    silence = {"quiet": 1} if spliced else {"rest": 60}
    before = site.joined()
    with transfers.server(way.server) as server:
        with transfers.clients(
            way.client,
            count,
            to=(way.destination[version], server.port),
            via=via or site.via(way, version),
            seed=SEED,
            **{**silence, "largest": 1 << 18, **options},
        ) as running:
            if spliced:
                running.wait_until_held()
                wait_for(lambda: site.joined() - before == count, f"{count} are spliced")
                running.go()
            clients = running.wait(deadline_s=scaled_s(50))
        servers = server.wait()
    bad = judge.faults(count, clients, servers)
    assert not bad, f"seed {SEED}: {len(bad)} faults\n" + "\n".join(bad[:10])
    assert site.joined() - before == (count if spliced else 0)


@contextlib.contextmanager
def setting(hosts: Topology, where: str, **settings: object) -> Iterator[None]:
    """Settings at the client, the server or both, and as they were afterwards."""
    names = {"both": ("client", "server")}.get(where, (where,))
    networks = [getattr(hosts, name) for name in names]
    before = [{name: network.get(name) for name in settings} for network in networks]
    for network in networks:
        network.set(**settings)
    try:
        yield
    finally:
        for network, values in zip(networks, before, strict=True):
            network.set(**values)


# ---------------------------------------------------------------------------- TCP's options


@pytest.mark.parametrize("where", ["client", "server", "both"])
@pytest.mark.parametrize("name", ["tcp_timestamps", "tcp_sack", "tcp_window_scaling"])
def test_peers_without_an_option(
    site: Site, transfers: Transfers, bad_network: Faults, name: str, where: str
) -> None:
    """With packets lost, as SACK is made for that. Only timestamps must be the same at both."""
    version = 4 if where == "client" else 6
    spliced = name != "tcp_timestamps" or where == "both"
    with setting(site.topology, where, **{f"ipv4__{name}": 0}):
        play(transfers, site, version, spliced=spliced)
        bad_network.set(seed=SEED, lose=0.01)
        with bad_network.put_on((site.topology.client, "c0"), (site.topology.server, "s0")):
            play(transfers, site, version, spliced=spliced)


@pytest.mark.parametrize(
    ("client_bytes", "server_bytes"),
    [(262_144, 67_108_864), (67_108_864, 262_144), (65_536, 33_554_432)],
)
def test_unequal_window_scales(
    site: Site, transfers: Transfers, client_bytes: int, server_bytes: int
) -> None:
    """The larger a receive buffer may grow, the larger the scale (tcp_select_initial_window())."""
    with (
        setting(site.topology, "client", ipv4__tcp_rmem=f"4096 32768 {client_bytes}"),
        setting(site.topology, "server", ipv4__tcp_rmem=f"4096 32768 {server_bytes}"),
    ):
        for version in VERSIONS:
            play(transfers, site, version, count=5, exactly=4_000_037, calm=1)


@pytest.mark.parametrize("legs", ["client", "server", "both"])
def test_ecn(site: Site, transfers: Transfers, bad_network: Faults, legs: str) -> None:
    """On one leg or on both; a mark that a router makes is no loss, and none gets lost."""
    asks = {"client": int(legs != "server"), "forwarder": int(legs != "client")}
    hosts = site.topology
    with contextlib.ExitStack() as stack:
        for where, does in asks.items():
            stack.enter_context(setting(hosts, where, ipv4__tcp_ecn=1 if does else 2))
        for version in VERSIONS:
            before = hosts.server.counters()["IpExtInCEPkts"]
            bad_network.set(seed=SEED, mark=0.05)
            with bad_network.put_on((hosts.forwarder, "f0"), (hosts.forwarder, "f1")):
                play(transfers, site, version)
            if legs == "both" and version == 4:
                assert hosts.server.counters()["IpExtInCEPkts"] > before


# ---------------------------------------------------------------------------- MTUs


@pytest.mark.parametrize(
    ("client_mtu", "server_mtu"), [(9000, 1500), (1500, 9000), (1500, 1280), (1280, 9000)]
)
def test_paths_with_different_mtus(
    start_forwarder: StartForwarder, transfers: Transfers, client_mtu: int, server_mtu: int
) -> None:
    """Remote ends, and local ones whose path is 65,536 bytes wide."""
    with topology(client_mtu=client_mtu, server_mtu=server_mtu) as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config()))
        for wire, version in itertools.product(("plain", "wide"), VERSIONS):
            hosts.wire(wire)
            for client_local, server_local in ((False, False), (True, False), (False, True)):
                way = hosts.way(client_local=client_local, server_local=server_local)
                play(transfers, site, version, way=way, count=5, exactly=1_000_003, calm=1)
        assert hosts.checksum_errors() == 0
        assert site.forwarder.stop() == 0


def push(
    sender: socket.socket, receiver: socket.socket, size: int
) -> tuple[threading.Thread, list[bool]]:
    """In a thread: so many bytes, and whether the right ones came."""
    right: list[bool] = []

    def send() -> None:
        sender.sendall(pattern(size))

    def receive() -> None:
        writer = threading.Thread(target=send)
        writer.start()
        right.append(read_exactly(receiver, size) == pattern(size))
        writer.join()

    thread = threading.Thread(target=receive)
    thread.start()
    return thread, right


@pytest.mark.parametrize("version", VERSIONS)
def test_a_path_that_becomes_narrower_is_no_black_hole(site: Site, version: int) -> None:
    """The router's ICMP is for the end that sent the packet, not for us."""
    hosts = site.topology
    try:
        with site.spliced(site.topology.way(), version) as (client, server, _):
            for sender, receiver in ((client, server), (server, client)):
                thread, right = push(sender, receiver, 300_007)
                thread.join(timeout=DEADLINE_S)
                assert right == [True]
            hosts.limit_path(1300)
            flows = [push(client, server, 2_000_003), push(server, client, 2_000_003)]
            for thread, right in flows:
                thread.join(timeout=DEADLINE_S)
                assert right == [True]
    finally:
        hosts.limit_path(1500)


def send_and_hear(sock: socket.socket) -> None:
    """Either call says what has gone wrong, whichever is the first to know."""
    sock.sendall(pattern(1000))
    sock.recv(1)


@pytest.mark.parametrize("version", VERSIONS)
def test_that_a_peer_cannot_be_reached_is_told_to_the_other(site: Site, version: int) -> None:
    """To one that wants to know (IP_RECVERR): others' TCP keeps it to itself until it gives up."""
    hosts = site.topology
    assert hosts.router is not None
    address = site.topology.way().destination[version]
    with site.spliced(site.topology.way(), version) as (client, _, pair_id):
        client.setsockopt(*RECVERR[version], 1)
        client.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 8000)
        hosts.router.ip(f"route add unreachable {address}")
        try:
            # What each version makes of it on a direct connection, too.
            expected = {4: errno.EHOSTUNREACH, 6: errno.ENETUNREACH}[version]
            # The router may have said so before send(2) returns, which then says it.
            with pytest.raises(OSError, match=os.strerror(expected)):
                send_and_hear(client)
        finally:
            hosts.router.ip(f"route delete unreachable {address}")
        site.forwarder.control().flush([pair_id])
    site.wait_for_no_pairs()


# ---------------------------------------------------------------------------- filters and NAT


@contextlib.contextmanager
def rules(hosts: Topology, text: str) -> Iterator[None]:
    """These nftables rules on the forwarder's host."""
    hosts.forwarder.run("nft", "-f", "-", stdin=text)
    try:
        yield
    finally:
        hosts.forwarder.run("nft", "flush", "ruleset")


ACCEPT: Final = """
table inet filter {
    chain in {
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established,related accept
        tcp dport {7004, 7006} accept
        meta l4proto ipv6-icmp accept
    }
    chain out { type filter hook output priority 0; policy accept; ct state invalid drop; }
    chain through { type filter hook forward priority 0; policy drop; }
}
"""
DROP: Final = """
table inet filter {
    chain in { type filter hook input priority 0; policy drop; meta l4proto ipv6-icmp accept; }
    chain out { type filter hook output priority 0; policy drop; meta l4proto ipv6-icmp accept; }
    chain through { type filter hook forward priority 0; policy drop; }
}
"""


def test_a_stateful_filter_that_lets_the_connections_in(site: Site, transfers: Transfers) -> None:
    with rules(site.topology, ACCEPT):
        for version in VERSIONS:
            play(transfers, site, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_filter_that_comes_later_does_not_see_spliced_packets(site: Site, version: int) -> None:
    """They go by below netfilter: README says so. New connections are stopped."""
    way = site.topology.way()
    with (
        site.spliced(way, version) as (client, server, _),
        rules(site.topology, DROP),
        way.client.entered(),
        socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as other,
    ):
        exchange(client, server, 10_007)
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.connect(site.via(way, version))
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        exchange_one_way(server, client)
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    site.wait_for_no_pairs()


def exchange_one_way(sender: socket.socket, receiver: socket.socket) -> None:
    sender.sendall(pattern(5003))
    assert read_exactly(receiver, 5003) == pattern(5003)


# (hook, priority, IPv4 rule, IPv6 rule)
NAT: Final = {
    "redirect": (
        "prerouting priority -100",
        "tcp dport 9004 redirect to :7004",
        "tcp dport 9006 redirect to :7006",
    ),
    "dnat": (
        "prerouting priority -100",
        "tcp dport 9004 dnat to 10.1.0.1:7004",
        "tcp dport 9006 dnat to [fd01::1]:7006",
    ),
    "snat": (
        "postrouting priority 100",
        'oifname "f1" meta l4proto tcp snat to 10.2.0.1:20000-20999',
        'oifname "f1" meta l4proto tcp snat to [fd02::1]:20000-20999',
    ),
}


def nat(kind: str) -> str:
    hook, *both = NAT[kind]
    return "".join(
        f"table {family} nat {{\nchain c {{\ntype nat hook {hook};\n{rule}\n}}\n}}\n"
        for family, rule in zip(("ip", "ip6"), both, strict=True)
    )


@pytest.mark.parametrize("kind", NAT)
@pytest.mark.parametrize("version", VERSIONS)
def test_nat_on_the_forwarder_s_host_breaks_no_connection(
    site: Site, transfers: Transfers, kind: str, version: int
) -> None:
    """What the programs see has other ports than our sockets: such a pair is not spliced."""
    way = site.topology.way()
    port = {4: 9004, 6: 9006} if kind != "snat" else {4: 7004, 6: 7006}
    via = (way.listener[version], port[version])
    with rules(site.topology, nat(kind)):
        for rest in (0, 60):
            play(transfers, site, version, via=via, spliced=False, rest=rest)
    site.wait_for_no_pairs()
    # And nothing of it is left that a later one would stumble over.
    play(transfers, site, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_handshake_of_the_same_addresses_is_another_s(site: Site, version: int) -> None:
    """A port that has come without NAT comes again through it."""
    way = site.topology.way()
    with way.server.entered():
        waiting = Waiting(way.destination[version])

    def come(port: int, to: int) -> tuple[socket.socket, socket.socket]:
        with way.client.entered():
            client = socket.socket(waiting.listener.family)
        client.settimeout(DEADLINE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.bind(("", port))
        client.connect((way.listener[version], to))
        client.sendall(instruction(address_text(waiting.address)))
        assert read_exactly(client, len(ACK)) == ACK
        server = waiting.accept()
        exchange(client, server)
        return client, server

    with waiting:
        client, server = come(0, {4: 7004, 6: 7006}[version])
        site.wait_until_spliced(client)
        port = client.getsockname()[1]
        client.close()
        server.close()
        site.wait_for_no_pairs()
        with rules(site.topology, nat("redirect")):
            client, server = come(port, {4: 9004, 6: 9006}[version])
            row = wait_for(lambda: site.row(client), "it is shown")
            assert row is not None
            assert row["datapath"] != "splice"
            exchange(client, server)
            client.close()
            server.close()
        site.wait_for_no_pairs()


@pytest.mark.parametrize("most_bytes", [64 << 20, 512 << 20])
def test_a_window_of_less_than_a_step_of_the_others_scale_is_not_spliced(
    start_forwarder: StartForwarder, most_bytes: int
) -> None:
    """It would be told as 0 for ever: the sender would wait, and nobody reset it."""
    with topology() as hosts:
        hosts.forwarder.set(ipv4__tcp_rmem=f"4096 131072 {most_bytes}")
        hosts.client.set(ipv4__tcp_rmem="4096 4096 4096")
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config()))
        with site.pair(hosts.way(), 4) as (client, server):
            if DATAPATH == "splice":
                wait_for(lambda: "steps of the other" in (site.row(client) or {})["reason"], "why")
            data = pattern(50_003)
            sender = threading.Thread(target=server.sendall, args=(data,))
            sender.start()
            assert read_exactly(client, len(data)) == data
            sender.join()
