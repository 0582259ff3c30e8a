"""Accepts clients, and asks the limits whether there is room for them."""

from __future__ import annotations

import _socket
import errno
import os
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Event, Life, next_life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.copying import WATCHED
from pyforwarder.runtime.channel import BACKLOG
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    LIMITED_INDEX,
    Counter,
    ListenerCounter,
)
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.raw_sockets import accept, peer_name
from pyforwarder.worker.client import Client

if TYPE_CHECKING:
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.plain import PlainPath
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.sniffer import Sniffer

# How many connections one turn of the loop accepts, before those it has get their turn.
ACCEPT_BATCH: Final = 16
# accept(2): out of descriptors or memory. What waits in the backlog stays there.
OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ACCEPT_PAUSE_S: Final = 0.1
# accept(2) asks to treat these errors of a connection that was never ours like EAGAIN.
NEVER_OURS: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.EPERM,
    }
)
# Clients over a limit that are still listened to, so that they can be told `busy`.
BUSY_CLIENTS: Final = 64

# Plain numbers for the path of every connection, as in server.py.
_SNIFFING: Final = Life.SNIFFING
_OPEN: Final = int(Counter.OPEN)
_LISTENER_ACCEPTED: Final = int(ListenerCounter.ACCEPTED)
_LISTENER_OPEN: Final = int(ListenerCounter.OPEN)


class Acceptor:
    """Takes clients from the listeners of one worker."""

    def __init__(self, server: Server, sniffer: Sniffer, plain: PlainPath) -> None:
        self._server = server
        self._sniffer = sniffer
        self._plain = plain
        self._loop = server.loop
        self._counters = server.counters
        self._clients = server.clients
        self._listeners: dict[int, tuple[_socket.socket, ListenerState]] = {}
        self._busy_clients = 0

    def listen(self, sock: _socket.socket, listener: ListenerState) -> None:
        """Accept from this socket, which stays the caller's to close after `unlisten`."""
        fd = sock.fileno()
        self._listeners[fd] = (sock, listener)
        self._loop.watch(fd, EPOLLIN, self._accept, listener)

    def unlisten(self, sock: _socket.socket) -> None:
        """Accept no more from this socket."""
        if self._listeners.pop(sock.fileno(), None) is not None:
            self._loop.forget(sock.fileno())

    def accept_rest(self, sock: _socket.socket) -> None:
        """Accept all clients that wait at a listener that is about to go.

        For them they have been connected for a while: closing it would reset them.
        """
        fd = sock.fileno()
        if fd in self._listeners:
            self._accept(self._listeners[fd][1], fd, 0, most=BACKLOG)

    def _accept(
        self, listener: ListenerState, fd: int, _mask: int, *, most: int = ACCEPT_BATCH
    ) -> None:
        server = self._server
        for _ in range(most):
            client_fd = accept(fd)
            if client_fd < 0:
                code = -client_fd
                if code == errno.EAGAIN:
                    return
                if code in OVERLOADED:
                    self._pause(self._listeners[fd][0])
                    return
                if code in NEVER_OURS:
                    continue
                raise OSError(code, os.strerror(code))
            if (
                listener.is_plain
                and not server.log.tells_steps
                and len(self._clients) < server.most_clients
            ):
                self._plain.serve(listener, client_fd, peer_name(), server.next_id())
            else:
                self._admit(listener, client_fd, peer_name())

    def _pause(self, listener: _socket.socket) -> None:
        """Let the backlog wait until some connections have ended."""
        self._counters[Counter.ACCEPT_PAUSED] += 1
        fd = listener.fileno()
        self._loop.change(fd, 0)

        def resume() -> None:
            if fd in self._listeners:
                self._loop.change(fd, EPOLLIN)

        self._loop.after(ACCEPT_PAUSE_S, resume)

    def _admit(self, listener: ListenerState, fd: int, peer: bytes) -> None:
        counters = self._counters
        counters[listener.counter + _LISTENER_ACCEPTED] += 1
        client = Client(self._server, listener, None, fd, peer, self._loop.now_s)
        client.id = self._server.next_id()
        if listener.asks_limits:
            self._ask_limits(client)
        if client.over_limit is not None and not self.count_busy(client):
            self._turn_away(client)
            return
        if len(self._clients) >= self._server.most_clients:
            self.limited(client, Limit.DESCRIPTORS)
            self._turn_away(client)
            return
        counters[_OPEN] += 1
        counters[listener.counter + _LISTENER_OPEN] += 1
        self._clients[fd] = client
        client.client_mask = WATCHED
        self._loop.watch(fd, WATCHED, self._sniffer.sniffed, client)
        if listener.converses:
            client.conversation = listener.ruleset.begin()
        self._server.records.show_later(client)
        try:
            if listener.starts_specially:
                self._sniffer.begin_specially(client)
            else:
                # Most of those that speak first have spoken by now: that saves an event.
                self._sniffer.sniffed(client, fd, EPOLLIN)
            if client.life is _SNIFFING:
                self._loop.deadlines.start(client, listener.timeout_s, self._loop.now_s)
        except Exception as error:
            # To the loop the listener would be its owner, whose faults end the process.
            self._server.failed(client, error)

    def _ask_limits(self, client: Client) -> None:
        """Whether the connection is one too many, in this second or of this client."""
        listener = client.listener
        is_known = client.peer is not None and listener.trusted_proxies is None
        host = client.peer.host if client.peer is not None and is_known else None
        self._settle(client, self._server.limits.admit(host, listener.scopes, self._loop.now_s))

    def count_client(self, client: Client) -> None:
        """Count the client against the limits on clients, now that a PROXY header has said who it
        is.
        """
        if client.peer is not None:
            scopes = client.listener.scopes
            answer = self._server.limits.admit_host(client.peer.host, scopes, self._loop.now_s)
            self._settle(client, answer)

    def _settle(self, client: Client, answer: Limit | tuple[int, ...]) -> None:
        if isinstance(answer, Limit):
            self.limited(client, answer)
        else:
            client.client_keys = answer

    def limited(self, client: Client, limit: Limit) -> None:
        """A limit says no to the connection, which is to be told or reset."""
        client.over_limit = limit
        self._counters[LIMITED_INDEX[limit.counted_as]] += 1

    def count_busy(self, client: Client) -> bool:
        """Count one more client over a limit; False: we may not keep it until it is told so."""
        client.counts_busy = True
        self._busy_clients += 1
        return self._busy_clients <= BUSY_CLIENTS

    def forget_busy(self) -> None:
        """Count one client less that is over a limit: it was told so, or has gone."""
        self._busy_clients -= 1

    def _turn_away(self, client: Client) -> None:
        """Reset the client at once: there is no room even to hear it."""
        client.life, _ = next_life(client.life, Event.BROKEN)
        client.refusal = client.refusal or "limit of descriptors"
        client.reason = CloseReason.BUSY
        self._counters[CLOSED_INDEX[CloseReason.BUSY]] += 1
        self._server.refusing.count(client)
        self._server.log.closed(client, (0, 0), (0, 0))
        self._server.closing.give_back(client)
        sock = client.give_up_client()
        os.close(client.client_fd if sock is None else sock.detach())
