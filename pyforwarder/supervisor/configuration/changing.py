"""Another configuration is put in force while the daemon serves: a file's, or what a fleet shares.

Everything that can fail comes before the first change, so an error changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.supervisor.fleet.last_good import LastGood, check_files
from pyforwarder.supervisor.processes.web_process import wanted_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pyforwarder.config import Config
    from pyforwarder.core.address import Address, UnixAddress
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce, ConfigSource, Shared
    from pyforwarder.supervisor.files.view_and_proc import Files
    from pyforwarder.supervisor.processes.helpers import Helpers
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

    Binds = Mapping[str, Sequence[Address | UnixAddress]]


class Changes:
    """Puts another configuration in force, for one daemon."""

    def __init__(
        self,
        source: ConfigSource,
        in_force: ConfigInForce,
        last_good: LastGood,
        workers: WorkerPool,
        files: Files,
        helpers: Callable[[], Helpers],
        *,
        loop: Loop,
        log: Log,
        is_ending: Callable[[], bool],
        changed: Callable[[Binds], None],
    ) -> None:
        """`changed` is called when one is in force, with where listeners were before."""
        self._source = source
        self._in_force = in_force
        self._last_good = last_good
        self._workers = workers
        self._files = files
        self._helpers = helpers
        self._loop = loop
        self._log = log
        self._is_ending = is_ending
        self._changed = changed

    def own(self, text: str, config: Config) -> None:
        """Put a configuration in force after this machine's own part of it has changed. Then the
        part that a fleet shares is tried again, which may fit now.

        Raises:
            ForwarderError: it cannot be; what was in force still is.
        """
        check_files(config)
        self._change_to(text, config)
        self._helpers().change_fleet(config)
        # Once the request is answered, and what it has read is in force.
        self._loop.defer(lambda _: self._helpers().fleet.try_again(), None)

    def shared(self, shared: Shared) -> None:
        """Put in force what a fleet's store has: listeners, upstreams and servers, beside this
        machine's own.

        Raises:
            ForwarderError: it cannot be; what was in force still is.
        """
        if shared == self._source.shared:
            return
        text, config = self._source.joined(self._source.own, shared)
        self._change_to(text, config)
        self._source.shared = shared
        for warning in self._source.warnings(text, config):
            self._log.write("warning", "config", reason=warning)
        try:
            self._last_good.write(shared)
        except OSError as error:
            self._log.write("warning", "fleet_not_kept", error=str(error))

    def _change_to(self, text: str, config: Config) -> None:
        if self._is_ending():
            raise ControlError("the daemon is ending")
        helpers = self._helpers()
        change = self._in_force.change_to(text, config)
        try:
            web = helpers.web.change_to(wanted_of(config))
        except ForwarderError:
            self._in_force.abandon(change)
            raise
        before = self._in_force.listeners.binds()
        self._in_force.take(change)
        self._log.change(level=config.log.level, form=config.log.format)
        self._workers.configure()
        self._in_force.commit(change)
        self._files.describe_listeners()
        helpers.web.commit(web)
        helpers.health.change_to(config)
        helpers.change_limits(config)
        self._files.port_changed()
        self._changed(before)
