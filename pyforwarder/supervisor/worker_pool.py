"""The workers of an instance: all alike, told everything alike, replaced when they die."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.splice_keeper import KeeperError
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.loop import EPOLLIN
from pyforwarder.supervisor.workers import WorkerProcess
from pyforwarder.worker.channel import Channel, text_to_fd
from pyforwarder.worker.process import Inheritance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyforwarder.health import Verdict
    from pyforwarder.loop import Loop
    from pyforwarder.supervisor.configuration import InForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.worker.log import Log

# A worker that dies again this soon after its start is replaced only after a pause.
_SOON_S: Final = 1.0
_PAUSE_S: Final = 1.0
# How often a keeper is asked for a dead worker's pairs, once a second, before another worker comes
# all the same: a keeper that hangs is replaced sooner.
_BURIALS: Final = 15


class WorkerPool:
    """As many as the shared memory is for, from `start` to `close`."""

    def __init__(
        self,
        in_force: InForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        *,
        user: str | None,
        loop: Loop,
        log: Log,
        close_in_child: Callable[[], None],
        down: Callable[[], Iterable[Verdict]],
    ) -> None:
        """Each worker runs as `user`, calls `close_in_child`, and is told of the servers `down`."""
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._user = user
        self._loop = loop
        self._log = log
        self._close_in_child = close_in_child
        self._down = down
        self._workers: list[WorkerProcess] = []
        self._buried: set[int] = set()  # indexes: dead, seen to be, and not replaced yet
        self._last_id = 0
        self._ending = False

    @property
    def living(self) -> list[WorkerProcess]:
        """Those that have not ended, as far as we know."""
        return [worker for worker in self._workers if worker.exit_code is None]

    def start(self) -> None:
        """Fork them; they accept once all have taken over what an earlier daemon has left.

        Raises:
            ForwarderError: one does not start; those that have end with `close`.
        """
        found = self._datapaths.found
        # A new pair must not be given the number of one that goes on.
        self._last_id = max((one.id for one in found), default=0)
        for index in range(self._memory.workers):
            # While there are ports to be taken over, nobody may connect anywhere yet.
            self._workers.append(self._start_worker(index, listening=not found))
        for index, worker in enumerate(self._workers) if found else ():
            self._configure(worker, index)

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

    def tell_of_health(self, verdict: Verdict) -> None:
        """Every worker learns that a server went up or down."""
        self._log.write(
            "info" if verdict.up else "warning",
            "server_up" if verdict.up else "server_down",
            upstream=verdict.upstream,
            server=verdict.server,
            why=verdict.why,
        )
        for worker in self.living:
            self._say_health(worker, verdict)

    def look_after(self) -> None:
        """Bury those that have died, and replace them; call it on SIGCHLD."""
        for index, worker in enumerate(self._workers):
            # Who asked one in vain may have found out before us that it is dead.
            if index in self._buried or not worker.has_ended():
                continue
            self._buried.add(index)
            self._loop.forget(worker.channel.fileno())
            worker.close()
            if not self._ending:
                self._log.write("error", "worker_died", pid=worker.pid, exit_code=worker.exit_code)
            self._bury(index, is_soon=time.monotonic() - worker.started_s < _SOON_S)

    def end(self, do: str) -> None:
        """Tell them to `drain` or to `stop`; from here on nobody is replaced."""
        self._ending = True
        for worker in self._workers:
            if worker.exit_code is None:
                try:
                    worker.ask(do)
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
        def make(channel: Channel) -> Inheritance:
            return Inheritance(
                worker=index,
                workers=self._memory.workers,
                channel=channel,
                counters_memory=self._memory.counters_memory,
                limits_memory=self._memory.limits,
                limits_secret=self._memory.limits_secret,
                table=self._memory.table,
                maps=self._datapaths.sockmap,
                used_tokens=self._memory.used_tokens,
                user=self._user,
                splicing=self._datapaths.splicing,
                log=self._log,
                last_id=self._last_id,
            )

        worker = WorkerProcess(make, self._close_in_child)
        try:
            self._configure(worker, index, listening=listening)
        except ForwarderError:
            worker.kill()
            worker.close()
            raise
        for verdict in self._down():
            self._say_health(worker, verdict)
        self._loop.watch(worker.channel.fileno(), EPOLLIN, self._hear, worker)
        return worker

    def _hear(self, worker: WorkerProcess, fd: int, _mask: int) -> None:
        if not worker.hear():
            self._loop.forget(fd)  # SIGCHLD does the rest

    def _configure(self, worker: WorkerProcess, index: int, *, listening: bool = True) -> None:
        bound = self._in_force.listeners.bound
        names = list(bound) if listening else []
        upstreams = self._in_force.config.upstreams.values()
        worker.may_be_transparent = any(upstream.transparent for upstream in upstreams)
        text_fd = text_to_fd(self._in_force.settings.to_json())
        try:
            fds = [bound[name].socket_of(index).fileno() for name in names]
            worker.ask("settings", [text_fd, *fds], listeners=names)
        finally:
            os.close(text_fd)

    def _say_health(self, worker: WorkerProcess, verdict: Verdict) -> None:
        try:
            worker.ask("health", upstream=verdict.upstream, server=verdict.server, up=verdict.up)
        except ControlError as error:
            # It dies or is stuck; whoever takes its place is told at the start.
            self._log.write("error", "worker_health", error=str(error))

    def _bury(self, index: int, *, is_soon: bool = False, tries: int = _BURIALS) -> None:
        """A worker is gone, and with it its sockets: clean up what it had in shared places.

        Then put another in its place, a while later if this one lived too short.
        """
        self._memory.forget_gauges(index)
        try:
            # What it had spliced goes on: first, while the table says what that is.
            self._datapaths.bury(index)
        except KeeperError as error:
            self._log.write("error", "splice_keeper", error=str(error))
            if not self._ending and tries > 1:
                # Its successor would not get them: the next keeper knows of them, soon.
                self._loop.after(_PAUSE_S, lambda: self._bury(index, tries=tries - 1))
                return
        self._memory.clear_window(index)
        try:
            self._datapaths.forget_worker(index)
        except ForwarderError as error:
            self._log.write("error", "worker_forget", error=str(error))
        if is_soon:
            self._loop.after(_PAUSE_S, lambda: self._replace(index))
        else:
            self._replace(index)

    def _replace(self, index: int) -> None:
        if self._ending:
            return
        try:
            self._workers[index] = self._start_worker(index)
        except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
            self._log.write("error", "worker_start", error=str(error))
            self._loop.after(_PAUSE_S, lambda: self._replace(index))
        else:
            self._buried.discard(index)
