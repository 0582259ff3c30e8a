"""What systemd is told, if it has started us and asked to be told (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from pyforwarder.supervisor import stored_sockets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.listeners import BoundSocket
    from pyforwarder.worker.log import Log


class ServiceManager:
    """Where the environment names none, nothing is told. What cannot be told is in the log."""

    def __init__(self, loop: Loop, log: Log, environ: Mapping[str, str]) -> None:
        self._loop = loop
        self._log = log
        self._environ = environ

    def notify(self, state: str) -> None:
        """Say something of us, such as `READY=1`."""
        path = self._environ.get("NOTIFY_SOCKET")
        if not path:
            return
        address = "\0" + path[1:] if path.startswith("@") else path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(state.encode(), address)
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror)

    def keep_watchdog_away(self) -> None:
        """Say that this loop goes round, as often as it asked for (WatchdogSec=), from now on."""
        if self._environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        with contextlib.suppress(ValueError):
            interval_s = int(self._environ.get("WATCHDOG_USEC") or 0) / 1e6
            if interval_s > 0:
                self.notify("WATCHDOG=1")
                # Twice in that time, says sd_watchdog_enabled(3); a turn of ours may take long.
                self._loop.after(interval_s / 4, self.keep_watchdog_away)

    def keep_sockets(self, sockets: Iterable[BoundSocket]) -> None:
        """Have it keep these listening sockets, and no others of ours, if it keeps any."""
        if stored_sockets.is_kept(self._environ):
            try:
                stored_sockets.store(self._environ["NOTIFY_SOCKET"], sockets)
            except OSError as error:
                self._log.write("warning", "sd_notify", error=error.strerror)
