"""The workers of an instance: all alike, and told everything alike.

How one begins is in starting.py, what it asks in receiving.py, what follows its death in
replacing.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pyforwarder.errors import ControlError
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.pulse import PULSE_S
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.express.deciding import Decisions
from pyforwarder.supervisor.workers.process import ask_all
from pyforwarder.supervisor.workers.receiving import Receiver
from pyforwarder.supervisor.workers.replacing import Replacements, WorkersPhase
from pyforwarder.supervisor.workers.starting import WorkerStarter

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.express.rule_deciders import RuleDecider, RuleName
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.messages import TokenClaim
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.supervisor.workers.process import WorkerProcess
    from pyforwarder.worker.log import Log

# How long the keeper may take to give away what the kernel has opened by itself, at the end.
_TAKEN_IN_S: Final = 0.5
# How long workers that have nothing more to do wait in a drain for what the keeper still has for
# them: it, or a worker, may have been killed just then, and another has to come first.
_GIVEN_S: Final = 15.0
_LOOK_S: Final = 0.05
# No worker counts so far. From here on programs have made the numbers (express_connect.c).
_MOST_ID: Final = (1 << 52) - 1
_MOST_ACCEPTED: Final = 1 << 42  # by a worker


class WorkerPool:
    """Starts, tells and ends the workers: as many as the shared memory is for."""

    def __init__(
        self,
        in_force: ConfigInForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        *,
        user: str | None,
        loop: Loop,
        log: Log,
        close_in_child: Callable[[], None],
        down: Callable[[], Iterable[HealthResult]],
        claim: Callable[[TokenClaim, Callable[[bool | None], None]], None] | None = None,
    ) -> None:
        """Start no worker yet. Each runs as `user`, calls `close_in_child`, and is told of the
        servers `down`.

        `claim` is asked by those that want a token used up in a fleet.
        """
        self._memory = memory
        self._datapaths = datapaths
        self._loop = loop
        self._log = log
        self._decisions = Decisions(
            in_force,
            datapaths,
            loop=loop,
            user=user,
            down=down,
            log=log,
            failed=self._memory.count_failed_in_kernel,
        )
        self._workers: list[WorkerProcess] = []
        self._starter = WorkerStarter(
            in_force,
            memory,
            datapaths,
            user=user,
            log=log,
            close_in_child=close_in_child,
            down=down,
            watch=Receiver(self._workers, loop).watch,
            claim=claim,
        )
        self._replacements = Replacements(
            self._workers,
            memory,
            datapaths,
            self._starter,
            loop=loop,
            log=log,
            tell_phase=self._tell_phase,
        )
        self._gets_more = False  # in a drain: the keeper has pairs for them that they do not know

    @property
    def living(self) -> list[WorkerProcess]:
        """The workers that have not ended, as far as we know."""
        return [worker for worker in self._workers if worker.exit_code is None]

    @property
    def have_ended(self) -> bool:
        """Whether all have died, were reaped, and none is to come in the place of one."""
        return self._replacements.are_over

    def start(self) -> None:
        """Fork the workers; they accept once all have taken over what an earlier daemon has
        left.

        Raises:
            ForwarderError: one does not start; those that have end with `close`.
        """
        found = self._datapaths.found
        complaints_fd = self._datapaths.complaints_fd()
        if complaints_fd is not None:
            self._loop.watch(complaints_fd, EPOLLIN, self._accused, self)
        # A new pair must not be given the number of one that goes on. No worker counts as far as
        # some of these may say, which one that was taken over has made up.
        found_id = max((one.id for one in found if one.id <= _MOST_ID), default=0)
        self._starter.last_id = max(self._starter.last_id, found_id)
        for index in range(self._memory.workers):
            # While there are ports to be taken over, no connection may be opened yet.
            self._workers.append(self._starter.start(index, listening=not found))
        for index, worker in enumerate(self._workers) if found else ():
            self._starter.configure(worker, index)

    def start_beside(
        self,
        last_id: int,
        from_predecessors: Mapping[int, socket.socket],
        not_theirs: Sequence[socket.socket],
    ) -> None:
        """Start the workers beside another daemon that still serves, and whose pairs have lower
        numbers.

        Its workers send their pairs by `from_predecessors`, by worker; ours to close. No worker of
        ours keeps one of another, or of `not_theirs`.

        Raises:
            ForwarderError: as `start`.
        """
        self._starter.begin_beside(last_id, from_predecessors, not_theirs)
        self.start()
        self._starter.close_from_predecessors()

    def take_over_spliced(self) -> None:
        """What the daemon before had spliced is in our keeper's hands: the workers may ask it."""
        for worker in self.living:
            try:
                worker.ask("take_over")
            except ControlError as error:
                self._log.write("error", "worker_takes_over", error=str(error))
                worker.kill()

    def retire(self, to_successors: Sequence[int], *, keeps_spliced: bool) -> None:
        """Have the workers accept no more, and send their pairs to another daemon's; none is
        replaced.

        A worker that has died before is not replaced, either: the new one would be forked with the
        channels to the other daemon's workers. Its spliced pairs are the keeper's to give to that
        daemon.

        `keeps_spliced`: spliced pairs stay, and a worker that dies is replaced, once those channels
        are closed here.
        """
        self._replacements.begin(WorkersPhase.KEEPING if keeps_spliced else WorkersPhase.RETIRED)
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        self._gets_more = keeps_spliced and not self._decisions.has_stopped
        for index, worker in enumerate(self._workers):
            if worker.exit_code is None:
                self._retire(worker, to_successors[index : index + 1])
        self._wait_for_more(time.monotonic() + scaled_s(_GIVEN_S))

    def _retire(self, worker: WorkerProcess, to_successors: Sequence[int] = ()) -> None:
        """Have a worker send its pairs by this channel, or only let end what it has."""
        keeps = self._replacements.phase is WorkersPhase.KEEPING
        self._tell(worker, "retire", to_successors, keeps=keeps, more=self._gets_more)

    @property
    def has_stopped_deciding(self) -> bool:
        """After `stop_deciding`: whether no connection is being opened by the kernel any more."""
        return self._decisions.has_stopped

    def spliced_left(self) -> int:
        """How many pairs and sessions that the kernel has they have not released yet."""
        return sum(ask_all(self.living, "spliced_left"))

    def last_id(self) -> int:
        """A number at least as high as that of any pair of ours by now."""
        most = max(
            self._memory.counters.block(index)[Counter.ACCEPTED]
            for index in range(self._memory.workers)
        )
        # A worker counts there, which may have been taken over.
        most = min(most, _MOST_ACCEPTED)
        return self._starter.last_id + (most + 1) * self._memory.workers

    def datapaths_are_settled(self) -> None:
        """Tell the workers which datapaths they have; from here on every listener is served."""
        self._starter.is_settled = True
        self.send_datapaths()
        if self._starter.is_beside:
            self._decisions.refresh()  # they have all listeners; pairs would wait for their reading
        else:
            self.configure()

    def send_datapaths(self) -> None:
        """Tell the workers which datapaths they have by now."""
        for worker in self.living:
            try:
                self._starter.send_datapaths(worker)
            except ControlError as error:
                # The worker will be replaced by one that knows.
                self._log.write("error", "worker_datapaths", error=str(error))
                worker.kill()

    def adopt(self, index: int) -> None:
        """Have a worker take in the spliced pairs that the keeper has for it."""
        if index >= len(self._workers):
            return
        worker = self._workers[index]
        if worker.exit_code is not None:
            self._replacements.replace_for_pairs(index)
            return
        try:
            worker.ask("adopt")
        except ControlError as error:
            # In a drain it may have ended just now, with its last pair.
            self._replacements.has_not_heard(index)
            if not worker.is_ending():
                self._log.write("error", "worker_adopt", error=str(error))
                worker.kill()

    def watch_pulses(self) -> None:
        """End workers that hang, and look again every few seconds."""
        for worker in self.living:
            worker.end_if_stuck()
        self._loop.after(PULSE_S, self.watch_pulses)

    def configure(self) -> None:
        """Tell the workers what is in force now."""
        for index, worker in enumerate(self._workers):
            if worker.exit_code is None:
                try:
                    self._starter.configure(worker, index)
                except ControlError as error:
                    # The worker will be replaced by one that begins with the new settings.
                    self._log.write("error", "worker_reload", error=str(error))
                    worker.kill()

        self._decisions.refresh()

    @property
    def deciders(self) -> Mapping[RuleName, RuleDecider]:
        """Who decides by rules of listeners that ask for express; by all others userspace does."""
        return self._decisions.rules

    @property
    def kernels_report(self) -> Mapping[str, Mapping[str, Mapping[str, object]]]:
        """What the kernel's balancers report of their servers, as workers report of theirs."""
        return self._decisions.report()

    def stop_deciding(self, wait_s: float = 0.0) -> bool:
        """See `Decisions.stop`; what goes on is the workers' from here on."""
        return self._decisions.stop(wait_s)

    def send_health(self, result: HealthResult) -> None:
        """Tell every worker that a server went up or down."""
        self._log.write(
            "info" if result.up else "warning",
            "server_up" if result.up else "server_down",
            upstream=result.upstream,
            server=result.server,
            why=result.why,
        )
        for worker in self.living:
            self._starter.send_health(worker, result)
        self._decisions.refresh_soon()

    def reap(self) -> None:
        """Clean up after those that have died, and replace them; call it on SIGCHLD."""
        self._replacements.reap()

    def drain(self) -> None:
        """Have the workers accept no more, and end with their last pairs; one that dies before is
        replaced.
        """
        self._replacements.begin(WorkersPhase.DRAINING)
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        self._gets_more = not self._decisions.has_stopped
        for worker in self.living:
            self._tell(worker, "drain", more=self._gets_more)
        self._wait_for_more(time.monotonic() + scaled_s(_GIVEN_S))

    def _wait_for_more(self, until_s: float) -> None:
        """Once the keeper has given them all that it had, let those end that have nothing left."""
        if not self._gets_more or self._replacements.phase not in (
            WorkersPhase.DRAINING,
            WorkersPhase.KEEPING,
        ):
            return
        if not self._decisions.has_stopped and time.monotonic() < until_s:
            self._loop.after(_LOOK_S, lambda: self._wait_for_more(until_s))
            return
        self._gets_more = False
        for worker in self.living:
            self._tell_phase(worker)

    def replace_now(self) -> None:
        """Replace workers that have died, without a pause: pairs that have outlived them are to be
        reset.
        """
        self._replacements.replace_now()

    def stop(self) -> None:
        """Have the workers reset the pairs that are left, and end."""
        if self._replacements.phase is not WorkersPhase.RETIRED:
            self._replacements.begin(WorkersPhase.RESETTING)
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        for worker in self.living:
            self._tell(worker, "stop")

    def _tell_phase(self, worker: WorkerProcess) -> None:
        """Tell a worker that has come in another's place what the others were told."""
        match self._replacements.phase:
            case WorkersPhase.DRAINING:
                self._tell(worker, "drain", more=self._gets_more)
            case WorkersPhase.KEEPING:
                self._retire(worker)
            case WorkersPhase.RESETTING:
                self._tell(worker, "stop")
            case WorkersPhase.SERVING | WorkersPhase.RETIRED:
                pass

    def _tell(
        self, worker: WorkerProcess, do: str, fds: Sequence[int] = (), **fields: object
    ) -> None:
        """Have a worker end; one that does not answer is ended."""
        try:
            worker.ask(do, fds, **fields)
        except ControlError as error:
            if not worker.is_ending():
                self._log.write("error", "worker_stuck", error=str(error))
                worker.kill()

    def close_in_child(self) -> None:
        """Close the channels to the workers, in another process."""
        for worker in self._workers:
            worker.close()

    def close(self) -> None:
        """End all at once; their peers see resets."""
        for worker in self._workers:
            worker.kill()
            worker.close()

    def _accused(self, _owner: object, _fd: int, _mask: int) -> None:
        self._replacements.end_accused(self._datapaths.accused())
