"""The copy datapath: userspace reads from one socket and writes to the other.

Always works; it is the fallback, the first moments of every pair, and the reference that the
other datapaths are compared with. Its memory is bounded by construction: a flow that cannot write
does not read, so it holds at most two reads, the second only where the source has ended.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Phase
from pyforwarder.datapath.base import error_of, failure
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.loop import (
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
)
from pyforwarder.runtime.raw_sockets import write_last

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.base import Flow, Pair, PairHost, PairReason

# What one read asks for. Small while messages are small: the buffer is allocated per read. Large
# once a read came back full: one buffer that stays in the cache serves every bulk flow.
READ_BYTES: Final = 16 * 1024
BULK_READ_BYTES: Final = 256 * 1024
# How much one flow may move before the others of the loop have their turn.
FAIR_SHARE_BYTES: Final = 4 * 1024 * 1024

WATCHED: Final = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET
BLOCKED: Final = WATCHED | EPOLLOUT
_RARE: Final = EPOLLERR | EPOLLPRI
# A message, the source's end, the end of both.
_ORDINARY: Final = (EPOLLIN, EPOLLIN | EPOLLRDHUP, EPOLLIN | EPOLLRDHUP | EPOLLHUP)
_read: Final = os.read
_write: Final = os.write
_COPY: Final = DatapathKind.COPY
_OPEN: Final = Phase.OPEN


class CopyDatapath:
    """recv and send, driven by edges."""

    kind = DatapathKind.COPY

    def __init__(self, host: PairHost) -> None:
        self._host = host
        self._loop = host.loop
        self._buffer = bytearray(BULK_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._vector = [self._buffer]
        # While memory is tight reads stay small: what is behind a write that was cut short waits.
        self.may_take_much = True

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over; never refuses."""
        pair.kind = _COPY
        self._loop.redirect(pair.client_fd, self.ready)
        self._loop.redirect(pair.server_fd, self.ready)
        if pair.up.readable or pair.up.pending is not None:
            self.pump(pair, pair.up)
        if pair.datapath is not None and (pair.down.readable or pair.down.pending is not None):
            self.pump(pair, pair.down)
        return None

    def take_back(self, pair: Pair) -> None:
        """Go on with a pair that another datapath has released, with the bytes in its sockets."""
        pair.datapath = self
        for flow in (pair.up, pair.down):
            flow.readable = flow.phase is _OPEN
            flow.blocked = flow.pending is not None
        pair.client_mask = BLOCKED if pair.down.blocked else WATCHED
        pair.server_mask = BLOCKED if pair.up.blocked else WATCHED
        # Reports what is there by now, urgent bytes and ends too.
        self._loop.change(pair.client_fd, pair.client_mask)
        self._loop.change(pair.server_fd, pair.server_mask)
        self.join(pair)

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """What this flow has moved; nothing of it waits in the kernel on our account."""
        return flow.carried_bytes, flow.carried_packets, 0

    def active_s(self, pair: Pair) -> float:
        """When a byte last moved."""
        return pair.active_s

    def trips(self, pair: Pair) -> int:
        """Never: there is no limit to trip over."""
        return 0

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """At once."""
        return True

    def leave(self, pair: Pair) -> None:
        """Nothing to give back."""

    def ready(self, pair: Pair, fd: int, mask: int) -> None:
        """An edge on one of the pair's sockets, or (mask 0) another turn of a busy flow."""
        if fd == pair.client_fd:
            inward, outward = pair.up, pair.down
        else:
            inward, outward = pair.down, pair.up
        # Nearly always: a message that one read takes and one write delivers, or the end.
        if (
            mask in _ORDINARY
            and not (inward.readable or inward.urgent or inward.blocked or inward.bulk)
            and not outward.blocked
            and inward.pending is None
            and inward.phase is _OPEN
        ):
            # What `pump` does, for a message of which nothing is known but that it has come.
            try:
                chunk = _read(fd, READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(pair, fd, error.errno)
                return
            count = len(chunk)
            if not count:
                self._host.ended(pair, inward)
                return
            if mask != EPOLLIN and count < READ_BYTES and not pair.is_foreign:
                self._carry_last(pair, inward, chunk)
                return
            inward.read_bytes += count
            try:
                written = _write(inward.target_fd, chunk)
            except BlockingIOError:
                written = 0
            except OSError as error:
                self._fail(pair, inward.target_fd, error.errno)
                return
            inward.carried_packets += 1
            inward.written_bytes += written
            inward.carried_bytes += written
            if mask != EPOLLIN or count == READ_BYTES or written < count:
                self._note(pair, inward, chunk, written, ends=mask != EPOLLIN)
            if written:
                pair.active_s = self._loop.now_s
                self._host.moved(pair, inward)
            if inward.readable and not inward.blocked and pair.datapath is not None:
                self.pump(pair, inward)
            return
        # Less often; what follows would do the same, later.
        if mask & EPOLLIN and not mask & _RARE and not outward.blocked:
            inward.readable = True
            if mask & EPOLLRDHUP:
                inward.end_seen = True
            if not inward.blocked:
                self.pump(pair, inward)
            return
        if mask & EPOLLRDHUP:
            inward.end_seen = True
        if mask & EPOLLPRI:
            inward.urgent = True
        if mask & EPOLLOUT and outward.blocked:
            outward.blocked = False
            self.pump(pair, outward)
            if pair.datapath is None:
                return
        if mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            inward.readable = True
        if inward.readable and not inward.blocked:
            self.pump(pair, inward)
            if pair.datapath is None:
                return
        # What the socket still had to give has been read above; now its error counts. EPOLLHUP
        # alone is the ordinary end of both directions.
        if mask & EPOLLERR:
            self._fail(pair, fd, error_of(pair, fd))

    def _carry_last(self, pair: Pair, flow: Flow, chunk: bytes) -> None:
        """A message, and FIN has come too: most likely right behind it, and then leaves with it.

        Two reads at most are held. Not for sockets of another program: of what waits for a FIN kTLS
        has made no record yet, which would then come behind it.
        """
        flow.end_seen = flow.readable = True
        rest: bytes | None = None
        failed = 0
        try:
            rest = _read(flow.source_fd, READ_BYTES)
        except BlockingIOError:
            flow.readable = False
        except OSError as error:
            failed = error.errno or errno.EIO  # no other read would tell of it
        if rest:
            chunk += rest
        flow.read_bytes += len(chunk)
        if rest == b"":
            written = write_last(flow.target_fd, chunk)
        else:
            try:
                written = _write(flow.target_fd, chunk)
            except OSError as error:
                written = -(error.errno or errno.EIO)
        if written < 0:
            if written != -errno.EAGAIN:
                self._fail(pair, flow.target_fd, -written)
                return
            written = 0
        flow.carried_packets += 1
        flow.written_bytes += written
        flow.carried_bytes += written
        if written < len(chunk):
            flow.pending = memoryview(chunk)[written:]
            self._block(pair, flow)
        if written:
            pair.active_s = self._loop.now_s
            self._host.moved(pair, flow)
        if pair.datapath is None:
            return
        if failed:
            self._fail(pair, flow.source_fd, failed)
        elif rest == b"" and flow.pending is None:
            flow.readable = False
            self._host.ended(pair, flow)
        elif flow.readable and not flow.blocked:
            self.pump(pair, flow)
        # Where there was no room the end is read again later: a read says so any number of times.

    def _note(self, pair: Pair, flow: Flow, chunk: bytes, written: int, *, ends: bool) -> None:
        """More is to be done for a message: a FIN or more is behind it, or there was no room."""
        is_full = len(chunk) == READ_BYTES
        if ends:
            flow.end_seen = True
        flow.readable = ends or is_full
        flow.bulk = is_full and self.may_take_much
        if written < len(chunk):
            flow.pending = memoryview(chunk)[written:]
            self._block(pair, flow)

    def _fail(self, pair: Pair, fd: int, error: int | None) -> None:
        self._host.broken(pair, failure(pair, fd, error or 0))

    def pump(self, pair: Pair, flow: Flow) -> None:
        """Move bytes of one flow until the source is empty, the target full, or the turn over.

        Every message of every copied pair comes through here, so the loop calls nothing but the
        kernel.
        """
        if flow.pending is not None and not self.write_pending(pair, flow):
            return
        if flow.phase is not _OPEN:
            return
        moved = 0
        chunk: bytes | memoryview
        while flow.readable:
            if moved >= FAIR_SHARE_BYTES:
                self._loop.soon(pair, flow.source_fd)
                break
            try:
                if flow.bulk:
                    count = os.readv(flow.source_fd, self._vector)
                    chunk = self._view[:count]
                    is_full = count == BULK_READ_BYTES
                else:
                    chunk = os.read(flow.source_fd, READ_BYTES)
                    count = len(chunk)
                    is_full = count == READ_BYTES
            except BlockingIOError:
                flow.readable = flow.urgent = False
                break
            except OSError as error:
                self._fail(pair, flow.source_fd, error.errno)
                return
            if count == 0:
                flow.readable = False
                self._host.ended(pair, flow)
                break
            flow.read_bytes += count
            flow.bulk = is_full and self.may_take_much
            if not is_full:
                # A short read has emptied the queue, so the next byte brings an edge of its own; a
                # FIN that came with these bytes does not, and wants one more read; so does what
                # is behind an urgent byte.
                flow.readable = flow.end_seen or flow.urgent
            try:
                written = os.write(flow.target_fd, chunk)
            except BlockingIOError:
                written = 0
            except OSError as error:
                self._fail(pair, flow.target_fd, error.errno)
                return
            flow.carried_packets += 1
            flow.written_bytes += written
            flow.carried_bytes += written
            moved += written
            if written < count:
                # The shared buffer serves other flows next: what is left gets its own memory.
                flow.pending = memoryview(bytes(chunk[written:]))
                self._block(pair, flow)
                break
        if moved and pair.datapath is not None:
            pair.active_s = self._loop.now_s
            self._host.moved(pair, flow)

    def write_pending(self, pair: Pair, flow: Flow) -> bool:
        """Write to the target the bytes for which it had no room; True once nothing is left."""
        pending = flow.pending
        if pending is None:
            return True
        try:
            written = os.write(flow.target_fd, pending)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._fail(pair, flow.target_fd, error.errno)
            return False
        flow.written_bytes += written
        flow.carried_bytes += written
        pair.active_s = self._loop.now_s
        if written < len(pending):
            flow.pending = pending[written:]
            self._block(pair, flow)
            return False
        flow.pending = None
        if pair.datapath is not None or pair.slot >= 0:
            self._host.moved(pair, flow)
        return True

    def _block(self, pair: Pair, flow: Flow) -> None:
        """Wait for room at the target; a first EPOLLOUT reports room that is there already.

        Once watched for, every later edge comes by itself: a write that was cut short has set
        SOCK_NOSPACE (net/ipv4/tcp.c, wait_for_space).
        """
        flow.blocked = True
        fd = flow.target_fd
        if fd == pair.client_fd:
            if pair.client_mask & EPOLLOUT:
                return
            pair.client_mask = BLOCKED
        else:
            if pair.server_mask & EPOLLOUT:
                return
            pair.server_mask = BLOCKED
        self._loop.change(fd, BLOCKED)
