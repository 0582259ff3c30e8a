"""Which of the kernel's datapaths an instance has: loaded, proven, looked after.

What may be used depends on the host as much as on the configuration, and is decided once, at the
start: what a running daemon is told to want besides has to wait for the next one. Only sessions of
UDP come with programs that may be there already, and are proven when a listener may use them.
"""

from __future__ import annotations

import enum
import os
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pyforwarder.core.datapaths import DATAPATHS, EXPRESS, IN_KERNEL, SESSIONS, row_of
from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf.syscall import map_id
from pyforwarder.datapath.proof.remembered import proven
from pyforwarder.datapath.sockmap.supervised import SupervisedSockmap
from pyforwarder.datapath.splice import directories
from pyforwarder.datapath.splice.interfaces import smallest_mtu
from pyforwarder.datapath.splice.supervised import SupervisedSplice, splices_sessions
from pyforwarder.datapath.supervised import Given, KernelDatapath
from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.files import bpffs
from pyforwarder.supervisor.processes.loader import Loaded
from pyforwarder.worker.room import places_for

if TYPE_CHECKING:
    from pyforwarder.config import Config, Listener
    from pyforwarder.core.datapaths import DatapathRow
    from pyforwarder.datapath.sockmap.maps import KernelMaps
    from pyforwarder.datapath.splice.pins import Found
    from pyforwarder.datapath.splice.session_maps import FoundSession
    from pyforwarder.datapath.splice.splicing import Splicing
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.processes.loader import Part
    from pyforwarder.worker.log import Log

_WATCH_KEEPER_S: Final = 2.0
_KERNEL_NAMES: Final = {row.name for row in IN_KERNEL}
_EXPRESS_NAMES: Final = {row.name for row in EXPRESS}


class Availability(enum.Enum):
    """Whether workers may use a datapath; the value is what users read."""

    AVAILABLE = "available"
    NOT_WANTED = "not wanted by the configuration"
    IN_PREPARATION = "being loaded and proven"
    FAILED = "failed"  # users read the reason


class DatapathState(NamedTuple):
    """Whether a datapath is available, and why it has failed."""

    availability: Availability
    reason: str = ""  # of FAILED

    @property
    def text(self) -> str:
        """What users read: `available`, or why not."""
        return self.reason or self.availability.value

    @classmethod
    def failed(cls, reason: str) -> DatapathState:
        """The state of a datapath that has failed for this reason."""
        return cls(Availability.FAILED, reason)


_AVAILABLE: Final = DatapathState(Availability.AVAILABLE)
_NOT_WANTED: Final = DatapathState(Availability.NOT_WANTED)
_IN_PREPARATION: Final = DatapathState(Availability.IN_PREPARATION)


class Datapaths:
    """What is there for workers to inherit; `states` says of each one `available`, or why not.

    The maps are there from the start. The programs come later, from another process (`parts`,
    `take`): until then connections are copied.
    """

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
        prove_anew: bool = False,
        before: directories.Before | None = None,
        handshakes_fd: int = -1,
    ) -> None:
        """Make the maps of what `config` may come to use; what fails is logged and left out.

        `before`: a daemon lives whose place we take, and that has this of splice. `handshakes_fd`
        is one of its maps, if it splices; ours from here on.

        `pins` is the instance's directory in bpffs; nothing is pinned before `pin`. The self-test
        runs as `user`, also (`prove_anew`) where it has passed since the host was booted; each
        keeper of spliced pairs calls `close_in_child`.
        """
        self._pins = pins
        self._user = user
        self._loop = loop
        self._log = log
        self._prove_anew = prove_anew
        self._is_successor = before is not None
        self._looks_for_left = False  # whether pins may be there that nobody uses any more
        self._splice_pins: Path | None = None
        # The daemon before keeps its spliced pairs: their records are of another version.
        self.predecessor_keeps = False
        # In the order in which they are shown.
        self._states = {row.name: _AVAILABLE for row in DATAPATHS if not row.supervised}
        self._there: dict[str, KernelDatapath] = {}
        given = Given(
            config=config,
            choices=frozenset(kernel_choices(config)),
            workers=memory.workers,
            slots=memory.slots,
            arrays=memory.arrays,
            pins=pins,
            warn=partial(log.write, "warning"),
            close_in_child=close_in_child,
            is_successor=before is not None,
            handshakes_fd=handshakes_fd,
            places=places_for(config, memory.workers),
        )
        try:
            given = given._replace(splice_pins=self._choose_splice_pins(before))
        except LoadError as error:
            if handshakes_fd >= 0:
                os.close(handshakes_fd)
            self._fail("splice", error)
        for row in IN_KERNEL:
            if row.name not in self._states:
                self._make(row, given)

    def _choose_splice_pins(self, before: directories.Before | None) -> Path:
        """Where our pins of splice are.

        Raises:
            LoadError: spliced pairs of the daemon before can neither go on here nor stay with it.
        """
        if before is None:
            # Others are removed by `look_for_left`: if this start fails, another version may still
            # go on with what is there.
            self._splice_pins = directories.choose_alone(self._pins)
        else:
            chosen = directories.choose_beside(self._pins, before)
            self._splice_pins, self.predecessor_keeps = chosen
        return self._splice_pins

    def _remove_left(self, *, of_filters: bool = True) -> None:
        """Remove what daemons that were killed have left of splice, except what is ours now.

        `of_filters`: also filters without a directory.
        """
        own = self._splice_pins
        for directory in directories.remove_left(self._pins, own, of_filters=of_filters):
            self._log.write("warning", "splice_pins_removed", directory=directory)

    def _make(self, row: DatapathRow, given: Given) -> None:
        try:
            made = pkgutil.resolve_name(row.supervised).make(given)
        except LoadError as error:
            self._fail(row.name, error)
            return
        self._states[row.name] = _NOT_WANTED if made is None else _IN_PREPARATION
        if isinstance(made, SupervisedSplice) and made.wants_express:
            self._states["express"] = _IN_PREPARATION
        if made is not None:
            self._there[row.name] = made

    def _fail(self, name: str, error: LoadError) -> None:
        self._states[name] = DatapathState.failed(str(error))
        self._log.load_error(f"no_{name}", error)

    @property
    def states(self) -> dict[str, str]:
        """What users read of each datapath: `available`, or why not; in the order of rows."""
        return {name: state.text for name, state in self._states.items()}

    @property
    def sockmap(self) -> KernelMaps | None:
        """What workers inherit for sockmap."""
        found = self._there.get("sockmap")
        return found.maps if isinstance(found, SupervisedSockmap) else None

    @property
    def splicing(self) -> Splicing | None:
        """What workers inherit for splice."""
        found = self._there.get("splice")
        return found.splicing if isinstance(found, SupervisedSplice) else None

    @property
    def in_preparation(self) -> list[str]:
        """The datapaths that are being loaded and proven, the best first."""
        return [row.name for row in IN_KERNEL if self._states[row.name] == _IN_PREPARATION]

    @property
    def must_come_first(self) -> bool:
        """Whether no connection may be opened yet: an earlier daemon's pairs have ports."""
        if self._is_successor:
            return False  # they are the other daemon's until that releases them
        return any(self._there[name].takes_over for name in self.in_preparation)

    @property
    def splice_state(self) -> Literal["none", "pinned", "passing"]:
        """Whether spliced pairs outlive us; `passing`: there may be some, and they do not."""
        if self.splicing is None or not self.splicing.has_begun:
            return "none"
        return "pinned" if self.splicing.maps.links.is_pinned else "passing"

    @property
    def splice_map_id(self) -> int | None:
        """The kernel's number of the map with the records of spliced pairs; None: there is none."""
        return None if self.splicing is None else map_id(self.splicing.maps.splices_fd)

    @property
    def splice_directory(self) -> str:
        """The name of the directory that has, or will have, the pins of splice."""
        return directories.NAMES[0] if self._splice_pins is None else self._splice_pins.name

    @property
    def keeper_pid(self) -> int:
        """The process that writes the records of spliced pairs; 0: there is none."""
        return 0 if self.splicing is None else self.splicing.keeper.pid

    @property
    def handshakes_fd(self) -> int:
        """The map of those that were seen lately, ours; -1: there is none."""
        if self.splicing is None or not self.splicing.has_begun:
            return -1
        return self.splicing.maps.handshakes_fd

    def release(self) -> None:
        """Leave what is pinned to another daemon, which continues with it."""
        for name in [name for name, datapath in self._there.items() if datapath.can_pin]:
            self._there.pop(name).release()
            self._states[name] = _NOT_WANTED

    def parts(self) -> dict[str, Part]:
        """What another process has to load, which has inherited the maps, by name."""
        # A child does not see who has forced it.
        attach = os.environ.get(attaching.FORCED)

        def load(datapath: KernelDatapath) -> Loaded:
            if attach is not None:
                os.environ[attaching.FORCED] = attach
            descriptors, proof, extras = datapath.load(self._prove)
            return Loaded(descriptors, {"proof": proof, "extras": extras})

        return {name: partial(load, self._there[name]) for name in self.in_preparation}

    def _prove(self, name: str) -> str:
        """Run the self-test, unless it has passed before; returns how that went, for the log."""
        prove = pkgutil.resolve_name(row_of(name).proof)
        proof = proven(name, self._user, prove, anew=self._prove_anew)
        if proof is None:
            return "passed before, since the host was booted"
        return f"{len(proof.scenarios)} scenarios in {proof.took_s:.2f} s"

    def take(self, name: str, loaded: Loaded | LoadError) -> None:
        """Attach the programs of a part that was loaded, or do without that datapath."""
        try:
            if isinstance(loaded, LoadError):
                raise loaded
            self._there[name].attach(loaded.descriptors)
        except LoadError as error:
            self._fail(name, error)
            if name == "splice" and "express" in self._states:
                self._states["express"] = DatapathState.failed(f"it needs splice: {error}")
            self._there.pop(name).close()
            return
        self._states[name] = _AVAILABLE
        self._log.write("info", "datapath", datapath=name, proof=loaded.said["proof"])
        for extra, reason in loaded.said["extras"].items():
            self._states[extra] = DatapathState.failed(reason) if reason else _AVAILABLE
            if reason:
                self._log.write("warning", f"no_{extra}", reason=reason)

    def parts_of_sessions(self, config: Config) -> dict[str, Part]:
        """The proof of UDP sessions, if the configuration may use them and nobody has tried.

        From here on it counts as tried. `take_sessions` gets what it comes to.
        """
        if self._states.get("splice") != _AVAILABLE or not splices_sessions(config):
            return {}
        untried = [row.name for row in SESSIONS if row.name not in self._states]
        self._states |= dict.fromkeys(untried, _IN_PREPARATION)
        attach = os.environ.get(attaching.FORCED)

        def prove(name: str) -> Loaded:
            if attach is not None:
                os.environ[attaching.FORCED] = attach
            return Loaded((), {"proof": self._prove(name)})

        return {name: partial(prove, name) for name in untried}

    def take_sessions(self, name: str, proof: Loaded | LoadError) -> None:
        """Note whether sessions work, as their proof came out; workers have all that they need for
        them.
        """
        if isinstance(proof, LoadError):
            self._fail(name, proof)
            return
        self._states[name] = _AVAILABLE
        self._log.write("info", "datapath", datapath=name, proof=proof.said["proof"])

    @property
    def available(self) -> list[str]:
        """The datapaths to which workers may give pairs or sessions."""
        return [name for name, state in self._states.items() if state == _AVAILABLE]

    @property
    def found(self) -> tuple[Found | FoundSession, ...]:
        """What goes on from an earlier daemon, pairs and sessions; workers take them over."""
        if self.splicing is None:
            return ()
        maps = self.splicing.maps
        return (*maps.found, *maps.sessions.found)

    def mtu(self) -> int:
        """What packets may have where pairs can be spliced between interfaces; 0: any."""
        return smallest_mtu() if self.splicing is not None else 0

    def lacks(self, config: Config) -> bool:
        """Whether `config` names one that was not wanted at the start."""
        return any(
            self._states.get(choice, _NOT_WANTED) == _NOT_WANTED
            for choice in kernel_choices(config)
        )

    def pin(self) -> None:
        """Pin spliced pairs, so that they outlive this daemon.

        Not before we serve: if we cannot, what an earlier daemon left must stay as it was.
        """
        for name, datapath in self._there.items():
            if not datapath.can_pin:
                continue
            try:
                bpffs.enter(self._pins.parent)
                datapath.pin()
            except ForwarderError as error:
                # It works, and ends with us.
                self._log.write("warning", f"{name}_not_pinned", reason=str(error))

    def watch(self) -> None:
        """Kill the keeper if it hangs (`keeper_has_died` tells of it), and remove what other
        daemons that were killed have left; do so again in a while.
        """
        if self.splicing is not None and self.splicing.keeper.hangs():
            self._log.write("error", "splice_keeper_hangs", pid=self.splicing.keeper.pid)
            self.splicing.keeper.kill()
        if self._looks_for_left:
            self._remove_left(of_filters=False)
        self._loop.after(scaled_s(_WATCH_KEEPER_S), self.watch)

    def look_for_left(self, *, looks: bool) -> None:
        """Remove what daemons that were killed have left of splice, now and from time to time.

        Only the daemon that serves does that.
        """
        self._looks_for_left = looks
        if looks:
            self._remove_left()

    def accused(self) -> set[int]:
        """The workers that have asked the keeper for what they may not, since the last call."""
        return self.splicing.keeper.complaints() if self.splicing is not None else set()

    def complaints_fd(self) -> int | None:
        """Readable when `accused` has something to say."""
        return self.splicing.keeper.complaints_fd if self.splicing is not None else None

    def keeper_has_died(self) -> bool:
        """Whether the keeper has ended by itself since the last call; pairs that are spliced go
        on.
        """
        return self.splicing is not None and self.splicing.keeper.has_died()

    def restart_keeper(self) -> None:
        """Start another keeper in place of one that died."""
        if self.splicing is not None:
            self.splicing.keeper.restart()

    def worker_died(self, worker: int) -> None:
        """A worker died: its spliced pairs go on, and wait for the next worker.

        Call it before `forget_worker`, while the pair table says what that is.

        Raises:
            KeeperError: the keeper does not answer.
        """
        for datapath in self._there.values():
            datapath.worker_died(worker)

    def forget_worker(self, worker: int) -> None:
        """A worker died: take its entries out of the maps."""
        for datapath in self._there.values():
            datapath.forget_worker(worker)

    def close(self) -> None:
        """End the keeper, remove the pins of splice, and close the maps."""
        for datapath in self._there.values():
            datapath.close()


def waits_for_datapath(listener: Listener, config: Config) -> bool:
    """Whether a rule of the listener names a datapath of the kernel, so that nothing else will
    do.
    """
    if listener.protocol == "udp" or listener.is_unix:
        return False
    choices = {rule.datapath or listener.datapath or config.datapath for rule in listener.rules}
    return not choices.isdisjoint(_KERNEL_NAMES)


def kernel_choices(config: Config) -> set[str]:
    """The datapaths of the kernel that the configuration names or leaves open."""
    choices: set[str] = {config.datapath}
    for listener in config.listeners:
        choices.add(listener.datapath or config.datapath)
        choices |= {
            rule.datapath or listener.datapath or config.datapath for rule in listener.rules
        }
    if not choices.isdisjoint({"auto", "express"}):
        choices |= _KERNEL_NAMES
    return choices & {*_KERNEL_NAMES, *_EXPRESS_NAMES}
