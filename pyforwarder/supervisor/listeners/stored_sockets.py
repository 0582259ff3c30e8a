"""Listening sockets that the service manager keeps for us (sd_notify(3), FDSTORE=1).

With them a port is never closed, however the daemon ends: a client that connects before it is there
again waits in the kernel. The manager gives them to the next process as it gives those of a .socket
unit, by the name below, and forgets them when the unit is stopped.
"""

from __future__ import annotations

import array
import contextlib
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.supervisor.listeners.binding import BoundSocket

if TYPE_CHECKING:
    from collections.abc import Mapping

# What they are called there: no FileDescriptorName= of a unit is.
NAME: Final = "pyforwarder-listener"
# The kernel takes 253 with a message (SCM_MAX_FD).
_AT_ONCE: Final = 250
_ROOM_S: Final = 1.0  # how long each message waits for a manager that reads
_SO_ACCEPTCONN: Final = 30  # asm-generic/socket.h; Python has a name for it from 3.13 on


def is_kept(environ: Mapping[str, str]) -> bool:
    """Whether there is a manager that keeps sockets, and how many is left to it."""
    return bool(environ.get("NOTIFY_SOCKET")) and environ.get("FDSTORE", "0") != "0"


def store(path: str, sockets: Iterable[BoundSocket]) -> None:
    """Have the manager that listens at `path` keep these, and no others of ours.

    Raises:
        OSError: it cannot be told, or has no room for a message within a second.
    """
    # What systemd has passed itself it has anyway.
    fds = [sock.fileno() for each in sockets if each.is_ours for sock in each.sockets]
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(_ROOM_S)
        notify.sendto(f"FDSTOREREMOVE=1\nFDNAME={NAME}".encode(), address)
        for first in range(0, len(fds), _AT_ONCE):
            rights = array.array("i", fds[first : first + _AT_ONCE])
            notify.sendmsg(
                [f"FDSTORE=1\nFDPOLL=0\nFDNAME={NAME}".encode()],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
                0,
                address,
            )


def restored(sockets: Sequence[socket.socket], workers: int) -> list[BoundSocket]:
    """Return the sockets that were kept, by address, as listeners have them; ours from here on.

    What a daemon with so many workers has no use for is closed: a socket from which nobody accepts
    would leave its share of the clients waiting.
    """
    by_address: dict[tuple[str, Address | UnixAddress], list[socket.socket]] = {}
    for sock in sockets:
        where = _where(sock)
        if where is None:
            sock.close()
        else:
            by_address.setdefault(where, []).append(sock)
    found = []
    for (protocol, bind), some in by_address.items():
        wanted = 1 if isinstance(bind, UnixAddress) else workers
        # A client of UDP belongs to one socket, and that to one worker.
        kept = some[:wanted] if protocol == "tcp" or len(some) == wanted else []
        for sock in some:
            if sock not in kept:
                sock.close()
        if kept:
            bound = BoundSocket.inherited(
                bind, bind, kept, protocol=protocol, is_ours=True, mode=None, freebind=False
            )
            bound.is_shared = False
            found.append(bound)
    return found


def _where(sock: socket.socket) -> tuple[str, Address | UnixAddress] | None:
    """Protocol and address; None: it is none of a listener's."""
    with contextlib.suppress(OSError):
        if sock.type == socket.SOCK_STREAM:
            if not sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN):
                return None
            name = sock.getsockname()
            if sock.family == socket.AF_UNIX:
                return ("tcp", UnixAddress(name)) if isinstance(name, str) and name else None
            return "tcp", Address(name[0], name[1])
        if sock.type == socket.SOCK_DGRAM and sock.family != socket.AF_UNIX:
            name = sock.getsockname()
            return "udp", Address(name[0], name[1])
    return None
