"""A daemon takes a running one's place: `pyforwarder upgrade`.

Both are of one instance and of one user, and speak over a socket pair that the successor has made
and handed over by the control socket. The successor asks, the predecessor answers:

    offer   what the predecessor has, with its descriptors; nothing changes
    last_id the highest number of a pair so far
    take    the successor's workers accept: the predecessor accepts no more, and hands its pairs
            over, worker by worker, through the sockets that come with this
    pairs   rows of the pairs that have stayed with it
    flush   reset some of these
    end     end with them; at once, or when they have ended

and once more the predecessor says `released` of its own accord: its spliced pairs are nobody's
now, and wait for its successor's keeper.

Until `take` is answered a successor that fails in any way has changed nothing. Both listen on the
very same sockets, so nobody who connects meanwhile is refused or lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pyforwarder import __version__
from pyforwarder.core.address import Address, SystemdSockets, UnixAddress
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.used_tokens import SHARES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.core.address import Bind
    from pyforwarder.runtime.loop import Loop

# Of what is said here; another number is another language.
PROTOCOL: Final = 1
# A daemon of this many sockets would not have started: a worker's share fits into its descriptors.
_MOST_FDS: Final = 64 * 1024
MOST_DOWN: Final = 64 * 1024  # servers that are told of
# The kernel takes 253 with a message (SCM_MAX_FD), of which one may be the message itself.
_FDS_AT_ONCE: Final = 240
_MOST_BYTES: Final = 16 << 20
ANSWER_TIMEOUT_S: Final = 15.0
# As long as its successor loads and proves what it needs: one that takes longer has failed.
SUCCESSOR_TIMEOUT_S: Final = 300.0
# A process that is killed lets go of its descriptors some time before it has ended.
_DYING_S: Final = 2.0
_UCRED: Final = struct.Struct("=iII")

_Text = Annotated[str, Field(max_length=64 * 1024)]
_Short = Annotated[str, Field(max_length=4096)]
_Count = Annotated[int, Field(ge=0, le=_MOST_FDS)]
_Number = Annotated[int, Field(ge=0, lt=1 << 63)]
# ["ip", host, port], ["unix", path] or ["systemd", name]
BindParts = Annotated[list[str | int], Field(min_length=2, max_length=3)]


class _Said(BaseModel):
    """No conversion of types; a field that another version adds is not for us."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class PlaceSaid(_Said):
    """One address of a listener; `sockets` descriptors belong to it."""

    listener: _Short
    wanted: BindParts
    bind: BindParts
    protocol: Literal["tcp", "udp"]
    sockets: _Count
    is_ours: bool
    mode: Annotated[int, Field(ge=0, le=0o7777)] | None
    freebind: bool


class WebSaid(_Said):
    """Where metrics or the status page are served; one descriptor belongs to it."""

    key: _Short
    wanted: BindParts


class TokensSaid(_Said):
    """Whose the tables of used tokens are: see worker/used_tokens.py."""

    share: Annotated[int, Field(ge=0, lt=SHARES)]  # the predecessor's
    # CLOCK_MONOTONIC, seconds: from when on nobody writes into each share but its next owner.
    free_at_s: Annotated[list[float], Field(min_length=SHARES, max_length=SHARES)]


class DownSaid(_Said):
    """A server that health checks found down."""

    upstream: _Short
    server: _Short
    why: _Short


class Offer(_Said):
    """What a predecessor has. Its descriptors come in the order of these fields:

    the control socket, the lock, standard output and standard error, then those of `handshakes`,
    `used_tokens`, `marks`, `web`, `activation` and `places`.
    """

    protocol: Literal[1]
    version: _Short
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    config_path: _Short | None
    overrides: dict[_Short, _Short]
    detach: bool
    verbosity: Annotated[int, Field(ge=0, le=9)]
    workers: Annotated[int, Field(ge=1, le=255)]
    last_id: _Number = 0  # the highest number of a pair so far
    serial: _Number  # of the configuration in force: a later one has other sockets
    drained: Annotated[list[Annotated[list[_Short], Field(min_length=2, max_length=2)]], Field()]
    environ: dict[_Short, _Text]  # systemd's words to the daemon
    # Whether spliced pairs can outlive their daemon; "passing": there are some, and they cannot.
    splice: Literal["none", "pinned", "passing"]
    splice_map: _Number | None = None  # the id of the map with their records
    # The process that writes these; 0: there is none. `last_id` and `take` say it, too.
    keeper: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    # Where it listens, connects and splices: the inode of its network namespace.
    network: _Number | None = None
    has_handshakes: bool  # a map of what the programs of splice have seen
    used_tokens: TokensSaid | None = None  # SHARES tables for each worker
    down: Annotated[list[DownSaid], Field(max_length=MOST_DOWN)] = []  # servers that get no pairs
    marks: list[_Short]  # names that say that our filters are in use (attach/unix_names.py)
    web: list[WebSaid]
    activation: list[_Short]
    places: list[PlaceSaid]

    def descriptors(self) -> int:
        """How many come with it."""
        named = len(self.marks) + len(self.web) + len(self.activation)
        named += self.workers * SHARES if self.used_tokens is not None else 0
        return 4 + self.has_handshakes + named + sum(place.sockets for place in self.places)


class Ask(_Said):
    """What a successor wants."""

    do: Literal["offer", "last_id", "take", "pairs", "flush", "end"]
    serial: _Number = 0  # take: of the offer
    ids: Annotated[list[_Number], Field(max_length=1 << 16)] | None = None  # flush; None: all
    now: bool = False  # end


def network_namespace() -> int:
    """Ours, by its inode (namespaces(7))."""
    return os.stat("/proc/self/ns/net").st_ino


# What `Offer.environ` may have.
ENVIRON: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "JOURNAL_STREAM", "FDSTORE")


def parts_of(bind: Bind) -> list[str | int]:
    """An address for the other daemon."""
    if isinstance(bind, Address):
        return ["ip", bind.host, bind.port]
    if isinstance(bind, SystemdSockets):
        return ["systemd", bind.name]
    return ["unix", bind.path]


def bind_of(parts: Sequence[str | int]) -> Address | UnixAddress | SystemdSockets:
    """The other end of `parts_of`.

    Raises:
        ControlError: it is no address.
    """
    match list(parts):
        case ["ip", str(host), int(port)] if 0 <= port < 65536:
            return Address(host, port)
        case ["unix", str(path)]:
            return UnixAddress(path)
        case ["systemd", str(name)]:
            return SystemdSockets(name)
    raise ControlError("the running daemon says an address that is none")


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user that made the other end of a socket pair (SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _send(channel: Channel, message: dict[str, object], fds: Sequence[int]) -> None:
    """One message with as many descriptors as there are; they stay the caller's."""
    rest = list(fds)
    while len(rest) > _FDS_AT_ONCE:
        some, rest = rest[:_FDS_AT_ONCE], rest[_FDS_AT_ONCE:]
        channel.send({"more": True}, some)
    channel.send(message, rest)


class NoAnswerError(ControlError):
    """The other daemon has not answered, or has ended: whether it has done it is not known."""


class Predecessor:
    """The running daemon, as its successor has it."""

    def __init__(self, channel: Channel) -> None:
        """Ours to close."""
        self._channel = channel
        self._come: list[int] = []
        self.is_released = False
        self.is_gone = False
        offer, fds = self._ask("offer", timeout_s=ANSWER_TIMEOUT_S)
        try:
            self.offer = Offer.model_validate(offer)
        except ValidationError as error:
            close_given(fds)
            said = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in said["loc"])
            raise ControlError(
                f"the running daemon cannot be taken over by this version: {where}: {said['msg']}"
            ) from None
        if len(fds) != self.offer.descriptors():
            close_given(fds)
            raise ControlError(f"the running daemon has sent {len(fds)} descriptors")
        self._sent = fds
        offered = self.offer
        self._pidfd = _process(offered.pid)
        self._keeper: int | None = None  # its process, if it has said one
        self._keeper_pidfd = -1
        self._know_keeper(offered.keeper)
        self.control_fd, self.lock_fd, self.stdout_fd, self.stderr_fd = fds[:4]
        rest = iter(fds[4:])
        self.handshakes_fd = next(rest) if offered.has_handshakes else -1
        offered_tokens = offered.workers * SHARES if offered.used_tokens is not None else 0
        self.used_tokens_fds = [next(rest) for _ in range(offered_tokens)]
        self.marks = {name: next(rest) for name in offered.marks}
        self.web = [(said, next(rest)) for said in offered.web]
        self.activation = [(name, next(rest)) for name in offered.activation]
        self.places = [
            (place, [next(rest) for _ in range(place.sockets)]) for place in offered.places
        ]

    def fileno(self) -> int:
        """Readable when it says something of its own accord."""
        return self._channel.fileno()

    def has_died(self) -> bool:
        """Whether its process has ended, and has not only hung up."""
        return _has_ended(self._pidfd)

    def _know_keeper(self, pid: object) -> None:
        """What it says its keeper is: another one, if one has died."""
        if type(pid) is int and pid >= 0 and pid != self._keeper:
            self._keeper = pid
            if self._keeper_pidfd >= 0:
                os.close(self._keeper_pidfd)
            self._keeper_pidfd = _child(pid, self.offer.pid) if pid else -1

    def kill(self) -> bool:
        """End it at once, and its workers and its keeper, which do not outlive it.

        False: one of them has not ended yet.
        """
        is_over = _end(self._pidfd)
        return _has_ended(self._keeper_pidfd) and is_over

    def end_keeper(self) -> bool:
        """Have nobody but us write the records of spliced pairs, whatever it does or does not.

        An older version does not say who does: if it has not let go of them, it is ended itself.
        False: it has not ended yet.
        """
        if self._keeper is not None:
            return _end(self._keeper_pidfd)
        if self.is_released or self.offer.splice == "none":
            return True
        return self.kill()

    def last_id(self) -> int:
        """The highest number of a pair so far.

        Raises:
            ControlError: no answer.
        """
        answer, fds = self._ask("last_id", timeout_s=ANSWER_TIMEOUT_S)
        close_given(fds)
        self._know_keeper(answer.get("keeper"))
        number = answer.get("last_id")
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise ControlError("the running daemon does not say its last pair")
        return number

    def take(self, heirs: Sequence[int]) -> None:
        """Have it accept no more; `heirs` are where its workers send their pairs, by worker.

        Raises:
            NoAnswerError: it may have done so, or has ended: somebody must serve.
            ControlError: it goes on as before.
        """
        answer, fds = self._ask(
            "take", heirs, timeout_s=4 * ANSWER_TIMEOUT_S, serial=self.offer.serial
        )
        close_given(fds)
        self._know_keeper(answer.get("keeper"))

    def pairs(self) -> list[dict[str, Any]]:
        """The rows of the pairs that have stayed with it; none if it does not say."""
        try:
            answer, fds = self._ask("pairs", timeout_s=1.0)
        except ControlError:
            return []
        close_given(fds)
        rows = answer.get("pairs")
        if not isinstance(rows, list):
            return []
        return [row for row in rows if isinstance(row, dict)]

    def flush(self, ids: Sequence[int] | None) -> list[int]:
        """Have it reset some of these, or all; those that it had."""
        try:
            answer, fds = self._ask(
                "flush", timeout_s=1.0, ids=None if ids is None else list(ids)[: 1 << 16]
            )
        except ControlError:
            return []
        close_given(fds)
        found = answer.get("flushed")
        return [n for n in found if type(n) is int] if isinstance(found, list) else []

    def end(self, *, now: bool) -> None:
        """Have it end, at once or when its pairs have."""
        try:
            _, fds = self._ask("end", timeout_s=1.0, now=now)
        except ControlError:
            return
        close_given(fds)

    def heard(self) -> None:
        """It has said something of its own accord, or has ended: `is_released`, `is_gone`."""
        try:
            received = self._channel.receive(most_bytes=_MOST_BYTES)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            received = None
        if received is None:
            self.is_gone = self.is_released = True
            return
        message, fds = received
        close_given(fds)
        if message.get("said") == "released":
            self.is_released = True

    def _ask(
        self, do: str, fds: Sequence[int] = (), *, timeout_s: float, **fields: object
    ) -> tuple[dict[str, Any], list[int]]:
        if self.is_gone:
            raise NoAnswerError("the daemon before has ended")
        try:
            _send(self._channel, {"do": do, **fields}, fds)
            return self._answer(do, time.monotonic() + scaled_s(timeout_s))
        except (OSError, ValueError) as error:
            if isinstance(error, (BrokenPipeError, ConnectionResetError)):
                self.is_gone = self.is_released = True
            raise NoAnswerError(f"the running daemon has not answered to {do}: {error}") from error

    def _answer(self, do: str, deadline_s: float) -> tuple[dict[str, Any], list[int]]:
        come: list[int] = []
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        try:
            while True:
                if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                    raise NoAnswerError(f"the running daemon does not answer to {do}")
                received = self._channel.receive(most_bytes=_MOST_BYTES)
                if received is None:
                    self.is_gone = self.is_released = True
                    raise NoAnswerError(f"the running daemon has ended, asked to {do}")
                message, fds = received
                come += fds
                if len(come) > _MOST_FDS:
                    raise ControlError("the running daemon sends descriptors without end")
                if message.get("said") == "released":
                    self.is_released = True
                elif "error" in message:
                    raise ControlError(str(message["error"])[:1000])
                elif message.get("answer") == do:
                    answered, come = come, []
                    return message, answered
        finally:
            close_given(come)

    def close_in_child(self, *, has_control: bool) -> None:
        """In another process: this is the supervisor's, and so is the control socket."""
        self.close()
        if has_control:
            os.close(self.control_fd)

    def discard(self) -> None:
        """Hang up, and close all that it has sent: nothing of that has been used."""
        self.close()
        close_given(self._sent)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
        for fd in (self._pidfd, self._keeper_pidfd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._keeper_pidfd = -1


def _process(pid: int) -> int:
    """A descriptor of the process; -1: there is none any more."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _child(pid: int, parent: int) -> int:
    """The same of a child of that process: a number may be another's by now."""
    fd = _process(pid)
    if fd >= 0:
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name before it may have any characters (proc_pid_stat(5)).
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            if int(text.rpartition(")")[2].split()[1]) == parent:
                return fd
        os.close(fd)
    return -1


def _has_ended(pidfd: int) -> bool:
    """Whether the process has ended, soon at the latest."""
    if pidfd < 0:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(scaled_s(_DYING_S) * 1000))


def _end(pidfd: int) -> bool:
    """Kill the process; whether it has ended by then."""
    if pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return _has_ended(pidfd)


def find(control: Callable[[int], object]) -> Predecessor:
    """Ask the running daemon; `control` hands it a descriptor by its control socket.

    Raises:
        ForwarderError: there is none, or it says why not.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours)
    try:
        with theirs:
            control(theirs.fileno())
        return Predecessor(channel)
    except ForwarderError:
        channel.close()
        raise


class Successor:
    """Who wants to take our place, as the running daemon has it: one at a time."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        obey: Callable[[Ask, list[int]], tuple[dict[str, object], Sequence[int]]],
        gone: Callable[[], None],
    ) -> None:
        """`obey` does what it asks, and says what to answer; `gone` is called at its end.

        Raises:
            ControlError: the socket is none that a successor may have made; it is closed.
        """
        self.pid, uid = peer_of(sock) if sock.family == socket.AF_UNIX else (0, -1)
        if sock.type != socket.SOCK_SEQPACKET or uid not in (0, os.geteuid()):
            sock.close()
            raise ControlError("only this daemon's own user, or root, may take its place")
        if self.pid <= 0:
            sock.close()
            raise ControlError("a successor must be in the same namespace of processes")
        self._loop = loop
        self._obey = obey
        self._gone = gone
        self._channel = Channel(sock)
        self._fd = sock.fileno()
        self._come: list[int] = []
        self.is_over = False
        from pyforwarder.runtime.loop import EPOLLIN

        loop.watch(self._fd, EPOLLIN, self._hear, self)

    def fds(self) -> list[int]:
        """What a child must not keep."""
        return [] if self.is_over else [self._fd]

    def has_ended(self) -> bool:
        """Whether nobody is there any more who could hear an answer; it may have asked before."""
        poll = select.poll()
        poll.register(self._fd, 0)  # POLLHUP is always told of
        return self.is_over or bool(poll.poll(0))

    def _hear(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            received = self._channel.receive(most_bytes=_MOST_BYTES)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            received = None
        if received is None:
            self.close()
            self._gone()
            return
        message, fds = received
        self._come += fds
        if len(self._come) > _MOST_FDS:
            self.close()
            self._gone()
            return
        if message.get("more") is True:
            return
        fds, self._come = self._come, []
        try:
            answer, given = self._answer(message, fds)
            _send(self._channel, answer, given)
        except (OSError, ValueError):
            # It does not read, or is gone; what was decided stands.
            self.close()
            self._gone()
        finally:
            close_given(fds)

    def _answer(
        self, message: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, object], Sequence[int]]:
        try:
            asked = Ask.model_validate(message)
            answer, given = self._obey(asked, fds)
        except ValidationError:
            return {"error": f"what pyforwarder {__version__} does not understand"}, ()
        except ForwarderError as error:
            return {"error": str(error)}, ()
        return {"answer": asked.do, **answer}, given

    def say_released(self) -> None:
        """What was spliced is nobody's now."""
        if not self.is_over:
            # One that is gone is told by our end.
            with contextlib.suppress(OSError):
                self._channel.send({"said": "released"}, wait=False)

    def close(self) -> None:
        """Hang up; nothing happens if that was done."""
        if not self.is_over:
            self.is_over = True
            self._loop.forget(self._fd)
            come, self._come = self._come, []
            close_given(come)
            self._channel.close()
