"""Joins pairs of sockets that another program has connected (`forward`, the API's `join`)."""

from __future__ import annotations

import _socket
import os
from typing import TYPE_CHECKING

from pyforwarder.core.address import UnixAddress
from pyforwarder.core.connection import Event, next_life
from pyforwarder.core.routing import Route
from pyforwarder.datapath.copying import WATCHED
from pyforwarder.errors import ControlError
from pyforwarder.runtime.counters import LIMITED_INDEX, Counter, ListenerCounter
from pyforwarder.runtime.keepalive import keep_alive
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.socket_options import cookie_of
from pyforwarder.worker.client import Client, address_of
from pyforwarder.worker.foreign_sockets import (
    foreign_socket,
    read_so_far,
    set_up,
    written_so_far,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyforwarder.worker.server import Server


class ForeignPairs:
    """The pairs of a worker whose sockets came from another program."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop
        self._counters = server.counters
        self._by_cookie: dict[int, Client] = {}  # by the cookies of both its sockets

    def join_sockets(self, client_fd: int, server_fd: int) -> int:
        """Join two connected stream sockets of another program; the pair's id.

        They are ours from here on, and closed at the end; other copies of their descriptors must
        not be used any more. What was read and written before is not our business: the counts
        begin now.

        Raises:
            ControlError: the sockets cannot be joined; both descriptors are closed, and the sockets
                are what they were.
        """
        try:
            client_socket = foreign_socket(client_fd)
        except OSError as error:
            os.close(server_fd)
            raise ControlError(f"cannot join: {error.strerror}") from error
        try:
            server_socket = foreign_socket(server_fd)
        except OSError as error:
            client_socket.close()
            raise ControlError(f"cannot join: {error.strerror}") from error
        try:
            cookies = self._admit(client_socket, server_socket)
            peer = address_of(client_socket.getpeername())
            destination = address_of(server_socket.getpeername())
            # Only now: the caller keeps sockets that are refused, and goes on with them.
            for sock in (client_socket, server_socket):
                set_up(sock)
                if sock.family != _socket.AF_UNIX:
                    keep_alive(sock, self._server.generation.keepalive)
        except (ControlError, OSError) as error:
            client_socket.close()
            server_socket.close()
            words = error.strerror if isinstance(error, OSError) else error
            raise ControlError(f"cannot join: {words}") from error
        listener = self._server.generation.foreign_listener
        counters = self._counters
        client = Client(self._server, listener, client_socket, client_fd, peer, self._loop.now_s)
        client.id = self._server.next_id()
        client.attach_server(server_socket, server_fd)
        client.destination = destination or UnixAddress("/")
        client.route = Route(listener.ruleset.rules[0], client.destination, 0, None, False)
        client.is_foreign = True
        client.cookies = cookies
        self._by_cookie.update(dict.fromkeys(cookies, client))
        counters[Counter.PAIRS_OPENED] += 1
        counters[listener.counter + ListenerCounter.ACCEPTED] += 1
        self._server.take_in(client)
        for flow, source, target in (
            (client.up, client_socket, server_socket),
            (client.down, server_socket, client_socket),
        ):
            flow.readable = True
            flow.read_bytes = read_so_far(source)
            flow.written_bytes = written_so_far(flow, target)
        client.client_mask = client.server_mask = WATCHED
        self._loop.watch(client_fd, WATCHED, self._server.opening.flushing, client)
        self._loop.watch(server_fd, WATCHED, self._server.opening.flushing, client)
        client.life, _ = next_life(client.life, Event.GIVEN)
        self._server.records.show_later(client)
        self._server.happen(client, Event.FLUSHED)
        return client.id

    def _admit(self, *sockets: _socket.socket) -> tuple[int, ...]:
        """Return the cookies of the sockets, if they may be joined here.

        Raises:
            ControlError: a pair has one of them, or there is no room.
        """
        cookies = tuple(map(cookie_of, sockets))
        if len(set(cookies)) < len(cookies):
            raise ControlError("the two are the same socket")
        if (owner := self.pair_with(cookies)) is not None:
            raise ControlError(f"pair {owner} has that socket already")
        server = self._server
        limit = server.generation.limits.pairs
        if server.pressure.is_full and server.pressure.is_all_held():
            self._counters[LIMITED_INDEX[Limit.MEMORY]] += 1
            raise ControlError("pairs hold as much memory as they may (limits.memory)")
        if len(server.clients) >= server.most_clients or server.limits.pairs >= limit:
            raise ControlError(f"there are as many pairs as there may be (limits.pairs: {limit})")
        return cookies

    def pair_with(self, cookies: Iterable[int]) -> int | None:
        """The id of the pair that was given one of these sockets by another program."""
        for cookie in cookies:
            if (client := self._by_cookie.get(cookie)) is not None:
                return client.id
        return None

    def know(self, client: Client, cookies: tuple[int, ...]) -> None:
        """Another program may have its sockets, which have these cookies."""
        client.is_foreign = True
        client.cookies = cookies
        self._by_cookie.update(dict.fromkeys(cookies, client))

    def forget(self, client: Client) -> None:
        """The pair has ended, or is another daemon's."""
        for cookie in client.cookies:
            del self._by_cookie[cookie]
