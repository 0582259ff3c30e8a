"""Waiting for something to become true, with a deadline on the monotonic clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from pyforwarder.runtime.slowness import scaled_s

T = TypeVar("T")

# Generous: several people and programs share a test machine, and a test that fails for want of
# CPU time proves nothing.  What must be fast is measured, not waited for.
DEADLINE_S: Final = scaled_s(15.0)
# A pair for which a keeper had no time, on a host with much to do, is copied meanwhile and asked
# for again after 1, 2, 4 and 8 s (pyforwarder/worker/handover.py); and a worker that has died soon
# after its start is replaced a second later. So who waits for what comes of several processes
# waits longer than for a byte.
PATIENCE_S: Final = scaled_s(15.0) + DEADLINE_S
_LOOK_EVERY_S: Final = 0.01
# A wait is late by a tenth of itself, or by a twentieth of a second: a test that looks at a daemon
# more often than that keeps it, and the other tests, from their work.
_LATE: Final = 0.1
_SOONEST_S: Final = 0.002
_LATEST_S: Final = 0.05


def wait_for(look: Callable[[], T], what: str, *, deadline_s: float = PATIENCE_S) -> T:
    """The first true value that `look` returns.

    Raises:
        AssertionError: it returned none before the deadline; the text says `what` and the last
            value.
    """
    began_s = time.monotonic()
    never = threading.Event()
    while True:
        # Before the look: a machine that has stood still for all that time gets one afterwards.
        waited_s = time.monotonic() - began_s
        value = look()
        if value:
            return value
        if waited_s > deadline_s:
            raise AssertionError(f"{what}: not within {deadline_s} s; last seen: {value!r}")
        never.wait(min(max(waited_s * _LATE, _SOONEST_S), _LATEST_S))


def stays(look: Callable[[], object], what: str, *, for_s: float) -> None:
    """Look again and again for that long; for "nothing happens" there is no event to wait for.

    Raises:
        AssertionError: `look` returned something false.
    """
    end_s = time.monotonic() + for_s
    never = threading.Event()
    while time.monotonic() < end_s:
        value = look()
        assert value, f"{what}: not any more; last seen: {value!r}"
        never.wait(_LOOK_EVERY_S)
