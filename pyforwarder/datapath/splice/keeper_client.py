"""Requests to the keeper of spliced pairs (keeper.py) that wait for the answer.

For the supervisor, which sends them in the name of a worker that has died, and for the process that
reports other machines' pairs. Workers do not wait: keeper_asker.py.
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

from pyforwarder.datapath.splice.keeper_replies import Late, is_late
from pyforwarder.errors import DatapathError
from pyforwarder.runtime.slowness import scaled_s

# A request must be read within this time; one that was read in time is handled soon.
_READ_TIMEOUT_S: Final = 0.25
_ANSWER_TIMEOUT_S: Final = 2.0
# So long after that no pair begins any more.
_BEGIN_TIMEOUT_S: Final = 0.75
# The time to read it in the self-test, during which nothing else waits: a busy host is no reason to
# do without splice.
_PATIENT_TIMEOUT_S: Final = 5.0
MOST_MESSAGE_BYTES: Final = 8192

_numbers: Final = itertools.count()  # of this process's requests


class KeeperError(DatapathError):
    """The keeper did not answer."""


def read_timeout_s(*, is_patient: bool) -> float:
    """How long a request may stay unread whose caller waits."""
    return scaled_s(_PATIENT_TIMEOUT_S if is_patient else _READ_TIMEOUT_S)


def begins_until_s(until_s: float) -> float:
    """When no pair begins any more whose request had to be read until `until_s`."""
    return until_s + scaled_s(_BEGIN_TIMEOUT_S)


def next_number() -> int:
    """A number for a request, unique among all that are sent over one socket, by any process."""
    return os.getpid() << 32 | next(_numbers)


def read_answer(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next answer, and the descriptors that came with it; the caller closes them.

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
    """Whether a message is still in the other end's receive queue."""
    return any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))


class KeeperClient:
    """Sends one request at a time, and waits for its answer.

    While the keeper has not even read the last request, no other is sent, and the caller does not
    wait.
    """

    def __init__(self, sock: socket.socket, *, is_patient: bool = False) -> None:
        """`is_patient`: a request need not be read at once."""
        self._sock = sock
        self._is_patient = is_patient
        self._is_silent = False

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        """Send a request; returns the keeper's answer.

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
        """The same, and the descriptors that came with the answer; the caller closes them."""
        try:
            if not (self._is_silent and is_unread(self._sock)):
                answer, given = self._ask(do, fds, fields)
                self._is_silent = is_late(answer)
                if not self._is_silent:
                    return answer, given
        except OSError as error:
            raise KeeperError("ask the splice keeper", error.errno or errno.ETIMEDOUT) from error
        raise KeeperError("ask the splice keeper", errno.ETIMEDOUT)

    def _ask(
        self, do: str, fds: Sequence[int], fields: dict[str, object]
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer; `Late` if the request was not handled, and will not be."""
        # Earlier requests that were given up, or were sent by a worker that is dead by now, may
        # still be answered.
        number = next_number()
        timeout_s = read_timeout_s(is_patient=self._is_patient)
        request = {"do": do, "n": number, "until": time.monotonic() + timeout_s, **fields}
        self._sock.settimeout(timeout_s)
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], list(fds))
            return self._answer(number)
        except TimeoutError:
            if is_unread(self._sock):
                return Late().words(), []
        self._sock.settimeout(scaled_s(_ANSWER_TIMEOUT_S))
        return self._answer(number)

    def _answer(self, number: int) -> tuple[dict[str, Any], list[int]]:
        while True:
            answer, given = read_answer(self._sock)
            if answer.get("n") == number:
                return answer, given
            for fd in given:
                os.close(fd)
