"""The network interfaces: which of them splice's programs are on, and how large their packets are.

Programs are put on an interface in pairs, one for each side of it (see `datapath/attach/`).
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
# net/if_arp.h: what the programs take for granted is a header of Ethernet.
_ARPHRD_ETHER: Final = 1
_ARPHRD_LOOPBACK: Final = 772
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFMTU: Final = 0x8921


@dataclass(slots=True)
class Links:
    """The programs at both sides of interfaces: they go when this is closed, unless it is pinned.

    The keeper adds interfaces as pairs need them.
    """

    ingress_fd: int
    egress_fd: int
    directory: Path | None  # of pins
    attacher: Attacher
    is_pinned: bool = False  # by us
    refusals: dict[int, str] = field(default_factory=dict)  # interface: why there is no place

    def has(self, interface: int) -> bool:
        """Whether both programs are there."""
        return all(self.attacher.has(interface, side) for side in SIDES)

    def add(self, interface: int) -> bool:
        """Put the programs on an interface; False if it is none for them.

        `refusals` says why if that is another program's doing.

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
            if error.errno == errno.ENODEV:  # it went just now
                return False
            raise
        self.refusals.pop(interface, None)
        return True

    def take_off(self, interface: int) -> None:
        """Take the programs away from an interface that is not for them any more. Never raises."""
        for side in SIDES:
            self.attacher.detach(interface, side)

    def verify(self) -> set[int]:
        """Look whether the programs are still where they were; the interfaces that have lost one.

        Another process may have taken them off, or another interface have got the number.
        """
        lost = set()
        for interface in self.attacher.interfaces():
            for side in SIDES:
                self.attacher.verify(interface, side)
            if not self.has(interface):
                lost.add(interface)
        return lost

    def put_back(self, interface: int) -> None:
        """The same where an interface went and another has its number: no program is there.

        Raises:
            OSError: the kernel refuses.
        """
        for side in SIDES:
            self.attacher.verify(interface, side)
        self.add(interface)

    def _program(self, side: Side) -> int:
        return self.ingress_fd if side == "in" else self.egress_fd

    def pin(self) -> Collection[str]:
        """Let them, and those that are added later, outlive us; the names of the pins.

        Raises:
            OSError: bpffs refuses.
        """
        self.is_pinned = True
        return self.attacher.keep()

    def close(self) -> None:
        """Close the descriptors, those of the programs, too."""
        self.attacher.close()
        os.close(self.ingress_fd)
        os.close(self.egress_fd)


def smallest_mtu() -> int:
    """Of the interfaces but `lo` that have addresses; 0 if there are none."""
    sizes = [
        mtu_of(index)
        for index in with_addresses()
        if index != LOOPBACK and _is_like_ethernet(index)
    ]
    return min(sizes, default=0)


def mtu_of(interface: int) -> int:
    """What it carries in one packet, its header left out; 0: it is gone."""
    return _ioctl(_SIOCGIFMTU, interface)


def with_addresses() -> list[int]:
    """The interfaces that have one, and `lo`."""
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
    """What netdevice(7) says of an interface, as a number; 0 if it is gone."""
    try:
        name = socket.if_indextoname(interface).encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, request, struct.pack("=16s24x", name))
    except OSError:
        return 0
    (number,) = struct.unpack_from("=I", answer, 16)
    return int(number)
