"""The workers of an instance: all alike, told everything alike, replaced when they die.

So they are while the daemon drains: who comes then in the place of one that has died accepts
nobody, goes on with the pairs that outlived that one, and ends with them.
"""

from __future__ import annotations

import errno
import os
import time
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.splice.keeper_client import KeeperError
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import MOST_SOCKETS, Channel, text_to_fd
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.loop import EPOLLIN, EPOLLOUT
from pyforwarder.runtime.pulse import PULSE_S
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.datapaths import waits_for_datapath
from pyforwarder.supervisor.deciding import Decisions
from pyforwarder.supervisor.messages import FaultyMessageError
from pyforwarder.supervisor.workers import WorkerProcess, ask_all
from pyforwarder.worker.process import Inheritance

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.runtime.pulse import Pulse
    from pyforwarder.supervisor.configuration import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.health import Verdict
    from pyforwarder.supervisor.listeners import Bound
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.messages import TokenClaim
    from pyforwarder.supervisor.rule_deciders import RuleDecider, RuleName
    from pyforwarder.worker.log import Log

# A worker that dies again this soon after its start is replaced only after a pause.
_SOON_S: Final = 1.0
_PAUSE_S: Final = 1.0
# One that asks for more than it can need is not read from for so long.
_BREATH_S: Final = 0.1
# How often a keeper is asked for a dead worker's pairs, once a second, before another worker comes
# all the same: a keeper that hangs is replaced sooner.
_CLEAN_UP_TRIES: Final = 15
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
# How long the keeper may take to give away what the kernel has opened by itself, at the end.
_TAKEN_IN_S: Final = 0.5
# How long workers that have nothing more to do wait in a drain for what the keeper still has for
# them: it, or a worker, may have been killed just then, and another has to come first.
_GIVEN_S: Final = 15.0
_LOOK_S: Final = 0.05
# No worker counts so far. From here on programs have made the numbers (express_connect.c).
_MOST_ID: Final = (1 << 52) - 1
_MOST_ACCEPTED: Final = 1 << 42  # by a worker


class _Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # they accept no more, and end with their pairs
    STOPPING = "stopping"  # they reset what is left
    RETIRED = "retired"  # what they have is another daemon's: none is replaced


class WorkerPool:
    """As many as the shared memory is for, from `start` to `close`."""

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
        down: Callable[[], Iterable[Verdict]],
        claim: Callable[[TokenClaim, Callable[[bool | None], None]], None] | None = None,
    ) -> None:
        """Each worker runs as `user`, calls `close_in_child`, and is told of the servers `down`.

        `claim` is asked by those that want a token used up in a fleet.
        """
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._user = user
        self._loop = loop
        self._log = log
        self._close_in_child = close_in_child
        self._down = down
        self._claim = claim
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
        # Indexes: seen to have ended, and not replaced yet; those that are to be replaced; and how
        # that goes on after a pause.
        self._dead: set[int] = set()
        self._due: set[int] = set()
        self._timers: dict[int, int] = {}
        self._replaced_in_the_end: set[int] = set()
        # Those that were to take in pairs, and have not heard of it: their successors do that.
        self._unheard: set[int] = set()
        self._phase = _Phase.SERVING
        self._gets_more = False  # in a drain: the keeper has pairs for them that they do not know
        self._last_id = 0
        self._is_settled = False  # which datapaths there are
        self._is_beside = False  # another daemon accepts no more once we do
        # Where each worker's predecessor, of the daemon before, sends its pairs; once it has been
        # given to the worker there is none.
        self._heirs: dict[int, socket.socket] = {}
        self._not_theirs: Sequence[socket.socket] = ()

    @property
    def living(self) -> list[WorkerProcess]:
        """Those that have not ended, as far as we know."""
        return [worker for worker in self._workers if worker.exit_code is None]

    @property
    def have_ended(self) -> bool:
        """Whether none lives, and none is to come in the place of one that has died."""
        return not self.living and not self._due

    def start(self) -> None:
        """Fork them; they accept once all have taken over what an earlier daemon has left.

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
        self._last_id = max(self._last_id, found_id)
        for index in range(self._memory.workers):
            # While there are ports to be taken over, no connection may be opened yet.
            self._workers.append(self._start_worker(index, listening=not found))
        for index, worker in enumerate(self._workers) if found else ():
            self._configure(worker, index)

    def start_beside(
        self,
        last_id: int,
        heirs: Mapping[int, socket.socket],
        not_theirs: Sequence[socket.socket],
    ) -> None:
        """As `start`, beside another daemon that still serves, and whose pairs have lower numbers.

        `heirs` are where its workers send their pairs, by worker; ours to close. No worker of ours
        keeps one of another, or of `not_theirs`.

        Raises:
            ForwarderError: as `start`.
        """
        self._last_id = last_id
        self._is_beside = True
        self._heirs = dict(heirs)
        self._not_theirs = not_theirs
        self.start()
        self._not_theirs = ()
        for sock in self._heirs.values():
            sock.close()
        self._heirs = {}

    def take_over_spliced(self) -> None:
        """What the daemon before had spliced is in our keeper's hands: the workers may ask it."""
        for worker in self.living:
            try:
                worker.ask("take_over")
            except ControlError as error:
                self._log.write("error", "worker_takes_over", error=str(error))
                worker.kill()

    def retire(self, heirs: Sequence[int]) -> None:
        """They accept no more, and send their pairs to another daemon's; none is replaced.

        Nor is one that has died before: it would be forked with the channels to the other daemon's
        workers. Its spliced pairs are the keeper's to give to that daemon.
        """
        self._phase = _Phase.RETIRED
        self._due.clear()
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        for index, worker in enumerate(self._workers):
            if worker.exit_code is None:
                fds = [heirs[index]] if index < len(heirs) else []
                try:
                    worker.ask("retire", fds)
                except ControlError as error:
                    if not worker.has_ended():
                        self._log.write("error", "worker_stuck", error=str(error))
                        worker.kill()

    def spliced_left(self) -> int:
        """How many pairs and sessions that the kernel has they have not released yet."""
        return sum(ask_all(self.living, "spliced_left"))

    def last_id(self) -> int:
        """As high as any number that a pair of ours has by now."""
        most = max(
            self._memory.counters.block(index)[Counter.ACCEPTED]
            for index in range(self._memory.workers)
        )
        # A worker counts there, which may have been taken over.
        most = min(most, _MOST_ACCEPTED)
        return self._last_id + (most + 1) * self._memory.workers

    def datapaths_are_settled(self) -> None:
        """Tell them which datapaths they have; from here on every listener is served."""
        self._is_settled = True
        self.send_datapaths()
        if self._is_beside:
            self._decisions.refresh()  # they have all listeners; pairs would wait for their reading
        else:
            self.configure()

    def send_datapaths(self) -> None:
        """Tell them which datapaths they have by now."""
        for worker in self.living:
            try:
                self._send_datapaths(worker)
            except ControlError as error:
                # It will be replaced by one that knows.
                self._log.write("error", "worker_datapaths", error=str(error))
                worker.kill()

    def _send_datapaths(self, worker: WorkerProcess) -> None:
        worker.ask("datapaths", available=self._datapaths.available)

    def adopt(self, index: int) -> None:
        """Have a worker take in the spliced pairs that the keeper has for it."""
        if index >= len(self._workers):
            return
        worker = self._workers[index]
        if worker.exit_code is None:
            try:
                worker.ask("adopt")
            except ControlError as error:
                # In a drain it may have ended just now, with its last pair.
                self._unheard.add(index)
                if not worker.has_ended():
                    self._log.write("error", "worker_adopt", error=str(error))
                    worker.kill()
        elif index in self._dead and index not in self._due and self._takes_in(index):
            # It ended with its last pair. Another goes on with these, or resets them.
            self._due.add(index)
            self._clean_up_after(index)
        # One that is away otherwise gets them when it begins.

    def _takes_in(self, index: int) -> bool:
        """Whether pairs that have come while the daemon ends are ours, and can have a worker."""
        match self._phase:
            case _Phase.DRAINING:
                return True
            case _Phase.STOPPING:
                return index not in self._replaced_in_the_end
            case _:
                return False

    def watch_pulses(self) -> None:
        """End those that hang, and look again in a while."""
        for worker in self.living:
            worker.end_if_stuck()
        self._loop.after(PULSE_S, self.watch_pulses)

    def configure(self) -> None:
        """Tell them what is in force now."""
        for index, worker in enumerate(self._workers):
            if worker.exit_code is None:
                try:
                    self._configure(worker, index)
                except ControlError as error:
                    # It will be replaced by one that begins with the new settings.
                    self._log.write("error", "worker_reload", error=str(error))
                    worker.kill()

        self._decisions.refresh()

    @property
    def deciders(self) -> Mapping[RuleName, RuleDecider]:
        """Who decides by rules of listeners that ask for express; by all others userspace does."""
        return self._decisions.rules

    @property
    def kernels_report(self) -> Mapping[str, Mapping[str, Mapping[str, object]]]:
        """What is known of servers to which the kernel connects, as workers say it of theirs."""
        return self._decisions.report()

    def stop_deciding(self, wait_s: float = 0.0) -> bool:
        """See `Decisions.stop`; what goes on is the workers' from here on."""
        return self._decisions.stop(wait_s)

    def send_health(self, verdict: Verdict) -> None:
        """Every worker learns that a server went up or down."""
        self._log.write(
            "info" if verdict.up else "warning",
            "server_up" if verdict.up else "server_down",
            upstream=verdict.upstream,
            server=verdict.server,
            why=verdict.why,
        )
        for worker in self.living:
            self._send_health(worker, verdict)
        self._decisions.refresh_soon()

    def reap(self) -> None:
        """Clean up after those that have died, and replace them; call it on SIGCHLD."""
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

    def _has_failed(self, index: int, worker: WorkerProcess) -> bool:
        """Whether another is to come in the place of a worker that has ended."""
        match self._phase:
            case _Phase.SERVING:
                return True
            case _Phase.DRAINING:
                # It says that it has nothing left, and may have been taken over.
                is_empty = not self._memory.counters.block(index)[Counter.OPEN]
                return worker.exit_code != 0 or not is_empty or index in self._unheard
            case _Phase.STOPPING:
                # What outlives it has still to be reset. That is tried once more.
                is_first = index not in self._replaced_in_the_end
                has_left = worker.exit_code != 0 or index in self._unheard
                return has_left and is_first and self._datapaths.splicing is not None
            case _Phase.RETIRED:
                return False

    def drain(self) -> None:
        """They accept no more, and each ends with its last pair; who dies before is replaced."""
        self._phase = _Phase.DRAINING
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        self._gets_more = not self._decisions.has_stopped
        for worker in self.living:
            self._tell(worker, "drain", more=self._gets_more)
        self._wait_for_more(time.monotonic() + scaled_s(_GIVEN_S))

    def _wait_for_more(self, until_s: float) -> None:
        """Once the keeper has given them all that it had, let those end that have nothing left."""
        if not self._gets_more or self._phase is not _Phase.DRAINING:
            return
        if not self._decisions.has_stopped and time.monotonic() < until_s:
            self._loop.after(_LOOK_S, lambda: self._wait_for_more(until_s))
            return
        self._gets_more = False
        for worker in self.living:
            self._tell(worker, "drain", more=False)

    def replace_now(self) -> None:
        """Those that have died, without a pause: what outlived them is to be reset."""
        for index in sorted(self._due):
            self._clean_up_after(index)

    def stop(self) -> None:
        """They reset what is left, and end."""
        if self._phase is not _Phase.RETIRED:
            self._phase = _Phase.STOPPING
        self.stop_deciding(scaled_s(_TAKEN_IN_S))
        for worker in self.living:
            self._tell(worker, "stop")

    def _tell(self, worker: WorkerProcess, do: str, **fields: object) -> None:
        """Have a worker end; one that does not answer is ended."""
        try:
            worker.ask(do, (), **fields)
        except ControlError as error:
            if not worker.has_ended():
                self._log.write("error", "worker_stuck", error=str(error))
                worker.kill()

    def close_in_child(self) -> None:
        """In another process: close the channels."""
        for worker in self._workers:
            worker.close()

    def close(self) -> None:
        """End all at once; their peers see resets."""
        for worker in self._workers:
            worker.kill()
            worker.close()

    def _start_worker(self, index: int, *, listening: bool = True) -> WorkerProcess:
        def make(channel: Channel, pulse: Pulse) -> Inheritance:
            heir = self._heirs.pop(index, None)
            for sock in (*self._heirs.values(), *self._not_theirs):
                sock.close()
            return Inheritance(
                worker=index,
                workers=self._memory.workers,
                channel=channel,
                pulse=pulse,
                take_memory=partial(self._memory.of_worker, index, pulse.memory),
                limits_secret=self._memory.limits_secret,
                table=self._memory.table,
                maps=self._datapaths.sockmap,
                user=self._user,
                splicing=self._datapaths.splicing,
                log=self._log,
                last_id=self._last_id,
                heir=Channel(heir) if heir is not None else None,
            )

        worker = WorkerProcess(make, self._close_in_child, self._log, self._claim)
        try:
            self._configure(worker, index, listening=listening)
            if self._is_settled:
                self._send_datapaths(worker)
        except (ForwarderError, OSError):  # descriptors are short
            worker.kill()
            worker.close()
            raise
        for verdict in self._down():
            self._send_health(worker, verdict)
        self._loop.watch(worker.channel.fileno(), EPOLLIN, self._receive, worker)
        return worker

    def _receive(self, worker: WorkerProcess, fd: int, _mask: int) -> None:
        """One message of a worker; any error over it is the worker's fault."""
        was_deaf = worker.is_deaf
        try:
            if not worker.receive():
                self._loop.forget(fd)  # SIGCHLD does the rest
                # It has ended, or only says so.
                self._loop.after(_PAUSE_S, worker.kill)
                return
        except Exception as error:
            self._loop.forget(fd)
            worker.fault(error)
            return
        if worker.is_deaf != was_deaf:
            self._loop.change(fd, EPOLLOUT if worker.is_deaf else EPOLLIN)
        if worker.has_said_much(self._loop.now_s):
            # The others, and requests to us, have their turn first.
            self._loop.forget(fd)
            self._loop.after(_BREATH_S, lambda: self._receive_again(worker, fd))

    def _accused(self, _owner: object, _fd: int, _mask: int) -> None:
        self._replace_accused(self._datapaths.accused())

    def _replace_accused(self, indexes: Iterable[int]) -> None:
        """Workers that have asked the keeper for what they may not."""
        for index in indexes:
            worker = self._workers[index]
            if worker.exit_code is None:
                worker.fault(FaultyMessageError("it asked the splice keeper for what it may not"))

    def _receive_again(self, worker: WorkerProcess, fd: int) -> None:
        if worker.exit_code is None and worker in self._workers:
            mask = EPOLLOUT if worker.is_deaf else EPOLLIN
            self._loop.watch(fd, mask, self._receive, worker)

    def _configure(self, worker: WorkerProcess, index: int, *, listening: bool = True) -> None:
        bound = self._served() if listening else {}
        places: list[tuple[str, int]] = []
        fds: list[int] = []
        for name, sockets in bound.items():
            for position, each in enumerate(sockets):
                sock = each.socket_of(index)
                if sock is not None:
                    places.append((name, position))
                    fds.append(sock.fileno())
        upstreams = self._in_force.config.upstreams.values()
        worker.may_be_transparent = any(upstream.transparent for upstream in upstreams)
        text_fd = text_to_fd(self._in_force.settings.to_json())
        try:
            # As many as fit into one message; they are listened to with the last of them.
            rest = max(0, len(fds) - MOST_SOCKETS)
            for first in range(0, rest, MOST_SOCKETS):
                worker.ask("sockets", fds[first : min(first + MOST_SOCKETS, rest)])
            worker.ask("settings", [text_fd, *fds[rest:]], listeners=places)
        finally:
            os.close(text_fd)

    def _served(self) -> dict[str, Bound]:
        """The listeners whose connections are accepted: not yet those that copying will not do for.

        Their connections wait in the kernel. Beside another daemon they do not: it has released
        its spliced pairs some time after it has stopped accepting, and until then new pairs are
        copied.
        """
        config = self._in_force.config
        waiting = {
            listener.name
            for listener in config.listeners
            if not (self._is_settled or self._is_beside) and waits_for_datapath(listener, config)
        }
        bound = self._in_force.listeners.bound
        return {name: sockets for name, sockets in bound.items() if name not in waiting}

    def _send_health(self, worker: WorkerProcess, verdict: Verdict) -> None:
        try:
            worker.ask("health", upstream=verdict.upstream, server=verdict.server, up=verdict.up)
        except ControlError as error:
            # It dies or is stuck; its successor is told at the start.
            self._log.write("error", "worker_health", error=str(error))

    def _clean_up_after(
        self, index: int, *, is_soon: bool = False, tries: int = _CLEAN_UP_TRIES
    ) -> None:
        """A worker is gone, and with it its sockets: clean up its records in shared places.

        Then put another in its place, a while later if this one lived too short.
        """
        self._loop.cancel(self._timers.pop(index, 0))
        if self._phase is _Phase.RETIRED:
            # The kernel compares with its records until the other daemon's programs are there,
            # which reads in them what `show` has said.
            return
        self._memory.forget_gauges(index)
        try:
            # Its spliced pairs go on: first, while the table says which they are.
            self._datapaths.worker_died(index)
            # All that it had asked was read before: complaints of it are not about its successor.
            self._replace_accused(self._datapaths.accused() - {index})
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
            worker = self._start_worker(index)
        except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
            self._log.write("error", "worker_start", error=str(error))
            # It may have begun, and been given its predecessor's pairs: they are the next one's.
            self._after_pause(index, lambda: self._clean_up_after(index))
            return
        self._workers[index] = worker
        for some in (self._dead, self._due, self._unheard):
            some.discard(index)
        if self._phase is _Phase.DRAINING:
            self._tell(worker, "drain", more=self._gets_more)
        elif self._phase is _Phase.STOPPING:
            self._replaced_in_the_end.add(index)
            self._tell(worker, "stop")
