"""One direction of a pair in a sockmap: it is copied, or sleeps, as the program's counts say.

Each direction is in one of two hands:

- the *kernel's* (latched): packets are redirected, the worker sleeps and is woken by FIN and
  reset only;
- the *worker's*: packets are passed to it, because the backlog limit was reached or because the
  sockets have just changed hands. The worker first waits until the kernel has delivered all that
  it redirected (else its bytes would overtake them), then copies. When it has written all that it
  was passed, the program takes the direction back by itself at the next packet.

So the order of bytes rests on two counts that must meet: `consumed` (what the worker has written)
and `passed` (what the program gave it). `advance` is the one place that looks at them; it can be
called at any time, for any reason, and does the next thing that is due.

Rules that the kernel imposes, as in datapath.py:

- recv() would corrupt copied_seq (tcp_bpf_recvmsg_parser), so recv() is called only while
  passed > consumed, when the program redirects nothing.
- recv() == 0 is not believed (it may overtake passed bytes); a FIN is EPOLLRDHUP, and is carried on
  only after the drain test.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import failure
from pyforwarder.datapath.copying import BULK_READ_BYTES, FAIR_SHARE_BYTES, CopyDatapath
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.tcp_info import queued_for, received
from pyforwarder.runtime.loop import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, Timed

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Flow, Pair, PairHost
    from pyforwarder.datapath.ebpf.pair_table import PairWindow

_ASLEEP_MASK: Final = EPOLLRDHUP | EPOLLET
# Waiting for the kernel to deliver: its worker runs within microseconds unless the target's queue
# is full, and then EPOLLOUT tells. The timer covers what no event reports, and backs off.
_FIRST_RETRY_S: Final = 0.001
_LONGEST_RETRY_S: Final = 0.064
# Passed bytes that are stuck behind the other direction's backlog get help after this time (a
# target that reads has emptied its queue by then), and again if that was not enough.
_STUCK_S: Final = 0.02
_STUCK_AGAIN_S: Final = 0.5
# What a socket may be passed in that time; a receive buffer (tcp_rmem, 6 MiB) is part of it.
_MOST_PASSED_BYTES: Final = 64 << 20


class Half(Timed):
    """A direction's state in this datapath."""

    __slots__ = (
        "base_read_bytes",
        "consumed_bytes",
        "cookie",
        "datapath",
        "delivered_redirected",
        "flow",
        "is_native",
        "pair",
        "retry_s",
        "sleeping",
        "stuck_until_s",
    )

    def __init__(self, datapath: SockmapDirections, pair: Pair, flow: Flow, cookie: bytes) -> None:
        super().__init__()
        self.datapath = datapath
        self.pair = pair
        self.flow = flow
        self.cookie = cookie  # of the source socket
        self.base_read_bytes = flow.read_bytes
        self.consumed_bytes = 0  # of what was passed: read and written to the target
        self.delivered_redirected = 0  # redirected bytes that are known to be with the target's TCP
        self.sleeping = False
        self.is_native = False  # the kernel would not take the source: it is read as always
        self.retry_s = _FIRST_RETRY_S
        self.stuck_until_s = 0.0  # when to help; 0: not stuck

    def expired(self) -> None:
        """The retry timer: look again."""
        self.datapath.advance(self.pair, self)


class Halves:
    __slots__ = ("down", "up")

    def __init__(self, up: Half, down: Half) -> None:
        self.up = up
        self.down = down


class SockmapDirections:
    """The directions of one worker's pairs in its sockmap; `SockmapDatapath` has the pairs."""

    def __init__(self, host: PairHost, *, window: PairWindow, limit_bytes: int) -> None:
        """`limit_bytes` is that of a backlog, in pairs that enter from now on."""
        self._host = host
        self._loop = host.loop
        self._window = window
        self._words64 = window.words64
        self._words32 = window.words32
        self.limit_bytes = limit_bytes
        self._copying = CopyDatapath(host)
        self._buffer = bytearray(BULK_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._vector = [self._buffer]

    def advance(self, pair: Pair, half: Half) -> None:
        """Bring one direction as far as it goes now; safe to call at any time."""
        flow = half.flow
        if half.is_native:
            if self._copying.write_pending(pair, flow):
                self._copying.pump(pair, flow)
            return
        if flow.phase is Phase.CLOSED or half.sleeping:
            return
        at = pair.slot * self._window.WORDS64
        passed_at = at + table.PASSED[flow.direction]
        moved = 0
        while True:
            passed = self._words64[passed_at]
            if flow.pending is not None or passed != half.consumed_bytes:
                if self._has_lost(pair, flow):
                    self._host.broken(pair, CloseReason.INTERNAL)
                    return
                if not self._check_delivered(pair, half):
                    self._poll_again(pair, half)
                    return
                count = self._copy(pair, half)
                if count <= 0:
                    return
                moved += count
                if moved >= FAIR_SHARE_BYTES:
                    self._loop.soon(pair, flow.source_fd)
                    return
                continue
            if flow.phase is Phase.FIN_SEEN:
                if self._is_complete(pair, half):
                    self._loop.deadlines.stop(half)
                    self._host.delivered(pair, flow)
                else:
                    self._wait(pair, half)
                return
            self._loop.deadlines.stop(half)
            half.retry_s = _FIRST_RETRY_S
            if self._sleep(pair, half):
                return

    def _has_lost(self, pair: Pair, flow: Flow) -> bool:
        """Whether the program had to drop bytes (see trim() in redirect.c)."""
        at = pair.slot * self._window.WORDS32
        return self._words32[at + table.LATCHED[flow.direction]] > 0xFFFF

    def _copy(self, pair: Pair, half: Half) -> int:
        """Read what was passed and write it; 0 or less: no more for now, or the pair is broken."""
        flow = half.flow
        chunk: bytes | memoryview
        if flow.pending is not None:
            chunk = flow.pending
            count = len(chunk)
        else:
            try:
                count = os.readv(flow.source_fd, self._vector)
            except BlockingIOError:
                # Passed, but still on its way through the kernel's queue.
                self._poll_again(pair, half)
                return 0
            except OSError as error:
                self._fail(pair, flow.source_fd, error.errno)
                return 0
            if count == 0:
                # An EOF that overtakes passed bytes (tcp_bpf_recvmsg_parser sees SOCK_DONE and no
                # message yet): they are where EAGAIN would have them.
                self._poll_again(pair, half)
                return 0
            half.stuck_until_s = 0.0
            flow.read_bytes += count
            flow.carried_packets += 1
            chunk = self._view[:count]
        try:
            written = os.write(flow.target_fd, chunk)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._fail(pair, flow.target_fd, error.errno)
            return 0
        flow.written_bytes += written
        flow.carried_bytes += written
        half.consumed_bytes += written
        if written:
            pair.active_s = self._loop.now_s
            self._host.moved(pair, flow)
        if written < count:
            rest = chunk[written:]
            flow.pending = memoryview(bytes(rest)) if flow.pending is None else rest
            flow.blocked = True
            self._watch(pair)
            return -1
        flow.pending = None
        # Published only now, with every byte written: from this store on the program may redirect
        # the next packet, and it will come out behind these.
        self._words64[pair.slot * self._window.WORDS64 + table.CONSUMED[flow.direction]] = (
            half.consumed_bytes
        )
        return count

    def _poll_again(self, pair: Pair, half: Half) -> None:
        """Passed bytes cannot be copied yet: epoll tells when they can, if nothing is in front.

        What a socket was passed and what is redirected to it share one queue in the kernel
        (psock->ingress_skb). So passed bytes of one direction can be stuck behind the other's
        backlog, for as long as that peer does not read; and it may well be waiting for just these
        bytes to be taken. A direct connection has no such coupling, so it must be broken: the
        stuck socket's send buffer is enlarged by the backlog, which lets the kernel empty the
        queue, and the other direction is copied from then on, so that this happens once.

        It is also where the kernel loses count: a packet that is passed while that queue holds
        something is appended to it without being charged to the socket (sk_psock_verdict_apply),
        whose window then never closes. So help is not waited for once more than the limit has been
        passed, and a pair that goes on growing all the same is reset.
        """
        halves = pair.datapath_record
        assert isinstance(halves, Halves)
        other = halves.down if half is halves.up else halves.up
        source = pair.client if half is halves.up else pair.server
        assert source is not None
        self._wait(pair, half)
        at = pair.slot * self._window.WORDS64
        redirected = self._words64[at + table.REDIRECTED[other.flow.direction]]
        backlog = other.flow.written_bytes + redirected - queued_for(other.flow, source)
        if other.is_native or backlog <= 0:
            half.stuck_until_s = 0.0
            return
        now_s = self._loop.now_s
        waiting = self._words64[at + table.PASSED[half.flow.direction]] - half.consumed_bytes
        if not half.stuck_until_s:
            half.stuck_until_s = now_s + (_STUCK_S if waiting <= self.limit_bytes else 0.0)
        elif waiting > _MOST_PASSED_BYTES:
            self._host.broken(pair, CloseReason.BACKLOG)
            return
        if now_s >= half.stuck_until_s:
            half.stuck_until_s = now_s + _STUCK_AGAIN_S
            armed_at = pair.slot * self._window.WORDS32 + table.ARMED[other.flow.direction]
            self._words32[armed_at] = 0
            self._host.enlarge(pair, source, backlog)

    def _check_delivered(self, pair: Pair, half: Half) -> bool:
        """Note whether all that was redirected is with the target's TCP, so that we may write.

        Holds once true: while passed > consumed the program redirects nothing.
        """
        redirected = self._words64[
            pair.slot * self._window.WORDS64 + table.REDIRECTED[half.flow.direction]
        ]
        if redirected == half.delivered_redirected:
            return True
        target = pair.server if half.flow.direction is Direction.UP else pair.client
        assert target is not None
        if queued_for(half.flow, target) != half.flow.written_bytes + redirected:
            return False
        half.delivered_redirected = redirected
        half.retry_s = _FIRST_RETRY_S
        return True

    def _is_complete(self, pair: Pair, half: Half) -> bool:
        """The drain test: a FIN has come, and every byte before it is with the target's TCP."""
        flow = half.flow
        source = pair.client if flow.direction is Direction.UP else pair.server
        assert source is not None
        at = pair.slot * self._window.WORDS64
        # TCP_INFO first: the getsockopt waits for the lock under which the program is run for the
        # packet that carried the FIN (tcp_fin wakes us before tcp_data_ready).
        total = received(source).bytes_received - 1
        seen = (
            half.base_read_bytes
            + self._words64[at + table.PASSED[flow.direction]]
            + self._words64[at + table.REDIRECTED[flow.direction]]
        )
        if total != seen:
            return False
        if self._words64[at + table.PASSED[flow.direction]] != half.consumed_bytes:
            return False
        return self._check_delivered(pair, half)

    def _fail(self, pair: Pair, fd: int, error: int | None) -> None:
        self._host.broken(pair, failure(pair, fd, error or 0))

    # Sleeping, waking, waiting

    def _sleep(self, pair: Pair, half: Half) -> bool:
        """Hand the direction to the kernel and stop listening for its bytes; False: not yet.

        The store of `asleep`, the system call and the load of `passed` must stay in this order:
        the system call is the barrier between the two, and redirect.c has its mirror image.
        """
        flow = half.flow
        asleep_at = pair.slot * self._window.WORDS32 + table.ASLEEP[flow.direction]
        half.sleeping = True
        flow.blocked = False
        self._words32[asleep_at] = 1
        self._watch(pair)
        # ep_modify() has a full barrier, but _watch() may have found nothing to change.
        self._loop.change(flow.source_fd, self._mask_of(pair, flow.source_fd))
        passed = self._words64[pair.slot * self._window.WORDS64 + table.PASSED[flow.direction]]
        if passed == half.consumed_bytes and not flow.end_seen:
            return True
        self._wake(half)
        return False

    def _wake(self, half: Half) -> None:
        if half.sleeping:
            half.sleeping = False
            asleep_at = half.pair.slot * self._window.WORDS32 + table.ASLEEP[half.flow.direction]
            self._words32[asleep_at] = 0

    def _wait(self, pair: Pair, half: Half) -> None:
        """Look again when the target has room, and in any case a little later.

        EPOLLOUT comes when the target's full queue has room again (the kernel's worker, or our
        write, has set SOCK_NOSPACE); as long as the queue is not full only the timer looks, and
        leaves the CPU to the kernel's worker.
        """
        half.flow.blocked = True
        self._watch(pair)
        self._loop.deadlines.start(half, half.retry_s, self._loop.now_s)
        half.retry_s = min(_LONGEST_RETRY_S, half.retry_s * 4)

    @staticmethod
    def _mask_of(pair: Pair, fd: int) -> int:
        return pair.client_mask if fd == pair.client_fd else pair.server_mask

    def _watch(self, pair: Pair) -> None:
        """Watch both sockets for just what is waited for: every packet wakes a watch of EPOLLIN."""
        halves = pair.datapath_record
        assert isinstance(halves, Halves)
        for fd, inward, outward in (
            (pair.client_fd, halves.up, halves.down),
            (pair.server_fd, halves.down, halves.up),
        ):
            mask = _ASLEEP_MASK
            if inward.is_native or not inward.sleeping:
                mask |= EPOLLIN | EPOLLPRI
            if outward.flow.blocked:
                mask |= EPOLLOUT
            if fd == pair.client_fd:
                if mask != pair.client_mask:
                    pair.client_mask = mask
                    self._loop.change(fd, mask)
            elif mask != pair.server_mask:
                pair.server_mask = mask
                self._loop.change(fd, mask)
