"""When no program runs any more that was running a while ago.

A program that has found a connection may be held up in the middle, for as long as the host of a
virtual machine likes, and works on its record when it goes on. The kernel knows when the last of
these has ended (a grace period of RCU), and says so to whom it makes wait for it. That takes some
10 ms, in which the keeper has other things to do: so a thread waits.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Grace:
    """One keeper's."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """`wait` returns when all programs have ended that ran when it was called.

        It is called in a thread, which begins with the first `want`.
        """
        self._wait = wait
        # All programs have ended that ran when `want` was called with this, or with less.
        self.passed_ns = 0
        self._wanted_ns = 0
        self._is_wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_complained = False

    def want(self, now_ns: int) -> None:
        """`passed_ns` is to be this, or more, when all programs that run now have ended."""
        self._wanted_ns = now_ns
        self._is_wanted.set()
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="grace", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # there are no tasks left: the next round wants it again
                self._complain(error)
                return
            self._thread = thread

    def _run(self) -> None:
        while True:
            self._is_wanted.wait()
            self._is_wanted.clear()
            # Behind that, and in front of the wait: what is wanted meanwhile is for the next one.
            self.pass_by(self._wanted_ns)

    def pass_by(self, wanted_ns: int) -> None:
        """Wait for it here and now."""
        try:
            self._wait()
        except OSError as error:
            self._complain(error)  # it is wanted again in the next round
            return
        self.passed_ns = wanted_ns

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            with contextlib.suppress(OSError):
                print(f"express: the kernel waits for no program: {error}", file=sys.stderr)
