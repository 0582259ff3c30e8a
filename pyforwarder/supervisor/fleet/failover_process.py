"""The process that knows of other machines' spliced pairs, and lets them know of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.splice.keeper_client import KeeperClient, KeeperError
from pyforwarder.datapath.splice.keeper_replies import is_late
from pyforwarder.errors import ControlError
from pyforwarder.runtime import collecting
from pyforwarder.runtime import moving_addresses as addresses
from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import (
    FROM_FAILOVER,
    MoveAsked,
    Replicas,
    StoreAnswered,
    Taken,
)
from pyforwarder.supervisor.processes.child import Above, Serving

if TYPE_CHECKING:
    from pyforwarder.config import Failover, Fleet
    from pyforwarder.datapath.splice.splicing import Splicing
    from pyforwarder.fleet.failover.stays import Connection
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.log import Log

# Each so long after the one before; the first is made at once.
_ANNOUNCED_S: Final = (0.1, 0.4, 1.5)
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class FailoverProcess(StoreProcess["Taken | Replicas | MoveAsked | StoreAnswered"]):
    """Runs where `fleet.failover` is configured and pairs are spliced."""

    name = "failover"
    part = "failover"
    may_say = FROM_FAILOVER

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        splicing: Callable[[], Splicing | None],
        adopt: Callable[[int], None],
    ) -> None:
        """`adopt` has a worker take in the pairs that it was given."""
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._splicing = splicing
        self._adopt = adopt
        self._fleet: Fleet | None = None
        self._in_force: Failover | None = None
        self._has_begun = False
        self._state = ""
        self._has_heard = False  # what is in the store, this process or one before
        self._own = self._held = 0

    def change_to(self, fleet: Fleet | None) -> None:
        """Speak to this store from now on; addresses are those of the start."""
        if fleet == self._fleet:
            return
        failover = fleet.failover if fleet is not None else None
        if not self._has_begun:
            self._in_force = failover
        elif failover != self._in_force:
            self._log.write("warning", "failover_needs_restart")
        self._kill()
        self._fleet = fleet
        if self._has_begun:
            self.start()
            if fleet is None:
                self._release()

    def _release(self) -> None:
        """Nobody tells the keeper of other machines' pairs any more: have it forget them."""
        splicing = self._splicing()
        if splicing is not None and splicing.has_begun:
            with contextlib.suppress(KeeperError):
                KeeperClient(splicing.keeper.standby).ask("begin")

    def retire(self) -> None:
        """Another daemon speaks to the store; our keeper, which stays, has only our own pairs."""
        self._kill()
        self._fleet = None
        if self._in_force is not None:
            self._release()

    def begin(self) -> None:
        """The datapaths are settled; or splice is, which came later from the daemon before."""
        self._has_begun = True
        if self._in_force is not None:
            splicing = self._splicing()
            if splicing is None or not splicing.has_begun:
                self._log.write("warning", "no_failover", reason="splice is not available")
        self.start()
        if self.answered is not None:  # from now on the store is asked
            self.answered()

    # Addresses

    def state(self) -> dict[str, Any]:
        """What `fleet ready`, `take` and `move` want to know.

        `why` says why this machine should not get the addresses; empty: it may.

        Raises:
            ControlError: there is no failover here.
        """
        failover = self._failover()
        there = addresses.here(failover.addresses)
        why = ""
        splicing = self._splicing()
        if splicing is None or not splicing.has_begun:
            why = "pairs are not spliced here"
        elif not self._has_heard:
            why = "it has not read yet what is in the fleet's store"
        elif failover.mover == "command":
            try:
                for one in failover.addresses:
                    addresses.interface_of(one)
            except ControlError as error:
                why = str(error)
        return {
            "addresses": list(failover.addresses),
            "here": there,
            "mover": failover.mover,
            "store": self._state or "unknown",
            "own": self._own,
            "held": self._held,
            "why": why,
        }

    def take(self) -> list[str]:
        """Take the addresses that move for this machine, and tell its neighbours.

        Returns those that it did not have.

        Raises:
            ControlError: that cannot be.
        """
        failover = self._commanded()
        if why := self.state()["why"]:
            raise ControlError(f"this machine is not ready: {why}")
        missing = [one for one in failover.addresses if one not in addresses.here([one])]
        addresses.add(missing)
        self._announce(_ANNOUNCED_S)
        self._log.write("warning", "failover_addresses_taken", addresses=",".join(missing))
        return missing

    def give(self) -> list[str]:
        """Remove the addresses that move from this machine. Returns those that it had.

        Raises:
            ControlError: that cannot be.
        """
        there = addresses.here(self._commanded().addresses)
        addresses.remove(there)
        self._log.write("warning", "failover_addresses_given", addresses=",".join(there))
        return there

    def _take_for(self, machine: str) -> str:
        """Another machine asks us to; why not, if so."""
        self._log.write("info", "failover_asked", by=machine)
        try:
            self.take()
        except ControlError as error:
            self._log.write("error", "failover_not_taken", error=str(error))
            return str(error) or "?"
        return ""

    def _announce(self, later_s: Sequence[float]) -> None:
        """Neighbours may miss it once."""
        failover = self._in_force
        if failover is None:
            return
        try:
            addresses.announce(addresses.here(failover.addresses))
        except (OSError, ControlError) as error:
            self._log.write("warning", "failover_not_announced", error=str(error))
        if later_s:
            self._loop.after(later_s[0], lambda: self._announce(later_s[1:]))

    def _failover(self) -> Failover:
        if self._in_force is None:
            raise ControlError("this instance has no `fleet.failover`")
        return self._in_force

    def _commanded(self) -> Failover:
        failover = self._failover()
        if failover.mover != "command":
            raise ControlError(
                "something else moves the addresses of this instance (`fleet.failover.mover`)"
            )
        return failover

    @property
    def _is_wanted(self) -> bool:
        splicing = self._splicing()
        is_there = splicing is not None and splicing.has_begun
        return (
            self._has_begun and self._fleet is not None and self._in_force is not None and is_there
        )

    def _prepare(self, channel: Channel) -> Serving:
        from pyforwarder.datapath.splice.own_pairs import OwnPairs
        from pyforwarder.datapath.splice.staying import Staying
        from pyforwarder.fleet.echoes import Echoes
        from pyforwarder.fleet.failover.record import tag_of
        from pyforwarder.fleet.failover.replicator import KeeperFault, Replicator
        from pyforwarder.fleet.failover.stays import MOST_TEXT
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.opening import open_store
        from pyforwarder.fleet.watching import Watcher

        fleet, splicing, failover = self._fleet, self._splicing(), self._in_force
        assert fleet is not None
        assert splicing is not None
        assert failover is not None
        stores = open_store(fleet), open_store(fleet)
        name = fleet.instance or socket.gethostname()
        machine = _BOOT_ID.read_text().strip()
        wanted = failover.addresses
        pairs = OwnPairs(splicing.maps, wanted)
        connections = Staying(splicing.maps, wanted)
        standby = splicing.keeper.standby.dup()
        client = KeeperClient(standby, is_patient=True)

        class Kernel:
            """The keeper and the maps."""

            scan = staticmethod(pairs.scan)

            @staticmethod
            def addresses() -> Collection[bytes]:
                there = addresses.here(wanted)
                return {ipaddress.ip_address(one).packed for one in there}

            @staticmethod
            def staying(
                known: Collection[str], changed: Collection[str]
            ) -> dict[int, list[Connection]]:
                return connections.scan(pairs.ids(known, changed))

            @staticmethod
            def ask(do: str, **fields: object) -> dict[str, Any]:
                try:
                    answer = client.ask(do, (), **fields)
                except KeeperError as error:
                    raise KeeperFault(str(error)) from error
                if is_late(answer) or "fault" in answer:
                    raise KeeperFault(str(answer))
                return answer

        keys, echoes = Keys(fleet.name), Echoes()
        replicator = Replicator(
            stores[0],
            Watcher(stores[1], keys.failover, most_bytes=MOST_TEXT, echoes=echoes),
            echoes,
            keys,
            tag_of(name),
            machine,
            Kernel(),
            Above(channel),
            compacts=failover.compact and fleet.compacts,
        )

        def run() -> None:
            # Thousands of objects come and go with pairs; hardly one refers to itself.
            collecting.settle((50_000, 20, 100))
            replicator.run()

        return Serving(run, [standby.fileno()])

    def _handle(self, message: Taken | Replicas | MoveAsked | StoreAnswered) -> None:
        if isinstance(message, StoreAnswered):
            self._note(message)
            return
        if isinstance(message, MoveAsked):
            self._send({"moved": self._take_for(message.move_from)})
            return
        if isinstance(message, Replicas):
            self._has_heard |= message.replicas == "connected"
            self._own, self._held = message.own, message.held
            if message.replicas != self._state:
                self._state = message.replicas
                level = "info" if message.replicas == "connected" else "warning"
                self._log.write(level, f"failover_store_{message.replicas}", error=message.error)
            self._log.write("debug", "failover", own=message.own, held=message.held)
            return
        self._log.write("warning", "failover_taken", pairs=message.taken)
        for worker in message.waiting:
            self._adopt(worker)
