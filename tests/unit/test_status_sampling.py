"""What the page shows of a pair table and of counters, sample by sample; and its history."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, DatapathKind, PairState
from pyforwarder.datapath.ebpf.pair_table import DATAPATH, STATE
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    ListenerCounter,
    ServerCounter,
    ServerFailure,
)
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.status.history import KEPT_S, STEP_S, History
from pyforwarder.status.pair_rows import MOST_ROWS, SORTS
from pyforwarder.status.plan import ServerPlan
from pyforwarder.status.sampling import LANES, Sampler, ServerNow, Traffic
from tests.helpers.status import Memory


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def sampler(memory: Memory) -> Sampler:
    return Sampler(memory.plan, memory.counters, memory.windows)


def page(sampler: Sampler, **how: Any) -> dict[str, Any]:
    wanted = {"sort": "id", "rising": True, "filter": "", "first": 0, "count": 100, "now_ns": 0}
    return sampler.rows.page(**{**wanted, **how})


def ids(sampler: Sampler, **how: Any) -> list[int]:
    return [row["id"] for row in page(sampler, **how)["rows"]]


def test_a_look_says_what_went_by_since_the_one_before(memory: Memory, sampler: Sampler) -> None:
    old = memory.pair(1)
    memory.carry(old, 1000, 5000)
    first = sampler.sample(100.0)
    # Nobody knows since when those bytes came.
    assert (first.span_s, first.total) == (0.0, Traffic(1, 0, 0, 0, 1000, 5000))
    memory.carry(old, 1300, 5000)
    new = memory.pair(2, worker=1, rule="rest", datapath=DatapathKind.COPY)
    memory.carry(new, 70, 9, worker=1)
    memory.accepted("web", 3)
    memory.taken("web", "rest")
    second = sampler.sample(102.0)
    assert second.span_s == 2.0
    assert (second.total.pairs, second.total.up_bytes, second.total.down_bytes) == (2, 370, 9)
    lanes = dict(zip((kind.label for kind in LANES), second.lanes, strict=True))
    assert (lanes["sockmap"].pairs, lanes["sockmap"].up_bytes) == (1, 300)
    assert (lanes["copy"].pairs, lanes["copy"].up_bytes, lanes["copy"].down_bytes) == (1, 70, 9)
    assert second.listeners == [Traffic(2, 370, 9, 3, 1370, 5009), Traffic()]
    assert second.rules == [
        Traffic(1, 300, 0, 0, 1300, 5000),
        Traffic(1, 70, 9, 1, 70, 9),
        Traffic(),
    ]
    assert [traffic.up_bytes for traffic in second.servers] == [300, 0, 0]
    rows = {row["id"]: row for row in page(sampler)["rows"]}
    assert (rows[1]["up_per_s"], rows[1]["down_per_s"]) == (150, 0)
    assert (rows[2]["up_per_s"], rows[2]["up_bytes"], rows[2]["rule"]) == (35, 70, "rest")


def test_bytes_of_pairs_that_ended_are_in_the_totals(memory: Memory, sampler: Sampler) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 2000)
    sampler.sample(1.0)
    memory.writers[0].release(slot)
    memory.count(Counter.UP_BYTES, 1500)
    memory.count(Counter.DOWN_BYTES, 2000)
    memory.count(CLOSED_INDEX[CloseReason.FINISHED])
    sample = sampler.sample(2.0)
    assert (sample.total.pairs, sample.total.up_bytes, sample.total.down_bytes) == (0, 500, 0)
    assert (sample.up_bytes, sample.down_bytes) == (1500, 2000)
    assert sample.counts["ends"] == [("finished", 1, 1)]
    assert sampler.sample(3.0).counts["ends"] == [("finished", 1, 0)]


def test_a_listener_s_bytes_are_those_of_pairs_that_ended_too(
    memory: Memory, sampler: Sampler
) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 2000)
    sampler.sample(1.0)
    memory.writers[0].release(slot)
    first = memory.directory.index("web")
    memory.count(first + ListenerCounter.UP_BYTES, 1500)
    memory.count(first + ListenerCounter.DOWN_BYTES, 2000)
    # Another came and went between the two samples.
    memory.count(first + ListenerCounter.DOWN_BYTES, 70)
    sample = sampler.sample(2.0)
    assert (sample.listeners[0].up_bytes, sample.listeners[0].down_bytes) == (500, 70)
    assert sample.rules[0].up_bytes == 0


def test_what_workers_count_of_a_server_is_shown(memory: Memory) -> None:
    index = memory.directory.server_index("pool", "10.0.0.1:443")
    assert index is not None
    servers = (ServerPlan("pool", "10.0.0.1:443", index, is_checked=True),)
    sampler = Sampler(replace(memory.plan, servers=servers), memory.counters, memory.windows)
    for word, by in (
        (ServerCounter.HELD, 3),
        (ServerCounter.DRAINED, 1),
        (ServerCounter.CONNECTS, 40),
        (ServerCounter.FAILURES + ServerFailure.REFUSED, 2),
        (ServerCounter.FAILURES + ServerFailure.LOCAL, 1),
    ):
        memory.count(index + word, by, worker=1)
    assert sampler.sample(1.0).counts["servers"] == [ServerNow(3, False, True, 40, 3)]
    memory.count(index + ServerCounter.CONNECTS, 5)
    assert sampler.sample(2.0).servers[0].new == 5


def test_totals_do_not_go_back_where_a_worker_died(memory: Memory, sampler: Sampler) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 0)
    sampler.sample(1.0)
    memory.writers[0].release(slot)  # and nobody has counted what it carried
    assert sampler.sample(2.0).total.up_bytes == 0
    memory.count(Counter.UP_BYTES, 400)
    assert sampler.sample(3.0).up_bytes == 1000


def test_a_pair_that_is_described_anew_goes_on_and_another_in_its_slot_does_not(
    memory: Memory, sampler: Sampler
) -> None:
    slot = memory.pair(1, rule="", state=PairState.SNIFFING, datapath=DatapathKind.NONE)
    memory.carry(slot, 100, 0)
    sampler.sample(1.0)
    memory.describe(slot, 1)
    memory.carry(slot, 150, 0)
    assert sampler.sample(2.0).total.up_bytes == 50
    (row,) = page(sampler)["rows"]
    assert (row["rule"], row["state"], row["up_bytes"]) == ("tls", "joined", 150)
    memory.describe(slot, 2)
    memory.carry(slot, 30, 0)
    sample = sampler.sample(3.0)
    assert (page(sampler)["rows"][0]["up_per_s"], sample.rules[0].up_bytes) == (30, 30)


def test_a_pair_belongs_to_its_server_by_address_and_by_the_port_of_a_name(
    memory: Memory, sampler: Sampler
) -> None:
    for number, server in enumerate(
        (
            Address("10.0.0.2", 443),
            Address("203.0.113.5", 8443),  # an address of host.example
            Address("203.0.113.5", 1),
        )
    ):
        memory.pair(number, server=server)
    memory.pair(9, rule="rest", server=Address("10.0.0.1", 443))  # not by this upstream
    memory.pair(10, listener="forward", rule="x")
    sample = sampler.sample(1.0)
    assert [traffic.pairs for traffic in sample.servers] == [0, 1, 1]
    assert [traffic.pairs for traffic in sample.upstreams] == [3]
    assert [traffic.pairs for traffic in sample.listeners] == [4, 0]
    assert sample.total.pairs == 5


def test_a_server_with_the_port_of_the_client_is_known_by_its_address(memory: Memory) -> None:
    servers = (ServerPlan("pool", "10.0.0.7:same", None, is_checked=False), *memory.plan.servers)
    sampler = Sampler(replace(memory.plan, servers=servers), memory.counters, memory.windows)
    for port in (9200, 9201):
        memory.pair(port, server=Address("10.0.0.7", port))
    assert [traffic.pairs for traffic in sampler.sample(1.0).servers] == [2, 0, 0, 0]


def test_a_page_is_filtered_ordered_and_cut(memory: Memory, sampler: Sampler) -> None:
    for number in range(1, 31):
        memory.pair(
            number,
            client=f"192.0.2.{number % 3}",
            rule="tls" if number % 2 else "rest",
            started_ns=int(1e9) * number,
        )
    sampler.sample(1.0)
    slots = range(30)
    for slot in slots:
        memory.carry(slot, 1000 * (slot % 7), 10 * slot)
    sampler.sample(2.0)
    assert ids(sampler, first=5, count=3) == [6, 7, 8]
    assert ids(sampler, sort="id", rising=False, count=2) == [30, 29]
    assert ids(sampler, sort="age", rising=False, count=2) == [1, 2]
    # Equal ones by their ids, both ways.
    assert ids(sampler, sort="up", rising=False, count=5) == [7, 14, 21, 28, 6]
    assert ids(sampler, sort="up", rising=True, count=6) == [1, 8, 15, 22, 29, 2]
    assert ids(sampler, sort="down", rising=False, count=1) == [30]
    found = page(sampler, filter="  TLS 192.0.2.1: ")
    assert [row["id"] for row in found["rows"]] == [1, 7, 13, 19, 25]
    assert (found["total"], found["shown"]) == (30, 5)
    assert page(sampler, filter="nothing")["rows"] == []
    assert ids(sampler, filter="joined sockmap", count=1) == [1]
    assert ids(sampler, first=10**9) == []
    for sort in SORTS:
        assert sorted(ids(sampler, sort=sort)) == list(range(1, 31))
    with pytest.raises(KeyError):
        page(sampler, sort="nothing")


def test_a_page_has_no_more_rows_than_a_screen(memory: Memory) -> None:
    large = Memory(slots=256)
    sampler = Sampler(large.plan, large.counters, large.windows)
    for number in range(200):
        large.pair(number)
    sampler.sample(1.0)
    assert len(page(sampler, count=10**9)["rows"]) == MOST_ROWS


def test_orders_are_kept_for_one_sample_and_are_few(memory: Memory, sampler: Sampler) -> None:
    memory.pair(1)
    sampler.sample(1.0)
    for number in range(1000):
        assert ids(sampler, filter=f"x{number}") == []
    assert len(sampler.rows._orders) <= 32
    sampler.sample(2.0)
    assert sampler.rows._orders == {}


def test_idle_and_age_are_of_the_moment(memory: Memory, sampler: Sampler) -> None:
    busy = memory.pair(1, started_ns=int(1e9))
    memory.pair(2, started_ns=int(5e9))
    memory.carry(busy, 1, 1, now_ns=int(9e9))
    sampler.sample(1.0)
    rows = {row["id"]: row for row in page(sampler, now_ns=int(10e9))["rows"]}
    assert (rows[1]["age_s"], rows[1]["idle_s"]) == (9, 1)
    assert (rows[2]["age_s"], rows[2]["idle_s"]) == (5, 5)
    assert ids(sampler, sort="idle", rising=False) == [2, 1]
    assert ids(sampler, sort="idle", rising=True) == [1, 2]


def test_ids_of_a_listener_and_of_a_rule_are_found(memory: Memory, sampler: Sampler) -> None:
    memory.pair(1)
    memory.pair(2, rule="rest", worker=1)
    memory.pair(3, listener="dns", rule="all")
    sampler.sample(1.0)
    assert sorted(sampler.rows.pair_ids(listener="web")) == [1, 2]
    assert sampler.rows.pair_ids(listener="web", rule="rest") == [2]
    assert sampler.rows.pair_ids(listener="dns", rule="rest") == []


def test_what_makes_no_sense_in_a_window_is_left_out(memory: Memory, sampler: Sampler) -> None:
    good = memory.pair(1)
    memory.carry(good, 5, 5)
    for change in ((STATE, 77), (DATAPATH, 99)):
        slot = memory.pair(2, worker=1)
        memory.windows[1][slot * PAIR_BYTES + change[0]] = change[1]
    slot = memory.pair(3, worker=1)
    at = slot * PAIR_BYTES
    memory.windows[1][at : at + 64] = b"\xff" * 64  # counters without end
    memory.pair(4, worker=1, rule="\udcff\x1b".encode("utf-8", "replace").decode())
    sampler.sample(1.0)
    sampler.sample(2.0)
    assert sorted(ids(sampler)) == [1, 3, 4]
    whole = memoryview(memory.windows[1])
    whole[:] = b"\xff" * len(whole)
    sampler.sample(3.0)
    assert ids(sampler) == [1]


def test_what_was_known_is_forgotten(memory: Memory, sampler: Sampler) -> None:
    memory.carry(memory.pair(1), 100, 0)
    sampler.sample(1.0)
    sampler.forget()
    memory.carry(0, 200, 0)
    assert sampler.sample(1000.0).span_s == 0.0


def test_ten_thousand_pairs_are_a_fraction_of_a_second() -> None:
    memory = Memory(slots=8192)
    sampler = Sampler(memory.plan, memory.counters, memory.windows)
    for number in range(10_000):
        memory.pair(number, worker=number % 2, rule="tls" if number % 3 else "rest")
    sampler.sample(1.0)
    begun_s = time.process_time()
    for at_s in range(2, 7):
        sampler.sample(float(at_s))
        assert page(sampler, sort="rate", rising=False, filter="rest")["shown"] == 3334
    # 50 ms a sample on a machine of today; a slow one is ten times slower.
    assert (time.process_time() - begun_s) / 5 < scaled_s(0.5)


# ---------------------------------------------------------------- history


def add(history: History, sampler: Sampler, at_s: float) -> dict[str, Any] | None:
    return history.add(sampler.sample(at_s), 1000.0 + at_s)


def test_a_point_is_the_mean_of_five_seconds(memory: Memory, sampler: Sampler) -> None:
    history = History(memory.plan)
    slot = memory.pair(1)
    points = []
    for second in range(12):
        memory.carry(slot, 100 * second, 0)
        points.append(add(history, sampler, float(second)))
    told = [point for point in points if point]
    assert [point["at"] for point in told] == [1005, 1010]
    assert told[0]["span"] == STEP_S
    assert told[0]["series"]["t"] == [100, 0, 0]
    assert (
        told[0]["series"]["r0"] == told[0]["series"]["s0"] == told[0]["series"]["l0"] == [100, 0, 0]
    )
    assert told[0]["series"]["r1"] == [0, 0, 0]
    whole = history.as_json(1012.0)
    assert (whole["at"], whole["span"]) == ([1005, 1010], [5, 5])
    assert whole["series"]["l0"] == [[100, 100], [0, 0], [0, 0]]


def test_a_time_when_nobody_looked_is_one_long_point(memory: Memory, sampler: Sampler) -> None:
    history = History(memory.plan)
    slot = memory.pair(1)
    add(history, sampler, 0.0)
    memory.carry(slot, 60_000, 0)
    point = add(history, sampler, 600.0)
    assert point is not None
    assert (point["span"], point["series"]["t"][0]) == (600, 100)


def test_history_is_of_a_fixed_size_and_ends_after_15_minutes(
    memory: Memory, sampler: Sampler
) -> None:
    history = History(memory.plan)
    for second in range(0, 3000, 5):
        add(history, sampler, float(second))
    assert len(history.as_json(3995.0)["at"]) == 180
    assert len(history.as_json(3995.0 + KEPT_S / 2)["at"]) == 90
    assert history.as_json(9999.0)["at"] == []
