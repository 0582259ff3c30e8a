"""The straight path: from accept to join in one function, for the connection that nothing holds up.

The tables of `core.connection` say what follows what in the life of a connection. Nearly all of
them go through it without a pause: the first bytes are there, a rule takes them, the server answers
within connect(2), and TCP takes what is written. A table, a function and a look at everything rare
for each of these steps would cost as much processor time as the steps themselves. So here they
stand one below the other, and a connection that is not as usual goes on by the tables, from the
state that the connection has reached.

Which listeners may take it is known beforehand (`ListenerState.is_plain`).
"""

from __future__ import annotations

import _socket
import errno
import os
import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import End, Route
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.copying import WATCHED
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.counters import (
    CONNECT_BOUNDS_S,
    CONNECT_FIRST,
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    Counter,
    ListenerCounter,
    RuleCounter,
    count_connect,
)
from pyforwarder.runtime.linger import reset_at_close
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.worker.client import Client
from pyforwarder.worker.race import outcome_of

if TYPE_CHECKING:
    from pyforwarder.core.routing import Decision
    from pyforwarder.runtime.loop import Callback
    from pyforwarder.worker.connector import Connector
    from pyforwarder.worker.destinations import Destinations
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.sniffer import Sniffer

# Plain names: looking a member up in its enum or module costs more than most of what is done here.
_STREAM: Final = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK
_AF_INET: Final = _socket.AF_INET
_AF_INET6: Final = _socket.AF_INET6
_IPPROTO_TCP: Final = _socket.IPPROTO_TCP
_TCP_MAXSEG: Final = _socket.TCP_MAXSEG
_SOL_SOCKET: Final = _socket.SOL_SOCKET
_SO_OOBINLINE: Final = _socket.SO_OOBINLINE
_EINPROGRESS: Final = errno.EINPROGRESS
_EALREADY: Final = errno.EALREADY
_socket_of: Final = _socket.socket
_monotonic: Final = time.monotonic
_read: Final = os.read
_write: Final = os.write
_OPEN: Final = End.OPEN
_FULL: Final = End.FULL
_SNIFFING: Final = Life.SNIFFING
_CONNECTING: Final = Life.CONNECTING
_HANDOVER: Final = Life.HANDOVER
_JOINED: Final = Life.JOINED
_COPY: Final = DatapathKind.COPY
_FORCED: Final = PairReason.FORCED
_ACCEPTED: Final = int(Counter.ACCEPTED)
_CLIENTS_OPEN: Final = int(Counter.OPEN)
_PAIRS_OPEN: Final = int(Counter.PAIRS_OPEN)
_PAIRS_OPENED: Final = int(Counter.PAIRS_OPENED)
_JOINED_COPY: Final = int(Counter.JOINED_COPY)
_LISTENER_ACCEPTED: Final = int(ListenerCounter.ACCEPTED)
_LISTENER_OPEN: Final = int(ListenerCounter.OPEN)
_TAKEN: Final = int(RuleCounter.TAKEN)
_DECISION_SUM: Final = DECISION_FIRST + len(DECISION_BOUNDS_S) + 1
_CONNECT_SUM: Final = len(CONNECT_BOUNDS_S) + 1


class PlainPath:
    """Serves connections of listeners that are `is_plain`."""

    def __init__(
        self, server: Server, sniffer: Sniffer, destinations: Destinations, connector: Connector
    ) -> None:
        self._server = server
        self._sniffer = sniffer
        self._destinations = destinations
        self._connector = connector
        self._loop = server.loop
        self._counters = server.counters
        self._clients = server.clients
        self._limits = server.limits
        self._pressure = server.pressure
        self._records = server.records
        self._copying = server.copying

    def serve(self, state: ListenerState, fd: int, peer: bytes, number: int) -> None:
        """A client was accepted; `peer` is its address as the kernel writes it."""
        server = self._server
        counters = self._counters
        now_s = self._loop.now_s
        client = Client(server, state, None, fd, peer, now_s)
        client.id = number
        counters[state.counter + _LISTENER_ACCEPTED] += 1
        counters[_CLIENTS_OPEN] += 1
        counters[state.counter + _LISTENER_OPEN] += 1
        self._clients[fd] = client
        self._records.show_later(client)
        try:
            self._go(client, state, fd, now_s)
        except Exception as error:
            # To the loop the listener would be its owner, whose faults end the process.
            server.failed(client, error)

    def came(self, client: Client, fd: int, mask: int) -> None:
        """The first bytes of a client that had said nothing when it was accepted."""
        if mask == EPOLLIN and not self._server.log.tells_steps:
            self._go(client, client.listener, fd, self._loop.now_s)
        else:
            self._loop.redirect(fd, self._sniffer.sniffed)
            self._sniffer.sniffed(client, fd, mask)

    def _go(self, client: Client, state: ListenerState, fd: int, now_s: float) -> None:
        counters = self._counters
        is_watched = client.client_mask != 0
        up = client.up
        room = state.max_bytes
        try:
            data = _read(fd, room)
        except BlockingIOError:
            if not state.decides_at_once:
                if not is_watched:
                    client.client_mask = WATCHED
                    self._loop.watch(fd, WATCHED, self.came, client)
                    self._loop.deadlines.start(client, state.timeout_s, now_s)
                return
            data = b""
        except OSError:
            self._watch_sniffing(client)
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        else:
            if not data:
                # It has closed, and a read will say so again.
                self._begin(client)
                return
        size = len(data)
        up.read_bytes = size
        ruleset = state.ruleset
        end = _OPEN
        if size == room:
            # There may be more behind it, and no edge may tell.
            up.readable = True
            end = _FULL
        decision: Decision | None = ruleset.always
        if decision is None:
            decision = ruleset.decide(
                data,
                client.peer if ruleset.asks_client else None,
                state.local_port,
                end,
                time.time() if ruleset.needs_clock else None,  # noqa: TID251 - expiry
                None,
            )
        generation = state.generation
        if (
            not isinstance(decision, Route)
            or self._pressure.is_full
            or not self._limits.add_pair_below(
                generation.most_pairs, state.counter, state.most_here
            )
        ):
            client.received = data
            self._watch_sniffing(client)
            self._sniffer.follow(client, decision, end)
            if client.life is _SNIFFING and not is_watched:
                self._loop.deadlines.start(client, state.timeout_s, now_s)
            return
        decided_s = _monotonic()
        took_s = decided_s - client.accepted_s
        counters[DECISION_FIRST + bisect_left(DECISION_BOUNDS_S, took_s)] += 1  # as `observe` does
        counters[_DECISION_SUM] += int(took_s * 1e9)
        rule, to, skip, negotiation, _, _ = decision
        client.route = decision
        client.counts_pair = True
        counters[state.rule_counters[rule.index] + _TAKEN] += 1
        counters[_PAIRS_OPEN] += 1
        counters[_PAIRS_OPENED] += 1
        if self._server.log.tells:
            client.facts = (*decision.facts, *ruleset.facts(rule, data))
        client.connecting_s = decided_s
        upstream = chosen = None
        if isinstance(to, str):
            client.upstream = upstream = generation.upstreams[to]
            balancer = upstream.balancer
            if upstream.is_plain:
                peer = client.peer if balancer.asks_client else None
                chosen = balancer.choose(peer.host if peer is not None else None, now_s)
            if chosen is None:
                self._watch_connecting(client, data)
                self._destinations.start(client)
                return
            client.server_state = chosen
            chosen.held.add(1)  # as Balancer.hold does
            to = chosen.address
        if not isinstance(to, Address) or "%" in to.host or not generation.permits(rule, to, now_s):
            self._watch_connecting(client, data)
            self._destinations.approach(client, to)
            return
        client.destination = to
        first = data[skip:] if skip else data
        is_ipv6 = ":" in to.host
        try:
            sock = _socket_of(_AF_INET6 if is_ipv6 else _AF_INET, _STREAM, _IPPROTO_TCP)
        except OSError as error:
            self._watch_connecting(client, data)
            self._connector.refused(client, error.errno or errno.EIO)
            return
        server_fd = sock.fileno()
        down = client.down
        client.server = sock
        client.server_fd = up.target_fd = down.source_fd = server_fd
        client.is_bare = True
        written = 0
        try:
            reset_at_close(server_fd)
            sock.setsockopt(_SOL_SOCKET, _SO_OOBINLINE, 1)
            if state.segment_bytes is not None:
                sock.setsockopt(_IPPROTO_TCP, _TCP_MAXSEG, state.segment_bytes[is_ipv6])
            code = sock.connect_ex(to)
            if first and (not code or code == _EINPROGRESS):
                # That TCP takes them says as well that the server has answered.
                code = _EALREADY
                written = _write(server_fd, first)
                code = 0
            elif code == _EINPROGRESS:
                code = sock.connect_ex(to)
            elif code:
                code = outcome_of(code, to)
        except BlockingIOError:
            pass
        except OSError as error:
            code = error.errno or errno.EIO
        if code:
            self._watch_connecting(client, data)
            timeout_s = upstream.timeout_s if upstream is not None else generation.connect_s
            self._connector.came(client, code, timeout_s=timeout_s)
            return
        if to.port >= self._connector.first_ephemeral_port and self._connector.is_itself(client):
            self._watch_connecting(client, data)
            self._connector.met_itself(client)
            return
        took_s = _monotonic() - decided_s
        if upstream is not None and chosen is not None:
            upstream.balancer.opened(chosen)
            client.server_opened = True
            count_connect(counters, chosen.counter)
            times = upstream.connect_times
        else:
            times = CONNECT_FIRST
        if times:
            counters[times + bisect_left(CONNECT_BOUNDS_S, took_s)] += 1
            counters[times + _CONNECT_SUM] += int(took_s * 1e9)
        if first:
            up.carried_packets = 1
            up.written_bytes = up.carried_bytes = written
            if written < len(first):
                up.pending = memoryview(first)[written:]
        if negotiation is not None:
            answer = negotiation.granted(
                client.source_address() if negotiation.tells_source else None
            )
            if answer:
                try:
                    told = _write(fd, answer)
                except OSError:
                    told = 0  # the next try gets the same error, or none
                down.written_bytes = told
                if told < len(answer):
                    down.pending = answer[told:]
                    # Not carried for anybody: what is written of it must not count.
                    down.carried_bytes = told - len(answer)
        # What has come meanwhile, a FIN too, is reported once they are watched.
        up.readable = False
        client.client_mask = client.server_mask = WATCHED
        if up.pending is not None or down.pending is not None:
            client.life = _HANDOVER
            self._watch_both(client, self._server.opening.flushing, is_watched=is_watched, end=end)
            self._server.opening.flush_pending(client)
            return
        client.life = _JOINED
        client.datapath = copying = self._copying
        client.kind = _COPY
        if is_watched:
            self._watch_both(client, copying.ready, is_watched=True, end=end)
        else:
            self._loop.watch_two(fd, server_fd, WATCHED, copying.ready, client)
        wait_s = generation.idle_check_s  # as Server.watch_idle does
        if state.datapaths[rule.index] == "copy":
            counters[_JOINED_COPY] += 1
            client.pair_reason = _FORCED
        else:
            if state.is_express:
                self._server.handover.joined(client)
            else:
                self._server.handover.joined_plainly(client)
            if client.waits_for_handover:
                wait_s = generation.young_check_s
        self._loop.deadlines.start(client, wait_s, now_s)

    # What goes on by the tables

    def _watch_client(self, client: Client, callback: Callback) -> None:
        """Send the client's events there, whether it was watched before or not."""
        if client.client_mask:
            self._loop.redirect(client.client_fd, callback)
        else:
            client.client_mask = WATCHED
            self._loop.watch(client.client_fd, WATCHED, callback, client)

    def _watch_sniffing(self, client: Client) -> None:
        self._watch_client(client, self._sniffer.sniffed)

    def _watch_both(
        self, client: Client, callback: Callback, *, is_watched: bool, end: End
    ) -> None:
        """Send the events of both sockets there; `is_watched`: those of the client come already."""
        if not is_watched:
            self._loop.watch_two(client.client_fd, client.server_fd, WATCHED, callback, client)
            return
        self._loop.redirect(client.client_fd, callback)
        if end is _FULL:
            # More may have been there, and only a new look tells of it.
            self._loop.change(client.client_fd, WATCHED)
        self._loop.watch(client.server_fd, WATCHED, callback, client)

    def _begin(self, client: Client) -> None:
        """Nothing has been read of it."""
        was_watched = client.client_mask != 0
        self._watch_sniffing(client)
        if client.listener.starts_specially:
            self._sniffer.begin_specially(client)
        else:
            self._sniffer.sniffed(client, client.client_fd, EPOLLIN)
        if client.life is _SNIFFING and not was_watched:
            self._loop.deadlines.start(client, client.listener.timeout_s, self._loop.now_s)

    def _watch_connecting(self, client: Client, data: bytes) -> None:
        """It is routed, and `data` is for its server."""
        client.received = data
        client.life = _CONNECTING
        self._loop.deadlines.stop(client)
        self._watch_client(client, self._sniffer.waiting)
