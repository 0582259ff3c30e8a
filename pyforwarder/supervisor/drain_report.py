"""What operators are told of an end: how many pairs it waits for, until when, what it resets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.log import rfc3339

if TYPE_CHECKING:
    from pyforwarder.runtime.counters import Counters
    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.worker.log import Log


def log_drain(log: Log, counters: Counters, *, until_unix_s: float) -> None:
    """Log that a drain begins, if there are pairs to wait for."""
    pairs = counters.total(Counter.PAIRS_OPEN)
    if pairs:
        log.write("info", "draining", pairs=pairs, until=rfc3339(until_unix_s))


def log_resets(log: Log, counters: Counters, lock: InstanceLock) -> None:
    """Note how many pairs are reset now: in the log, and for the command `down`, which looks
    there.
    """
    pairs = counters.total(Counter.PAIRS_OPEN)
    lock.write_reset(pairs)
    if pairs:
        log.write("info", "resetting", pairs=pairs)
