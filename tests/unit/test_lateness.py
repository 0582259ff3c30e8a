"""How late a host is said to be, for tests that measure what is promised."""

from __future__ import annotations

import pytest

from tests.helpers.lateness import MOST_LATE_S, Lateness


def test_a_host_on_which_sleeps_end_in_time_is_not_late() -> None:
    lateness = Lateness()
    for number in range(100):
        lateness.ended(number / 50, number / 50)
    assert lateness.most_s() == 0


def test_what_is_late_within_one_second_adds_up() -> None:
    lateness = Lateness()
    for due_s in (0.0, 0.3, 0.6):
        lateness.ended(due_s, due_s + 0.1)
    assert lateness.most_s() == pytest.approx(0.3)


def test_what_is_late_in_another_second_does_not_and_the_most_stays() -> None:
    lateness = Lateness()
    lateness.ended(0.0, 0.2)
    lateness.ended(1.3, 1.4)
    assert lateness.most_s() == pytest.approx(0.2)
    lateness.ended(1.5, 1.7)
    assert lateness.most_s() == pytest.approx(0.3)
    lateness.ended(5.0, 5.0)
    assert lateness.most_s() == pytest.approx(0.3)


def test_no_host_is_so_late_that_nothing_would_be_too_late() -> None:
    lateness = Lateness()
    lateness.ended(0.0, 30.0)
    assert lateness.most_s() == MOST_LATE_S
