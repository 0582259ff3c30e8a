"""The end of a connection: what was counted for it is given back, and its sockets are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Event, Life, next_life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import END_TO_END, OUTLIVING_KINDS
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    ListenerCounter,
    ServerCounter,
    change,
    count_disconnect,
)
from pyforwarder.runtime.linger import end_orderly
from pyforwarder.runtime.raw_sockets import end_writing, reset_now

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.worker.client import Client
    from pyforwarder.worker.connector import Connector
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.sniffer import Sniffer

# Plain names and numbers for the path of every connection: looking a member up in its enum costs
# more than most of what is done with it.
_CLOSED: Final = Life.CLOSED
_OPEN: Final = int(Counter.OPEN)
_PAIRS_OPEN: Final = int(Counter.PAIRS_OPEN)
_UP_BYTES: Final = int(Counter.UP_BYTES)
_DOWN_BYTES: Final = int(Counter.DOWN_BYTES)
_LISTENER_OPEN: Final = int(ListenerCounter.OPEN)
_LISTENER_UP_BYTES: Final = int(ListenerCounter.UP_BYTES)
_LISTENER_DOWN_BYTES: Final = int(ListenerCounter.DOWN_BYTES)
_FINISHED: Final = CloseReason.FINISHED
_CLOSED_FINISHED: Final = CLOSED_INDEX[CloseReason.FINISHED]
_SERVER_PAIRS: Final = int(ServerCounter.PAIRS)


class Closing:
    """Closes the connections of a worker, or gives them to another daemon."""

    def __init__(self, server: Server, sniffer: Sniffer, connector: Connector) -> None:
        self._server = server
        self._sniffer = sniffer
        self._connector = connector
        self._loop = server.loop
        self._counters = server.counters
        self._clients = server.clients
        self._limits = server.limits
        self._records = server.records

    def close(self, client: Client) -> None:
        """An orderly end: TCP goes on sending what it has, and the FIN behind it."""
        end_orderly(client.client_fd)
        if client.server is not None:
            end_orderly(client.server_fd)
        self._end(client, end_writing)

    def finish(self, client: Client) -> None:
        """`close` of a pair that came by the straight path and was never shown: most of them."""
        client.life = _CLOSED
        client.datapath = None
        client_fd, server_fd, server = client.client_fd, client.server_fd, client.server
        end_orderly(client_fd)
        end_orderly(server_fd)
        self._records.unshown.pop(client, None)
        counters, listener = self._counters, client.listener.counter
        up, down = client.up, client.down
        up_bytes, down_bytes = up.carried_bytes, down.carried_bytes
        counters[_CLOSED_FINISHED] += 1
        counters[_UP_BYTES] += up_bytes
        counters[_DOWN_BYTES] += down_bytes
        counters[listener + _LISTENER_UP_BYTES] += up_bytes
        counters[listener + _LISTENER_DOWN_BYTES] += down_bytes
        chosen = client.server_state
        if chosen is not None:
            assert client.upstream is not None
            client.upstream.balancer.closed(chosen)
            chosen.held.add(-1)  # as Balancer.release does
            client.server_state = None
            if chosen.counter and (count := counters[chosen.counter + _SERVER_PAIRS]):
                counters[chosen.counter + _SERVER_PAIRS] = count - 1
        # As `change` does.
        if count := counters[_OPEN]:
            counters[_OPEN] = count - 1
        if count := counters[_PAIRS_OPEN]:
            counters[_PAIRS_OPEN] = count - 1
        if count := counters[listener + _LISTENER_OPEN]:
            counters[listener + _LISTENER_OPEN] = count - 1
        self._limits.remove_pair(listener)
        if self._server.log.tells:
            self._server.log.closed(
                client,
                (up.carried_bytes, up.carried_packets),
                (down.carried_bytes, down.carried_packets),
            )
        queue = client._queue
        if queue is not None:
            del queue[client]
            client._queue = None
        del self._clients[client_fd]
        client.server = None
        self._loop.close_two(client_fd, client.give_up_client(), server_fd, server)

    def reset(self, client: Client) -> None:
        """Both ends get a RST: all sockets have had SO_LINGER 0 from their first moment."""
        self._end(client, reset_now)

    def _end(self, client: Client, say_so: Callable[[int], object]) -> None:
        """Close the sockets; `say_so` has a socket tell its peer what only the last close would."""
        reason = client.reason
        if reason is None:
            reason = client.reason = _FINISHED
        counters = self._counters
        loop = self._loop
        counters[CLOSED_INDEX[reason]] += 1
        change(counters, _OPEN, -1)
        change(counters, client.listener.counter + _LISTENER_OPEN, -1)
        datapath = client.datapath
        # Below 0 as long as some of what we say ourselves is not written.
        up = max(0, client.up.carried_bytes), client.up.carried_packets
        down = max(0, client.down.carried_bytes), client.down.carried_packets
        if datapath is not None:
            if datapath is not self._server.copying:
                up = datapath.carried(client, client.up)[:2]
                down = datapath.carried(client, client.down)[:2]
                counters[Counter.BACKLOG_TRIPS] += datapath.trips(client)
                datapath.leave(client)
            client.datapath = None
        elif not client.is_refused:
            self._server.refusing.count(client)
        # The slot first: who adds the table to these counters may miss the bytes for a moment, but
        # must not see them twice.
        self._records.release(client)
        if datapath is not None:
            change(counters, _UP_BYTES, up[0])
            change(counters, _DOWN_BYTES, down[0])
            change(counters, client.listener.counter + _LISTENER_UP_BYTES, up[0])
            change(counters, client.listener.counter + _LISTENER_DOWN_BYTES, down[0])
        self._server.log.closed(client, up, down)
        loop.deadlines.stop(client)
        if client.keeper_wait is not None:
            loop.deadlines.stop(client.keeper_wait)
        if client.approach is not None:
            client.approach.stop()
            client.approach = None
        if client.asked:
            self._connector.forget(client)
        if self._sniffer.put_off:
            self._sniffer.put_off.pop(client, None)
        self.give_back(client)
        client_fd = client.client_fd
        del self._clients[client_fd]
        if client.is_foreign:
            self._server.foreign_pairs.forget(client)
        if client.is_foreign or client.is_shared:
            # Another process may keep its descriptor. Then close() does not take the socket out of
            # epoll, and its events would reach the next owner of that number.
            loop.forget(client_fd)
            if client.server is not None:
                loop.forget(client.server_fd)
            if client.kind not in END_TO_END:
                # Nor does it tell the peer: what the keeper was asked may be unread for seconds,
                # and a worker that has handed the pair on may hang. Sockets of pairs
                # that are end to end say nothing.
                say_so(client_fd)
                if client.server is not None:
                    say_so(client.server_fd)
        sock = client.give_up_client()
        if sock is None:
            loop.close(client_fd)
        else:
            loop.close_socket(client_fd, sock)
        if client.server is not None:
            loop.close_socket(client.server_fd, client.server)
            client.server = None

    def give_back(self, client: Client) -> None:
        """What limits and balancers counted for this connection."""
        if client.counts_busy:
            self._server.accepting.forget_busy()
        if client.client_keys:
            self._limits.give_back(client.client_keys)
        if client.counts_pair:
            self._limits.remove_pair(client.listener.counter)
            change(self._counters, _PAIRS_OPEN, -1)
        if client.server_state is not None:
            if client.server_opened:
                assert client.upstream is not None
                client.upstream.balancer.closed(client.server_state)
                count_disconnect(self._counters, client.server_state.counter)
            assert client.upstream is not None
            client.upstream.balancer.release(client.server_state)
            client.server_state = None

    def release(self, client: Client) -> None:
        """The pair is another daemon's from here on, with its sockets: forget it, and say nothing.

        Nothing of it is left with a datapath of ours.
        """
        change(self._counters, _OPEN, -1)
        change(self._counters, client.listener.counter + _LISTENER_OPEN, -1)
        client.life, _ = next_life(client.life, Event.RELEASED)
        client.datapath = None
        client.waits_for_handover = False
        if client.kind in OUTLIVING_KINDS:
            client.slot = -1  # the record tells the other daemon what `show` said
        else:
            self._records.release(client)
        self._loop.deadlines.stop(client)
        if client.keeper_wait is not None:
            self._loop.deadlines.stop(client.keeper_wait)
        self.give_back(client)
        del self._clients[client.client_fd]
        self._server.foreign_pairs.forget(client)
        # Closing does not take them out of epoll: the other daemon has the sockets.
        self._loop.forget(client.client_fd)
        self._loop.forget(client.server_fd)
        self._loop.close_socket(client.client_fd, client.client)
        assert client.server is not None
        self._loop.close_socket(client.server_fd, client.server)
        client.server = None
