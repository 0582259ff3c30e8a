"""The sockmap datapath: the kernel moves the bytes, userspace sleeps.

bpf/redirect.c decides per packet; this is the worker's half: pairs enter and leave, and events
reach the direction that they are about. What a direction does then is in directions.py.

Rules that the kernel imposes, each with a test under tests/kernel (the numbers are commits or
kernel functions):

- The sockets enter the map only when every byte received has been read: a partly read packet would
  be redirected whole (tcp_read_skb).
- A queued packet is not seen by the program until the socket is kicked; SO_RCVLOWAT does it
  (tcp_set_rcvlowat).
- Both sockets are closed with SO_LINGER 0 unless everything was delivered: close() frees what is
  queued and then sends a clean FIN (sk_psock_destroy).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Phase
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason, error_of
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.sockmap.directions import Half, Halves, SockmapDirections
from pyforwarder.datapath.sockmap.exit import SockmapExit
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, queued_for, received
from pyforwarder.runtime.loop import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
)
from pyforwarder.runtime.socket_options import SO_COOKIE

if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.ebpf.ringbuf import RingBuffer
    from pyforwarder.datapath.ebpf.syscall import Map

_COOKIE: Final = struct.Struct("=Q")
_OWNER: Final = struct.Struct("=II")
_SOCKET_VALUE: Final = struct.Struct("=Q")  # 8 bytes: a descriptor to write, a cookie to read
_WAKEUP: Final = struct.Struct("=IIQ")


class SockmapDatapath(SockmapDirections):
    """Pairs in a sockhash, for one worker."""

    kind = DatapathKind.SOCKMAP

    def __init__(
        self,
        host: PairHost,
        *,
        window: PairWindow,
        sockets: Map,
        owners: Map,
        ring: RingBuffer,
        limit_bytes: int,
    ) -> None:
        """Work on inherited maps; no privilege is needed for any of it."""
        super().__init__(host, window=window, limit_bytes=limit_bytes)
        self._sockets = sockets
        self._owners = owners
        self._ring = ring
        self._by_slot: dict[int, Pair] = {}
        self._loop.watch(ring.fd, EPOLLIN, self._rung, None)

    # Entering and leaving

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over, at any point of the stream.

        Nothing has changed if a reason is returned; UNREAD_BYTES means that a later try may do.
        """
        if pair.slot < 0:
            return PairReason.MAP_FULL
        up, down = pair.up, pair.down
        if up.phase is not Phase.OPEN or down.phase is not Phase.OPEN:
            return PairReason.HALF_CLOSED
        if up.end_seen or down.end_seen:
            return PairReason.HALF_CLOSED
        if up.pending is not None or down.pending is not None:
            return PairReason.UNREAD_BYTES
        client, server = pair.client, pair.server
        assert server is not None
        for sock, flow in ((client, up), (server, down)):
            if sock.family == socket.AF_UNIX:
                return PairReason.UNIX_SOCKET
            state, received_bytes = received(sock)
            if state != TCP_ESTABLISHED:
                return PairReason.HALF_CLOSED
            if received_bytes != flow.read_bytes:
                return PairReason.UNREAD_BYTES
        return self._enter(pair, client, server)

    def _enter(
        self, pair: Pair, client: _socket.socket, server: _socket.socket
    ) -> PairReason | None:
        """Put both sockets into the maps. The order of the steps is what keeps the bytes in order.

        1. The record: counters at 0, both directions armed (all earlier bytes are with TCP).
        2. `owners`, so that the program knows the sockets from their first packet on.
        3. The server's socket, then the client's: until both are there, a packet finds no target
           and is passed, which is correct at any time.
        4. The kick: what is queued since the last read goes through the program.
        """
        client_cookie = client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        server_cookie = server.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        slot = pair.slot
        # The program puts it into its wakeups; a record that was never described has none yet.
        self._words64[slot * self._window.WORDS64 + table.ID] = pair.id
        self._prepare(slot, Direction.UP, server_cookie)
        self._prepare(slot, Direction.DOWN, client_cookie)
        try:
            self._owners.update(server_cookie, _OWNER.pack(slot, Direction.DOWN))
        except OSError:
            return PairReason.MAP_FULL
        try:
            self._owners.update(client_cookie, _OWNER.pack(slot, Direction.UP))
            self._sockets.update(server_cookie, _SOCKET_VALUE.pack(pair.server_fd))
        except OSError as error:
            self._forget(client_cookie, server_cookie)
            full = error.errno in (errno.E2BIG, errno.ENOMEM, errno.ENOSPC)
            return PairReason.MAP_FULL if full else PairReason.REFUSED_BY_KERNEL
        up = Half(self, pair, pair.up, client_cookie)
        down = Half(self, pair, pair.down, server_cookie)
        try:
            self._sockets.update(client_cookie, _SOCKET_VALUE.pack(pair.client_fd))
        except OSError:
            # The client has sent its FIN since we looked (CLOSE_WAIT is refused). The server's
            # socket cannot be taken out again without risk for what it was passed meanwhile, so
            # it stays, disarmed, and the client's is read as always.
            up.is_native = True
            self._words32[slot * self._window.WORDS32 + table.ARMED[Direction.DOWN]] = 0
        pair.datapath_record = Halves(up, down)
        pair.kind = DatapathKind.SOCKMAP
        pair.datapath = self
        self._by_slot[slot] = pair
        for fd in (pair.client_fd, pair.server_fd):
            self._loop.redirect(fd, self.ready)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if not up.is_native:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        # Events that came while the sockets changed hands are reported again by the new mask.
        self._watch(pair)
        self.advance(pair, up)
        if pair.datapath is self:
            self.advance(pair, down)
        return None

    def _prepare(self, slot: int, direction: Direction, peer_cookie: bytes) -> None:
        at64 = slot * self._window.WORDS64
        at32 = slot * self._window.WORDS32
        self._words64[at64 + table.PEER_COOKIE[direction]] = _COOKIE.unpack(peer_cookie)[0]
        self._words64[at64 + table.CONSUMED[direction]] = 0
        self._words32[at32 + table.LIMIT[direction]] = self.limit_bytes
        self._words32[at32 + table.ASLEEP[direction]] = 0
        self._words32[at32 + table.ARMED[direction]] = 1

    def _forget(self, *cookies: bytes) -> None:
        for cookie in cookies:
            try:
                self._owners.delete(cookie)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """At once."""
        return True

    def leave(self, pair: Pair) -> None:
        """Forget the pair; its sockets leave the sockhash when they are closed, right after."""
        halves = pair.datapath_record
        assert isinstance(halves, Halves)
        self._loop.deadlines.stop(halves.up)
        self._loop.deadlines.stop(halves.down)
        self._forget(halves.up.cookie, halves.down.cookie)
        if pair.is_foreign or pair.is_shared:
            # Another process may keep a descriptor, and then closing ours changes nothing.
            for cookie in (halves.up.cookie, halves.down.cookie):
                with contextlib.suppress(OSError):
                    self._sockets.delete(cookie)
        del self._by_slot[pair.slot]
        pair.datapath_record = None

    def exit(self) -> SockmapExit:
        """By which pairs leave, and go on; the caller closes it."""
        return SockmapExit(self, self._host, window=self._window, sockets=self._sockets)

    def halves_of(self, pair: Pair) -> tuple[Half, Half]:
        """Both directions of a pair that is ours."""
        halves = pair.datapath_record
        assert isinstance(halves, Halves)
        return halves.up, halves.down

    # What the view asks

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """Bytes and packets moved by both hands, and the bytes that wait in the kernel."""
        at = pair.slot * self._window.WORDS64
        redirected = self._words64[at + table.REDIRECTED[flow.direction]]
        packets = self._words64[at + table.REDIRECTED_PACKETS[flow.direction]]
        backlog = 0
        target = pair.server if flow.direction is Direction.UP else pair.client
        if target is not None and redirected:
            backlog = max(0, flow.written_bytes + redirected - queued_for(flow, target))
        return flow.carried_bytes + redirected, flow.carried_packets + packets, backlog

    def trips(self, pair: Pair) -> int:
        """How often either direction reached the backlog limit."""
        at = pair.slot * self._window.WORDS32
        return sum(self._words32[at + table.TRIPS[direction]] for direction in Direction)

    def active_s(self, pair: Pair) -> float:
        """When a packet was last seen by the program, or copied by us."""
        at = pair.slot * self._window.WORDS64
        seen_ns = max(self._words64[at + table.LAST_NS[d]] for d in Direction)
        return max(pair.active_s, seen_ns / 1e9)

    # Events

    def _rung(self, _owner: object, _fd: int, _mask: int) -> None:
        for record in self._ring.records():
            slot, direction, pair_id = _WAKEUP.unpack(record)
            pair = self._by_slot.get(slot)
            if pair is None or pair.id != pair_id:
                continue  # the pair has ended since; its slot may already be another's
            halves = pair.datapath_record
            assert isinstance(halves, Halves)
            half = halves.up if direction == Direction.UP else halves.down
            try:
                self._wake(half)
                self.advance(pair, half)
            except Exception as error:
                # The ring is everybody's: a fault costs the pair it happened to.
                self._loop.on_error(pair, error)

    def ready(self, pair: Pair, fd: int, mask: int) -> None:
        """An edge on one of the pair's sockets, or (mask 0) another turn of a busy direction."""
        halves = pair.datapath_record
        assert isinstance(halves, Halves)
        if fd == pair.client_fd:
            inward, outward = halves.up, halves.down
        else:
            inward, outward = halves.down, halves.up
        if mask & EPOLLERR:
            self._fail(pair, fd, error_of(pair, fd))
            return
        if mask & EPOLLRDHUP and not inward.flow.end_seen:
            inward.flow.end_seen = True
            if not inward.is_native:
                self._wake(inward)
                self._host.fin_seen(pair, inward.flow)
        if mask & EPOLLOUT:
            outward.flow.blocked = False
            self.advance(pair, outward)
            if pair.datapath is not self:
                return
        if inward.is_native:
            if mask & EPOLLPRI:
                inward.flow.urgent = True
            if mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP):
                inward.flow.readable = True
            self._copying.pump(pair, inward.flow)
        elif not inward.sleeping:
            self.advance(pair, inward)
