"""Messages between the supervisor and a worker: JSON and descriptors over a unix socket.

SOCK_SEQPACKET keeps messages whole, and its end says that the other process is gone. What may be
larger than a message (a configuration) travels as a memfd.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
import sys
import termios
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.slowness import scaled_s

_MOST_BYTES: Final = 128 * 1024
_MOST_FDS: Final = 253  # SCM_MAX_FD (unix(7))
# How many listening sockets fit into one message, beside the settings' text and a large message's
# own descriptor.
MOST_SOCKETS: Final = 250
# How many may wait to be accepted at one of its sockets: somaxconn caps it; HAProxy and nginx ask
# for as much as they may, too.
BACKLOG: Final = 4096
_IN_LAST_FD: Final = b'"in the last descriptor"'
_MOST_TEXT_BYTES: Final = 64 << 20
# Nobody can change it any more, or take from its end what is about to be read.
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SEND_TIMEOUT_S: Final = 5.0
_TIMEVAL: Final = struct.Struct("@ll")  # struct timeval
_FD: Final = struct.Struct("@i")


class Channel:
    """An end of a channel. Sending waits at most `SEND_TIMEOUT_S`; receiving never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.was_cut = False  # the last message came without its descriptors
        # Not settimeout(): with a timeout Python would wait for a message in spite of MSG_DONTWAIT.
        sock.setblocking(True)
        timeout_s = scaled_s(SEND_TIMEOUT_S)
        seconds = int(timeout_s)
        timeval = _TIMEVAL.pack(seconds, int((timeout_s - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """The supervisor's end and the worker's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        """The descriptor, for epoll."""
        return self._sock.fileno()

    def send(
        self, message: Mapping[str, object], fds: Sequence[int] = (), *, wait: bool = True
    ) -> None:
        """Send one message; the descriptors stay the caller's.

        Raises:
            OSError: the other process is gone, or has not read for too long (without `wait`: has
                no room for it just now).
        """
        text = json.dumps(message)
        if len(text) <= _MOST_BYTES:
            self._send_some(text.encode(), fds, wait=wait)
            return
        fd = text_to_fd(text)
        try:
            self._send_some(_IN_LAST_FD, [*fds, fd], wait=wait)
        finally:
            os.close(fd)

    def _send_some(self, data: bytes, fds: Sequence[int], *, wait: bool) -> None:
        # Not socket.send_fds(), which forgets its flags (Python 3.11).
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        flags = 0 if wait else socket.MSG_DONTWAIT
        self._sock.sendmsg([data], [rights] if fds else [], flags)

    def unread_bytes(self) -> int:
        """The memory of what was sent and not received yet."""
        return int.from_bytes(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def receive(
        self, *, most_bytes: int = _MOST_TEXT_BYTES
    ) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which the caller closes; None at the end.

        Raises:
            BlockingIOError: there is none yet.
            OSError: the other process is gone.
            ValueError: what came is no message, or longer than `most_bytes`; of its descriptors
                none is left open.
        """
        # Not socket.recv_fds(), which takes flags and forgets them (Python 3.11).
        data, ancillary, flags, _ = self._sock.recvmsg(
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
        # We have no room for descriptors just now; that is no fault of the sender's.
        self.was_cut = bool(flags & socket.MSG_CTRUNC)
        if not data and not fds:
            return None
        try:
            if flags & socket.MSG_TRUNC:
                raise ValueError("a message that is too long")
            if data == _IN_LAST_FD and fds:
                data = text_from_fd(fds.pop(), most_bytes=most_bytes).encode()
            message = json.loads(data)
            if not isinstance(message, dict):
                raise ValueError("a message is an object")
        except (ValueError, OSError, RecursionError) as error:
            close_given(fds)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"no message: {error}") from error
        return message, fds

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


def text_to_fd(text: str) -> int:
    """A text of any size as a descriptor to send; the caller closes it."""
    fd = os.memfd_create("pyforwarder-settings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(text.encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def text_from_fd(fd: int, *, most_bytes: int = _MOST_TEXT_BYTES) -> str:
    """The text that `text_to_fd` sent; closes the descriptor.

    Raises:
        ValueError: it is something else, or longer. (A worker is not trusted: reading a pipe, or a
            file of a slow file system, would block. Only memory can be sealed.)
    """
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("no message in the descriptor")
        size = os.fstat(fd).st_size
        if size > most_bytes:
            raise ValueError("a message that is too long")
        return os.pread(fd, size, 0).decode()
    except OSError as error:
        raise ValueError(f"no message in the descriptor: {error.strerror}") from error
    finally:
        close_given([fd])
