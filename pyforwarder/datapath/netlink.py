"""The kernel's netlink of networks: messages, their attributes, and lists of what there is.

All functions raise OSError with the kernel's errno, and its own words where it gives some.

Source: netlink(7), rtnetlink(7), include/uapi/linux/{netlink,rtnetlink,if_link}.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
ERROR, _DONE = 2, 3
_DUMP_INTERRUPTED: Final = 0x10
_CAPPED, _HAS_ATTRIBUTES = 0x100, 0x200  # of an NLMSG_ERROR
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
_ANSWER_ATTRIBUTE_MESSAGE: Final = 1  # NLMSGERR_ATTR_MSG

_RTM_GETLINK: Final = 18
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_INFO_SLAVE_KIND: Final = 4  # IFLA_INFO_SLAVE_KIND

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_TYPE_BITS: Final = 0x3FFF
_RECEIVE_BYTES: Final = 1 << 16  # more than the kernel puts into one datagram of a dump
_ANSWER_TIMEOUT_S: Final = 10.0
_DUMPS: Final = 8  # others may change what is being listed


@dataclass(frozen=True, slots=True)
class Link:
    """One interface."""

    index: int
    # Of which bridge, bond or team it is a port; 0: of none. The stack sees what comes in at a port
    # once more, as a packet of that other interface. Not so with members of a VRF.
    port_of: int


class Netlink:
    """One socket that asks; close it."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sock.settimeout(_ANSWER_TIMEOUT_S)
        self._number = 0
        for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK):
            with contextlib.suppress(OSError):  # then without the kernel's own words
                self._sock.setsockopt(_SOL_NETLINK, option, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def links(self) -> dict[int, Link]:
        """All interfaces of this network namespace, by their index. Any process may ask."""
        found = {}
        for head, fields in self.dump(_RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0), _LINK.size):
            index = _LINK.unpack(head)[2]
            about = dict(attributes(fields.get(_IFLA_LINKINFO, b"")))
            is_port = text(about.get(_INFO_SLAVE_KIND, b"")) not in ("", "vrf")
            master = unsigned(fields.get(_IFLA_MASTER, b""))
            found[index] = Link(index, master if is_port else 0)
        return found

    def send(self, kind: int, flags: int, body: bytes) -> int:
        """Ask; the number of the request, which `answers` wants to know."""
        self._number += 1
        length = _HEADER.size + len(body)
        self._sock.send(_HEADER.pack(length, kind, flags | REQUEST, self._number, 0) + body)
        return self._number

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Ask for a change, and wait until it is made."""
        number = self.send(kind, flags | _ACK, body)
        for message_kind, message_flags, payload in self.answers(number):
            if message_kind == ERROR:
                check(message_flags, payload)
                return

    def dump(self, kind: int, body: bytes, head_bytes: int) -> list[tuple[bytes, dict[int, bytes]]]:
        """All that the kernel lists; nothing twice, and nothing left out that was there before."""
        for _ in range(_DUMPS):
            number = self.send(kind, _DUMP, body)
            found: list[tuple[bytes, dict[int, bytes]]] = []
            is_whole = True
            for message_kind, flags, payload in self.answers(number):
                is_whole = is_whole and not flags & _DUMP_INTERRUPTED
                if message_kind == ERROR:
                    check(flags, payload)
                if message_kind in (ERROR, _DONE):
                    break
                found.append((payload[:head_bytes], dict(attributes(payload[head_bytes:]))))
            if is_whole:
                return found
        raise OSError(errno.EAGAIN, "what the kernel lists changes while it is being read")

    def answers(self, number: int) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, payload) of what the kernel says to this request."""
        while True:
            data = self._sock.recv(_RECEIVE_BYTES)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, flags, of, _ = _HEADER.unpack_from(data, at)
                if length < _HEADER.size:
                    break
                if of == number:
                    yield kind, flags, data[at + _HEADER.size : at + length]
                at += aligned(length)


def check(flags: int, payload: bytes) -> None:
    """Raise what an NLMSG_ERROR says, if it is not 0."""
    (negative,) = struct.unpack_from("=i", payload)
    if not negative:
        return
    reason = ""
    if flags & _HAS_ATTRIBUTES:
        (length,) = struct.unpack_from("=I", payload, 4)
        at = 4 + (_HEADER.size if flags & _CAPPED else aligned(length))
        reason = text(dict(attributes(payload[at:])).get(_ANSWER_ATTRIBUTE_MESSAGE, b""))
    raise OSError(-negative, reason or os.strerror(-negative))


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, as it stands in a message."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(aligned(length) - length)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of all that stand in a message behind its head."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_BITS, data[at + _ATTRIBUTE.size : at + length]
        at += aligned(length)


def aligned(length: int) -> int:
    """How much room something has in a message."""
    return (length + 3) & ~3


def unsigned(value: bytes) -> int:
    """What an attribute of an unsigned number says; 0 if it is missing."""
    return int.from_bytes(value, sys.byteorder)


def text(value: bytes) -> str:
    """What an attribute of words says."""
    return value.split(b"\0", 1)[0].decode(errors="replace")
