"""File descriptors that come from another process, or belong to other code."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterable
from typing import Final

# What a last close may take: a socket's with SO_LINGER waits for its peer, until a signal comes.
_MOST_CLOSE_S: Final = 0.02


def duplicate_socket(fd: int) -> socket.socket:
    """A socket of its own for what `fd` names; `fd` stays the caller's.

    Raises:
        OSError: it is no socket, or not open, and nothing is left open.
    """
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def close_given(fds: Iterable[int]) -> None:
    """Close what another process has sent, which may want to hold us up with it (main thread).

    The last close of a TCP socket waits as long as its SO_LINGER says, however it came to us, also
    where it hides in a queue of another socket. It does not wait past a signal: so one comes.
    Source: inet_release, sk_stream_wait_close (net/ipv4/af_inet.c, net/core/stream.c).
    """
    fds = list(fds)
    if not fds:
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, _MOST_CLOSE_S, _MOST_CLOSE_S)
    try:
        for fd in fds:
            os.close(fd)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
