"""A worker process, as its supervisor sees it: forked, asked, granted, ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.send_buffer import enlarge_send_buffer
from pyforwarder.descriptors import duplicate_socket
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.worker.channel import Channel
from pyforwarder.worker.process import Inheritance, main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# A worker answers between two turns of its loop; one that does not for so long is stuck.
ANSWER_TIMEOUT_S: Final = 10.0
# Level and option with which a socket may be bound to an address that is not this host's (ip(7)).
TRANSPARENT: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TRANSPARENT),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),  # IPV6_TRANSPARENT, linux/in6.h
}


class WorkerProcess:
    """One worker, from fork to wait."""

    def __init__(self, make: Callable[[Channel], Inheritance], close_in_child: Callable[[], None]):
        """Fork; the child runs `worker.process.main` and never returns from here."""
        ours, theirs = Channel.pair()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                close_in_child()
                code = main(make(theirs))
            finally:
                # No cleanup of the parent's objects, no buffered output twice. Its connections
                # end as resets: every socket has SO_LINGER 0.
                os._exit(code)
        theirs.close()
        self.pid = pid
        self.channel = ours
        self.started_s = time.monotonic()
        self.exit_code: int | None = None
        # Whether it may connect from any address: set while an upstream is `transparent`.
        self.may_be_transparent = False
        self._number = 0

    def ask(self, do: str, fds: Sequence[int] = (), **fields: object) -> Any:
        """Send a request and wait for its result.

        Raises:
            ControlError: the worker refused, died or did not answer in time.
        """
        self._number += 1
        try:
            self.channel.send({"do": do, "n": self._number, **fields}, fds)
            return self._result(self._number)
        except OSError as error:
            raise ControlError(f"worker {self.pid}: {error.strerror or error}") from error

    def _result(self, number: int) -> Any:
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        readable = select.poll()  # select(2) ends at descriptor 1023
        readable.register(self.channel.fileno(), select.POLLIN)
        while True:
            left_ms = (deadline_s - time.monotonic()) * 1000
            if left_ms <= 0 or not readable.poll(left_ms):
                raise ControlError(f"worker {self.pid} does not answer")
            received = self.channel.receive()
            if received is None:
                raise ControlError(f"worker {self.pid} has died")
            message, fds = received
            if "ask" in message:
                self._grant(message, fds)
            elif message["n"] == number:
                if "error" in message:
                    raise ControlError(message["error"])
                return message["result"]

    def hear(self) -> bool:
        """Serve what the worker asks of its own accord; False once it has gone."""
        try:
            received = self.channel.receive()
        except BlockingIOError:
            return True
        except OSError:
            return False
        if received is None:
            return False
        message, fds = received
        if "ask" in message:
            self._grant(message, fds)
        return True

    def _grant(self, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        answer = grant(message, fds, may_be_transparent=self.may_be_transparent)
        if answer is not None:
            # If it is gone, SIGCHLD tells.
            with contextlib.suppress(OSError):
                self.channel.send({"granted": answer, "number": message.get("number")})

    def has_ended(self) -> bool:
        """Whether the process is gone; reaps it."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return False
            self.exit_code = os.waitstatus_to_exitcode(status)
        return True

    def kill(self) -> None:
        """End it at once; its peers see resets."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.exit_code = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()


def grant(
    message: Mapping[str, Any], fds: Sequence[int], *, may_be_transparent: bool
) -> bool | None:
    """Do for a worker what needs a privilege; closes the descriptors.

    A worker is not trusted: whatever it asks, this is all it can get. Returns whether it was done,
    for a worker that waits to know; None: it does not.
    """
    try:
        if len(fds) != 1:
            return None
        with duplicate_socket(fds[0]) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if message["ask"] == "enlarge":
                enlarge_send_buffer(sock, max(0, int(message["number"])))
            elif message["ask"] == "transparent":
                if may_be_transparent:
                    sock.setsockopt(*TRANSPARENT[sock.family], 1)
                return may_be_transparent
    except (OSError, ValueError, TypeError):
        # Not a socket, no privilege, or no sense: the worker goes on without.
        return False if message["ask"] == "transparent" else None
    finally:
        for fd in fds:
            os.close(fd)
    return None


def ask_all(workers: Sequence[WorkerProcess], do: str, **fields: object) -> list[Any]:
    """The answers of all workers that gave one; those that died are replaced elsewhere."""
    answers = []
    for worker in workers:
        try:
            answers.append(worker.ask(do, (), **fields))
        except ControlError:
            if not worker.has_ended():
                raise
    return answers


def check_user(user: str) -> None:
    """Raise ForwarderError if the workers' user does not exist."""
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        raise ForwarderError(f"no user {user!r} on this host (config key `user`)") from None
