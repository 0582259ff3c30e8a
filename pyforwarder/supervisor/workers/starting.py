"""A worker is forked, and told what is in force: at its start, and when that changes."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import MOST_SOCKETS, Channel, text_to_fd
from pyforwarder.supervisor.datapaths import waits_for_datapath
from pyforwarder.supervisor.workers.process import WorkerProcess
from pyforwarder.worker.inheritance import Inheritance

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pyforwarder.runtime.pulse import Pulse
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.listeners.binding import Bound
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.messages import TokenClaim
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.worker.log import Log


class WorkerStarter:
    """Starts the workers of an instance, and tells each what it has to know."""

    def __init__(
        self,
        in_force: ConfigInForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        *,
        user: str | None,
        log: Log,
        close_in_child: Callable[[], None],
        down: Callable[[], Iterable[HealthResult]],
        watch: Callable[[WorkerProcess], None],
        claim: Callable[[TokenClaim, Callable[[bool | None], None]], None] | None = None,
    ) -> None:
        """See `WorkerPool`; `watch` is called with each that has started."""
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._user = user
        self._log = log
        self._close_in_child = close_in_child
        self._down = down
        self._watch = watch
        self._claim = claim
        self.last_id = 0  # the highest of the pairs that go on from an earlier daemon
        self.is_settled = False  # which datapaths there are
        self.is_beside = False  # another daemon accepts no more once we do
        # Where each worker's predecessor, of the daemon before, sends its pairs; once it has been
        # given to the worker there is none.
        self._from_predecessors: dict[int, socket.socket] = {}
        self._not_theirs: Sequence[socket.socket] = ()

    def begin_beside(
        self,
        last_id: int,
        from_predecessors: Mapping[int, socket.socket],
        not_theirs: Sequence[socket.socket],
    ) -> None:
        """Start workers beside another daemon's from now on: see `WorkerPool.start_beside`.

        `from_predecessors` are closed by `close_from_predecessors`, once all have started.
        """
        self.last_id = last_id
        self.is_beside = True
        self._from_predecessors = dict(from_predecessors)
        self._not_theirs = not_theirs

    def close_from_predecessors(self) -> None:
        """Close the channels, as each worker has its own by now."""
        self._not_theirs = ()
        for sock in self._from_predecessors.values():
            sock.close()
        self._from_predecessors = {}

    def start(self, index: int, *, listening: bool = True) -> WorkerProcess:
        """Start a worker, and tell it all that workers are told; `listening`: also that it
        accepts.

        Raises:
            ForwarderError, OSError: it does not start, and has been ended.
        """

        def make(channel: Channel, pulse: Pulse) -> Inheritance:
            from_predecessor = self._from_predecessors.pop(index, None)
            for sock in (*self._from_predecessors.values(), *self._not_theirs):
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
                last_id=self.last_id,
                from_predecessor=Channel(from_predecessor)
                if from_predecessor is not None
                else None,
            )

        worker = WorkerProcess(make, self._close_in_child, self._log, self._claim)
        try:
            self.configure(worker, index, listening=listening)
            if self.is_settled:
                self.send_datapaths(worker)
        except (ForwarderError, OSError):  # descriptors are short
            worker.kill()
            worker.close()
            raise
        for result in self._down():
            self.send_health(worker, result)
        self._watch(worker)
        return worker

    def send_datapaths(self, worker: WorkerProcess) -> None:
        """Tell the worker which datapaths it has by now.

        Raises:
            ControlError: it does not take that in.
        """
        worker.ask("datapaths", available=self._datapaths.available)

    def configure(self, worker: WorkerProcess, index: int, *, listening: bool = True) -> None:
        """Tell the worker what is in force; `listening`: with its listeners.

        Raises:
            ControlError: it does not take that in.
            OSError: descriptors are short.
        """
        bound = self.served() if listening else {}
        positions: list[tuple[str, int]] = []
        fds: list[int] = []
        for name, sockets in bound.items():
            for position, each in enumerate(sockets):
                sock = each.socket_of(index)
                if sock is not None:
                    positions.append((name, position))
                    fds.append(sock.fileno())
        upstreams = self._in_force.config.upstreams.values()
        worker.may_be_transparent = any(upstream.transparent for upstream in upstreams)
        text_fd = text_to_fd(self._in_force.settings.to_json())
        try:
            # As many as fit into one message; they are listened to with the last of them.
            rest = max(0, len(fds) - MOST_SOCKETS)
            for first in range(0, rest, MOST_SOCKETS):
                worker.ask("sockets", fds[first : min(first + MOST_SOCKETS, rest)])
            worker.ask("settings", [text_fd, *fds[rest:]], listeners=positions)
        finally:
            os.close(text_fd)

    def served(self) -> dict[str, Bound]:
        """The listeners whose connections are accepted: not yet those that copying will not do for.

        Their connections wait in the kernel. Beside another daemon they do not: it has released
        its spliced pairs some time after it has stopped accepting, and until then new pairs are
        copied.
        """
        config = self._in_force.config
        waiting = {
            listener.name
            for listener in config.listeners
            if not (self.is_settled or self.is_beside) and waits_for_datapath(listener, config)
        }
        bound = self._in_force.listeners.bound
        return {name: sockets for name, sockets in bound.items() if name not in waiting}

    def send_health(self, worker: WorkerProcess, result: HealthResult) -> None:
        """Tell the worker that a server went up or down."""
        try:
            worker.ask("health", upstream=result.upstream, server=result.server, up=result.up)
        except ControlError as error:
            # It dies or is stuck; its successor is told at the start.
            self._log.write("error", "worker_health", error=str(error))
