"""The event loop of a worker: edge-triggered epoll on raw descriptors, deadlines, deferred work.

Plain lists indexed by descriptor and no object per event, because the connection rate is made
here. One rule protects it from epoll's oldest trap: a descriptor is closed only after the batch of
events in which it was given up, so that an old event can never reach a new connection.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import _socket

EPOLLIN: Final = select.EPOLLIN
EPOLLPRI: Final = select.EPOLLPRI
EPOLLOUT: Final = select.EPOLLOUT
EPOLLRDHUP: Final = select.EPOLLRDHUP
EPOLLERR: Final = select.EPOLLERR
EPOLLHUP: Final = select.EPOLLHUP
EPOLLET: Final = select.EPOLLET

# So many events are taken before what is due has its turn.
MOST_EVENTS: Final = 256
_LONGEST_WAIT_S: Final = 1.0  # the loop looks at its deadlines at least this often

# Called with the owner given at watch(), the descriptor and the event mask.
Callback = Callable[[Any, int, int], None]


class Timed:
    """Something with one deadline; subclasses add their own slots and say what it means."""

    __slots__ = ("_expires_s", "_queue")

    _queue: dict[Timed, None] | None
    _expires_s: float

    def __init__(self) -> None:
        self._queue = None
        self._expires_s = 0.0

    def expired(self) -> None:
        """The deadline has passed."""
        raise NotImplementedError


class Deadlines:
    """Deadlines of many connections, at O(1) each.

    All deadlines of one length stand in one insertion-ordered dict, so the oldest is always the
    first; a program has only a handful of lengths (first packet, connect, idle, ...).
    """

    def __init__(self) -> None:
        self._queues: dict[float, dict[Timed, None]] = {}
        # No deadline passes before: the loop need not look at every one of its turns. It may be
        # too early, as `stop` does not search for the next one.
        self.soonest_s = math.inf

    def start(self, item: Timed, length_s: float, now_s: float) -> None:
        """Give `item` a deadline `length_s` from now, in place of the one it had."""
        queue = item._queue
        if queue is not None:
            del queue[item]
        queue = self._queues.get(length_s)
        if queue is None:
            queue = self._queues[length_s] = {}
        queue[item] = None
        item._queue = queue
        item._expires_s = expires_s = now_s + length_s
        if expires_s < self.soonest_s:
            self.soonest_s = expires_s

    def stop(self, item: Timed) -> None:
        """Take the deadline away; nothing happens if there is none."""
        queue = item._queue
        if queue is not None:
            del queue[item]
            item._queue = None

    def run_expired(self, now_s: float, on_error: Callable[[Any, Exception], None]) -> None:
        """Call `expired` of each owner whose deadline has passed; exceptions go to `on_error`.

        One that another's `expired` stops or starts again before its turn is not called: what
        ended with the other (a pair and its datapath's timer, say) must not be woken any more.
        """
        due: dict[Timed, None] = {}
        for length_s, queue in list(self._queues.items()):
            passed = []
            for item in queue:
                if item._expires_s > now_s:
                    break
                passed.append(item)
            for item in passed:
                del queue[item]
                item._queue = due
                due[item] = None
            # Lengths come and go with reloads; an empty queue is made again when needed.
            if not queue:
                del self._queues[length_s]
        next_s = self.next_s()
        self.soonest_s = math.inf if next_s is None else next_s
        for item in list(due):
            if item._queue is due:
                item._queue = None
                try:
                    item.expired()
                except Exception as error:
                    on_error(item, error)

    def next_s(self) -> float | None:
        """When the earliest deadline passes; None without any."""
        firsts = [next(iter(queue))._expires_s for queue in self._queues.values() if queue]
        return min(firsts) if firsts else None


class Loop:
    """Calls back for descriptors, deadlines and deferred work, until stopped."""

    def __init__(self) -> None:
        self.most_events = MOST_EVENTS
        self._epoll = select.epoll()
        self._callbacks: list[Callback | None] = []
        self._owners: list[Any] = []
        self._to_close: list[int] = []
        self._sockets_to_close: list[_socket.socket] = []
        self._soon: deque[tuple[Any, int]] = deque()
        self._deferred: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._timers: dict[int, tuple[float, Callable[[], None]]] = {}
        self._next_timer = 0
        self._timers_from_s = math.inf  # none of them is due before, as `Deadlines.soonest_s` is
        self._grow(256)
        self.deadlines = Deadlines()
        self.on_error: Callable[[Any, Exception], None] = self._raise
        self.now_s = time.monotonic()
        self.running = True

    @staticmethod
    def _raise(owner: Any, error: Exception) -> None:
        raise error

    def _grow(self, fd: int) -> None:
        missing = fd + 256 - len(self._callbacks)
        if missing > 0:
            self._callbacks.extend([None] * missing)
            self._owners.extend([None] * missing)

    def watch(self, fd: int, mask: int, callback: Callback, owner: Any) -> None:
        """Call `callback(owner, fd, events)` on the events of `mask` (EPOLLET is the caller's)."""
        if fd >= len(self._callbacks):
            self._grow(fd)
        self._callbacks[fd] = callback
        self._owners[fd] = owner
        self._epoll.register(fd, mask)

    def watch_two(self, one: int, other: int, mask: int, callback: Callback, owner: Any) -> None:
        """`watch` both."""
        callbacks, owners = self._callbacks, self._owners
        if one >= len(callbacks) or other >= len(callbacks):
            self._grow(max(one, other))
        callbacks[one] = callbacks[other] = callback
        owners[one] = owners[other] = owner
        register = self._epoll.register
        register(one, mask)
        register(other, mask)

    def change(self, fd: int, mask: int) -> None:
        """Watch for other events; those already there are reported again, edge-triggered too."""
        self._epoll.modify(fd, mask)

    def redirect(self, fd: int, callback: Callback) -> None:
        """Send the descriptor's events to another callback; what is watched for stays."""
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        """Stop watching, if it was watched; events of the running batch do not arrive either."""
        if fd < len(self._callbacks) and self._callbacks[fd] is not None:
            self._callbacks[fd] = self._owners[fd] = None
            self._epoll.unregister(fd)

    def close(self, fd: int) -> None:
        """Forget the descriptor now and close it at the end of the running batch.

        It need not have been watched. The number cannot be given out again before that. Closing
        removes it from epoll too, since this process alone holds it.
        """
        if fd < len(self._callbacks):
            self._callbacks[fd] = self._owners[fd] = None
        self._to_close.append(fd)

    def close_socket(self, fd: int, sock: _socket.socket) -> None:
        """Close a socket object as `close` does a descriptor."""
        if fd < len(self._callbacks):
            self._callbacks[fd] = self._owners[fd] = None
        self._sockets_to_close.append(sock)

    def close_two(
        self, one: int, sock: _socket.socket | None, other: int, other_sock: _socket.socket | None
    ) -> None:
        """`close_socket` of two watched descriptors, or `close` of one without an object."""
        callbacks, owners = self._callbacks, self._owners
        callbacks[one] = callbacks[other] = owners[one] = owners[other] = None
        if sock is None:
            self._to_close.append(one)
        else:
            self._sockets_to_close.append(sock)
        if other_sock is not None:
            self._sockets_to_close.append(other_sock)
        else:
            self._to_close.append(other)

    def soon(self, owner: Any, fd: int) -> None:
        """Call the handler of the descriptor once more, with mask 0, after the running batch.

        For work cut into fair pieces; nothing happens if the descriptor has another owner by then.
        """
        self._soon.append((owner, fd))

    def defer(self, action: Callable[[Any], None], owner: Any) -> None:
        """Run `action(owner)` after the running batch, outside what is running now."""
        self._deferred.append((action, owner))

    def after(self, delay_s: float, action: Callable[[], None]) -> int:
        """Run `action` once, `delay_s` from now; the number cancels it."""
        self._next_timer += 1
        due_s = time.monotonic() + delay_s
        self._timers[self._next_timer] = (due_s, action)
        if due_s < self._timers_from_s:
            self._timers_from_s = due_s
        return self._next_timer

    def cancel(self, timer: int) -> None:
        """Forget a timer; nothing happens if it has run."""
        self._timers.pop(timer, None)

    def fileno(self) -> int:
        """The epoll descriptor, for a caller that closes all that it does not name."""
        return self._epoll.fileno()

    def stop(self) -> None:
        """Leave `run` after the present batch."""
        self.running = False

    def _timeout_s(self) -> float:
        if self._soon or self._deferred:
            return 0.0
        next_s = min(self.deadlines.soonest_s, self._timers_from_s)
        wait_s = next_s - time.monotonic()
        if wait_s >= _LONGEST_WAIT_S:
            return _LONGEST_WAIT_S
        return wait_s if wait_s > 0.0 else 0.0

    def run(self) -> None:
        """Serve until `stop`; an exception of a callback goes to `on_error` with its owner."""
        while self.running:
            self.run_once(self._timeout_s())

    def run_once(self, timeout_s: float) -> None:
        """Handle one batch of events, then what is due and what was put off."""
        try:
            events = self._epoll.poll(timeout_s, self.most_events)
        except InterruptedError:
            events = []
        self.now_s = time.monotonic()
        callbacks = self._callbacks
        owners = self._owners
        for fd, mask in events:
            callback = callbacks[fd]
            if callback is not None:
                try:
                    callback(owners[fd], fd, mask)
                except Exception as error:
                    self.on_error(owners[fd], error)
        # Only what was put off before now: work that puts itself off again waits for new events.
        for _ in range(len(self._soon)):
            owner, fd = self._soon.popleft()
            callback = callbacks[fd]
            if callback is not None and owners[fd] is owner:
                try:
                    callback(owner, fd, 0)
                except Exception as error:
                    self.on_error(owner, error)
        for _ in range(len(self._deferred)):
            action, owner = self._deferred.popleft()
            try:
                action(owner)
            except Exception as error:
                self.on_error(owner, error)
        if self.deadlines.soonest_s <= self.now_s:
            self.deadlines.run_expired(self.now_s, self.on_error)
        if self._timers_from_s <= self.now_s:
            self._run_due()
        if self._to_close or self._sockets_to_close:
            self._close_given_up()

    def _run_due(self) -> None:
        now_s = self.now_s
        due = [n for n, (due_s, _) in self._timers.items() if due_s <= now_s]
        later = (due_s for due_s, _ in self._timers.values() if due_s > now_s)
        self._timers_from_s = min(later, default=math.inf)
        for number in due:
            entry = self._timers.pop(number, None)
            if entry is not None:
                try:
                    entry[1]()
                except Exception as error:
                    self.on_error(entry[1], error)

    def _close_given_up(self) -> None:
        for fd in self._to_close:
            os.close(fd)
        self._to_close.clear()
        for sock in self._sockets_to_close:
            sock.close()
        self._sockets_to_close.clear()

    def dispose(self) -> None:
        """Close the epoll descriptor and all that was given up."""
        self._close_given_up()
        self._epoll.close()
