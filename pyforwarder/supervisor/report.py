"""What `show` says, read from shared memory; no worker is asked, except about upstreams."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pyforwarder.counters import (
    CLOSED_INDEX,
    Counter,
    Counters,
    Directory,
    ListenerCounter,
    RuleCounter,
)
from pyforwarder.datapath.abi import DatapathKind, Direction, PairRecord, PairState, unpack_endpoint
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.table import read_records

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping, Sequence

    from pyforwarder.config import Config

Row = dict[str, Any]


def pair_row(record: PairRecord, now_ns: int) -> Row:
    """One pair's row, named as `show --json` does."""
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
    row["backlog_bytes"] = sum(record.verdict[d].backlog_bytes for d in Direction)
    return row


def pair_rows(windows: Sequence[mmap.mmap]) -> list[Row]:
    """Every connection that is old enough to be in the table, by id."""
    now_ns = time.monotonic_ns()
    rows = [pair_row(record, now_ns) for memory in windows for record in read_records(memory)]
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


def stats(counters: Counters, windows: Sequence[mmap.mmap], datapaths: Mapping[str, str]) -> Row:
    """Totals since `up`; bytes include those of open pairs."""
    up_bytes = counters.total(Counter.UP_BYTES)
    down_bytes = counters.total(Counter.DOWN_BYTES)
    for memory in windows:
        for record in read_records(memory):
            for direction in Direction:
                carried = (
                    record.worker[direction].carried_bytes
                    + record.verdict[direction].redirected_bytes
                )
                if direction is Direction.UP:
                    up_bytes += carried
                else:
                    down_bytes += carried
    return {
        "accepted": counters.total(Counter.ACCEPTED),
        "open": counters.total(Counter.OPEN),
        "pairs_open": counters.total(Counter.PAIRS_OPEN),
        "pairs_opened": counters.total(Counter.PAIRS_OPENED),
        "joined": {
            "copy": counters.total(Counter.JOINED_COPY),
            "sockmap": counters.total(Counter.JOINED_SOCKMAP),
            "splice": counters.total(Counter.JOINED_SPLICE),
        },
        "closed": {
            reason.value: count
            for reason, index in CLOSED_INDEX.items()
            if (count := counters.total(index))
        },
        "bytes_up": up_bytes,
        "bytes_down": down_bytes,
        "first_packet_full": counters.total(Counter.FIRST_PACKET_FULL),
        "first_packet_timeout": counters.total(Counter.FIRST_PACKET_TIMEOUT),
        "accept_paused": counters.total(Counter.ACCEPT_PAUSED),
        "datapaths": dict(datapaths),
    }
