"""The process by which limits on clients hold in a whole fleet."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import (
    FROM_LIMITS,
    FleetFaults,
    FleetStore,
    Overwritten,
    StoreAnswered,
)
from pyforwarder.supervisor.processes.child import Above, Serving
from pyforwarder.worker.generation import fleet_scopes

if TYPE_CHECKING:
    from pyforwarder.config import Config, Fleet
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.fleet_counts import FleetScope
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.worker.log import Log

_MOST_SHOWN: Final = 200


class LimitsProcess(StoreProcess["FleetStore | FleetFaults | Overwritten | StoreAnswered"]):
    """Writes into the store what clients have here, and into workers' memory what others have.

    The supervisor gets messages of the store alone: whether it answers, and what is wrong in it.
    """

    name = "fleet_limits"
    part = "limits"
    may_say = FROM_LIMITS

    def __init__(
        self,
        loop: Loop,
        log: Log,
        memory: SharedMemory,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
    ) -> None:
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._memory = memory
        self._fleet: Fleet | None = None
        self._scopes: list[FleetScope] = []
        self._is_lost = False  # the store, by the process's messages

    def change_to(self, config: Config, indexes: Mapping[str, int]) -> None:
        """Share the limits of this configuration from now on; `indexes` as `Settings` has them."""
        scopes = fleet_scopes(config, indexes)
        fleet = config.fleet if scopes else None
        if fleet == self._fleet and scopes == self._scopes and not self._is_lost:
            self.start()
            return
        # If its store is lost, its files may be others by now.
        self._fleet, self._scopes, self._is_lost = fleet, scopes, False
        self.renew()

    @property
    def _is_wanted(self) -> bool:
        return self._fleet is not None

    def _prepare(self, channel: Channel) -> Serving:
        # Files may be readable by root alone, these modules, too.
        from pyforwarder.fleet.failover.compaction import Compaction
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.limits import MOST_VALUE_BYTES, Board, LimitsSharing
        from pyforwarder.fleet.opening import open_store
        from pyforwarder.fleet.watching import Watcher
        from pyforwarder.runtime.fleet_counts import ClientCounts, OtherMachines

        fleet = self._fleet
        assert fleet is not None
        stores = open_store(fleet), open_store(fleet)
        machine = fleet.instance or socket.gethostname()
        keys = Keys(fleet.name)
        secret = self._memory.limits_secret
        columns, shown = self._memory.share_limits()
        sharing = LimitsSharing(
            stores[0],
            Watcher(stores[1], keys.limits, most_bytes=MOST_VALUE_BYTES),
            keys,
            machine,
            Board(machine, self._scopes, secret=secret),
            ClientCounts(columns, secret=secret),
            OtherMachines(shown),
            Above(channel),
            compaction=Compaction(stores[0], keys.compaction, machine) if fleet.compacts else None,
        )
        return Serving(sharing.run, memory=[shown])

    def _handle(self, message: FleetStore | FleetFaults | Overwritten | StoreAnswered) -> None:
        if isinstance(message, StoreAnswered):
            self._note(message)
            return
        if isinstance(message, FleetFaults):
            for fault in message.faults:
                self._log.write("warning", "fleet_value", error=fault[:_MOST_SHOWN])
            return
        if isinstance(message, Overwritten):
            key = message.overwritten[:_MOST_SHOWN]
            self._log.write("warning", "fleet_limits_overwritten", key=key)
            return
        self._is_lost = message.store == "lost"
        level, name = ("warning", "error") if self._is_lost else ("info", "endpoint")
        self._log.write(level, f"fleet_limits_{message.store}", **{name: message.endpoint})
