"""Sessions that have lost their worker, or whose daemon has given them to this one, go on."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.runtime.counters import count_connect
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.worker.udp.icmp_errors import want_errors
from pyforwarder.worker.udp.routes import route_of, server_of
from pyforwarder.worker.udp.session import Refused, Session

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.sessions import Carried, SessionOrphan
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import DatagramPort


class SessionAdoption:
    """Takes sessions over from others."""

    def __init__(self, server: DatagramServer) -> None:
        self._server = server
        self._log = server.log
        self._counters = server.counters
        self._loop = server.loop

    def take_in(self, orphans: Sequence[SessionOrphan]) -> int:
        """Go on with sessions that have lost their worker; how many of them do.

        Their sockets are ours from here on. Those that the configuration would not have any more,
        and those that nobody here can speak for, end.
        """
        taken = []
        for orphan in orphans:
            try:
                session = self._take_in(orphan)
            except Exception as error:
                # What a dead worker has left may be anything: it costs that session alone.
                self._log.internal_error(error)
                session = self._server.by_id.get(orphan.id)
                if session is not None and session.sock is orphan.server:
                    self._server.end(session, CloseReason.INTERNAL)
                self._server.handover.end_orphan(orphan)
                session = None
            if session is not None:
                taken.append(session)
        # Not before all are known: the listener's queue has datagrams of all clients', and whose
        # session is not known yet gets a second one.
        for session in taken:
            if not session.life_ended:
                self._server.copying.look_at_both(session)
        return len(taken)

    def _take_in(self, orphan: SessionOrphan) -> Session | None:
        port = self._port_of(orphan)
        if port is None:
            self._server.handover.end_orphan(orphan)
            return None
        host, number = orphan.client
        local = ipaddress.ip_address(orphan.local[0]).packed if port.is_wildcard else b""
        key = (host, number, local, 0)
        route = route_of(port.state, orphan, self._loop.now_s)
        if key in port.sessions or orphan.id in self._server.by_id:
            route = CloseReason.INTERNAL, "there is another session of that client or number"
        if not isinstance(route, Route):
            self._end_orphan(port.state, orphan, *route)
            return None
        session = Session(self._server, port, key, route, 0)
        session.id = orphan.id
        session.sock = orphan.server
        session.source = Address(*orphan.server.getsockname()[:2])
        session.destination = Address(*orphan.server.getpeername()[:2])
        is_copied = orphan.index < 0
        if not is_copied:
            session.kind = DatapathKind.SPLICE
            session.pair_reason = PairReason.GOES_ON
        record = orphan.record
        if record is not None:
            session.accepted_s = record.started_ns / 1e9
            up, down = record.worker
            session.up_bytes, session.up_packets = up.carried_bytes, up.carried_packets
            session.down_bytes, session.down_packets = down.carried_bytes, down.carried_packets
        answer = self._server.limits.admit(host, port.state.scopes, self._loop.now_s)
        if not isinstance(answer, Limit):  # it is no new one: it may be one too many
            session.client_keys = answer
        self._server.enter(session)
        self._server.standings.heard(session, self._loop.now_s)
        self._hold_server(session)
        want_errors(session.sock)
        self._loop.watch(session.sock.fileno(), EPOLLIN, self._server.copying.answered, session)
        self._server.watch_idle(session)
        self._server.records.show(session, PairState.JOINED)
        for direction, count, packets in (
            (0, session.up_bytes, session.up_packets),
            (1, session.down_bytes, session.down_packets),
        ):
            if session.slot >= 0:
                self._server.records.window.count(session.slot, direction, count, packets, 0)
        if is_copied:
            self._server.handover.established(session)
        elif not self._server.handover.go_on_with(session, orphan):
            self._server.end(session, CloseReason.INTERNAL)
            return None
        return session

    def _end_orphan(
        self, state: ListenerState, orphan: SessionOrphan, reason: CloseReason, cause: str
    ) -> None:
        """Nobody goes on with a session: say why, and what it has carried."""
        refused = Refused(self._server, state, Address(*orphan.client), None, session_id=orphan.id)
        refused.reason, refused.refusal = reason, cause
        up, down = (0, 0), (0, 0)
        record = orphan.record
        if record is not None:
            refused.rule_name = record.rule
            refused.accepted_s = record.started_ns / 1e9
            up, down = [(flow.carried_bytes, flow.carried_packets) for flow in record.worker]

        def then(carried: Carried) -> None:
            more_up, more_down = carried
            self._log.closed(
                refused,
                (up[0] + more_up[0], up[1] + more_up[1]),
                (down[0] + more_down[0], down[1] + more_down[1]),
            )

        self._server.count_end(state, None, reason, is_served=True)
        self._server.handover.end_orphan(orphan, then)

    def _port_of(self, orphan: SessionOrphan) -> DatagramPort | None:
        """Where its client speaks to; under whatever name."""
        host, number = orphan.local
        is_ipv6 = ":" in host
        for port in self._server.ports.values():
            bind = port.state.bind
            if (
                isinstance(bind, Address)
                and (bind.port, bind.is_ipv6) == (number, is_ipv6)
                and (port.is_wildcard or bind.host == host)
            ):
                return port
        return None

    def _hold_server(self, session: Session) -> None:
        """Count a session that goes on for its server."""
        to = session.route.rule.to
        if not isinstance(to, str):
            return
        assert isinstance(session.destination, Address)
        upstream = session.state.generation.upstreams[to]
        server = server_of(upstream, session.destination, session.state.local_port)
        if server is not None:
            session.upstream, session.server_state = upstream, server
            upstream.balancer.hold(server)
            upstream.balancer.opened(server)
            count_connect(self._counters, server.counter)
            session.server_opened = True
