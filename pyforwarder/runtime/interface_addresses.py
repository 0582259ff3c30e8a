"""The addresses of this host's interfaces."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.core.address import IpAddress


class InterfaceAddress:
    """An address of an interface of this host, without a scope, and the network that it is in."""

    def __init__(self, interface: str, address: IpAddress, mask: str) -> None:
        self.interface, self.address = interface, address
        bits = int(ipaddress.ip_address(mask)).bit_count() if mask else address.max_prefixlen
        self.network = ipaddress.ip_network(f"{address}/{bits}", strict=False)


def interface_addresses() -> Iterator[InterfaceAddress]:
    """Yield all of them, interface by interface; two interfaces may have the same address."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(ValueError):
                    address = ipaddress.ip_address(one.address.partition("%")[0])
                    yield InterfaceAddress(name, address, one.netmask or "")
