"""What TCP_INFO says about a socket's bytes, for the drain test.

Source: include/uapi/linux/tcp.h (struct tcp_info), net/ipv4/tcp.c tcp_get_info(), which takes the
socket lock, so the numbers belong to one moment. Fields used exist since Linux 4.19.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf.abi import Direction

if TYPE_CHECKING:
    import _socket

    from pyforwarder.datapath.base import Flow

TCP_ESTABLISHED: Final = 1
TCP_CLOSE: Final = 7
# TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: the peer's FIN has come (net/tcp_states.h).
FIN_RECEIVED: Final = frozenset({6, 8, 9, 11})

_INFO_BYTES: Final = 232
_RECEIVED: Final = struct.Struct("=B127xQ")  # state, tcpi_bytes_received at 128
_ACKED: Final = struct.Struct("=120xQ")  # tcpi_bytes_acked at 120
_MOST_LOOKS: Final = 4


class Received(NamedTuple):
    """The receiving side of a socket."""

    state: int
    bytes_received: int  # a FIN counts as one


def received(sock: _socket.socket) -> Received:
    """State and bytes received in order so far."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    return Received._make(_RECEIVED.unpack_from(info))


def queued_bytes(sock: _socket.socket, *, has_connected: bool) -> int:
    """All bytes that were ever put into this socket's send queue, sent or not.

    Args:
        sock: a socket of TCP.
        has_connected: of one that has connected the acknowledged SYN counts as a byte, which is
            taken off; of one that was accepted it does not. A FIN that was sent counts as one, too.

    What is acknowledged and what is not yet are two questions. Acknowledgements that come between
    them would be missed or counted twice, so it is asked again; should they never pause, too few
    bytes are told, and the next look tells better.

    The sum of tcpi_bytes_sent and tcpi_notsent_bytes would be one question, but says too much for
    good once this host's own queue has dropped a packet (a full tbf, a filter in OUTPUT): the bytes
    are counted as sent, and again when they are (__tcp_transmit_skb and tcp_write_xmit of
    net/ipv4/tcp_output.c).
    """
    acked = _acked_bytes(sock)
    for _ in range(_MOST_LOOKS):
        before = acked
        waiting = int.from_bytes(
            fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder
        )
        acked = _acked_bytes(sock)
        if acked == before:
            break
    return before + waiting - has_connected


def queued_for(flow: Flow, target: _socket.socket) -> int:
    """`queued_bytes` of a flow's target: the server's socket has connected, the client's has not.

    Of sockets that another program has connected it may be the other way round: then it is the
    same byte too many or too few each time, with which `written_bytes` of the flow has begun.
    """
    return queued_bytes(target, has_connected=flow.direction is Direction.UP)


def _acked_bytes(sock: _socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    acked: int
    (acked,) = _ACKED.unpack_from(info)
    return acked
