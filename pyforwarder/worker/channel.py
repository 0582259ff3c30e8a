"""Messages between the supervisor and a worker: JSON and descriptors over a unix socket.

SOCK_SEQPACKET keeps messages whole, and its end says that the other process is gone. What may be
larger than a message (a configuration) travels as a memfd.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

_MOST_BYTES: Final = 128 * 1024
_MOST_FDS: Final = 253  # SCM_MAX_FD (unix(7))
# How many listeners fit into one message of settings, beside the text and a large message's own.
MOST_LISTENERS: Final = 250
# How many may wait to be accepted at one of its sockets: somaxconn caps it; HAProxy and nginx ask
# for as much as they may, too.
BACKLOG: Final = 4096
_IN_LAST_FD: Final = b'"in the last descriptor"'
_MOST_TEXT_BYTES: Final = 64 << 20
SEND_TIMEOUT_S: Final = 5.0
_TIMEVAL: Final = struct.Struct("@ll")  # struct timeval
_FD: Final = struct.Struct("@i")


class Channel:
    """One end. Sending waits at most `SEND_TIMEOUT_S`; receiving never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Not settimeout(): with a timeout Python would wait for a message in spite of MSG_DONTWAIT.
        sock.setblocking(True)
        seconds = int(SEND_TIMEOUT_S)
        timeval = _TIMEVAL.pack(seconds, int((SEND_TIMEOUT_S - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

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
        text = json.dumps(message)
        if len(text) <= _MOST_BYTES:
            socket.send_fds(self._sock, [text.encode()], list(fds))
            return
        fd = text_to_fd(text)
        try:
            socket.send_fds(self._sock, [_IN_LAST_FD], [*fds, fd])
        finally:
            os.close(fd)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which the caller closes; None at the end.

        Raises:
            BlockingIOError: there is none yet.
            OSError, ValueError: what came is no message.
        """
        # Not socket.recv_fds(), which takes flags and forgets them (Python 3.11).
        data, ancillary, _, _ = self._sock.recvmsg(
            _MOST_BYTES,
            socket.CMSG_SPACE(_MOST_FDS * _FD.size),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
        fds = [
            fd
            for level, kind, numbers in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (fd,) in _FD.iter_unpack(numbers)
        ]
        if not data:
            return None
        if data == _IN_LAST_FD and fds:
            data = text_from_fd(fds.pop()).encode()
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
    """The text that `text_to_fd` sent; closes the descriptor.

    Raises:
        OSError, ValueError: it is something else. (A worker is not trusted: a pipe would block.)
    """
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_TEXT_BYTES:
            raise ValueError("no message in the descriptor")
        file.seek(0)
        return file.read(_MOST_TEXT_BYTES).decode()
