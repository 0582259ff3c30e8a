"""UDP sessions through a forwarder on the middle one of three hosts.

PYFORWARDER_TEST_DATAPATH=copy plays the same with sessions that are copied: a test that fails there
as well is wrong itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import ABI_VERSION, PAIR_BYTES, Direction, PairRecord
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.abi import NO_SLOT
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES, SessionDirection, SessionRecord
from tests.helpers.forged import checksum
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import address_text, pattern
from tests.helpers.spliced import DATAPATH
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.netns import Network
    from tests.helpers.topology import Topology, Way

COUNTED: Final = ("bytes", "packets")
MOST_BYTES: Final = 65_507  # of IPv4: a packet of 65,535 (RFC 791) without its headers


def config(more: str = "", *, datapath: str = DATAPATH, listener: str = "") -> str:
    """A listener for each version of IP; clients name their server in the first datagram."""
    listeners = "".join(
        f"""
  - name: main{version}
    bind: "{address}"
    protocol: udp
    {listener}
    rules: [{{match: instruction, allow: [any]}}]"""
        for version, address in ((4, "0.0.0.0:7004"), (6, "[::]:7006"))
    )
    return f"\nlisteners:{listeners}\ndatapath: {datapath}\n{more}\n"


def datagram_socket(network: Network, host: str, port: int = 0) -> socket.socket:
    """Bound there, with a deadline for what it receives, and room for the largest datagrams."""
    with network.entered():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((host, port))
    return sock


@dataclass(slots=True)
class Talk:
    """A client's socket, connected to the forwarder, and the server's, connected to our source."""

    client: socket.socket
    server: socket.socket
    id: int

    def exchange(self, data: bytes = b"datagram") -> None:
        """It goes there, and back, whole, and nothing else comes."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.send(data)
            assert receiver.recv(1 << 16) == data


@dataclass(frozen=True, slots=True)
class SessionSite:
    """A topology with a forwarder in its middle."""

    topology: Topology
    forwarder: Daemon

    def via(self, way: Way, version: int) -> tuple[str, int]:
        """Where a client on that way finds the forwarder."""
        return way.listener[version], self.forwarder.listeners()[f"main{version}"][1]

    @contextlib.contextmanager
    def copied(self, way: Way, version: int) -> Iterator[Talk]:
        """A session of which the client has sent one datagram, and been answered."""
        local = {4: "0.0.0.0", 6: "::"}[version]
        with (
            datagram_socket(way.server, way.destination[version]) as server,
            datagram_socket(way.client, local) as client,
        ):
            client.connect(self.via(way, version))
            client.send(instruction(address_text(server.getsockname()[:2])) + b"first")
            assert client.recv(1 << 16) == ACK
            data, source = server.recvfrom(1 << 16)
            assert data == b"first"
            server.connect(source[:2])
            server.send(b"answer")
            assert client.recv(1 << 16) == b"answer"
            row = wait_for(lambda: self.row(client), "it is shown")
            assert row is not None
            yield Talk(client, server, row["id"])

    @contextlib.contextmanager
    def spliced(self, way: Way, version: int) -> Iterator[Talk]:
        """One whose datagrams the kernel sends on, both ways."""
        forwarder = self.topology.forwarder
        with self.copied(way, version) as talk:
            talk.exchange()
            ours = [network for network in (way.client, way.server) if network is forwarder]
            self.wait_until_spliced(talk, local=len(ours))
            yield talk

    def wait_until_spliced(self, talk: Talk, *, local: int = 0) -> None:
        """Until both directions are the kernel's: our sockets get nothing more.

        So many of the ends are on the forwarder's host, and get what they get.
        """

        def is_there() -> bool:
            talk.exchange()
            row = self.row(talk.client)
            return row is not None and row["datapath"] == DATAPATH

        wait_for(is_there, f"on {DATAPATH}")

        def is_the_kernels() -> bool:
            before = self.copies()
            talk.exchange()
            return self.copies() == before + local

        # What is shown as spliced is copied still until the kernel knows the way of each direction.
        if DATAPATH == "splice":
            wait_for(is_the_kernels, "nothing is copied any more")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `show --json`."""
        return cast("list[dict[str, Any]]", self.forwarder.control().pairs())

    def row(self, client: socket.socket) -> dict[str, Any] | None:
        """What `show` says of a client's session."""
        text = address_text(client.getsockname()[:2])
        return next((row for row in self.rows() if row["client"] == text), None)

    def counts(self, talk: Talk) -> dict[str, int]:
        """Bytes and datagrams, up and down."""
        row = self.row(talk.client)
        assert row is not None
        return {f"{d}_{what}": row[f"{d}_{what}"] for d in ("up", "down") for what in COUNTED}

    def stats(self) -> dict[str, Any]:
        """What `show stats --json` says."""
        return self.forwarder.control().stats()

    def wait_until_closed(self, reason: str, count: int) -> None:
        """Until so many sessions have ended for that reason, and none more.

        Of a spliced one that is counted once the keeper has said what it has carried: a moment
        after it has gone from the table.
        """
        wait_for(
            lambda: self.stats()["closed"].get(reason, 0) == count, f"{count} closed as {reason}"
        )

    def wait_until_gone(self, session_id: int) -> None:
        """Until `show` has no session of that number."""
        wait_for(lambda: session_id not in [row["id"] for row in self.rows()], "it is gone")

    def record(self, talk: Talk, *, silent_ns: int = 0) -> SessionRecord:
        """What the programs have of a session, by its pin; it has been silent for longer from now.

        None has to wait then until a session has been silent for minutes.
        """
        pins = self.forwarder.place.bpffs / self.forwarder.instance / "splice"
        fd = bpf.open_pin(pins / session_maps.PINS[1])
        size = bpf.map_sizes(fd).entries * SESSION_BYTES
        with contextlib.closing(bpf.map_memory(fd, size, write=True)) as memory:
            os.close(fd)
            for index in session_maps.used_indexes(memory):
                record = session_maps.record_of(memory, index)
                if record.id == talk.id:
                    break
            else:
                raise LookupError(talk.id)
            if silent_ns:
                # A host that has just booted has no such past: then less silence is enough.
                wanted_ns = silent_ns
                silent_ns = min(
                    silent_ns, record.began_ns, *(way.last_ns for way in record.direction)
                )
                rest_ns = max(1, record.idle_ns - (wanted_ns - silent_ns))
                session_maps.store_wide(memory, index, "idle_ns", rest_ns)
                session_maps.store_wide(memory, index, "began_ns", record.began_ns - silent_ns)
                for direction in Direction:
                    at = index * SESSION_BYTES + SessionRecord.direction.offset
                    at += direction * ctypes.sizeof(SessionDirection)
                    at += SessionDirection.last_ns.offset
                    struct.pack_into(
                        "=Q", memory, at, record.direction[direction].last_ns - silent_ns
                    )
                if record.slot != NO_SLOT:
                    _let_be_silent(pins / f"pairs_{ABI_VERSION}", record.slot, silent_ns)
            return session_maps.record_of(memory, index)

    def copies(self) -> int:
        """How many datagrams sockets on the forwarder's host have got so far."""
        network = self.topology.forwarder
        with network.entered():
            six = Path("/proc/thread-self/net/snmp6").read_text()
        (of_six,) = (int(line.split()[1]) for line in six.splitlines() if "Udp6InDatagr" in line)
        return network.counters()["UdpInDatagrams"] + of_six


def send_with_options(sock: socket.socket, data: bytes) -> None:
    """In a packet with options that say nothing (RFC 791, RFC 8200)."""
    level, kind, options = {
        socket.AF_INET: (socket.IPPROTO_IP, 4, b"\1" * 4),  # IP_OPTIONS
        socket.AF_INET6: (socket.IPPROTO_IPV6, 59, b"\0\0\1\4" + bytes(4)),  # IPV6_DSTOPTS
    }[socket.AddressFamily(sock.family)]
    sock.setsockopt(level, kind, options)
    sock.send(data)
    sock.setsockopt(level, kind, b"")


def datagram(
    sock: socket.socket,
    data: bytes,
    *,
    spoil: int = 0,
    udp_bytes: int = 0,
    hops: int = 64,
    total: int | None = None,
    to: tuple[str, int] | None = None,
    by: tuple[str, int] | None = None,
) -> bytes:
    """What `sock` would send, with its IP header; `spoil` is added to the checksum.

    `udp_bytes` is added to UDP's length, and `total` is its checksum, right or wrong. `to` is
    another's address than that of the socket's peer, `by` another's than its own.
    """
    source, target = by or sock.getsockname()[:2], to or sock.getpeername()[:2]
    addresses = b"".join(ipaddress.ip_address(end[0]).packed for end in (source, target))
    size = 8 + len(data) + udp_bytes
    head = struct.pack("!HHH", source[1], target[1], size)
    pseudo = addresses + struct.pack("!II", size, socket.IPPROTO_UDP)
    summed = data[: max(0, len(data) + min(0, udp_bytes))]
    found = checksum(pseudo + head + bytes(2) + summed) or 0xFFFF
    found = (found + spoil) & 0xFFFF if total is None else total
    body = head + struct.pack("!H", found) + data
    if sock.family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_UDP, hops) + addresses + body
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, hops, socket.IPPROTO_UDP, 0)
    ip += addresses
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + body


def _let_be_silent(pin: Path, slot: int, silent_ns: int) -> None:
    """And what the worker has said of it was so long ago, too."""
    fd = bpf.open_pin(pin)
    size = bpf.map_sizes(fd).entries * PAIR_BYTES
    with contextlib.closing(bpf.map_memory(fd, size, write=True)) as memory:
        os.close(fd)
        at = slot * PAIR_BYTES + PairRecord.last_ns.offset
        (last_ns,) = struct.unpack_from("=Q", memory, at)
        struct.pack_into("=Q", memory, at, max(0, last_ns - silent_ns))


def numbered(number: int, size: int) -> bytes:
    """A datagram that no other is like."""
    return (b"%d:" % number + pattern(size))[:size]
