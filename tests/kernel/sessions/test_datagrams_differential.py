"""The same datagrams directly and through the forwarder: the same boundaries, bytes and errors.

Every run takes another seed and prints it when something is wrong; to see that again:

    PYFORWARDER_TEST_SEED=NUMBER scripts/test tests/kernel/sessions/test_datagrams_differential.py
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.peers import pattern
from tests.helpers.sessions import MOST_BYTES, SessionSite, datagram_socket
from tests.helpers.topology import topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

SEED: Final = int(
    os.environ.get("PYFORWARDER_TEST_SEED") or random.SystemRandom().randrange(1 << 32)
)
SERVER_PORT: Final = 5301
STEPS: Final = 60
# Around nothing, one packet of Ethernet (IPv4, IPv6), two of them, and the longest there is.
SIZES: Final = (
    *(0, 1, 2, 3, 7, 8, 9, 63, 64, 511, 512, 1231, 1232, 1233, 1451, 1452, 1453),
    *(1471, 1472, 1473, 1500, 2951, 2952, 2953, 4096, 8192, 16_384, 32_768, 65_506, MOST_BYTES),
)
SO_NO_CHECK: Final = 11  # asm-generic/socket.h
UDP_SEGMENT, SOL_UDP = 103, 17  # linux/udp.h
DONT_FRAGMENT: Final = {4: (socket.IPPROTO_IP, 10, 2), 6: (socket.IPPROTO_IPV6, 23, 2)}
MAY_FRAGMENT: Final = {4: (socket.IPPROTO_IP, 10, 1), 6: (socket.IPPROTO_IPV6, 23, 1)}

Said = tuple[object, ...]


def config(datapath: str) -> str:
    """A listener for each place where a server may be."""
    listeners = "".join(
        f"""
  - name: {name}
    bind: "{bind}"
    protocol: udp
    rules: [{{match: any, to: "{to}:{SERVER_PORT}"}}]"""
        for name, bind, to in (
            ("remote4", "0.0.0.0:7104", "10.2.0.2"),
            ("local4", "0.0.0.0:7204", "127.0.0.1"),
            ("remote6", "[::]:7106", "[fd02::2]"),
            ("local6", "[::]:7206", "[::1]"),
        )
    )
    if datapath == "splice":
        listeners = listeners.replace(":7", ":8")  # both run at the same time
    return f"\nlisteners:{listeners}\ndatapath: {datapath}\n"


@pytest.fixture(scope="module")
def routed() -> Iterator[Topology]:
    """The client reaches the server through the forwarder's host as through a router, too."""
    with topology(direct=True) as hosts:
        # Every error is said, however many there are.
        hosts.set(ipv4__icmp_ratelimit=0, ipv6__icmp__ratelimit=0)
        yield hosts


@pytest.fixture(scope="module", params=["copy", "splice"])
def site(
    request: pytest.FixtureRequest, routed: Topology, start_shared_forwarder: StartForwarder
) -> SessionSite:
    with routed.forwarder.entered():
        return SessionSite(
            routed, start_shared_forwarder(config(request.param), instance=request.param)
        )


@dataclass(slots=True)
class Ends:
    """A client's socket and the server's; what each step of a conversation comes to."""

    way: Way
    version: int
    client: socket.socket
    server: socket.socket
    source: tuple[str, int] = ("", 0)  # of the client, as the server sees it

    def send(self, direction: str, data: bytes) -> str:
        """Send it up or down; the error's name, if the sender hears of one at once."""
        try:
            if direction == "up":
                self.client.send(data)
            else:
                self.server.sendto(data, self.source)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return ""

    def receive(self, direction: str) -> Said:
        if direction == "up":
            data, source = self.server.recvfrom(1 << 17)
            self.source = source[:2]
        else:
            data = self.client.recv(1 << 17)
        return len(data), hashlib.blake2s(data).hexdigest()


Step = Callable[[Ends], Said]


def whole(direction: str, size: int) -> Step:
    def step(ends: Ends) -> Said:
        return ends.send(direction, pattern(size)), *ends.receive(direction)

    return step


def burst(direction: str, sizes: list[int]) -> Step:
    """One behind the other, each in one packet: their order is kept, too."""

    def step(ends: Ends) -> Said:
        sent = [ends.send(direction, pattern(size)) for size in sizes]
        return *sent, *(ends.receive(direction) for _ in sizes)

    return step


def segments(direction: str, size: int, each: int) -> Step:
    """One send that the kernel cuts into datagrams (UDP_SEGMENT)."""

    def step(ends: Ends) -> Said:
        sock = ends.client if direction == "up" else ends.server
        sock.setsockopt(SOL_UDP, UDP_SEGMENT, each)
        sent = ends.send(direction, pattern(size))
        sock.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
        return sent, *(ends.receive(direction) for _ in range(0, size, each))

    return step


def unsummed(direction: str, size: int) -> Step:
    """Without a checksum, which IPv4 allows."""

    def step(ends: Ends) -> Said:
        sock = ends.client if direction == "up" else ends.server
        sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        said = whole(direction, size)(ends)
        sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 0)
        return said

    return step


def in_one_piece(direction: str, size: int) -> Step:
    """With DF: what is longer than the sender's wire is refused to it, all else arrives."""

    def step(ends: Ends) -> Said:
        sock = ends.client if direction == "up" else ends.server
        sock.setsockopt(*DONT_FRAGMENT[ends.version])
        sent = ends.send(direction, pattern(size))
        sock.setsockopt(*MAY_FRAGMENT[ends.version])
        return sent, *(ends.receive(direction) if not sent else ())

    return step


def longest(version: int) -> int:
    """IPv6's header is not part of the 65,535 (RFC 8200)."""
    return MOST_BYTES if version == 4 else MOST_BYTES + 20


def refused(ends: Ends) -> Said:
    """Nobody is there for a moment: the server's host says so (ICMP)."""
    host = ends.server.getsockname()[0]
    ends.server.close()
    ends.send("up", b"is anybody there?")
    with pytest.raises(ConnectionRefusedError):
        ends.client.recv(1 << 16)
    ends.server = datagram_socket(ends.way.server, host, SERVER_PORT)
    return ("refused",)


def steps(chance: random.Random, version: int, *, wires_differ: bool, errors: bool) -> list[Step]:
    """Every size of SIZES and the longest, in some order, and others between."""
    made: list[Step] = []
    for size in (*SIZES, longest(version)):
        made += [whole(direction, size) for direction in ("up", "down")]
    for _ in range(STEPS):
        direction = chance.choice(("up", "down"))
        match chance.randrange(5):
            case 0:
                made.append(whole(direction, chance.randrange(longest(version) + 1)))
            case 1:
                sizes = [chance.randrange(1453) for _ in range(chance.randrange(2, 12))]
                made.append(burst(direction, sizes))
            case 2:
                each = chance.randrange(1, 1453)
                size = min(each * chance.randrange(1, 40) + chance.randrange(each), 60_000)
                made.append(segments(direction, size, each))
            case 3 if version == 4:
                made.append(unsummed(direction, chance.choice((0, 1, 900, 1472, 5000))))
            case _:
                # One end's wire may take more than the other's: then the sender's is another.
                longer = () if wires_differ else (1472, 1473, 9000)
                size = chance.choice((0, 1232, 1452, *longer))
                made.append(in_one_piece(direction, size))
    chance.shuffle(made)
    if errors:
        made += [refused, whole("up", 1200), whole("down", 1200)] * 3
    return made


@contextlib.contextmanager
def ends(way: Way, version: int, host: str, to: tuple[str, int]) -> Iterator[Ends]:
    """A server at `host` and a client of `to`, which have spoken a few times."""
    local = {4: "0.0.0.0", 6: "::"}[version]
    made = Ends(
        way,
        version,
        datagram_socket(way.client, local),
        datagram_socket(way.server, host, SERVER_PORT),
    )
    try:
        made.client.connect(to)
        for _ in range(3):
            for direction in ("up", "down"):
                assert not made.send(direction, b"hello")
                made.receive(direction)
        yield made
    finally:
        made.client.close()
        made.server.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("number", range(4))
def test_datagrams_are_as_without_a_forwarder(site: SessionSite, number: int, version: int) -> None:
    way = site.topology.way(client_local=bool(number & 1), server_local=bool(number & 2))
    host = way.destination[version]
    # From another host nobody reaches an address of `lo`.
    direct = way.listener[version] if number == 2 else host
    where = "local" if number & 2 else "remote"
    via = (way.listener[version], site.forwarder.listeners()[f"{where}{version}"][1])
    datapath = site.forwarder.instance
    told: list[list[Said]] = []
    for name, at, to in (("direct", direct, (direct, SERVER_PORT)), (datapath, host, via)):
        with ends(way, version, at, to) as made:
            if name == "splice":
                wait_for(lambda: is_spliced(site, made), "the kernel has it")
            # Copied, a client hears of no error: only the kernel can send it one in our name.
            script = steps(
                random.Random(SEED),
                version,
                wires_differ=number in (1, 2),
                errors=datapath == "splice",
            )
            told.append([step(made) for step in script])
            if name != "direct":
                row = site.row(made.client)
                assert row is not None
                assert row["datapath"] == datapath
    assert told[0] == told[1], f"seed {SEED}"


def is_spliced(site: SessionSite, made: Ends) -> bool:
    row = site.row(made.client)
    if row is not None and row["datapath"] == "splice":
        return True
    assert whole("up", 5)(made)[0] == whole("down", 5)(made)[0] == ""
    return False
