"""A worker's end of its talk with the keeper of spliced pairs (keeper.py): asks, and is answered.

Also the supervisor's, where it asks in the name of a worker that has died.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import select
import socket
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.errors import DatapathError
from pyforwarder.runtime.slowness import scaled_s

# Within that a request must have been read; whatever was read in time is done soon.
_READ_TIMEOUT_S: Final = 0.25
_ANSWER_TIMEOUT_S: Final = 2.0
# And so long after that moment no pair begins any more: its worker waits no longer.
_BEGIN_TIMEOUT_S: Final = 0.75
# And within that where nobody else waits for it, in the self-test: that a host is busy is no reason
# to go without spliced pairs.
_PATIENT_TIMEOUT_S: Final = 5.0
# The programs read another clock than we do (ktime_get_mono_fast_ns): both are as late by then.
_MARGIN_S: Final = 0.01
MOST_MESSAGE_BYTES: Final = 8192

_numbers: Final = itertools.count()  # of what this process has asked


class KeeperError(DatapathError):
    """The keeper did not answer."""


def begins_until_s(until_s: float) -> float:
    """When no pair begins any more whose request had to be read until `until_s`."""
    return until_s + scaled_s(_BEGIN_TIMEOUT_S)


class KeeperClient:
    """A worker's end: asks, and waits for the answer (`ask`) or not (`begin`, `answers`).

    While the keeper has not even read what it was asked last, it is not asked again, and nobody
    waits.
    """

    def __init__(self, sock: socket.socket, *, is_patient: bool = False) -> None:
        """`is_patient`: a request need not be read at once."""
        self._sock = sock
        self._read_timeout_s = _PATIENT_TIMEOUT_S if is_patient else _READ_TIMEOUT_S
        self._is_silent = False
        # Asked by `begin` and not answered; answers that came as that to another was waited for.
        self._open: set[int] = set()
        self._early: list[tuple[int, dict[str, Any]]] = []
        self.on_early: Callable[[], None] = lambda: None  # called when there are such answers

    def fileno(self) -> int:
        """Readable when there may be `answers`."""
        return self._sock.fileno()

    @property
    def longest_s(self) -> float:
        """So long after `begin` no pair begins any more."""
        return begins_until_s(scaled_s(self._read_timeout_s)) + _MARGIN_S

    def begin(self, do: str, fds: Sequence[int], **fields: object) -> int:
        """Ask, and do not wait: the number of one of `answers`; 0: nobody would read it now."""
        if self._is_silent and self._is_unread():
            return 0
        number = os.getpid() << 32 | next(_numbers)
        until_s = time.monotonic() + scaled_s(self._read_timeout_s)
        request = {"do": do, "n": number, "until": until_s, **fields}
        self._sock.setblocking(False)
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
        except OSError:
            return 0
        self._open.add(number)
        return number

    def answers(self) -> list[tuple[int, dict[str, Any]]]:
        """What has come of what was asked by `begin`, each with its number; does not wait.

        Raises:
            KeeperError: nobody will ever answer.
        """
        self._sock.setblocking(False)
        try:
            while True:
                self._read_answer()
        except BlockingIOError:
            pass
        except OSError as error:
            if not self._early:
                raise KeeperError("hear the splice keeper", error.errno or errno.EPIPE) from error
        found, self._early = self._early, []
        for _, answer in found:
            self._is_silent = "late" in answer
        return found

    def wait(self, wait_s: float) -> None:
        """Until there are `answers`, but no longer."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.poll(math.ceil(wait_s * 1000))

    def give_up(self, number: int) -> None:
        """What was asked by `begin` has not been answered in time."""
        self._open.discard(number)
        self._is_silent = True

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        """The keeper's answer; what was to begin and it has not read in time is refused.

        Raises:
            KeeperError: there was none.
        """
        answer, given = self.ask_for_sockets(do, fds, **fields)
        for fd in given:
            os.close(fd)
        return answer

    def ask_for_sockets(
        self, do: str, fds: Sequence[int] = (), **fields: object
    ) -> tuple[dict[str, Any], list[int]]:
        """The same, and the descriptors that came with it, which are the caller's."""
        try:
            if not (self._is_silent and self._is_unread()):
                answer, given = self._ask(do, fds, fields)
                self._is_silent = "late" in answer
                if not self._is_silent:
                    return answer, given
        except OSError as error:
            raise KeeperError("ask the splice keeper", error.errno or errno.ETIMEDOUT) from error
        if do in ("join", "open_session"):  # nothing was begun
            return {"refused": int(PairReason.NO_KEEPER)}, []
        raise KeeperError("ask the splice keeper", errno.ETIMEDOUT)

    def _ask(
        self, do: str, fds: Sequence[int], fields: dict[str, object]
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer; {"late": ...} if the request has not been and will not be obeyed.

        {"overdue": ...} to `join`: it was read; if the pair has not begun by now it will not.
        """
        # What was given up, or asked by another worker, dead by now, may still be answered.
        number = os.getpid() << 32 | next(_numbers)
        read_timeout_s = scaled_s(self._read_timeout_s)
        request = {"do": do, "n": number, "until": time.monotonic() + read_timeout_s, **fields}
        self._sock.settimeout(read_timeout_s)
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
            return self._answer(number)
        except TimeoutError:
            if self._is_unread():
                return {"late": True}, []
        if do != "join":
            self._sock.settimeout(scaled_s(_ANSWER_TIMEOUT_S))
            return self._answer(number)
        self._sock.settimeout(scaled_s(_BEGIN_TIMEOUT_S))
        try:
            return self._answer(number)
        except TimeoutError:
            time.sleep(_MARGIN_S)
            return {"overdue": True}, []

    def _answer(self, number: int) -> tuple[dict[str, Any], list[int]]:
        try:
            while True:
                answer, given = self._read_answer(number)
                if answer is not None:
                    return answer, given
        finally:
            if self._early:
                self.on_early()

    def _read_answer(self, number: int = 0) -> tuple[dict[str, Any] | None, list[int]]:
        """The next one, if it is that one's; if not it is put by, or nobody waits for it."""
        data, given, _, _ = socket.recv_fds(self._sock, MOST_MESSAGE_BYTES, 2)
        for fd in given:
            os.set_inheritable(fd, False)
        if not data:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        answer: dict[str, Any] = json.loads(data)
        if number and answer.get("n") == number:
            return answer, given
        for fd in given:
            os.close(fd)
        if answer.get("n") in self._open:
            self._open.remove(answer["n"])
            self._early.append((answer["n"], answer))
        return None, []

    def _is_unread(self) -> bool:
        """Whether anything that was asked is still in the keeper's queue."""
        left = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return any(left)
