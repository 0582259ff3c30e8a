"""Sockets that systemd has opened for us (sd_listen_fds(3)), by their names.

They are kept open for the daemon's life, so that a reload may take a name out and in again: who
connects meanwhile waits in the socket's backlog.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, SystemdSockets, UnixAddress
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.socket_options import protocol_of

if TYPE_CHECKING:
    from pyforwarder.supervisor.listeners.binding import BoundSocket

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_SO_ACCEPTCONN: Final = 30  # asm-generic/socket.h; Python has a name for it from 3.13 on
_IPPROTO_MPTCP: Final = 262


class Activation:
    """What systemd has passed to this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Takes the descriptors, if they are for this process; no child inherits them."""
        self._sockets: dict[str, list[socket.socket]] = {}
        try:
            pid, count = int(environ.get("LISTEN_PID", "0")), int(environ.get("LISTEN_FDS", "0"))
        except ValueError:
            return
        if pid != os.getpid():
            return
        names = environ.get("LISTEN_FDNAMES", "").split(":")
        for number in range(max(0, count)):
            fd = _FIRST + number
            try:
                os.set_inheritable(fd, False)
                sock = socket.socket(fileno=fd)
            except OSError:
                continue  # a FIFO or a file, which nobody can listen on; or it is not there
            # "unknown": what sd_listen_fds_with_names() says of those without one.
            name = (names[number] if number < len(names) else "") or "unknown"
            self._sockets.setdefault(name, []).append(sock)

    def inherit(self, name: str, sock: socket.socket) -> None:
        """What the daemon before had of systemd; ours from here on."""
        self._sockets.setdefault(name, []).append(sock)

    def take(self, name: str) -> list[socket.socket]:
        """Return the sockets of a name, and forget them: the caller closes them."""
        return self._sockets.pop(name, [])

    def all(self) -> list[tuple[str, socket.socket]]:
        """Return all sockets that there are, by name; they stay ours."""
        return [(name, sock) for name, sockets in self._sockets.items() for sock in sockets]

    def sockets(self, wanted: SystemdSockets, protocol: str) -> list[BoundSocket]:
        """Return the sockets of a name, to listen on; each is a descriptor of its own.

        Raises:
            ForwarderError: there is none of that name, or one that cannot be used.
        """
        from pyforwarder.supervisor.listeners.binding import BoundSocket

        found = self._sockets.get(wanted.name)
        if not found:
            names = ", ".join(sorted(self._sockets))
            has = f"it has passed {names}" if names else "it has passed none to this process"
            raise ForwarderError(
                f"{wanted}: systemd has no socket of that name for us ({has}): write "
                f"FileDescriptorName={wanted.name} in the .socket unit, and start that"
            )
        # All are looked at before the first is copied.
        binds = [usable_address(wanted, protocol, sock) for sock in found]
        return [
            BoundSocket.given(wanted, sock.dup(), bind)
            for sock, bind in zip(found, binds, strict=True)
        ]

    def close(self) -> None:
        """Close all sockets that nobody took; systemd has its own."""
        for sockets in self._sockets.values():
            for sock in sockets:
                sock.close()
        self._sockets = {}


def usable_address(
    wanted: SystemdSockets, protocol: str, sock: socket.socket
) -> Address | UnixAddress:
    """Return the address at which the socket listens.

    Raises:
        ForwarderError: it does not, or not so that we could serve it.
    """
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if sock.type != kind or sock.family not in families[: 3 if protocol == "tcp" else 2]:
        option = "ListenStream" if protocol == "tcp" else "ListenDatagram"
        raise ForwarderError(f"{wanted}: `protocol: {protocol}` wants a socket of {option}=")
    if protocol_of(sock) == _IPPROTO_MPTCP:
        raise ForwarderError(f"{wanted}: the socket is MPTCP: leave SocketProtocol= out")
    if protocol == "tcp" and not sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN):
        raise ForwarderError(f"{wanted}: the socket does not listen: write Accept=no")
    if sock.family == socket.AF_UNIX:
        path = sock.getsockname()
        return UnixAddress(path if isinstance(path, str) else "")
    host, port = sock.getsockname()[:2]
    if sock.family == socket.AF_INET6 and not sock.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    ):
        raise ForwarderError(
            f"{wanted}: the socket takes IPv4 as IPv6: write BindIPv6Only=ipv6-only in the .socket "
            f"unit, and for IPv4 another ListenStream=0.0.0.0:{port}"
        )
    return Address(host, port)
