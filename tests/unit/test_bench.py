"""The pure parts of scripts/bench: what is chosen, computed, judged and printed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from bench import cpu_time, first_bytes, goals, picture, recording, report, scenarios, targets
from bench.measures import (
    ALL_TARGETS,
    DEFAULT_TARGETS,
    MEASURES,
    OURS,
    SCENARIOS,
    Better,
    Measure,
    choose,
    order_of_round,
)
from bench.results import Problem, Results, ResultsError, from_json, to_json
from bench.topology import Range, Site
from pyforwarder.config import parse_config
from pyforwarder.config.explaining import judge
from pyforwarder.core.first_packet.outcome import MATCH, End
from pyforwarder.runtime.instance import Instance
from tests.helpers.first_packets import said

RTT = next(measure for measure in MEASURES if measure.key == "rtt_near_p50")
BULK = next(measure for measure in MEASURES if measure.key == "bulk_1_up")


def results_of(rows: dict[str, dict[str, list[float | None]]], *, rounds: int = 3) -> Results:
    """Results with these samples, whose targets are all that occur."""
    names = {target for row in rows.values() for target in row}
    results = Results(rounds, tuple(name for name in ALL_TARGETS if name in names))
    for key, row in rows.items():
        for target, values in row.items():
            for index, value in enumerate(values):
                if value is not None:
                    results.add(key, target, index, value)
    return results


def text_of(renderable: RenderableType) -> str:
    """What a wide terminal shows, without colours."""
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row_of(renderable: RenderableType, title: str) -> list[str]:
    """The cells of the table's one row that begins with `title`."""
    (line,) = [line for line in text_of(renderable).splitlines() if f"│{title} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


# ---- statistics


def test_a_ratio_is_the_median_of_the_ratios_within_each_round() -> None:
    # the machine became ten times slower in the last round; so did everyone
    results = results_of({RTT.key: {"direct": [10.0, 12.0, 100.0], "sockmap": [20.0, 36.0, 230.0]}})
    assert results.ratio(RTT.key, "sockmap", "direct") == 2.3


def test_a_round_that_broke_is_left_out_of_medians_and_ratios() -> None:
    results = results_of({RTT.key: {"direct": [10.0, None, 30.0], "sockmap": [20.0, 7.0, 90.0]}})
    assert results.median(RTT.key, "direct") == 20.0
    assert results.ratio(RTT.key, "sockmap", "direct") == 2.5


def test_nothing_measured_gives_no_number() -> None:
    results = results_of({RTT.key: {"direct": [10.0, 11.0, 12.0]}})
    assert results.median(RTT.key, "splice") is None
    assert results.ratio(RTT.key, "splice", "direct") is None
    assert results.difference(RTT.key, "splice", "direct") is None
    assert results.spread(RTT.key, "splice") is None


def test_a_reference_of_zero_gives_no_ratio() -> None:
    results = results_of({RTT.key: {"direct": [0.0, 2.0, -1.0], "copy": [5.0, 6.0, 5.0]}})
    assert results.ratio(RTT.key, "copy", "direct") == 3.0


def test_the_spread_is_the_distance_of_the_extremes_over_the_median() -> None:
    results = results_of({RTT.key: {"direct": [8.0, 10.0, 13.0]}})
    assert results.spread(RTT.key, "direct") == 0.5


@given(
    st.lists(st.floats(0.001, 1e9), min_size=1, max_size=9),
    st.floats(0.01, 100),
)
def test_a_constant_factor_is_found_on_a_busy_machine(
    reference: list[float], factor: float
) -> None:
    results = results_of(
        {RTT.key: {"direct": [*reference], "copy": [value * factor for value in reference]}},
        rounds=len(reference),
    )
    assert results.ratio(RTT.key, "copy", "direct") == pytest.approx(factor)


@pytest.mark.parametrize(("measure", "best"), [(RTT, "haproxy"), (BULK, "socat")])
def test_the_best_peer_is_the_lowest_or_highest_median_among_the_others(
    measure: Measure, best: str
) -> None:
    results = results_of(
        {
            measure.key: {
                "direct": [1.0, 1.0, 1.0],
                "haproxy": [5.0, 6.0, 7.0],
                "nginx": [6.0, 7.0, 8.0],
                "socat": [1.0, 9.0, 9.0],
                "copy": [900.0, 900.0, 900.0],
            }
        }
    )
    assert results.best_peer(measure) == best


def test_without_a_peer_there_is_no_best_one() -> None:
    assert results_of({RTT.key: {"copy": [1.0, 1.0, 1.0]}}).best_peer(RTT) is None


# ---- files


def test_results_survive_their_file() -> None:
    results = results_of({RTT.key: {"direct": [1.5, None, 3.0], "copy": [2.0, 2.0, 2.0]}})
    results.machine["kernel"] = "Linux 6.18"
    results.options["topology"] = "veth"
    results.problems.append(Problem("direct", "round 2: lost"))
    assert from_json(to_json(results, goals=[])) == results


def test_the_file_has_a_summary_with_both_ratios() -> None:
    results = results_of(
        {RTT.key: {"direct": [10.0] * 3, "nginx": [40.0] * 3, "sockmap": [30.0] * 3}}
    )
    summary = json.loads(to_json(results, goals=[]))["summary"]
    assert summary[RTT.key]["best_peer"] == "nginx"
    assert summary[RTT.key]["targets"]["sockmap"] == {
        "median": 30.0,
        "spread": 0.0,
        "to_best_peer": 0.75,
        "to_direct": 3.0,
    }


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 23}', '{"format": 1, "rounds": 1, "targets": []}'],
)
def test_a_file_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ResultsError):
        from_json(text)


def test_a_file_whose_rounds_do_not_fit_is_refused() -> None:
    document = json.loads(to_json(results_of({RTT.key: {"direct": [1.0] * 3}}), goals=[]))
    document["samples"][RTT.key]["direct"].pop()
    with pytest.raises(ResultsError, match="rtt_near_p50 of direct"):
        from_json(json.dumps(document))


# ---- what is measured


def test_every_scenario_can_be_run_and_yields_rows() -> None:
    assert set(scenarios.RUNS) == set(SCENARIOS)
    assert len({measure.key for measure in MEASURES}) == len(MEASURES)


def test_memory_is_measured_before_connections_leave_their_traces() -> None:
    kinds = [name.partition("_")[0] for name in SCENARIOS]
    assert kinds.index("idle") == 0
    assert set(kinds[kinds.index("connect") :]) == {"connect", "answer", "pause"}


def test_cpu_time_of_a_child_that_has_ended_is_counted() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    before_s = cpu_time.tree_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert cpu_time.tree_seconds(os.getpid()) - before_s >= 0.28  # in ticks of 10 ms, two of them


def test_every_goal_is_about_a_row_and_a_target_that_exist() -> None:
    for goal in goals.GOALS:
        assert goals.measure_of(goal).key == goal.measure
        assert goal.target in DEFAULT_TARGETS
        assert goal.reference in (goals.BEST_PEER, *DEFAULT_TARGETS)


def test_names_are_chosen_by_their_beginning_in_the_order_offered() -> None:
    chosen = choose("cpu, bulk_1", SCENARIOS)
    assert chosen == ("bulk_1_up", "bulk_1_down", "cpu_up", "cpu_down")


def test_an_exact_name_does_not_take_those_it_begins() -> None:
    assert choose("sslh", ALL_TARGETS) == ("sslh",)


def test_a_name_that_fits_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'varnish' is none of direct, haproxy"):
        choose("direct,varnish", ALL_TARGETS)


def test_the_targets_take_turns_there_and_back() -> None:
    names = ("direct", "nginx", "copy")
    assert order_of_round(names, 0) == names
    assert order_of_round(names, 1) == ("copy", "nginx", "direct")
    assert order_of_round(names, 2) == names


# ---- goals


def verdict_of(goal: goals.Goal, **values: float) -> goals.Verdict:
    """The verdict where each target's only sample is given."""
    rows: dict[str, list[float | None]] = {name: [value] for name, value in values.items()}
    return goals.judge(goal, results_of({goal.measure: rows}, rounds=1)).verdict


@pytest.mark.parametrize(
    ("limit", "value", "is_reached"),
    [
        (goals.Limit.AT_MOST, 4.0, True),
        (goals.Limit.AT_MOST, 4.01, False),
        (goals.Limit.AT_LEAST, 4.0, True),
        (goals.Limit.AT_LEAST, 3.99, False),
        (goals.Limit.ABOVE, 4.0, False),
        (goals.Limit.ABOVE, 4.01, True),
    ],
)
def test_a_goal_is_reached_up_to_its_bound(
    limit: goals.Limit, value: float, is_reached: bool
) -> None:
    goal = goals.Goal("copy", RTT.key, "direct", limit, 2.0)
    expected = goals.Verdict.REACHED if is_reached else goals.Verdict.MISSED
    assert verdict_of(goal, direct=2.0, copy=value) is expected


def test_a_goal_against_the_best_peer_names_that_peer() -> None:
    goal = goals.Goal("sockmap", RTT.key, goals.BEST_PEER, goals.Limit.AT_MOST, 0.5)
    results = results_of(
        {RTT.key: {"haproxy": [70.0] * 3, "nginx": [60.0] * 3, "sockmap": [30.0] * 3}}
    )
    assert goals.judge(goal, results) == goals.Outcome(goal, "nginx", 0.5, goals.Verdict.REACHED)


@pytest.mark.parametrize(("longest_us", "verdict"), [(1230, "reached"), (1231, "missed")])
def test_a_stall_is_held_against_direct_by_difference(longest_us: float, verdict: str) -> None:
    (goal, _) = (g for g in goals.GOALS if g.is_difference and g.target == "splice")
    assert verdict_of(goal, direct=230.0, splice=longest_us).value == verdict


def test_a_goal_without_numbers_is_neither_reached_nor_missed() -> None:
    goal = goals.Goal("splice", RTT.key, goals.BEST_PEER, goals.Limit.AT_MOST, 0.5)
    assert verdict_of(goal, direct=1.0, splice=1.0) is goals.Verdict.NOT_MEASURED


def test_only_goals_of_targets_that_took_part_are_judged() -> None:
    outcomes = goals.judge_all(results_of({RTT.key: {"direct": [1.0] * 3, "copy": [1.0] * 3}}))
    assert {outcome.goal.target for outcome in outcomes} == {"copy"}


# ---- what is printed


def test_the_tables_show_medians_and_both_ratios() -> None:
    results = results_of(
        {
            RTT.key: {
                "direct": [10.0, 10.0, 10.0],
                "haproxy": [50.0, 60.0, 70.0],
                "nginx": [80.0, 80.0, 80.0],
                "sockmap": [30.0, 30.0, 28.0],
            }
        }
    )
    assert row_of(report.medians(results), RTT.title) == [
        RTT.title,
        "us",
        *("10.0", "60.0", "80.0", "30.0"),
    ]
    assert row_of(report.ratios_to_best_peer(results), RTT.title) == [
        RTT.title,
        "us",
        *("0.17", "1.00", "1.33", "0.50", "haproxy"),
    ]
    assert row_of(report.ratios_to_direct(results), RTT.title) == [
        RTT.title,
        "us",
        *("1.00", "6.00", "8.00", "3.00"),
    ]


def test_rows_without_any_number_are_not_printed() -> None:
    table = text_of(report.medians(results_of({RTT.key: {"direct": [1.0] * 3}})))
    assert RTT.title in table
    assert BULK.title not in table


def test_the_goals_say_what_was_wanted_and_what_was_measured() -> None:
    results = results_of({RTT.key: {"nginx": [60.0] * 3, "sockmap": [45.0] * 3}})
    goal = goals.Goal("sockmap", RTT.key, goals.BEST_PEER, goals.Limit.AT_MOST, 0.5)
    assert row_of(report.goals([goals.judge(goal, results)]), "sockmap") == [
        "sockmap",
        RTT.title,
        "at most 0.5 of best peer (nginx)",
        "0.75",
        "missed",
    ]


def bars_of(results: Results) -> dict[str, float]:
    """The lengths of the picture's bars by target, of a picture with one panel."""
    root = ElementTree.fromstring(picture.draw(results))
    name = "{http://www.w3.org/2000/svg}"
    labels = [x.text for x in root.iter(f"{name}text") if x.get("text-anchor") == "end"]
    bars = [float(x.attrib["width"]) for x in root.iter(f"{name}rect") if x.get("x")]
    return {str(label): width for label, width in zip(labels, bars, strict=True)}


def test_the_bars_of_the_picture_are_in_proportion() -> None:
    bars = bars_of(results_of({RTT.key: {"direct": [10.0] * 3, "nginx": [40.0] * 3}}))
    assert bars["nginx"] == pytest.approx(4 * bars["direct"], rel=0.01)


def test_the_picture_bears_rows_without_growth() -> None:
    bars = bars_of(results_of({"stall_up_memory": {"direct": [-3.0] * 3, "nginx": [0.0] * 3}}))
    assert bars == {"direct": 1.0, "nginx": 1.0}


def test_which_way_is_better_is_written_into_the_picture() -> None:
    assert RTT.better is Better.LOWER
    assert "us, less is better" in picture.draw(results_of({RTT.key: {"direct": [1.0] * 3}}))


# ---- what targets are told


def test_only_listening_ports_are_read_from_the_kernels_table() -> None:
    table = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1B58 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:1B59 0100007F:1B58 01 00000000:00000000 00:00000000 00000000     0        0 2 1
"""
    assert targets.listening_ports(table) == {7000}


def test_every_forwarder_is_told_all_server_addresses() -> None:
    path = Path("/run/netns/none")
    site = Site(path, path, path, "127.0.0.1", Range("127.1.0.1", 1), Range("127.2.0.255", 3))
    assert site.servers.addresses() == ["127.2.0.255", "127.2.1.0", "127.2.1.1"]
    for text in (
        targets.haproxy_config(site),
        targets.nginx_config(site, path),
        targets.pyforwarder_config(site, "splice"),
    ):
        assert all(f"{address}:7001" in text for address in site.servers.addresses())


def test_the_datapath_asked_for_is_forced_on_every_listener() -> None:
    path = Path("/run/netns/none")
    site = Site(path, path, path, "127.0.0.1", Range("127.1.0.1", 1), Range("127.2.0.1", 2))
    lines = targets.pyforwarder_config(site, "splice").splitlines()
    assert sum(line.strip() == "datapath: splice" for line in lines) == 6


def test_express_has_ports_and_decides_all_that_is_measured() -> None:
    path = Path("/run/netns/none")
    site = Site(path, path, path, "127.0.0.1", Range("127.1.0.1", 1), Range("127.2.0.1", 2))
    config = parse_config(targets.pyforwarder_config(site, "express"), source="bench")
    assert config.express_ports == targets.EXPRESS_PORTS
    first = {"all": b"x" * 64, "sni": first_bytes.client_hello(), "host": first_bytes.http_head()}
    found = {}
    for index, listener in enumerate(config.listeners):
        if (name := listener.rules[0].name) in first:
            judged = judge(
                config,
                index,
                [first[name]],
                client=None,
                port=None,
                end=End.OPEN,
                now_unix_s=0.0,
                keys=None,
                passwords={},
                resolve=lambda _: [],
            )
            found[name] = judged.in_kernel.rule, judged.in_kernel.is_asked
    assert found == {name: (name, True) for name in first}


def test_express_takes_part_where_connections_begin() -> None:
    effort = scenarios.Effort(1.0, 1, 1, 1.0, 0.9)
    express = targets.Target("express", 1, 1)
    assert [name for name in SCENARIOS if scenarios.is_possible(name, express, effort)] == [
        name
        for name in SCENARIOS
        if name.startswith(("connect_", "answer_")) and name != "connect_instruction"
    ]


def test_too_few_connections_of_the_kernel_are_no_row_and_the_error_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    express = targets.Target("express", 1, 1, Instance.named("bench"))
    said: list[dict[str, Any]] = [
        {"joined": {"express": 100}, "pairs_opened": 200, "express_left": {"no_port": 7, "long": 5}}
    ]
    monkeypatch.setattr(targets, "_stats", lambda _: said[-1])
    monkeypatch.setattr(scenarios, "COUNTED_AFTER_S", 0.0)

    def burst(_stage: object) -> dict[str, float]:
        said.append(
            {
                "joined": {"express": 179},
                "pairs_opened": 300,
                "express_left": {"silent": 2, "no_port": 26, "long": 5},
            }
        )
        return {"connect_client_first": 1.0}

    monkeypatch.setitem(scenarios.RUNS, "connect_client_first", burst)
    stage: Any = SimpleNamespace(target=express)
    why = "only 79 of 100 connections; it has left packets to workers: 19 no_port, 2 silent$"
    with pytest.raises(scenarios.ScenarioError, match=why):
        scenarios.run("connect_client_first", stage)
    said[-1] = {"joined": {"express": 99}, "pairs_opened": 200}  # one more is enough
    assert scenarios.run("connect_client_first", stage) == {"connect_client_first": 1.0}


def test_only_a_forwarder_that_reads_names_is_asked_for_one() -> None:
    effort = scenarios.Effort(1.0, 1, 1, 1.0, 0.9)
    for scenario in ("connect_sni", "connect_host"):
        assert [
            name
            for name in ALL_TARGETS
            if scenarios.is_possible(scenario, targets.Target(name, 1, 1), effort)
        ] == ["direct", "haproxy", *OURS]


@pytest.mark.parametrize(("topology", "bounds"), [("lo", {1.8, 0.8}), ("veth", {1.5, 0.8})])
def test_express_has_another_goal_in_each_topology(topology: str, bounds: set[float]) -> None:
    results = results_of({"connect_client_first": {"direct": [1.0] * 3, "express": [1.0] * 3}})
    results.options["topology"] = topology
    assert {
        outcome.goal.bound
        for outcome in goals.judge_all(results)
        if outcome.goal.measure == "connect_client_first"
    } == bounds


def test_the_first_bytes_are_what_clients_say() -> None:
    for rule, first, at in (
        ({"tls": {"sni": targets.SERVER_NAME}}, first_bytes.client_hello(), first_bytes.RANDOM_AT),
        ({"http": {"host": targets.SERVER_NAME}}, first_bytes.http_head(), first_bytes.PATH_AT),
    ):
        assert said(rule, first) is MATCH
        other = first[:at] + b"89abcdef" + first[at + 8 :]  # load.c, vary
        assert (said(rule, other), len(other)) == (MATCH, len(first))
    assert 200 < len(first_bytes.client_hello()) <= 2000


# ---- what datagrams add


def test_what_is_added_to_direct_is_held_against_what_another_adds() -> None:
    goal = next(goal for goal in goals.GOALS if goal.is_added)
    results = results_of(
        {
            goal.measure: {
                "direct": [1.0, 2.0, 1.0],
                "nginx": [5.0, 12.0, 1.0],  # in the last round it added nothing
                "splice": [2.0, 3.0, 9.0],
            }
        }
    )
    outcome = goals.judge(goal, results)
    assert outcome.value == pytest.approx(0.175)
    assert outcome.verdict is goals.Verdict.REACHED
    assert "of what nginx adds" in text_of(report.goals([outcome]))


def test_very_many_sessions_are_left_out_where_there_is_no_room_for_them() -> None:
    (many,) = [name for name in SCENARIOS if name.endswith("_10000")]
    few = next(name for name in SCENARIOS if name.startswith("udp_64_"))
    direct, socat, haproxy = (targets.Target(name, 1, 1) for name in ("direct", "socat", "haproxy"))
    for effort, target, known in (
        (1_000, direct, [few]),
        (10_000, direct, [few, many]),
        (10_000, socat, [few]),
        (10_000, haproxy, []),
    ):
        most = scenarios.Effort(1.0, 1, effort, 1.0, 0.9)
        assert [name for name in (few, many) if scenarios.is_possible(name, target, most)] == known


def test_a_run_is_recorded_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.json"
    file.write_text(recording.FILE.read_text())
    before = json.loads(file.read_text())
    results = results_of({RTT.key: {"direct": [10.04, 12.0, 10.0], "nginx": [20.0, None, 1234.0]}})
    results.machine |= {
        "date": "2027-01-02T03:04:05+00:00",
        "kernel": "Linux 6.99.1-x",
        "nginx": "nginx version: nginx/1.22.1",
    }
    recording.record(results, "another", "sudo scripts/bench/run --quick", file)
    document = json.loads(file.read_text())
    assert document["runs"].pop("another") == {
        "command": "sudo scripts/bench/run --quick",
        "recorded": "2027-01-02",
        "kernel": "Linux 6.99",
        "targets": ["direct", "nginx 1.22"],
        "rows": [{"key": RTT.key, "measure": RTT.title, "unit": RTT.unit, "values": [10, 627]}],
    }
    assert document == before
    # What is not changed is written as it was, but for numbers' trailing zeros.
    lines = file.read_text().splitlines()
    assert sum(line.startswith('        {"key"') for line in lines) == 1 + sum(
        len(run["rows"]) for run in before["runs"].values()
    )
