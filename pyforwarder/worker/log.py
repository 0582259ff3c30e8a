"""Log lines, as text or JSON, on standard error: one for each connection that ends.

The reader may be slow, or have stopped (Ctrl-S, a pager, a collector that hangs): a line
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

from pyforwarder.core.address import Address, HostPort
from pyforwarder.core.reasons import CloseReason
from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.runtime.descriptors import duplicate_socket
from pyforwarder.runtime.refusals import SAYS_NO
from pyforwarder.runtime.tables import printable, single_line

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.udp.session import Refused, Session

MOST_PER_SECOND: Final = 200
LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
# The reasons that an operator who asks for warnings wants to see.
_WARNINGS: Final = frozenset({CloseReason.INTERNAL, CloseReason.BACKLOG, CloseReason.BUSY})
# A connection of a health check, or of `nc -z`, that has sent nothing ends by one of these.
_SAYS_NOTHING: Final = frozenset({CloseReason.CLIENT_GONE, CloseReason.CLIENT_RESET})
_TRACEBACK_LINES: Final = 40
_TEXT_LINES: Final = 400
_VALUE_CHARACTERS: Final = 1000
_FAULT_PAUSE_S: Final = 1.0


def not_blocking(fd: int) -> int:
    """Another descriptor for the same place, on which writing does not wait; the caller closes it.

    O_NONBLOCK belongs to the open file, which we share with a shell and other writers,
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

    def __init__(
        self,
        *,
        level: str,
        form: str,
        fd: int = 2,
        is_timed: bool = False,
        instance: str = "",
    ) -> None:
        """`form` is `text` or `json`; the descriptor (best of `not_blocking`) stays the caller's.

        `is_timed` puts the time of day before a line of text, for where nobody else does. Each
        line names the `instance`, if it is given.
        """
        self.change(level=level, form=form)
        self._instance = {"instance": instance} if instance else {}
        self._fd = fd
        self._is_timed = is_timed
        self._lost = 0
        self._faults: dict[str, tuple[float, int]] = {}  # event -> quiet until, untold
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
        """An exception of ours, and then where it came from, a line for each of the text.

        One of an event in a second: what fails once may fail for every packet. `more` counts those
        that were not told of since the last one.
        """
        now_s = time.monotonic()
        quiet_until_s, untold = self._faults.get(event, (0.0, 0))
        if now_s < quiet_until_s:
            self._faults[event] = quiet_until_s, untold + 1
            return
        self._faults[event] = now_s + _FAULT_PAUSE_S, 0
        if untold:
            fields["more"] = untold
        self.write("error", event, error=f"{type(error).__name__}: {error}", **fields)
        shown = "".join(traceback.format_exception(error))
        self.text("error", "traceback", shown, most=_TRACEBACK_LINES)

    def text(self, level: str, event: str, text: str, *, most: int = _TEXT_LINES) -> None:
        """The last `most` lines of a text, each as a line of its own."""
        if not self.wants(level):
            return
        for line in text.splitlines()[-most:]:
            if line.strip():
                self.write(level, event, line=line.rstrip())

    def load_error(self, event: str, error: ForwarderError, **fields: object) -> None:
        """A warning that something could not be loaded; at level debug all that was said of it."""
        self.write("warning", event, reason=str(error), **fields)
        if isinstance(error, LoadError) and error.log:
            self.text("debug", f"{event}_log", error.log)

    def _line(self, level: str, event: str, fields: dict[str, object]) -> bytes:
        now_s = time.time()  # noqa: TID251 - a log line tells the time of day
        if self._json:
            values = {
                key: single_line(value, most=_VALUE_CHARACTERS) if isinstance(value, str) else value
                for key, value in fields.items()
            }
            said = {"time": _rfc3339(now_s), "level": level, "event": event}
            text = json.dumps({**said, **values, **self._instance}, default=str)
            # DEL is the one control that JSON leaves as it is.
            return text.replace("\x7f", "\\u007f").encode() + b"\n"
        when = f"{_rfc3339(now_s)} " if self._is_timed else ""
        fields = {**fields, **self._instance}
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


def _rfc3339(unix_s: float) -> str:
    """A time of day in UTC with milliseconds (RFC 3339)."""
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"


def _word(value: object) -> str:
    """A value in a line of text: quoted if it has blanks, and nothing in it a terminal obeys."""
    text = single_line(str(value), most=_VALUE_CHARACTERS)
    if not text or any(character in text for character in ' "='):
        text = json.dumps(text)
    return printable(text)


def _level_of(reason: CloseReason) -> str:
    return "warning" if reason in _WARNINGS else "info"


def _unlogged_by(log: Log) -> frozenset[CloseReason]:
    """Nearly every connection ends well, and often nobody wants to read that."""
    return frozenset(reason for reason in CloseReason if not log.wants(_level_of(reason)))


def _audit(client: Client | Session | Refused) -> dict[str, str]:
    """What the connection's decision was made on, as far as it applies."""
    fields = dict(client.facts)
    route = client.route
    if route is not None and route.named_by_client:
        fields["asked"] = str(route.to)
        if isinstance(route.to, HostPort) and isinstance(client.destination, Address):
            fields["resolved"] = str(client.destination)
    elif route is not None and isinstance(route.to, str):
        fields["upstream"] = route.to
    if client.over_limit is not None:
        fields["refusal"] = f"limit {client.over_limit.value}"
    elif client.refusal and client.reason is not None and SAYS_NO[client.reason]:
        fields["refusal"] = client.refusal
    return fields


class ConnectionLog:
    """The worker's lines about its connections."""

    def __init__(self, log: Log, *, null_connections: bool = False) -> None:
        """`null_connections`: whether those that sent nothing get a line above level debug."""
        self.log = log
        self._second = 0
        self._written = 0
        self._suppressed = 0
        self._look_at_levels(null_connections=null_connections)

    def change(self, *, level: str, form: str, null_connections: bool = False) -> None:
        """Another level and form from here on."""
        self.log.change(level=level, form=form)
        self._look_at_levels(null_connections=null_connections)

    def _look_at_levels(self, *, null_connections: bool) -> None:
        self._unlogged = _unlogged_by(self.log)
        self._tells_of_nothing = null_connections or self.log.wants("debug")
        # For callers: what a line would say need not be found out where there is none.
        self.tells = CloseReason.FINISHED not in self._unlogged
        self.tells_steps = self.log.wants("debug")

    def step(self, client: Client, event: str, **fields: object) -> None:
        """At level debug: something has happened to a connection. Ask `tells_steps` before."""
        if self._admit(client.owner.loop.now_s):
            self.log.write(
                "debug",
                event,
                id=client.id,
                listener=client.listener_name,
                client=str(client.peer) if client.peer else "unix:",
                **fields,
            )

    def closed(
        self,
        client: Client | Session | Refused,
        up: tuple[int, int],
        down: tuple[int, int],
        *,
        age_s: float | None = None,
    ) -> None:
        """A connection has ended; `up` and `down` are the bytes and packets that were carried.

        `age_s` is how old it became, if it did not end just now.
        """
        assert client.reason is not None
        if client.reason in self._unlogged:
            return
        has_sent_nothing = client.reason in _SAYS_NOTHING and client.has_sent_nothing
        if has_sent_nothing and not self._tells_of_nothing:
            return
        if not self._admit(client.owner.loop.now_s):
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
            age_s=round(client.owner.loop.now_s - client.accepted_s if age_s is None else age_s, 3),
            **_audit(client),
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
