"""Sessions that have lost their worker, or whose daemon has given them to this one, go on."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.core.session import SessionEvent
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.runtime.counters import Counter, ListenerCounter, change, count_connect
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.worker.moving_facts import facts_of
from pyforwarder.worker.udp.eviction import Assurance
from pyforwarder.worker.udp.icmp_errors import want_errors
from pyforwarder.worker.udp.routes import route_of, server_of
from pyforwarder.worker.udp.runs import want_runs
from pyforwarder.worker.udp.session import RefusedClient, Session

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.sessions import Carried, SessionOrphan
    from pyforwarder.worker.generation import Generation, ListenerState
    from pyforwarder.worker.moving_facts import SessionFacts
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import DatagramPort

# So long it is remembered what another worker has told of a session that does not come.
_REMEMBERED_S: Final = 60.0


class SessionAdoption:
    """Takes sessions over from others."""

    def __init__(self, server: DatagramServer) -> None:
        self._server = server
        self._log = server.log
        self._counters = server.counters
        self._loop = server.loop
        self._told: dict[int, SessionFacts] = {}  # of sessions that are to come, by id

    def remember(self, told: SessionFacts) -> None:
        """What another daemon's worker says of a session that is to come."""
        if not self._told:
            self._loop.after(_REMEMBERED_S, self._told.clear)
        if len(self._told) < self._server.most_sessions:
            self._told[told.id] = told

    def take_in(self, orphans: Sequence[SessionOrphan]) -> int:
        """Go on with sessions that have lost their worker; how many of them do.

        See `take_one`.
        """
        taken = [one for one in map(self.take_one, orphans) if one is not None]
        self.all_are_known(taken)
        return len(taken)

    def take_one(self, orphan: SessionOrphan) -> Session | None:
        """Go on with one; its client's datagrams are read, also earlier ones, once `all_are_known`.

        Its socket is ours from here on. None: the configuration would not have it any more, or
        nobody here can speak for it; it ends.
        """
        try:
            return self._take_in(orphan)
        except Exception as error:
            # What a dead worker has left may be anything: it costs that session alone.
            self._log.internal_error(error)
            session = self._server.by_id.get(orphan.id)
            if session is not None and session.sock is orphan.server:
                self._server.end(session, CloseReason.INTERNAL)
            self._server.handover.end_orphan(orphan)
            return None

    def end(
        self, orphans: Sequence[SessionOrphan], generation: Generation, reason: CloseReason
    ) -> None:
        """Nobody goes on with sessions that have lost their worker.

        Each is counted and logged as one that has ended for this reason; no listener is needed for
        that. There are ENDS_AT_ONCE of them at most.
        """
        for orphan in orphans:
            try:
                record = orphan.record
                listener, _ = generation.listener_and_rule(
                    record.listener_name.decode(errors="replace") if record is not None else "",
                    orphan.local[1],
                    record.rule.decode(errors="replace") if record is not None else "",
                )
                self._end_orphan(listener, orphan, reason)
            except Exception as error:
                self._log.internal_error(error)
                self._server.handover.end_orphan(orphan)

    def all_are_known(self, taken: Sequence[Session]) -> None:
        """Look for what has come for them meanwhile.

        Not before: the listener's queue has datagrams of all clients', and whose session is not
        known yet gets a second one.
        """
        for session in taken:
            if not session.has_ended:
                self._server.copying.watch_both(session)

    def _take_in(self, orphan: SessionOrphan) -> Session | None:
        port = self._port_of(orphan)
        if port is None:
            self._server.handover.end_orphan(orphan)
            return None
        host, number = orphan.client
        local = ipaddress.ip_address(orphan.local[0]).packed if port.is_wildcard else b""
        key = (host, number, local, 0)
        route = route_of(port.listener, orphan, self._loop.now_s)
        if key in port.sessions or orphan.id in self._server.by_id:
            route = CloseReason.INTERNAL, "there is another session of that client or number"
        if not isinstance(route, Route):
            self._end_orphan(port.listener, orphan, *route)
            return None
        session = Session(self._server, port, key, route, 0)
        session.id = orphan.id
        session.happen(SessionEvent.CONNECTED)
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
        told = self._told.pop(orphan.id, None)
        self._know_client(session, told)
        scopes = port.listener.scopes
        answer = self._server.limits.admit(host, scopes, self._loop.now_s, is_new=False)
        if not isinstance(answer, Limit):  # it is no new one: it may be one too many
            session.client_keys = answer
        self._server.enter(session)
        self._hold_server(session)
        want_errors(session.sock)
        want_runs(session.sock)
        self._loop.watch(session.sock.fileno(), EPOLLIN, self._server.copying.answered, session)
        self._server.watch_idle(session)
        self._server.records.show(session, PairState.JOINED)
        self._server.records.count(session)
        if is_copied:
            self._server.handover.established(session)
        elif not self._server.handover.resume(session, orphan):
            self._server.end(session, CloseReason.INTERNAL)
            return None
        self._server.confirm_if_steady(session)
        return session

    def _know_client(self, session: Session, told: SessionFacts | None) -> None:
        """How well the client is known: as the worker before has said, or by what was carried.

        An address that was made up is one after an upgrade, too.
        """
        if told is not None:
            session.facts = facts_of(told.audit)
            if told.active_s is not None:
                session.active_s = min(told.active_s, self._loop.now_s)
        if told is not None and told.assurance is not None:
            session.assurance = Assurance(told.assurance)
            session.heard_bytes, session.told_bytes = told.heard_bytes, told.told_bytes
        elif session.kind is DatapathKind.COPY and session.up_packets <= 1:
            session.heard_bytes, session.told_bytes = session.up_bytes, session.down_bytes
        else:
            session.assurance = Assurance.BRIEF  # who has sent less is never given to the kernel

    def _end_orphan(
        self, listener: ListenerState, orphan: SessionOrphan, reason: CloseReason, cause: str = ""
    ) -> None:
        """Nobody goes on with a session: say why, and count and say what it has carried."""
        refused = RefusedClient(
            self._server, listener, Address(*orphan.client), None, session_id=orphan.id
        )
        refused.reason, refused.refusal = reason, cause
        up, down = (0, 0), (0, 0)
        record = orphan.record
        if record is not None:
            refused.rule_name = record.rule
            refused.accepted_s = record.started_ns / 1e9
            up, down = [(flow.carried_bytes, flow.carried_packets) for flow in record.worker]

        def then(carried: Carried) -> None:
            all_up, all_down = (
                (before[0] + more[0], before[1] + more[1])
                for before, more in zip((up, down), carried, strict=True)
            )
            for index, by in (
                (Counter.UP_BYTES, all_up[0]),
                (Counter.DOWN_BYTES, all_down[0]),
                (listener.counter + ListenerCounter.UP_BYTES, all_up[0]),
                (listener.counter + ListenerCounter.DOWN_BYTES, all_down[0]),
            ):
                change(self._counters, index, by)
            self._log.closed(refused, all_up, all_down)

        self._server.count_end(listener, None, reason, is_served=True)
        self._server.handover.end_orphan(orphan, then)

    def _port_of(self, orphan: SessionOrphan) -> DatagramPort | None:
        """The listener's socket to which the orphan's client sends; under any name."""
        host, number = orphan.local
        is_ipv6 = ":" in host
        for port in self._server.ports.values():
            bind = port.listener.bind
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
        upstream = session.listener.generation.upstreams[to]
        server = server_of(upstream, session.destination, session.listener.local_port)
        if server is not None:
            session.upstream, session.server_state = upstream, server
            upstream.balancer.hold(server)
            upstream.balancer.opened(server)
            count_connect(self._counters, server.counter)
            session.server_opened = True
