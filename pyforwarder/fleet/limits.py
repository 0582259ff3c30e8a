"""Limits on one client's connections that hold in a whole fleet, as far as its machines know.

    /pyforwarder/FLEET/limits/NAME      `LimitsReport` of a machine, see `reporting`

Each machine counts as it does alone, and reports those clients that have more than a share of a
limit: half of it, divided by the number of machines. A connection is one too many where those that
the client has at a machine and those that others have reported exceed the limit, unless it has no
more than that share there. Let M be the limit, N the machines, S = M // 2N the share, T the time
until a machine has another's report of a connection. Then a client has at most

    M + (N - 1) * S + what it opens within T

at all machines together: consider the last connection that was admitted beyond a share. At that
moment the connections there and those reported made M at most; at each other machine S may be
missing in its report, or be admitted later as its share, and what was opened within T. And never
more than N * M: each machine holds its own count to the limit, with any reports of others.

Rates (`new_per_second_per_client`) are each machine's own: a report of them would be as old as the
second that they are about.

`Board` is pure; `LimitsSharing` runs in a process of its own without privileges, which reads the
workers' memory and writes what they read: numbers by clients' keys, and nothing else.
"""

from __future__ import annotations

import functools
import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

from pydantic import Field

from pyforwarder.fleet.exchanges import Exchanges
from pyforwarder.fleet.layout import Name, Value, ValueFault, check_machine
from pyforwarder.fleet.reporting import Reporter
from pyforwarder.runtime.client_network import ClientNetwork
from pyforwarder.runtime.fleet_counts import fleet_key
from pyforwarder.runtime.limits_memory import MOST_MACHINES, share_of

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.compaction import Compaction
    from pyforwarder.fleet.layout import Keys
    from pyforwarder.fleet.store import Store
    from pyforwarder.fleet.supervisor import Supervisor
    from pyforwarder.fleet.watching import Watcher
    from pyforwarder.runtime.fleet_counts import (
        ClientCount,
        ClientCounts,
        FleetScope,
        OtherMachines,
    )

# One machine reports so many clients at most: those that are nearest to their limits.
MOST_REPORTED: Final = 1024
_MOST_COUNT: Final = 1_000_000
MOST_VALUE_BYTES: Final = 256 << 10
_TURN_S: Final = 0.05
# Workers' memory is scanned as often as this, and for a twentieth of the time at most.
_SCAN_S: Final = 0.1
_SCANS_REST: Final = 20
# What changes all the time is written so often, and so much of it in a second: the store keeps all.
_WRITE_S: Final = 0.25
_WRITTEN_BYTES_PER_S: Final = 16 << 10
# What is no report is told of: once, and of so many keys at most in this time.
_MOST_FAULTS: Final = 16
_FAULTS_EVERY_S: Final = 60.0
_MOST_KEY: Final = 128  # of a machine, as far as it is shown

_Client = Annotated[str, Field(max_length=64)]
_Count = Annotated[int, Field(ge=1, le=_MOST_COUNT)]
_Clients = Annotated[dict[_Client, _Count], Field(max_length=MOST_REPORTED)]


class LimitsReport(Value):
    """What clients have at a machine, by network; those that have more than a share."""

    tcp: _Clients = Field(default_factory=dict)  # pairs of all listeners
    udp: _Clients = Field(default_factory=dict)  # sessions of all listeners
    listeners: dict[Name, _Clients] = Field(default_factory=dict, max_length=MOST_REPORTED)


def read_report(machine: str, value: bytes) -> LimitsReport:
    """What a machine reports.

    Raises:
        ValueFault: it is no report, or no machine's.
    """
    check_machine(machine)
    if len(value) > MOST_VALUE_BYTES:
        raise ValueFault("too long")
    report = LimitsReport.decode(value)
    clients = (report.tcp, report.udp, *report.listeners.values())
    if sum(map(len, clients)) > MOST_REPORTED:
        raise ValueFault("too many clients")
    return report


def rows_of(reports: Mapping[str, LimitsReport]) -> list[dict[str, Any]]:
    """What clients have by these reports, by machine; who has most comes first.

    `protocol` is None for what they have at a listener, `listener` for what they have at all.
    """
    found: defaultdict[tuple[str, str | None, str | None], dict[str, int]] = defaultdict(dict)
    for machine, report in sorted(reports.items()):
        of_all: list[tuple[str | None, str | None, dict[str, int]]]
        of_all = [("tcp", None, report.tcp), ("udp", None, report.udp)]
        of_all += [(None, listener, some) for listener, some in report.listeners.items()]
        for protocol, listener, some in of_all:
            for client, count in some.items():
                found[client, protocol, listener][machine] = count
    rows = [
        {
            "client": client,
            "total": sum(machines.values()),
            "protocol": protocol,
            "listener": listener,
            "machines": machines,
        }
        for (client, protocol, listener), machines in found.items()
    ]
    return sorted(rows, key=lambda row: (-cast("int", row["total"]), str(row)))


class Board:
    """What all machines report, and what follows for one of them."""

    def __init__(self, machine: str, scopes: Sequence[FleetScope], *, secret: bytes) -> None:
        """`machine` is its name in the fleet, `secret` that of its workers' `SharedLimits`."""
        self._machine = machine
        self._secret = secret
        self._scopes = {one.bounds.scope: one for one in scopes}
        self._by_name = {(one.kind, one.name): one for one in scopes}
        self._reported: dict[str, dict[int, int]] = {}  # by machine: counts by the workers' keys
        self.has_changed = False  # `others` or `machines`, since this was set to False
        self.unusable = 0  # values that were no reports
        self.faults: dict[str, str] = {}  # why these machines' values are no reports, of some

    @property
    def machines(self) -> int:
        """How many there are, with this one."""
        return min(len(self._reported) + 1, MOST_MACHINES)

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """All reports that are in the store, by machine."""
        self._reported.clear()
        self.faults.clear()
        self.has_changed = True
        for machine, value in found:
            self.saw(machine, value)

    def saw(self, machine: str, value: bytes | None) -> None:
        """Note that a machine's report has changed, or has gone (None)."""
        if machine == self._machine:
            return
        self.has_changed |= self._reported.pop(machine, None) is not None
        self.faults.pop(machine[:_MOST_KEY], None)
        if value is None:
            return
        try:
            if len(self._reported) >= MOST_MACHINES - 1:
                raise ValueFault("too many machines")
            report = read_report(machine, value)
        except ValueFault as fault:
            self.unusable += 1
            if len(self.faults) < _MOST_FAULTS:
                self.faults[machine[:_MOST_KEY]] = str(fault)
            return
        self.has_changed = True
        self._reported[machine] = self._counts_of(report)

    def others(self) -> dict[int, int]:
        """What clients have at other machines, by the keys of this one's workers."""
        total: defaultdict[int, int] = defaultdict(int)
        for counts in self._reported.values():
            for key, count in counts.items():
                total[key] += count
        return total

    @property
    def least(self) -> int:
        """A number of connections: clients that have no more are not reported."""
        machines = self.machines
        shares = (share_of(one.bounds.per_client, machines) for one in self._scopes.values())
        return min(shares, default=_MOST_COUNT)

    def report(self, counts: Iterable[ClientCount]) -> LimitsReport:
        """What this machine reports, by what it has."""
        machines = self.machines
        heavy = []
        for index, network, count in counts:
            scope = self._scopes.get(index)
            if scope is None or not scope.bounds.fits(network):
                continue
            most = scope.bounds.per_client
            if count > share_of(most, machines):
                bounded = min(count, _MOST_COUNT)
                heavy.append((count / most, _text(network), bounded, scope.kind, scope.name))
        found: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for _, client, count, kind, name in heapq.nlargest(MOST_REPORTED, heavy):
            found[kind, name][client] = count
        return LimitsReport(
            tcp=found.get(("tcp", ""), {}),
            udp=found.get(("udp", ""), {}),
            listeners={name: some for (kind, name), some in found.items() if kind == "listener"},
        )

    def _counts_of(self, report: LimitsReport) -> dict[int, int]:
        counts: dict[int, int] = {}
        by_scope = {("listener", name): some for name, some in report.listeners.items()}
        by_scope |= {("tcp", ""): report.tcp, ("udp", ""): report.udp}
        for place, clients in by_scope.items():
            scope = self._by_name.get(place)
            if scope is None:
                continue
            for text, count in clients.items():
                network = _network(text)
                if network is not None and scope.bounds.fits(network):
                    key = fleet_key(scope.bounds.scope, network, self._secret)
                    counts[key] = max(count, counts.get(key, 0))
        return counts


@functools.lru_cache(maxsize=1 << 15)
def _text(network: ClientNetwork) -> str:
    return str(network)


@functools.lru_cache(maxsize=1 << 15)
def _network(text: str) -> ClientNetwork | None:
    """Return the network in this text; None: it is not written as we would write it."""
    try:
        return ClientNetwork.parse(text)
    except ValueError:
        return None


class LimitsSharing:
    """Writes this machine's report, reads the others', and writes for workers what follows."""

    def __init__(
        self,
        store: Store,
        watcher: Watcher,
        keys: Keys,
        machine: str,
        board: Board,
        counts: ClientCounts,
        shown: OtherMachines,
        supervisor: Supervisor,
        *,
        compaction: Compaction | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`watcher` is of `keys.limits`, with a store of its own.

        `counts` is what workers have, `shown` is the memory that they read.
        """
        self._watcher = watcher
        self._prefix = keys.limits
        self._board = board
        self._counts = counts
        self._shown = shown
        self._supervisor = supervisor
        self._compaction = compaction
        self._clock = clock
        self._reporter = Reporter(store, watcher, keys.limits, machine, supervisor, clock=clock)
        self._exchanges = Exchanges(supervisor)
        self._report = LimitsReport()
        self._scan_s = 0.0  # not before
        self._change_s = 0.0  # the report, not before
        self._faulty: set[str] = set()  # machines whose values are known to be no reports
        self._faults_s = 0.0  # not before

    def run(self) -> None:
        """Share the counts of clients until the supervisor is gone.

        Raises:
            EOFError, OSError: it is.
        """
        self._watcher.start()
        while True:
            self._supervisor.wait(_TURN_S)
            self.turn()

    def turn(self) -> None:
        """Receive, show workers what follows, and write what has changed."""
        now_s = self._clock()
        self._reporter.receive(self._board, now_s)
        # Before the store is asked, for which we may have to wait.
        if self._board.has_changed:
            self._board.has_changed = False
            self._shown.write(self._board.others(), self._board.machines)
        self._scan(now_s)
        self._reporter.write(now_s, self._write)
        self._exchanges.tell(self._reporter.answered_s, now_s, unusable=self._board.unusable)
        if self._reporter.check_store():
            self._shown.hold_until(self._reporter.alone_s)
        elif self._reporter.is_lost:
            self._shown.hold_until(0.0)
        self._report_faults(now_s)

    def _report_faults(self, now_s: float) -> None:
        if now_s < self._faults_s:
            return
        faults = self._board.faults
        new = [
            f"{self._prefix}{one}: {why}" for one, why in faults.items() if one not in self._faulty
        ]
        self._faulty = set(faults)
        if new:
            self._faults_s = now_s + _FAULTS_EVERY_S
            self._supervisor.send({"faults": new})

    def _scan(self, now_s: float) -> None:
        """Make the report anew, if it is time for that."""
        if now_s < max(self._scan_s, self._change_s):
            return
        began_s = self._clock()
        report = self._board.report(self._counts.more_than(self._board.least))
        took_s = self._clock() - began_s
        self._scan_s = now_s + max(_SCAN_S, _SCANS_REST * took_s)
        if report != self._report:
            self._report = report
            written_s = len(report.encode()) / _WRITTEN_BYTES_PER_S
            self._change_s = now_s + max(_WRITE_S, written_s)

    def _write(self, now_s: float) -> bool:
        has_asked = self._reporter.put(self._report, now_s)
        if self._compaction is not None:
            self._compaction.run_due(now_s, lease=self._reporter.lease)
        return has_asked
