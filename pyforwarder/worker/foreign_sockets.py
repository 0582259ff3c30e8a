"""Sockets that another program has connected, and may have used before, become ours."""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
import os
import termios
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, queued_for, received
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.socket_options import protocol_of

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Flow

_TCP_ULP: Final = 31  # linux/tcp.h


def foreign_socket(fd: int) -> _socket.socket:
    """The connected stream socket behind a descriptor, as it is: nothing about it has changed.

    Raises:
        OSError: it is no connected stream socket; the descriptor is closed.
    """
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    # From here on closing the object closes the descriptor.
    try:
        sock.getpeername()
        if sock.type & ~_socket.SOCK_NONBLOCK != _socket.SOCK_STREAM:
            raise OSError(errno.EPROTOTYPE, "not a stream socket")
    except OSError:
        sock.close()
        raise
    return sock


def set_up(sock: _socket.socket) -> None:
    """Set the socket's options as ours are; other processes that have the socket see that, too."""
    os.set_blocking(sock.fileno(), False)
    if sock.family != _socket.AF_UNIX:
        # As at the listeners: a crash is a reset, and no byte is taken out of the stream.
        reset_at_close(sock.fileno())
        if is_plain_tcp(sock):  # MPTCP knows no urgent data: EOPNOTSUPP
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)


def is_plain_tcp(sock: _socket.socket) -> bool:
    """Whether a sockmap may have it: an MPTCP subflow can crash a 6.1 kernel, kTLS corrupts."""
    if sock.family == _socket.AF_UNIX:
        return False
    if protocol_of(sock) != _socket.IPPROTO_TCP:
        return False
    return not sock.getsockopt(_socket.IPPROTO_TCP, _TCP_ULP, 16).rstrip(b"\0")


def read_so_far(sock: _socket.socket) -> int:
    """How many bytes were read from this socket before it was ours."""
    if sock.family == _socket.AF_UNIX:
        return 0
    state, total = received(sock)
    waiting = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, waiting)
    # Beyond ESTABLISHED a FIN has come, which counts as a byte.
    return total - waiting[0] - (0 if state == TCP_ESTABLISHED else 1)


def written_so_far(flow: Flow, target: _socket.socket) -> int:
    """How many bytes were written to the flow's target before it was ours."""
    return 0 if target.family == _socket.AF_UNIX else queued_for(flow, target)
