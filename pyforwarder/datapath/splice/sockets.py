"""The two sockets of a pair, on the keeper's side, as root.

Whether their connections can be joined, and the record of that; making sockets mute, and creating
such sockets again for a pair that continues without its old ones.

Source: tcp(7), Documentation of TCP_REPAIR in criu.org/TCP_connection, net/ipv4/tcp.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import termios
from dataclasses import dataclass
from typing import Final

from pyforwarder.core.address import ip_text
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import PRIORITY, Routing, Splice, SpliceDirection
from pyforwarder.datapath.splice.keepalive import checksum
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.socket_options import SO_NETNS_COOKIE, TRANSPARENT

_TCP_REPAIR: Final = 19  # linux/tcp.h; Python has no names for these
_TCP_TIMESTAMP: Final = 24
_REPAIR_ON, _REPAIR_OFF_WITHOUT_PROBE = 1, -1
_NUMBER: Final = struct.Struct("=Q")
_MOST_DEVICE_BYTES: Final = 16  # IFNAMSIZ
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
# linux/filter.h: struct sock_filter {code, jt, jf, k}. The filter sees packets from the TCP header
# on.
_ONLY_SYNS: Final = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # ldb [13]: the flags
        (0x54, 0, 0, 0x06),  # and SYN | RST
        (0x15, 0, 1, 0x02),  # jeq SYN
        (0x06, 0, 0, 0x40000),  # ret: accept
        (0x06, 0, 0, 0),  # ret 0: drop
    )
)

# struct tcp_info: options and both window scales at 5, the path's MTU at 60, our MSS at 84.
_INFO: Final = struct.Struct("=5xBB53xI20xI")
_OPTION_TIMESTAMPS, _OPTION_ECN = 1, 8
HEADERS_BYTES: Final = {4: 40, 6: 60}
_MAPPED: Final = ipaddress.ip_network("::ffff:0:0/96")
_LINK_LOCAL: Final = ipaddress.ip_network("fe80::/10")


@dataclass(frozen=True, slots=True)
class SocketEnd:
    """One of the two sockets: its addresses (16 bytes, wire order), and what its TCP has
    negotiated.
    """

    family: int  # 4 or 6
    local: bytes
    peer: bytes
    local_port: int
    peer_port: int
    timestamps: bool
    ecn: bool
    peer_scale: int  # window scale of the peer
    own_scale: int
    path_bytes: int
    own_mss: int
    is_link_local: bool
    mark: int
    owner: int
    routing: Routing

    @classmethod
    def of(cls, sock: socket.socket) -> SocketEnd:
        """Read these from a connected socket.

        Raises:
            OSError: it is not connected any more.
            ValueError: it is no TCP socket.
        """
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise ValueError("not TCP")
        options, scales, path_bytes, own_mss = _INFO.unpack_from(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        )
        family, local, _ = _packed(sock.getsockname()[0])
        _, peer, is_link_local = _packed(sock.getpeername()[0])
        return cls(
            family,
            local,
            peer,
            sock.getsockname()[1],
            sock.getpeername()[1],
            bool(options & _OPTION_TIMESTAMPS),
            bool(options & _OPTION_ECN),
            scales & 15,
            scales >> 4,
            path_bytes,
            own_mss,
            is_link_local,
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFFFFFF,
            os.fstat(sock.fileno()).st_uid,
            _routing(sock),
        )


def _routing(sock: socket.socket) -> Routing:
    """What chooses the route of a socket's packets, besides addresses, mark and owner."""
    found = Routing(0)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _MOST_DEVICE_BYTES).rstrip(b"\0"):
        found |= Routing.BOUND
    if sock.getsockopt(*TRANSPARENT[sock.family]):
        found |= Routing.FOREIGN
    return found


def _packed(host: str) -> tuple[int, bytes, bool]:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return 4, b"\0" * 10 + b"\xff\xff" + address.packed, False
    return 4 if address in _MAPPED else 6, address.packed, address in _LINK_LOCAL


def obstacle(client: SocketEnd, server: SocketEnd) -> PairReason | None:
    """Why these two connections cannot be joined, or None."""
    if client.family != server.family:
        return PairReason.TWO_FAMILIES
    if client.is_link_local or server.is_link_local:
        return PairReason.LINK_LOCAL
    if client.timestamps != server.timestamps:
        return PairReason.ONE_HAS_TIMESTAMPS
    headers = HEADERS_BYTES[client.family]
    for one, other in ((client, server), (server, client)):
        # The segments that one connection's peer may send must fit the other's path MTU.
        if one.own_mss + headers > other.path_bytes:
            return PairReason.PATHS_DIFFER
    return None


def describe(record: Splice, client: SocketEnd, server: SocketEnd) -> None:
    """Fill in how packets of these two connections are rewritten."""
    ends = (client, server)
    record.family, record.owner = client.family, client.owner
    for direction in Direction:
        from_peer: SpliceDirection = record.direction[direction]
        here, there = ends[direction], ends[1 - direction]
        # A packet from the peer of one socket is forwarded as if the other socket had sent it.
        old, new = here.peer + here.local, there.local + there.peer
        from_peer.from_.source[:], from_peer.from_.target[:] = _words(here.peer), _words(here.local)
        from_peer.from_.sport = socket.htons(here.peer_port)
        from_peer.from_.dport = socket.htons(here.local_port)
        from_peer.source[:], from_peer.target[:] = _words(there.local), _words(there.peer)
        from_peer.sport, from_peer.dport = (
            socket.htons(there.local_port),
            socket.htons(there.peer_port),
        )
        from_peer.address_sum = difference(old, new)
        from_peer.pseudo_sum = pseudo_sum(old, client.family, socket.IPPROTO_TCP)
        from_peer.peer_scale, from_peer.other_scale = here.peer_scale, there.own_scale
        from_peer.no_ecn = client.ecn != server.ecn
        from_peer.mark, from_peer.routing = here.mark, here.routing


def _words(address: bytes) -> tuple[int, ...]:
    return struct.unpack("=4I", address)


def difference(old: bytes, new: bytes) -> int:
    """What a ones' complement sum of 16-bit words grows by if `new` replaces `old`."""
    total: int = sum(struct.unpack(f"={len(new) // 2}H", new))
    total += sum(0xFFFF - word for word in struct.unpack(f"={len(old) // 2}H", old))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(addresses: bytes, family: int, protocol: int) -> int:
    """The sum over a pseudo-header, without the length (RFC 9293, 3.1; RFC 768)."""
    if family == 4:
        addresses = addresses[12:16] + addresses[28:32]
    total: int = sum(struct.unpack(f"={len(addresses) // 2}H", addresses))
    return total + socket.htons(protocol)


def clock(sock: socket.socket) -> int:
    """The present value of the socket's timestamp clock."""
    return int(sock.getsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP)) & 0xFFFFFFFF


def is_of_our_network(sock: socket.socket) -> bool:
    """Whether a socket is in this process's network namespace.

    Linux before 5.14 cannot say (no SO_NETNS_COOKIE).
    """
    try:
        theirs = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, _NUMBER.size)
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX) as ours:
        return theirs == ours.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, _NUMBER.size)


def mark(sock: socket.socket) -> None:
    """Mark a socket as spliced, or about to be, for another forwarder on this host whose peer it
    is.

    No packet is sent with this priority but a final RST.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, PRIORITY)


def unmark(sock: socket.socket) -> None:
    """Remove the mark: the socket is not spliced after all."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0)


def mute(sock: socket.socket) -> bool:
    """Make a socket mute: from here on it sends nothing, also when it is closed, and receives only
    SYNs.

    It answers SYNs by a challenge acknowledgement (RFC 5961). A segment that gets past the programs
    (behind IP options, in fragments) was for the other end, and must not end this socket.

    False: the last of its bytes are not acknowledged yet, so it still receives everything; call
    this again later. If it received nothing, it would retransmit until it gives up, and its port
    would be free.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
    if any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))):
        return False
    _receive_only_syns(sock)
    return True


def _receive_only_syns(sock: socket.socket) -> None:
    program = ctypes.create_string_buffer(_ONLY_SYNS, len(_ONLY_SYNS))
    described = struct.pack("@HP", len(_ONLY_SYNS) // 8, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def unmute(sock: socket.socket) -> None:
    """Undo `mute`: closing the socket sends a RST."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_WITHOUT_PROBE)


def send_too_long(direction: SpliceDirection, family: int) -> None:
    """Send an ICMP error to the peer of a direction: its packets are too long, as a router would.

    Never raises: if it cannot be sent, the peer retransmits, and it is sent again. Source: RFC 792
    and RFC 1191, 4; RFC 4443, 3.2; the quotation is RFC 5927's.
    """
    if family == 6:
        head = struct.pack("!BBHI", 2, 0, 0, direction.narrow_mtu)
    else:
        head = struct.pack("!BBHHH", 3, 4, 0, 0, direction.narrow_mtu)
    _send_error(direction, family, head, direction.narrow_seq, 1)


def send_was_unreachable(direction: SpliceDirection, family: int, seq: int, times: int) -> None:
    """Send an ICMP error to the peer of a direction: there was no route for its packet numbered
    `seq`.

    The peer retransmits at once, or 0.2 s after its last retransmission, even if its timeout has
    grown: each of `times` takes back one doubling (RFC 6069). An established connection is not
    affected otherwise (RFC 1122, 4.2.3.9). Never raises: without the error the peer retransmits
    later.
    """
    head = struct.pack("!BBHI", *((1, 0) if family == 6 else (3, 1)), 0, 0)
    _send_error(direction, family, head, seq, times)


def _send_error(direction: SpliceDirection, family: int, head: bytes, seq: int, times: int) -> None:
    """Send an ICMP message that quotes the peer's packet as it was sent, so that it finds the
    connection.
    """
    peer, own = bytes(direction.from_.source), bytes(direction.from_.target)
    quoted = struct.pack("=HH", direction.from_.sport, direction.from_.dport)
    quoted += struct.pack("!I", seq)
    if family == 6:
        ip = struct.pack("!IHBB", 6 << 28, 20, socket.IPPROTO_TCP, 64) + peer + own
        message = head + ip + quoted + bytes(12)
        kind, protocol = socket.AF_INET6, socket.IPPROTO_ICMPV6  # the kernel computes its checksum
    else:
        peer, own = peer[12:], own[12:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
        ip += peer + own
        ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
        message = head + ip + quoted
        message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
        kind, protocol = socket.AF_INET, socket.IPPROTO_ICMP
    with contextlib.suppress(OSError), socket.socket(kind, socket.SOCK_RAW, protocol) as raw:
        if direction.mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, direction.mark)
        for _ in range(times):
            raw.sendto(message, socket.MSG_DONTWAIT, (_host(direction.from_.source, family), 0))


def revive(direction: SpliceDirection, family: int) -> socket.socket:
    """A mute socket in place of one that is gone: it keeps the ports, and can send the RST.

    `direction` is the direction whose packets it would receive. The caller closes it.

    Raises:
        OSError: another socket has the addresses or the ports now.
    """
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    sock = socket.socket(kind, socket.SOCK_STREAM)
    try:
        # The old one may have had a foreign address (`transparent`).
        sock.setsockopt(*TRANSPARENT[kind], 1)
        # In repair mode bind() and connect() succeed beside a listener, and send nothing.
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
        reset_at_close(sock.fileno())
        mark(sock)
        _receive_only_syns(sock)
        sock.bind((_host(direction.from_.target, family), socket.ntohs(direction.from_.dport)))
        sock.connect((_host(direction.from_.source, family), socket.ntohs(direction.from_.sport)))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _host(words: object, family: int) -> str:
    packed = bytes(words)  # type: ignore[call-overload]
    if family == 6:
        return ip_text(ipaddress.IPv6Address(packed))
    return ip_text(ipaddress.IPv4Address(packed[12:]))
