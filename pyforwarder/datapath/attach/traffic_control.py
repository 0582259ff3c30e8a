"""Traffic control, what `tc` does, as far as it is needed: clsact and BPF filters, by rtnetlink.

Not by pyroute2: importing that takes as long as `up` may take to listen, and the keeper asks, too,
between two requests of its workers.

All functions raise OSError with the kernel's errno, and its own words where it gives some.

Source: netlink(7), rtnetlink(7), include/uapi/linux/{rtnetlink,pkt_sched,pkt_cls}.h,
net/sched/{sch_api,cls_api,cls_bpf}.c.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from pyforwarder.datapath.netlink import Netlink, attribute, attributes, text

ROOT: Final = 0xFFFFFFF1  # TC_H_CLSACT: where a clsact or an ingress qdisc is
INGRESS: Final = 0xFFFFFFF2  # of clsact: TC_H_CLSACT with the minor number TC_H_MIN_INGRESS
EGRESS: Final = 0xFFFFFFF3
ALL_PROTOCOLS: Final = 0x0003  # ETH_P_ALL

_RTM_NEWQDISC, _RTM_GETQDISC = 36, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_CHANGE, _EXCLUSIVE, _CREATE = 0x0, 0x200, 0x400

_KIND, _OPTIONS, _CHAIN = 1, 2, 11  # TCA_...
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_HARDWARE = 6, 7, 8, 9  # TCA_BPF_...
_DIRECT_ACTION: Final = 1
_NOT_IN_HARDWARE: Final = 1  # TCA_CLS_FLAGS_SKIP_HW

_TRAFFIC: Final = struct.Struct("=B3xiIII")  # struct tcmsg


@dataclass(frozen=True, slots=True)
class Qdisc:
    """One queueing discipline."""

    interface: int
    parent: int
    kind: str


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter."""

    interface: int
    parent: int
    priority: int
    protocol: int  # host byte order, ALL_PROTOCOLS for any
    chain: int
    kind: str
    handle: int
    name: str  # of a BPF filter


class TrafficControl(Netlink):
    """One netlink socket; close it."""

    def qdiscs(self) -> list[Qdisc]:
        """Those of all interfaces of this network namespace that are clsact or stand in its place.

        Any process may ask.
        """
        found = []
        for traffic, fields in self.dump(
            _RTM_GETQDISC, _TRAFFIC.pack(0, 0, 0, 0, 0), _TRAFFIC.size
        ):
            _, interface, _, parent, _ = _TRAFFIC.unpack(traffic)
            if parent == ROOT:
                found.append(Qdisc(interface, parent, text(fields.get(_KIND, b""))))
        return found

    def add_clsact(self, interface: int) -> None:
        """Put a clsact there; OSError(EEXIST) if it, or an ingress qdisc, is there already."""
        traffic = _TRAFFIC.pack(0, interface, 0xFFFF0000, ROOT, 0)
        flags = _CREATE | _EXCLUSIVE
        self.change(_RTM_NEWQDISC, flags, traffic + attribute(_KIND, b"clsact\0"))

    def filters(self, interface: int, parent: int) -> list[Filter]:
        """Those at one side of an interface with a clsact, in the order in which they are asked."""
        found = []
        request = _TRAFFIC.pack(0, interface, 0, parent, 0)
        for traffic, fields in self.dump(_RTM_GETTFILTER, request, _TRAFFIC.size):
            _, of, handle, _, info = _TRAFFIC.unpack(traffic)
            if not handle:
                continue  # the kernel announces each priority so
            options = dict(attributes(fields.get(_OPTIONS, b"")))
            kind = text(fields.get(_KIND, b""))
            found.append(
                Filter(
                    interface=of,
                    parent=parent,
                    priority=info >> 16,
                    protocol=socket.ntohs(info & 0xFFFF),
                    chain=int.from_bytes(fields.get(_CHAIN, b"\0"), "little"),
                    kind=kind,
                    handle=handle,
                    name=text(options.get(_BPF_NAME, b"")) if kind == "bpf" else "",
                )
            )
        return found

    def add_filter(
        self, interface: int, parent: int, *, priority: int, name: str, program_fd: int
    ) -> None:
        """A BPF filter in direct action for all protocols; the kernel gives it a handle of its own.

        It goes ahead of those that the priority has already.
        """
        place = Filter(interface, parent, priority, ALL_PROTOCOLS, 0, "bpf", 0, name)
        self._write_filter(_CREATE | _EXCLUSIVE, place, program_fd)

    def change_filter(self, place: Filter, program_fd: int) -> None:
        """Put another program in a filter's place, between two packets; ENOENT if it is gone."""
        self._write_filter(_CHANGE, place, program_fd)

    def _write_filter(self, flags: int, place: Filter, program_fd: int) -> None:
        options = (
            attribute(_BPF_FD, struct.pack("=I", program_fd))
            + attribute(_BPF_NAME, place.name.encode() + b"\0")
            + attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
            + attribute(_BPF_HARDWARE, struct.pack("=I", _NOT_IN_HARDWARE))
        )
        attributes = attribute(_KIND, b"bpf\0") + attribute(_OPTIONS, options)
        self.change(_RTM_NEWTFILTER, flags, _traffic_of(place) + attributes)

    def delete_filter(self, place: Filter) -> None:
        """Remove one filter, and nothing else; ENOENT if it is gone."""
        attributes = attribute(_KIND, place.kind.encode() + b"\0")
        self.change(_RTM_DELTFILTER, 0, _traffic_of(place) + attributes)


def _traffic_of(place: Filter) -> bytes:
    info = place.priority << 16 | socket.htons(place.protocol)
    return _TRAFFIC.pack(0, place.interface, place.handle, place.parent, info)
