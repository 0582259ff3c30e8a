"""UDP sessions follow changes of interfaces and routes: the keeper's part."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.interfaces import LOOPBACK
from pyforwarder.datapath.splice.routes import Routes
from pyforwarder.datapath.splice.session_abi import SessionRecord, SessionState
from pyforwarder.datapath.splice.session_maps import (
    record_of,
    store,
    store_direction,
    store_direction_wide,
    store_wide,
)
from pyforwarder.datapath.splice.session_sockets import route_of

if TYPE_CHECKING:
    import mmap
    from collections.abc import Collection

    from pyforwarder.datapath.splice.interfaces import Links

# A change usually comes in many steps; and the keeper has other requests.
_SETTLE_S: Final = 0.1
_SCANS_AT_ONCE: Final = 64
_SCAN_PAUSE_S: Final = 2.0  # between one scan and the next


class SessionRerouting:
    """Finds the interfaces of sessions, and finds them again when routes have changed."""

    def __init__(self, links: Links, memory: mmap.mmap, living: Collection[int]) -> None:
        """`memory` has the records, `living` the indexes of those that are in use, as they come and
        go.
        """
        self._links = links
        self._memory = memory
        self._living = living
        self._routes = Routes()
        self._to_scan: deque[int] = deque()
        self._scan_from_s = self._scanned_s = 0.0
        self._without_route: set[int] = set()

    def find_interfaces(self, record: SessionRecord, *, any_interface: bool) -> PairReason | None:
        """Write the interfaces by which datagrams leave, and must arrive; returns why there are
        none, or None.

        Raises:
            OSError: the kernel refuses.
        """
        out = [
            self._routes.interface(route_of(record, from_peer)) for from_peer in record.direction
        ]
        for interface in out:
            if not interface:
                return PairReason.REFUSED_BY_KERNEL  # no route
            if not self._links.add(interface):
                is_taken = interface in self._links.refusals
                return PairReason.INTERFACE_TAKEN if is_taken else PairReason.NOT_ETHERNET
        stays = out[0] == out[1] == LOOPBACK
        for direction in Direction:
            from_peer = record.direction[direction]
            from_peer.interface = 0 if stays else out[1 - direction]
            from_peer.from_interface = 0 if any_interface else out[direction]
        return None

    def begin(self) -> None:
        """Check each session again, from now on."""
        self._scan_from_s = max(time.monotonic() + _SETTLE_S, self._scanned_s + _SCAN_PAUSE_S)
        self._to_scan = deque(self._living)

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due, if nothing changes."""
        if not self._to_scan:
            return most_s
        return min(most_s, max(0.0, self._scan_from_s - time.monotonic()))

    def run_due(self, now_s: float) -> None:
        """Check some sessions, if it is time."""
        if self._to_scan and now_s >= self._scan_from_s:
            self._scan()

    def forget(self, index: int) -> None:
        """The session has ended."""
        self._without_route.discard(index)

    def _scan(self) -> None:
        """Check some sessions.

        Datagrams of a session without a route that suits the programs pass to our sockets. A new
        route is used as the first one was: once a datagram of our socket was seen to take it, and
        no datagram that our sockets have received can be overtaken.
        """
        self._scanned_s = time.monotonic()
        for _ in range(min(_SCANS_AT_ONCE, len(self._to_scan))):
            index = self._to_scan.popleft()
            if index not in self._living:
                continue
            record = record_of(self._memory, index)
            before = [
                (from_peer.interface, from_peer.from_interface) for from_peer in record.direction
            ]
            # 0 means `any`, and stays.
            is_any = not any(by for _, by in before)
            try:
                obstacle = self.find_interfaces(record, any_interface=is_any)
            except OSError:
                obstacle = PairReason.REFUSED_BY_KERNEL
            if obstacle is not None:
                store(self._memory, index, "state", SessionState.PREPARED)
                self._without_route.add(index)
                for direction in Direction:
                    self._unlatch(index, direction)
                continue
            for direction in Direction:
                from_peer = record.direction[direction]
                store_direction(
                    self._memory, index, direction, "from_interface", from_peer.from_interface
                )
                is_new = from_peer.interface != before[direction][0]
                if is_new or index in self._without_route:
                    self._unlatch(index, direction)
                if is_new:
                    store_direction(
                        self._memory, index, direction, "interface", from_peer.interface
                    )
                    # A program that was running may have seen a datagram take the old route.
                    self._unlatch(index, direction)
            if index in self._without_route:
                self._without_route.discard(index)
                # Meanwhile its datagrams have passed to our sockets only.
                store_wide(self._memory, index, "began_ns", time.monotonic_ns())
                store(self._memory, index, "state", SessionState.ACTIVE)

    def _unlatch(self, index: int, direction: Direction) -> None:
        """Unlatch a direction: its datagrams pass to our socket again, until it may latch again."""
        from_peer = record_of(self._memory, index).direction[direction]
        store_direction(self._memory, index, direction, "has_left", 0)
        # More than the worker has reported as copied, so that it checks, and reports again.
        store_direction_wide(self._memory, index, direction, "passed", from_peer.passed + 1)
        store_direction(self._memory, index, direction, "latched", 0)
