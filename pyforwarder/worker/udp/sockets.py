"""UDP sockets of listeners: which address of ours a client has sent to, and answers from it.

A socket that is bound to a wildcard address must answer from the address that was asked, or the
client will not know the answer.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

_IPV6_RECVPKTINFO: Final = 49  # linux/in6.h
_IPV6_PKTINFO: Final = 50
_IP_PKTINFO: Final = 8  # linux/in.h
_PKTINFO4: Final = struct.Struct("=I4s4s")  # ifindex, local address, header's destination
_PKTINFO6: Final = struct.Struct("=16sI")  # address, ifindex
_CMSG: Final = struct.Struct("@Nii")  # struct cmsghdr
ANCILLARY_BYTES: Final = 64

# struct sockaddr_in and sockaddr_in6 (ip(7), ipv6(7))
NAME_BYTES: Final = {int(socket.AF_INET): 16, int(socket.AF_INET6): 28}
_FAMILY: Final = struct.Struct("=H")
_PORT: Final = struct.Struct(">H")
_SCOPE: Final = struct.Struct("=I")

# The client's address, ours as the packet named it, and the client's scope (the interface, for a
# link-local IPv6 address, ipv6(7); else 0): without it no answer finds the way, and clients with
# one address on two links are two.
Key = tuple[str, int, bytes, int]


def datagram_socket_from_fd(fd: int, *, ipv6: bool, wildcard: bool) -> socket.socket:
    """A bound UDP socket from its descriptor, which is the socket's from here on."""
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM, 0, fd)
    os.set_blocking(fd, False)
    sock.setblocking(False)
    if wildcard:
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    return sock


def local_address_in(control: bytes) -> bytes:
    """The address of ours that the packet was sent to, of its only control message.

    Empty if that says something else (cmsg(3), ip(7), ipv6(7)).
    """
    if len(control) >= _CMSG.size:
        _, level, kind = _CMSG.unpack_from(control)
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return bytes(_PKTINFO4.unpack_from(control, _CMSG.size)[2])
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO):
            return bytes(_PKTINFO6.unpack_from(control, _CMSG.size)[0])
    return b""


def key_of(name: bytes) -> Key:
    """A datagram's sender: its struct sockaddr, and behind it the address of ours if told."""
    (family,) = _FAMILY.unpack_from(name)
    (port,) = _PORT.unpack_from(name, _FAMILY.size)
    local = name[NAME_BYTES[family] :]
    if family == socket.AF_INET:
        return socket.inet_ntop(family, name[4:8]), port, local, 0
    (scope,) = _SCOPE.unpack_from(name, 24)
    return socket.inet_ntop(family, name[8:24]), port, local, scope


def name_of(key: Key) -> tuple[str, int] | tuple[str, int, int, int]:
    """The client's address for sendmsg(2)."""
    host, port, _, scope = key
    return (host, port, 0, scope) if scope else (host, port)


def from_address(local: bytes) -> list[tuple[int, int, bytes]]:
    """What makes sendmsg(2) send from that address."""
    if len(local) == 4:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, local, b""))]
    if len(local) == 16:
        return [(socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO6.pack(local, 0))]
    return []
