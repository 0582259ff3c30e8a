"""Tells the supervisor now and then that the store has answered, and what of it was of no use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.fleet.supervisor import Listening

# Somebody who is to be told of a silent store waits for a minute or so.
EVERY_S: Final = 5.0


class Exchanges:
    """Tells the supervisor when the store has answered, for a process that speaks to a store."""

    def __init__(self, supervisor: Listening) -> None:
        self._supervisor = supervisor
        self._answered_s = 0.0  # as was told
        self._due_s = 0.0

    def tell(self, answered_s: float, now_s: float, *, unusable: int = 0) -> None:
        """The store has answered last at `answered_s` (0: never); call it in each turn.

        `unusable` counts the values there that were of no use, since this process has begun.
        """
        if now_s < self._due_s or answered_s <= self._answered_s:
            return
        self._answered_s, self._due_s = answered_s, now_s + EVERY_S
        ago_ms = int(1000 * max(0.0, now_s - answered_s))
        self._supervisor.send({"answered_ago_ms": ago_ms, "unusable": unusable})
