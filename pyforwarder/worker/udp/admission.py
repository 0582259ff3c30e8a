"""Room for a new session: what limits allow, and which others end for it.

A sender with made-up addresses can open sessions: they are counted apart from TCP, those whose
client does not send again end after seconds, and make room for others before that. A sender that
sends twice from each is taken for a client; nothing in UDP tells them apart.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.limits import Limit

if TYPE_CHECKING:
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

_OF_CLIENT: Final = frozenset({Limit.SESSIONS_PER_CLIENT, Limit.SESSIONS_PER_CLIENT_IN_FLEET})


class Admission:
    """Admits sessions, or says which limit forbids it."""

    def __init__(self, server: DatagramServer) -> None:
        self._server = server
        self._loop = server.loop

    def admit(self, session: Session) -> Limit | None:
        """The limit that forbids the session; None if it is admitted (others may have ended for
        it).

        What it counts for from here on is given back by `end`.
        """
        listener, now_s = session.listener, self._loop.now_s
        host = session.peer.host
        answer = self._server.limits.admit(host, listener.scopes, now_s)
        # Somebody else may have used the client's address: its own unconfirmed ones go first.
        if answer in _OF_CLIENT and self._make_room_of_client(host, listener):
            answer = self._server.limits.admit(host, listener.scopes, now_s)
        if isinstance(answer, Limit):
            return answer
        limit = None
        if listener.most_here and self._server.limits.count(listener.counter) >= listener.most_here:
            limit = None if self._make_room(session.port) else Limit.SESSIONS
        elif self._server.limits.sessions >= listener.generation.most_sessions:
            limit = None if self._make_room(None) else Limit.SESSIONS
        elif len(self._server.by_id) >= self._server.most_sessions:
            limit = None if self._make_room(None) else Limit.DESCRIPTORS
        if limit is not None:
            self._server.limits.give_back(answer)
        else:
            session.client_keys = answer
        return limit

    def _make_room_of_client(self, host: str, listener: ListenerState) -> bool:
        """End sessions of the client wherever it has as many as it may; whether all have room now.

        The listener's scope comes first: a session that ends there makes room in the shared one.
        """
        limits, now_s = self._server.limits, self._loop.now_s
        full = {
            key: bounds
            for bounds in listener.scopes
            if bounds.per_client
            and not limits.has_room(key := limits.key(host, bounds), bounds, now_s)
        }
        if any(self._server.eviction.first(key) is None for key in full):
            return False  # and so none of the others need end
        if any(limits.is_beyond(key, bounds, now_s) for key, bounds in full.items()):
            return False  # with one less and one more it is still one too many in the fleet
        return all(
            limits.has_room(key, bounds, now_s) or self._make_room(key)
            for key, bounds in full.items()
        )

    def _make_room(self, group: Hashable) -> bool:
        """End the session of the group that is known least, for another; whether there was one."""
        while True:
            session = self._server.eviction.first(group)
            if session is None:
                return False
            # A session whose datagrams only the kernel has had of late may be better known than
            # that.
            if not self._server.confirm_if_steady(session):
                self._server.end(session, CloseReason.EVICTED)
                return True
