"""Options of sockets for which Python has no name, and the questions that they answer.

From the kernel's asm-generic/socket.h and linux/in6.h; the numbers are those of x86-64 and arm64.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import _socket

SO_PROTOCOL: Final = 38
SO_COOKIE: Final = 57
SO_NETNS_COOKIE: Final = 71
SO_BUF_LOCK: Final = 72  # Linux 5.14
IPV6_TRANSPARENT: Final = 75
COOKIE_BYTES: Final = 8
# Level and option with which a socket may be bound to an address that is not this host's (ip(7)).
TRANSPARENT: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TRANSPARENT),
    socket.AF_INET6: (socket.IPPROTO_IPV6, IPV6_TRANSPARENT),
}


def protocol_of(sock: _socket.socket) -> int:
    """The number of the socket's protocol, which a socket from accept(2) does not know by itself:
    IPPROTO_TCP and IPPROTO_MPTCP have the same family and type.
    """
    return sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)


def cookie_of(sock: _socket.socket) -> int:
    """The kernel's number of the socket, which is never used again (SO_COOKIE, socket(7))."""
    cookie = sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, COOKIE_BYTES)
    return int.from_bytes(cookie, sys.byteorder)
