"""The addresses and sockets of a UDP session, and its record."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyforwarder.core.address import ip_text
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.routes import Route
from pyforwarder.runtime.acting import acting_as
from pyforwarder.runtime.socket_options import protocol_of

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.session_abi import SessionDirection, SessionRecord

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
SocketName = tuple[_Ip, int]


def describe(
    record: SessionRecord,
    client: tuple[SocketName, SocketName],
    server: tuple[SocketName, SocketName],
) -> None:
    """Fill in how datagrams of these two are rewritten: (peer, own) of each side."""
    sides = (client, server)
    record.family = client[0][0].version
    for direction in Direction:
        from_peer: SessionDirection = record.direction[direction]
        (peer, own), (to, via) = sides[direction], sides[1 - direction]
        old = _mapped(peer[0]) + _mapped(own[0])
        new = _mapped(via[0]) + _mapped(to[0])
        words = struct.Struct("=4I")
        from_peer.from_.source[:] = words.unpack(old[:16])
        from_peer.from_.target[:] = words.unpack(old[16:])
        from_peer.from_.sport, from_peer.from_.dport = socket.htons(peer[1]), socket.htons(own[1])
        from_peer.source[:], from_peer.target[:] = words.unpack(new[:16]), words.unpack(new[16:])
        from_peer.sport, from_peer.dport = socket.htons(via[1]), socket.htons(to[1])
        from_peer.address_sum = splice_sockets.difference(old, new)
        from_peer.pseudo_sum = splice_sockets.pseudo_sum(old, record.family, socket.IPPROTO_UDP)


def route_of(record: SessionRecord, direction: SessionDirection) -> Route:
    """The route of our socket's datagrams to the peer from which the direction's datagrams come."""
    return Route(
        record.family,
        bytes(direction.from_.target),
        bytes(direction.from_.source),
        socket.ntohs(direction.from_.dport),
        socket.ntohs(direction.from_.sport),
        0,
        record.owner,
        socket.IPPROTO_UDP,
    )


def revive(record: SessionRecord) -> socket.socket:
    """A socket to the server in place of one that is gone; the caller closes it.

    Raises:
        OSError: another socket has the address and port now.
    """
    direction = record.direction[Direction.DOWN]
    family = socket.AF_INET6 if record.family == 6 else socket.AF_INET
    # Rules of this host may depend on the owner of a socket: it is the worker's, as before.
    with acting_as(record.owner, record.group):
        sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.bind(
            (host_of(direction.from_.target, record.family), socket.ntohs(direction.from_.dport))
        )
        sock.connect(
            (host_of(direction.from_.source, record.family), socket.ntohs(direction.from_.sport))
        )
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def is_udp(sock: socket.socket) -> bool:
    """Whether a datagram socket is of UDP: there are also those for pings, and of UDP-Lite."""
    return (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_DGRAM
        and protocol_of(sock) == socket.IPPROTO_UDP
    )


def has_peer(sock: socket.socket) -> bool:
    """Whether a socket is connected, and so is not a listener's.

    Raises:
        OSError: the kernel does not say.
    """
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True


def socket_name(name: Sequence[Any]) -> SocketName:
    ip = ipaddress.ip_address(str(name[0]).partition("%")[0])
    return ip, int(name[1])


def is_of_one_host(ip: _Ip) -> bool:
    """Whether an address is unicast: not multicast, unspecified, or an IPv4-mapped one of IPv6."""
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return False
    is_broadcast = ip == ipaddress.IPv4Address("255.255.255.255")
    return not (ip.is_multicast or ip.is_unspecified or is_broadcast)


def _mapped(ip: _Ip) -> bytes:
    """An address as 16 bytes, as in a key."""
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed


def host_of(words: Any, family: int) -> str:
    packed = bytes(words)
    if family == 6:
        return ip_text(ipaddress.IPv6Address(packed))
    return ip_text(ipaddress.IPv4Address(packed[12:]))
