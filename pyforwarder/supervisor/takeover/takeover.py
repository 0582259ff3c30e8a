"""A daemon takes a running one's place: what it begins with, when it serves, until that one ended.

The messages between the two are in messages.py, the running one's part is in retirement.py. Until
that one says that it retires nothing has changed; from then on it is our turn.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, SystemdSockets, UnixAddress
from pyforwarder.core.datapaths import OUTLIVING
from pyforwarder.core.wording import counted
from pyforwarder.datapath.splice.directories import splice_maps
from pyforwarder.errors import ControlError, LoadError
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.shared_memory import SharedBlocks
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.listeners.binding import BoundSocket
from pyforwarder.supervisor.memory import SharedMemory
from pyforwarder.supervisor.processes.health_checker import HealthResult
from pyforwarder.supervisor.processes.web_process import WebListener
from pyforwarder.supervisor.takeover.messages import bind_of
from pyforwarder.supervisor.takeover.predecessor import NoAnswerError, Predecessor
from pyforwarder.worker.used_tokens import SHARES, SPENDS_FOR_S, TABLE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import Change, ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.listeners.activation import Activation
    from pyforwarder.supervisor.processes.loader import Loaded, Loaders
    from pyforwarder.supervisor.processes.web_process import WebProcess
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

# How long the daemon before may take to release what it has spliced.
_RELEASE_S: Final = 8.0
# So many connections at most come to a daemon between the moment at which its successor learns the
# highest number of a pair and the one at which it accepts no more: no number is given twice.
_MEANWHILE: Final = 100_000
# The same for as long as its successor may take to get ready.
_MEANWHILE_PREPARING: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class SucceedingDaemon:
    """The daemon that takes the place: what it has, and what it does of its own."""

    in_force: ConfigInForce
    memory: SharedMemory
    datapaths: Datapaths
    workers: WorkerPool
    loaders: Loaders
    pins: Path
    lock: InstanceLock
    loop: Loop
    log: Log
    notify: Callable[[str], None]
    take: Callable[[str, Loaded | LoadError], None]  # a part that was loaded beside it
    take_spliced: Callable[[Loaded | LoadError], None]  # and that with which spliced pairs go on
    is_ending: Callable[[], bool]
    end_if_done: Callable[[], None]  # whether there is anything left to end for


class Takeover:
    """Of one daemon: `predecessor` is None if there was none, and once it has ended."""

    def __init__(self, predecessor: Predecessor | None) -> None:
        """`predecessor` is ours to close."""
        self.predecessor = predecessor
        self.has_taken = False  # its place
        self.tokens_free_at_s = [0.0] * SHARES  # until when an earlier daemon writes in each share
        self._spliced: Loaded | LoadError | None = None  # programs that wait for its pairs
        self._waits_for_stay = False  # it is not known yet how many spliced pairs stay with it
        self._change: Change | None = None
        self._obsolete_paths: list[str] = []

    @property
    def waits_for_spliced(self) -> bool:
        """Whether spliced pairs of its are to come, or it is not known how many stay with it."""
        return self._spliced is not None or self._waits_for_stay

    @property
    def remark(self) -> str:
        """What an operator is to know of it; empty: nothing."""
        predecessor = self.predecessor
        if predecessor is None or not predecessor.spliced_that_stay:
            return ""
        stay = predecessor.spliced_that_stay
        return (
            f"{counted(stay, 'spliced pair')} {'stays' if stay == 1 else 'stay'} with the daemon "
            f"before (pid {predecessor.offer.pid}) until the end of each, or of its "
            "`timeouts.drain`: the records are of another version"
        )

    @property
    def down(self) -> list[HealthResult]:
        """The servers that are down, as it has found."""
        if self.predecessor is None:
            return []
        return [
            HealthResult(one.upstream, one.server, up=False, why=one.why)
            for one in self.predecessor.offer.down
        ]

    # What we begin with

    def make_memory(self, *, slots: int, workers: int) -> SharedMemory:
        """The memory of an instance: of used tokens what the daemon before knows."""
        predecessor = self.predecessor
        if predecessor is None or predecessor.offer.used_tokens is None:
            return SharedMemory(workers=workers, slots=slots)
        self.tokens_free_at_s = list(predecessor.offer.used_tokens.free_at_s)
        return SharedMemory(
            workers=workers,
            slots=slots,
            used_tokens=SharedBlocks.inherited(predecessor.used_tokens_fds, TABLE_BYTES),
            share=(predecessor.offer.used_tokens.share + 1) % SHARES,
        )

    def inherit_listeners(
        self,
        predecessor: Predecessor,
        in_force: ConfigInForce,
        activation: Activation,
        web: WebProcess,
    ) -> None:
        """Begin with what the daemon before has bound, and still has.

        Raises:
            ControlError: it says what cannot be.
        """
        for name, fd in predecessor.activation:
            activation.inherit(name, socket.socket(fileno=fd))
        bound: dict[str, tuple[BoundSocket, ...]] = {}
        for said, fds in predecessor.places:
            bind = bind_of(said.bind)
            if isinstance(bind, SystemdSockets):
                raise ControlError("the running daemon says where no socket can be")
            one = BoundSocket.inherited(
                bind_of(said.wanted),
                bind,
                [socket.socket(fileno=fd) for fd in fds],
                protocol=said.protocol,
                is_ours=said.is_ours,
                mode=said.mode,
                freebind=said.freebind,
            )
            bound[said.listener] = (*bound.get(said.listener, ()), one)
        in_force.listeners.inherit(bound)
        for listener, fd in predecessor.web:
            wanted = bind_of(listener.wanted)
            if isinstance(wanted, Address):
                web.listening[listener.key] = WebListener.inherited(wanted, fd)
        if not predecessor.offer.is_draining:
            in_force.drained = {
                (upstream, server) for upstream, server in predecessor.offer.drained
            }

    def put_off(self, change: Change) -> None:
        """Our first configuration is in force for good only once we have its place.

        What only the daemon before serves is closed here: no worker of ours may keep it open.
        """
        for old in change.obsolete:
            if isinstance(old.wanted, UnixAddress) and old.is_ours:
                self._obsolete_paths.append(old.wanted.path)
            old.close()
        self._change = replace(change, obsolete=[])

    # Its place

    def take_place(self, predecessor: Predecessor, daemon: SucceedingDaemon) -> None:
        """Serve beside the daemon before, and have it stop: until it says so nothing has changed.

        Raises:
            ForwarderError: it goes on as before.
        """
        for name, loaded in daemon.loaders.wait():
            if name in OUTLIVING:
                self._spliced = loaded
            else:
                daemon.take(name, loaded)
        self._check_spliced(predecessor, daemon)
        if self._spliced is None and not daemon.datapaths.in_preparation:
            daemon.workers.datapaths_are_settled()
        # A daemon before the one before may still write where our workers remember used tokens.
        free_at_s = self.tokens_free_at_s[daemon.memory.share]
        time.sleep(min(SPENDS_FOR_S, max(0.0, free_at_s - time.monotonic())))
        self._start_workers(predecessor, daemon)
        # From here on it is our turn, also after an error.
        self.has_taken = True
        if predecessor.offer.used_tokens is not None:
            ends_s = time.monotonic() + SPENDS_FOR_S
            self.tokens_free_at_s[predecessor.offer.used_tokens.share] = ends_s
        if predecessor.offer.is_draining:
            try:
                daemon.lock.renew()
            except OSError as error:  # `down` waits for both then
                daemon.log.write("warning", "lock_not_renewed", error=str(error))
        daemon.in_force.listeners.share(shared=False)
        if self._change is not None:
            daemon.in_force.commit(self._change)
        for path in self._obsolete_paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        daemon.loop.watch(predecessor.fileno(), EPOLLIN, self._receive, daemon)
        self._waits_for_stay = daemon.datapaths.predecessor_keeps
        if self.waits_for_spliced:
            if predecessor.is_released:
                daemon.loop.defer(self._take_over_spliced, daemon)
            else:
                daemon.loop.after(scaled_s(_RELEASE_S), lambda: self._take_over_spliced(daemon))

    def _check_spliced(self, predecessor: Predecessor, daemon: SucceedingDaemon) -> None:
        """Raises `ControlError` where its spliced pairs could not go on with us."""
        if predecessor.offer.splice == "passing":
            raise ControlError(
                "the running daemon's spliced pairs end with it, as they are not pinned"
            )
        if predecessor.offer.splice != "pinned":
            return
        keeps = daemon.datapaths.predecessor_keeps
        if self._spliced is None and not keeps:
            why = daemon.datapaths.states["splice"]
            raise ControlError(f"spliced pairs could not go on: {why}")
        if isinstance(self._spliced, LoadError):
            raise ControlError(f"spliced pairs could not go on: {self._spliced}")
        there = (
            splice_maps(daemon.pins / predecessor.offer.splice_pins)
            if keeps
            else {daemon.datapaths.splice_map_id}
        )
        if predecessor.offer.splice_map not in (None, *there):
            raise ControlError(
                "spliced pairs could not go on: what the running daemon has pinned in "
                f"{daemon.pins} is not what this process finds there; "
                f"`nsenter --all --target {predecessor.offer.pid}` runs a command beside it"
            )

    def _start_workers(self, predecessor: Predecessor, daemon: SucceedingDaemon) -> None:
        """Start ours beside its, and have it retire: its workers send theirs to ours.

        Raises:
            ForwarderError: it does not, and goes on.
        """
        workers = range(daemon.memory.workers)
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in workers]
        try:
            daemon.workers.start_beside(
                _last_id(predecessor),
                {index: ours for index, (ours, _) in enumerate(ends)},
                [theirs for _, theirs in ends],
            )
            try:
                predecessor.take(
                    [theirs.fileno() for _, theirs in ends],
                    keeps_spliced=daemon.datapaths.predecessor_keeps,
                )
            except NoAnswerError as error:
                # It has ended, or has begun to retire: no daemon would serve if we did not.
                daemon.log.write("error", "predecessor_silent", error=str(error))
                # But if it only stands still, it goes on one day, and so do its workers: two
                # daemons would write what each takes for its own. systemd must not end us with it.
                daemon.notify(f"MAINPID={os.getpid()}")
                if not predecessor.kill():
                    daemon.log.write("error", "predecessor_lives", pid=predecessor.offer.pid)
        finally:
            for _, theirs in ends:
                theirs.close()

    # Until it has ended

    def _receive(self, daemon: SucceedingDaemon, fd: int, _mask: int) -> None:
        predecessor = self.predecessor
        assert predecessor is not None
        predecessor.receive()
        if predecessor.is_released:
            self._take_over_spliced(daemon)
        if predecessor.is_gone:
            daemon.loop.forget(fd)
            predecessor.close()
            self.predecessor = None
            daemon.log.write("info", "predecessor_ended", pid=predecessor.offer.pid)
            if not daemon.is_ending():
                # It may have been killed while spliced pairs were left.
                daemon.datapaths.look_for_left(looks=True)
            daemon.end_if_done()

    def _take_over_spliced(self, daemon: SucceedingDaemon) -> None:
        """The daemon before has released what it has spliced: it is ours from here on.

        Or it keeps that, and what we splice is beside it.
        """
        if not self.waits_for_spliced:
            return
        loaded, self._spliced = self._spliced, None
        keeps, self._waits_for_stay = self._waits_for_stay, False
        if daemon.is_ending():
            return
        # Of two keepers each would give a new pair the place of a pair of the other's.
        if not keeps and self.predecessor is not None and not self.predecessor.end_keeper():
            daemon.log.write("error", "predecessors_keeper_lives", pid=self.predecessor.offer.pid)
        if loaded is None:
            daemon.loop.stop()  # it was waited for
        else:
            daemon.take_spliced(loaded)

    def end_predecessor(self) -> None:
        """We reset what is left: it is to do so, too."""
        if self.predecessor is not None and self.has_taken:
            self.predecessor.end(now=True)

    def close_in_child(self, *, has_control: bool) -> None:
        """In a new child: hang up; `has_control`: and close the control socket that it has sent."""
        if self.predecessor is not None:
            self.predecessor.close_in_child(has_control=has_control)

    def close(self) -> None:
        """Speak to it no more."""
        if self.predecessor is not None:
            self.predecessor.close()


def _last_id(predecessor: Predecessor) -> int:
    """As high as any number of its pairs will be.

    Raises:
        ForwarderError: it is there, and does not say.
    """
    try:
        return predecessor.last_id() + _MEANWHILE
    except NoAnswerError:
        if not predecessor.is_gone or not predecessor.has_died():
            raise
        # It was killed while this one got ready: no daemon would serve if we did not.
        return predecessor.offer.last_id + _MEANWHILE_PREPARING
