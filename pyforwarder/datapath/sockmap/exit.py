"""A pair leaves its sockmap, and both connections go on: no byte is lost, doubled or moved.

Another process is to have the sockets, in which their map and its program mean nothing. Taking a
socket out frees what the kernel still has for it there: what was redirected to it and is not with
its TCP yet, and what was passed and not read (sk_psock_drop). So first both queues are emptied. But
the next packet may come between the last look and the removal, and then its bytes would be lost
with no trace: userspace cannot hold a socket's lock over two system calls. And the removal does not
wait for the program: a packet that another processor gives it in just that moment is dropped, and
has been acknowledged (sk_psock_stop_verdict takes the program away from sk_psock_verdict_recv).

So for that moment what comes is *held* in the socket's own queue: with a low-water mark for reading
(SO_RCVLOWAT) above what waits there the kernel does not run the program (tcp_data_ready). A FIN, or
a queue that is nearly full, has it run all the same. So each direction is also redirected to a
*bypass*: a connection of ours, whose one end is in the map, and from whose other end we read. In
front of a bypass the program latches at the first packet that finds all that was passed consumed,
and passes nothing from then on. So the steps are, for both directions side by side:

1. Disarmed: all that comes is passed, and copied as usual, until what was redirected before is with
   the target's TCP, and not much that was passed waits to be read.
2. Armed again, with the bypass for a peer. A bypass has a usual send buffer until the supervisor
   has enlarged it; no pair leaves before.
3. What was passed is read; once nothing is left, nothing will be, as long as the bypass has room
   for what comes. So each socket is held and taken out at once then, before it is looked at the
   other. From here on what comes waits in its own queue, as always.
4. What the bypass has got stands behind what was read, and in front of what waits. Nearly always it
   is nothing.

How much it is says the program's count, and in the end the kernel's own counts are compared:
received, less what waits in the queue, is what has gone through our hands. A pair for which that is
not so is reset. Its bypasses go with it, as bytes of it may be in them: the next pair gets others.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import termios
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.copying import BULK_READ_BYTES
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.tcp_info import (
    FIN_RECEIVED,
    TCP_CLOSE,
    queued_for,
    received,
)
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import SO_COOKIE

if TYPE_CHECKING:
    import _socket
    from collections.abc import Sequence

    from pyforwarder.datapath.base import Flow, Pair, PairHost
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.ebpf.syscall import Map
    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
    from pyforwarder.datapath.sockmap.directions import Half

# What the kernel has counted it also delivers, within microseconds of a processor's time. One that
# has not got any for so long is not waited for: all other pairs would stand still. But so often it
# is looked, as a whole machine may have stood still for that time, and we with it.
_DELIVERY_S: Final = 0.5
_LEAST_LOOKS: Final = 100
_LOOK_MS: Final = 1
# A connection to ourselves stands at once, or never.
_CONNECT_S: Final = 0.5
# A reader that does not read is helped so often.
_HELP_S: Final = 0.1
# The most that a bypass must hold: more than a window that arrives within some microseconds.
_SEND_BUFFER_BYTES: Final = 4 << 20
# For so long pairs wait until a bypass has that. Then it is not to be had (the supervisor may lack
# CAP_NET_ADMIN), and the usual one has to do.
_ENLARGE_S: Final = 1.0
# So much is read at once, and then in our memory, for a target that takes nothing.
_MOST_PASSED_BYTES: Final = 1 << 20
# A peer that sends so fast that every look finds more can never leave: all others would stand
# still.
_MOST_LOOKS: Final = 256
# The limit on a backlog is not for a bypass: that of its send buffer is.
_NO_LIMIT: Final = (1 << 32) - 1


class ExitError(ForwarderError):
    """There is no way out of the sockmap on this host just now."""


class _LostError(Exception):
    """What the program has counted did not come."""


class _Bypass:
    """A connection to ourselves; what is redirected into it comes out of `read`."""

    def __init__(self, sockets: Map, host: PairHost) -> None:
        """Its one end is put into the map.

        Raises:
            OSError: it cannot be made; nothing is left of it.
        """
        self._in, self._out = _connected_to_ourselves()
        self._sockets = sockets
        try:
            self.cookie = int.from_bytes(
                self._in.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little"
            )
            self._in.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sockets.update(
                self.cookie.to_bytes(8, "little"), self._in.fileno().to_bytes(8, "little")
            )
            # SO_SNDBUF would make it smaller: the system's limit is less than what loopback has.
            host.enlarge(None, self._in, _SEND_BUFFER_BYTES)
        except OSError:
            self.close()
            raise
        self._made_s = time.monotonic()

    def has_room(self) -> bool:
        """Whether its send buffer is as large as it gets."""
        size_bytes = self._in.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        is_late = time.monotonic() - self._made_s >= scaled_s(_ENLARGE_S)
        return size_bytes >= _SEND_BUFFER_BYTES or is_late

    def read(self, count: int) -> bytes:
        """So many bytes, which the kernel has promised.

        Raises:
            _LostError: they do not come.
        """
        return _read_exactly(self._out.fileno(), count)

    def close(self) -> None:
        # The supervisor may have it still, and then closing it changes nothing.
        with contextlib.suppress(OSError):
            cookie = self._in.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
            self._sockets.delete(cookie)
        self._in.close()
        self._out.close()


class SockmapExit:
    """Takes pairs of one worker out of its sockmap, one after the other."""

    def __init__(
        self,
        datapath: SockmapDatapath,
        host: PairHost,
        *,
        window: PairWindow,
        sockets: Map,
    ) -> None:
        """See `close`."""
        self._datapath = datapath
        self._host = host
        self._window = window
        self._sockets = sockets
        self._bypasses: list[_Bypass] = []
        self._helped_s: dict[Flow, float] = {}

    def _make_bypasses(self) -> None:
        """Nothing happens if they are there.

        Raises:
            ExitError: there are none to be had.
        """
        try:
            while len(self._bypasses) < len(Direction):
                self._bypasses.append(_Bypass(self._sockets, self._host))
        except OSError as error:
            self.close()
            raise ExitError(str(error)) from error

    def close(self) -> None:
        """Nothing is left in the map but the pairs; `take_out` begins anew."""
        for one in self._bypasses:
            one.close()
        self._bypasses = []

    def take_out(self, pair: Pair) -> bool:
        """Whether the pair is out: its sockets are as they were before `join`.

        What was read of them and not written is in `Flow.pending`, of any size. False: not now; ask
        again in a while. Or the pair has ended.

        Raises:
            ExitError: a bypass cannot be made (no loopback interface, no room in the map); nothing
                has happened.
        """
        self._make_bypasses()
        if not all(bypass.has_room() for bypass in self._bypasses):
            return False
        halves = self._datapath.halves_of(pair)
        for half in halves:
            self._set(half, table.ARMED, 0)
        # Their locks: a packet that has found the direction armed has been counted.
        self._poll_locks(pair)
        for half in halves:
            self._datapath.advance(pair, half)
            if pair.datapath is not self._datapath:
                return False
        if not all(self._check_quiet(pair, half) for half in halves):
            return False
        for half in halves:
            self._helped_s.pop(half.flow, None)
        is_out = False
        try:
            is_out = self._leave(pair, halves)
        except (_LostError, OSError):  # or a socket has failed, which its event would have told
            self._host.broken(pair, CloseReason.INTERNAL)
        finally:
            if not is_out:
                # Its bytes are in there, or come yet, and must not come out in another pair.
                self.close()
        return is_out

    # Step 1

    def _check_quiet(self, pair: Pair, half: Half) -> bool:
        """Whether nothing of the direction is in the kernel's hands; else it is helped."""
        flow = half.flow
        if half.is_native:
            return True
        if flow.phase is Phase.CLOSED:
            half.delivered_redirected = self._word(half, table.REDIRECTED)
            return True
        passed = self._word(half, table.PASSED)
        waiting = passed - half.consumed_bytes - len(flow.pending or b"")
        target = _target(pair, flow)
        redirected = self._word(half, table.REDIRECTED)
        backlog = flow.written_bytes + redirected - queued_for(flow, target)
        if flow.phase is Phase.OPEN and waiting <= _MOST_PASSED_BYTES and not backlog:
            half.delivered_redirected = redirected
            return True
        # A peer that does not read may go on so for hours: its queue takes all there is.
        now_s = time.monotonic()
        wanted = max(0, backlog) + max(0, waiting) + len(flow.pending or b"")
        if wanted and now_s - self._helped_s.get(flow, 0.0) >= _HELP_S:
            self._helped_s[flow] = now_s
            self._host.enlarge(pair, target, wanted)
        return False

    # Steps 2 to 4

    def _leave(self, pair: Pair, halves: Sequence[Half]) -> bool:
        """True.

        Raises:
            OSError: a socket has failed.
            _LostError: bytes are missing.
        """
        live = [h for h in halves if not h.is_native and h.flow.phase is not Phase.CLOSED]
        leaving = [
            _LeavingDirection(self, half, self._bypasses[half.flow.direction]) for half in live
        ]
        for direction in leaving:
            direction.begin()
        for direction in leaving:
            direction.read_passed(pair)
            self._delete(direction.half)
        for half in halves:
            if half not in live:
                self._delete(half)
        self._poll_locks(pair)
        for direction in leaving:
            direction.finish()
        for half in halves:
            self._settle(pair, half)
        self._datapath.leave(pair)
        for direction in leaving:
            flow = direction.half.flow
            flow.pending = memoryview(bytes(direction.rest)) if direction.rest else None
            if len(direction.rest) > BULK_READ_BYTES:
                self._host.enlarge(pair, _target(pair, flow), len(direction.rest))
        return True

    def _delete(self, half: Half) -> None:
        """Take the source out of the map, if it is there."""
        if not half.is_native:
            with contextlib.suppress(FileNotFoundError):
                self._sockets.delete(half.cookie)

    def _settle(self, pair: Pair, half: Half) -> None:
        """The flow's counts are those of one that was copied all the time.

        Raises:
            _LostError: they are not what the kernel has counted.
        """
        flow = half.flow
        if half.is_native:
            return
        passed, redirected = self._word(half, table.PASSED), self._word(half, table.REDIRECTED)
        flow.read_bytes = half.base_read_bytes + passed + redirected
        if flow.phase is not Phase.CLOSED:
            taken_bytes = _taken_bytes(_source(pair, flow))
            if taken_bytes is not None and taken_bytes != flow.read_bytes:
                raise _LostError
        delivered = half.delivered_redirected
        flow.written_bytes += delivered
        flow.carried_bytes += delivered
        flow.carried_packets += self._word(half, table.REDIRECTED_PACKETS)
        at = pair.slot * self._window.WORDS64
        for place in (table.PASSED, table.REDIRECTED, table.REDIRECTED_PACKETS):
            self._window.words64[at + place[flow.direction]] = 0

    # What a direction that leaves needs

    def _poll_locks(self, pair: Pair) -> None:
        """Wait for what runs under the sockets' locks just now."""
        assert pair.server is not None
        received(pair.client)
        received(pair.server)

    def _word(self, half: Half, place: list[int]) -> int:
        at = half.pair.slot * self._window.WORDS64 + place[half.flow.direction]
        return int(self._window.words64[at])

    def _set(self, half: Half, place: list[int], value: int) -> None:
        at = half.pair.slot * self._window.WORDS32 + place[half.flow.direction]
        self._window.words32[at] = value

    def passed(self, half: Half) -> int:
        """How many bytes the program has passed."""
        return self._word(half, table.PASSED)

    def redirected(self, half: Half) -> int:
        """How many bytes it has redirected, to the target and to the bypass."""
        return self._word(half, table.REDIRECTED)

    def publish(self, half: Half, consumed: int) -> bool:
        """Tell the program that so many have been read; False: it knew."""
        at = half.pair.slot * self._window.WORDS64 + table.CONSUMED[half.flow.direction]
        if self._window.words64[at] == consumed:
            return False
        self._window.words64[at] = consumed
        return True

    def divert(self, half: Half, cookie: int) -> None:
        """Redirect to that socket from here on, beginning anew."""
        at = half.pair.slot * self._window.WORDS64 + table.PEER_COOKIE[half.flow.direction]
        self._window.words64[at] = cookie
        self._set(half, table.LATCHED, 0)
        self._set(half, table.LIMIT, _NO_LIMIT)
        self._set(half, table.ARMED, 1)


class _LeavingDirection:
    """One direction while its pair leaves."""

    def __init__(self, leaving: SockmapExit, half: Half, bypass: _Bypass) -> None:
        self._exit = leaving
        self.half = half
        self._bypass = bypass
        self.rest = bytearray(half.flow.pending or b"")  # read, and not written
        self._read = half.consumed_bytes + len(self.rest)  # of what was passed
        self._diverted = leaving.redirected(half)  # that much went to the target, or was taken here

    def begin(self) -> None:
        """From here on what is not passed comes to the bypass."""
        self._exit.divert(self.half, self._bypass.cookie)

    def read_passed(self, pair: Pair) -> None:
        """Until nothing more will be passed, and what comes is held.

        Raises:
            OSError: the source has failed.
            _LostError: it does not come, or there is no end of it.
        """
        source = _source(pair, self.half.flow)
        is_held = False
        for _ in range(_MOST_LOOKS):
            # A packet that came before the last `publish`, and is passed for it, is counted now.
            received(source)
            passed = self._exit.passed(self.half)
            # What came to the bypass came before what is passed now: the program redirects nothing
            # behind bytes that are not consumed. The lock keeps the two looks in this order.
            received(source)
            self._take_diverted()
            if passed > self._read:
                if is_held:
                    # Behind what is held nothing can be read (tcp_bpf_recvmsg_parser).
                    _release(source)
                    is_held = False
                self.rest += _read_exactly(source.fileno(), passed - self._read)
                self._read = passed
            elif self._exit.publish(self.half, passed):
                continue
            elif is_held:
                return
            else:
                _hold(source)
                is_held = True
        raise _LostError

    def finish(self) -> None:
        """The socket is out: nothing more comes here, and it is read as always.

        Raises:
            OSError: the source has failed.
            _LostError: something was passed after all.
        """
        _release(_source(self.half.pair, self.half.flow))
        if self._exit.passed(self.half) != self._read:
            raise _LostError
        self._take_diverted()

    def _take_diverted(self) -> None:
        redirected = self._exit.redirected(self.half)
        if redirected != self._diverted:
            self.rest += self._bypass.read(redirected - self._diverted)
            self._diverted = redirected


def _source(pair: Pair, flow: Flow) -> _socket.socket:
    sock = pair.client if flow.direction is Direction.UP else pair.server
    assert sock is not None
    return sock


def _target(pair: Pair, flow: Flow) -> _socket.socket:
    sock = pair.server if flow.direction is Direction.UP else pair.client
    assert sock is not None
    return sock


def _hold(sock: _socket.socket) -> None:
    """Have what comes wait in the socket's queue, with nobody told of it (tcp_epollin_ready).

    Not after a FIN, and not once the queue is nearly full. A mark at a quarter of it leaves the
    size of the receive buffer as it is (tcp_set_rcvlowat).

    Raises:
        OSError: the socket has failed.
    """
    queue_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    window_bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
    mark_bytes = max(1, min(queue_bytes // 4, window_bytes // 2))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark_bytes)


def _release(sock: _socket.socket) -> None:
    """The opposite; what waits is told of.

    Raises:
        OSError: the socket has failed.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _taken_bytes(sock: _socket.socket) -> int | None:
    """How much of what was received is not in the socket's queue any more; None: it was reset.

    Raises:
        _LostError: more comes each time that it is looked.
    """
    before = received(sock)
    for _ in range(_MOST_LOOKS):
        unread_bytes = _unread_bytes(sock)
        after = received(sock)
        if after == before:
            if after.state == TCP_CLOSE and _has_failed(sock):
                return None
            # Closed without an error: both FINs have come and gone.
            has_ended = after.state == TCP_CLOSE or after.state in FIN_RECEIVED
            return after.bytes_received - has_ended - unread_bytes
        before = after
    raise _LostError


def _has_failed(sock: _socket.socket) -> bool:
    """Whether it has an error, which stays there for its event."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # POLLERR is always told of
    return any(mask & select.POLLERR for _, mask in poll.poll(0))


def _unread_bytes(sock: _socket.socket) -> int:
    waiting = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, waiting)
    return waiting[0]


def _read_exactly(fd: int, count: int) -> bytes:
    """So many bytes of a socket that does not block.

    Raises:
        OSError: it has failed.
        _LostError: they do not come.
    """
    got = bytearray()
    looks, since_s = 0, time.monotonic()
    while len(got) < count:
        try:
            some = os.read(fd, min(count - len(got), BULK_READ_BYTES))
        except BlockingIOError:
            some = b""
        if some:
            got += some
            looks, since_s = 0, time.monotonic()
            continue
        # Nothing, or an end that has overtaken them (see directions.py).
        if looks >= _LEAST_LOOKS and time.monotonic() - since_s > scaled_s(_DELIVERY_S):
            raise _LostError
        looks += 1
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(_LOOK_MS)
    return bytes(got)


def _connected_to_ourselves() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection, neither of which blocks.

    Raises:
        OSError: there is no such connection to be had.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        listener.settimeout(_CONNECT_S)
        ours = socket.socket()
        try:
            ours.settimeout(_CONNECT_S)
            ours.connect(listener.getsockname())
            for _ in range(8):
                theirs, peer = listener.accept()
                # Anybody on this host may have connected, and would be handed a client's bytes.
                if peer == ours.getsockname():
                    for sock in (ours, theirs):
                        sock.setblocking(False)
                    return ours, theirs
                theirs.close()
            raise ConnectionError(errno.ECONNABORTED, "others connect")
        except OSError:
            ours.close()
            raise
