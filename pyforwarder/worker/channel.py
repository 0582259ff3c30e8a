"""Messages between the supervisor and a worker: JSON and descriptors over a unix socket.

SOCK_SEQPACKET keeps messages whole, and its end says that the other process is gone. What may be
larger than a message (a configuration) travels as a memfd.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

_MOST_BYTES: Final = 128 * 1024
_MOST_FDS: Final = 250  # SCM_MAX_FD is 253
SEND_TIMEOUT_S: Final = 5.0


class Channel:
    """One end. Sending waits at most `SEND_TIMEOUT_S`; receiving never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(SEND_TIMEOUT_S)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """The supervisor's end and the worker's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """For epoll."""
        return self._sock.fileno()

    def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send one message; the descriptors stay the caller's.

        Raises:
            OSError: the other process is gone, or has not read for too long.
        """
        data = json.dumps(message).encode()
        if len(data) > _MOST_BYTES or len(fds) > _MOST_FDS:
            raise ValueError("message too large for the channel")
        socket.send_fds(self._sock, [data], list(fds))

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which the caller closes; None at the end.

        Raises:
            BlockingIOError: there is none yet.
        """
        data, fds, _, _ = socket.recv_fds(
            self._sock, _MOST_BYTES, _MOST_FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            return None
        message: dict[str, Any] = json.loads(data)
        return message, fds

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


def text_to_fd(text: str) -> int:
    """A text of any size as a descriptor to send; the caller closes it."""
    fd = os.memfd_create("pyforwarder-settings", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(text.encode())
    return fd


def text_from_fd(fd: int) -> str:
    """The text that `text_to_fd` sent; closes the descriptor."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read().decode()
