"""Nobody but the two ends touches a spliced pair: packets that are forged, late or broken.

Every one of these does nothing to a pair that is copied (PYFORWARDER_TEST_DATAPATH=copy), whose
packets the kernel's own TCP looks at: it must do nothing to one that is spliced, either.
"""

from __future__ import annotations

import contextlib
import fcntl
import random
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.forged import (
    ACK,
    FIN,
    IP_BYTES,
    PSH,
    RST,
    SYN,
    UNKNOWN_OPTION,
    Forger,
    Segment,
    clock_of,
    next_of,
    timestamp,
    unsummed,
)
from tests.helpers.instruction import ACK as ANSWER
from tests.helpers.instruction import instruction
from tests.helpers.peers import Waiting, address_text, dial, ends_with_reset, read_exactly
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.netns import Network
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
ENDS: Final = ("client", "server")
ONLY_SPLICE: Final = pytest.mark.skipif(DATAPATH != "splice", reason="is about splice's counters")

Forge = Callable[[socket.socket], Segment]

# What a stranger may send that has guessed all the rest. `seq` and `ack` are off by so much.
FORGED: Final[dict[str, tuple[str, Forge]]] = {
    "a wrong checksum": ("checksum", lambda s: next_of(s, flags=ACK | FIN, spoil_checksum=7)),
    "a reset with a wrong checksum": (
        "checksum",
        lambda s: next_of(s, flags=RST, spoil_checksum=1),
    ),
    "a length beyond its end": ("header", lambda s: next_of(s, flags=RST, total_bytes=400)),
    "a reset right behind": ("reset", lambda s: next_of(s, flags=RST, seq=1)),
    "a reset in the window": ("reset", lambda s: next_of(s, flags=RST | ACK, seq=10_000)),
    "a reset far ahead": ("reset", lambda s: next_of(s, flags=RST, seq=50 << 20)),
    "a reset long ago": ("reset", lambda s: next_of(s, flags=RST, seq=-(50 << 20))),
    "a SYN": ("syn", lambda s: next_of(s, flags=SYN, options=b"")),
    "a SYN with a FIN": ("flags", lambda s: next_of(s, flags=SYN | FIN | PSH)),
    "a SYN with a reset": ("flags", lambda s: next_of(s, flags=SYN | RST)),
    "no flag": ("flags", lambda s: next_of(s, flags=0, data=b"x")),
    "a FIN without ACK": ("flags", lambda s: next_of(s, flags=FIN)),
    "a FIN far ahead": ("sequence", lambda s: next_of(s, flags=ACK | FIN, seq=1 << 30)),
    "a FIN long ago": ("sequence", lambda s: next_of(s, flags=ACK | FIN, seq=-(1 << 30))),
    "bytes far ahead": ("sequence", lambda s: next_of(s, data=b"x" * 999, seq=1 << 30)),
    "an option far ahead": (
        "sequence",
        lambda s: next_of(s, options=UNKNOWN_OPTION, seq=1 << 30),
    ),
    "an acknowledgement of what was not sent": ("acknowledgement", lambda s: next_of(s, ack=1)),
    "a far one": ("acknowledgement", lambda s: next_of(s, ack=1 << 30, data=b"x")),
    "an acknowledgement of long ago": (
        "acknowledgement",
        lambda s: next_of(s, ack=-(1 << 30), data=b"x", flags=ACK | FIN),
    ),
    "an old timestamp": (
        "timestamp",
        lambda s: next_of(s, options=timestamp(clock_of(s) - 100_000), data=b"x"),
    ),
    "an old timestamp's FIN": (
        "timestamp",
        lambda s: next_of(s, options=timestamp(clock_of(s) - (1 << 30)), flags=ACK | FIN),
    ),
}


@pytest.fixture(scope="module")
def site(hosts: Topology, third: Network, start_shared_forwarder: StartForwarder) -> Site:
    del third
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config()))


@pytest.fixture
def stranger(site: Site, third: Network) -> Iterator[Forger]:
    """By the third host's own wire."""
    with contextlib.closing(Forger(third, "x0", site.topology.forwarder, "f2")) as forger:
        yield forger


@pytest.fixture
def neighbours(site: Site) -> Iterator[dict[str, Forger]]:
    """By the wires of the client and of the server, where nobody sees what they send."""
    hosts = site.topology
    with contextlib.ExitStack() as stack:
        yield {
            end: stack.enter_context(
                contextlib.closing(Forger(network, out, hosts.forwarder, into))
            )
            for end, network, out, into in (
                ("client", hosts.client, "c0", "f0"),
                ("server", hosts.server, "s0", "f1"),
            )
        }


def invalid(site: Site) -> dict[str, int]:
    """How many packets splice has not believed so far, by kind."""
    found: dict[str, int] = site.stats().get("splice_invalid", {})
    return found


def network_of(site: Site, end: str) -> Network:
    return site.topology.client if end == "client" else site.topology.server


@contextlib.contextmanager
def untouched(site: Site, client: socket.socket, server: socket.socket) -> Iterator[None]:
    """The pair is the same afterwards, to its ends and to `show`."""
    before = site.row(client)
    assert before is not None
    yield
    for size in (1, 1000, 100_003):
        exchange(client, server, size)
    row = site.row(client)
    assert row is not None
    assert (row["id"], row["state"], row["datapath"]) == (before["id"], "joined", DATAPATH)
    carried = 1 + 1000 + 100_003
    assert row["up_bytes"] - before["up_bytes"] == carried
    assert row["down_bytes"] - before["down_bytes"] == carried


@contextlib.contextmanager
def counted(site: Site, **kinds: int) -> Iterator[None]:
    """So many packets of these kinds are not believed meanwhile; only splice counts them."""
    before = invalid(site)
    yield
    if DATAPATH != "splice":
        return

    def grown() -> dict[str, int]:
        now = invalid(site)
        return {kind: now[kind] - before.get(kind, 0) for kind in now}

    wait_for(lambda: all(grown().get(kind, 0) >= n for kind, n in kinds.items()), str(kinds))
    assert {kind: n for kind, n in grown().items() if n} == kinds


@pytest.fixture
def guest_wire(site: Site) -> Iterator[None]:
    """The client's packets cross the forwarder's host before their checksums are made."""
    site.topology.wire("guest")
    yield
    site.topology.wire("wide")


# ---------------------------------------------------------------------------- of a third host


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["an exact reset", *FORGED])
def test_nothing_by_another_interface(
    site: Site, stranger: Forger, version: int, name: str
) -> None:
    """Even with all numbers right."""
    way = site.topology.way()
    forge = FORGED[name][1] if name in FORGED else lambda s: next_of(s, flags=RST)
    with site.spliced(way, version) as (client, server, pair_id):
        forged = []
        for end, sock in (("client", client), ("server", server)):
            with network_of(site, end).entered():
                forged.append(forge(sock))
        with untouched(site, client, server), counted(site, interface=2):
            stranger.send(*forged)
        site.forwarder.control().flush([pair_id])
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""


@ONLY_SPLICE
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("by", ["stranger", "neighbour"])
def test_syns_in_a_client_s_name_do_not_keep_a_pair_from_being_spliced(
    site: Site, stranger: Forger, neighbours: dict[str, Forger], version: int, by: str
) -> None:
    """Between its handshake and its begin."""
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        with way.server.entered():
            waiting = stack.enter_context(Waiting(way.destination[version]))
        with way.client.entered():
            client = stack.enter_context(dial(site.via(way, version)))
            forged = [next_of(client, flags=SYN, seq=n << 20) for n in range(1, 20)]
        (stranger if by == "stranger" else neighbours["client"]).send(*forged)
        client.sendall(instruction(address_text(waiting.address)))
        server = stack.enter_context(waiting.accept())
        assert read_exactly(client, len(ANSWER)) == ANSWER
        exchange(client, server)
        site.wait_until_spliced(client)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("guest_wire")
def test_a_checksum_is_never_written_over_what_was_looked_at(
    site: Site, neighbours: dict[str, Forger], version: int
) -> None:
    """A guest says where its interface is to write it: over the ports, say, behind our look."""
    tcp = IP_BYTES[version]
    errors = site.topology.checksum_errors()
    with site.spliced(site.topology.way(), version) as (client, server, _):
        with site.topology.client.entered():
            packet = unsummed(next_of(client))
        places = [(tcp, tcp + at) for at in (0, 2, 4, 8, 12, 14)]  # up to the window
        places += [(tcp - 4, tcp), (tcp - 8, tcp - 2), (tcp - 4, tcp - 4)]  # addresses, too
        with untouched(site, client, server), counted(site, checksum=len(places)):
            for start, field in places:
                neighbours["client"].send_unsummed(packet, version, start=start, field=field)
        # As every host does it.
        with site.topology.client.entered():
            packet = unsummed(next_of(client))
        with untouched(site, client, server), counted(site):
            neighbours["client"].send_unsummed(packet, version, start=tcp, field=tcp + 16)
    assert site.topology.checksum_errors() == errors


@pytest.mark.parametrize("version", VERSIONS)
def test_blind_guesses_by_another_interface(site: Site, stranger: Forger, version: int) -> None:
    """Only the addresses are known; whichever half of the numbers is ahead, it is among these."""
    guess = random.Random(version).getrandbits(32)
    with site.spliced(site.topology.way(), version) as (client, server, pair_id):
        forged = [
            Segment(version, sock.getsockname()[:2], sock.getpeername()[:2], seq, ack, **more)
            for sock in (client, server)
            for seq in (guess, guess + (1 << 31))
            for ack in (0, 1 << 30, 1 << 31, 3 << 30)
            for more in ({}, {"options": UNKNOWN_OPTION}, {"flags": ACK | FIN}, {"flags": RST})
        ]
        with untouched(site, client, server), counted(site, interface=len(forged)):
            stranger.send(*forged)
        site.forwarder.control().flush([pair_id])
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""


def test_addresses_of_this_host_by_a_wire(site: Site, stranger: Forger) -> None:
    """A martian, for a pair on `lo`."""
    way = site.topology.way(client_local=True, server_local=True)
    for version in VERSIONS:
        with site.spliced(way, version) as (client, server, _):
            with site.topology.forwarder.entered():
                forged = [next_of(sock, flags=RST) for sock in (client, server)]
            with untouched(site, client, server), counted(site, interface=2):
                stranger.send(*forged)


# ---------------------------------------------------------------------------- of a neighbour


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", FORGED)
def test_what_its_end_would_not_believe(
    site: Site, neighbours: dict[str, Forger], name: str, end: str, version: int
) -> None:
    kind, forge = FORGED[name]
    with site.spliced(site.topology.way(), version) as (client, server, _):
        with network_of(site, end).entered():
            forged = forge(client if end == "client" else server)
        with untouched(site, client, server), counted(site, **{kind: 1}):
            neighbours[end].send(forged)


@pytest.mark.parametrize("end", ENDS)
def test_a_header_with_a_wrong_checksum(
    site: Site, neighbours: dict[str, Forger], end: str
) -> None:
    with site.spliced(site.topology.way(), 4) as (client, server, _):
        with network_of(site, end).entered():
            forged = next_of(client if end == "client" else server, flags=RST, spoil_header=1)
        with untouched(site, client, server), counted(site, header=1):
            neighbours[end].send(forged)


@pytest.mark.parametrize("version", VERSIONS)
def test_frames_for_another_host(site: Site, neighbours: dict[str, Forger], version: int) -> None:
    """A switch that does not know where to shows them to everybody; so does a hub."""
    site.topology.forwarder.ip("link set f0 promisc on")
    with site.spliced(site.topology.way(), version) as (client, server, _):
        with site.topology.client.entered():
            forged = [next_of(client, flags=RST), next_of(client, flags=ACK | FIN)]
        with untouched(site, client, server), counted(site, not_for_us=4):
            for target in (b"\2\0\0\0\0\x77", b"\xff" * 6):
                neighbours["client"].send(*forged, target=target)
    site.topology.forwarder.ip("link set f0 promisc off")


def test_a_fragment(site: Site, neighbours: dict[str, Forger]) -> None:
    with site.spliced(site.topology.way(), 4) as (client, server, _):
        with site.topology.client.entered():
            first = next_of(client, data=b"x" * 40, fragment=0x2000)
            rest = next_of(client, flags=RST, fragment=9)
        with untouched(site, client, server), counted(site, fragment=1):
            neighbours["client"].send(first, rest)


@pytest.mark.parametrize("end", ENDS)
def test_resets_behind_headers_that_the_programs_do_not_read(
    site: Site, neighbours: dict[str, Forger], end: str
) -> None:
    """They reach our own sockets, which are mute, and must stay.

    Their numbers are known to the end itself: nothing has been sent to them since.
    """
    with site.spliced(site.topology.way(), 6) as (client, server, _):
        sock = client if end == "client" else server
        with network_of(site, end).entered():
            forged = next_of(sock, flags=RST)
        numbers = range(forged.seq - 3000, forged.seq + 1)
        with untouched(site, client, server):
            for seq in numbers:
                forged.seq = seq
                packet = forged.packet()
                # Destination options of nothing but padding, in front of TCP (RFC 8200, 4.6).
                length, options = len(packet) - 40, bytes([6, 0, 1, 4, 0, 0, 0, 0])
                head = struct.pack("!IHBB", 6 << 28, length + 8, 60, 64) + packet[8:40]
                neighbours[end].send_packet(head + options + packet[40:], 6)
        assert len(our_sockets(site, server)) == 1
        assert len(our_sockets(site, client)) == 1


def our_sockets(site: Site, peer: socket.socket) -> list[str]:
    """The states of the forwarder's sockets that are connected with this one."""
    ports = f"( sport = :{peer.getpeername()[1]} and dport = :{peer.getsockname()[1]} )"
    listed = site.topology.forwarder.run("ss", "-tnaH", ports)
    return [line.split()[0] for line in listed.splitlines()]


def wait_until_all_is_acknowledged(*ends: socket.socket) -> None:
    """An acknowledgement that is put off would overtake what is forged, and make it old."""

    def queued() -> bytes:
        return b"".join(fcntl.ioctl(end.fileno(), termios.TIOCOUTQ, bytes(4)) for end in ends)

    wait_for(lambda: not any(queued()), "all is acknowledged")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_option_is_taken_out(
    site: Site, neighbours: dict[str, Forger], version: int
) -> None:
    """A byte that it comes with arrives, and the pair goes on."""
    with site.spliced(site.topology.way(), version) as (client, server, pair_id):
        wait_until_all_is_acknowledged(client, server)
        with site.topology.client.entered():
            now = clock_of(client)
            forged = [
                next_of(client, options=UNKNOWN_OPTION),
                next_of(client, options=timestamp(now) + UNKNOWN_OPTION),
                next_of(client, options=UNKNOWN_OPTION * 10),
            ]
        with untouched(site, client, server), counted(site, option=3):
            neighbours["client"].send(*forged)
        wait_until_all_is_acknowledged(client, server)
        with site.topology.client.entered(), counted(site, option=1):
            last = next_of(client, options=timestamp(clock_of(client)) + UNKNOWN_OPTION, data=b"?")
            neighbours["client"].send(last)
            assert read_exactly(server, 1) == b"?"
        site.forwarder.control().flush([pair_id])
