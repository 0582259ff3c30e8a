"""What TCP_INFO says about a socket's bytes, for the drain test.

Source: include/uapi/linux/tcp.h (struct tcp_info), net/ipv4/tcp.c tcp_get_info(), which takes the
socket lock, so the numbers belong to one moment. Fields used exist since Linux 4.19.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import _socket

TCP_ESTABLISHED: Final = 1
TCP_CLOSE: Final = 7
# TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: the peer's FIN has come (net/tcp_states.h).
FIN_RECEIVED: Final = frozenset({6, 8, 9, 11})

_INFO_BYTES: Final = 232
_RECEIVED: Final = struct.Struct("=B127xQ")  # state, tcpi_bytes_received at 128
_QUEUED: Final = struct.Struct("=144xI52xQQ")  # notsent at 144, bytes_sent at 200, retrans at 208


class Received(NamedTuple):
    """The receiving side of a socket."""

    state: int
    bytes_received: int  # a FIN counts as one


def received(sock: _socket.socket) -> Received:
    """State and bytes received in order so far."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    return Received._make(_RECEIVED.unpack_from(info))


def queued_bytes(sock: _socket.socket) -> int:
    """All bytes that were ever put into this socket's send queue, sent or not."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    not_sent, sent, resent = _QUEUED.unpack_from(info)
    total: int = sent - resent + not_sent
    return total
