"""Which of the kernel's datapaths an instance has: loaded, proven, looked after.

What may be used depends on the host as much as on the configuration, and is decided once, at the
start: what a running daemon is told to want besides has to wait for the next one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.kernel import KernelMaps
from pyforwarder.datapath.selftest import prove_sockmap, prove_splice
from pyforwarder.datapath.splice_keeper import Splicing, pins_of
from pyforwarder.datapath.splice_maps import SpliceMaps, smallest_mtu
from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.supervisor import bpffs

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.config import Config
    from pyforwarder.datapath.splice_maps import Found
    from pyforwarder.loop import Loop
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.worker.log import Log

_LOOK_AT_KEEPER_S: Final = 2.0
_NOT_WANTED: Final = "not wanted by the configuration"


class Datapaths:
    """What is there for workers to inherit; `states` says of each one `available`, or why not."""

    def __init__(
        self,
        config: Config,
        memory: SharedMemory,
        *,
        pins: Path,
        user: str | None,
        loop: Loop,
        log: Log,
        close_in_child: Callable[[], None],
    ) -> None:
        """Load what `config` may come to use, and prove it; what fails is logged and left out.

        `pins` is the instance's directory in bpffs; nothing is pinned before `pin`. The self-test
        runs as `user`, and each keeper of spliced pairs calls `close_in_child`: the first of them
        is forked here.
        """
        self._memory = memory
        self._pins = pins
        self._user = user
        self._loop = loop
        self._log = log
        self._close_in_child = close_in_child
        self.states = {"copy": "available", "splice": _NOT_WANTED}
        self.sockmap = self._load_sockmap(config)
        self.splicing = self._load_splice(config)

    def _load_sockmap(self, config: Config) -> KernelMaps | None:
        if not _kernel_choices(config):
            self.states["sockmap"] = _NOT_WANTED
            return None
        try:
            maps = self._proven_sockmap()
        except LoadError as error:
            self.states["sockmap"] = str(error)
            self._log.write("warning", "no_sockmap", reason=str(error))
            return None
        self.states["sockmap"] = "available"
        return maps

    def _proven_sockmap(self) -> KernelMaps:
        slots, pairs_fd = self._memory.slots, self._memory.arrays().pairs_fd
        maps = KernelMaps.load(workers=self._memory.workers, slots=slots, pairs_fd=pairs_fd)
        proof = prove_sockmap(maps, slots=slots, user=self._user)
        if not proof.passed:
            maps.close()
            raise LoadError(f"failed its self-test: {proof.reason}")
        return maps

    def _load_splice(self, config: Config) -> Splicing | None:
        """Also where it is not wanted, if there are pairs that go on."""
        pins = pins_of(self._pins)
        if "splice" not in _kernel_choices(config) and not pins.is_dir():
            return None
        try:
            splicing = self._proven_splice(pins)
        except LoadError as error:
            self.states["splice"] = str(error)
            self._log.write("warning", "no_splice", reason=str(error))
            return None
        self.states["splice"] = "available"
        return splicing

    def _proven_splice(self, pins: Path) -> Splicing:
        workers, slots = self._memory.workers, self._memory.slots
        pairs_fd = self._memory.arrays().pairs_fd
        maps = SpliceMaps.load(workers=workers, slots=slots, pairs_fd=pairs_fd, pins=pins)
        if maps.has_replaced:
            self._log.write("warning", "splice_pins_replaced", directory=pins)
        splicing = Splicing(maps, workers=workers, close_in_child=self._close_in_child)
        proof = prove_splice(splicing, pairs_fd=pairs_fd, slots=slots, user=self._user)
        if not proof.passed:
            splicing.close()
            raise LoadError(f"failed its self-test: {proof.reason}")
        return splicing

    @property
    def found(self) -> tuple[Found, ...]:
        """The pairs that go on from an earlier daemon; workers take them over."""
        return self.splicing.maps.found if self.splicing is not None else ()

    def mtu(self) -> int:
        """What packets may have where pairs can be spliced between interfaces; 0: any."""
        return smallest_mtu() if self.splicing is not None else 0

    def lacks(self, config: Config) -> bool:
        """Whether `config` names one that was not wanted at the start."""
        return any(self.states.get(choice) == _NOT_WANTED for choice in _kernel_choices(config))

    def pin(self) -> None:
        """From here on spliced pairs outlive us.

        Not before we serve: if we cannot, what an earlier daemon left must stay as it was.
        """
        if self.splicing is None:
            return
        try:
            bpffs.enter(self._pins.parent)
            self.splicing.maps.pin()
        except ForwarderError as error:
            # It works, and ends with us.
            self._log.write("warning", "splice_not_pinned", reason=str(error))

    def look_at_keeper(self) -> None:
        """Kill it if it hangs, and look again in a while; `keeper_has_died` tells of it."""
        if self.splicing is not None:
            if self.splicing.keeper.hangs():
                self._log.write("error", "splice_keeper_hangs", pid=self.splicing.keeper.pid)
                self.splicing.keeper.kill()
            self._loop.after(_LOOK_AT_KEEPER_S, self.look_at_keeper)

    def keeper_has_died(self) -> bool:
        """Whether it has ended by itself since the last call; pairs that are spliced go on."""
        return self.splicing is not None and self.splicing.keeper.has_died()

    def restart_keeper(self) -> None:
        """Put another in the place of one that died."""
        if self.splicing is not None:
            self.splicing.keeper.restart()

    def bury(self, worker: int) -> None:
        """A worker died: what it had spliced goes on, and waits for the next.

        Call it before `forget_worker`, while the pair table says what that is.

        Raises:
            KeeperError: the keeper does not answer.
        """
        if self.splicing is not None:
            self.splicing.bury(worker)

    def forget_worker(self, worker: int) -> None:
        """A worker died: take out of the maps what it had there."""
        if self.sockmap is not None:
            self.sockmap.forget_worker(worker, self._memory.slots)

    def close(self) -> None:
        """End the keeper, remove the pins of splice, and close the maps."""
        if self.splicing is not None:
            self.splicing.close()
        if self.sockmap is not None:
            self.sockmap.close()


def _kernel_choices(config: Config) -> set[str]:
    """The datapaths of the kernel that the configuration names or leaves open."""
    choices: set[str] = {config.datapath}
    for listener in config.listeners:
        choices.add(listener.datapath or config.datapath)
        choices |= {
            rule.datapath or listener.datapath or config.datapath for rule in listener.rules
        }
    if "auto" in choices:
        choices |= {"sockmap", "splice"}
    return choices - {"auto", "copy"}
