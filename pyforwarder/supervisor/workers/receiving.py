"""What workers ask of their own accord: read in turns, and any error over it is the worker's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.loop import EPOLLIN, EPOLLOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.workers.process import WorkerProcess

# A worker that asks for more than it can need is not read from for so long.
_BREATH_S: Final = 0.1
# A worker that has closed its channel may not have ended; it is ended after so long.
_PAUSE_S: Final = 1.0


class Receiver:
    """Reads what workers send, each time that the loop says that there is something."""

    def __init__(self, workers: Sequence[WorkerProcess], loop: Loop) -> None:
        """`workers`: those that are in their places by now; others are read from no more."""
        self._workers = workers
        self._loop = loop

    def watch(self, worker: WorkerProcess) -> None:
        """Read from this worker from now on; the loop forgets the channel when that is closed."""
        self._loop.watch(worker.channel.fileno(), EPOLLIN, self._receive, worker)

    def _receive(self, worker: WorkerProcess, fd: int, _mask: int) -> None:
        """Handle one message of a worker; any error over it is the worker's fault."""
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

    def _receive_again(self, worker: WorkerProcess, fd: int) -> None:
        if worker.exit_code is None and worker in self._workers:
            mask = EPOLLOUT if worker.is_deaf else EPOLLIN
            self._loop.watch(fd, mask, self._receive, worker)
