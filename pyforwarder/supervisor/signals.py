"""The daemon's signals, as events of its loop."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.children import TOLD_TO_GROUPS
from pyforwarder.runtime.loop import EPOLLIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.loop import Loop

# SIGIO: a process wants to open a file of the pseudo-/proc.
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGIO)


class Signals:
    """Calls `on_signal` with the number of each of these signals, from its making on."""

    def __init__(self, loop: Loop, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._reading, self._writing = socket.socketpair()
        self._reading.setblocking(False)
        self._writing.setblocking(False)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            # The handler does nothing; the wakeup descriptor carries the number to the loop.
            signal.signal(number, lambda *_: None)
        loop.watch(self._reading.fileno(), EPOLLIN, self._signalled, self)

    def _signalled(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            numbers = self._reading.recv(256)
        except BlockingIOError:
            return
        for number in numbers:
            self._on_signal(number)

    @staticmethod
    def restore() -> None:
        """Give the signals back their default effect, in this process."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def close_in_child(self) -> None:
        """Restore the signals that `children.fork` has not set, and close the descriptors; called
        in a child.
        """
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            if number not in TOLD_TO_GROUPS:
                signal.signal(number, signal.SIG_DFL)
        self._reading.close()
        self._writing.close()
