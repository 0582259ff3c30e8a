"""Descriptors of another process, by pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from typing import Final

from pyforwarder.errors import ControlError
from pyforwarder.runtime.descriptors import duplicate_socket

_SYS_PIDFD_GETFD: Final = 438  # the same number on every architecture (since Linux 5.6)


def fetch_descriptors(pid: int, numbers: Sequence[int]) -> list[int]:
    """Our own duplicates of the process's descriptors, which the caller closes.

    Raises:
        ControlError: no such process or descriptor, no permission, or not a connected stream.
    """
    fetched: list[int] = []
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise ControlError(f"process {pid}: {error.strerror}") from error
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for number in numbers:
            fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
            if fd < 0:
                reason = os.strerror(ctypes.get_errno())
                raise ControlError(f"process {pid}, descriptor {number}: {reason}")
            fetched.append(fd)
            _check_connected(fd, f"process {pid}, descriptor {number}")
    except ControlError:
        for fd in fetched:
            os.close(fd)
        raise
    finally:
        os.close(pidfd)
    return fetched


def _check_connected(fd: int, what: str) -> None:
    try:
        with duplicate_socket(fd) as sock:
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            sock.getpeername()
    except OSError as error:
        raise ControlError(f"{what} is not a connected socket: {error.strerror}") from error
    if kind != socket.SOCK_STREAM:
        raise ControlError(f"{what} is not a stream socket")
