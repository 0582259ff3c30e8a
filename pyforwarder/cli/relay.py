"""Carry bytes between stdin/stdout and a connection, exactly.

One chunk per direction is held at a time, so a slow reader stops the writer on the other side and
neither direction ever waits for the other.  End of file is carried like a byte: after the last
byte of stdin comes a FIN, after the last byte of the connection stdout is closed, and the other
direction goes on.

None of the three descriptors may block.  The connection is ours and made non-blocking.  stdin and
stdout are not: O_NONBLOCK belongs to the open file, which a shell and other programs share, and
would stay behind if we were killed.  So they are only touched after poll(2) said so, stdout for
at most PIPE_BUF bytes, for which a pipe that polls writable has room (pipe(7)).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
from typing import Final

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.descriptors import duplicate_socket

_READ_BYTES: Final = 1 << 18
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, 0 s (socket(7))
_FIN_ON_CLOSE: Final = struct.pack("ii", 0, 0)
_BROKEN: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class RelayError(ForwarderError):
    """The connection or one of our own ends broke before both directions had ended."""


def relay(connection: socket.socket, *, stdin_fd: int, stdout_fd: int) -> None:
    """Run until both directions have ended; `connection` is closed then, also after an error.

    `stdout_fd` ends up open on /dev/null once the connection's end of file was passed on, so that
    its reader sees the end and the number is not given to something else.

    Until both directions are through, closing means a reset: if this process dies, the other side
    must not take what it got for the whole.

    Raises:
        RelayError: bytes were lost: the connection was reset, or stdout's reader left.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        stdout_socket = None
        if _is_open(stdout_fd) and stat.S_ISSOCK(os.fstat(stdout_fd).st_mode):
            stdout_socket = stack.enter_context(duplicate_socket(stdout_fd))
        _Relay(connection, stdin_fd, stdout_fd, stdout_socket).run()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN_ON_CLOSE)


class _Relay:
    def __init__(
        self,
        connection: socket.socket,
        stdin_fd: int,
        stdout_fd: int,
        stdout_socket: socket.socket | None,
    ) -> None:
        self._connection = connection
        self._stdin_fd = stdin_fd
        self._stdout_fd = stdout_fd
        self._stdout_socket = stdout_socket
        self._up = memoryview(b"")  # read from stdin, not yet taken by the connection
        self._down = memoryview(b"")
        self._stdin_ended = not _is_open(stdin_fd)
        self._connection_ended = False
        self._up_done = False  # FIN sent, or nobody left to send to
        self._down_done = False
        self._broken: OSError | None = None

    def run(self) -> None:
        while True:
            self._pass_on_ends()
            if self._up_done and self._down_done:
                break
            events = self._wait()
            if events.get(self._stdout_fd, 0) & (select.POLLOUT | _BROKEN):
                self._write_stdout()
            if connection_events := events.get(self._connection.fileno(), 0):
                self._on_connection(connection_events)
            if events.get(self._stdin_fd, 0) & (select.POLLIN | _BROKEN):
                self._read_stdin()
        if self._broken:
            raise RelayError(f"the connection broke: {self._broken.strerror}") from self._broken

    def _pass_on_ends(self) -> None:
        if self._stdin_ended and not self._up and not self._up_done:
            self._up_done = True
            try:
                self._connection.shutdown(socket.SHUT_WR)
            except OSError as error:  # ENOTCONN: a reset came first
                self._broken = self._broken or error
        if self._connection_ended and not self._down and not self._down_done:
            self._down_done = True
            self._end_stdout()

    def _wait(self) -> dict[int, int]:
        """Events by descriptor, of those that something can be done with now.

        poll reports POLLHUP and POLLERR even for an empty mask, without end: a descriptor that
        is of no use at the moment is left out.
        """
        wanted: dict[int, int] = {}
        if not self._stdin_ended and not self._up and not self._up_done:
            wanted[self._stdin_fd] = select.POLLIN
        if self._down:
            wanted[self._stdout_fd] = wanted.get(self._stdout_fd, 0) | select.POLLOUT
        elif self._stdin_ended and not self._down_done:
            # stdin is at its end: the program that started us may be gone for good, and an end of
            # stdout is the only thing that tells
            wanted.setdefault(self._stdout_fd, 0)
        mask = 0
        if self._up:
            mask |= select.POLLOUT
        if not self._connection_ended and not self._down:
            mask |= select.POLLIN
        if mask or not self._up_done:
            wanted[self._connection.fileno()] = mask
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        return dict(poll.poll())

    def _on_connection(self, events: int) -> None:
        if events & _BROKEN and not self._up_done:
            # We have sent no FIN, so the connection is over on both sides: a reset (or, on a unix
            # socket, a close, which loses nothing if we have nothing to send).
            number = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number or self._up:
                self._broken = self._broken or _os_error(number or errno.ECONNRESET)
            self._give_up_sending()
        if self._up:
            try:
                self._up = self._up[self._connection.send(self._up) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._broken = self._broken or error
                self._give_up_sending()
        if not self._connection_ended and not self._down:
            try:
                data = self._connection.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._broken = self._broken or error
                self._give_up_sending()
                data = b""
            self._down = memoryview(data)
            self._connection_ended = not data

    def _give_up_sending(self) -> None:
        """The connection takes no more; what it brought before is still read and passed on."""
        self._up = memoryview(b"")
        self._up_done = True

    def _read_stdin(self) -> None:
        try:
            data = os.read(self._stdin_fd, _READ_BYTES)
        except BlockingIOError:  # another process made it non-blocking and was faster
            return
        except OSError as error:
            raise RelayError(f"stdin: {error.strerror}") from error
        self._up = memoryview(data)
        self._stdin_ended = not data

    def _write_stdout(self) -> None:
        if not self._down:  # we only asked whether there is a reader still
            if self._up_done and not self._broken:
                # As ssh does at its end. What the other side may still send, the kernel resets.
                self._down_done = True
                return
            raise RelayError("stdout: nobody reads it any more")
        try:
            if self._stdout_socket is not None:
                count = self._stdout_socket.send(self._down, socket.MSG_DONTWAIT)
            else:
                count = os.write(self._stdout_fd, self._down[: select.PIPE_BUF])
        except BlockingIOError:
            return
        except OSError as error:
            raise RelayError(f"stdout: {error.strerror}") from error
        self._down = self._down[count:]

    def _end_stdout(self) -> None:
        """Let the reader of stdout see end of file."""
        if self._stdout_socket is not None:
            # others may hold the same socket (stdin and stderr under inetd): closing would not show
            with contextlib.suppress(OSError):  # ENOTCONN: its reader left first
                self._stdout_socket.shutdown(socket.SHUT_WR)
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, self._stdout_fd, inheritable=False)
        finally:
            os.close(nowhere)


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
