"""Log lines, as text or JSON, on standard error: one for each connection that ends.

Whoever reads them may be slow, or have stopped (Ctrl-S, a pager, a collector that hangs): a line
that cannot be written at once is lost, and counted, and the count is the next line that can be. A
flood of connections must not become a flood of lines: beyond `MOST_PER_SECOND` they are counted,
and the count is the next line.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import socket
import stat
import time
import traceback
from typing import TYPE_CHECKING, Final

from pyforwarder.descriptors import duplicate_socket
from pyforwarder.reasons import CloseReason
from pyforwarder.tables import printable

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.datagrams import Session

MOST_PER_SECOND: Final = 200
LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
# The reasons that an operator who asks for warnings wants to see.
_WARNINGS: Final = frozenset({CloseReason.INTERNAL, CloseReason.BACKLOG, CloseReason.BUSY})
_TRACEBACK_LINES: Final = 40


def impatient(fd: int) -> int:
    """Another descriptor for the same place, on which writing does not wait; the caller closes it.

    O_NONBLOCK belongs to the open file, which we share with a shell and whoever else writes there,
    so that a pipe, a FIFO and a terminal are opened anew. Where that is not possible (a socket, a
    terminal of another user, no /proc) it is a duplicate, and `Log` looks before it writes.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{fd}", flags)
    return os.dup(fd)


class Log:
    """Writes whole lines, so that several processes may share one descriptor."""

    def __init__(self, *, level: str, form: str, fd: int = 2, is_timed: bool = False) -> None:
        """`form` is `text` or `json`; the descriptor, best an `impatient` one, stays the caller's.

        `is_timed` puts the time of day before a line of text, for where nobody else does.
        """
        self.change(level=level, form=form)
        self._fd = fd
        self._is_timed = is_timed
        self._lost = 0
        self._socket: socket.socket | None = None
        self._room: select.poll | None = None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._socket = duplicate_socket(fd)
        elif os.get_blocking(fd):
            self._room = select.poll()
            self._room.register(fd, select.POLLOUT)

    def close(self) -> None:
        """Let go of what was made besides the descriptor."""
        if self._socket is not None:
            self._socket.close()

    def change(self, *, level: str, form: str) -> None:
        """Another level and form from here on."""
        self._lowest = LEVELS[level]
        self._json = form == "json"

    def wants(self, level: str) -> bool:
        """Whether lines of this level are written."""
        return LEVELS[level] >= self._lowest

    def write(self, level: str, event: str, **fields: object) -> None:
        """One line; what the reader cannot take at once is lost rather than waited for."""
        if not self.wants(level):
            return
        if self._lost:
            lost = self._line("warning", "log_lines_lost", {"lines": self._lost})
            if not self._put(lost):
                self._lost += 1
                return
            self._lost = 0
        if not self._put(self._line(level, event, fields)):
            self._lost += 1

    def fault(self, event: str, error: Exception, **fields: object) -> None:
        """An exception of ours, with where it came from."""
        shown = traceback.format_exception(error)
        where = "".join(shown).splitlines()[-_TRACEBACK_LINES:]
        self.write("error", event, error=repr(error), traceback="\n".join(where), **fields)

    def _line(self, level: str, event: str, fields: dict[str, object]) -> bytes:
        now_s = time.time()  # noqa: TID251 - a log line tells the time of day
        if self._json:
            said = {"time": round(now_s, 3), "level": level, "event": event, **fields}
            return json.dumps(said, default=str).encode() + b"\n"
        when = ""
        if self._is_timed:
            moment = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
            when = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z "
        words = "".join(f" {key}={_word(value)}" for key, value in fields.items())
        return f"{when}pyforwarder {level}: {event}{words}\n".encode()

    def _put(self, line: bytes) -> bool:
        """Whether it is where it belongs (or nobody reads there at all)."""
        try:
            if self._socket is not None:
                self._socket.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return True
            if self._room is not None and not self._room.poll(0):
                return False
            os.write(self._fd, line)
        except BlockingIOError:
            return False
        except OSError:
            # Nobody may be reading the log; that must not stop the forwarding.
            pass
        return True


def _word(value: object) -> str:
    """A value in a line of text: quoted if it has blanks, and nothing in it a terminal obeys."""
    text = str(value)
    if not text or any(character in text for character in ' "=\n'):
        text = json.dumps(text)
    return printable(text)


def _level_of(reason: CloseReason) -> str:
    return "warning" if reason in _WARNINGS else "info"


def _untold_by(log: Log) -> frozenset[CloseReason]:
    """Nearly every connection ends well, and often nobody wants to read that."""
    return frozenset(reason for reason in CloseReason if not log.wants(_level_of(reason)))


class ConnectionLog:
    """The worker's lines about its connections."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._untold = _untold_by(log)
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def change(self, *, level: str, form: str) -> None:
        """Another level and form from here on."""
        self.log.change(level=level, form=form)
        self._untold = _untold_by(self.log)

    def closed(self, client: Client | Session, up: tuple[int, int], down: tuple[int, int]) -> None:
        """A connection has ended; `up` and `down` are the bytes and packets that were carried."""
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
            source=str(source) if (source := client.source_address()) else "-",
            server=str(client.destination) if client.destination else "-",
            datapath=client.kind.label,
            why=client.pair_reason.text,
            up_bytes=up[0],
            down_bytes=down[0],
            up_packets=up[1],
            down_packets=down[1],
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
        self.log.fault("internal_error", error)
