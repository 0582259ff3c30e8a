"""When all programs have returned that were running at some moment.

A program that has found a connection may be suspended in the middle, by the hypervisor of a virtual
machine even for seconds, and continue to work on its record later. The kernel knows when the last
of these programs has returned (a grace period of RCU), and can make a caller wait for it. That
takes some 10 ms, in which the keeper has other work: so a thread waits.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Grace:
    """Grace periods, for one keeper."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """`wait` returns when all programs have returned that were running when it was called.

        It is called in a thread, which starts with the first `want`.
        """
        self._wait = wait
        # All programs have returned that were running when `want` was called with this, or less.
        self.passed_ns = 0
        self._wanted_ns = 0
        self._is_wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_complained = False

    def want(self, now_ns: int) -> None:
        """Request a grace period: once all programs have returned that are running now, `passed_ns`
        becomes `now_ns` or more.
        """
        self._wanted_ns = now_ns
        self._is_wanted.set()
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="grace", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # No thread can be started: the next round requests it again.
                self._complain(error)
                return
            self._thread = thread

    def _run(self) -> None:
        while True:
            self._is_wanted.wait()
            self._is_wanted.clear()
            # Read after the event was cleared, and before the wait: what is requested meanwhile
            # needs another wait.
            self.pass_by(self._wanted_ns)

    def pass_by(self, wanted_ns: int) -> None:
        """Wait for a grace period in this thread."""
        try:
            self._wait()
        except OSError as error:
            self._complain(error)  # the next round requests it again
            return
        self.passed_ns = wanted_ns

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            with contextlib.suppress(OSError):
                print(f"express: the kernel waits for no program: {error}", file=sys.stderr)
