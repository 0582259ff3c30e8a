"""Which addresses are this host's own, in the network of this process."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.core.address import IpAddress

_NOT_OURS: Final = frozenset(
    {errno.EADDRNOTAVAIL, errno.EINVAL, errno.EACCES, errno.ENETUNREACH, errno.EHOSTUNREACH}
)
_ANY_PORT: Final = 9  # nothing is sent


def this_host_has(ip: IpAddress, scope: int = 0) -> bool:
    """Whether one interface of this host has the address.

    `scope` is the index of the interface that a link-local one is meant on. No broadcast address
    is this host's; of groups nobody should ask.

    Raises:
        OSError: the kernel does not say.
    """
    is_ipv6 = ip.version == 6
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    more = (0, scope) if is_ipv6 else ()
    host = str(ip).partition("%")[0]
    with (
        socket.socket(family, socket.SOCK_DGRAM) as bound,
        socket.socket(family, socket.SOCK_DGRAM) as free,
    ):
        try:
            bound.bind((host, 0, *more))
            # With `ip_nonlocal_bind` the kernel binds to any address. Then IPv4 has no way from one
            # that is not its own; IPv6 has, but speaks to an address of its own from that one.
            # (IPv4 does not: to 127.0.0.2 it speaks from 127.0.0.1.)
            asked = free if is_ipv6 else bound
            asked.connect((host, _ANY_PORT, *more))
            address = socket.inet_pton(family, asked.getsockname()[0].partition("%")[0])
        except OSError as error:
            if error.errno in _NOT_OURS:
                return False
            raise
    return address == ip.packed
