"""File descriptors that are somebody else's."""

from __future__ import annotations

import os
import socket


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
