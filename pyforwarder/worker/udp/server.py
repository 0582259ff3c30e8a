"""UDP: a session for each client address, decided by its first datagram.

This is the worker's table of listeners and sessions, and the life of a session: it has no end of
its own, and ends when nobody has spoken for a while. What else is done for it stands beside: its
first datagrams (deciding.py), limits (admission.py), the way to its server (connecting.py), its
datagrams (copying.py, handover.py), the loss of its server (server_losses.py), sessions of other
workers (adoption.py).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core.reasons import CloseReason, refusal_code
from pyforwarder.core.session import SessionEvent
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    ListenerCounter,
    change,
    count_disconnect,
)
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.refusals import count_refusal
from pyforwarder.worker.udp.admission import Admission
from pyforwarder.worker.udp.adoption import SessionAdoption
from pyforwarder.worker.udp.client_addresses import ClientAddresses
from pyforwarder.worker.udp.connecting import ConnectionMaps
from pyforwarder.worker.udp.copying import Copying
from pyforwarder.worker.udp.deciding import Deciding
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE, Endings
from pyforwarder.worker.udp.eviction import (
    STEADY_AFTER_S,
    UNCONFIRMED_IDLE_S,
    Assurance,
    EvictionQueues,
)
from pyforwarder.worker.udp.handover import SessionHandover
from pyforwarder.worker.udp.records import SessionRecords
from pyforwarder.worker.udp.server_losses import ServerLosses
from pyforwarder.worker.udp.session import DatagramPort

if TYPE_CHECKING:
    from pyforwarder.core.routing import Rule
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.sessions import SpliceSessions
    from pyforwarder.runtime.limits import SharedLimits
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.runtime.resolver import Names
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.log import ConnectionLog
    from pyforwarder.worker.token_claims import TokenClaims
    from pyforwarder.worker.udp.connection_ids import ConnectionIds
    from pyforwarder.worker.udp.session import Session
    from pyforwarder.worker.udp.sockets import Key

IDLE_CHECKS: Final = 8
_NEW: Final = Assurance.NEW
_STEADY: Final = Assurance.STEADY


class DatagramServer:
    """All UDP listeners and sessions of one worker."""

    def __init__(
        self,
        loop: Loop,
        *,
        counters: memoryview,
        limits: SharedLimits,
        window: PairWindow,
        log: ConnectionLog,
        next_id: Callable[[], int],
        names: Names,
        most_sessions: int,
        most_shown: int,
        ids: ConnectionIds,
        ask_supervisor: Callable[[str, list[int], int], None],
        kernel: SpliceSessions | None = None,
        claims: TokenClaims | None = None,
    ) -> None:
        """`next_id` also counts the session as accepted.

        `most_sessions` are bounded by the descriptors that this process may have, `most_shown` by
        the slots of the table that are not kept for TCP. `kernel` may take sessions over.
        `ask_supervisor(what, descriptors, number)` asks for what needs a privilege, and does not
        wait.
        """
        self.loop = loop
        self.counters = counters
        self.limits = limits
        self.log = log
        self.next_id = next_id
        self.most_sessions = most_sessions
        self.ids = ids
        self.ports: dict[str, DatagramPort] = {}
        self.by_id: dict[int, Session] = {}  # the sessions that are open
        self.eviction: EvictionQueues[Session] = EvictionQueues()
        self.client_addresses = ClientAddresses(ask_supervisor)
        self._endings = Endings(loop, self._end_some)
        # Datagrams wait in the kernel: another daemon's worker has sessions that are to be ours.
        self.waits_for_sessions = False
        self.records = SessionRecords(window, most_shown)
        self.handover = SessionHandover(self, kernel)
        self.losses = ServerLosses(self)
        self.admission = Admission(self)
        self.deciding = Deciding(self, claims)
        self.connecting = ConnectionMaps(self, names)
        self.copying = Copying(self, self.losses, window)
        self.adoption = SessionAdoption(self)

    # Listeners

    def listen(self, name: str, sock: socket.socket, listener: ListenerState) -> None:
        """Serve this socket under this configuration; sessions of the name go on.

        The socket is ours from here on. A socket of the same name is replaced.
        """
        port = self.ports.get(name)
        if port is None:
            self.ports[name] = port = DatagramPort(sock, listener)
        else:
            self.loop.forget(port.sock.fileno())
            port.sock.close()
            port.take(sock, listener)
        self.loop.watch(
            sock.fileno(), 0 if self.waits_for_sessions else EPOLLIN, self.copying.readable, port
        )

    def sessions_have_come(self) -> None:
        """Nobody else has sessions of these listeners any more: read what waits there."""
        self.waits_for_sessions = False
        for port in self.ports.values():
            self.loop.change(port.sock.fileno(), EPOLLIN)

    def listen_no_more(self) -> None:
        """Leave clients' datagrams to another daemon, which has the same sockets.

        Sessions go on sending what their servers answer.
        """
        for port in self.ports.values():
            self.loop.forget(port.sock.fileno())

    @property
    def is_idle(self) -> bool:
        """Whether it has neither a session nor a client that may get one."""
        return not self.by_id and self.deciding.is_idle

    def listen_only_at(self, names: Sequence[str]) -> None:
        """Close the listeners that are not among `names`, and end their sessions."""
        for name in [name for name in self.ports if name not in names]:
            port = self.ports.pop(name)
            self.end_many(port.sessions.values(), CloseReason.SHUTDOWN)
            self.counters[Counter.DATAGRAMS_LOST] += self.deciding.forget_all(port)
            self.loop.forget(port.sock.fileno())
            port.sock.close()

    # Sessions

    def enter(self, session: Session) -> None:
        """Count a session that has its id among those that are open; `end` takes it out."""
        counters, listener = self.counters, session.listener
        counters[listener.counter + ListenerCounter.OPEN] += 1
        counters[Counter.OPEN] += 1
        counters[Counter.PAIRS_OPEN] += 1
        self.limits.add_session(listener.counter)
        session.groups = (None, session.port, *session.client_keys)
        self.eviction.add(session)
        session.port.sessions[session.key] = session
        self.by_id[session.id] = session

    def sessions(self) -> list[Session]:
        """All open sessions."""
        return list(self.by_id.values())

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer to what `ask_supervisor` asked under this number."""
        self.client_addresses.answered(number, done=done)

    def blame(self, port: DatagramPort, key: Key, error: Exception) -> None:
        """The socket is everybody's: a fault costs the session that it happened to."""
        self.log.internal_error(error)
        session = port.sessions.get(key)
        if session is not None:
            self.end(session, CloseReason.INTERNAL)

    def refuse(self, session: Session, reason: CloseReason, cause: str) -> None:
        """End a session that has no server (yet), and tell its client why.

        `cause` is for the log.
        """
        session.refusal = cause
        self.send_refusal(session, reason)
        self.end(session, reason)

    def send_refusal(self, session: Session, reason: CloseReason) -> None:
        """Tell the client why it has no session, if its protocol has words for it."""
        negotiation = session.route.negotiation
        if negotiation is not None:
            answer = negotiation.refused(refusal_code(reason))
            if answer:
                self.copying.send_to_client(session, answer)

    # Ends

    def watch_idle(self, session: Session) -> None:
        """Look at it again after a part of the time that it may be silent."""
        self.loop.deadlines.start(session, self._idle_s(session) / IDLE_CHECKS, self.loop.now_s)

    @staticmethod
    def _idle_s(session: Session) -> float:
        idle_s = session.listener.session_idle_s
        return min(UNCONFIRMED_IDLE_S, idle_s) if session.assurance is _NEW else idle_s

    def check_idle(self, session: Session) -> None:
        """The session's timer: silent for too long, or not connected in time."""
        if session.sock is None:
            self.refuse(session, CloseReason.TIMEOUT, "no answer in time")
            return
        if session.assurance is not _STEADY:
            self.confirm_if_steady(session)
        # Sessions that have begun together fall silent together: not all of them end in one turn.
        if self._is_idle(session):
            self._endings.add([session], CloseReason.IDLE)
        elif self.losses.has_lost(session):  # by what happened to a connection of TCP
            self._endings.add([session], CloseReason.UNREACHABLE)
        else:
            self.watch_idle(session)

    def _is_idle(self, session: Session) -> bool:
        return self.loop.now_s - self.handover.active_s(session) >= self._idle_s(session)

    def confirm_if_steady(self, session: Session) -> bool:
        """Confirm a session if its client has gone on speaking, as the kernel has seen."""
        if self.handover.heard_s(session) - session.accepted_s < STEADY_AFTER_S:
            return False
        self.eviction.confirm(session, self.loop.now_s)
        return True

    def end_many(self, sessions: Iterable[Session], reason: CloseReason) -> None:
        """End sessions: the first ENDS_AT_ONCE now, the others in the next turns of the loop."""
        self._endings.add(sessions, reason)
        self._endings.begin()

    def is_ending(self, session: Session) -> bool:
        """Whether the session ends in one of the next turns."""
        return session in self._endings

    def _end_some(self, due: Sequence[tuple[Session, CloseReason]]) -> None:
        """End at most ENDS_AT_ONCE; a fault costs nobody else anything."""
        ends = []
        for session, reason in due:
            if reason is CloseReason.IDLE and not self._is_idle(session):
                self.watch_idle(session)  # it has spoken meanwhile
            else:
                ends.append((session, reason))
        try:
            self.handover.leave([session for session, _ in ends])
        except Exception as error:
            self.log.internal_error(error)
        for session, reason in ends:
            try:
                self.end(session, reason)
            except Exception as error:
                self.log.internal_error(error)

    def end(self, session: Session, reason: CloseReason) -> None:
        """Forget the session; UDP has no way to tell anybody."""
        if session.has_ended:
            return
        session.reason = reason
        # First what others need, last what is only told: a fault there must cost nobody a place.
        session.happen(SessionEvent.ENDED)
        self._forget(session)
        self.handover.leave([session])
        if session.sock is not None:
            self.loop.close(session.sock.detach())
            session.sock = None
        self.records.release(session)
        self._give_back(session)
        if session.asking is not None:
            session.asking.stop()
        if session.address_asked:
            self.client_addresses.give_up(session.address_asked)
        if session.is_counted:
            self.count_ended(session)

    def count_ended(self, session: Session) -> None:
        """Count and log a session that has ended, once it is known what it has carried."""
        listener, reason = session.listener, session.reason
        assert reason is not None
        is_served = session.down_packets > 0
        self.count_end(listener, session.route.rule, reason, is_served=is_served)
        for index, by in (
            (Counter.UP_BYTES, session.up_bytes),
            (Counter.DOWN_BYTES, session.down_bytes),
            (listener.counter + ListenerCounter.UP_BYTES, session.up_bytes),
            (listener.counter + ListenerCounter.DOWN_BYTES, session.down_bytes),
        ):
            change(self.counters, index, by)
        self.log.closed(
            session,
            (session.up_bytes, session.up_packets),
            (session.down_bytes, session.down_packets),
        )

    def _forget(self, session: Session) -> None:
        """Remove the session from all tables of ours, with its timer and the datagrams that wait
        for it.
        """
        session.port.forget(session)
        del self.by_id[session.id]
        self.eviction.leave(session)
        self.loop.deadlines.stop(session)
        for connection_id in session.ids:
            self.ids.forget(connection_id, self.loop.now_s)
        self.copying.forget_waiting(session)

    def _give_back(self, session: Session) -> None:
        """What limits, gauges and the balancer count for the session."""
        counter = session.listener.counter
        self.limits.remove_session(counter)
        self.limits.give_back(session.client_keys)
        for index in (Counter.OPEN, Counter.PAIRS_OPEN, counter + ListenerCounter.OPEN):
            change(self.counters, index, -1)
        if session.upstream is not None and session.server_state is not None:
            if session.server_opened:
                session.upstream.balancer.closed(session.server_state)
                count_disconnect(self.counters, session.server_state.counter)
            session.upstream.balancer.release(session.server_state)

    def count_end(
        self, listener: ListenerState, rule: Rule | None, reason: CloseReason, *, is_served: bool
    ) -> None:
        """Count why a session has ended, or a first datagram got none."""
        self.counters[CLOSED_INDEX[reason]] += 1
        if not is_served:
            count_refusal(
                self.counters,
                reason,
                listener=listener.counter,
                rule=listener.rule_counters[rule.index] if rule is not None else None,
            )

    def flush_ids(self, ids: list[int] | None) -> list[int]:
        """End the sessions with these ids, or all (None); the ids that were found.

        Of many, most end in the next turns of the loop.
        """
        wanted = None if ids is None else set(ids)
        found = [s for s in self.by_id.values() if wanted is None or s.id in wanted]
        self.end_many(found, CloseReason.FLUSHED)
        return [session.id for session in found]

    def drain(self, reason: CloseReason) -> None:
        """End every session, some in each turn of the loop, and listen no more."""
        self.end_many(self.by_id.values(), reason)
        self.listen_only_at(())

    def end_all(self, reason: CloseReason) -> None:
        """End every session now, however long that takes, and listen no more."""
        sessions = list(self.by_id.values())
        for first in range(0, len(sessions), ENDS_AT_ONCE):
            some = sessions[first : first + ENDS_AT_ONCE]
            self._end_some([(session, reason) for session in some])
        self.listen_only_at(())

    # Between daemons

    def release(self, session: Session) -> None:
        """The session is another daemon's from here on, with its socket: forget it."""
        session.happen(SessionEvent.RELEASED)
        is_carried = session.in_kernel is not None
        self.handover.release(session)
        self._forget(session)
        session.port.behind.pop(session, None)
        if session.sock is not None:
            self.loop.forget(session.sock.fileno())
            self.loop.close(session.sock.detach())
            session.sock = None
        if is_carried:
            self.records.forget(session)  # it tells the other daemon what `show` said
        else:
            self.records.release(session)
        self._give_back(session)
