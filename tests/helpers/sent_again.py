"""A segment in a peer's name whose first bytes have come before."""

from __future__ import annotations

import socket

from tests.helpers.segments import ACK, PSH, segment


def send_again(sock: socket.socket, old: bytes, new: bytes, *, flags: int = PSH) -> None:
    """One segment as if from `sock`: its last bytes once more, then new ones, or a FIN."""
    data = segment(sock, again=old, new=new, flags=ACK | flags)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(data, (sock.getpeername()[0], 0))
