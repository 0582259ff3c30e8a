"""Spliced pairs follow changes of interfaces and routes: the keeper's part.

A record has the interfaces by which a peer's packets leave and arrive. When something changes, the
routes of all pairs' sockets are looked up again, and a record is changed if its route is: so the
pair continues as one of a TCP proxy would. A pair without any route to a peer waits as long as TCP
itself would retry (`tcp_retries2`). If the route does not suit the programs, it waits for a moment.
Then the pair is reset, so that its other end learns of it.

No one can make this expensive: a scan of all pairs is done in small pieces between requests of the
workers, and the next one waits for a multiple of the time that it took.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import (
    SPLICE_BYTES,
    ResetBy,
    Routing,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.interfaces import LOOPBACK, Links, with_addresses
from pyforwarder.datapath.splice.routes import Route, Routes, RouteWatch
from pyforwarder.runtime.one_store import store32

if TYPE_CHECKING:
    from pyforwarder.datapath.netlink import Link

# A change usually comes in many steps: an address goes, another comes, routes follow.
_SETTLE_S: Final = 0.1
# But a host on which something changes all the time must be followed, too.
_MOST_SETTLE_S: Final = 1.0
# The most that scans take of a processor.
_SHARE: Final = 0.05
_PAIRS_AT_ONCE: Final = 64
# A route that does not suit the programs may be an intermediate step of a change.
_NO_ROUTE_FOR_US_S: Final = 1.0

# net/ipv4/tcp_timer.c, tcp_model_timeout(): TCP_RTO_MIN doubled, up to TCP_RTO_MAX.
_LEAST_RTO_S, _MOST_RTO_S = 0.2, 120.0
_RETRIES: Final = Path("/proc/sys/net/ipv4/tcp_retries2")
_DEFAULT_RETRIES: Final = 15

_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)


def gives_up_after_s(retries: int) -> float:
    """How long TCP retransmits without an acknowledgement, with `retries` of tcp_retries2."""
    total_s, rto_s = 0.0, _LEAST_RTO_S
    for _ in range(retries + 1):
        total_s += rto_s
        rto_s = min(2 * rto_s, _MOST_RTO_S)
    return total_s


def _patience_s() -> float:
    try:
        return gives_up_after_s(int(_RETRIES.read_text()))
    except (OSError, ValueError):
        return gives_up_after_s(_DEFAULT_RETRIES)


class _NoRouteError(Exception):
    """A pair's packets have no usable route now; `patience_s` is how long to wait for one."""

    def __init__(self, patience_s: float) -> None:
        super().__init__()
        self.patience_s = patience_s


class Rerouting:
    """The routes of all pairs of one keeper."""

    def __init__(
        self,
        links: Links,
        memory: mmap.mmap,
        indexes: Callable[[], Iterable[int]],
        end: Callable[[int, ResetBy], None],
    ) -> None:
        """`indexes` are the records that may be of pairs, `end` resets a pair.

        The first scan is of all pairs: an earlier keeper may have died in the middle of one.
        """
        self._links = links
        self._memory = memory
        self._indexes = indexes
        self._end = end
        self._watch = RouteWatch()
        self._routes = Routes()
        self._there: dict[int, Link] = {}
        # When the first change came since the last scan.
        self._since_s: float | None = time.monotonic()
        self._last_s = 0.0  # and the last one
        self._left: deque[int] = deque()  # to be checked
        self._took_s = 0.0  # the time that the present scan has taken, or the last one
        self._not_before_s = 0.0
        # Pairs without a route: index -> (pair, since when, until when).
        self._without: dict[int, tuple[int, float, float]] = {}

    def fileno(self) -> int:
        """Readable when something has changed: call `changed`."""
        return self._watch.fileno()

    def changed(self) -> None:
        """Interfaces, addresses, routes or rules have changed."""
        self._watch.drain()
        self.scan_again()

    def scan_again(self) -> None:
        """Scan all pairs: the routes of some may have changed before they were this keeper's.

        Notifications are left for `changed` to read, as other parts must learn of them, too.
        """
        self._last_s = time.monotonic()
        if self._since_s is None:
            self._since_s = self._last_s

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due, if nothing changes."""
        if self._left:
            return 0.0
        if self._since_s is None:
            return most_s
        return min(most_s, max(0.0, self._due_s() - time.monotonic()))

    def _due_s(self) -> float:
        assert self._since_s is not None
        settled_s = min(self._last_s + _SETTLE_S, self._since_s + _MOST_SETTLE_S)
        return max(settled_s, self._not_before_s)

    def run_due(self) -> None:
        """Do some of what is due. Never raises: what has failed is tried again."""
        started_s = time.monotonic()
        is_looking = bool(self._left)
        try:
            if not self._left and self._since_s is not None and started_s >= self._due_s():
                self._since_s = None
                self._took_s = 0.0
                is_looking = True
                self._check_interfaces()
                self._left.extend(self._indexes())
            for _ in range(min(_PAIRS_AT_ONCE, len(self._left))):
                self._check(self._left.popleft())
            self._retry_those_without()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._since_s = self._since_s or started_s
        if is_looking:
            ended_s = time.monotonic()
            self._took_s += ended_s - started_s
            self._not_before_s = ended_s + self._took_s / _SHARE

    def _check_interfaces(self) -> None:
        """Detach the programs from interfaces that have become ports, and attach them where they
        are missing.
        """
        before, self._there = self._there, self._routes.links()
        lost = self._links.verify()
        for interface in self._links.attacher.interfaces() | lost:
            link = self._there.get(interface)
            if link is not None and link.port_of:
                self._links.take_off(interface)
        addressed: set[int] | None = None
        for interface, link in self._there.items():
            was = before.get(interface)
            if link.port_of or not (interface in lost or (was is not None and was.port_of)):
                continue
            if addressed is None:
                addressed = set(with_addresses())
            if interface in lost or interface in addressed:
                with contextlib.suppress(OSError):
                    self._links.add(interface)

    def _check(self, index: int) -> None:
        record = Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)
        if record.state != SpliceState.ACTIVE or not record.id or record.reset:
            self._without.pop(index, None)
            return
        patience_s = -1.0
        for direction in Direction:
            try:
                self._check_route(index, record, direction)
            except _NoRouteError as error:
                known = patience_s < 0
                patience_s = error.patience_s if known else min(patience_s, error.patience_s)
        if patience_s < 0:
            self._without.pop(index, None)
            return
        now_s = time.monotonic()
        pair_id, since_s, _ = self._without.get(index, (0, 0.0, 0.0))
        if pair_id != record.id:
            since_s = now_s
        self._without[index] = record.id, since_s, since_s + patience_s
        if now_s - since_s >= patience_s:
            del self._without[index]
            self._end(index, ResetBy.NO_ROUTE)

    def _retry_those_without(self) -> None:
        """Check again the pairs whose wait for a route is over."""
        now_s = time.monotonic()
        due = (index for index, (_, _, until_s) in self._without.items() if until_s <= now_s)
        for index in list(itertools.islice(due, _PAIRS_AT_ONCE)):
            self._check(index)

    def _check_route(self, index: int, record: Splice, direction: Direction) -> None:
        """Write the present interfaces to and from one peer into a record.

        Raises:
            _NoRouteError: there is no route, or none that suits the programs.
        """
        from_peer, was = record.direction[direction], record.out[direction]
        now = self._out(record, direction)
        link = self._there.get(now)
        if now != was and LOOPBACK in (now, was):
            # An address has moved to this host, or away from it.
            raise _NoRouteError(_NO_ROUTE_FOR_US_S)
        came_by = (
            self._came_by(tuple(from_peer.from_interfaces), now)
            if any(from_peer.from_interfaces)
            else now
        )
        for interface in {came_by, now}:
            there = self._there.get(interface)
            if there and not there.port_of and not self._has_programs(interface):
                raise _NoRouteError(_NO_ROUTE_FOR_US_S)
        at = index * SPLICE_BYTES + Splice.direction.offset
        if any(from_peer.from_interfaces) and (came_by, now) != tuple(from_peer.from_interfaces):
            by_at = at + direction * _DIRECTION_BYTES + SpliceDirection.from_interfaces.offset
            # One after the other, and never 0 in between: two zeros mean any interface.
            store32(self._memory, by_at, came_by)
            store32(self._memory, by_at + 4, now)
        if now != was:
            # From `lo` to `lo` it is 0, and never changes.
            goes_at = at + (1 - direction) * _DIRECTION_BYTES + SpliceDirection.interface.offset
            store32(self._memory, goes_at, now)
            out_at = index * SPLICE_BYTES + Splice.out.offset + direction * 4
            store32(self._memory, out_at, now)
        if link is None or link.port_of:
            # On a port the programs do not see packets of our own sockets.
            raise _NoRouteError(_patience_s())

    def _out(self, record: Splice, direction: Direction) -> int:
        """The interface by which our packets reach a peer now.

        Raises:
            _NoRouteError: there is no route.
        """
        from_peer, was = record.direction[direction], int(record.out[direction])
        if from_peer.routing & Routing.BOUND:
            return was
        route = Route(
            record.family,
            b"" if from_peer.routing & Routing.FOREIGN else bytes(from_peer.from_.target),
            bytes(from_peer.from_.source),
            socket.ntohs(from_peer.from_.dport),
            socket.ntohs(from_peer.from_.sport),
            from_peer.mark,
            record.owner,
        )
        now = self._routes.interface(route)
        if not now:
            raise _NoRouteError(_patience_s())
        if now != was and was in self._there and self._routes.is_one_of_several(route, was):
            return was
        return now

    def _came_by(self, before: tuple[int, ...], now: int) -> int:
        """The interface by which a peer's packets may arrive, besides that of our route to it.

        One by which they arrived so far, as long as it exists: the peer may not know of a change.
        Packets that arrive at a port come by its master.
        """
        for interface in before:
            link = self._there.get(interface)
            if link is not None and (link.port_of or interface) != now:
                return link.port_of or interface
        return now

    def _has_programs(self, interface: int) -> bool:
        if self._links.has(interface):
            return True
        with contextlib.suppress(OSError):
            return self._links.add(interface)
        return False

    def close(self) -> None:
        """Close the sockets."""
        self._watch.close()
        self._routes.close()
