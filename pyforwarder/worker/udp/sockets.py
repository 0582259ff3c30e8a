"""UDP sockets of listeners: which address of ours a client has sent to, and answers from it.

A socket that is bound to a wildcard address must answer from the address that was asked, or the
client will not know the answer.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

_IPV6_RECVPKTINFO: Final = 49  # linux/in6.h
_IPV6_PKTINFO: Final = 50
_IP_PKTINFO: Final = 8  # linux/in.h
_PKTINFO4: Final = struct.Struct("=I4s4s")  # ifindex, local address, header's destination
_PKTINFO6: Final = struct.Struct("=16sI")  # address, ifindex
ANCILLARY_BYTES: Final = 64

# The client's address, ours as the packet named it, and the client's scope (the interface, for a
# link-local IPv6 address, ipv6(7); else 0): without it no answer finds the way, and clients with
# one address on two links are two.
Key = tuple[str, int, bytes, int]


def adopt_datagram_socket(fd: int, *, ipv6: bool, wildcard: bool) -> socket.socket:
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


def local_address(ancillary: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The address of ours that the packet was sent to (ip(7), ipv6(7)); empty if not told."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return bytes(_PKTINFO4.unpack_from(data)[2])
        if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
            return bytes(_PKTINFO6.unpack_from(data)[0])
    return b""


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
