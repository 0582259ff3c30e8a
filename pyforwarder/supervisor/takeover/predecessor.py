"""The running daemon, as the one that takes its place has it: asked, and in the end gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pyforwarder.core.wording import counted
from pyforwarder.datapath.splice.abi import HANDSHAKES_FORM
from pyforwarder.datapath.splice.directories import Before
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.takeover.messages import (
    ANSWER_TIMEOUT_S,
    MOST_BYTES,
    MOST_FDS,
    Offer,
    receive,
    send,
)
from pyforwarder.worker.used_tokens import SHARES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A process that is killed releases its descriptors some time before it has ended.
_DYING_S: Final = 2.0
# As long as it may take for the rows of tens of thousands of pairs.
_ROWS_TIMEOUT_S: Final = 3.0


class NoAnswerError(ControlError):
    """The other daemon has not answered, or has ended: whether it has done it is not known."""


class Predecessor:
    """The running daemon, as its successor has it."""

    def __init__(self, channel: Channel) -> None:
        """Ours to close."""
        self._channel = channel
        self._come: list[int] = []
        self.is_released = False
        self.spliced_that_stay = 0  # pairs, known once it has released what does not
        self.is_gone = False
        self._is_ending = False
        offer, fds = self._ask("offer", timeout_s=ANSWER_TIMEOUT_S, handshakes=HANDSHAKES_FORM)
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
            raise ControlError(f"the running daemon has sent {counted(len(fds), 'descriptor')}")
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

    @property
    def splice(self) -> Before:
        """What it has of splice."""
        return Before(
            directory=self.offer.splice_pins,
            splices=self.offer.splice != "none",
            can_keep=self.offer.keeps_spliced,
        )

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
        """See to it that only we write the records of spliced pairs.

        An older version does not say which keeper writes them: if it has not released them, it is
        ended itself. False: it has not ended yet.
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

    def take(self, to_successors: Sequence[int], *, keeps_spliced: bool = False) -> None:
        """Have it accept no more; its workers send their pairs by `to_successors`, by worker.

        `keeps_spliced`: its spliced pairs stay with it.

        Raises:
            NoAnswerError: it may have done so, or has ended: then no daemon serves.
            ControlError: it goes on as before.
        """
        answer, fds = self._ask(
            "take",
            to_successors,
            timeout_s=4 * ANSWER_TIMEOUT_S,
            serial=self.offer.serial,
            keeps_spliced=keeps_spliced,
        )
        close_given(fds)
        self._know_keeper(answer.get("keeper"))

    def pairs(self) -> list[dict[str, Any]]:
        """The rows of the pairs that have stayed with it; none if it does not say."""
        try:
            answer, fds = self._ask("pairs", timeout_s=_ROWS_TIMEOUT_S)
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

    def receive(self) -> None:
        """It has said something of its own accord, or has ended: `is_released`, `is_gone`."""
        try:
            received = receive(self._channel)
        except BlockingIOError:
            return
        if received is None:
            self.is_gone = self.is_released = True
            return
        message, fds = received
        close_given(fds)
        if message.get("said") == "released":
            self._has_released(message)
        if message.get("said") == "ending":
            self._is_ending = True

    def _has_released(self, message: dict[str, Any]) -> None:
        self.is_released = True
        stay = message.get("stay")
        if type(stay) is int and stay > 0:
            self.spliced_that_stay = stay

    def _why_ending(self) -> ControlError | None:
        """It may have said so before it hung up: that is no death, and no successor is to go on."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while not self.is_gone and not self._is_ending and poll.poll(0):
            self.receive()
        if self._is_ending:
            return ControlError("the running daemon was told to end meanwhile")
        return None

    def _ask(
        self, do: str, fds: Sequence[int] = (), *, timeout_s: float, **fields: object
    ) -> tuple[dict[str, Any], list[int]]:
        if ending := self._why_ending():
            raise ending
        if self.is_gone:
            raise NoAnswerError("the daemon before has ended")
        try:
            send(self._channel, {"do": do, **fields}, fds)
            return self._answer(do, time.monotonic() + scaled_s(timeout_s))
        except (OSError, ValueError) as error:
            if isinstance(error, (BrokenPipeError, ConnectionResetError)):
                if ending := self._why_ending():
                    raise ending from error
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
                received = self._channel.receive(most_bytes=MOST_BYTES)
                if received is None:
                    self.is_gone = self.is_released = True
                    raise NoAnswerError(f"the running daemon has ended, asked to {do}")
                message, fds = received
                come += fds
                if len(come) > MOST_FDS:
                    raise ControlError("the running daemon sends descriptors without end")
                if message.get("said") == "released":
                    self._has_released(message)
                elif message.get("said") == "ending":
                    self._is_ending = True
                    raise ControlError("the running daemon was told to end meanwhile")
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
