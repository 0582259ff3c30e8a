"""What `show` says, read from shared memory; no worker is asked, except about upstreams."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.address import bind_text
from pyforwarder.core.upstreams import Condition
from pyforwarder.datapath.base import OPENED_BY_KERNEL, WITH_BACKLOG, PairReason
from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    LineKind,
    PairRecord,
    PairState,
    ViewLine,
    unpack_endpoint,
)
from pyforwarder.datapath.ebpf.arrays import Line
from pyforwarder.datapath.ebpf.pair_table import read_records, read_slots
from pyforwarder.runtime import tables
from pyforwarder.runtime.counters import Counters, Directory, ListenerCounter, RuleCounter
from pyforwarder.status.table import ROWS
from pyforwarder.supervisor.express.rule_deciders import USERSPACE

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping, Sequence

    from pyforwarder.config import Config
    from pyforwarder.config.listener import Rule
    from pyforwarder.core.address import Bind
    from pyforwarder.supervisor.express.rule_deciders import RuleDecider, RuleName

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Backlogs:
    """Bytes that wait in the kernel, by slot (of the whole table) and direction."""

    known: Mapping[tuple[int, int], int]
    is_complete: bool = True  # what is not known of is 0

    def of(self, slot: int, record: PairRecord) -> int | None:
        """What waits for the pair in that slot; None if that cannot be told."""
        waiting = 0
        for direction in Direction:
            found = self.known.get((slot, direction))
            if found is None and not self.is_complete and _is_redirected(record, direction):
                return None
            waiting += found or 0
        return waiting


def _is_redirected(record: PairRecord, direction: Direction) -> bool:
    redirected_bytes: int = record.kernel[direction].redirected_bytes
    return record.datapath in WITH_BACKLOG and redirected_bytes > 0


def pair_row(record: PairRecord, now_ns: int, backlog_bytes: int | None) -> Row:
    """One pair's row, named as `show --json` does; `backlog_bytes` waits in the kernel now."""
    row: Row = {
        "id": record.id,
        "state": PairState(record.state).label,
        "datapath": DatapathKind(record.datapath).label,
        "client": unpack_endpoint(record.client),
        "listener": unpack_endpoint(record.listener),
        "source": unpack_endpoint(record.source),
        "server": unpack_endpoint(record.server),
    }
    active_ns = max(record.last_ns, record.started_ns)
    for direction, name in ((Direction.UP, "up"), (Direction.DOWN, "down")):
        seen, told = record.kernel[direction], record.worker[direction]
        row[f"{name}_bytes"] = told.carried_bytes + seen.redirected_bytes
        active_ns = max(active_ns, seen.last_ns)
    row["age_s"] = round(max(0, now_ns - record.started_ns) / 1e9, 3)
    row["idle_s"] = round(max(0, now_ns - active_ns) / 1e9, 3)
    row["rule"] = record.rule.decode()
    row["decided"] = "kernel" if record.reason in OPENED_BY_KERNEL else "user"
    row["reason"] = PairReason(record.reason).text
    for direction, name in ((Direction.UP, "up"), (Direction.DOWN, "down")):
        seen, told = record.kernel[direction], record.worker[direction]
        row[f"{name}_packets"] = told.carried_packets + seen.redirected_packets
    row["backlog_bytes"] = backlog_bytes
    return row


def pair_rows(windows: Sequence[mmap.mmap], backlogs: Backlogs) -> list[Row]:
    """A row for every connection that is old enough to be in the table, by id."""
    now_ns = time.monotonic_ns()
    rows = []
    first_slot = 0
    for memory in windows:
        for slot, record in read_slots(memory):
            waiting = backlogs.of(first_slot + slot, record)
            # What a worker that was taken over writes there hides its own pairs, and no others.
            with contextlib.suppress(ValueError):
                rows.append(pair_row(record, now_ns, waiting))
        first_slot += len(memory) // PAIR_BYTES
    return sorted(rows, key=lambda row: int(row["id"]))


def listener_rows(
    config: Config,
    binds: Mapping[str, Sequence[Bind]],
    counters: Counters,
    directory: Directory,
) -> list[Row]:
    """A row for every listener of the configuration in force."""
    rows = []
    for listener in config.listeners:
        base = directory.index(listener.name)
        rows.append(
            {
                "name": listener.name,
                "bind": bind_text(binds[listener.name]),
                "protocol": listener.protocol,
                "accepted": counters.total(base + ListenerCounter.ACCEPTED),
                "open": counters.total(base + ListenerCounter.OPEN),
                "refused": counters.total(base + ListenerCounter.REFUSED),
            }
        )
    return rows


def rule_rows(
    config: Config,
    counters: Counters,
    directory: Directory,
    deciders: Mapping[RuleName, RuleDecider] = MappingProxyType({}),
) -> list[Row]:
    """A row for every rule, in the order in which they are tried.

    By rules that are not in `deciders` userspace decides.
    """
    rows = []
    for listener in config.listeners:
        for rule in listener.rules:
            base = directory.index(listener.name, rule.name)
            decider = deciders.get((listener.name, rule.name), USERSPACE)
            rows.append(
                {
                    "listener": listener.name,
                    "rule": rule.name,
                    "taken": counters.total(base + RuleCounter.TAKEN),
                    "refused": counters.total(base + RuleCounter.REFUSED),
                    "to": goes_to(rule),
                    "decided": decider.decided,
                    "why": decider.why_not,
                }
            )
    return rows


def goes_to(rule: Rule) -> str:
    """Where a rule sends what it takes, in the word of `show rules`."""
    return str(rule.to) if rule.to is not None else f"({rule.reject or 'client'})"


def upstream_rows(
    config: Config,
    reports: Sequence[Mapping[str, Any]],
    in_kernel: Mapping[str, Any],
    checkers: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> list[Row]:
    """A row for every server of every upstream; `reports` is what each worker said about its
    balancers.

    `checkers` says who checks a server, by upstream and address.

    `in_kernel` is the same of what the kernel chooses from. It may have met failures that no worker
    has.
    """
    rows = []
    for name, upstream in config.upstreams.items():
        for server in upstream.servers:
            address = str(server.address)
            everyone = [*reports, in_kernel]
            seen = [report[name][address] for report in everyone if address in report.get(name, {})]
            states = [entry["state"] for entry in seen]
            kernels = in_kernel.get(name, {}).get(address, {}).get("state")
            if states and states[0] == Condition.UP.value and kernels == Condition.EJECTED.value:
                states[0] = kernels
            rows.append(
                {
                    "upstream": name,
                    "server": address,
                    "state": states[0] if states else "up",
                    "pairs": sum(entry["pairs"] for entry in seen),
                    "connects": sum(entry["connects"] for entry in seen),
                    "failures": sum(entry["failures"] for entry in seen),
                    "weight": server.weight,
                    "backup": server.backup,
                    "checked_by": checkers.get((name, address)),
                }
            )
    return rows


# The totals of `show stats` by their flat names, a dot being a level of the JSON: what the
# kernel's `stats` file sums up and what the daemon answers is one list.
TOTALS: Final[tuple[Line, ...]] = tuple(
    Line(row.kind, row.stats, row.word, also=row.also) for row in ROWS if row.stats
)


def stats(counters: Counters, windows: Sequence[mmap.mmap], datapaths: Mapping[str, str]) -> Row:
    """Totals since `up`; bytes include those of open pairs."""
    live = open_bytes(windows)
    row: Row = {}
    for line in TOTALS:
        value = counters.total(line.word) + (counters.total(line.also) if line.also else 0)
        if line.kind is LineKind.UP_BYTES:
            value += live[Direction.UP]
        elif line.kind is LineKind.DOWN_BYTES:
            value += live[Direction.DOWN]
        group, dot, member = line.name.partition(".")
        where = row.setdefault(group, {}) if dot else row
        if value or line.kind is not LineKind.NONZERO:
            where[member or line.name] = value
    row["datapaths"] = dict(datapaths)
    return row


def open_bytes(windows: Sequence[mmap.mmap]) -> tuple[int, int]:
    """What the connections in the table have carried so far, up and down."""
    carried = [0, 0]
    for memory in windows:
        for record in read_records(memory):
            for direction in Direction:
                carried[direction] += (
                    record.worker[direction].carried_bytes
                    + record.kernel[direction].redirected_bytes
                )
    return carried[0], carried[1]


def stats_lines(datapaths: Mapping[str, str]) -> list[Line]:
    """The lines of the kernel's `stats` file."""
    return [
        *TOTALS,
        *(
            Line(LineKind.TEXT, f"datapaths.{name}", text=tables.one_line(state))
            for name, state in datapaths.items()
        ),
    ]


def _shortened(text: str) -> str:
    """A column that fits the kernel's line, cut between two addresses."""
    room = ViewLine.text.size - 1
    if len(text.encode()) <= room:
        return text
    return text.encode()[: room - 4].decode(errors="ignore").rpartition(",")[0] + ",..."


def listener_lines(
    config: Config, binds: Mapping[str, Sequence[Bind]], directory: Directory
) -> list[Line]:
    """The lines of the kernel's `listeners` file."""
    return [
        Line(
            LineKind.LISTENER,
            tables.cell(listener.name),
            directory.index(listener.name),
            _shortened(tables.cell(bind_text(binds[listener.name]))),
            listener.protocol,
        )
        for listener in config.listeners
    ]
