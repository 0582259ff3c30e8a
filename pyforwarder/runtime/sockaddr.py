"""Addresses as bind(2) and connect(2) want them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyforwarder.core.address import Address


def sockaddr(address: Address) -> tuple[str, int] | tuple[str, int, int, int]:
    """The address for a socket of its family, a zone (`fe80::1%eth0`) as the interface's index.

    Raises:
        OSError: there is no such interface (now).
    """
    host, percent, zone = address.host.partition("%")
    if not percent:
        return address
    return host, address.port, 0, int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
