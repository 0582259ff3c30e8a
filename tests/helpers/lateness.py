"""How late this host is: how much longer than it should a thread sleeps that does nothing else."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

_SLEEP_S: Final = 0.02
# What is waited for is done by several processes in turn, and each may be late: so it is the sum of
# a second that counts, not the longest sleep.
_WITHIN_S: Final = 1.0
# A bound to which more is added could not be missed any more: ends of connections that are left
# alone send again 1.3 s after they could (tests/kernel/fleet/test_failover.py), and 0.5 s are
# allowed.
MOST_LATE_S: Final = 0.7


class Lateness:
    """How late sleeps have ended: the most that those of any one second have together."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque()  # when, and how late
        self._most_s = 0.0

    def ended(self, due_s: float, now_s: float) -> None:
        """A sleep that was to end at `due_s` has ended now."""
        self._ended.append((now_s, max(0.0, now_s - due_s)))
        while self._ended[0][0] <= now_s - _WITHIN_S:
            self._ended.popleft()
        self._most_s = max(self._most_s, sum(late_s for _, late_s in self._ended))

    def most_s(self) -> float:
        """At most `MOST_LATE_S`."""
        return min(self._most_s, MOST_LATE_S)


class HostLateness:
    """A thread that sleeps, and sees how late it is woken up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lateness = Lateness()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Forget how late it was so far."""
        with self._lock:
            self._lateness = Lateness()

    def most_s(self) -> float:
        """How much later than elsewhere something may be on this host, since `mark`."""
        with self._lock:
            return self._lateness.most_s()

    def _run(self) -> None:
        due_s = time.monotonic() + _SLEEP_S
        while not self._is_over.wait(_SLEEP_S):
            with self._lock:
                self._lateness.ended(due_s, time.monotonic())
            due_s = time.monotonic() + _SLEEP_S

    def close(self) -> None:
        """End it."""
        self._is_over.set()
        self._thread.join()
