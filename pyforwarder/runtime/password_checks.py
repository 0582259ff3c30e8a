"""Verifies passwords against hashes beside the loop: one at a time, clients in turns, all bounded.

A client that asks much delays itself alone: each has a queue of its own, and they are served one
after the other. What has been found right is remembered for a while, so that a client with many
connections is asked to wait once.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final

from pyforwarder.core.password import verify
from pyforwarder.runtime.loop import EPOLLIN

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

# What may wait, of one client and of all: a wait of some seconds, with the hashes that we make.
MOST_OF_CLIENT: Final = 16
MOST: Final = 256
# What is remembered, and how long.
MOST_KNOWN: Final = 1024
KNOWN_S: Final = 300.0


class Check:
    """A password that is being verified; `stop` it when the answer is not needed any more."""

    __slots__ = ("answer", "client", "digest", "is_stopped", "password", "stored")
    late = "the password was not verified in time"

    def __init__(
        self,
        stored: bytes,
        password: bytes,
        client: Hashable,
        digest: bytes,
        answer: Callable[[bool], None],
    ) -> None:
        self.stored = stored
        self.password = password
        self.client = client
        self.digest = digest
        self.answer = answer
        self.is_stopped = False

    def stop(self) -> None:
        """Have `answer` not called: the result is not needed any more."""
        self.is_stopped = True


class PasswordChecks:
    """Verifies passwords for one worker; its thread and descriptor come with the first."""

    def __init__(self, loop: Loop, *, verify: Callable[[bytes, bytes], bool] = verify) -> None:
        self._loop = loop
        self._verify = verify
        self._secret = os.urandom(32)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._changed = threading.Condition()
        self._queues: OrderedDict[Hashable, deque[Check]] = OrderedDict()
        self._count = 0  # of those that wait or are being looked at, on the loop
        self._of_client: dict[Hashable, int] = {}
        self._done: queue.SimpleQueue[tuple[Check, bool]] = queue.SimpleQueue()
        self._event_fd = -1

    def ask(
        self, stored: bytes, password: bytes, *, client: Hashable, answer: Callable[[bool], None]
    ) -> Check | bool | None:
        """Find out whether that is the password of the hash; `answer` is called on the loop.

        True: it is, that is known, and the callback is not called. None: too many wait already.
        """
        digest = hmac.digest(self._secret, stored + b"\0" + password, "sha256")
        known_until_s = self._known.get(digest)
        if known_until_s is not None:
            if self._loop.now_s < known_until_s:
                return True
            del self._known[digest]
        held = self._of_client.get(client, 0)
        if self._count >= MOST or held >= MOST_OF_CLIENT:
            return None
        if self._event_fd < 0:
            self._start()
        check = Check(stored, password, client, digest, answer)
        self._count += 1
        self._of_client[client] = held + 1
        with self._changed:
            self._queues.setdefault(client, deque()).append(check)
            self._changed.notify()
        return check

    def _start(self) -> None:
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.watch(self._event_fd, EPOLLIN, self._arrived, self._arrived)
        threading.Thread(target=self._work, name="passwords", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queues:
                    self._changed.wait()
                client, waiting = self._queues.popitem(last=False)
                check = waiting.popleft()
                if waiting:
                    self._queues[client] = waiting  # behind all others
            is_right = False
            if not check.is_stopped:
                # A fault of the library is no right password.
                with contextlib.suppress(Exception):
                    is_right = self._verify(check.stored, check.password)
            self._done.put((check, is_right))
            os.eventfd_write(self._event_fd, 1)

    def _arrived(self, _owner: object, fd: int, _mask: int) -> None:
        os.eventfd_read(fd)
        with contextlib.suppress(queue.Empty):
            while True:
                self._answer(*self._done.get_nowait())

    def _answer(self, check: Check, is_right: bool) -> None:
        self._count -= 1
        left = self._of_client[check.client] - 1
        if left:
            self._of_client[check.client] = left
        else:
            del self._of_client[check.client]
        if is_right:
            self._known[check.digest] = self._loop.now_s + KNOWN_S
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        if not check.is_stopped:
            check.answer(is_right)
