"""A worker's requests to the keeper of spliced pairs: they are sent, and the loop waits for none.

The keeper reads requests in the order in which they were sent, and answers in this order. So does
its successor if it dies: the queue outlives it. So an answer also tells something about all earlier
requests: those without an answer will never get one. A keeper has died over them; how far it came
is not known, but no keeper will handle them any more. They are *lost*. To find out whether the last
request is lost, one more is sent that does nothing (`here`), once everything was read a second ago.

So each request ends in one of two ways: answered, or lost. While a keeper hangs, neither is known
until there is another keeper. What happens meanwhile, and when they are lost:

    join             the pair is paused, a second at most; then its record says if it has begun
    open_session     the session is copied; if it is lost, its record says if it has begun
    leave, reset     their sockets stay open, here or in the keeper's queue; lost: abort. Where too
                     many such wait, the pair itself waits, with its sockets, and is reported later
    abort            sent again if it is lost; it names the pair, so it cannot end another
    mute             the pair continues, and needs this worker until then; sent again later
    learn            connections like this one are opened as before
    narrow           the pair continues; the next too long packet requests it again
    adopted          the pair continues, and is shown as it was; sent again if it is lost
    close_sessions   their places stay in use meanwhile; sent again if it is lost
    session_adopted  the session continues; sent again if it is lost
    adopt, take_over, adopt_session
                     the pair continues without this worker; sent again if it is lost

Requests that cannot be sent, as the keeper has many to read, wait here, in order. Only `join`,
`open_session` and `mute` do not: they are sent again later anyway.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from pyforwarder.datapath.splice.keeper_client import (
    begins_until_s,
    is_unread,
    next_number,
    read_answer,
    read_timeout_s,
)
from pyforwarder.datapath.splice.keeper_replies import is_late
from pyforwarder.runtime.loop import EPOLLIN, Loop

# The answer, or None: the request is lost. And the descriptors that came with it: those that are
# removed from the list belong to the callee, the others are closed.
Answered = Callable[[dict[str, Any] | None, list[int]], None]

# Requests that are sent and not answered. Their answers fit into the queue to this worker.
MOST_UNDER_WAY: Final = 64
# So many more for requests during which something is paused, or which are sent again if there is no
# room.
_MOST_URGENT: Final = 16
# Requests with two sockets that wait here, with duplicated descriptors (worker/process.py reserves
# them). Requests without sockets are at most as many as there are pairs.
MOST_HELD: Final = 32
# Requests that are of no use later.
_HASTY: Final = frozenset({"join", "learn", "open_session"})
# Answers in one turn of the loop: handling one may take a millisecond.
_MOST_IN_A_TURN: Final = 8
_ALWAYS_S: Final = 1e12  # later than any time
# The programs read another clock (ktime_get_mono_fast_ns): after so long both are past a moment.
_MARGIN_S: Final = 0.01
# How often a request without an answer is checked, and waiting requests are tried again.
_POLL_S: Final = 1.0
_AGAIN_S: Final = 0.05
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
_PASSING: Final = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EINTR)


def _nothing(_answer: dict[str, Any] | None, _fds: list[int]) -> None:
    """Ignore the answer."""


class PendingRequest:
    """A request that was sent and not answered."""

    __slots__ = ("sent_s", "then")

    def __init__(self, then: Answered) -> None:
        self.then = then
        self.sent_s = time.monotonic()


class _Waiting:
    """A request that could not be sent yet; its descriptors are duplicates."""

    __slots__ = ("do", "fds", "fields", "then")

    def __init__(self, do: str, then: Answered, fds: list[int], fields: dict[str, object]) -> None:
        self.do = do
        self.then = then
        self.fds = fds
        self.fields = fields


class KeeperAsker:
    """One worker's requests to the keeper."""

    def __init__(self, loop: Loop, sock: socket.socket, *, is_patient: bool = False) -> None:
        """The caller keeps `sock`, and does not read from it.

        `is_patient`: requests that are of no use later need not be read at once, either.
        """
        self._loop = loop
        self._sock = sock
        self._is_patient = is_patient
        self._under_way: dict[
            int, PendingRequest
        ] = {}  # by number, in the order in which they were sent
        self._waiting: deque[_Waiting] = deque()
        self._held = 0  # of these, those with descriptors
        self._received = 0  # answers
        self._is_silent = False  # the keeper has not answered an urgent request in time
        self._polls = False  # a timer is set
        # Called when there is room for descriptors.
        self._for_room: Callable[[], bool] | None = None
        self.lacks_room = False  # for the last request
        self.is_over = False  # no keeper will ever answer
        self._listens = False  # the socket is watched only while an answer is due
        loop.watch(sock.fileno(), 0, self._readable, None)

    @property
    def longest_s(self) -> float:
        """After so long from `ask_now` no pair begins any more."""
        return begins_until_s(read_timeout_s(is_patient=self._is_patient)) + _MARGIN_S

    @property
    def unsettled(self) -> int:
        """How many requests were neither answered nor lost."""
        return len(self._under_way) + len(self._waiting)

    def ask_now(self, do: str, fds: Sequence[int] = (), **fields: object) -> PendingRequest | None:
        """Send a request at once; the caller sets its `then`. None: no keeper would read it.

        It may overtake requests that wait. The caller may close the descriptors afterwards.
        """
        if self.is_over or len(self._under_way) >= MOST_UNDER_WAY + _MOST_URGENT:
            return None
        if self._is_silent and is_unread(self._sock):
            return None
        try:
            return self._send(do, _nothing, fds, fields)
        except OSError:
            return None

    def give_up(self, asked: PendingRequest) -> None:
        """The request was not answered in time; its answer is not needed any more."""
        asked.then = _nothing
        self._is_silent = True

    def ask(
        self, do: str, then: Answered = _nothing, fds: Sequence[int] = (), **fields: object
    ) -> bool:
        """Send a request when there is room for it, after all earlier ones.

        The caller may close the descriptors afterwards. False: nothing is sent, because it has
        descriptors and too many such requests wait already (`lacks_room`: see
        `when_there_is_room`), or no keeper will ever answer, or it cannot be sent.
        """
        self.lacks_room = False
        if self.is_over:
            return False
        if not self._waiting and len(self._under_way) < MOST_UNDER_WAY:
            try:
                self._send(do, then, fds, fields)
                return True
            except OSError as error:
                if error.errno not in _PASSING:
                    return False
        held: list[int] = []
        if fds:
            if self._held >= MOST_HELD:
                self.lacks_room = True
                return False
            try:
                for fd in fds:
                    held.append(os.dup(fd))  # noqa: PERF401 - the second may fail
            except OSError as error:
                _close(held)
                self.lacks_room = error.errno in _NO_DESCRIPTORS
                return False
            self._held += 1
        self._waiting.append(_Waiting(do, then, held, fields))
        self._poll_later()
        return True

    def when_there_is_room(self, action: Callable[[], bool]) -> None:
        """Call `action` whenever there is more room for requests with descriptors, as long as it
        returns True.

        Also when no keeper will ever answer any more.
        """
        self._for_room = action
        self._poll_later()

    def receive(self) -> None:
        """Handle some of the answers that have come, and send requests that wait for room."""
        try:
            for _ in range(_MOST_IN_A_TURN):
                if self.is_over:
                    break
                self._sock.setblocking(False)
                answer, fds = read_answer(self._sock)
                self._settle(answer, fds)
        except BlockingIOError:
            pass
        except OSError:
            self._end()
        self._send_waiting()
        self._offer_room()
        self._listen()

    def wait_until(self, done: Callable[[], bool], wait_s: float) -> bool:
        """Handle answers until `done` returns True, for `wait_s` at most; returns whether it did.

        For a worker that has no other work yet, or any more.
        """
        until_s = time.monotonic() + wait_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while not done():
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self.is_over:
                return False
            poll.poll(math.ceil(min(left_s, _AGAIN_S) * 1000))
            self.receive()
            self._ask_if_lost()
        return True

    def finish(self, wait_s: float) -> bool:
        """Wait until every request is answered or lost, for `wait_s` at most; returns whether all
        are.
        """
        return self.wait_until(lambda: not self.unsettled, wait_s)

    def finish_while_heard(self, pause_s: float, most_s: float) -> bool:
        """The same, as long as no pause between answers is longer than `pause_s`; also for room to
        send.
        """
        until_s = time.monotonic() + most_s

        def is_done() -> bool:
            return not self.unsettled and self._for_room is None

        while not is_done():
            before = self._received

            def goes_on(before: int = before) -> bool:
                return is_done() or self._received != before

            if not self.wait_until(goes_on, min(pause_s, until_s - time.monotonic())):
                return False
        return True

    def close(self) -> None:
        """Give up waiting requests, and receive no more answers; the loop does not run again."""
        self.is_over = True
        self._for_room = None
        self._under_way.clear()
        while self._waiting:
            _close(self._waiting.popleft().fds)

    def _readable(self, _owner: object, _fd: int, _mask: int) -> None:
        self.receive()

    def _send(
        self, do: str, then: Answered, fds: Sequence[int], fields: dict[str, object]
    ) -> PendingRequest:
        number = next_number()
        until_s = _ALWAYS_S
        if do in _HASTY:
            until_s = time.monotonic() + read_timeout_s(is_patient=self._is_patient)
        request = {"do": do, "n": number, "until": until_s, **fields}
        self._sock.setblocking(False)
        socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
        asked = self._under_way[number] = PendingRequest(then)
        self._listen()
        self._poll_later()
        return asked

    def _listen(self) -> None:
        listens = bool(self._under_way)
        if listens is not self._listens and not self.is_over:
            self._listens = listens
            self._loop.change(self._sock.fileno(), EPOLLIN if listens else 0)

    def _send_waiting(self) -> None:
        while self._waiting and len(self._under_way) < MOST_UNDER_WAY:
            first = self._waiting[0]
            try:
                self._send(first.do, first.then, first.fds, first.fields)
            except OSError as error:
                if error.errno in _PASSING:
                    return
                self._drop(self._waiting.popleft())
            else:
                self._waiting.popleft()
                self._release(first)

    def _release(self, waiting: _Waiting) -> None:
        if waiting.fds:
            self._held -= 1
            _close(waiting.fds)

    def _drop(self, waiting: _Waiting) -> None:
        self._release(waiting)
        self._deliver(waiting.then, None, [])

    def _settle(self, answer: dict[str, Any], fds: list[int]) -> None:
        number = answer.get("n")
        if number not in self._under_way:
            _close(fds)  # an answer to a request of a worker that is dead by now
            return
        self._is_silent = is_late(answer)
        self._received += 1
        lost = []
        while (first := next(iter(self._under_way))) != number:
            lost.append(self._under_way.pop(first))
        asked = self._under_way.pop(first)
        for one in lost:
            self._deliver(one.then, None, [])
        self._deliver(asked.then, answer, fds)

    def _deliver(self, then: Answered, answer: dict[str, Any] | None, fds: list[int]) -> None:
        try:
            then(answer, fds)
        except Exception as error:
            self._loop.on_error(then, error)
        finally:
            _close(fds)

    def _end(self) -> None:
        """The other end is closed, and no keeper will ever have it again."""
        self.is_over = True
        self._loop.forget(self._sock.fileno())
        asked, self._under_way = list(self._under_way.values()), {}
        for one in asked:
            self._deliver(one.then, None, [])
        while self._waiting:
            self._drop(self._waiting.popleft())
        self._offer_room()

    def _offer_room(self) -> None:
        action = self._for_room
        if action is None:
            return
        self._for_room = None  # `action` may set it again
        wants_more = False
        try:
            wants_more = action()
        except Exception as error:
            self._loop.on_error(action, error)
        if wants_more and not self.is_over:
            self._for_room = action
            self._poll_later()

    def _poll_later(self) -> None:
        is_due = self.unsettled or self._for_room is not None
        if not self._polls and is_due and not self.is_over:
            self._polls = True
            self._loop.after(_POLL_S if self._under_way else _AGAIN_S, self._poll)

    def _poll(self) -> None:
        """Try to send waiting requests, and find out if the last request is lost."""
        self._polls = False
        if self.is_over:
            return
        self._send_waiting()
        self._offer_room()
        self._ask_if_lost()
        self._poll_later()

    def _ask_if_lost(self) -> None:
        # As long as something is unread, the answer to that will tell.
        if self._under_way and not is_unread(self._sock):
            newest = next(reversed(self._under_way.values()))
            if time.monotonic() - newest.sent_s >= _POLL_S:
                with contextlib.suppress(OSError):
                    self._send("here", _nothing, (), {})


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
