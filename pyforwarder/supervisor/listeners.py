"""Binding listeners: one socket per worker and address, so that the kernel spreads connections.

The supervisor keeps every socket open. So a worker's death loses no connection that waits in a
backlog, and a reload finds the sockets of the addresses that stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from pyforwarder.address import Address, UnixAddress
from pyforwarder.errors import ForwarderError
from pyforwarder.worker.channel import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyforwarder.config import Config

TCP4_HEADERS_BYTES: Final = 40
TCP6_HEADERS_BYTES: Final = 60
_LINGER_RESET: Final = b"\1\0\0\0\0\0\0\0"


class BoundListener:
    """One listener's sockets, one per worker (a unix socket's is shared by all)."""

    def __init__(
        self,
        wanted: Address | UnixAddress,
        protocol: str,
        workers: int,
        *,
        mode: int | None = None,
    ) -> None:
        """Bind and listen; `mode` is that of a unix socket (None: as the umask says).

        Raises:
            ForwarderError: the address cannot be bound; no socket is left open.
        """
        self.wanted = wanted
        self.protocol = protocol
        self.mode = mode
        self.sockets: list[socket.socket] = []
        try:
            if isinstance(wanted, UnixAddress):
                self.bind: Address | UnixAddress = wanted
                self.sockets.append(_bind_unix(wanted, mode))
            elif protocol == "udp":
                self.bind = self._bind_udp(wanted, workers)
            else:
                self.bind = self._bind_tcp(wanted, workers)
        except OSError as error:
            self.close()
            raise ForwarderError(f"cannot listen on {wanted}: {error.strerror}") from error

    def _bind_tcp(self, wanted: Address, workers: int) -> Address:
        if wanted.port:
            # With SO_REUSEPORT a second daemon would silently take half of the connections:
            # without it, this bind fails if anybody listens there.
            with _tcp_socket(wanted) as probe:
                probe.bind(wanted)
        port = wanted.port
        for _ in range(workers):
            sock = _tcp_socket(wanted)
            self.sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Accepted sockets inherit all of these. Linger 0: a process that dies leaves resets
            # behind, not clean EOFs. Urgent data in line: a byte that MSG_OOB marks is not lost.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((wanted.host, port))
            sock.listen(BACKLOG)
            port = sock.getsockname()[1]
        return Address(wanted.host, port)

    def _bind_udp(self, wanted: Address, workers: int) -> Address:
        """The kernel spreads clients over the sockets by their address, each always to the same."""
        if wanted.port:
            with _udp_socket(wanted) as probe:
                probe.bind(wanted)
        port = wanted.port
        for _ in range(workers):
            sock = _udp_socket(wanted)
            self.sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((wanted.host, port))
            port = sock.getsockname()[1]
        return Address(wanted.host, port)

    def limit_packets(self, mtu: int) -> None:
        """Ask clients for packets of at most so many bytes, headers included; 0: no limit of ours.

        Without it a client on this host may send what no other interface than `lo` can carry.
        """
        if self.protocol == "tcp" and isinstance(self.wanted, Address):
            headers = TCP6_HEADERS_BYTES if self.wanted.is_ipv6 else TCP4_HEADERS_BYTES
            for sock in self.sockets:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - headers if mtu else 0)

    def change_mode(self, mode: int | None) -> None:
        """A unix socket's mode from now on; None leaves it as it is."""
        if isinstance(self.wanted, UnixAddress) and mode not in (None, self.mode):
            # It is our file. If somebody has removed it, nobody finds it any more anyway.
            with contextlib.suppress(OSError):
                os.chmod(self.wanted.path, mode)
            self.mode = mode

    def socket_of(self, worker: int) -> socket.socket:
        """The socket that this worker accepts from."""
        return self.sockets[worker % len(self.sockets)]

    def close(self) -> None:
        """Close the sockets; a unix socket's path goes too."""
        for sock in self.sockets:
            sock.close()
        if isinstance(self.wanted, UnixAddress) and self.sockets:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.wanted.path)
        self.sockets = []


def _tcp_socket(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    # Protocol 0 would be MPTCP where a system library rewrites it; MPTCP sockets must never enter
    # a sockmap (kernel-crash on 6.1).
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if address.is_ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _udp_socket(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if address.is_ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def _bind_unix(address: UnixAddress, mode: int | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(address.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(address.path):
                raise
            os.unlink(address.path)
            sock.bind(address.path)
        if mode is not None:
            os.chmod(address.path, mode)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _is_abandoned(path: str) -> bool:
    """Whether this is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(path) == errno.ECONNREFUSED


class Listeners:
    """The listeners in force, by name."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.bound: dict[str, BoundListener] = {}

    def binds(self) -> dict[str, str]:
        """Where each listens, port 0 resolved."""
        return {name: str(listener.bind) for name, listener in self.bound.items()}

    def change_to(self, config: Config) -> tuple[dict[str, BoundListener], list[BoundListener]]:
        """Bind what is new; the listeners of `config` by name, and those that it has no more.

        The caller makes them the ones in force with `commit`, or closes what is new with
        `abandon`; until then nothing has changed.

        Raises:
            ForwarderError: a new address cannot be bound; nothing has changed.
        """
        by_address = {(old.protocol, old.wanted): old for old in self.bound.values()}
        following: dict[str, BoundListener] = {}
        try:
            for listener in config.listeners:
                same = self.bound.get(listener.name)
                wanted = (listener.protocol, listener.bind)
                if same is None or (same.protocol, same.wanted) != wanted:
                    # A name that changed keeps its sockets; port 0 is another port each time.
                    same = by_address.get(wanted) if _is_fixed(listener.bind) else None
                following[listener.name] = same or BoundListener(
                    listener.bind, listener.protocol, self._workers, mode=listener.mode
                )
        except ForwarderError:
            self.abandon(following)
            raise
        kept = {id(listener) for listener in following.values()}
        return following, [old for old in self.bound.values() if id(old) not in kept]

    def commit(
        self,
        config: Config,
        following: Mapping[str, BoundListener],
        obsolete: list[BoundListener],
    ) -> None:
        """These are in force now, as `config` wants them; the obsolete ones are closed."""
        self.bound = dict(following)
        for listener in config.listeners:
            self.bound[listener.name].change_mode(listener.mode)
        for old in obsolete:
            old.close()

    def abandon(self, following: Mapping[str, BoundListener]) -> None:
        """Close what was bound for a change that does not come."""
        kept = {id(listener) for listener in self.bound.values()}
        for listener in following.values():
            if id(listener) not in kept:
                listener.close()

    def limit_packets(self, mtus: Mapping[str, int]) -> None:
        """See `BoundListener.limit_packets`; no limit for those that are not in `mtus`."""
        for name, listener in self.bound.items():
            listener.limit_packets(mtus.get(name, 0))

    def close_in_child(self) -> None:
        """In another process: close the sockets, which are not its own; their paths stay."""
        for listener in self.bound.values():
            for sock in listener.sockets:
                sock.close()

    def close(self) -> None:
        """Close all."""
        for listener in self.bound.values():
            listener.close()
        self.bound = {}


def _is_fixed(bind: Address | UnixAddress) -> bool:
    return isinstance(bind, UnixAddress) or bind.port != 0
