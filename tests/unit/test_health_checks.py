"""When active checks take a server down and back up, and when they are due: exact."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.health import CheckSchedule, Health


def observe(health: Health, results: str) -> str:
    """Feed `+` and `-`; the state after each, as `u` and `d`, upper case where it changed."""
    shown = ""
    for result in results:
        changed = health.observe(passed=result == "+")
        letter = "u" if health.is_up else "d"
        shown += letter.upper() if changed else letter
    return shown


@pytest.mark.parametrize(
    ("results", "states"),
    [
        ("+---", "uuuD"),  # three in a row take it down
        ("+--+--", "uuuuuu"),  # a success in between starts over
        ("+---++", "uuuDdU"),  # two in a row bring it back
        ("+---+-++", "uuuDdddU"),
        ("-", "D"),  # on trial: the first result decides
        ("-+", "Dd"),
        ("-++", "DdU"),
        ("-++---", "DdUuuD"),
    ],
)
def test_health_rises_and_falls(results: str, states: str) -> None:
    assert observe(Health(rise=2, fall=3), results) == states


@given(st.lists(st.booleans()), st.integers(1, 5), st.integers(1, 5))
def test_health_changes_after_exactly_rise_or_fall_results(
    results: list[bool], rise: int, fall: int
) -> None:
    health = Health(rise=rise, fall=fall)
    seen: list[bool] = []
    for passed in results:
        was_up = health.is_up
        changed = health.observe(passed=passed)
        seen.append(passed)
        run = len(list(next(itertools.groupby(reversed(seen)))[1]))
        assert changed is (health.is_up != was_up)
        if passed != was_up:
            needed = 1 if len(seen) == 1 else rise if passed else fall
            assert changed is (run >= needed)


def test_checks_are_spread_over_the_interval() -> None:
    schedule = CheckSchedule(["a", "b", "c", "d"], interval_s=4.0, now_s=100.0)
    taken = [(now_s, schedule.take_due(now_s)) for now_s in (100.0, 100.5, 101.0, 102.0, 103.0)]
    assert taken == [(100.0, ["a"]), (100.5, []), (101.0, ["b"]), (102.0, ["c"]), (103.0, ["d"])]
    assert schedule.next_s() == 104.0
    assert schedule.take_due(104.0) == ["a"]


def test_checks_missed_in_a_pause_are_made_once() -> None:
    schedule = CheckSchedule(["a", "b"], interval_s=4.0, now_s=100.0)
    assert schedule.take_due(1000.0) == ["a", "b"]
    assert schedule.take_due(1001.0) == []
    assert schedule.next_s() == 1002.0
    assert CheckSchedule([], interval_s=1.0, now_s=0.0).next_s() == float("inf")
