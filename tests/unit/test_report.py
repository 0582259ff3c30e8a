"""What `show stats` answers, and the lines from which the kernel prints the same."""

from __future__ import annotations

import mmap

from pyforwarder import tables
from pyforwarder.counters import BLOCK_WORDS, CLOSED_INDEX, Counter, Counters
from pyforwarder.datapath.abi import PAIR_BYTES, LineKind, ViewLine
from pyforwarder.datapath.arrays import STAT_LINES
from pyforwarder.reasons import CloseReason
from pyforwarder.supervisor import report

DATAPATHS = {"copy": "available", "sockmap": "failed:\nno"}


def test_the_kernels_lines_are_the_daemons_answer() -> None:
    counters = Counters(Counters.memory(1), 1)
    for index in range(BLOCK_WORDS):
        counters.block(0)[index] = index + 1
    row = report.stats(counters, [mmap.mmap(-1, 8 * PAIR_BYTES)], DATAPATHS)
    said = {str(r["stat"]): r["value"] for r in tables.stats_rows(row)}
    lines = report.stats_lines(DATAPATHS)
    assert {line.name for line in lines} == set(said)
    for line in lines:
        if line.kind is not LineKind.TEXT:
            assert said[line.name] == line.word + 1, line.name
    assert said["datapaths.sockmap"] == "failed:\nno"
    assert lines[-1].text == "failed:\\012no"


def test_reasons_that_never_came_are_left_out() -> None:
    counters = Counters(Counters.memory(1), 1)
    counters.block(0)[CLOSED_INDEX[CloseReason.IDLE]] = 3
    counters.block(0)[Counter.UP_BYTES] = 5
    row = report.stats(counters, [], DATAPATHS)
    assert row["closed"] == {"idle": 3}
    assert (row["bytes_up"], row["bytes_down"]) == (5, 0)
    assert row["joined"] == {"copy": 0, "sockmap": 0, "splice": 0}


def test_every_line_fits() -> None:
    lines = report.stats_lines(DATAPATHS)
    assert len(lines) <= STAT_LINES
    assert all(len(line.name) < ViewLine.name.size for line in lines)
