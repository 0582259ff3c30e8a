"""The process that speaks to a fleet's store, and what comes of what it says."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pyforwarder import __version__
from pyforwarder.config.upstream import why_not_taken
from pyforwarder.errors import ForwarderError
from pyforwarder.supervisor.configuration.in_force import Shared
from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import (
    FROM_FLEET,
    FleetInstance,
    FleetInstances,
    FleetStore,
    FleetView,
    Overwritten,
    StoreAnswered,
)
from pyforwarder.supervisor.processes.child import Above, Serving

if TYPE_CHECKING:
    from types import FrameType

    from pyforwarder.config import Fleet
    from pyforwarder.config.upstream import Upstream
    from pyforwarder.fleet.member import Member
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.log import Log

# How often this machine says how many pairs it has.
_REPORT_S: Final = 5.0
_MOST_SHOWN: Final = 200
_MOST_TOLD: Final = 10  # servers that are not taken, at once
# What the process is told by at the end; those that a group may get it ignores.
_LEAVE: Final = signal.SIGUSR1
_LEAVE_S: Final = 1.0


class FleetProcess(
    StoreProcess["FleetView | FleetStore | FleetInstances | Overwritten | StoreAnswered"]
):
    """Learns what is in the store, and has it put in force."""

    name = "fleet"
    part = "configuration"
    may_say = FROM_FLEET

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        shared: Callable[[], Shared],
        put_in_force: Callable[[Shared], None],
        upstreams: Callable[[], Mapping[str, Upstream]],
        started_unix_s: float,
        facts: Callable[[], dict[str, object]],
        notify: Callable[[Sequence[FleetInstance]], None],
    ) -> None:
        """`shared` is what is in force; `put_in_force` changes that, or raises ForwarderError.

        `upstreams` are those in force, with the servers that have registered.
        `facts` is what this machine tells the others besides; `notify` is told of the others.
        """
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._shared = shared
        self._put_in_force = put_in_force
        self._upstreams = upstreams
        self._not_taken: set[tuple[str, str, str]] = set()  # upstream, server, and why
        self._facts = facts
        self._notify = notify
        self._instances: Sequence[FleetInstance] = []
        self._heard_s = 0.0
        self._is_reporting = False
        self._started = datetime.fromtimestamp(started_unix_s, UTC).isoformat(timespec="seconds")
        self._fleet: Fleet | None = None
        self._newest: Shared | None = None  # that the store had
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
        """Try the newest edition again, if it was refused: the machine's own configuration has
        changed, and it may fit now.
        """
        if self._newest is not None and self._refused:
            self._use(self._newest)

    @property
    def _is_wanted(self) -> bool:
        return self._fleet is not None

    def _prepare(self, channel: Channel) -> Serving:
        # Files may be readable by root alone, these modules, too.
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.member import Member
        from pyforwarder.fleet.opening import open_store

        fleet = self._fleet
        assert fleet is not None
        store = open_store(fleet)
        name = fleet.instance or socket.gethostname()
        member = Member(store, Keys(fleet.name), name, _MemberAbove(channel))
        return Serving(lambda: _run(member))

    def leave(self) -> None:
        """End the process, once this machine is no more in the store's list of machines.

        That waits for the store for a second at most.
        """
        if self._pid:
            # What ends meanwhile, or before it knows the signal, is a zombie until `close`.
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(self._pid)
                try:
                    os.kill(self._pid, _LEAVE)
                    poll = select.poll()
                    poll.register(pidfd, select.POLLIN)
                    poll.poll(_LEAVE_S * 1000)
                finally:
                    os.close(pidfd)
        self.close()

    def _handle(
        self, message: FleetView | FleetStore | FleetInstances | Overwritten | StoreAnswered
    ) -> None:
        if isinstance(message, StoreAnswered):
            self._note(message)
            return
        if isinstance(message, Overwritten):
            self._log.write(
                "warning", "fleet_instance_overwritten", key=message.overwritten[:_MOST_SHOWN]
            )
            return
        if isinstance(message, FleetInstances):
            self._take_instances(message.instances)
            return
        if isinstance(message, FleetStore):
            self._is_lost = message.store == "lost"
            level = "info" if message.store == "connected" else "warning"
            name = "endpoint" if message.store == "connected" else "error"
            self._log.write(level, f"fleet_store_{message.store}", **{name: message.endpoint})
            return
        for fault in message.faults:
            self._log.write("warning", "fleet_value", error=fault)
        assert self._fleet is not None
        shared = Shared(self._fleet.name, message.serial, message.text, message.servers)
        before = self._shared()
        if not message.serial and before.serial and before.fleet == shared.fleet:
            # A store that was lost and made anew, or a slip: no reason to serve nobody any more.
            self._log.write("warning", "fleet_without_edition", kept=before.serial)
            shared = replace(before, servers=message.servers)
        self._use(shared)

    def _take_instances(self, instances: Sequence[FleetInstance]) -> None:
        self._heard_s = time.monotonic()
        if instances != self._instances:
            self._instances = instances
            self._notify(instances)

    def _use(self, shared: Shared) -> None:
        """Put the edition in force if that can be; what was in force stays otherwise."""
        self._newest = shared
        try:
            self._put_in_force(shared)
        except ForwarderError as error:
            self._refused, self._why = shared.serial, str(error)
            self._log.write("error", "fleet_refused", serial=shared.serial, error=str(error))
        else:
            self._in_force, self._refused, self._why = shared.serial, 0, ""
            servers = sum(map(len, shared.servers.values())) - self._tell_not_taken(shared)
            self._log.write("info", "fleet_in_force", serial=shared.serial, registered=servers)
        self._report(answers=True)

    def _tell_not_taken(self, shared: Shared) -> int:
        """How many servers have registered and are not in force; the log is told of each once."""
        upstreams = self._upstreams()
        found = {
            (name, server, why)
            for name, servers in shared.servers.items()
            for server in servers
            if (why := why_not_taken(upstreams, name, server))
        }
        for name, server, why in sorted(found - self._not_taken)[:_MOST_TOLD]:
            self._log.write(
                "warning", "fleet_server_not_taken", upstream=name, server=server, error=why
            )
        self._not_taken = found
        return len(found)

    def _report(self, *, answers: bool = False) -> None:
        """Say how this machine fares; `answers`: now that what was told is in force, or refused."""
        message = {
            "version": __version__,
            "serial": self._in_force,
            "refused": self._refused,
            "why": self._why[:4096],
            "pid": os.getpid(),
            "started": self._started,
            "answers": answers,
            **self._facts(),
        }
        self._send({"report": message})


class _LeaveError(BaseException):
    """The process is to end: wherever it is, that is not to be taken for an error there."""


def _run(member: Member) -> None:
    """Run the member until the supervisor ends it, or is gone.

    Raises:
        EOFError, OSError: it is gone.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(_LEAVE, signal.SIG_IGN)
        raise _LeaveError

    try:
        signal.signal(_LEAVE, end)
        member.run()
    except _LeaveError:
        member.leave()


class _MemberAbove(Above):
    """Which tells a member of a fleet what this machine reports."""

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        message = self.wait(timeout_s)
        if message is None:
            return None
        report = message["report"]
        assert isinstance(report, dict)
        return report
