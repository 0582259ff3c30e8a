"""A process that speaks to a fleet's store, and what metrics tell of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pyforwarder.supervisor.child import ChildProcess

if TYPE_CHECKING:
    from pyforwarder.supervisor.messages import StoreAnswered

Said = TypeVar("Said")


class StoreProcess(ChildProcess[Said]):
    """Knows when its store has answered last, by what the process says."""

    part: str  # what the store is asked for, in metrics
    answered: Callable[[], object] | None = None  # called when `exchange` has changed
    _answered_s: float | None = None  # None: none is asked
    _unusable = 0

    def exchange(self) -> dict[str, Any] | None:
        """When the store has answered last, by time.monotonic(); None: it is asked nothing.

        One that has not answered yet counts as one that did when it was first asked.
        """
        if not self._is_wanted:
            self._answered_s = None
            return None
        if self._answered_s is None:
            self._answered_s, self._unusable = time.monotonic(), 0
        return {"part": self.part, "answered_s": self._answered_s, "unusable": self._unusable}

    def _note(self, said: StoreAnswered) -> None:
        self._answered_s = time.monotonic() - said.answered_ago_ms / 1000
        before, self._unusable = self._unusable, said.unusable
        if said.unusable > before:  # else it is another process, that counts from 0
            more = said.unusable - before
            self._log.write("warning", "fleet_values_unusable", part=self.part, values=more)
        if self.answered is not None:
            self.answered()
