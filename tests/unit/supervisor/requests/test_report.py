"""What `show stats` answers, and the lines from which the kernel prints the same."""

from __future__ import annotations

import mmap

from pyforwarder.config import parse_config
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    LineKind,
    PairRecord,
    ViewLine,
)
from pyforwarder.datapath.ebpf.arrays import STAT_LINES
from pyforwarder.runtime import tables
from pyforwarder.runtime.counters import BLOCK_WORDS, CLOSED_INDEX, Counter, Counters
from pyforwarder.supervisor.requests import report

DATAPATHS = {"copy": "available", "sockmap": "failed:\nno"}


def test_the_kernels_lines_are_the_daemons_answer() -> None:
    counters = Counters(Counters.memory(1))
    for index in range(BLOCK_WORDS):
        counters.block(0)[index] = index + 1
    row = report.stats(counters, [mmap.mmap(-1, 8 * PAIR_BYTES)], DATAPATHS)
    said = {str(r["stat"]): r["value"] for r in tables.stats_rows(row)}
    lines = report.stats_lines(DATAPATHS)
    assert {line.name for line in lines} == set(said)
    for line in lines:
        if line.kind is not LineKind.TEXT:
            also = line.also and line.also + 1
            assert said[line.name] == line.word + 1 + also, line.name
    assert said["datapaths.sockmap"] == "failed:\nno"
    assert lines[-1].text == "failed:; no"


def test_reasons_that_never_came_are_left_out() -> None:
    counters = Counters(Counters.memory(1))
    counters.block(0)[CLOSED_INDEX[CloseReason.IDLE]] = 3
    counters.block(0)[Counter.UP_BYTES] = 5
    row = report.stats(counters, [], DATAPATHS)
    assert row["closed"] == {"idle": 3}
    assert (row["bytes_up"], row["bytes_down"]) == (5, 0)
    assert row["joined"] == {"copy": 0, "sockmap": 0, "splice": 0, "express": 0}


def test_the_checking_machine_is_the_last_column_of_a_server() -> None:
    config = parse_config(
        "upstreams:\n  web: {servers: [{address: '10.0.0.1:1', weight: 3}, "
        "{address: '10.0.0.2:1', backup: true}]}\n",
        source="test",
    )
    seen = {"web": {"10.0.0.1:1": {"state": "down", "pairs": 1, "connects": 2, "failures": 3}}}
    checkers = {("web", "10.0.0.2:1"): "edge-2", ("other", "10.0.0.1:1"): "here"}
    rows = report.upstream_rows(config, [seen, {}], {}, checkers)
    assert [row["checked_by"] for row in rows] == [None, "edge-2"]
    text = tables.render("upstreams", rows)
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "UPSTREAM SERVER STATE PAIRS CONNECTS FAILURES WEIGHT BACKUP CHECKED_BY",
        "web 10.0.0.1:1 down 1 2 3 3 no -",
        "web 10.0.0.2:1 up 0 0 0 1 yes edge-2",
    ]


def test_every_line_fits() -> None:
    lines = report.stats_lines(DATAPATHS)
    assert len(lines) <= STAT_LINES
    assert all(len(line.name) < ViewLine.name.size for line in lines)


def test_what_is_not_told_of_is_unknown_only_where_the_kernel_has_carried_bytes() -> None:
    record = PairRecord()
    record.datapath = DatapathKind.SOCKMAP
    unknown = report.Backlogs({}, is_complete=False)
    assert unknown.of(0, record) == 0
    record.kernel[Direction.DOWN].redirected_bytes = 1
    assert unknown.of(0, record) is None
    assert report.Backlogs({}).of(0, record) == 0
    assert report.Backlogs({(0, Direction.DOWN): 5}, is_complete=False).of(0, record) == 5
