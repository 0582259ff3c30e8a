"""Sessions that are to end, of which some do in each turn of the loop: others wait meanwhile.

Thousands end at once where a server is lost, a listener is taken away, or a user says `flush
--all`; and such as have begun together fall silent together. Each has to be counted, logged, and
taken from the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.splice.keeper_requests import MOST_CLOSED_AT_ONCE

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.udp.session import Session

# So many ends take two milliseconds, mostly for log lines and counters.
ENDS_AT_ONCE: Final = 16
assert ENDS_AT_ONCE <= MOST_CLOSED_AT_ONCE


class Endings:
    """Which sessions are to end, and why."""

    def __init__(
        self, loop: Loop, end_some: Callable[[list[tuple[Session, CloseReason]]], None]
    ) -> None:
        """`end_some` gets at most ENDS_AT_ONCE that have not ended yet, and never raises."""
        self._loop = loop
        self._end_some = end_some
        self._due: dict[Session, CloseReason] = {}
        self._is_planned = False

    def __contains__(self, session: Session) -> bool:
        """Whether the session is to end."""
        return session in self._due

    def add(self, sessions: Iterable[Session], reason: CloseReason) -> None:
        """Have the sessions end in one of the next turns of the loop.

        A session that is to end already ends for the first reason, unless that was silence, which
        may be over by then.
        """
        for session in sessions:
            if self._due.get(session, CloseReason.IDLE) is CloseReason.IDLE:
                self._due[session] = reason
        self._plan()

    def begin(self) -> None:
        """Some of them end now."""
        some = list(islice(self._due.items(), ENDS_AT_ONCE))
        for session, _ in some:
            del self._due[session]
        self._end_some([(session, why) for session, why in some if not session.has_ended])

    def _plan(self) -> None:
        if self._due and not self._is_planned:
            self._is_planned = True
            self._loop.defer(self._run_planned, None)

    def _run_planned(self, _: object) -> None:
        self._is_planned = False
        self.begin()
        self._plan()
