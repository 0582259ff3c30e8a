"""A loop's time as a test says: it stands still, and goes on by so much at once."""

from __future__ import annotations

import time


class Clock:
    """Put in place of a loop's `time`: patch `time` of pyforwarder.runtime.loop with it."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()

    def monotonic(self) -> float:
        """The loop's time, in seconds."""
        return self.now_s

    def pass_time(self, seconds: float) -> None:
        """It is so much later."""
        self.now_s += seconds


class StillClock:
    """Put in place of the functions of `time`: no time passes, but no two moments are the same."""

    def __init__(self) -> None:
        self._now_ns = time.monotonic_ns()

    def monotonic_ns(self) -> int:
        """A nanosecond later than the last time."""
        self._now_ns += 1
        return self._now_ns

    def monotonic(self) -> float:
        """The same in seconds."""
        return self.monotonic_ns() / 1e9
