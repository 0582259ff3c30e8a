"""The parts of a daemon, made once, each with the others that it needs.

This file says which part knows which; when each of them begins and ends is in daemon.py. Parts that
need each other, or one that is made later, get a function that looks it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyforwarder.supervisor.configuration.changing import Changes
from pyforwarder.supervisor.configuration.in_force import ConfigInForce
from pyforwarder.supervisor.datapaths import Datapaths
from pyforwarder.supervisor.ending import Ending
from pyforwarder.supervisor.files.view_and_proc import Files
from pyforwarder.supervisor.processes.helpers import Helpers
from pyforwarder.supervisor.requests.obeying import Requests
from pyforwarder.supervisor.takeover.retirement import Retirement, RetiringDaemon
from pyforwarder.supervisor.workers.pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pyforwarder.config import Config
    from pyforwarder.core.address import Address, UnixAddress
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.instance import Instance, InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.configuration.in_force import ConfigSource
    from pyforwarder.supervisor.files.view_walks import Walk
    from pyforwarder.supervisor.fleet.last_good import LastGood
    from pyforwarder.supervisor.listeners.activation import Activation
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.processes.helpers import CloseInChild
    from pyforwarder.supervisor.processes.loader import Loaders
    from pyforwarder.supervisor.requests.control_socket import ControlServer
    from pyforwarder.supervisor.service_manager import ServiceManager
    from pyforwarder.supervisor.takeover.takeover import Takeover
    from pyforwarder.worker.log import Log


@dataclass(frozen=True, slots=True)
class Basis:
    """What a daemon has before its parts, and what it does for them."""

    env: Environment
    options: UpOptions
    instance: Instance
    source: ConfigSource
    takeover: Takeover
    last_good: LastGood
    activation: Activation
    walks: tuple[Walk, ...]
    loaders: Loaders
    lock: InstanceLock
    memory: SharedMemory
    loop: Loop
    log: Log
    service_manager: ServiceManager
    control: Callable[[], ControlServer]
    close_in_child: CloseInChild
    # Another configuration is in force; where listeners were before.
    changed: Callable[[Mapping[str, Sequence[Address | UnixAddress]]], None]
    end_if_done: Callable[[], None]  # reaps children, and ends the loop if nothing is left
    why_no_successor: Callable[[], str]  # why none can take our place now; empty: one can


class DaemonParts:
    """Makes the parts of one daemon, and connects them; starts no process."""

    def __init__(self, basis: Basis, config: Config, *, workers: int, user: str | None) -> None:
        """`user`: whose processes are without privileges; None: nobody else's."""
        self._make_workers(basis, config, workers, user)
        self._make_changeable(basis, user)
        self._make_ends(basis)
        self._make_requests(basis)

    def _make_workers(self, basis: Basis, config: Config, workers: int, user: str | None) -> None:
        """The workers, and what they and the view need of the kernel."""
        predecessor = basis.takeover.predecessor
        self.datapaths = Datapaths(
            config,
            basis.memory,
            pins=basis.instance.bpffs_dir,
            user=user,
            loop=basis.loop,
            log=basis.log,
            close_in_child=basis.close_in_child,
            prove_anew=basis.options.prove,
            before=predecessor.splice if predecessor is not None else None,
            handshakes_fd=predecessor.handshakes_fd if predecessor is not None else -1,
        )
        self.in_force = ConfigInForce(
            basis.source,
            workers=workers,
            directory=basis.memory.directory,
            mtu=self.datapaths.mtu,
            activation=basis.activation,
        )
        self.workers = WorkerPool(
            self.in_force,
            basis.memory,
            self.datapaths,
            user=user,
            loop=basis.loop,
            log=basis.log,
            close_in_child=basis.close_in_child,
            down=lambda: self.helpers.health.down,
            claim=lambda asked, answer: self.helpers.tokens.claim(asked, answer),
        )
        self.files = Files(
            basis.instance,
            self.in_force,
            basis.memory,
            self.datapaths,
            loop=basis.loop,
            log=basis.log,
            unix_time_s=basis.env.unix_time_s,
            walks=basis.walks,
        )

    def _make_changeable(self, basis: Basis, user: str | None) -> None:
        """The processes beside the workers, and what changes the configuration of them all."""
        self.changes = Changes(
            basis.source,
            self.in_force,
            basis.last_good,
            self.workers,
            self.files,
            lambda: self.helpers,
            loop=basis.loop,
            log=basis.log,
            is_ending=lambda: self.ending.has_begun,
            changed=basis.changed,
        )
        self.helpers = Helpers(
            basis.env,
            basis.source,
            self.in_force,
            basis.memory,
            self.datapaths,
            self.workers,
            instance=basis.instance.name,
            user=user,
            loop=basis.loop,
            log=basis.log,
            close_in_child=basis.close_in_child,
            obey=lambda request, fds: self.requests.obey(request, fds),
            put_in_force=self.changes.shared,
            is_ending=lambda: self.ending.has_begun,
            is_over=lambda: self.ending.stops or self.retirement.has_given_spliced,
            resets=lambda: self.ending.stops and not self.retirement.has_given_spliced,
            down=basis.takeover.down,
        )

    def _make_ends(self, basis: Basis) -> None:
        """How we end: told to, or because a successor has our place."""
        self.ending = Ending(
            basis.env,
            self.in_force,
            self.workers,
            basis.loaders,
            basis.memory.counters,
            lock=basis.lock,
            loop=basis.loop,
            log=basis.log,
            notify=basis.service_manager.notify,
            retirement=lambda: self.retirement,
            end_predecessor=basis.takeover.end_predecessor,
            replace_keeper=self.helpers.replace_keeper,
            end_if_done=basis.end_if_done,
        )
        self.retirement = Retirement(
            RetiringDaemon(
                options=basis.options,
                source=basis.source,
                in_force=self.in_force,
                activation=basis.activation,
                memory=basis.memory,
                datapaths=self.datapaths,
                workers=self.workers,
                files=self.files,
                web=self.helpers.web,
                end_helpers=self.helpers.retire,
                forget_held=self.helpers.failover.retire,
                predecessor=lambda: basis.takeover.predecessor,
                tokens_free_at_s=lambda: basis.takeover.tokens_free_at_s,
                down=lambda: self.helpers.health.down,
                lock=basis.lock,
                control=basis.control,
                loop=basis.loop,
                log=basis.log,
                environ=basis.env.environ,
                notify=basis.service_manager.notify,
                state=lambda: self.ending.state,
                why_not=basis.why_no_successor,
                end_if_done=basis.end_if_done,
                retired=self.ending.retired,
                stop=self.ending.stop,
            )
        )

    def _make_requests(self, basis: Basis) -> None:
        """What may be asked of us, by users and by a successor."""
        self.requests = Requests(
            basis.source,
            self.in_force,
            basis.memory,
            self.datapaths,
            self.workers,
            self.files,
            loop=basis.loop,
            log=basis.log,
            fleet_rows=self.helpers.fleet.rows,
            change_to=self.changes.own,
            drain=self.ending.down,
            stop=self.ending.stop,
            succeed=lambda fds: self.retirement.admit(fds),
            failover=lambda: self.helpers.failover,
            checkers=lambda: self.helpers.health.checkers(),
            lock=basis.lock,
            predecessor=lambda: basis.takeover.predecessor,
            state=lambda: self.ending.state,
        )
