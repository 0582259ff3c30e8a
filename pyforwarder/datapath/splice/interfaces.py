"""The network interfaces: on which of them the programs of splice are, and their MTU.

Programs are attached in pairs, one for each side of an interface (see `datapath/attach/`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from pyforwarder.datapath.attach.base import SIDES, Attacher, InterfaceTakenError, Side

LOOPBACK: Final = 1  # the index of `lo` in every network namespace
# net/if_arp.h: the programs need an Ethernet header.
_ARPHRD_ETHER: Final = 1
_ARPHRD_LOOPBACK: Final = 772
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFMTU: Final = 0x8921


@dataclass(slots=True)
class Links:
    """The programs on both sides of interfaces: detached when this is closed, unless they are
    pinned.

    The keeper adds interfaces as pairs need them.
    """

    ingress_fd: int
    egress_fd: int
    directory: Path | None  # of the pins
    attacher: Attacher
    is_pinned: bool = False  # by us
    # Interface -> why nothing could be attached.
    refusals: dict[int, str] = field(default_factory=dict)

    def has(self, interface: int) -> bool:
        """Whether both programs are on an interface."""
        return all(self.attacher.has(interface, side) for side in SIDES)

    def add(self, interface: int) -> bool:
        """Attach the programs to an interface; False if they cannot be attached to it.

        `refusals` says why if another program prevents it.

        Raises:
            OSError: the kernel refuses.
        """
        if self.has(interface):
            return True
        if not _is_like_ethernet(interface):
            return False
        try:
            for side in SIDES:
                if not self.attacher.has(interface, side):
                    self.attacher.attach(self._program(side), interface, side)
        except InterfaceTakenError as error:
            self.refusals[interface] = error.reason
            return False
        except OSError as error:
            if error.errno == errno.ENODEV:  # the interface has just gone
                return False
            raise
        self.refusals.pop(interface, None)
        return True

    def take_off(self, interface: int) -> None:
        """Detach the programs from an interface that no longer suits them. Never raises."""
        for side in SIDES:
            self.attacher.detach(interface, side)

    def verify(self) -> set[int]:
        """Check that the programs are still attached; returns the interfaces that have lost one.

        Another process may have detached them, or another interface may have got the number.
        """
        lost = set()
        for interface in self.attacher.interfaces():
            for side in SIDES:
                self.attacher.verify(interface, side)
            if not self.has(interface):
                lost.add(interface)
        return lost

    def put_back(self, interface: int) -> None:
        """Attach again where an interface has gone and another one has its number.

        Raises:
            OSError: the kernel refuses.
        """
        for side in SIDES:
            self.attacher.verify(interface, side)
        self.add(interface)

    def _program(self, side: Side) -> int:
        return self.ingress_fd if side == "in" else self.egress_fd

    def pin(self) -> Collection[str]:
        """Pin these programs, and those that are added later; returns the names of the pins.

        Raises:
            OSError: bpffs refuses.
        """
        self.is_pinned = True
        return self.attacher.keep()

    def close(self) -> None:
        """Close the descriptors, including those of the programs."""
        self.attacher.close()
        os.close(self.ingress_fd)
        os.close(self.egress_fd)


def smallest_mtu() -> int:
    """The smallest MTU of the interfaces with addresses, other than `lo`; 0 if there are none."""
    sizes = [
        mtu_of(index)
        for index in with_addresses()
        if index != LOOPBACK and _is_like_ethernet(index)
    ]
    return min(sizes, default=0)


def mtu_of(interface: int) -> int:
    """The MTU of an interface; 0: it is gone."""
    return _ioctl(_SIOCGIFMTU, interface)


def with_addresses() -> list[int]:
    """The interfaces with an address, and `lo`."""
    addresses = psutil.net_if_addrs()
    return [
        index
        for index, name in socket.if_nameindex()
        if index == LOOPBACK
        or any(a.family in (socket.AF_INET, socket.AF_INET6) for a in addresses.get(name, ()))
    ]


def _is_like_ethernet(interface: int) -> bool:
    return _ioctl(_SIOCGIFHWADDR, interface) & 0xFFFF in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)


def _ioctl(request: int, interface: int) -> int:
    """A number that an ioctl of netdevice(7) returns for an interface; 0 if it is gone."""
    try:
        name = socket.if_indextoname(interface).encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, request, struct.pack("=16s24x", name))
    except OSError:
        return 0
    (number,) = struct.unpack_from("=I", answer, 16)
    return int(number)
