"""What hosts and routers have said about the datagrams of a connected UDP socket (ip(7)).

Anybody can send an ICMP error that quotes addresses and ports that he has guessed, and the kernel
tells the socket: its sender is in the socket's queue of errors alone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_IP_RECVERR: Final = 11  # linux/in.h
_IPV6_RECVERR: Final = 25  # linux/in6.h
_BY_ICMP: Final = {socket.AF_INET: 2, socket.AF_INET6: 3}  # SO_EE_ORIGIN_*, linux/errqueue.h
_ERROR: Final = struct.Struct("=IBBBBII")  # struct sock_extended_err; then a sockaddr
_SOURCE4: Final = struct.Struct("=4x4s")
_SOURCE6: Final = struct.Struct("=8x16s")
_ANCILLARY_BYTES: Final = 128
# More than a socket of ordinary room has queued; the rest are there at the next event.
_MOST_AT_ONCE: Final = 64

_UNREACHABLE: Final = {socket.AF_INET: 3, socket.AF_INET6: 1}  # RFC 792, RFC 4443
# No route, no host, too big and the like pass (RFC 1122, 4.2.3.9): the kernel does not tell a
# socket that has not asked for them, either.
_PASSING: Final = {
    socket.AF_INET: frozenset((0, 1, 4, 11, 12)),
    socket.AF_INET6: frozenset((0, 2, 3)),
}


class Unreachable(NamedTuple):
    """The datagrams do not reach the server, and will not."""

    errno: int
    host: str  # who says so


def want_errors(sock: socket.socket) -> None:
    """Have the kernel queue errors for `refusals`, who must read them at each EPOLLERR."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)


def refusals(sock: socket.socket) -> Iterator[Unreachable]:
    """Take what is queued, oldest first; errors that pass are left out."""
    for _ in range(_MOST_AT_ONCE):
        try:
            _, ancillary, _, _ = sock.recvmsg(0, _ANCILLARY_BYTES, socket.MSG_ERRQUEUE)
        except OSError:
            return
        for level, kind, data in ancillary:
            if (level, kind) in (
                (socket.IPPROTO_IP, _IP_RECVERR),
                (socket.IPPROTO_IPV6, _IPV6_RECVERR),
            ):
                found = refusal_in(data, sock.family)
                if found is not None:
                    yield found


def refusal_in(data: bytes, family: int) -> Unreachable | None:
    """What a `struct sock_extended_err` and the address behind it say."""
    family = socket.AddressFamily(family)
    source = _SOURCE6 if family == socket.AF_INET6 else _SOURCE4
    if len(data) < _ERROR.size + source.size:
        return None
    code_of_errno, origin, kind, code, _, _, _ = _ERROR.unpack_from(data)
    if origin != _BY_ICMP[family] or kind != _UNREACHABLE[family] or code in _PASSING[family]:
        return None
    (packed,) = source.unpack_from(data, _ERROR.size)
    return Unreachable(code_of_errno, socket.inet_ntop(family, packed))
