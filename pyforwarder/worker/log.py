"""Log lines, as text or JSON, on standard error: one for each connection that ends.

The reader may be slow, or have stopped (Ctrl-S, a pager, a collector that hangs): a line
that cannot be written at once is lost, and counted, and the count is the next line that can be. A
flood of connections must not become a flood of lines: beyond `MOST_PER_SECOND` they are counted,
and the count is the next line. Where one of N is enough (`log: {sample: N}`), no more than that are
made of connections that have ended as most do.
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
    from collections.abc import Iterator

    from pyforwarder.worker.client import Client
    from pyforwarder.worker.udp.session import RefusedClient, Session

MOST_PER_SECOND: Final = 200
LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
# The reasons that an operator who asks for warnings wants to see.
_WARNINGS: Final = frozenset({CloseReason.INTERNAL, CloseReason.BACKLOG, CloseReason.BUSY})
# A connection of a health check, or of `nc -z`, that has sent nothing ends by one of these.
_SAYS_NOTHING: Final = frozenset({CloseReason.CLIENT_GONE, CloseReason.CLIENT_RESET})
_TRACEBACK_LINES: Final = 40
_TEXT_LINES: Final = 400
_VALUE_CHARACTERS: Final = 1000
# What a line says of the decision about a connection that was served. No other field of the line
# has one of these names: another daemon's worker may say them.
AUDIT_FIELDS: Final = frozenset(("sni", "host", "user", "key", "asked", "resolved", "upstream"))
_FAULT_PAUSE_S: Final = 1.0
# PIPE_BUF of Linux: so much is written to a pipe whole or not at all (pipe(7)).
_TOGETHER_BYTES: Final = 4096
_NOT_A_TYPE: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
# How connections end that nobody wonders about; a session of UDP has no other end than silence.
USUAL: Final = frozenset({CloseReason.FINISHED})
USUAL_OF_SESSIONS: Final = USUAL | {CloseReason.IDLE}


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
        self._held: list[bytes] | None = None  # lines that are written together
        self._held_bytes = 0
        self._faults: dict[str, tuple[float, int]] = {}  # event -> quiet until, suppressed
        self._socket: socket.socket | None = None
        self._room: select.poll | None = None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._socket = duplicate_socket(fd)
        elif os.get_blocking(fd):
            self._room = select.poll()
            self._room.register(fd, select.POLLOUT)

    def close(self) -> None:
        """Release what was made besides the descriptor."""
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
        """Write a line; one that the reader cannot take at once is lost, nobody waits."""
        if not self.wants(level):
            return
        line = self._line(level, event, fields)
        if self._held is None:
            self._write([line])
            return
        if self._held_bytes + len(line) > _TOGETHER_BYTES:
            self._write_held()
        self._held.append(line)
        self._held_bytes += len(line)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """The lines of the block are written at its end, as many at once as a pipe takes whole."""
        if self._held is not None or (
            self._socket is not None and self._socket.type & ~_NOT_A_TYPE != socket.SOCK_STREAM
        ):
            yield  # of datagrams each is a line
            return
        self._held = []
        try:
            yield
        finally:
            self._write_held()
            self._held = None

    def _write_held(self) -> None:
        lines, self._held, self._held_bytes = self._held, [], 0
        if lines:
            self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        if self._lost:
            lost = self._line("warning", "log_lines_lost", {"lines": self._lost})
            if not self._put(lost):
                self._lost += len(lines)
                return
            self._lost = 0
        if not self._put(b"".join(lines)):
            self._lost += len(lines)

    def fault(self, event: str, error: Exception, **fields: object) -> None:
        """An exception of ours, and then where it came from, a line for each of the text.

        One of an event in a second: what fails once may fail for every packet. `more` counts those
        that were not told of since the last one.
        """
        now_s = time.monotonic()
        quiet_until_s, suppressed = self._faults.get(event, (0.0, 0))
        if now_s < quiet_until_s:
            self._faults[event] = quiet_until_s, suppressed + 1
            return
        self._faults[event] = now_s + _FAULT_PAUSE_S, 0
        if suppressed:
            fields["more"] = suppressed
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
            head = {"time": rfc3339(now_s), "level": level, "event": event}
            text = json.dumps({**head, **values, **self._instance}, default=str)
            # DEL is the one control that JSON leaves as it is.
            return text.replace("\x7f", "\\u007f").encode() + b"\n"
        when = f"{rfc3339(now_s)} " if self._is_timed else ""
        fields = {**fields, **self._instance}
        words = "".join(f" {key}={_word(value)}" for key, value in fields.items())
        return f"{when}pyforwarder {level}: {event}{words}\n".encode()

    def _put(self, line: bytes) -> bool:
        """Write a line; returns whether it is where it belongs (or nobody reads there at all)."""
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


def rfc3339(unix_s: float) -> str:
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


def audit_of(client: Client | Session | RefusedClient) -> dict[str, str]:
    """What the connection's decision was made on, as far as it applies.

    Of one that another daemon has begun this is what that has said.
    """
    fields = dict(client.facts)
    route = client.route
    if route is not None and route.named_by_client:
        fields.setdefault("asked", str(route.to))
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

    def __init__(
        self,
        log: Log,
        *,
        null_connections: bool = False,
        sample: int = 1,
        usual: frozenset[CloseReason] = USUAL,
    ) -> None:
        """`null_connections`: whether those that sent nothing get a line above level debug.

        Of those that have ended for a `usual` reason one of `sample` has a line: the first, and
        then each that is so many behind the last one.
        """
        self.log = log
        self._usual = usual
        self._sample = sample
        self._passed = sample - 1  # usual ends since the last line
        self._second = 0
        self._written = 0
        self._suppressed = 0
        self._read_levels(null_connections=null_connections)

    def change(
        self, *, level: str, form: str, null_connections: bool = False, sample: int = 1
    ) -> None:
        """Another level and form from here on."""
        self.log.change(level=level, form=form)
        if sample != self._sample:
            self._sample, self._passed = sample, sample - 1
        self._read_levels(null_connections=null_connections)

    def _read_levels(self, *, null_connections: bool) -> None:
        self._unlogged = _unlogged_by(self.log)
        self._tells_of_nothing = null_connections or self.log.wants("debug")
        # For callers: what a line would say need not be found out where there is none.
        self.tells = CloseReason.FINISHED not in self._unlogged
        self.tells_steps = self.log.wants("debug")

    def step(self, client: Client, event: str, **fields: object) -> None:
        """Write a line of level debug about a connection. Ask `tells_steps` before."""
        if self._admit(client.owner.loop.now_s):
            self.log.write(
                "debug",
                event,
                id=client.id,
                listener=client.listener_name,
                client=str(client.peer) if client.peer else "unix:",
                **fields,
            )

    def picks(self, reason: CloseReason) -> bool:
        """Whether a connection that has ended so has a line; each is asked for once.

        Who knows before `closed` says so there.
        """
        if reason in self._unlogged:
            return False
        if self._sample == 1 or reason not in self._usual:
            return True
        self._passed += 1
        if self._passed < self._sample:
            return False
        self._passed = 0
        return True

    def closed(
        self,
        client: Client | Session | RefusedClient,
        up: tuple[int, int],
        down: tuple[int, int],
        *,
        age_s: float | None = None,
        is_picked: bool = False,
    ) -> None:
        """A connection has ended; `up` and `down` are the bytes and packets that were carried.

        `age_s` is how old it became, if it did not end just now; `is_picked`: `picks` has been
        asked.
        """
        assert client.reason is not None
        if client.reason in self._unlogged:
            return
        has_sent_nothing = client.reason in _SAYS_NOTHING and client.has_sent_nothing
        if has_sent_nothing and not self._tells_of_nothing:
            return
        if not is_picked and not self.picks(client.reason):
            return
        if not self._admit(client.owner.loop.now_s):
            return
        sampled = self._sample > 1 and client.reason in self._usual
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
            **({"one_of": self._sample} if sampled else {}),
            **audit_of(client),
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
