"""Logins whose passwords are compared beside the loop: few wait, and those who were wrong go last.

A flood of wrong ones cannot keep a right one out that comes from elsewhere: clients have their
turns (`PasswordChecks`), and when all places are taken, one makes room whose client was wrong
lately, else one of the network that has most. A client without a place is told to come again, and
finds one once each client of the flood has been wrong.

Comparing costs half of a processor at the most, and there are at most `1 / PACE_S` in a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.runtime.password_checks import Check, PasswordChecks
from pyforwarder.status.allowance import most_crowded

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.status.gate import Doubt

# With bcrypt of 12 rounds, a fifth of a second each, the last one waits for 7 s.
MOST_WAITING: Final = 16
PACE_S: Final = 0.05
# A client that has waited so long is told to come again, before the connection's own deadline.
MOST_S: Final = 12.0


class _Waiting(NamedTuple):
    doubt: Doubt
    check: Check
    pushed_out: Callable[[], None]
    timer: int


class LoginQueue:
    """Keeps the logins that wait for the comparison of their password."""

    def __init__(self, loop: Loop, is_right: Callable[[bytes, bytes], bool]) -> None:
        """`is_right` compares, in a thread of its own."""
        self._loop = loop
        self._is_right = is_right
        self._next_s = 0.0
        self._checks = PasswordChecks(loop, verify=self._compare)
        self._waiting: dict[int, _Waiting] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(
        self, doubt: Doubt, answer: Callable[[bool], None], pushed_out: Callable[[], None]
    ) -> int | bool | None:
        """`answer` is called on the loop with the result, or `pushed_out` if another goes first.

        True: it is right, that is known, and the callback is not called. None: there is no room.
        Else what to `forget` it by.
        """
        if len(self._waiting) >= MOST_WAITING and not self._make_room(doubt):
            doubt.drop()
            return None
        self._number = number = self._number + 1

        def settled(is_right: bool) -> None:
            self._loop.cancel(self._waiting.pop(number).timer)
            answer(is_right)

        check = self._checks.ask(doubt.stored, doubt.password, client=doubt.client, answer=settled)
        if isinstance(check, Check):
            timer = self._loop.after(MOST_S, lambda: self._push_out(number))
            self._waiting[number] = _Waiting(doubt, check, pushed_out, timer)
            return number
        if check is None:
            doubt.drop()
        return check

    def forget(self, number: int) -> None:
        """The client has gone, and has cost a comparison maybe: that counts as a wrong one."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._loop.cancel(waiting.timer)
            waiting.check.stop()
            waiting.doubt.settle(False)

    def _make_room(self, newcomer: Doubt) -> bool:
        """Push out one of those that were wrong lately, else one of those with most company."""
        suspects = [item for item in self._waiting.items() if item[1].doubt.is_suspect]
        # A client that was not wrong does not make room for one that was.
        some = suspects if suspects or newcomer.is_suspect else list(self._waiting.items())
        hosts = [waiting.doubt.host for _, waiting in some]
        if newcomer.is_suspect or not suspects:
            hosts.append(newcomer.host)
        crowd = most_crowded(hosts)
        if not crowd or len(some) in crowd:
            return False
        self._push_out(some[crowd[0]][0])
        return True

    def _push_out(self, number: int) -> None:
        """Drop a login whose password was not compared, which is not its client's fault."""
        waiting = self._waiting.pop(number)
        self._loop.cancel(waiting.timer)
        waiting.check.stop()
        waiting.doubt.drop()
        waiting.pushed_out()

    def _compare(self, stored: bytes, password: bytes) -> bool:
        """Compare, in the thread, and let the next comparison begin only after a pause as long as
        this one took.
        """
        before_s = time.perf_counter()
        if before_s < self._next_s:
            time.sleep(self._next_s - before_s)
            before_s = time.perf_counter()
        is_right = self._is_right(stored, password)
        now_s = time.perf_counter()
        self._next_s = now_s + max(PACE_S, now_s - before_s)
        return is_right
