"""A process that speaks to a fleet's store, and what metrics tell of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pyforwarder.supervisor.processes.child import ChildProcess

if TYPE_CHECKING:
    from pyforwarder.supervisor.messages import StoreAnswered

Understood = TypeVar("Understood")

# Who may write in the store may write what is of no use for as long as it likes.
_LOG_EVERY_S: Final = 60.0


class StoreProcess(ChildProcess[Understood]):
    """Knows when its store has answered last, by what the process says."""

    part: str  # what the store is asked for, in metrics
    answered: Callable[[], object] | None = None  # called when `exchange` has changed
    _answered_s: float | None = None  # None: none is asked
    _unusable = 0  # values, found by this process and those before
    _before = 0  # those of these that others have found before this one, which counts from 0
    _logged = 0  # of these
    _log_at_s = 0.0  # not before

    def exchange(self) -> dict[str, Any] | None:
        """When the store has answered last, by time.monotonic(); None: it is asked nothing.

        One that has not answered yet counts as one that did when it was first asked.
        """
        if not self._is_wanted:
            self._answered_s = None
            return None
        if self._answered_s is None:
            self._answered_s = time.monotonic()
            self._unusable = self._before = self._logged = 0
        return {"part": self.part, "answered_s": self._answered_s, "unusable": self._unusable}

    def _note(self, message: StoreAnswered) -> None:
        now_s = time.monotonic()
        self._answered_s = now_s - message.answered_ago_ms / 1000
        self._unusable = self._before + message.unusable
        more = self._unusable - self._logged
        if more > 0 and now_s >= self._log_at_s:
            self._log.write("warning", "fleet_values_unusable", part=self.part, values=more)
            self._logged, self._log_at_s = self._unusable, now_s + _LOG_EVERY_S
        if self.answered is not None:
            self.answered()

    def _hang_up(self) -> None:
        super()._hang_up()
        self._before = self._unusable
