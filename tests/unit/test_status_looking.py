"""What the page shows of a pair table and of counters, look by look; and its history."""

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
from pyforwarder.status.history import KEPT_S, STEP_S, History
from pyforwarder.status.looking import LANES, MOST_ROWS, SORTS, Flow, Looker, ServerNow, ServerPlan
from tests.helpers.status import Memory


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def looker(memory: Memory) -> Looker:
    return Looker(memory.plan, memory.counters, memory.windows)


def page(looker: Looker, **how: Any) -> dict[str, Any]:
    wanted = {"sort": "id", "rising": True, "filter": "", "first": 0, "count": 100, "now_ns": 0}
    return looker.page(**{**wanted, **how})


def ids(looker: Looker, **how: Any) -> list[int]:
    return [row["id"] for row in page(looker, **how)["rows"]]


def test_a_look_says_what_went_by_since_the_one_before(memory: Memory, looker: Looker) -> None:
    old = memory.pair(1)
    memory.carry(old, 1000, 5000)
    first = looker.look(100.0)
    # Nobody knows since when those bytes came.
    assert (first.span_s, first.total) == (0.0, Flow(1, 0, 0, 0, 1000, 5000))
    memory.carry(old, 1300, 5000)
    new = memory.pair(2, worker=1, rule="rest", datapath=DatapathKind.COPY)
    memory.carry(new, 70, 9, worker=1)
    memory.accepted("web", 3)
    memory.taken("web", "rest")
    second = looker.look(102.0)
    assert second.span_s == 2.0
    assert (second.total.pairs, second.total.up_bytes, second.total.down_bytes) == (2, 370, 9)
    lanes = dict(zip((kind.label for kind in LANES), second.lanes, strict=True))
    assert (lanes["sockmap"].pairs, lanes["sockmap"].up_bytes) == (1, 300)
    assert (lanes["copy"].pairs, lanes["copy"].up_bytes, lanes["copy"].down_bytes) == (1, 70, 9)
    assert second.listeners == [Flow(2, 370, 9, 3, 1370, 5009), Flow()]
    assert second.rules == [Flow(1, 300, 0, 0, 1300, 5000), Flow(1, 70, 9, 1, 70, 9), Flow()]
    assert [flow.up_bytes for flow in second.servers] == [300, 0, 0]
    rows = {row["id"]: row for row in page(looker)["rows"]}
    assert (rows[1]["up_per_s"], rows[1]["down_per_s"]) == (150, 0)
    assert (rows[2]["up_per_s"], rows[2]["up_bytes"], rows[2]["rule"]) == (35, 70, "rest")


def test_bytes_of_pairs_that_ended_are_in_the_totals(memory: Memory, looker: Looker) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 2000)
    looker.look(1.0)
    memory.writers[0].release(slot)
    memory.count(Counter.UP_BYTES, 1500)
    memory.count(Counter.DOWN_BYTES, 2000)
    memory.count(CLOSED_INDEX[CloseReason.FINISHED])
    look = looker.look(2.0)
    assert (look.total.pairs, look.total.up_bytes, look.total.down_bytes) == (0, 500, 0)
    assert (look.up_bytes, look.down_bytes) == (1500, 2000)
    assert look.counts["ends"] == [("finished", 1, 1)]
    assert looker.look(3.0).counts["ends"] == [("finished", 1, 0)]


def test_a_listener_s_bytes_are_those_of_pairs_that_ended_too(
    memory: Memory, looker: Looker
) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 2000)
    looker.look(1.0)
    memory.writers[0].release(slot)
    first = memory.directory.index("web")
    memory.count(first + ListenerCounter.UP_BYTES, 1500)
    memory.count(first + ListenerCounter.DOWN_BYTES, 2000)
    # Another came and went between the two looks.
    memory.count(first + ListenerCounter.DOWN_BYTES, 70)
    look = looker.look(2.0)
    assert (look.listeners[0].up_bytes, look.listeners[0].down_bytes) == (500, 70)
    assert look.rules[0].up_bytes == 0


def test_what_workers_count_of_a_server_is_shown(memory: Memory) -> None:
    index = memory.directory.server_index("pool", "10.0.0.1:443")
    assert index is not None
    servers = (ServerPlan("pool", "10.0.0.1:443", index, is_checked=True),)
    looker = Looker(replace(memory.plan, servers=servers), memory.counters, memory.windows)
    for word, by in (
        (ServerCounter.HELD, 3),
        (ServerCounter.DRAINED, 1),
        (ServerCounter.CONNECTS, 40),
        (ServerCounter.FAILURES + ServerFailure.REFUSED, 2),
        (ServerCounter.FAILURES + ServerFailure.LOCAL, 1),
    ):
        memory.count(index + word, by, worker=1)
    assert looker.look(1.0).counts["servers"] == [ServerNow(3, False, True, 40, 3)]
    memory.count(index + ServerCounter.CONNECTS, 5)
    assert looker.look(2.0).servers[0].new == 5


def test_totals_do_not_go_back_where_a_worker_died(memory: Memory, looker: Looker) -> None:
    slot = memory.pair(1)
    memory.carry(slot, 1000, 0)
    looker.look(1.0)
    memory.writers[0].release(slot)  # and nobody has counted what it carried
    assert looker.look(2.0).total.up_bytes == 0
    memory.count(Counter.UP_BYTES, 400)
    assert looker.look(3.0).up_bytes == 1000


def test_a_pair_that_is_described_anew_goes_on_and_another_in_its_slot_does_not(
    memory: Memory, looker: Looker
) -> None:
    slot = memory.pair(1, rule="", state=PairState.SNIFFING, datapath=DatapathKind.NONE)
    memory.carry(slot, 100, 0)
    looker.look(1.0)
    memory.describe(slot, 1)
    memory.carry(slot, 150, 0)
    assert looker.look(2.0).total.up_bytes == 50
    (row,) = page(looker)["rows"]
    assert (row["rule"], row["state"], row["up_bytes"]) == ("tls", "joined", 150)
    memory.describe(slot, 2)
    memory.carry(slot, 30, 0)
    look = looker.look(3.0)
    assert (page(looker)["rows"][0]["up_per_s"], look.rules[0].up_bytes) == (30, 30)


def test_a_pair_belongs_to_its_server_by_address_and_by_the_port_of_a_name(
    memory: Memory, looker: Looker
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
    look = looker.look(1.0)
    assert [flow.pairs for flow in look.servers] == [0, 1, 1]
    assert [flow.pairs for flow in look.upstreams] == [3]
    assert [flow.pairs for flow in look.listeners] == [4, 0]
    assert look.total.pairs == 5


def test_a_server_with_the_port_of_the_client_is_known_by_its_address(memory: Memory) -> None:
    servers = (ServerPlan("pool", "10.0.0.7:same", None, is_checked=False), *memory.plan.servers)
    looker = Looker(replace(memory.plan, servers=servers), memory.counters, memory.windows)
    for port in (9200, 9201):
        memory.pair(port, server=Address("10.0.0.7", port))
    assert [flow.pairs for flow in looker.look(1.0).servers] == [2, 0, 0, 0]


def test_a_page_is_filtered_ordered_and_cut(memory: Memory, looker: Looker) -> None:
    for number in range(1, 31):
        memory.pair(
            number,
            client=f"192.0.2.{number % 3}",
            rule="tls" if number % 2 else "rest",
            started_ns=int(1e9) * number,
        )
    looker.look(1.0)
    slots = range(30)
    for slot in slots:
        memory.carry(slot, 1000 * (slot % 7), 10 * slot)
    looker.look(2.0)
    assert ids(looker, first=5, count=3) == [6, 7, 8]
    assert ids(looker, sort="id", rising=False, count=2) == [30, 29]
    assert ids(looker, sort="age", rising=False, count=2) == [1, 2]
    # Equal ones by their ids, both ways.
    assert ids(looker, sort="up", rising=False, count=5) == [7, 14, 21, 28, 6]
    assert ids(looker, sort="up", rising=True, count=6) == [1, 8, 15, 22, 29, 2]
    assert ids(looker, sort="down", rising=False, count=1) == [30]
    found = page(looker, filter="  TLS 192.0.2.1: ")
    assert [row["id"] for row in found["rows"]] == [1, 7, 13, 19, 25]
    assert (found["total"], found["shown"]) == (30, 5)
    assert page(looker, filter="nothing")["rows"] == []
    assert ids(looker, filter="joined sockmap", count=1) == [1]
    assert ids(looker, first=10**9) == []
    for sort in SORTS:
        assert sorted(ids(looker, sort=sort)) == list(range(1, 31))
    with pytest.raises(KeyError):
        page(looker, sort="nothing")


def test_a_page_has_no_more_rows_than_a_screen(memory: Memory) -> None:
    large = Memory(slots=256)
    looker = Looker(large.plan, large.counters, large.windows)
    for number in range(200):
        large.pair(number)
    looker.look(1.0)
    assert len(page(looker, count=10**9)["rows"]) == MOST_ROWS


def test_orders_that_are_kept_are_few_and_end_with_the_look(memory: Memory, looker: Looker) -> None:
    memory.pair(1)
    looker.look(1.0)
    for number in range(1000):
        assert ids(looker, filter=f"x{number}") == []
    assert len(looker._orders) <= 32
    looker.look(2.0)
    assert looker._orders == {}


def test_idle_and_age_are_of_the_moment(memory: Memory, looker: Looker) -> None:
    busy = memory.pair(1, started_ns=int(1e9))
    memory.pair(2, started_ns=int(5e9))
    memory.carry(busy, 1, 1, now_ns=int(9e9))
    looker.look(1.0)
    rows = {row["id"]: row for row in page(looker, now_ns=int(10e9))["rows"]}
    assert (rows[1]["age_s"], rows[1]["idle_s"]) == (9, 1)
    assert (rows[2]["age_s"], rows[2]["idle_s"]) == (5, 5)
    assert ids(looker, sort="idle", rising=False) == [2, 1]
    assert ids(looker, sort="idle", rising=True) == [1, 2]


def test_ids_of_a_listener_and_of_a_rule_are_found(memory: Memory, looker: Looker) -> None:
    memory.pair(1)
    memory.pair(2, rule="rest", worker=1)
    memory.pair(3, listener="dns", rule="all")
    looker.look(1.0)
    assert sorted(looker.pair_ids(listener="web")) == [1, 2]
    assert looker.pair_ids(listener="web", rule="rest") == [2]
    assert looker.pair_ids(listener="dns", rule="rest") == []


def test_what_makes_no_sense_in_a_window_is_left_out(memory: Memory, looker: Looker) -> None:
    good = memory.pair(1)
    memory.carry(good, 5, 5)
    for change in ((STATE, 77), (DATAPATH, 99)):
        slot = memory.pair(2, worker=1)
        memory.windows[1][slot * PAIR_BYTES + change[0]] = change[1]
    slot = memory.pair(3, worker=1)
    at = slot * PAIR_BYTES
    memory.windows[1][at : at + 64] = b"\xff" * 64  # counters without end
    memory.pair(4, worker=1, rule="\udcff\x1b".encode("utf-8", "replace").decode())
    looker.look(1.0)
    looker.look(2.0)
    assert sorted(ids(looker)) == [1, 3, 4]
    whole = memoryview(memory.windows[1])
    whole[:] = b"\xff" * len(whole)
    looker.look(3.0)
    assert ids(looker) == [1]


def test_what_was_known_is_forgotten(memory: Memory, looker: Looker) -> None:
    memory.carry(memory.pair(1), 100, 0)
    looker.look(1.0)
    looker.forget()
    memory.carry(0, 200, 0)
    assert looker.look(1000.0).span_s == 0.0


def test_ten_thousand_pairs_are_a_fraction_of_a_second() -> None:
    memory = Memory(slots=8192)
    looker = Looker(memory.plan, memory.counters, memory.windows)
    for number in range(10_000):
        memory.pair(number, worker=number % 2, rule="tls" if number % 3 else "rest")
    looker.look(1.0)
    begun_s = time.process_time()
    for at_s in range(2, 7):
        looker.look(float(at_s))
        assert page(looker, sort="rate", rising=False, filter="rest")["shown"] == 3334
    # 50 ms a look on a machine of today; a slow one is ten times slower.
    assert (time.process_time() - begun_s) / 5 < 0.5


# ---------------------------------------------------------------- history


def add(history: History, looker: Looker, at_s: float) -> dict[str, Any] | None:
    return history.add(looker.look(at_s), 1000.0 + at_s)


def test_a_point_is_the_mean_of_five_seconds(memory: Memory, looker: Looker) -> None:
    history = History(memory.plan)
    slot = memory.pair(1)
    points = []
    for second in range(12):
        memory.carry(slot, 100 * second, 0)
        points.append(add(history, looker, float(second)))
    told = [point for point in points if point]
    assert [point["at"] for point in told] == [1005, 1010]
    assert told[0]["span"] == STEP_S
    assert told[0]["series"]["t"] == [100, 0, 0]
    assert (
        told[0]["series"]["r0"] == told[0]["series"]["s0"] == told[0]["series"]["l0"] == [100, 0, 0]
    )
    assert told[0]["series"]["r1"] == [0, 0, 0]
    whole = history.told(1012.0)
    assert (whole["at"], whole["span"]) == ([1005, 1010], [5, 5])
    assert whole["series"]["l0"] == [[100, 100], [0, 0], [0, 0]]


def test_a_time_when_nobody_looked_is_one_long_point(memory: Memory, looker: Looker) -> None:
    history = History(memory.plan)
    slot = memory.pair(1)
    add(history, looker, 0.0)
    memory.carry(slot, 60_000, 0)
    point = add(history, looker, 600.0)
    assert point is not None
    assert (point["span"], point["series"]["t"][0]) == (600, 100)


def test_history_is_of_a_fixed_size_and_ends_after_15_minutes(
    memory: Memory, looker: Looker
) -> None:
    history = History(memory.plan)
    for second in range(0, 3000, 5):
        add(history, looker, float(second))
    assert len(history.told(3995.0)["at"]) == 180
    assert len(history.told(3995.0 + KEPT_S / 2)["at"]) == 90
    assert history.told(9999.0)["at"] == []
