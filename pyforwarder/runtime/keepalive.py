"""SO_KEEPALIVE, as every TCP connection of a forwarder has it: tcp(7)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import _socket

    from pyforwarder.core.keepalive import Keepalive


def keep_alive(sock: _socket.socket, keepalive: Keepalive) -> None:
    """Have the kernel do so for a TCP socket, and for those that a listener will accept.

    A peer that is given up is told nothing; the socket fails with ETIMEDOUT.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(keepalive.idle_s > 0))
    if keepalive.idle_s:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.probes)
