"""The end of a daemon: asked for, drained, stopped. How far it has come is its `DaemonState`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.daemon_state import DaemonState
from pyforwarder.supervisor.drain_report import log_drain, log_resets
from pyforwarder.supervisor.express.deciding import SILENT_S
from pyforwarder.supervisor.listeners import stored_sockets

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.counters import Counters
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.processes.loader import Loaders
    from pyforwarder.supervisor.takeover.retirement import Retirement
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

# How long workers have to reset and close what is left, once they are told to stop.
_STOP_S: Final = 5.0
# How often a drain that is over looks whether a successor has come meanwhile.
_LOOK_S: Final = 1.0


class Ending:
    """Ends one daemon. Each step happens once, however often it is asked for."""

    def __init__(
        self,
        env: Environment,
        in_force: ConfigInForce,
        workers: WorkerPool,
        loaders: Loaders,
        counters: Counters,
        *,
        lock: InstanceLock,
        loop: Loop,
        log: Log,
        notify: Callable[[str], None],
        retirement: Callable[[], Retirement],
        end_predecessor: Callable[[], None],
        replace_keeper: Callable[[], None],
        end_if_done: Callable[[], None],
    ) -> None:
        """`replace_keeper` puts another in the place of one that has died, without a pause.

        `end_if_done` ends the loop where nothing is left to wait for.
        """
        self._env = env
        self._in_force = in_force
        self._workers = workers
        self._loaders = loaders
        self._counters = counters
        self._lock = lock
        self._loop = loop
        self._log = log
        self._notify = notify
        self._retirement = retirement
        self._end_predecessor = end_predecessor
        self._replace_keeper = replace_keeper
        self._end_if_done = end_if_done
        self.has_begun = False  # nothing new is begun any more
        self.stops = False  # what is left is reset
        self._drains = False

    @property
    def state(self) -> DaemonState:
        """How far the daemon has come to its end."""
        if self.stops or self._retirement().is_retired:
            return DaemonState.ENDING
        if self._drains:
            return DaemonState.DRAINING
        return DaemonState.CLOSING if self.has_begun else DaemonState.SERVING

    def retired(self) -> None:
        """Note that a successor has this daemon's place."""
        self.has_begun = True
        self._loaders.stop()

    def down(self) -> None:
        """Do what `begin` does, when no daemon is to follow: systemd closes its sockets, too."""
        self._retirement().refuse()
        if not self.has_begun and stored_sockets.is_kept(self._env.environ):
            with contextlib.suppress(OSError):
                stored_sockets.store(self._env.environ["NOTIFY_SOCKET"], ())
        self.begin()

    def begin(self) -> None:
        """Accept no more, let pairs finish until the drain deadline, then stop."""
        if self.has_begun:
            return
        self._retirement().refuse()
        self.has_begun = True
        self._notify("STOPPING=1")
        self._loaders.stop()
        if self._workers.stop_deciding():
            # Clients that have not spoken yet are not the listener's before that.
            self._loop.after(scaled_s(SILENT_S), self._drain)
        else:
            self._drain()

    def _drain(self) -> None:
        if self.stops:
            return
        self._in_force.listeners.close()
        drain_s = self._in_force.config.timeouts.drain_s
        log_drain(self._log, self._counters, until_unix_s=self._env.unix_time_s() + drain_s)
        self._workers.drain()
        self._drains = True
        self._loop.after(drain_s, self._drain_is_over)
        self._end_if_done()

    def _drain_is_over(self) -> None:
        """Reset what is left, unless it has another daemon soon."""
        if self._retirement().is_under_way:
            self._loop.after(_LOOK_S, self._drain_is_over)
        else:
            self.stop()

    def stop(self) -> None:
        """Reset what is left and end."""
        if self.stops:
            return
        self._retirement().refuse()
        self.stops = self.has_begun = True
        self._loaders.stop()
        self._end_predecessor()
        self._in_force.listeners.close()
        if not self._retirement().has_given_spliced:
            # Only a worker can reset what has outlived one, and only with a keeper.
            self._replace_keeper()
            self._workers.replace_now()
        log_resets(self._log, self._counters, self._lock)
        self._workers.stop()
        self._loop.after(scaled_s(_STOP_S), self._loop.stop)
        self._end_if_done()
