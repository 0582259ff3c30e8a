"""What `show` says, read from shared memory; no worker is asked, except about upstreams."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from pyforwarder import tables
from pyforwarder.counters import (
    CLOSED_INDEX,
    Counter,
    Counters,
    Directory,
    ListenerCounter,
    RuleCounter,
)
from pyforwarder.datapath.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    LineKind,
    PairRecord,
    PairState,
    unpack_endpoint,
)
from pyforwarder.datapath.arrays import Line
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.table import read_records, read_slots

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping, Sequence

    from pyforwarder.config import Config

Row = dict[str, Any]


def pair_row(record: PairRecord, now_ns: int, backlog_bytes: int) -> Row:
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
        seen, told = record.verdict[direction], record.worker[direction]
        row[f"{name}_bytes"] = told.carried_bytes + seen.redirected_bytes
        active_ns = max(active_ns, seen.last_ns)
    row["age_s"] = round(max(0, now_ns - record.started_ns) / 1e9, 3)
    row["idle_s"] = round(max(0, now_ns - active_ns) / 1e9, 3)
    row["rule"] = record.rule.decode()
    row["reason"] = PairReason(record.reason).text
    for direction, name in ((Direction.UP, "up"), (Direction.DOWN, "down")):
        seen, told = record.verdict[direction], record.worker[direction]
        row[f"{name}_packets"] = told.carried_packets + seen.redirected_packets
    row["backlog_bytes"] = backlog_bytes
    return row


def pair_rows(windows: Sequence[mmap.mmap], backlogs: Mapping[tuple[int, int], int]) -> list[Row]:
    """Every connection that is old enough to be in the table, by id.

    `backlogs` says what waits in the kernel, by slot of the whole table and direction.
    """
    now_ns = time.monotonic_ns()
    rows = []
    first_slot = 0
    for memory in windows:
        for slot, record in read_slots(memory):
            waiting = sum(backlogs.get((first_slot + slot, d), 0) for d in Direction)
            rows.append(pair_row(record, now_ns, waiting))
        first_slot += len(memory) // PAIR_BYTES
    return sorted(rows, key=lambda row: int(row["id"]))


def listener_rows(
    config: Config, binds: Mapping[str, str], counters: Counters, directory: Directory
) -> list[Row]:
    """Every listener of the configuration in force."""
    rows = []
    for listener in config.listeners:
        base = directory.index(listener.name)
        rows.append(
            {
                "name": listener.name,
                "bind": binds[listener.name],
                "protocol": listener.protocol,
                "accepted": counters.total(base + ListenerCounter.ACCEPTED),
                "open": counters.total(base + ListenerCounter.OPEN),
                "refused": counters.total(base + ListenerCounter.REFUSED),
            }
        )
    return rows


def rule_rows(config: Config, counters: Counters, directory: Directory) -> list[Row]:
    """Every rule, in the order in which they are tried."""
    rows = []
    for listener in config.listeners:
        for rule in listener.rules:
            base = directory.index(listener.name, rule.name)
            to = str(rule.to) if rule.to is not None else f"({rule.reject or 'client'})"
            rows.append(
                {
                    "listener": listener.name,
                    "rule": rule.name,
                    "taken": counters.total(base + RuleCounter.TAKEN),
                    "refused": counters.total(base + RuleCounter.REFUSED),
                    "to": to,
                }
            )
    return rows


def upstream_rows(config: Config, reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every server of every upstream; `reports` is what each worker said about its balancers."""
    rows = []
    for name, upstream in config.upstreams.items():
        for server in upstream.servers:
            address = str(server.address)
            seen = [report[name][address] for report in reports if address in report.get(name, {})]
            rows.append(
                {
                    "upstream": name,
                    "server": address,
                    "state": seen[0]["state"] if seen else "up",
                    "pairs": sum(entry["pairs"] for entry in seen),
                    "connects": sum(entry["connects"] for entry in seen),
                    "failures": sum(entry["failures"] for entry in seen),
                }
            )
    return rows


# The totals of `show stats` by their flat names, a dot being a level of the JSON: what the
# kernel's `stats` file sums up and what the daemon answers is one list.
TOTALS: Final[tuple[tuple[str, LineKind, int], ...]] = (
    ("accepted", LineKind.COUNTER, Counter.ACCEPTED),
    ("open", LineKind.COUNTER, Counter.OPEN),
    ("pairs_open", LineKind.COUNTER, Counter.PAIRS_OPEN),
    ("pairs_opened", LineKind.COUNTER, Counter.PAIRS_OPENED),
    ("joined.copy", LineKind.COUNTER, Counter.JOINED_COPY),
    ("joined.sockmap", LineKind.COUNTER, Counter.JOINED_SOCKMAP),
    ("joined.splice", LineKind.COUNTER, Counter.JOINED_SPLICE),
    *(
        (f"closed.{reason.value}", LineKind.NONZERO, index)
        for reason, index in CLOSED_INDEX.items()
    ),
    ("bytes_up", LineKind.UP_BYTES, Counter.UP_BYTES),
    ("bytes_down", LineKind.DOWN_BYTES, Counter.DOWN_BYTES),
    ("first_packet_full", LineKind.COUNTER, Counter.FIRST_PACKET_FULL),
    ("first_packet_timeout", LineKind.COUNTER, Counter.FIRST_PACKET_TIMEOUT),
    ("accept_paused", LineKind.COUNTER, Counter.ACCEPT_PAUSED),
    ("datagrams_lost", LineKind.COUNTER, Counter.DATAGRAMS_LOST),
    ("connect_failed", LineKind.COUNTER, Counter.CONNECT_FAILED),
    ("backlog_trips", LineKind.COUNTER, Counter.BACKLOG_TRIPS),
)


def stats(counters: Counters, windows: Sequence[mmap.mmap], datapaths: Mapping[str, str]) -> Row:
    """Totals since `up`; bytes include those of open pairs."""
    live = open_bytes(windows)
    row: Row = {}
    for name, kind, word in TOTALS:
        value = counters.total(word)
        if kind is LineKind.UP_BYTES:
            value += live[Direction.UP]
        elif kind is LineKind.DOWN_BYTES:
            value += live[Direction.DOWN]
        group, dot, member = name.partition(".")
        where = row.setdefault(group, {}) if dot else row
        if value or kind is not LineKind.NONZERO:
            where[member or name] = value
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
                    + record.verdict[direction].redirected_bytes
                )
    return carried[0], carried[1]


def stats_lines(datapaths: Mapping[str, str]) -> list[Line]:
    """The lines of the kernel's `stats` file."""
    return [
        *(Line(kind, name, word) for name, kind, word in TOTALS),
        *(
            Line(LineKind.TEXT, f"datapaths.{name}", text=tables.printable(state))
            for name, state in datapaths.items()
        ),
    ]


def listener_lines(config: Config, binds: Mapping[str, str], directory: Directory) -> list[Line]:
    """The lines of the kernel's `listeners` file."""
    return [
        Line(
            LineKind.LISTENER,
            tables.cell(listener.name),
            directory.index(listener.name),
            tables.cell(binds[listener.name]),
            listener.protocol,
        )
        for listener in config.listeners
    ]
