"""What systemd is told, if it has started us and asked to be told (sd_notify(3))."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from pyforwarder.supervisor.listeners import stored_sockets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.listeners.binding import BoundSocket
    from pyforwarder.worker.log import Log


# A manager that does not read keeps our loop from nothing: what its queue has no room for is sent
# again, so often and for so long. Ten datagrams are a usual room, unix(7).
_AGAIN_S: Final = 0.1
_MOST_TRIES: Final = 600
_LAST_S: Final = 1.0
_WATCHDOG: Final = "WATCHDOG=1"


class ServiceManager:
    """Where the environment names none, nothing is told. What cannot be told is in the log."""

    def __init__(self, loop: Loop, log: Log, environ: Mapping[str, str]) -> None:
        self._loop = loop
        self._log = log
        self._environ = environ
        self._waiting: deque[str] = deque()  # in the order in which they are to be told
        self._tries = 0  # of the first

    def notify(self, state: str) -> None:
        """Say something of us, such as `READY=1`: now, or as soon as there is room for it."""
        if not self._environ.get("NOTIFY_SOCKET"):
            return
        if state == _WATCHDOG:
            if not self._waiting:  # else the next one will do
                self._send(state)
            return
        self._waiting.append(state)
        if len(self._waiting) == 1:
            self._tell()

    def finish(self) -> None:
        """The loop goes round no more: say what waits, for which room is waited for a second each.

        A process that ends without having said `MAINPID=` of its successor takes that with it.
        """
        while self._waiting:
            self._send(self._waiting.popleft(), within_s=_LAST_S)

    def _tell(self) -> None:
        """Say what waits, as far as there is room."""
        while self._waiting:
            if not self._send(self._waiting[0]):
                self._tries += 1
                if self._tries < _MOST_TRIES:
                    self._loop.after(_AGAIN_S, self._tell)
                    return
                self._log.write("warning", "sd_notify", error=os.strerror(errno.EAGAIN))
            self._waiting.popleft()
            self._tries = 0

    def _send(self, state: str, *, within_s: float = 0.0) -> bool:
        """Send a state to the service manager; returns False if there is no room for it now. True
        also if it can never be sent.
        """
        path = self._environ["NOTIFY_SOCKET"]
        address = "\0" + path[1:] if path.startswith("@") else path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(within_s)
            try:
                sock.sendto(state.encode(), address)
            except BlockingIOError:
                return False
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror or str(error))
        return True

    def keep_watchdog_away(self) -> None:
        """Tell the service manager that this loop goes round, as often as it wants that
        (WatchdogSec=), from now on.
        """
        if self._environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        with contextlib.suppress(ValueError):
            interval_s = int(self._environ.get("WATCHDOG_USEC") or 0) / 1e6
            if interval_s > 0:
                self.notify(_WATCHDOG)
                # Twice in that time, says sd_watchdog_enabled(3); a turn of ours may take long.
                self._loop.after(interval_s / 4, self.keep_watchdog_away)

    def keep_sockets(self, sockets: Iterable[BoundSocket]) -> None:
        """Have the service manager keep these listening sockets, and no others of ours, if it keeps
        any.
        """
        if stored_sockets.is_kept(self._environ):
            try:
                stored_sockets.store(self._environ["NOTIFY_SOCKET"], sockets)
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror or str(error))
