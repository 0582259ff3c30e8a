"""A worker process, as its supervisor sees it: forked, asked, granted, ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.sockmap.send_buffer import MOST_BYTES as MOST_SEND_BUFFER
from pyforwarder.datapath.sockmap.send_buffer import enlarge_send_buffer
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.children import fork
from pyforwarder.runtime.descriptors import close_given, duplicate_socket
from pyforwarder.runtime.pulse import PULSE_S, Pulse, PulseWatch
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import TRANSPARENT
from pyforwarder.supervisor.messages import (
    FROM_WORKER,
    MOST_BYTES,
    Answer,
    Ask,
    FaultyMessageError,
    RefusalMessage,
    TokenClaim,
    understand,
    understand_result,
)
from pyforwarder.worker.process import main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pyforwarder.worker.inheritance import Inheritance
    from pyforwarder.worker.log import Log

# A worker answers between two turns of its loop; one that does not for so long is stuck.
ANSWER_TIMEOUT_S: Final = 10.0
# The kernel takes back all of its memory between the last words of a process and its end.
_ENDS_WITHIN_S: Final = 2.0
# How much it may ask before it answers, and how many of our answers it may leave unread.
_MOST_BEFORE_ANSWER: Final = 20_000
_MOST_UNSENT: Final = 1024
_MOST_SHOWN: Final = 200
_MOST_CLAIMS: Final = 64
# What a worker may ask in that time: it asks once for a connection, if at all.
_WHILE_S: Final = 0.1
_MOST_IN_A_WHILE: Final = 2000


class WorkerProcess:
    """One worker, from fork to wait."""

    def __init__(
        self,
        make: Callable[[Channel, Pulse], Inheritance],
        close_in_child: Callable[[], None],
        log: Log,
        claim: Callable[[TokenClaim, Callable[[bool | None], None]], None] | None = None,
    ) -> None:
        """Fork; the child runs `worker.process.main` and never returns from here.

        `claim` has a token used up in a fleet, and tells whether that was its first use.
        """
        ours, theirs = Channel.pair()
        self._pulse = Pulse()

        def child() -> int:
            # When it ends its connections end as resets: every socket has SO_LINGER 0.
            ours.close()
            close_in_child()
            return main(make(theirs, self._pulse))

        self.pid = fork(child)
        theirs.close()
        self.channel = ours
        self.started_s = time.monotonic()
        self.exit_code: int | None = None
        # Whether it may connect from any address: set while an upstream is `transparent`.
        self.may_be_transparent = False
        self._number = 0
        self._watch = PulseWatch(self._pulse, self.pid)
        self._log = log
        self._claim = claim
        self._claims = 0  # that are not answered yet
        self._received = 0
        self._heard_since_s = 0.0
        self._unsent: deque[Mapping[str, object]] = deque()  # answers for which it has no room

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> Any:
        """Send a request and wait for its result.

        Raises:
            ControlError: the worker refused, died or did not answer in time, or said what it may
                not say, and was ended for that.
        """
        self._number += 1
        try:
            self.channel.send({"do": do, "n": self._number, **fields}, fds)
            return self._result(do, self._number)
        except OSError as error:
            raise ControlError(f"worker {self.pid}: {error.strerror or error}") from error
        except ControlError:
            raise
        except Exception as error:
            self.fault(error)
            raise ControlError(f"worker {self.pid} does not make sense: {error}") from error

    def _result(self, do: str, number: int) -> Any:
        deadline_s = time.monotonic() + scaled_s(ANSWER_TIMEOUT_S)
        readable = select.poll()  # select(2) ends at descriptor 1023
        readable.register(self.channel.fileno(), select.POLLIN)
        for _ in range(_MOST_BEFORE_ANSWER):
            while not readable.poll(min(PULSE_S, max(0.0, deadline_s - time.monotonic())) * 1000):
                if self.end_if_stuck() or time.monotonic() >= deadline_s:
                    raise ControlError(f"worker {self.pid} does not answer")
            message = self._receive()
            match message:
                case None:
                    raise ControlError(f"worker {self.pid} has died")
                case RefusalMessage(n=n, error=error) if n == number:
                    raise ControlError(error)
                case Answer(n=n, result=result) if n == number:
                    return understand_result(do, result)
        raise FaultyMessageError("it asks without end")

    def receive(self) -> bool:
        """Serve one request that the worker makes of its own accord; False once the worker has
        gone.

        Raises:
            Exception: it said what it may not say.
        """
        if self._unsent:
            self._send_grants()
        if self.is_deaf:
            return True
        try:
            return self._receive() is not None
        except BlockingIOError:
            return True
        except OSError:
            return False

    def has_said_much(self, now_s: float) -> bool:
        """Count a request; returns whether the worker has made more than is good since it was last
        read from.
        """
        if now_s - self._heard_since_s >= _WHILE_S:
            self._heard_since_s, self._received = now_s, 0
        self._received += 1
        return self._received > _MOST_IN_A_WHILE

    def _receive(self) -> Answer | RefusalMessage | Ask | TokenClaim | None:
        """The next message, granted if it asks for something; None at the end.

        Raises:
            BlockingIOError: there is none.
            OSError: the worker has gone.
            ValueError, FaultyMessageError: it is none that a worker may send.
        """
        received = self.channel.receive(most_bytes=MOST_BYTES)
        if received is None:
            return None
        message, fds = received
        try:
            # Where we have no room for descriptors, none came, and nothing can be granted.
            expected = [-1] if self.channel.was_cut else fds
            understood = understand(message, expected, FROM_WORKER)
            if isinstance(understood, Ask):
                self._grant(understood, fds)
                return understood
            if isinstance(understood, TokenClaim):
                self._have_claimed(understood)
                return understood
            assert isinstance(understood, Answer | RefusalMessage)
            if understood.n > self._number:
                raise FaultyMessageError("an answer to what was not asked")
            return understood
        finally:
            close_given(fds)

    def _grant(self, asked: Ask, fds: Sequence[int]) -> None:
        answer = grant(asked, fds, may_be_transparent=self.may_be_transparent)
        if answer is not None:
            if len(self._unsent) >= _MOST_UNSENT:
                raise FaultyMessageError("it reads none of its answers")
            self._unsent.append({"granted": answer, "number": asked.number})
            self._send_grants()

    def _have_claimed(self, asked: TokenClaim) -> None:
        def answer(is_first: bool | None) -> None:
            self._claims -= 1
            # A worker that does not read just now misses the answer: it has a deadline of its own.
            with contextlib.suppress(OSError):
                self.channel.send({"claimed": asked.number, "first": is_first}, wait=False)

        self._claims += 1
        # A worker asks for fewer at once (`token_claims.MOST_SENT`).
        if self._claim is None or self._claims > _MOST_CLAIMS:
            answer(None)
        else:
            self._claim(asked, answer)

    @property
    def is_deaf(self) -> bool:
        """Whether the worker has to read what it was sent before it is read from again."""
        return bool(self._unsent)

    def _send_grants(self) -> None:
        # Never waiting: of a worker that does not read we are not the prisoners. If it is gone,
        # SIGCHLD tells.
        try:
            while self._unsent:
                self.channel.send(self._unsent[0], wait=False)
                self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    def fault(self, error: Exception) -> None:
        """End the worker for what it said; SIGCHLD does the rest."""
        if isinstance(error, FaultyMessageError | ValueError):
            self._log.write("error", "worker_fault", pid=self.pid, error=str(error)[:_MOST_SHOWN])
        else:
            self._log.fault("worker_fault", error, pid=self.pid)
        self.kill()

    def end_if_stuck(self) -> bool:
        """End the worker if it does nothing any more, and return whether that is so; SIGCHLD does
        the rest.

        Nobody waits for its end: it may be in the middle of a system call.
        """
        why = "" if self.exit_code is not None else self._watch.why_stuck()
        if why:
            self._log.write("error", "worker_hangs", pid=self.pid, why=why)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return bool(why)

    def has_ended(self) -> bool:
        """Whether the process is gone; reaps it."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return False
            self.exit_code = os.waitstatus_to_exitcode(status)
        return True

    def is_ending(self) -> bool:
        """Whether the process is gone, or ends by itself; then it is waited for, and reaped.

        For one that gives no answer. A process closes what it has open a moment before it can be
        reaped; one that is there for longer after that is stuck.
        """
        if not self.has_ended() and _is_closed(self.channel):
            pidfd = os.pidfd_open(self.pid)
            try:
                _poll(pidfd, select.POLLIN, timeout_s=scaled_s(_ENDS_WITHIN_S))
            finally:
                os.close(pidfd)
        return self.has_ended()

    def kill(self) -> None:
        """End the worker at once; its peers see resets."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.exit_code = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Close the channel, and unmap what shows that it works."""
        self.channel.close()
        self._pulse.close()


def grant(asked: Ask, fds: Sequence[int], *, may_be_transparent: bool) -> bool | None:
    """Do for a worker what needs a privilege; the descriptors stay the caller's.

    A worker is not trusted: this is all that it can get. Returns whether it was done,
    for a worker that waits to know; None: it does not.
    """
    waits = asked.ask == "transparent"
    try:
        if len(fds) != 1:
            return False if waits else None
        with duplicate_socket(fds[0]) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                if not waits:
                    enlarge_send_buffer(sock, min(asked.number, MOST_SEND_BUFFER))
                    return None
                if may_be_transparent:
                    sock.setsockopt(*TRANSPARENT[sock.family], 1)
                    return True
    except OSError:
        pass  # not a socket, or no privilege: the worker goes on without
    return False if waits else None


def ask_all(workers: Sequence[WorkerProcess], do: str, **fields: object) -> list[Any]:
    """The answers of all workers that gave one; those that died are replaced elsewhere."""
    answers = []
    for worker in workers:
        try:
            answers.append(worker.ask(do, (), **fields))
        except ControlError:
            if not worker.is_ending():
                raise
    return answers


def _is_closed(channel: Channel) -> bool:
    """Whether the other end is."""
    return bool(_poll(channel.fileno(), 0, timeout_s=0) & select.POLLHUP)


def _poll(fd: int, events: int, *, timeout_s: float) -> int:
    """Which of the events there are, and POLLHUP, which is always looked for; 0: none in time."""
    poll = select.poll()
    poll.register(fd, events)
    return next((mask for _, mask in poll.poll(timeout_s * 1000)), 0)


def check_user(user: str) -> None:
    """Raise ForwarderError if the workers' user does not exist."""
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        raise ForwarderError(f"no user {user!r} on this host (config key `user`)") from None
