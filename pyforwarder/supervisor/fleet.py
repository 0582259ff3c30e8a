"""The process that speaks to a fleet's store, and what comes of what it says."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder import __version__
from pyforwarder.errors import ForwarderError
from pyforwarder.supervisor.child import ChildProcess, Serving
from pyforwarder.supervisor.configuration import Shared
from pyforwarder.supervisor.messages import (
    FROM_FLEET,
    FleetInstance,
    FleetInstances,
    FleetStore,
    FleetView,
    understand,
)

if TYPE_CHECKING:
    from pyforwarder.config import Config, Fleet
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.log import Log

# How often this machine says how many pairs it has.
_REPORT_S: Final = 5.0
_CACHE_MODE: Final = 0o600
_MOST_CACHED: Final = 16 << 20


class FleetProcess(ChildProcess["FleetView | FleetStore | FleetInstances"]):
    """Hears what is in the store, and has it put in force."""

    name = "fleet"

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        shared: Callable[[], Shared],
        put_in_force: Callable[[Shared], None],
        started_unix_s: float,
        facts: Callable[[], dict[str, object]],
        tell: Callable[[Sequence[FleetInstance]], None],
    ) -> None:
        """`shared` is what is in force; `put_in_force` changes that, or raises ForwarderError.

        `facts` is what this machine tells the others besides; `tell` is told of the others.
        """
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._shared = shared
        self._put_in_force = put_in_force
        self._facts = facts
        self._tell = tell
        self._instances: Sequence[FleetInstance] = []
        self._heard_s = 0.0
        self._is_reporting = False
        self._started = datetime.fromtimestamp(started_unix_s, UTC).isoformat(timespec="seconds")
        self._fleet: Fleet | None = None
        self._newest: Shared | None = None  # that was heard of
        self._in_force = 0  # serial numbers
        self._refused = 0
        self._why = ""
        self._is_lost = False  # the store, says the process

    def change_to(self, fleet: Fleet | None, *, serial: int) -> None:
        """Speak to this store from now on; an edition of this serial number is in force.

        Raises:
            ForwarderError: its files cannot be read; nothing has changed then.
        """
        self._in_force = serial
        if fleet == self._fleet and not self._is_lost:
            self.start()
            return
        # If its store is lost, its files may be others by now, a new certificate for example.
        self._fleet, self._newest, self._is_lost = fleet, None, False
        self._take_instances([])
        self.renew()
        if fleet is not None and not self._is_reporting:
            self._is_reporting = True
            self._report_again()

    def rows(self) -> list[dict[str, Any]] | None:
        """The machines of the fleet, as `show --fleet` tells of them; None: there is no fleet."""
        if self._fleet is None:
            return None
        heard_s = round(time.monotonic() - self._heard_s, 3)
        return [
            {
                **one.model_dump(),
                "datapaths": ",".join(one.datapaths),
                "heard_s": heard_s,
            }
            for one in self._instances
        ]

    def _report_again(self) -> None:
        self._report()
        self._loop.after(_REPORT_S, self._report_again)

    def try_again(self) -> None:
        """After the machine's own configuration has changed: the newest edition may fit it now."""
        if self._newest is not None and self._refused:
            self._use(self._newest)

    @property
    def _is_wanted(self) -> bool:
        return self._fleet is not None

    def _prepare(self, channel: Channel) -> Callable[[], Serving]:
        # Files may be readable by root alone, these modules, too.
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.member import Member
        from pyforwarder.fleet.opening import open_store

        fleet = self._fleet
        assert fleet is not None
        store = open_store(fleet)
        name = fleet.instance or socket.gethostname()
        return lambda: Serving(Member(store, Keys(fleet.name), name, _Above(channel)).run)

    def _understand(
        self, message: dict[str, Any], fds: Sequence[int]
    ) -> FleetView | FleetStore | FleetInstances:
        said = understand(message, fds, FROM_FLEET)
        assert isinstance(said, FleetView | FleetStore | FleetInstances)
        return said

    def _heard(self, said: FleetView | FleetStore | FleetInstances) -> None:
        if isinstance(said, FleetInstances):
            self._take_instances(said.instances)
            return
        if isinstance(said, FleetStore):
            self._is_lost = said.store == "lost"
            level = "info" if said.store == "connected" else "warning"
            name = "endpoint" if said.store == "connected" else "error"
            self._log.write(level, f"fleet_store_{said.store}", **{name: said.endpoint})
            return
        for fault in said.faults:
            self._log.write("warning", "fleet_value", error=fault)
        assert self._fleet is not None
        shared = Shared(self._fleet.name, said.serial, said.text, said.servers)
        before = self._shared()
        if not said.serial and before.serial and before.fleet == shared.fleet:
            # A store that was lost and made anew, or a slip: no reason to serve nobody any more.
            self._log.write("warning", "fleet_without_edition", kept=before.serial)
            shared = replace(before, servers=said.servers)
        self._use(shared)

    def _take_instances(self, instances: Sequence[FleetInstance]) -> None:
        self._heard_s = time.monotonic()
        if instances != self._instances:
            self._instances = instances
            self._tell(instances)

    def _use(self, shared: Shared) -> None:
        """Put it in force if that can be; what was in force stays otherwise."""
        self._newest = shared
        try:
            self._put_in_force(shared)
        except ForwarderError as error:
            self._refused, self._why = shared.serial, str(error)
            self._log.write("error", "fleet_refused", serial=shared.serial, error=str(error))
        else:
            self._in_force, self._refused, self._why = shared.serial, 0, ""
            servers = sum(map(len, shared.servers.values()))
            self._log.write("info", "fleet_in_force", serial=shared.serial, registered=servers)
        self._report(answers=True)

    def _report(self, *, answers: bool = False) -> None:
        """Say how this machine fares; `answers`: now that what was told is in force, or refused."""
        said = {
            "version": __version__,
            "serial": self._in_force,
            "refused": self._refused,
            "why": self._why[:4096],
            "pid": os.getpid(),
            "started": self._started,
            "answers": answers,
            **self._facts(),
        }
        self._say({"report": said})


class _Above:
    """The supervisor, as its child sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def tell(self, message: dict[str, Any]) -> None:
        self._channel.send(message)

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        if not self._poll.poll(timeout_s * 1000):
            return None
        received = self._channel.receive()
        if received is None:
            raise EOFError
        report = received[0]["report"]
        assert isinstance(report, dict)
        return report


class LastGood:
    """A file with what was in force last: the store need not be there for the next start."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist, nor its directory."""
        self._path = path

    def read(self, fleet: str) -> Shared:
        """What is there for this fleet; nothing if that cannot be used.

        Root's configuration comes out of it: a file that others could have written is not read.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    return Shared()
                said = json.loads(file.read(_MOST_CACHED))
            if said["fleet"] != fleet:
                return Shared()
            view = FleetView.model_validate(
                {key: said[key] for key in ("serial", "text", "servers")} | {"faults": []}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Shared()
        return Shared(fleet, view.serial, view.text, view.servers)

    def write(self, shared: Shared) -> None:
        """Keep this.

        Raises:
            OSError: it cannot be kept.
        """
        text = json.dumps(
            {
                "fleet": shared.fleet,
                "serial": shared.serial,
                "text": shared.text,
                "servers": {name: dict(servers) for name, servers in shared.servers.items()},
            }
        )
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _CACHE_MODE)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)


def check_files(config: Config) -> None:
    """Whether the files that `fleet` names can be used.

    Raises:
        ConfigError: one cannot; it says which, and why.
    """
    if config.fleet is not None:
        from pyforwarder.fleet.files import read_files

        read_files(config.fleet)
