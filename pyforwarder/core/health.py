"""What active checks make of a server's answers, and when which server is checked.

Pure: times come in as seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Health:
    """Active checks of one server: `fall` failures in a row take it down, `rise` successes back up.

    It begins up, but on trial: the first result alone decides, so that a server that was dead
    before the start is not used for `fall` intervals (HAProxy begins in the same way).
    """

    __slots__ = ("_against", "_fall", "_rise", "_trial", "is_up")

    def __init__(self, *, rise: int, fall: int, was_up: bool | None = None) -> None:
        """`was_up`: what checks have found before; it is not on trial then."""
        self.is_up = was_up is not False
        self._rise = rise
        self._fall = fall
        self._against = 0  # results in a row that contradict `is_up`
        self._trial = was_up is None

    def observe(self, *, passed: bool) -> bool:
        """Count one check's result; True when the server went up or down by it."""
        trial, self._trial = self._trial, False
        if passed == self.is_up:
            self._against = 0
            return False
        self._against += 1
        needed = self._rise if passed else self._fall
        if self._against < needed and not trial:
            return False
        self.is_up = passed
        self._against = 0
        return True


class CheckSchedule:
    """When which server is to be checked: every `interval_s`, spread evenly over it.

    Spread, because checks that all leave at once are a burst that the servers' own logs and
    limits notice, and because their results would change the upstream all at once.
    """

    __slots__ = ("_due_s", "_interval_s")

    def __init__(self, servers: Sequence[str], *, interval_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        step_s = interval_s / max(len(servers), 1)
        self._due_s = {server: now_s + index * step_s for index, server in enumerate(servers)}

    def take_due(self, now_s: float) -> list[str]:
        """The servers whose check is due, each scheduled again.

        After a pause of the process a server is checked once, not once for each interval missed.
        """
        due = [server for server, due_s in self._due_s.items() if due_s <= now_s]
        for server in due:
            missed = math.floor((now_s - self._due_s[server]) / self._interval_s)
            self._due_s[server] += (missed + 1) * self._interval_s
        return due

    def next_s(self) -> float:
        """When the next check is due; infinity without servers."""
        return min(self._due_s.values(), default=math.inf)
