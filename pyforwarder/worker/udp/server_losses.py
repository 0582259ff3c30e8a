"""When a session has lost its server: by what ICMP says, by health checks, by a reload."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.connector import CONNECT_ERRORS
from pyforwarder.worker.udp.icmp_errors import Unreachable, refusals

if TYPE_CHECKING:
    from pyforwarder.core.upstreams import Balancer, ServerState
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

# A server that has answered is gone once it has refused so many datagrams, and answered none: its
# address may be forged, too.
REFUSALS_OF_A_SERVER: Final = 3
# And one that has answered anybody so lately is not ejected for a refusal.
ANSWERED_LATELY_S: Final = 2.0


class ServerLosses:
    """Which servers of a worker's sessions are gone."""

    def __init__(self, server: DatagramServer) -> None:
        self._server = server
        self._counters = server.counters
        self._loop = server.loop
        self._balancers: Mapping[str, Balancer] | None = None  # in force; None: not known

    def read_errors(self, session: Session) -> bool:
        """Judge what ICMP says about the session's datagrams; whether it goes on."""
        assert session.sock is not None
        for refusal in refusals(session.sock):
            if self._is_believed(session, refusal):
                is_sure = _is_of_server(session, refusal)
                self.lose(session, refusal.errno, is_sure=is_sure)
                return False
            self._counters[Counter.ERRORS_DOUBTED] += 1
        return True

    def _is_believed(self, session: Session, refusal: Unreachable) -> bool:
        """Whether the session ends.

        A server that has never answered is not missed: the client's next datagram finds another.
        One that has answered must say so itself, about several datagrams, and answer none.
        """
        if not self.has_answer(session):
            return True
        if not _is_of_server(session, refusal):
            return False
        up, down = self._server.handover.packets(session)
        times, up_before, down_before = session.refused
        if down != down_before:
            times = 0
        elif up == up_before:
            return False  # about the same datagram, at best
        session.refused = (times + 1, up, down)
        return times + 1 >= REFUSALS_OF_A_SERVER

    def has_answer(self, session: Session) -> bool:
        """Whether the server has ever answered, to our socket or to the kernel's programs."""
        return session.down_packets > 0 or self._server.handover.answered_s(session) > -math.inf

    def lose(self, session: Session, code: int, *, is_sure: bool) -> None:
        """End the session; if it is sure that the server is gone, it counts for others, too."""
        server, upstream = session.server_state, session.upstream
        if is_sure and server is not None and upstream is not None:
            now_s = self._loop.now_s
            if server.is_ejected(now_s) or not self._answers(server):
                upstream.balancer.failed(server, now_s)
        if not session.down_packets:
            session.refusal = os.strerror(code)
        self._server.end(session, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))
        if self.has_lost(session):
            self.servers_changed()  # others have the same

    def _answers(self, server: ServerState) -> bool:
        """Whether the server has answered a session lately."""
        since_s = self._loop.now_s - ANSWERED_LATELY_S
        return any(
            session.server_state is server and self._server.handover.answered_s(session) > since_s
            for session in self._server.by_id.values()
        )

    def servers_changed(self, balancers: Mapping[str, Balancer] | None = None) -> None:
        """End the sessions whose server is down, ejected, or no more in the configuration.

        Their clients' next datagrams find another. What the kernel sends on would go nowhere, and
        nobody would notice. `balancers` are those of the configuration in force from now on.
        """
        if balancers is not None:
            self._balancers = balancers
        lost = filter(self.has_lost, self._server.by_id.values())
        self._server.end_many(lost, CloseReason.UNREACHABLE)

    def has_lost(self, session: Session) -> bool:
        """Whether the session's server is down, ejected, or no more in the configuration."""
        server, upstream = session.server_state, session.upstream
        if server is None or upstream is None:
            return False
        balancer = upstream.balancer
        if self._balancers is not None and balancer not in self._balancers.values():
            return True
        if not server.is_up or server not in balancer.servers:
            return True
        now_s = self._loop.now_s
        # Where all of them are, it is as good as any.
        return server.is_ejected(now_s) and any(
            other.is_up and other.weight and not other.is_ejected(now_s)
            for other in balancer.servers
        )


def _is_of_server(session: Session, refusal: Unreachable) -> bool:
    to = session.destination
    return isinstance(to, Address) and to.host.partition("%")[0] == refusal.host
