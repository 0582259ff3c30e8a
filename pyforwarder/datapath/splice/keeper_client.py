"""Asks the keeper of spliced pairs (keeper.py), and waits for its answer.

For the supervisor, which asks in the name of a worker that has died, and for the process that tells
of other machines' pairs. A worker does not wait: keeper_asker.py.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import socket
import termios
import time
from collections.abc import Sequence
from typing import Any, Final

from pyforwarder.errors import DatapathError
from pyforwarder.runtime.slowness import scaled_s

# Within that a request must have been read; a request that was read in time is done soon.
_READ_TIMEOUT_S: Final = 0.25
_ANSWER_TIMEOUT_S: Final = 2.0
# And so long after that moment no pair begins any more.
_BEGIN_TIMEOUT_S: Final = 0.75
# And within that where nobody else waits for it, in the self-test: that a host is busy is no reason
# to go without spliced pairs.
_PATIENT_TIMEOUT_S: Final = 5.0
MOST_MESSAGE_BYTES: Final = 8192

_numbers: Final = itertools.count()  # of what this process has asked


class KeeperError(DatapathError):
    """The keeper did not answer."""


def read_timeout_s(*, is_patient: bool) -> float:
    """Within that a request must have been read whose caller waits."""
    return scaled_s(_PATIENT_TIMEOUT_S if is_patient else _READ_TIMEOUT_S)


def begins_until_s(until_s: float) -> float:
    """When no pair begins any more whose request had to be read until `until_s`."""
    return until_s + scaled_s(_BEGIN_TIMEOUT_S)


def next_number() -> int:
    """Of a request: no other has it that was sent over the same socket, by any process."""
    return os.getpid() << 32 | next(_numbers)


def read_answer(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next one, and the descriptors that came with it, which are the caller's.

    Raises:
        BrokenPipeError: there will never be another.
        OSError: of the socket.
    """
    data, given, _, _ = socket.recv_fds(sock, MOST_MESSAGE_BYTES, 2)
    for fd in given:
        os.set_inheritable(fd, False)
    if not data:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return json.loads(data), given


def is_unread(sock: socket.socket) -> bool:
    """Whether anything that was sent is still in the other end's queue."""
    return any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))


class KeeperClient:
    """Asks one thing, and waits for its answer.

    While the keeper has not even read what it was asked last, it is not asked again, and nobody
    waits.
    """

    def __init__(self, sock: socket.socket, *, is_patient: bool = False) -> None:
        """`is_patient`: a request need not be read at once."""
        self._sock = sock
        self._is_patient = is_patient
        self._is_silent = False

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        """The keeper's answer.

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
            if not (self._is_silent and is_unread(self._sock)):
                answer, given = self._ask(do, fds, fields)
                self._is_silent = "late" in answer
                if not self._is_silent:
                    return answer, given
        except OSError as error:
            raise KeeperError("ask the splice keeper", error.errno or errno.ETIMEDOUT) from error
        raise KeeperError("ask the splice keeper", errno.ETIMEDOUT)

    def _ask(
        self, do: str, fds: Sequence[int], fields: dict[str, object]
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer; {"late": ...} if the request has not been and will not be obeyed."""
        # What was given up, or asked by another worker, dead by now, may still be answered.
        number = next_number()
        timeout_s = read_timeout_s(is_patient=self._is_patient)
        request = {"do": do, "n": number, "until": time.monotonic() + timeout_s, **fields}
        self._sock.settimeout(timeout_s)
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
            return self._answer(number)
        except TimeoutError:
            if is_unread(self._sock):
                return {"late": True}, []
        self._sock.settimeout(scaled_s(_ANSWER_TIMEOUT_S))
        return self._answer(number)

    def _answer(self, number: int) -> tuple[dict[str, Any], list[int]]:
        while True:
            answer, given = read_answer(self._sock)
            if answer.get("n") == number:
                return answer, given
            for fd in given:
                os.close(fd)
