"""Workers that have died: what they leave is cleaned up, and others come in their places.

So it is while the daemon drains, too: who comes then in the place of one that has died accepts
nobody, goes on with the pairs that outlived that one, and ends with them.
"""

from __future__ import annotations

import errno
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.splice.keeper_client import KeeperError
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.counters import Counter
from pyforwarder.supervisor.messages import FaultyMessageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.workers.process import WorkerProcess
    from pyforwarder.supervisor.workers.starting import WorkerStarter
    from pyforwarder.worker.log import Log

# A worker that dies again this soon after its start is replaced only after a pause.
_SOON_S: Final = 1.0
_PAUSE_S: Final = 1.0
# How often a keeper is asked for a dead worker's pairs, once a second, before another worker comes
# all the same: a keeper that hangs is replaced sooner.
_CLEAN_UP_TRIES: Final = 15
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


class WorkersPhase(Enum):
    """What the workers of an instance are there for, which says who is replaced."""

    SERVING = "serving"
    DRAINING = "draining"  # they accept no more, and end with their pairs
    # The same, but for pairs that are not spliced: those are another daemon's.
    KEEPING = "keeping"
    RESETTING = "resetting"  # they reset what is left
    RETIRED = "retired"  # what they have is another daemon's: none is replaced


class Replacements:
    """Keeps a living worker in every place that needs one."""

    def __init__(
        self,
        workers: list[WorkerProcess],
        memory: SharedMemory,
        datapaths: Datapaths,
        starter: WorkerStarter,
        *,
        loop: Loop,
        log: Log,
        tell_phase: Callable[[WorkerProcess], None],
    ) -> None:
        """A new one is put into its place in `workers`, and `tell_phase` is called with it."""
        self._workers = workers
        self._memory = memory
        self._datapaths = datapaths
        self._starter = starter
        self._loop = loop
        self._log = log
        self._tell_phase = tell_phase
        # Indexes: seen to have ended, and not replaced yet; those that are to be replaced; and how
        # that goes on after a pause.
        self._dead: set[int] = set()
        self._due: set[int] = set()
        self._timers: dict[int, int] = {}
        self._replaced_in_the_end: set[int] = set()
        # Workers that were to take in pairs, and have not read it: their successors do that.
        self._unheard: set[int] = set()
        self._phase = WorkersPhase.SERVING

    @property
    def phase(self) -> WorkersPhase:
        """The phase in which all workers are; `tell_phase` tells it to a worker that comes now."""
        return self._phase

    @property
    def are_over(self) -> bool:
        """Whether all workers have died, and none is to be replaced. One that `reap` has not seen
        may be dead, too: it may die while it is told the phase, right after its start.

        As one may die right after it has come, while it is told what the others were.
        """
        return len(self._dead) == len(self._workers) and not self._due

    def begin(self, phase: WorkersPhase) -> None:
        """Note the phase in which the workers are from now on."""
        self._phase = phase
        if phase is WorkersPhase.RETIRED:
            self._due.clear()

    def reap(self) -> None:
        """Clean up after workers that have died, and replace them; call it on SIGCHLD."""
        for index, worker in enumerate(self._workers):
            # A process that asked one in vain may have found out before us that it is dead.
            if index in self._dead or not worker.has_ended():
                continue
            self._dead.add(index)
            if self._has_failed(index, worker):
                self._due.add(index)
            reset = self._memory.count_reset(index)
            self._loop.forget(worker.channel.fileno())
            worker.close()
            if index in self._due:
                self._log.write(
                    "error",
                    "worker_died",
                    pid=worker.pid,
                    exit_code=worker.exit_code,
                    pairs_reset=reset,
                )
            self._clean_up_after(index, is_soon=time.monotonic() - worker.started_s < _SOON_S)

    def replace_now(self) -> None:
        """Replace workers that have died, without a pause: pairs that have outlived them are to be
        reset.
        """
        for index in sorted(self._due):
            self._clean_up_after(index)

    def has_not_heard(self, index: int) -> None:
        """Note that a worker was to take in pairs of the keeper's, and has not read it; if it ends,
        its successor takes them in.
        """
        self._unheard.add(index)

    def replace_for_pairs(self, index: int) -> None:
        """Replace a worker that has ended, as there are pairs for it: the other one goes on with
        these, or resets them.

        A worker that is to be replaced anyway gets them when it begins.
        """
        if index in self._dead and index not in self._due and self._takes_in(index):
            # The worker ended with its last pair.
            self._due.add(index)
            self._clean_up_after(index)

    def _takes_in(self, index: int) -> bool:
        """Whether pairs that have come while the daemon ends are ours, and can have a worker."""
        match self._phase:
            case WorkersPhase.DRAINING | WorkersPhase.KEEPING:
                return True
            case WorkersPhase.RESETTING:
                return index not in self._replaced_in_the_end
            case _:
                return False

    def end_accused(self, indexes: Iterable[int]) -> None:
        """End workers that have asked the keeper for what they may not."""
        for index in indexes:
            worker = self._workers[index]
            if worker.exit_code is None:
                worker.fault(FaultyMessageError("it asked the splice keeper for what it may not"))

    def _has_failed(self, index: int, worker: WorkerProcess) -> bool:
        """Whether another is to come in the place of a worker that has ended."""
        match self._phase:
            case WorkersPhase.SERVING:
                return True
            case WorkersPhase.DRAINING | WorkersPhase.KEEPING:
                # The worker says that it has nothing left, and may have been taken over.
                is_empty = not self._memory.counters.block(index)[Counter.OPEN]
                return worker.exit_code != 0 or not is_empty or index in self._unheard
            case WorkersPhase.RESETTING:
                # What outlives it has still to be reset. That is tried once more.
                is_first = index not in self._replaced_in_the_end
                has_left = worker.exit_code != 0 or index in self._unheard
                return has_left and is_first and self._datapaths.splicing is not None
            case WorkersPhase.RETIRED:
                return False

    def _clean_up_after(
        self, index: int, *, is_soon: bool = False, tries: int = _CLEAN_UP_TRIES
    ) -> None:
        """A worker is gone, and with it its sockets: clean up its records in shared places.

        Then put another in its place, a while later if this one lived too short.
        """
        self._loop.cancel(self._timers.pop(index, 0))
        if self._phase is WorkersPhase.RETIRED:
            # The kernel compares with its records until the other daemon's programs are there,
            # which reads in them what `show` has said.
            return
        self._memory.forget_gauges(index)
        try:
            # Its spliced pairs go on: first, while the table says which they are.
            self._datapaths.worker_died(index)
            # All that it had asked was read before: complaints of it are not about its successor.
            self.end_accused(self._datapaths.accused() - {index})
        except KeeperError as error:
            self._log.write("error", "splice_keeper", error=str(error))
            if error.errno not in _NO_DESCRIPTORS:
                tries -= 1  # else nobody can be put in its place before there are some, either
            if index in self._due and tries:
                # Its successor would not get them: the next keeper knows of them, soon.
                self._after_pause(index, lambda: self._clean_up_after(index, tries=tries))
                return
        self._memory.clear_window(index)
        try:
            self._datapaths.forget_worker(index)
        except ForwarderError as error:
            self._log.write("error", "worker_forget", error=str(error))
        if is_soon:
            self._after_pause(index, lambda: self._replace(index))
        else:
            self._replace(index)

    def _after_pause(self, index: int, action: Callable[[], None]) -> None:
        """Go on with the replacement of a worker; nothing else is to come of it meanwhile."""
        self._timers[index] = self._loop.after(_PAUSE_S, action)

    def _replace(self, index: int) -> None:
        """Put another in the place of one that is due; it is told what the others were."""
        if index not in self._due:
            return
        try:
            worker = self._starter.start(index)
        except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
            self._log.write("error", "worker_start", error=str(error))
            # It may have begun, and been given its predecessor's pairs: they are the next one's.
            self._after_pause(index, lambda: self._clean_up_after(index))
            return
        self._workers[index] = worker
        for some in (self._dead, self._due, self._unheard):
            some.discard(index)
        if self._phase is WorkersPhase.RESETTING:
            self._replaced_in_the_end.add(index)
        self._tell_phase(worker)
