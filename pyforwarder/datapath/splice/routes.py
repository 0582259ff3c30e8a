"""The kernel's routes, and notifications of their changes: rtnetlink(7)."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pyforwarder.datapath.netlink import (
    ERROR,
    Netlink,
    attribute,
    attributes,
    check,
    unsigned,
)

_RTM_GETROUTE: Final = 26
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_NEXT_HOP: Final = struct.Struct("=HBBI")  # struct rtnexthop
_UNICAST, _LOCAL = 1, 2  # RTN_...
_DST, _SRC, _OIF, _MULTIPATH, _MARK, _UID, _IP_PROTO, _SPORT, _DPORT = (
    *(1, 2, 4, 9, 16, 25, 27, 28, 29),  # RTA_...
)
_MATCHED_ROUTE: Final = 0x2000  # RTM_F_FIB_MATCH: the table's entry, with all of its next hops
_IS_DEAD: Final = 1  # RTNH_F_DEAD

# Changes that may give packets another interface: RTNLGRP_ of linux/rtnetlink.h.
_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE = 1, 5, 7, 8
_IPV6_ADDRESS, _IPV6_ROUTE, _IPV6_RULE, _NEXT_HOPS = 9, 11, 19, 32
_GROUPS: Final = (
    *(_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV4_RULE),
    *(_IPV6_ADDRESS, _IPV6_ROUTE, _IPV6_RULE, _NEXT_HOPS),
)
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_RECEIVE_BYTES: Final = 1 << 16

_LOOPBACK: Final = 1  # the index of `lo` in every network namespace


@dataclass(frozen=True, slots=True)
class Route:
    """The key of a route lookup: the packets of one connection or session."""

    family: int  # 4 or 6
    source: bytes  # 16 bytes in wire order; empty: chosen by the route
    target: bytes
    sport: int
    dport: int
    mark: int
    owner: int
    protocol: int = socket.IPPROTO_TCP

    def _message(self, flags: int) -> bytes:
        source, target = self.source, self.target
        if self.family == 4:
            source, target = source[12:], target[12:]
        family = socket.AF_INET if self.family == 4 else socket.AF_INET6
        bits = 8 * len(target)
        request = _ROUTE.pack(family, bits, 8 * len(source), 0, 0, 0, 0, 0, flags)
        request += attribute(_DST, target)
        if source:
            request += attribute(_SRC, source)
        if self.mark:
            request += attribute(_MARK, struct.pack("=I", self.mark))
        request += attribute(_UID, struct.pack("=I", self.owner))
        request += attribute(_IP_PROTO, bytes([self.protocol]))
        request += attribute(_SPORT, struct.pack("!H", self.sport))
        return request + attribute(_DPORT, struct.pack("!H", self.dport))


class Routes(Netlink):
    """Route lookups in the kernel."""

    def interface(self, route: Route) -> int:
        """The interface by which the kernel would send such packets; 0: there is no route.

        Raises:
            OSError: it does not answer.
        """
        kind, fields = self._ask(route, 0)
        if kind == _LOCAL:
            return _LOOPBACK
        return unsigned(fields.get(_OIF, b"")) if kind == _UNICAST else 0

    def is_one_of_several(self, route: Route, interface: int) -> bool:
        """Whether an interface is one of several next hops of a multipath route for such packets.

        Raises:
            OSError: the kernel does not answer.
        """
        kind, fields = self._ask(route, _MATCHED_ROUTE)
        return kind == _UNICAST and interface in _next_hops(fields.get(_MULTIPATH, b""))

    def _ask(self, route: Route, flags: int) -> tuple[int, dict[int, bytes]]:
        number = self.send(_RTM_GETROUTE, 0, route._message(flags))
        for kind, message_flags, payload in self.answers(number):
            if kind == ERROR:
                try:
                    check(message_flags, payload)
                except OSError as error:
                    # Routes of type unreachable, prohibit and blackhole each have an error of their
                    # own.
                    if error.errno in _NO_ROUTE:
                        return 0, {}
                    raise
            return _ROUTE.unpack_from(payload)[7], dict(attributes(payload[_ROUTE.size :]))
        raise OSError(errno.EPROTO, "no answer")  # never: `answers` waits for one


_NO_ROUTE: Final = frozenset(
    {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENETDOWN}
)


def _next_hops(data: bytes) -> Collection[int]:
    found, at = set(), 0
    while at + _NEXT_HOP.size <= len(data):
        length, flags, _, interface = _NEXT_HOP.unpack_from(data, at)
        if length < _NEXT_HOP.size:
            break
        if not flags & _IS_DEAD:
            found.add(interface)
        at += (length + 3) & ~3
    return found


class RouteWatch:
    """Readable when interfaces, addresses, routes or rules have changed; the caller closes it."""

    def __init__(self) -> None:
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._sock.bind((0, 0))  # a socket that is not bound gets no notifications
        for group in _GROUPS:
            with contextlib.suppress(OSError):  # a group that this kernel does not have
                self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._sock.fileno()

    def drain(self) -> None:
        """Discard the notifications. Their contents are not used, as some may have been lost: the
        caller looks everything up.
        """
        buffer = bytearray(_RECEIVE_BYTES)
        for _ in range(_MOST_AT_ONCE):
            try:
                self._sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                # ENOBUFS: more notifications than the buffer holds.
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


_MOST_AT_ONCE: Final = 1000  # messages: the keeper has other requests, too
