"""What Prometheus is told, read by Prometheus's own parser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    CONNECT_BOUNDS_S,
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    EXPRESS_CONNECT_FAILED,
    NAMED_FIRST,
    Counter,
    ListenerCounter,
    RuleCounter,
    ServerCounter,
    count_connect,
    count_disconnect,
    count_failure,
    observe,
)
from pyforwarder.status import table
from tests.helpers.forwarder_memory import Forwarder

OPERATING = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
DASHBOARD = Path(__file__).parents[2] / "scripts/grafana/pyforwarder.json"


@pytest.fixture
def forwarder() -> Forwarder:
    return Forwarder()


def test_machines_of_a_fleet_are_told_of_by_their_names() -> None:
    found = Forwarder().scrape()
    assert found["pyforwarder_fleet_instance_info"] == {("one", "1"): 1}
    assert found["pyforwarder_fleet_pairs"] == {("one",): 6}
    assert found["pyforwarder_fleet_serial"] == {("one",): 4}
    assert found["pyforwarder_fleet_refused_serial"] == {("one",): 5}
    available = {("copy", "one"): 1, ("splice", "one"): 0}
    assert found["pyforwarder_fleet_datapath_available"] == available


def test_how_long_the_store_is_silent_is_told_as_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 12.5)
    found = Forwarder().scrape()
    assert found["pyforwarder_fleet_store_silent_seconds"] == {("health",): 12.5}
    assert found["pyforwarder_fleet_store_unusable_total"] == {("health",): 3}


def test_workers_are_summed(forwarder: Forwarder) -> None:
    base = forwarder.directory.index("web")
    for worker, count in ((0, 23), (1, 4)):
        forwarder.add(worker, base + ListenerCounter.ACCEPTED, count)
        forwarder.add(worker, CLOSED_INDEX[CloseReason.DENIED], count)
        forwarder.add(worker, forwarder.directory.index("web", "any") + RuleCounter.TAKEN, count)
        forwarder.add(worker, Counter.JOINED_SOCKMAP, count)
    found = forwarder.scrape()
    assert found["pyforwarder_connections_accepted_total"] == {("main",): 0, ("web",): 27}
    assert found["pyforwarder_connections_closed_total"][("denied",)] == 27
    assert found["pyforwarder_rule_taken_total"] == {("main", "any"): 0, ("web", "any"): 27}
    assert found["pyforwarder_pairs_joined_total"][("sockmap",)] == 27


def test_connects_of_the_kernel_that_failed_are_added_to_those_of_workers(
    forwarder: Forwarder,
) -> None:
    forwarder.add(0, Counter.CONNECT_FAILED, 3)
    forwarder.add(1, Counter.CONNECT_FAILED, 4)
    forwarder.add(0, EXPRESS_CONNECT_FAILED, 5)
    assert forwarder.scrape()["pyforwarder_connects_failed_total"] == {(): 12}


def test_label_sets_are_there_from_the_first_scrape_and_bounded(forwarder: Forwarder) -> None:
    first = forwarder.scrape()
    assert set(first["pyforwarder_connections_closed_total"]) == {(r.value,) for r in CloseReason}
    for state in PairState:
        if state:
            forwarder.pair(0, state, DatapathKind.COPY, 0, 0)
            forwarder.pair(1, state, DatapathKind.SPLICE, 0, 0)
    again = forwarder.scrape()
    states = {state.label for state in PairState if state}
    assert {labels[1] for labels in again["pyforwarder_pairs"]} == states
    assert {labels[0] for labels in again["pyforwarder_pairs"]} == {
        "none",
        "copy",
        "sockmap",
        "splice",
    }


def test_pairs_are_counted_by_state_and_datapath(forwarder: Forwarder) -> None:
    forwarder.pair(0, PairState.JOINED, DatapathKind.SOCKMAP, 1, 1)
    forwarder.pair(1, PairState.JOINED, DatapathKind.SOCKMAP, 1, 1)
    forwarder.pair(1, PairState.SNIFFING, DatapathKind.NONE, 0, 0)
    found = forwarder.scrape()["pyforwarder_pairs"]
    assert found[("sockmap", "joined")] == 2
    assert found[("none", "sniffing")] == 1
    assert sum(found.values()) == 3


def test_bytes_are_those_of_open_and_closed_pairs_and_never_go_back(forwarder: Forwarder) -> None:
    forwarder.add(0, Counter.UP_BYTES, 1000)
    slot = forwarder.pair(1, PairState.JOINED, DatapathKind.COPY, 23, 7)

    def carried() -> dict[tuple[str, ...], float]:
        return forwarder.scrape()["pyforwarder_carried_bytes_total"]

    assert carried() == {("up",): 1023, ("down",): 7}
    # The pair has left the table, and its counts are on their way to the counters.
    forwarder.windows[1].release(slot)
    assert carried() == {("up",): 1023, ("down",): 7}
    forwarder.add(1, Counter.UP_BYTES, 24)
    forwarder.add(1, Counter.DOWN_BYTES, 7)
    assert carried() == {("up",): 1024, ("down",): 7}


def test_server_is_up_unless_a_worker_takes_it_for_down(forwarder: Forwarder) -> None:
    labels = ("10.0.0.1:80", "up")
    found = forwarder.scrape()
    assert found["pyforwarder_server_up"] == {labels: 1}
    assert found["pyforwarder_server_drained"] == {labels: 0}
    forwarder.add(1, forwarder.server + ServerCounter.DOWN, 1)
    forwarder.add(0, forwarder.server + ServerCounter.DRAINED, 1)
    forwarder.add(1, forwarder.server + ServerCounter.DRAINED, 1)
    found = forwarder.scrape()
    assert found["pyforwarder_server_up"] == {labels: 0}
    assert found["pyforwarder_server_drained"] == {labels: 1}


def test_what_became_of_connections_to_a_server_is_told_by_cause(forwarder: Forwarder) -> None:
    for worker, reason in (
        (0, CloseReason.REFUSED),
        (1, CloseReason.REFUSED),
        (1, CloseReason.BUSY),
    ):
        count_failure(forwarder.counters.block(worker), forwarder.server, reason)
    count_failure(forwarder.counters.block(0), forwarder.server, CloseReason.TIMEOUT, is_ours=True)
    for _ in range(3):
        count_connect(forwarder.counters.block(0), forwarder.server)
    count_disconnect(forwarder.counters.block(0), forwarder.server)
    found = forwarder.scrape()
    failures = found["pyforwarder_server_failures_total"]
    assert {cause: count for (cause, _, _), count in failures.items()} == {
        "refused": 2,
        "timeout": 0,
        "unreachable": 0,
        "unresolved": 0,
        "local": 2,
        "express": 0,
    }
    assert found["pyforwarder_server_connects_total"] == {("10.0.0.1:80", "up"): 3}
    assert found["pyforwarder_server_pairs"] == {("10.0.0.1:80", "up"): 2}


def test_times_are_counted_below_every_bound_that_they_reach(forwarder: Forwarder) -> None:
    for worker, took_s in ((0, 0.0001), (1, 0.0002), (1, 5.0), (0, 100.0)):
        block = forwarder.counters.block(worker)
        observe(block, forwarder.times, CONNECT_BOUNDS_S, took_s)
        observe(block, DECISION_FIRST, DECISION_BOUNDS_S, took_s)
    found = forwarder.scrape()
    buckets = found["pyforwarder_connect_seconds_bucket"]
    assert buckets[("0.0001", "up")] == 1
    assert buckets[("0.0003", "up")] == buckets[("3", "up")] == 2
    assert buckets[("10", "up")] == 3
    assert buckets[("+Inf", "up")] == found["pyforwarder_connect_seconds_count"][("up",)] == 4
    assert found["pyforwarder_connect_seconds_sum"][("up",)] == pytest.approx(105.0003)
    assert found["pyforwarder_connect_seconds_count"][("-",)] == 0
    assert found["pyforwarder_decision_seconds_count"] == {(): 4}


def test_bytes_of_a_listener_are_those_of_its_open_and_closed_pairs(forwarder: Forwarder) -> None:
    base = forwarder.directory.index("main")
    forwarder.add(0, base + ListenerCounter.UP_BYTES, 1000)
    slot = forwarder.pair(1, PairState.JOINED, DatapathKind.COPY, 23, 7)

    def carried() -> dict[tuple[str, ...], float]:
        return forwarder.scrape()["pyforwarder_listener_bytes_total"]

    expected = {("up", "main"): 1023, ("down", "main"): 7, ("up", "web"): 0, ("down", "web"): 0}
    assert carried() == expected
    forwarder.windows[1].release(slot)
    assert carried() == expected


def test_every_row_has_a_word_of_its_own_and_a_meaning() -> None:
    for rows in (table.ROWS, table.LISTENER_ROWS, table.RULE_ROWS, table.SERVER_ROWS):
        words = [row.word for row in rows]
        assert len(set(words)) == len(words)
        series = [(row.family, row.values) for row in rows if row.family is not None]
        assert len(set(series)) == len(series)
        for row in rows:
            assert row.stats or row.family
            assert row.family is None or row.family.help.endswith(".")
    fixed = {row.word for row in table.ROWS}
    assert {int(counter) for counter in Counter} <= fixed
    for histogram in (*table.HISTOGRAMS, table.CONNECT):
        fixed |= set(range(histogram.word, histogram.word + len(histogram.bounds_s) + 2))
    assert max(fixed) < NAMED_FIRST


def test_the_instance_says_what_it_is(forwarder: Forwarder) -> None:
    found = forwarder.scrape()
    assert found["pyforwarder_build_info"] == {("1.2.3",): 1}
    assert found["pyforwarder_workers"] == {(): 2}
    assert found["pyforwarder_start_time_seconds"] == {(): 1_700_000_000.5}
    assert found["pyforwarder_datapath_available"] == {("copy",): 1, ("sockmap",): 0}


def test_every_counter_is_called_total(forwarder: Forwarder) -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(forwarder.collector)
    text = generate_latest(registry).decode()
    counters = [line.split()[2] for line in text.splitlines() if line.endswith(" counter")]
    documented = re.findall(r"^\| `(pyforwarder_\w+)` \| counter \|", OPERATING, re.MULTILINE)
    assert sorted(counters) == sorted(documented)
    assert all(name.endswith("_total") for name in counters)


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(forwarder: Forwarder) -> None:
    known = forwarder.labels()
    dashboard = json.loads(DASHBOARD.read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"pyforwarder_\w+", target["expr"])
            assert names, panel["title"]
            labels = set(re.findall(r"(\w+)=~?\"", target["expr"]))
            labels |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for name in names:
                assert name in known, f"{panel['title']}: {name}"
            assert labels <= set.union(*(known[name] for name in names)), panel["title"]
            asked |= set(names)
    # A sum alone is of no use without its count.
    asked |= {
        name.removesuffix("_bucket") + end
        for name in asked
        if name.endswith("_bucket")
        for end in ("_sum", "_count")
    }
    # Of a fleet Prometheus asks each machine; what one knows of the others is for `show --fleet`.
    left = {name for name in set(known) - asked if not name.startswith("pyforwarder_fleet_")}
    assert left == {"pyforwarder_build_info", "pyforwarder_pairs_opened_total"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
