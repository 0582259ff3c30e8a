"""Spliced pairs and sessions that have lost their worker, or their daemon: they are taken in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.orphans import adopt_orphans
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.sessions import SessionOrphan, SpliceSessions
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.udp.server import DatagramServer

# So long a worker that begins waits for a keeper. That takes milliseconds.
ADOPTION_S: Final = 1.0


class Adoption:
    """Takes in, for one worker, what the keeper gives it; nothing where nothing is spliced."""

    def __init__(
        self,
        server: Server,
        *,
        worker: int,
        keeper: KeeperAsker | None,
        splice: SpliceDatapath | None,
        sessions: SpliceSessions | None,
    ) -> None:
        self._server = server
        self._worker = worker
        self._keeper = keeper
        self._splice = splice
        self._sessions = sessions
        # What was read of the first packet of a pair that the kernel has opened, by its id.
        self.facts_of: Callable[[int], Facts] = lambda _id: ()
        self._adopting = 0  # how often the keeper is asked, and has more
        # Sessions that have lost their worker, until the listeners are known.
        self._orphans: list[SessionOrphan] = []
        self._datagrams: DatagramServer | None = None  # there are listeners
        self._ends_sessions = False  # those that have lost their worker

    @property
    def has_more(self) -> bool:
        """Whether a worker that ends its sessions has some, or pairs that cannot be had yet."""
        adopts_later = self._splice is not None and self._splice.adopts_later
        return self._ends_sessions and (bool(self._orphans) or adopts_later)

    def adopt(self, then: Callable[[], None]) -> None:
        """Take in pairs and sessions, as the keeper gives them; then `then`."""
        sessions = self._sessions
        if sessions is None:
            then()
            return
        self._adopting += 1

        def done() -> None:
            self._adopting -= 1
            if self._ends_sessions:
                self._end_sessions()
            else:
                self._take_in_sessions()
            then()

        # Settings may come meanwhile, and those that have come by then are taken in with these.
        self.adopt_pairs(lambda: sessions.adopt(lambda one: self._orphans.append(one), done))

    def adopt_pairs(self, then: Callable[[], None], *, level: str = "info") -> None:
        """Adopt pairs that have lost their worker, without sessions; `then` is called when there
        are no more.

        `level` is the log line's: those that the kernel has opened, and that last, are nothing new.
        """
        server, splice = self._server, self._splice
        if splice is None:
            then()
            return

        def done(adopted: int) -> None:
            if adopted:
                server.log.log.write(level, "adopted", worker=self._worker, pairs=adopted)
            then()

        adopt_orphans(server, splice, done, self.facts_of, level=level)

    def wait(self) -> None:
        """Wait until our orphans are known, before a client is served, if the keeper answers soon.

        Their ports are theirs from then on: no connection of ours gets one, which the kernel would
        take for the pair's. A keeper that hangs is not waited for: the supervisor waits for us, and
        clients in our queues. What it gives later is taken in then.
        """
        if self._adopting:
            assert self._keeper is not None
            self._keeper.wait_until(lambda: not self._adopting, scaled_s(ADOPTION_S))

    def take_in_sessions(self, datagrams: DatagramServer) -> None:
        """Go on with the sessions that have lost their worker, now that there are listeners."""
        self._datagrams = datagrams
        self._take_in_sessions()

    def _take_in_sessions(self) -> None:
        if self._datagrams is None:
            return
        orphans, self._orphans = self._orphans, []
        taken = self._datagrams.adoption.take_in(orphans)
        if taken:
            self._server.log.log.write("info", "adopted", worker=self._worker, sessions=taken)

    def end_sessions(self, datagrams: DatagramServer) -> None:
        """Nobody goes on with sessions that have lost their worker; some end in each turn."""
        self._datagrams = datagrams
        self._ends_sessions = True
        self._end_sessions()

    def end_all_sessions(self, datagrams: DatagramServer) -> None:
        """End all orphaned sessions before this returns."""
        self._datagrams = datagrams
        self._ends_sessions = True
        while self._orphans:
            self._end_sessions()

    def _end_sessions(self) -> None:
        assert self._datagrams is not None
        some, self._orphans = self._orphans[:ENDS_AT_ONCE], self._orphans[ENDS_AT_ONCE:]
        self._datagrams.adoption.end(some, self._server.generation, CloseReason.SHUTDOWN)
        if self._orphans:
            self._server.loop.defer(lambda _: self._end_sessions(), None)
