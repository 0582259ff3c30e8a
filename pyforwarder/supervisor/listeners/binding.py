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

from pyforwarder.core.address import ANY_IPV4, ANY_IPV6, Address, SystemdSockets, UnixAddress
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.channel import BACKLOG
from pyforwarder.runtime.keepalive import keep_alive
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.sockaddr import sockaddr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.config import Config, Listener
    from pyforwarder.core.address import Bind
    from pyforwarder.core.keepalive import Keepalive
    from pyforwarder.supervisor.listeners.activation import Activation

TCP4_HEADERS_BYTES: Final = 40
TCP6_HEADERS_BYTES: Final = 60
_IPV6_FREEBIND: Final = 78  # linux/in6.h
_IP_FREEBIND: Final = 15  # linux/in.h
# How often a port that the kernel chose for IPv6 may turn out to be taken for IPv4.
_PORT_TRIES: Final = 8


class BoundSocket:
    """One address of a listener: its sockets, one per worker (or one that all share)."""

    def __init__(
        self,
        wanted: Address | UnixAddress,
        protocol: str,
        workers: int,
        *,
        mode: int | None = None,
        freebind: bool = False,
    ) -> None:
        """Bind and listen; `mode` is that of a unix socket (None: as the umask says).

        Raises:
            OSError: the address cannot be bound; no socket is left open.
        """
        self.wanted: Bind = wanted
        self.protocol = protocol
        self.mode = mode
        self.freebind = freebind
        self.sockets: list[socket.socket] = []
        self.is_ours = True  # and not systemd's, which keeps it
        self.is_shared = False
        try:
            if isinstance(wanted, UnixAddress):
                self.bind: Address | UnixAddress = wanted
                self.sockets.append(_bind_unix(wanted, mode))
            else:
                self.bind = self._bind_each(wanted, workers)
        except OSError:
            self.close()
            raise

    @classmethod
    def given(
        cls, wanted: SystemdSockets, sock: socket.socket, bind: Address | UnixAddress
    ) -> BoundSocket:
        """A socket that listens already; it is closed with this, but stays systemd's."""
        bound = cls.__new__(cls)
        bound.wanted = wanted
        bound.protocol = "tcp" if sock.type == socket.SOCK_STREAM else "udp"
        bound.mode = None
        bound.freebind = False
        bound.sockets = [sock]
        bound.is_ours = False
        bound.is_shared = False
        bound.bind = bind
        if isinstance(bind, Address) and bound.protocol == "tcp":
            _set_up(sock)
        return bound

    @classmethod
    def inherited(
        cls,
        wanted: Bind,
        bind: Address | UnixAddress,
        sockets: list[socket.socket],
        *,
        protocol: str,
        is_ours: bool,
        mode: int | None,
        freebind: bool,
    ) -> BoundSocket:
        """What another daemon has bound and still has; `is_shared` until that has released it."""
        bound = cls.__new__(cls)
        bound.wanted = wanted
        bound.protocol = protocol
        bound.mode = mode
        bound.freebind = freebind
        bound.sockets = sockets
        bound.is_ours = is_ours
        bound.is_shared = True
        bound.bind = bind
        return bound

    def _bind_each(self, wanted: Address, workers: int) -> Address:
        """Bind a socket for each worker to one address, which is returned with its port.

        The kernel spreads connections over them, and clients of UDP by their address, each always
        to the same.
        """
        is_tcp = self.protocol == "tcp"
        make = _tcp_socket if is_tcp else _udp_socket
        if wanted.port:
            # With SO_REUSEPORT a second daemon would silently take half of the clients: without
            # it, this bind fails if another socket has the port.
            with make(wanted, freebind=self.freebind) as probe:
                probe.bind(sockaddr(wanted))
        address = wanted
        for _ in range(workers):
            sock = make(wanted, freebind=self.freebind)
            self.sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if is_tcp:
                _set_up(sock)
            sock.bind(sockaddr(address))
            if is_tcp:
                sock.listen(BACKLOG)
            address = Address(wanted.host, sock.getsockname()[1])
        return address

    def limit_packets(self, mtu: int) -> None:
        """Ask clients for packets of at most so many bytes, headers included; 0: no limit of ours.

        Without it a client on this host may send what no other interface than `lo` can carry.
        """
        if self.protocol == "tcp" and isinstance(self.bind, Address):
            headers = TCP6_HEADERS_BYTES if self.bind.is_ipv6 else TCP4_HEADERS_BYTES
            for sock in self.sockets:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - headers if mtu else 0)

    def keep_alive(self, keepalive: Keepalive) -> None:
        """How clients that are accepted from now on are asked whether they are there."""
        if self.protocol == "tcp" and isinstance(self.bind, Address):
            for sock in self.sockets:
                keep_alive(sock, keepalive)

    def change_mode(self, mode: int | None) -> None:
        """A unix socket's mode from now on; None leaves it as it is."""
        if isinstance(self.wanted, UnixAddress) and mode not in (None, self.mode):
            # It is our file. If it was removed, no client finds it any more anyway.
            with contextlib.suppress(OSError):
                os.chmod(self.wanted.path, mode)
            self.mode = mode

    def socket_of(self, worker: int) -> socket.socket | None:
        """The socket that this worker reads from, if it has one.

        A UDP socket of systemd's is one worker's alone: two would tear a client's session apart.
        """
        if not self.is_ours and self.protocol == "udp" and worker:
            return None
        return self.sockets[worker % len(self.sockets)]

    def close(self) -> None:
        """Close the sockets; a unix socket's path goes too, unless another daemon serves it."""
        for sock in self.sockets:
            sock.close()
        if isinstance(self.wanted, UnixAddress) and self.sockets and not self.is_shared:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.wanted.path)
        self.sockets = []


def _set_up(sock: socket.socket) -> None:
    """What accepted sockets inherit.

    Linger 0: a process that dies leaves resets behind, not clean EOFs. Urgent data in line: a byte
    that MSG_OOB marks is not lost.
    """
    reset_at_close(sock.fileno())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _tcp_socket(address: Address, *, freebind: bool) -> socket.socket:
    # Protocol 0 would be MPTCP where a system library rewrites it; MPTCP sockets must never enter
    # a sockmap (kernel-crash on 6.1).
    sock = _socket(address, socket.SOCK_STREAM, socket.IPPROTO_TCP, freebind=freebind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _udp_socket(address: Address, *, freebind: bool) -> socket.socket:
    return _socket(address, socket.SOCK_DGRAM, 0, freebind=freebind)


def _socket(address: Address, kind: int, protocol: int, *, freebind: bool) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, kind, protocol)
    if address.is_ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if freebind:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    elif freebind:
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
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


Bound = tuple[BoundSocket, ...]  # one listener's addresses, in the order of its configuration


class Listeners:
    """The listeners in force, by name."""

    def __init__(self, workers: int, activation: Activation) -> None:
        self._workers = workers
        self._activation = activation
        self.bound: dict[str, Bound] = {}
        # Bound by nobody who lives; what the first configuration has no use for is closed.
        self.restored: list[BoundSocket] = []
        self._closed: dict[str, tuple[Address | UnixAddress, ...]] = {}

    def binds(self) -> dict[str, tuple[Address | UnixAddress, ...]]:
        """Where each listens, port 0 resolved; after `close` where each did (in a drain)."""
        return self._closed or {
            name: tuple(each.bind for each in bound) for name, bound in self.bound.items()
        }

    def inherit(self, bound: Mapping[str, Bound]) -> None:
        """Begin with these, which another daemon still has."""
        self.bound = dict(bound)

    def share(self, *, shared: bool) -> None:
        """Whether another daemon has the same sockets: what is closed here stays with it."""
        for each in self.sockets():
            each.is_shared = shared

    def sockets(self) -> list[BoundSocket]:
        """The sockets of all listeners."""
        return [each for bound in self.bound.values() for each in bound]

    def change_to(self, config: Config) -> tuple[dict[str, Bound], list[BoundSocket]]:
        """Bind what is new; the listeners of `config` by name, and the sockets of no use any more.

        The caller makes them the ones in force with `commit`, or closes what is new with
        `abandon`; until then nothing has changed.

        Raises:
            ForwarderError: a new address cannot be bound; nothing has changed.
        """
        there = [*self.restored, *self.sockets()]
        by_address = {(old.protocol, old.wanted): old for old in there if old.is_ours}
        following: dict[str, Bound] = {}
        made: list[BoundSocket] = []
        try:
            for listener in config.listeners:
                following[listener.name] = self._sockets_for(listener, by_address, made)
        except ForwarderError:
            for each in made:
                each.close()
            raise
        kept = {id(each) for bound in following.values() for each in bound}
        return following, [old for old in there if id(old) not in kept]

    def _sockets_for(
        self,
        listener: Listener,
        by_address: Mapping[tuple[str, Bind], BoundSocket],
        made: list[BoundSocket],
    ) -> Bound:
        """One listener's sockets: those that there are, and new ones, which are added to `made`."""
        # Port 0 is another port each time, but for the listener that has one.
        own = {(old.protocol, old.wanted): old for old in self.bound.get(listener.name, ())}
        result: list[BoundSocket] = []
        for wanted in listener.addresses:
            if isinstance(wanted, SystemdSockets):
                kept = [old for old in self.bound.get(listener.name, ()) if old.wanted == wanted]
                if not kept:
                    kept = self._activation.sockets(wanted, listener.protocol)
                    made += kept
                result += kept
                continue
            key = (listener.protocol, wanted)
            same = own.get(key) or (by_address.get(key) if _is_fixed(wanted) else None)
            if same is None:
                self._bind(listener, wanted, result, made)
            else:
                result.append(same)
        return tuple(result)

    def _bind(
        self,
        listener: Listener,
        wanted: Address | UnixAddress,
        before: list[BoundSocket],
        made: list[BoundSocket],
    ) -> None:
        """Bind one address, and append it to both lists."""
        tries = 1
        with_ipv6 = (
            before[-1]
            if listener.dual_stack and wanted == (ANY_IPV4, 0) and before[-1] in made
            else None
        )
        if with_ipv6 is not None:
            # Both families at one port, and it has been chosen for the first.
            tries = _PORT_TRIES
        for left in range(tries - 1, -1, -1):
            try:
                at = wanted
                if with_ipv6 is not None:
                    assert isinstance(with_ipv6.bind, Address)
                    at = Address(ANY_IPV4, with_ipv6.bind.port)
                bound = self._new(listener, at)
                bound.wanted = wanted
            except OSError as error:
                if with_ipv6 is None or error.errno != errno.EADDRINUSE or not left:
                    why = error.strerror or str(error)
                    hint = _hint(error) or self._in_the_way(error, listener.protocol, at)
                    raise ForwarderError(f"cannot listen on {wanted}: {why}{hint}") from error
                other = self._new(listener, Address(ANY_IPV6, 0))
                before[-1].close()
                made[made.index(with_ipv6)] = before[-1] = with_ipv6 = other
            else:
                before.append(bound)
                made.append(bound)
                return

    def _in_the_way(self, error: OSError, protocol: str, at: Address | UnixAddress) -> str:
        """Which of our own listeners has a port that another is to get, and what helps."""
        if error.errno != errno.EADDRINUSE or not isinstance(at, Address):
            return ""
        wildcard = ANY_IPV6 if at.is_ipv6 else ANY_IPV4
        for name, bound in self.bound.items():
            for each in bound:
                bind = each.bind
                if (
                    isinstance(bind, Address)
                    and (each.protocol, bind.port) == (protocol, at.port)
                    and bind.is_ipv6 == at.is_ipv6
                    and (bind.host == at.host or wildcard in (bind.host, at.host))
                ):
                    return (
                        f" by the listener {name!r}, which has {bind}: take that away first, "
                        "and add this one in a second change"
                    )
        return ""

    def _new(self, listener: Listener, at: Address | UnixAddress) -> BoundSocket:
        return BoundSocket(
            at,
            listener.protocol,
            self._workers,
            mode=listener.mode,
            freebind=listener.freebind,
        )

    def commit(
        self,
        config: Config,
        following: Mapping[str, Bound],
        obsolete: Sequence[BoundSocket],
    ) -> None:
        """Put these listeners in force as `config` wants them, and close the obsolete ones."""
        self.bound = dict(following)
        self.restored = []
        for listener in config.listeners:
            for each in self.bound[listener.name]:
                each.change_mode(listener.mode)
        for old in obsolete:
            old.close()

    def abandon(self, following: Mapping[str, Bound]) -> None:
        """Close what was bound for a change that does not come."""
        kept = {id(each) for each in self.sockets()}
        for bound in following.values():
            for each in bound:
                if id(each) not in kept:
                    each.close()

    def limit_packets(self, mtus: Mapping[str, int]) -> None:
        """See `BoundSocket.limit_packets`; no limit for those that are not in `mtus`."""
        for name, bound in self.bound.items():
            for each in bound:
                each.limit_packets(mtus.get(name, 0))

    def keep_alive(self, keepalive: Keepalive) -> None:
        """See `BoundSocket.keep_alive`."""
        for each in self.sockets():
            each.keep_alive(keepalive)

    def close_in_child(self) -> None:
        """Close the sockets, in another process: they are not its own. Their paths stay."""
        for each in self.sockets():
            for sock in each.sockets:
                sock.close()
        self._activation.close()

    def close(self) -> None:
        """Close all; `binds` still tells of them, for `show` while pairs drain."""
        self._closed = self.binds()
        for each in self.sockets():
            each.close()
        self.bound = {}
        self._activation.close()


def _hint(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return " (`freebind: true` binds addresses that this host does not have yet)"
    return ""


def _is_fixed(bind: Address | UnixAddress) -> bool:
    return isinstance(bind, UnixAddress) or bind.port != 0
