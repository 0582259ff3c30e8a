"""The processes beside the workers, each for one task: begun, told, and replaced when they die."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.counters import Counter
from pyforwarder.supervisor.fleet.failover_process import FailoverProcess
from pyforwarder.supervisor.fleet.limits_process import LimitsProcess
from pyforwarder.supervisor.fleet.member_process import FleetProcess
from pyforwarder.supervisor.fleet.shared_health import FleetHealth
from pyforwarder.supervisor.fleet.token_process import TokenProcess
from pyforwarder.supervisor.processes.health_process import CheckerProcess
from pyforwarder.supervisor.processes.web_process import (
    WebProcess,
    page_source_in_child,
    source_in_child,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.config import Config
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.status.metrics import Source
    from pyforwarder.status.process import PageSource
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce, ConfigSource, Shared
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.fleet.store_process import StoreProcess
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.processes.child import ChildProcess
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

# A process that has died is replaced after this long.
_PAUSE_S: Final = 1.0
_KEEPER: Final = "splice_keeper"  # in the log
# Without these pairs that go on in a drain have no end, or no other machine.
_IN_A_DRAIN: Final = (_KEEPER, "failover")


class CloseInChild(Protocol):
    """Closes what is the supervisor's alone, in a new child."""

    def __call__(self, *, is_web: bool = False) -> None:
        """`is_web`: the listeners of metrics and page stay open."""


class Helpers:
    """Starts, watches and replaces the processes that help the supervisor, for one daemon; none
    runs before `start`.
    """

    def __init__(
        self,
        env: Environment,
        source: ConfigSource,
        in_force: ConfigInForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        workers: WorkerPool,
        *,
        instance: str,
        user: str | None,
        loop: Loop,
        log: Log,
        close_in_child: CloseInChild,
        obey: Callable[[dict[str, Any], list[int]], object],
        put_in_force: Callable[[Shared], None],
        is_ending: Callable[[], bool],
        is_over: Callable[[], bool],
        resets: Callable[[], bool],
        down: Sequence[HealthResult] = (),
    ) -> None:
        """`obey` does what viewers order, `put_in_force` what a fleet shares.

        `is_ending`: the daemon drains, or more; `is_over`: it resets the pairs that are left
        (`resets`), or another daemon has them. `down` are servers that were down to the daemon
        before.
        """
        self._source = source
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._workers = workers
        self._instance = instance
        self._loop = loop
        self._log = log
        self._is_ending = is_ending
        self._is_over = is_over
        self._resets = resets
        self._lacks_keeper = False
        self._replaced_in_the_end = False  # the keeper: it died while pairs were reset
        self._unix_time_s = env.unix_time_s
        self._started_unix_s = env.unix_time_s()
        self.web = WebProcess(
            self._web_sources,
            user=user,
            loop=loop,
            log=log,
            close_in_child=lambda: close_in_child(is_web=True),
            obey=obey,
            may_order=self._may_viewers_order,
            unix_time_s=env.unix_time_s,
        )
        self.health = FleetHealth(
            loop,
            log,
            user=user,
            close_in_child=close_in_child,
            make_checks=lambda notify, finished: CheckerProcess(
                loop,
                log,
                user=user,
                close_in_child=close_in_child,
                notify=notify,
                finished=finished,
            ),
            notify=self._send_health,
        )
        self.health.inherit(down)
        self.fleet = FleetProcess(
            loop,
            log,
            user=user,
            close_in_child=close_in_child,
            shared=lambda: source.shared,
            put_in_force=put_in_force,
            upstreams=lambda: in_force.config.upstreams,
            started_unix_s=self._started_unix_s,
            facts=self._facts_for_fleet,
            notify=self.web.send_fleet,
        )
        self.tokens = TokenProcess(loop, log, user=user, close_in_child=close_in_child)
        self.limits = LimitsProcess(loop, log, memory, user=user, close_in_child=close_in_child)
        self.failover = FailoverProcess(
            loop,
            log,
            user=user,
            close_in_child=close_in_child,
            splicing=lambda: datapaths.splicing,
            adopt=workers.adopt,
        )
        self._of_store: Sequence[StoreProcess[Any]] = (
            self.fleet,
            self.health,
            self.limits,
            self.tokens,
            self.failover,
        )
        for process in self._of_store:
            process.answered = self._tell_exchanges
        # By the name that each has in the log.
        self._all: dict[str, ChildProcess[Any]] = {
            "web": self.web,
            # Before that which, when it has died, has others checked by a process that lives.
            "health_checks": self.health.checks,
            "fleet_health": self.health,
            "fleet": self.fleet,
            "fleet_tokens": self.tokens,
            "fleet_limits": self.limits,
            "failover": self.failover,
        }

    def start(self, config: Config) -> None:
        """Fork the processes that the configuration wants."""
        self.health.change_to(config)
        self.change_fleet(config)
        self.web.start()
        for key, listener in self.web.listening.items():
            self._log.write("info", key, bind=str(listener.bind))

    def change_fleet(self, config: Config) -> None:
        """Have the fleet's processes speak to the store that the configuration names."""
        self.fleet.change_to(config.fleet, serial=self._source.shared.serial)
        self.tokens.change_to(config)
        self.failover.change_to(config.fleet)
        self.change_limits(config)  # last: it tells what the store is asked for

    def change_limits(self, config: Config) -> None:
        """Have the limits shared that this configuration, which is in force, has on clients."""
        self.limits.change_to(config, self._in_force.settings.indexes)
        self._tell_exchanges()

    def _tell_exchanges(self) -> None:
        exchanges = (process.exchange() for process in self._of_store)
        self.web.send_exchanges([one for one in exchanges if one is not None])

    def reap(self) -> None:
        """A child has ended: replace what has died, after a pause, unless the daemon ends."""
        for name, helper in self._all.items():
            if helper.has_died() and self._comes_again(name):
                self._log.write("error", f"{name}_died")
                self._restart_later(name, helper.start, helper.rest_s)
        if not self._datapaths.keeper_has_died():
            return
        if not self._is_over():
            # Pairs that are spliced go on meanwhile, also in a drain.
            self._log.write("error", "splice_keeper_died")
            self._lacks_keeper = True
            self._restart_later(_KEEPER, self._restart_keeper)
        elif self._resets() and not self._replaced_in_the_end:
            # Workers have asked it to reset pairs, and wait for a second or two. That is tried once
            # more.
            self._log.write("error", "splice_keeper_died")
            self._replaced_in_the_end = True
            self._restart(_KEEPER, self._datapaths.restart_keeper)

    def _restart_later(
        self, name: str, start: Callable[[], None], pause_s: float = _PAUSE_S
    ) -> None:
        def restart() -> None:
            if self._comes_again(name):
                self._restart(name, start)

        self._loop.after(pause_s, restart)

    def _comes_again(self, name: str) -> bool:
        """Whether the process of this name is replaced if it has died."""
        return not (self._is_over() if name in _IN_A_DRAIN else self._is_ending())

    def _restart(self, name: str, start: Callable[[], None]) -> None:
        try:
            start()
        except (ForwarderError, OSError) as error:  # of processes or descriptors none is left
            self._log.write("error", "restart", process=name, error=str(error))
            self._restart_later(name, start)

    def replace_keeper(self) -> None:
        """Replace the keeper without a pause, if it has died: pairs are about to be reset."""
        if self._datapaths.keeper_has_died() or self._lacks_keeper:
            self._restart(_KEEPER, self._datapaths.restart_keeper)
        self._lacks_keeper = False

    def _restart_keeper(self) -> None:
        self._datapaths.restart_keeper()
        self._lacks_keeper = False
        # The new keeper knows nothing of other machines' pairs.
        self.failover.renew()

    def close_in_child(self, *, is_web: bool) -> None:
        """Close their channels, in a new child, and the listeners of the web unless that is the
        child's task.
        """
        if not is_web:
            self.web.close_listeners()
        for helper in self._all.values():
            helper.close_channel()

    def retire(self) -> None:
        """A successor has our place: end those that are of no use without the rest."""
        self.web.close()
        self.health.close()
        self.fleet.close()
        self.limits.close()
        self.failover.close()
        # The process of the tokens stays: a client without a server yet may have a token to be
        # claimed.

    def close(self) -> None:
        """Leave the fleet, and end them all."""
        self.fleet.leave()
        for helper in self._all.values():
            helper.close()

    # What they are told and ask

    def _web_sources(self) -> tuple[Source, PageSource | None]:
        """What the process that answers HTTP may tell, from memory that it cannot write; called in
        that process.
        """
        source = source_in_child(
            self._in_force,
            self._memory,
            self._datapaths.states,
            started_unix_s=self._started_unix_s,
            fleet=self.web.fleet,
            exchanges=self.web.exchanges,
        )
        page = page_source_in_child(
            self._in_force,
            source,
            self._memory,
            instance=self._instance,
            results=self.web.results,
            down=self.health.down,
            unix_time_s=self._unix_time_s,
        )
        return source, page

    def _facts_for_fleet(self) -> dict[str, object]:
        counters = self._memory.counters
        return {
            "pairs": counters.total(Counter.PAIRS_OPEN),
            "accepted": counters.total(Counter.ACCEPTED),
            "datapaths": {name: state[:256] for name, state in self._datapaths.states.items()},
        }

    def _may_viewers_order(self) -> bool:
        status = self._in_force.config.status
        return status is not None and status.control

    def _send_health(self, result: HealthResult) -> None:
        self._workers.send_health(result)
        self.web.send_health(result)
