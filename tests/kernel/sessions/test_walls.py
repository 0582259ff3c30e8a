"""Nobody but its two ends touches a spliced session, and no worker takes what is not its own.

What is forged here does nothing to a session that is copied, whose datagrams the kernel's own stack
looks at: it must do nothing to one that is spliced.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import ANY

import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.datapath.splice import session_keeper
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from tests.helpers.forged import IP_BYTES, Forger, checksum
from tests.helpers.instruction import ACK, instruction
from tests.helpers.netns import Network
from tests.helpers.peers import address_text
from tests.helpers.sessions import SessionSite, Talk, config, datagram, datagram_socket, numbered
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.keeper_client import KeeperClient
    from tests.helpers.foreign import Foreign
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
SLOTS: Final = 64
IP_FREEBIND: Final = 15  # linux/in.h
ALL_ONES: Final = b"\xff" * 6


@pytest.fixture(scope="module")
def site(hosts: Topology, third: Network, start_shared_forwarder: StartForwarder) -> SessionSite:
    del third
    with hosts.forwarder.entered():
        return SessionSite(hosts, start_shared_forwarder(config(datapath="splice")))


@pytest.fixture
def stranger(site: SessionSite, third: Network) -> Iterator[Forger]:
    """By the third host's own wire."""
    with contextlib.closing(Forger(third, "x0", site.topology.forwarder, "f2")) as forger:
        yield forger


@pytest.fixture
def neighbour(site: SessionSite) -> Iterator[Forger]:
    """By the client's wire."""
    hosts = site.topology
    with contextlib.closing(Forger(hosts.client, "c0", hosts.forwarder, "f0")) as forger:
        yield forger


@pytest.fixture
def guest_wire(site: SessionSite) -> Iterator[None]:
    """The client's packets cross the forwarder's host before their checksums are made."""
    site.topology.wire("guest")
    yield
    site.topology.wire("wide")


def invalid(site: SessionSite, kind: str) -> int:
    return int(site.stats()["splice_invalid"].get(kind, 0))


def comes_to(site: SessionSite, kind: str, count: int) -> None:
    """What has come by another wire may be judged a moment later, and once."""
    wait_for(lambda: invalid(site, kind) >= count, f"{count} of {kind}")
    assert invalid(site, kind) == count


def nothing_came(talk: Talk) -> None:
    """The next that both ends get is from each other."""
    talk.exchange(b"nothing else")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_checksum_is_dropped_and_counted(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "checksum")
        for size in (0, 1, 2, 511, 512, 513, 1024, 1400):
            data = random.Random(size).randbytes(size)
            neighbour.send_packet(datagram(talk.client, data, spoil=1), version)
            # The same with the right one is believed, be it the sender's or the device's.
            neighbour.send_packet(datagram(talk.client, data), version)
            assert talk.server.recv(1 << 16) == data
        nothing_came(talk)
        comes_to(site, "checksum", before + 8)


@pytest.mark.usefixtures("guest_wire")
def test_a_datagram_becomes_no_other_session_s_behind_our_look(
    site: SessionSite, neighbour: Forger
) -> None:
    """A guest says where its interface is to write a checksum: over the port, say.

    By that the server knows whose a datagram is. One that has no checksum it would believe.
    """
    way = site.topology.way()
    with site.spliced(way, 4) as talk, site.spliced(way, 4) as other:
        before = invalid(site, "checksum")
        ours, theirs = (one.server.getpeername()[1] for one in (talk, other))
        data = b"\0\0forged"
        sent = struct.pack("!HHHH", ours, talk.server.getsockname()[1], 8 + len(data), 0) + data
        # What is written is the sum's complement: so the first two bytes make it that port.
        data = struct.pack("!H", checksum(sent + struct.pack("!H", theirs))) + data[2:]
        packet = datagram(talk.client, data, total=0)
        source = talk.server.getpeername()[0]
        talk.server.connect((source, theirs))
        neighbour.send_unsummed(packet, 4, start=IP_BYTES[4], field=IP_BYTES[4])
        comes_to(site, "checksum", before + 1)
        talk.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            talk.server.recv(1 << 16)
        talk.server.settimeout(DEADLINE_S)
        talk.server.connect((source, ours))
        nothing_came(other)
        nothing_came(talk)
        # Of a tunnel's datagram what is inside may have a checksum that is to be made.
        packet = datagram(talk.client, bytes(100), total=0)
        neighbour.send_unsummed(packet, 4, start=IP_BYTES[4] + 8, field=IP_BYTES[4] + 28)
        assert talk.server.recv(1 << 16) == bytes(20) + b"\xff\xff" + bytes(78)


def test_ipv6_has_no_datagrams_without_a_checksum(site: SessionSite, neighbour: Forger) -> None:
    """RFC 8200, 8.1: 0 is an error there."""
    with site.spliced(site.topology.way(), 6) as talk:
        before = invalid(site, "checksum")
        neighbour.send_packet(datagram(talk.client, b"x", total=0), 6)
        nothing_came(talk)
        comes_to(site, "checksum", before + 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("more", [-9, -1, 1, 100])
def test_a_length_that_does_not_fit_is_for_the_stack_to_judge(
    site: SessionSite, neighbour: Forger, version: int, more: int
) -> None:
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "header")
        neighbour.send_packet(datagram(talk.client, b"four", udp_bytes=more), version)
        if more == -1:  # the rest is padding, which any stack takes off
            assert talk.server.recv(100) == b"fou"
        nothing_came(talk)
        comes_to(site, "header", before + 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_comes_by_a_wrong_interface_is_for_the_stack_to_judge(
    site: SessionSite, stranger: Forger, version: int
) -> None:
    """IPv4 has strict reverse path filtering here; IPv6 has none, so copy would take it, too."""
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "interface")
        stranger.send_packet(datagram(talk.client, b"from elsewhere"), version)
        if version == 6:
            assert talk.server.recv(100) == b"from elsewhere"
        nothing_came(talk)
        comes_to(site, "interface", before + 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frame_for_another_host_is_not_sent_on(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    """A switch floods them; a datagram that went to everybody is not for us alone, either."""
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "not_for_us")
        for target in (b"\2\0\0\0\7\7", ALL_ONES):
            neighbour.send_packet(datagram(talk.client, b"x"), version, target=target)
        # A broadcast frame with our address: the stack takes it, and the worker copies it, once.
        assert talk.server.recv(100) == b"x"
        nothing_came(talk)
        wait_for(lambda: invalid(site, "not_for_us") > before, "it is counted")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_flood_from_made_up_addresses_takes_no_room_in_the_kernel(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    """One datagram from each: no session of theirs is spliced, and one that is goes on."""
    with site.spliced(site.topology.way(), version) as talk:
        joined = site.stats()["joined"]["splice"]
        for number in range(3000):
            packet = bytearray(datagram(talk.client, b"06x", total=0 if version == 4 else None))
            at = 20 if version == 4 else 40
            struct.pack_into("!H", packet, at, 1024 + number)
            neighbour.send_packet(bytes(packet), version)
            if number % 300 == 0:
                talk.exchange(numbered(number, 500))
        talk.exchange()
        assert site.stats()["joined"]["splice"] == joined
        row = site.row(talk.client)
        assert row is not None
        assert row["datapath"] == "splice"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_datagram_in_our_own_name_begins_no_conversation_with_ourselves(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    """IPv4 takes no packet from the wire that says it is this host's own; IPv6 does."""
    with site.spliced(site.topology.way(), version) as talk:
        listener = talk.client.getpeername()[:2]
        before = site.stats()["closed"].get("denied", 0)
        named = instruction(address_text(talk.server.getsockname()[:2])) + b"again and again"
        for _ in range(3):
            neighbour.send_packet(datagram(talk.client, named, by=listener), version)
        if version == 6:
            wait_for(lambda: site.stats()["closed"].get("denied", 0) == before + 3, "refusals")
        talk.exchange()
        nothing_came(talk)
        assert address_text(listener) not in [row["client"] for row in site.rows()]


def test_a_datagram_in_the_name_of_our_own_link_begins_no_conversation_with_ourselves(
    site: SessionSite, neighbour: Forger
) -> None:
    """A link-local address is this host's on one link: the link goes with the question."""
    hosts = site.topology
    hosts.forwarder.ip("address add fe80::a/64 dev f0 nodad")
    own = ("fe80::a", site.forwarder.listeners()["main6"][1])
    with datagram_socket(hosts.client, "::") as some, datagram_socket(hosts.server, "::") as server:
        named = instruction(f"[fd02::2]:{server.getsockname()[1]}") + b"again and again"
        before = site.stats()["closed"].get("denied", 0)
        for _ in range(3):
            neighbour.send_packet(datagram(some, named, to=own, by=own), 6)
        wait_for(lambda: site.stats()["closed"].get("denied", 0) == before + 3, "refusals")
        assert address_text(own) not in [row["client"] for row in site.rows()]
    hosts.forwarder.ip("address del fe80::a/64 dev f0")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_whose_port_is_the_listeners_has_a_session(
    site: SessionSite, version: int
) -> None:
    """Also where sockets may be bound to any address: it is not this host's for that."""
    hosts = site.topology
    name = f"ipv{version}__ip_nonlocal_bind"
    host = {4: "10.1.0.2", 6: "fd01::2"}[version]
    way = hosts.way()
    port = site.via(way, version)[1]
    hosts.forwarder.set(**{name: 1})
    try:
        with (
            datagram_socket(way.server, way.destination[version], port) as server,
            datagram_socket(way.client, host, port) as client,
        ):
            client.connect(site.via(way, version))
            client.send(instruction(address_text(server.getsockname()[:2])) + b"first")
            assert client.recv(1 << 16) == ACK
            assert server.recv(1 << 16) == b"first"
    finally:
        hosts.forwarder.set(**{name: 0})


@pytest.mark.parametrize("version", VERSIONS)
def test_an_error_about_what_is_no_sessions_datagram_ends_nothing(
    site: SessionSite, neighbour: Forger, version: int
) -> None:
    """With a wrong checksum it is dropped and counted, as it quotes what was sent."""
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "checksum")
        row = site.row(talk.client)
        assert row is not None
        with contextlib.closing(
            Forger(site.topology.server, "s0", site.topology.forwarder, "f1")
        ) as server:
            server.send_packet(refusal_of(talk, version, spoil=1), version)
            talk.exchange()
            comes_to(site, "checksum", before + 1)
            server.send_packet(refusal_of(talk, version, port=-1), version)
            talk.exchange()
        row = site.row(talk.client)
        assert row is not None
        assert row["id"] == talk.id


def sources(talk: Talk) -> tuple[str, str]:
    """The server's address, and that of somebody else by the same wire."""
    server = talk.server.getsockname()[0]
    return server, str(ipaddress.ip_address(server) + 5)


@pytest.fixture
def server_wire(site: SessionSite) -> Iterator[Forger]:
    hosts = site.topology
    with contextlib.closing(Forger(hosts.server, "s0", hosts.forwarder, "f1")) as forger:
        yield forger


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stranger_says_of_no_port_that_nobody_listens_there(
    site: SessionSite, server_wire: Forger, version: int
) -> None:
    """Neither the client nor our own socket hears of it."""
    with site.spliced(site.topology.way(), version) as talk:
        server, stranger = sources(talk)
        before, doubted = invalid(site, "error"), site.stats()["errors_doubted"]
        for _ in range(5):
            server_wire.send_packet(refusal_of(talk, version, by=stranger), version)
            nothing_came(talk)
        comes_to(site, "error", before + 5)
        assert site.stats()["errors_doubted"] == doubted
        # Whose port it is may say so, but is there all the same.
        server_wire.send_packet(refusal_of(talk, version, by=server), version)
        with pytest.raises(ConnectionRefusedError):
            talk.client.recv(100)
        nothing_came(talk)
        wait_for(lambda: site.stats()["errors_doubted"] == doubted + 1, "it is counted")
        row = site.row(talk.client)
        assert row is not None
        assert row["id"] == talk.id


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("mark", "all_else"), [(0, False), (7, False), (0, True)])
def test_our_socket_hears_once_of_an_error_though_packets_have_marks(
    site: SessionSite,
    server_wire: Forger,
    somebody: Foreign,
    version: int,
    mark: int,
    all_else: bool,
) -> None:
    """By a copy that comes in again: a copy that is not known any more is not copied again."""
    with site.spliced(site.topology.way(), version) as talk:
        doubted = site.stats()["errors_doubted"]
        with somebody.at((site.topology.forwarder, "f1", "in"), mark=mark, all_else=all_else):
            server_wire.send_packet(refusal_of(talk, version), version)
            with pytest.raises(ConnectionRefusedError):
                talk.client.recv(100)
            nothing_came(talk)
            assert somebody.marked == 1
        if not all_else:
            wait_for(lambda: site.stats()["errors_doubted"] == doubted + 1, "it is counted")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stranger_ends_no_session_that_is_copied(
    site: SessionSite, server_wire: Forger, version: int
) -> None:
    with site.copied(site.topology.way(), version) as talk:
        _, stranger = sources(talk)
        doubted = site.stats()["errors_doubted"]
        for _ in range(5):
            server_wire.send_packet(refusal_of(talk, version, by=stranger), version)
        wait_for(lambda: site.stats()["errors_doubted"] == doubted + 5, "all are counted")
        nothing_came(talk)
        row = site.row(talk.client)
        assert row is not None
        assert row["id"] == talk.id


@pytest.mark.parametrize("version", VERSIONS)
def test_a_path_is_no_narrower_than_what_came_through_it(
    site: SessionSite, server_wire: Forger, neighbour: Forger, version: int
) -> None:
    """One that is narrower, and says so, is in test_sessions.py."""
    least = {4: 552, 6: 1280}[version]
    with site.spliced(site.topology.way(), version) as talk:
        before = invalid(site, "error")
        for mtu, size in ((0, 1400), (68, 1400), (least - 1, 1400), (1300, 1300), (1400, 90)):
            packet = refusal_of(talk, version, mtu=mtu, size=size)
            for wire in (server_wire, neighbour):
                wire.send_packet(packet, version)
        nothing_came(talk)
        comes_to(site, "error", before + 10)
        talk.exchange(numbered(1, 1400))


def refusal_of(
    talk: Talk,
    version: int,
    *,
    spoil: int = 0,
    port: int = 0,
    by: str = "",
    mtu: int | None = None,
    size: int | None = None,
) -> bytes:
    """The server's host, or `by`, says that nobody is there; with `mtu` that it was too long.

    `port` is added to ours in what is quoted, `size` is how long that claims to be.
    """
    host, ours = talk.server.getsockname()[0], talk.server.getpeername()
    source, target = ipaddress.ip_address(by or host).packed, ipaddress.ip_address(ours[0]).packed
    addresses, back = source + target, target + ipaddress.ip_address(host).packed
    quoted = struct.pack("!HHHH", ours[1] + port, talk.server.getsockname()[1], 9, 0)
    if version == 4:
        total = size or 29
        inner = struct.pack("!BBHHHBBH", 0x45, 0, total, 1, 0, 63, socket.IPPROTO_UDP, 0) + back
        inner = inner[:10] + struct.pack("!H", checksum(inner)) + inner[12:]
        body = struct.pack("!BBHI", 3, 3 if mtu is None else 4, 0, mtu or 0) + inner + quoted
        total = (checksum(body) + spoil) & 0xFFFF
        body = body[:2] + struct.pack("!H", total) + body[4:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, socket.IPPROTO_ICMP, 0)
        ip += addresses
        return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + body
    total = 9 if size is None else size - 40
    inner = struct.pack("!IHBB", 6 << 28, total, socket.IPPROTO_UDP, 63) + back
    kind = (1, 4) if mtu is None else (2, 0)
    body = struct.pack("!BBHI", *kind, 0, mtu or 0) + inner + quoted
    pseudo = addresses + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    total = (checksum(pseudo + body) + spoil) & 0xFFFF
    body = body[:2] + struct.pack("!H", total) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 64) + addresses + body


# What a worker that was taken over may ask the keeper for


class Asking:
    """Worker 0's end of a keeper, and what it would ask with."""

    def __init__(self, client: KeeperClient, stack: contextlib.ExitStack, maps: SpliceMaps) -> None:
        self.client = client
        self._maps = maps
        self._stack = stack
        self._slot = 0
        self.numbers: dict[int, int] = {}  # of what is in each place

    def bound(
        self, host: str = "127.0.0.1", port: int = 0, *, shared: bool = False, kind: int = 0
    ) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM, kind))
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind == 0:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        sock.bind((host, port))
        return sock

    def upstream(self, host: str = "127.0.0.1") -> socket.socket:
        sock = self.bound(host)
        sock.connect(self.bound().getsockname())
        return sock

    def open(
        self,
        listener: socket.socket,
        server: socket.socket,
        client: str = "127.0.0.1",
        port: int = 4321,
        local: str = "",
    ) -> PairReason | int | None:
        """The place, or why there is none; None: it may not even ask."""
        self._slot += 1
        answer = self.client.ask(
            "open_session",
            [listener.fileno(), server.fileno()],
            id=self._slot,
            slot=self._slot,
            client=client,
            client_port=port,
            local=local or listener.getsockname()[0],
            any_interface=0,
            idle_s=60,
        )
        if "index" in answer:
            self.numbers[answer["index"]] = self._slot
        return PairReason(answer["refused"]) if "refused" in answer else answer.get("index")

    def show(self, index: int) -> bytes:
        """Write the record of a session into the pair table, as its worker does; returns it."""
        slot = number = self.numbers[index]
        record = bytes(PairRecord(id=number, started_ns=1))
        size = self._maps.workers * self._maps.slots * PAIR_BYTES
        with contextlib.closing(bpf.map_memory(self._maps.pairs_fd, size, write=True)) as table:
            table[slot * PAIR_BYTES : (slot + 1) * PAIR_BYTES] = record
        return record

    def close(self, *indexes: int, number: int = 0) -> list[Any]:
        """What each has carried; None of what is not ours, or is not that number's."""
        places = [[index, number or self.numbers.get(index, 1)] for index in indexes]
        answer = self.client.ask("close_sessions", places=places)
        return cast("list[Any]", answer["carried"])

    def take_in(self, index: int, number: int = 0) -> dict[str, Any]:
        """The keeper's answer to a worker that goes on with a session."""
        number = number or self.numbers.get(index, 1)
        return self.client.ask("session_adopted", index=index, id=number, slot=3, idle_s=60)


@contextlib.contextmanager
def playing() -> Iterator[Asking]:
    with contextlib.ExitStack() as stack:
        maps = KernelMaps.load(workers=2, slots=SLOTS)
        stack.callback(maps.close)
        splice = SpliceMaps.load(workers=2, slots=SLOTS, pairs_fd=maps.pairs_fd, sessions=10)
        splicing = Splicing(splice, workers=2)
        stack.callback(splicing.close)
        yield Asking(splicing.patient_client(0), stack, splice)


@pytest.fixture(scope="module")
def asking(network: None) -> Iterator[Asking]:
    del network
    with playing() as made:
        yield made


def test_a_worker_gets_sent_on_what_its_own_socket_gets(asking: Asking) -> None:
    index = asking.open(asking.bound(), asking.upstream())
    assert type(index) is int
    assert asking.close(index) == [[[0, 0], [0, 0]]]


def test_a_worker_does_not_get_a_client_of_another_workers(asking: Asking) -> None:
    """The kernel deals them out over sockets of one port, and knows whose each is."""
    mine = asking.bound(shared=True)
    asking.bound(port=mine.getsockname()[1], shared=True)  # the other worker's
    upstream = asking.upstream()
    said = [asking.open(mine, asking.upstream(), port=port) for port in range(2000, 2020)]
    del upstream
    assert {PairReason.OTHER_SOCKET} == {one for one in said if isinstance(one, PairReason)}
    assert 0 < len([one for one in said if type(one) is int]) < 20


def test_a_worker_does_not_get_what_a_connected_socket_gets(asking: Asking) -> None:
    mine = asking.bound(shared=True)
    address = mine.getsockname()
    closer = asking.bound(port=address[1], shared=True)
    closer.connect(("127.0.0.1", 4321))
    assert asking.open(mine, asking.upstream(), port=4321) is PairReason.OTHER_SOCKET


def test_a_listener_that_was_connected_to_a_client_gets_nothing_of_it(asking: Asking) -> None:
    """So a worker would draw another worker's client to itself, and answer in its name."""
    mine = asking.bound(shared=True)
    asking.bound(port=mine.getsockname()[1], shared=True)  # the other worker's
    mine.connect(("127.0.0.1", 4321))
    assert asking.open(mine, asking.upstream(), port=4321) is PairReason.OTHER_SOCKET


@pytest.fixture
def hasty(network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    """A keeper whose look at the listener comes too early: it is connected right after it."""
    del network
    monkeypatch.setattr(session_keeper, "has_peer", lambda _sock: False)
    with playing() as made:
        yield made


def test_a_listener_that_is_connected_while_the_keeper_looks_gets_nothing(hasty: Asking) -> None:
    mine = hasty.bound(shared=True)
    hasty.bound(port=mine.getsockname()[1], shared=True)  # the other worker's
    for port in range(3000, 3010):
        mine.connect(("127.0.0.1", port))
        said = hasty.open(mine, hasty.upstream(), port=port)
        assert said is PairReason.OTHER_SOCKET


def test_a_session_that_was_given_and_not_taken_in_is_given_again(asking: Asking) -> None:
    """A worker that dies while it takes them in leaves them to the next, with all that is known."""
    upstream = asking.upstream()
    index = asking.open(asking.bound(), upstream, port=888)
    assert type(index) is int
    shown = asking.show(index)
    upstream.close()
    asking.client.ask("worker_died")
    first = asking.client.ask("adopt_session")
    assert first["index"] == index
    assert first["record"] == shown.hex()
    assert asking.client.ask("adopt_session") == {"n": ANY}
    asking.client.ask("worker_died")
    again = asking.client.ask("adopt_session")
    assert {**again, "n": ANY} == {**first, "n": ANY}
    assert asking.take_in(index).keys() == {"n"}
    assert asking.close(index) != [None]


def test_a_session_cannot_be_had_twice(asking: Asking) -> None:
    listener, upstream = asking.bound(), asking.upstream()
    assert type(asking.open(listener, upstream)) is int
    assert asking.open(listener, asking.upstream()) is PairReason.OTHER_SOCKET
    assert asking.open(asking.bound(), upstream) is PairReason.OTHER_SOCKET


def test_an_address_that_is_not_this_hosts_is_refused(asking: Asking) -> None:
    """IP_FREEBIND lets anybody bind to it, and a host that routes would take others' datagrams."""
    assert asking.open(asking.bound("192.0.2.9"), asking.upstream()) is PairReason.NOT_ELIGIBLE
    wildcard = asking.bound("0.0.0.0")
    assert asking.open(wildcard, asking.upstream(), local="192.0.2.9") is PairReason.NOT_ELIGIBLE
    assert asking.open(wildcard, asking.upstream(), local="224.0.0.1") is PairReason.NOT_ELIGIBLE


@pytest.mark.parametrize("client", ["224.0.0.1", "0.0.0.0", "255.255.255.255", "::1"])
def test_a_client_that_is_nobody_is_refused(asking: Asking, client: str) -> None:
    expected = PairReason.TWO_FAMILIES if ":" in client else PairReason.NOT_ELIGIBLE
    assert asking.open(asking.bound(), asking.upstream(), client=client) is expected


def test_other_sockets_than_udps_are_refused(asking: Asking) -> None:
    stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with stream[0], stream[1], socket.create_server(("127.0.0.1", 0)) as listener:
        for sock in (stream[0], listener):
            assert asking.open(asking.bound(), sock, local="127.0.0.1") is PairReason.NOT_ELIGIBLE
    assert asking.open(asking.bound(), asking.bound()) is PairReason.REFUSED_BY_KERNEL


def test_a_socket_of_another_network_is_refused(asking: Asking) -> None:
    """In one of its own a worker could give its sockets any addresses."""
    with contextlib.closing(Network()) as elsewhere, elsewhere.entered():
        server = asking.bound()
        upstream = asking.bound()
        upstream.connect(server.getsockname())
        listener = asking.bound()
    assert asking.open(listener, upstream) is PairReason.NOT_ELIGIBLE


def test_a_worker_ends_no_session_but_its_own(asking: Asking) -> None:
    index = asking.open(asking.bound(), asking.upstream(), port=999)
    assert type(index) is int
    for other in (index + 1, 1 << 20):
        assert asking.close(other) == [None]
        assert "error" in asking.take_in(other)
    assert asking.close(1 << 20, index, index + 1) == [None, ANY, None]
    assert asking.close(index) == [None]


def test_an_end_that_was_meant_for_another_in_that_place_ends_nothing(asking: Asking) -> None:
    """A worker repeats what it does not know to be done, and the place may have changed hands."""
    index = asking.open(asking.bound(), asking.upstream(), port=998)
    assert type(index) is int
    other = asking.numbers[index] + 1000
    assert asking.close(index, number=other) == [None]
    assert "error" in asking.take_in(index, number=other)
    assert asking.close(index) == [[[0, 0], [0, 0]]]


def test_a_worker_has_a_share_of_the_room(asking: Asking) -> None:
    """However many it asks for, there is as much for the others."""
    listener, upstreams = asking.bound(), []
    said = []
    for port in range(10_000, 12_000):
        asking._slot = 0
        upstreams.append(asking.upstream())
        said.append(asking.open(listener, upstreams[-1], port=port))
        if said[-1] is PairReason.MAP_FULL:
            break
    places = [index for index in said if type(index) is int]
    assert said[-1] is PairReason.MAP_FULL
    assert 900 < len(places) <= 1024
    for index in places:
        asking.close(index)
