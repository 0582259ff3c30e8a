"""What a worker could do that a stranger has taken over: its own descriptors, its user, no more.

The descriptors are fetched by root (pidfd_getfd(2)), in a child of the test that then becomes what
a worker is: an unprivileged user without a capability. Code that runs there is the stranger's.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import termios
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from pyforwarder.runtime.descriptors import duplicate_socket

_SYS_PIDFD_GETFD: Final = 438
_PR_SET_NO_NEW_PRIVS: Final = 38
_NOBODY: Final = 65534

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon

Fds = dict[int, int]  # the worker's number -> ours


def kinds(pid: int) -> dict[int, str]:
    """Of every descriptor of a process what it is: `socket:[1]`, `anon_inode:bpf-map`, a path."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry.path)
    return found


def _fetch(pid: int) -> Fds:
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    found = {}
    for number in kinds(pid):
        fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd >= 0:
            found[number] = fd
    os.close(pidfd)
    return found


def as_worker(
    worker: psutil.Process, act: Callable[[Fds], Any], daemon: Daemon | None = None
) -> Any:
    """What `act` returns (JSON), run as the worker's user with what it has open.

    With `daemon`, its keeper's channels are marked just before, for `keeper_channel`.

    Raises:
        AssertionError: it raised; the text is its traceback.
    """
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_fd)
            said: Any = {}
            try:
                fds = _fetch(worker.pid)
                if daemon is not None:
                    mark_keeper_channels(daemon)
                os.setgroups([])
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
                ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                status = Path("/proc/self/status").read_text()
                assert "CapEff:\t0000000000000000" in status
                said = {"result": act(fds)}
            except BaseException:
                said = {"error": traceback.format_exc()}
            os.write(write_fd, json.dumps(said).encode()[:65000])
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        said = json.loads(pipe.read())
    os.waitpid(pid, 0)
    assert "error" not in said, said["error"]
    return said["result"]


def sequenced(fds: Fds) -> list[socket.socket]:
    """Its channels: to the supervisor and to the keeper of spliced pairs, in either order."""
    found = []
    for fd in fds.values():
        try:
            sock = duplicate_socket(fd)
        except OSError:
            continue
        if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            found.append(sock)
        else:
            sock.close()
    return found


def mark_keeper_channels(daemon: Daemon) -> None:
    """Leave an answer that nobody waits for in every worker's channel to the keeper.

    Workers skip such; by it `keeper_channel` tells the two channels of a worker apart.
    """
    for child in psutil.Process(daemon.process.pid).children():
        if child.uids().real == 0:
            fds = _fetch(child.pid)
            for sock in sequenced(fds):
                with sock:
                    sock.send(b'{"n":0}', socket.MSG_DONTWAIT)
            for fd in fds.values():
                os.close(fd)


def keeper_channel(fds: Fds) -> socket.socket:
    """Its channel to the keeper."""
    (sock,) = (
        sock for sock in sequenced(fds) if any(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    )
    return sock


@contextlib.contextmanager
def sockets_of(fds: Fds, kind: int = socket.SOCK_STREAM) -> Iterator[list[socket.socket]]:
    """Its connected internet sockets of this kind."""
    found = []
    for fd in fds.values():
        with contextlib.suppress(OSError):
            sock = duplicate_socket(fd)
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == kind:
                with contextlib.suppress(OSError):
                    sock.getpeername()
                    found.append(sock)
    yield found
    for sock in found:
        sock.close()
