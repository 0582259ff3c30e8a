"""A datapath that is obviously right: one buffer per direction, and nothing clever.

It passes the same conformance suite as the real ones, so a test of the server may use it in their
place: without BPF, without root, and it stands still when told to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.loop import EPOLLERR, EPOLLIN, EPOLLOUT

_PIECE: Final = 1 << 16


@dataclass(slots=True)
class _Half:
    """One direction: what was read and not yet written, and whether the source has ended."""

    flow: Flow
    waiting: bytes = b""
    at_end: bool = False
    done: bool = False


@dataclass(slots=True)
class _Halves:
    up: _Half
    down: _Half
    both: tuple[_Half, _Half] = field(init=False)

    def __post_init__(self) -> None:
        self.both = (self.up, self.down)


class FakeDatapath:
    """Moves bytes in userspace, level-triggered; it calls itself `sockmap`, whose place it takes.

    `refuse_with` is what `join` answers when it is set; `joined` and `left` count; `pause` stops
    all movement until `resume` (resets are still noticed).
    """

    kind = DatapathKind.SOCKMAP

    def __init__(self, host: PairHost) -> None:
        self._host = host
        self._loop = host.loop
        self._pairs: list[Pair] = []
        self._paused = False
        self.limit_bytes = 0  # as the real one has; here a direction never holds more than a read
        self.refuse_with: PairReason | None = None
        self.is_room = True
        self.ends: list[Callable[[], None]] = []
        self.joined = 0
        self.left = 0

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over."""
        if self.refuse_with is not None:
            return self.refuse_with
        if pair.slot < 0:
            return PairReason.MAP_FULL
        if pair.up.end_seen or pair.down.end_seen or pair.up.phase or pair.down.phase:
            return PairReason.HALF_CLOSED
        halves = _Halves(_Half(pair.up), _Half(pair.down))
        for half in halves.both:
            if half.flow.pending is not None:
                half.waiting = bytes(half.flow.pending)
                half.flow.pending = None
        pair.datapath_record = halves
        pair.kind = self.kind
        pair.datapath = self
        self._pairs.append(pair)
        self.joined += 1
        for fd in (pair.client_fd, pair.server_fd):
            self._loop.redirect(fd, self._ready)
        self._watch(pair)
        return None

    def pause(self) -> None:
        """Move nothing from here on."""
        self._paused = True
        for pair in self._pairs:
            self._watch(pair)

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        for pair in self._pairs:
            self._watch(pair)

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """Bytes, packets, and what waits here."""
        half = self._half(pair, flow)
        return flow.carried_bytes, flow.carried_packets, len(half.waiting)

    def active_s(self, pair: Pair) -> float:
        """When a byte last moved."""
        return pair.active_s

    def trips(self, pair: Pair) -> int:
        """There is no limit to trip over."""
        return 0

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Whether there `is_room` for it; else the test has `then` called."""
        if not self.is_room:
            self.ends.append(partial(then, pair))
        return self.is_room

    def leave(self, pair: Pair) -> None:
        """Forget the pair."""
        self._pairs.remove(pair)
        self.left += 1
        pair.datapath_record = None

    @staticmethod
    def _half(pair: Pair, flow: Flow) -> _Half:
        halves = pair.datapath_record
        assert isinstance(halves, _Halves)
        return halves.up if flow is pair.up else halves.down

    def _watch(self, pair: Pair) -> None:
        """Ask for just what there is to do: room for what waits, or else something to read."""
        for fd, inward, outward in (
            (pair.client_fd, pair.up, pair.down),
            (pair.server_fd, pair.down, pair.up),
        ):
            mask = 0
            reading, writing = self._half(pair, inward), self._half(pair, outward)
            if not self._paused and not reading.waiting and not reading.at_end:
                mask |= EPOLLIN
            if not self._paused and writing.waiting:
                mask |= EPOLLOUT
            self._loop.change(fd, mask)

    def _ready(self, pair: Pair, fd: int, mask: int) -> None:
        if not self._paused:
            for flow in (pair.up, pair.down):
                self._move(pair, self._half(pair, flow))
                if pair.datapath is not self:
                    return
            self._watch(pair)
        # Level-triggered: what the socket still had to give was read above, piece by piece.
        if mask & EPOLLERR and not mask & EPOLLIN:
            self._fail(pair, fd)

    def _fail(self, pair: Pair, fd: int) -> None:
        is_client = fd == pair.client_fd
        self._host.broken(pair, CloseReason.CLIENT_RESET if is_client else CloseReason.SERVER_RESET)

    def _move(self, pair: Pair, half: _Half) -> None:
        """One read if nothing waits, one write if something does."""
        flow = half.flow
        if not half.waiting and not half.at_end:
            try:
                half.waiting = os.read(flow.source_fd, _PIECE)
            except BlockingIOError:
                return
            except OSError:
                self._fail(pair, flow.source_fd)
                return
            half.at_end = not half.waiting
            flow.read_bytes += len(half.waiting)
            flow.carried_packets += not half.at_end
            if half.at_end:
                self._host.fin_seen(pair, flow)
        if half.waiting:
            try:
                written = os.write(flow.target_fd, half.waiting)
            except BlockingIOError:
                return
            except OSError:
                self._fail(pair, flow.target_fd)
                return
            half.waiting = half.waiting[written:]
            flow.written_bytes += written
            flow.carried_bytes += written
            pair.active_s = self._loop.now_s
            self._host.moved(pair, flow)
        if half.at_end and not half.waiting and not half.done:
            half.done = True
            self._host.delivered(pair, flow)
