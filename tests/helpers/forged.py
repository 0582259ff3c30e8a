"""Packets that somebody makes by hand and sends in another's name, of IPv4 and IPv6.

Everything in them may be wrong: that is what they are for.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.helpers.segments import TCP_TIMESTAMP, sequence_numbers

if TYPE_CHECKING:
    from tests.helpers.netns import Network

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
UNKNOWN_OPTION: Final = b"\x1e\x04\0\0"
_SIOCGIFHWADDR: Final = 0x8927  # linux/sockios.h
_ETHERTYPE: Final = {4: 0x0800, 6: 0x86DD}
_MASK: Final = 0xFFFFFFFF
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h
_NEEDS_CSUM: Final = 1  # of a struct virtio_net_hdr
ETHERNET_BYTES: Final = 14
IP_BYTES: Final = {4: 20, 6: 40}


def checksum(data: bytes) -> int:
    """The Internet's, of whole bytes (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


@dataclass(slots=True)
class Segment:
    """One of TCP; what is not given is right."""

    version: int
    source: tuple[str, int]
    target: tuple[str, int]
    seq: int
    ack: int
    flags: int = ACK
    window: int = 500
    options: bytes = b""
    data: bytes = b""
    spoil_checksum: int = 0  # what is added to it
    spoil_header: int = 0  # and to that of IPv4
    total_bytes: int | None = None
    fragment: int = 0x4000

    def packet(self) -> bytes:
        """With its IP header."""
        options = self.options + b"\1" * (-len(self.options) % 4)
        word = (5 + len(options) // 4) << 12 | self.flags
        head = struct.pack(
            "!HHIIHH",
            self.source[1],
            self.target[1],
            self.seq & _MASK,
            self.ack & _MASK,
            word,
            self.window,
        )
        size = len(head) + 4 + len(options) + len(self.data)
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        addresses = b"".join(socket.inet_pton(family, end[0]) for end in (self.source, self.target))
        pseudo = addresses + struct.pack("!II", size, socket.IPPROTO_TCP)
        body = head + bytes(4) + options + self.data
        total = (checksum(pseudo + body) + self.spoil_checksum) & 0xFFFF
        body = body[:16] + struct.pack("!H", total) + body[18:]
        if self.version == 6:
            length = size if self.total_bytes is None else self.total_bytes - 40
            return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64) + addresses + body
        length = 20 + size if self.total_bytes is None else self.total_bytes
        ip = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, self.fragment, 64, socket.IPPROTO_TCP, 0)
        ip += addresses
        total = (checksum(ip) + self.spoil_header) & 0xFFFF
        return ip[:10] + struct.pack("!H", total) + ip[12:] + body


def unsummed(segment: Segment) -> bytes:
    """The packet as a host leaves it to its interface: in its field is the pseudo-header's sum."""
    packet = segment.packet()
    at = IP_BYTES[segment.version]
    addresses = packet[at - (8 if segment.version == 4 else 32) : at]
    pseudo = addresses + struct.pack("!II", len(packet) - at, socket.IPPROTO_TCP)
    field = struct.pack("!H", checksum(pseudo) ^ 0xFFFF)
    return packet[: at + 16] + field + packet[at + 18 :]


def next_of(sock: socket.socket, **changes: object) -> Segment:
    """What `sock` would say next: an acknowledgement of all that it has got; and then changed.

    `seq` and `ack` among the changes are how far off they are. Timestamps are as its own would be,
    unless there are `options`.
    """
    next_send, next_receive = sequence_numbers(sock)
    now = sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & _MASK
    segment = Segment(
        version=6 if sock.family == socket.AF_INET6 else 4,
        source=sock.getsockname()[:2],
        target=sock.getpeername()[:2],
        seq=next_send,
        ack=next_receive,
        options=timestamp(now),
    )
    for name, value in changes.items():
        if name in ("seq", "ack"):
            assert isinstance(value, int)
            value += getattr(segment, name)
        setattr(segment, name, value)
    return segment


def timestamp(value: int, echo: int = 0) -> bytes:
    """The option, as everybody writes it."""
    return b"\1\1\x08\x0a" + struct.pack("!II", value & _MASK, echo & _MASK)


def clock_of(sock: socket.socket) -> int:
    """What a socket's timestamps say now."""
    return int(sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP)) & _MASK


class Forger:
    """Sends frames out of one interface, to the interface at the other end of that wire."""

    def __init__(self, network: Network, out: str, at: Network, into: str) -> None:
        """`network` has the interface `out`, `at` has `into`, whose address the frames bear."""
        with at.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("=16s24x", into.encode())
            self.target = fcntl.ioctl(any_socket.fileno(), _SIOCGIFHWADDR, request)[18:24]
        with network.entered():
            self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._raw.bind((out, 0))
            self._unsummed = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._unsummed.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            self._unsummed.bind((out, 0))

    def send(self, *segments: Segment, target: bytes = b"") -> None:
        """In frames for the interface; or for another hardware address."""
        for segment in segments:
            self.send_packet(segment.packet(), segment.version, target=target)

    def send_packet(self, packet: bytes, version: int, *, target: bytes = b"") -> None:
        """One that has its IP header."""
        self._raw.send(self._frame(packet, version, target))

    def send_unsummed(self, packet: bytes, version: int, *, start: int, field: int) -> None:
        """Its checksum is to be made when it leaves the last interface, as a guest's may be.

        From `start` on, in the IP packet, and written at `field`: struct virtio_net_hdr.
        """
        header = struct.pack("=BBHHHH", _NEEDS_CSUM, 0, 0, 0, ETHERNET_BYTES + start, field - start)
        self._unsummed.send(header + self._frame(packet, version, b""))

    def _frame(self, packet: bytes, version: int, target: bytes) -> bytes:
        head = (target or self.target) + b"\2\0\0\0\0\1" + struct.pack("!H", _ETHERTYPE[version])
        return head + packet

    def mark(self, mark: int) -> None:
        """All packets from here on bear this mark."""
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))

    def close(self) -> None:
        """Close the sockets."""
        self._raw.close()
        self._unsummed.close()
