"""Log lines, as text or JSON, on standard error: one for each connection that ends.

A flood of connections must not become a flood of lines: beyond `MOST_PER_SECOND` they are counted,
and the count is the next line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Final

from pyforwarder.reasons import CloseReason

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.datagrams import Session

MOST_PER_SECOND: Final = 200
LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
# The reasons that an operator who asks for warnings wants to see.
_WARNINGS: Final = frozenset({CloseReason.INTERNAL, CloseReason.BACKLOG, CloseReason.BUSY})


class Log:
    """Writes whole lines, so that several processes may share one descriptor."""

    def __init__(self, *, level: str, form: str, fd: int = 2) -> None:
        """`form` is `text` or `json`; the descriptor stays the caller's."""
        self._lowest = LEVELS[level]
        self._json = form == "json"
        self._fd = fd

    def wants(self, level: str) -> bool:
        """Whether lines of this level are written."""
        return LEVELS[level] >= self._lowest

    def write(self, level: str, event: str, **fields: object) -> None:
        """One line; what the reader cannot take at once is lost rather than waited for."""
        if not self.wants(level):
            return
        if self._json:
            now_s = time.time()  # noqa: TID251 - a log line tells the time of day
            line = json.dumps({"time": round(now_s, 3), "level": level, "event": event, **fields})
        else:
            words = " ".join(f"{key}={value}" for key, value in fields.items())
            line = f"pyforwarder {level}: {event} {words}".rstrip()
        # Nobody may be reading the log; that must not stop the forwarding.
        with contextlib.suppress(OSError):
            os.write(self._fd, (line.replace("\n", "\\n") + "\n").encode())


def _level_of(reason: CloseReason) -> str:
    return "warning" if reason in _WARNINGS else "info"


class ConnectionLog:
    """The worker's lines about its connections."""

    def __init__(self, log: Log) -> None:
        self.log = log
        # Nearly every connection ends well, and often nobody wants to read that.
        self._untold = frozenset(
            reason for reason in CloseReason if not log.wants(_level_of(reason))
        )
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def closed(self, client: Client | Session, up_bytes: int, down_bytes: int) -> None:
        """A connection has ended."""
        assert client.reason is not None
        if client.reason in self._untold or not self._admit(client.owner.loop.now_s):
            return
        self.log.write(
            _level_of(client.reason),
            "closed",
            id=client.id,
            reason=client.reason.value,
            listener=client.listener_name,
            rule=client.rule_name.decode(),
            client=str(client.peer) if client.peer else "unix:",
            server=str(client.destination) if client.destination else "-",
            datapath=client.kind.label,
            up_bytes=up_bytes,
            down_bytes=down_bytes,
            age_s=round(client.owner.loop.now_s - client.accepted_s, 3),
        )

    def _admit(self, now_s: float) -> bool:
        second = int(now_s)
        if second != self._second:
            self._second = second
            self._written = 0
            if self._suppressed:
                self.log.write("info", "suppressed", lines=self._suppressed)
                self._suppressed = 0
        if self._written >= MOST_PER_SECOND:
            self._suppressed += 1
            return False
        self._written += 1
        return True

    def internal_error(self, error: Exception) -> None:
        """An exception of ours that cost one connection."""
        self.log.write("error", "internal_error", error=repr(error))
        if self.log.wants("error"):
            traceback.print_exception(error, file=sys.stderr)
