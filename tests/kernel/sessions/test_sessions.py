"""UDP sessions whose datagrams the kernel sends on: what two ends see, and what is counted.

With PYFORWARDER_TEST_DATAPATH=copy the same is played with sessions that are copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.ebpf.abi import Direction
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import address_text, pattern
from tests.helpers.sessions import (
    MOST_BYTES,
    SessionSite,
    config,
    datagram_socket,
    numbered,
    send_with_options,
)
from tests.helpers.spliced import DATAPATH
from tests.helpers.topology import lay_wire, topology
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
ONLY_SPLICE: Final = pytest.mark.skipif(DATAPATH != "splice", reason="is about the kernel's part")
SIZES: Final = (0, 1, 2, 3, 1000, 1452, 1453, 1472, 1473, 4000, 16_385)
SO_NO_CHECK: Final = 11  # asm-generic/socket.h
UDP_SEGMENT: Final = 103  # linux/udp.h
SOL_UDP: Final = 17
IP_RECVTTL, IP_TTL, IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT = 12, 2, 51, 52  # linux/in.h, linux/in6.h


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> SessionSite:
    with hosts.forwarder.entered():
        return SessionSite(hosts, start_shared_forwarder(config()))


def ways(site: SessionSite) -> list[Way]:
    """Remote and local ends, in every mixture."""
    return [
        site.topology.way(client_local=client, server_local=server)
        for client in (False, True)
        for server in (False, True)
    ]


def largest(version: int) -> int:
    """Bytes of the longest datagram: IPv6's headers are not part of the 65,535 (RFC 8200)."""
    return MOST_BYTES if version == 4 else MOST_BYTES + 20


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("number", range(4))
def test_datagrams_of_every_size_keep_their_boundaries_and_are_counted(
    site: SessionSite, number: int, version: int
) -> None:
    """Also those that come in fragments, which are copied."""
    with site.spliced(ways(site)[number], version) as talk:
        before = site.counts(talk)
        total = 0
        sizes = (*SIZES, largest(version))
        for size in sizes:
            talk.exchange(pattern(size))
            total += size
        carried = {
            "up_bytes": total,
            "down_bytes": total,
            "up_packets": len(sizes),
            "down_packets": len(sizes),
        }

        def counted() -> dict[str, int]:
            return {name: count - before[name] for name, count in site.counts(talk).items()}

        # What is copied reaches its end a moment before the worker counts it.
        wait_for(lambda: counted() == carried, "all are counted")
        assert counted() == carried


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_our_sockets_get_nothing_of_a_spliced_session(site: SessionSite, version: int) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        before = site.copies()
        for number in range(50):
            talk.exchange(numbered(number, 1 + 29 * number))
        assert site.copies() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_a_burst_arrives_whole_and_in_order_through_the_handover(
    site: SessionSite, version: int
) -> None:
    """Datagrams keep coming, from both sides, while the session changes hands."""
    with site.copied(site.topology.way(), version) as talk:
        for first in range(0, 400, 20):
            numbers = range(first, first + 20)
            for number in numbers:
                talk.client.send(numbered(number, 200))
                talk.server.send(numbered(number, 300))
            for number in numbers:
                assert talk.server.recv(1 << 16) == numbered(number, 200)
                assert talk.client.recv(1 << 16) == numbered(number, 300)
        # What is copied reaches its end a moment before the worker counts it.
        wait_for(lambda: site.counts(talk)["down_packets"] == 401, "all are counted")
        row = site.row(talk.client)
        assert row is not None
        assert row["datapath"] == DATAPATH
        assert (row["up_packets"], row["down_packets"]) == (401, 401)
    assert site.stats()["datagrams_overtaken"] == 0


def test_a_datagram_without_a_checksum_stays_without(site: SessionSite) -> None:
    """RFC 768: 0 says that there is none; made up from nothing it would be wrong."""
    with site.spliced(site.topology.way(), 4) as talk:
        for sock in (talk.client, talk.server):
            sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        for number in range(20):
            talk.exchange(numbered(number, 99))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wire", ["wide", "plain"])
def test_checksums_are_right_for_every_content(site: SessionSite, wire: str, version: int) -> None:
    """Made by the sender or left to the device: also where the sum is 0, or nearly."""
    site.topology.wire(wire)
    with site.spliced(site.topology.way(), version) as talk:
        for word in (0, 1, 0xFFFF, 0x8000):
            for low in range(0, 65536, 257):
                data = struct.pack("!HH", word, low)
                talk.client.send(data)
                assert talk.server.recv(1 << 16) == data
    site.topology.wire("wide")


@pytest.mark.parametrize("version", VERSIONS)
def test_segments_of_one_send_arrive_as_datagrams(site: SessionSite, version: int) -> None:
    """UDP_SEGMENT: the sender's kernel hands on one long packet with many datagrams."""
    with site.spliced(site.topology.way(), version) as talk:
        before = site.counts(talk)
        talk.client.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
        data = pattern(20_500)
        talk.client.send(data)
        for at in range(0, 20_500, 1000):
            assert talk.server.recv(1 << 16) == data[at : at + 1000]
        carried = {"up_bytes": 20_500, "up_packets": 21, "down_bytes": 0, "down_packets": 0}

        def counted() -> dict[str, int]:
            return {name: count - before[name] for name, count in site.counts(talk).items()}

        wait_for(lambda: counted() == carried, "all are counted")


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_a_datagrams_life_gets_shorter_by_one(site: SessionSite, version: int) -> None:
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    hops = IP_TTL if version == 4 else socket.IPV6_UNICAST_HOPS
    with site.spliced(site.topology.way(), version) as talk:
        talk.server.setsockopt(level, IP_RECVTTL if version == 4 else IPV6_RECVHOPLIMIT, 1)
        for sent in (255, 64, 3, 2):
            talk.client.setsockopt(level, hops, sent)
            talk.client.send(b"x")
            _, said, _, _ = talk.server.recvmsg(100, 100)
            assert struct.unpack("=i", said[0][2][:4]) == (sent - 1,)
        talk.client.setsockopt(level, hops, 1)
        talk.client.send(b"the last of its life")
        data, said, _, _ = talk.server.recvmsg(100, 100)
        # It came as far as it may, and another datagram of our socket's has its bytes.
        assert data == b"the last of its life"
        assert struct.unpack("=i", said[0][2][:4]) == (64,)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_flushed_session_ends_and_the_next_datagram_begins_another(
    site: SessionSite, version: int
) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        assert site.forwarder.control().flush([talk.id])["flushed"] == [talk.id]
        assert site.row(talk.client) is None
        server = address_text(talk.server.getsockname()[:2])
        talk.server.close()
        with datagram_socket(
            site.topology.server, site.topology.way().destination[version]
        ) as other:
            talk.client.send(instruction(address_text(other.getsockname()[:2])) + b"again")
            assert other.recv(100) == b"again"
            assert talk.client.recv(100) == ACK
            row = site.row(talk.client)
            assert row is not None
            assert row["id"] != talk.id
            assert row["server"] != server


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_whose_server_is_gone_ends_after_a_few_datagrams(
    site: SessionSite, version: int
) -> None:
    """The server's host says of each that nobody is there (ICMP)."""
    refused = site.stats()["closed"].get("refused", 0)
    with site.spliced(site.topology.way(), version) as talk:
        talk.server.close()
        talk.client.send(b"is anybody there?")
        if DATAPATH == "splice":
            # As from the server itself: the client's own kernel knows what was quoted.
            with pytest.raises(ConnectionRefusedError):
                talk.client.recv(100)
        row = site.row(talk.client)
        assert row is not None
        assert row["id"] == talk.id  # one error is no proof against a server that has answered

        def is_gone() -> bool:
            with contextlib.suppress(ConnectionRefusedError):  # of the one before
                talk.client.send(b"is anybody there?")
            return talk.id not in [row["id"] for row in site.rows()]

        wait_for(is_gone, "it is gone")
        site.wait_until_closed("refused", refused + 1)


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_hears_that_its_client_is_gone(site: SessionSite, version: int) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        talk.client.close()
        talk.server.setblocking(False)

        def is_told() -> bool:
            try:
                talk.server.send(b"is anybody there?")
                talk.server.recv(100)
            except BlockingIOError:  # its host does not answer each time (icmp_ratelimit)
                return False
            except ConnectionRefusedError:
                return True
            raise AssertionError("somebody is there")

        wait_for(is_told, "nobody is there")


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("long_ones", ["client", "server"])
def test_one_end_that_only_sends_fragments_does_not_keep_the_others_datagrams_copied(
    site: SessionSite, long_ones: str, version: int
) -> None:
    """What one end sends is sent on once the other was heard, also by fragments alone."""
    with site.copied(site.topology.way(), version) as talk:
        ends = (talk.client, talk.server)
        long_end, short_end = ends if long_ones == "client" else ends[::-1]
        is_up = short_end is talk.client

        def exchange() -> None:
            for sender, receiver, size in (
                (short_end, long_end, 100),
                (long_end, short_end, 4000),
            ):
                sender.send(pattern(size))
                assert receiver.recv(1 << 16) == pattern(size)

        def is_there() -> bool:
            exchange()
            row = site.row(talk.client)
            return row is not None and row["datapath"] == "splice"

        wait_for(is_there, "on splice")
        for _ in range(3):  # the first ones may be copied still
            exchange()
        before = site.copies()
        for _ in range(10):
            exchange()
        # The long ones only.
        assert site.copies() - before == 10
        assert site.record(talk).direction[Direction.UP if is_up else Direction.DOWN].latched


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_datagrams_in_packets_with_options_are_copied_and_counted(
    site: SessionSite, version: int
) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        before, copies = site.counts(talk), site.copies()
        for sender, receiver in ((talk.client, talk.server), (talk.server, talk.client)):
            for number in range(5):
                send_with_options(sender, numbered(number, 200))
                assert receiver.recv(1 << 16) == numbered(number, 200)
        assert site.copies() - copies == 10
        talk.exchange()
        carried = {
            f"{d}_{what}": n
            for d in ("up", "down")
            for what, n in (("packets", 6), ("bytes", 1008))
        }

        def counted() -> dict[str, int]:
            return {name: count - before[name] for name, count in site.counts(talk).items()}

        # What is copied reaches its end a moment before the worker counts it.
        wait_for(lambda: counted() == carried, "all are counted")
        assert site.copies() - copies == 10


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_has_sent_once_is_not_spliced(site: SessionSite, version: int) -> None:
    """However much is answered: its address may be made up."""
    with site.copied(site.topology.way(), version) as talk:
        for number in range(10):
            talk.server.send(numbered(number, 100))
            assert talk.client.recv(1000) == numbered(number, 100)
        row = site.row(talk.client)
        assert row is not None
        assert (row["datapath"], row["reason"]) == ("copy", "too young to pay for a handover")


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_nobody_has_answered_is_not_spliced(site: SessionSite, version: int) -> None:
    way = site.topology.way()
    local = {4: "0.0.0.0", 6: "::"}[version]
    with (
        datagram_socket(way.server, way.destination[version]) as server,
        datagram_socket(way.client, local) as client,
    ):
        client.connect(site.via(way, version))
        client.send(instruction(address_text(server.getsockname()[:2])))
        assert client.recv(100) == ACK
        for number in range(10):
            client.send(numbered(number, 100))
            assert server.recv(1000) == numbered(number, 100)
        row = wait_for(lambda: site.row(client), "it is shown")
        assert row is not None
        assert row["datapath"] == "copy"


@pytest.fixture(scope="module")
def uneven() -> Iterator[Topology]:
    """The client's wire takes longer packets than the server's."""
    with topology(client_mtu=9000, server_mtu=1500) as made:
        yield made


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_too_long_for_the_next_wire_arrives_all_the_same(
    uneven: Topology, start_forwarder: StartForwarder, version: int
) -> None:
    """Our socket makes fragments of it, as it does of what is copied."""
    with uneven.forwarder.entered():
        site = SessionSite(uneven, start_forwarder(config()))
    with site.spliced(uneven.way(), version) as talk:
        for size in (1400, 1452, 1453, 1472, 1473, 5000, 8900, 20_000):
            talk.exchange(numbered(size, size))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_path_that_becomes_narrower_loses_a_few_datagrams_and_not_all(
    start_forwarder: StartForwarder, version: int
) -> None:
    """The router says so, and both the client and our own socket must know it."""
    with topology(router=True) as hosts:
        with hosts.forwarder.entered():
            site = SessionSite(hosts, start_forwarder(config()))
        with site.spliced(hosts.way(), version) as talk:
            talk.exchange(pattern(1400))
            hosts.limit_path(1300)
            talk.client.settimeout(0.2)
            talk.server.settimeout(0.2)

            def arrives() -> bool:
                with contextlib.suppress(OSError):  # EMSGSIZE is how a sender is told
                    talk.client.send(pattern(1400))
                try:
                    return talk.server.recv(1 << 16) == pattern(1400)
                except OSError:
                    return False

            wait_for(arrives, "it arrives, in fragments")
            talk.client.settimeout(DEADLINE_S)
            talk.server.settimeout(DEADLINE_S)
            talk.exchange(b"short")


def test_a_silent_session_ends_and_one_that_speaks_does_not(
    hosts: Topology, start_forwarder: StartForwarder
) -> None:
    """Only the kernel hears it speak."""
    with hosts.forwarder.entered():
        text = config("timeouts: {idle: 3s}").replace("700", "710")
        site = SessionSite(hosts, start_forwarder(text))
    with (
        site.spliced(hosts.way(), 4) as silent,
        site.spliced(hosts.way(), 6) as speaking,
    ):

        def is_gone() -> bool:
            speaking.exchange()
            return site.row(silent.client) is None

        wait_for(is_gone, "the silent one is gone")
        row = site.row(speaking.client)
        assert row is not None
        assert row["id"] == speaking.id
        assert row["idle_s"] < 3
        site.wait_until_closed("idle", 1)
        assert site.stats()["closed"] == {"idle": 1}


def test_what_was_copied_and_what_was_not_is_one_sum_at_the_end(
    hosts: Topology, start_forwarder: StartForwarder
) -> None:
    with hosts.forwarder.entered():
        site = SessionSite(hosts, start_forwarder(config().replace("700", "720")))
    with site.spliced(hosts.way(), 4) as talk:
        for number in range(100):
            talk.exchange(numbered(number, 1000))
        counts = site.counts(talk)
        site.forwarder.control().flush([talk.id])

    def carried() -> tuple[int, int]:
        stats = site.stats()
        return stats["bytes_up"], stats["bytes_down"]

    # Once the keeper has said what the kernel carried.
    wait_for(lambda: carried() == (counts["up_bytes"], counts["down_bytes"]), "all are counted")
    site.forwarder.wait_for_line(
        f"closed id={talk.id} reason=flushed .* up_bytes={counts['up_bytes']} "
        f"down_bytes={counts['down_bytes']} up_packets={counts['up_packets']} "
    )


def test_a_listener_that_says_so_splices_no_session(
    hosts: Topology, start_forwarder: StartForwarder
) -> None:
    text = config(datapath="splice", listener="splice: off").replace("700", "730")
    with hosts.forwarder.entered():
        site = SessionSite(hosts, start_forwarder(text))
    with site.copied(hosts.way(), 4) as talk:
        for _ in range(20):
            talk.exchange()
        row = site.row(talk.client)
        assert row is not None
        assert (row["datapath"], row["reason"]) == (
            "copy",
            "not spliced: the listener says `splice: off`",
        )


BY: Final = {"f1": "10.2.0.2", "f2": "10.7.0.2"}
# In a network where nobody knows our socket's address; 10.7.0.1 is that of f2.
SNAT: Final = """
table ip changed {
chain c {
type nat hook postrouting priority 100;
oifname "f2" meta l4proto udp snat to 10.7.0.1:21000-21999
}
}
"""
# The server's socket knows another address of ours: it says nothing of what comes from that one.
DEAF: Final = """
table ip deaf {
chain c {
type filter hook input priority 0;
ip saddr 10.7.0.1 udp sport 21000-21999 drop
}
}
"""


@contextlib.contextmanager
def two_ways(start_forwarder: StartForwarder) -> Iterator[tuple[SessionSite, Way]]:
    """The server has an address that either of two wires may lead to; at first it is by f1."""
    with topology() as hosts:
        lay_wire(hosts.server, "s1", hosts.forwarder, "f2", mtu=1500, net=7)
        hosts.server.ip("address add 10.9.0.2/32 dev lo")
        hosts.forwarder.ip("address add 10.9.0.1/32 dev lo")
        for host in (hosts.server, hosts.forwarder):
            for name in ("all", "s0", "s1", "f1", "f2"):
                with contextlib.suppress(FileNotFoundError):
                    host.set(**{f"ipv4__conf__{name}__rp_filter": 0})
        hosts.forwarder.ip(f"route add 10.9.0.2 via {BY['f1']} dev f1 src 10.9.0.1")
        hosts.server.ip("route add 10.9.0.1 via 10.2.0.1 dev s0")
        with hosts.forwarder.entered():
            site = SessionSite(hosts, start_forwarder(config()))
        way = dataclasses.replace(hosts.way(), destination={4: "10.9.0.2"})
        yield site, way


@ONLY_SPLICE
def test_a_session_follows_the_route_to_its_server(start_forwarder: StartForwarder) -> None:
    """To another interface, and back; in between there is none, and nothing is sent."""
    with two_ways(start_forwarder) as (site, way):
        hosts = site.topology
        with site.spliced(way, 4) as talk:
            for interface in ("f2", "f1"):
                hosts.forwarder.ip(
                    "route del 10.9.0.2",
                    f"route add 10.9.0.2 via {BY[interface]} dev {interface} src 10.9.0.1",
                )
                net, dev = ("7", "s1") if interface == "f2" else ("2", "s0")
                hosts.server.ip(f"route replace 10.9.0.1 via 10.{net}.0.1 dev {dev}")

                def is_by_the_kernel() -> bool:
                    before = site.copies()
                    talk.exchange()
                    return site.copies() == before

                wait_for(is_by_the_kernel, f"by {interface}")
            row = site.row(talk.client)
            assert row is not None
            assert (row["id"], row["datapath"]) == (talk.id, "splice")


@ONLY_SPLICE
def test_the_kernel_sends_nothing_by_a_new_way_before_one_of_ours_has_gone_it(
    start_forwarder: StartForwarder,
) -> None:
    """By that interface it would need another address, which only our socket's datagrams get."""
    with two_ways(start_forwarder) as (site, way), site.spliced(way, 4) as talk:
        forwarder = site.topology.forwarder
        talk.exchange()
        assert site.record(talk).direction[Direction.UP].latched
        with forwarder.entered():
            interface = socket.if_nametoindex("f2")
        site.topology.server.run("nft", "-f", "-", stdin=DEAF)
        forwarder.run("nft", "-f", "-", stdin=SNAT)
        forwarder.ip(f"route replace 10.9.0.2 via {BY['f2']} dev f2 src 10.9.0.1")
        wait_for(
            lambda: site.record(talk).direction[Direction.UP].interface == interface,
            "it goes by f2",
        )
        before, sent = site.copies(), site.counts(talk)["up_packets"]
        for _ in range(20):
            talk.client.send(b"up")
        wait_for(lambda: site.copies() - before == 20, "all are copied")
        # And have left our socket before anything lets them through.
        wait_for(lambda: site.counts(talk)["up_packets"] - sent == 20, "all are sent on")
        record = site.record(talk)
        assert not record.direction[Direction.UP].has_left
        assert not record.direction[Direction.UP].latched
        assert record.direction[Direction.DOWN].latched  # whose way is as it was
        # And where nothing stands in its way, it is the kernel's again.
        forwarder.run("nft", "flush", "ruleset")
        forwarder.ip(f"route replace 10.9.0.2 via {BY['f1']} dev f1 src 10.9.0.1")

        def is_by_the_kernel() -> bool:
            count = site.copies()
            talk.exchange()
            return site.copies() == count

        wait_for(is_by_the_kernel, "by f1")
