"""What `top` shows and what its keys do, without a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.cli.rates import (
    Browser,
    Flush,
    Meter,
    Mode,
    PairRate,
    Quit,
    Sort,
    TotalsMeter,
    View,
)
from tests.helpers.fake_control import PAIR

if TYPE_CHECKING:
    from pyforwarder.client import PairRow


def pair(**fields: Any) -> PairRow:
    return cast("PairRow", {**PAIR, **fields})


def rate(pair_id: int, per_s: float = 0.0, **fields: Any) -> PairRate:
    return PairRate(pair(id=pair_id, **fields), per_s, 0.0)


def ids(browser: Browser) -> list[int]:
    return [shown.row["id"] for shown in browser.shown]


# ---------------------------------------------------------------------- rates


def test_first_look_knows_no_rates() -> None:
    assert [r.per_s for r in Meter().update([pair()], now_s=100.0)] == [0.0]


def test_rate_is_the_difference_over_the_time_between_two_looks() -> None:
    meter = Meter()
    meter.update([pair(up_bytes=100, down_bytes=7)], now_s=100.0)
    [measured] = meter.update([pair(up_bytes=600, down_bytes=27)], now_s=102.5)
    assert (measured.up_per_s, measured.down_per_s, measured.per_s) == (200.0, 8.0, 208.0)


def test_new_pair_is_measured_by_its_own_age() -> None:
    meter = Meter()
    meter.update([], now_s=100.0)
    [measured] = meter.update([pair(up_bytes=100, down_bytes=0, age_s=0.5)], now_s=102.0)
    assert measured.up_per_s == 200.0


def test_id_that_came_back_for_another_client_starts_anew() -> None:
    meter = Meter()
    meter.update([pair(client="127.0.0.1:1", up_bytes=5000)], now_s=100.0)
    again = pair(client="127.0.0.1:2", up_bytes=300, down_bytes=0, age_s=1.0)
    [measured] = meter.update([again], now_s=101.0)
    assert measured.up_per_s == 300.0


def test_two_looks_at_the_same_moment_divide_by_nothing() -> None:
    meter = Meter()
    meter.update([pair()], now_s=100.0)
    assert [r.row["id"] for r in meter.update([pair(), pair(id=8)], now_s=100.0)] == [7, 8]


def test_totals_after_a_restart_are_not_negative() -> None:
    meter = TotalsMeter()
    meter.update({"accepted": 23.0}, now_s=0.0)
    assert meter.update({"accepted": 33.0}, now_s=5.0) == {"accepted": 2.0}
    assert meter.update({"accepted": 3.0}, now_s=6.0) == {"accepted": 0.0}


# ---------------------------------------------------------------------- order, filter, selection


def test_fastest_pair_comes_first_and_equals_stand_still() -> None:
    browser = Browser()
    browser.arrange([rate(3), rate(1), rate(2, 9.0), rate(0)])
    assert ids(browser) == [2, 0, 1, 3]
    browser.press("r")
    browser.arrange(browser.rates)
    assert ids(browser) == [0, 1, 3, 2]


@pytest.mark.parametrize("sort", list(Sort))
def test_every_order_compares_its_own_number(sort: Sort) -> None:
    large = {"up_bytes": 10**6, "down_bytes": 10**6, "backlog_bytes": 9, "age_s": 99, "idle_s": 99}
    browser = Browser(sort=sort)
    browser.arrange([rate(1), PairRate(pair(id=2, **large), 5.0, 5.0)])
    assert ids(browser) == [2, 1]


def test_sort_key_goes_round_both_ways() -> None:
    browser = Browser()
    seen = []
    for key in ["s"] * len(Sort) + ["S"]:
        browser.press(key)
        seen.append(browser.sort)
    assert seen == [*list(Sort)[1:], Sort.RATE, Sort.ID]


def test_filter_wants_every_word_somewhere_in_the_pair() -> None:
    browser = Browser()
    for key in ["/", *"10.0 SSH", "x", "backspace", "enter"]:
        assert browser.press(key) is None
    browser.arrange(
        [
            rate(1, client="10.0.0.1:1", rule="ssh"),
            rate(2, client="10.0.0.1:2", rule="web"),
            rate(3, rule="ssh"),
        ]
    )
    assert (browser.mode, browser.filter, ids(browser)) == (Mode.BROWSE, "10.0 SSH", [1])


def test_escape_drops_the_filter() -> None:
    browser = Browser(filter="nothing like it")
    browser.arrange([rate(1)])
    assert ids(browser) == []
    browser.press("escape")
    browser.arrange(browser.rates)
    assert ids(browser) == [1]


def test_keys_that_are_typed_into_the_filter_do_nothing_else() -> None:
    browser = Browser()
    browser.arrange([rate(1)])
    for key in ["/", "q", "x", "y", "tab", "up"]:
        assert browser.press(key) is None
    assert (browser.mode, browser.filter) == (Mode.FILTER, "qxy")


def test_selection_stays_on_its_pair_when_the_order_changes() -> None:
    browser = Browser()
    browser.arrange([rate(1, 3.0), rate(2, 2.0), rate(3, 1.0)])
    browser.press("down")
    assert browser.selected == 2
    browser.arrange([rate(1, 1.0), rate(2, 9.0), rate(3, 2.0)])
    assert browser.selected == 2


def test_first_pair_is_selected_until_a_key_chooses() -> None:
    browser = Browser()
    selected = []
    for fast, key in ((1, ""), (2, "up"), (1, "escape"), (1, "")):
        browser.arrange([rate(1, float(fast == 1)), rate(2, float(fast == 2))])
        selected.append(browser.selected)
        browser.press(key)
    assert selected == [1, 2, 2, 1]


def test_selection_goes_to_the_neighbour_when_its_pair_ends() -> None:
    browser = Browser()
    browser.arrange([rate(1, 3.0), rate(2, 2.0), rate(3, 1.0)])
    browser.press("end")
    browser.arrange([rate(1, 3.0), rate(2, 2.0)])
    assert browser.selected == 2


def test_nothing_is_selected_where_nothing_is() -> None:
    browser = Browser()
    browser.arrange([rate(1)])
    browser.arrange([])
    assert (browser.selected, browser.selected_pair()) == (None, None)


@pytest.mark.parametrize(
    ("keys", "selected"),
    [
        ("", 0),
        ("down", 1),
        ("up", 0),
        ("page-down", 10),
        ("page-down page-up", 0),
        ("end", 22),
        ("end down", 22),
        ("end home", 0),
        ("j j k", 1),
        ("G g", 0),
    ],
)
def test_selection_moves_within_the_list(keys: str, selected: int) -> None:
    browser = Browser(sort=Sort.ID, is_reversed=True)
    browser.arrange([rate(number) for number in range(23)])
    for key in keys.split():
        browser.press(key)
    assert browser.selected == selected
    assert browser.first_row() <= selected < browser.first_row() + browser.page_rows


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("key", ["q", "Q", "ctrl-c", "ctrl-d"])
def test_quit(key: str) -> None:
    assert Browser().press(key) == Quit()


@pytest.mark.parametrize("key", ["n", "escape", "enter", "q", "x"])
def test_reset_asks_first_and_anything_but_yes_is_no(key: str) -> None:
    browser = Browser()
    browser.arrange([rate(7)])
    modes = []
    for pressed in ["x", key]:
        assert browser.press(pressed) is None
        modes.append(browser.mode)
    assert modes == [Mode.CONFIRM, Mode.BROWSE]


def test_reset_is_for_the_pair_that_was_asked_about() -> None:
    """It ends while the question stands: the answer must not hit the pair in its place."""
    browser = Browser()
    browser.arrange([rate(7, 2.0), rate(8, 1.0)])
    browser.press("x")
    browser.arrange([rate(8, 1.0)])
    assert browser.selected == 8
    assert browser.press("y") == Flush(7)


def test_reset_without_pairs_asks_nothing() -> None:
    browser = Browser()
    browser.arrange([])
    browser.press("x")
    assert browser.mode is Mode.BROWSE


def test_tab_goes_through_every_table() -> None:
    browser = Browser()
    seen = [browser.view]
    for _ in range(4):
        browser.press("tab")
        seen.append(browser.view)
    assert seen == [View.PAIRS, View.LISTENERS, View.RULES, View.UPSTREAMS, View.PAIRS]


def test_pause_and_help_toggle() -> None:
    browser = Browser()
    browser.press(" ")
    assert browser.is_paused
    browser.press("h")
    assert browser.mode is Mode.HELP
    assert browser.press("q") is None  # leads back, and only that
    assert (browser.mode, browser.is_paused) == (Mode.BROWSE, True)


@given(
    st.lists(
        st.sampled_from(
            [
                *("q", "s", "S", "r", "/", "escape", "x", "y", "tab", " ", "h", "up", "down"),
                *("page-up", "page-down", "home", "end", "enter", "backspace", "1", "ctrl-c"),
            ]
        )
    ),
    st.lists(st.sets(st.integers(0, 12)), min_size=1),
)
def test_selection_is_always_a_shown_pair(keys: list[str], looks: list[set[int]]) -> None:
    browser = Browser(page_rows=3)
    for turn, key in enumerate(["", *keys]):
        browser.press(key)
        browser.arrange([rate(number) for number in looks[turn % len(looks)]])
        assert (browser.selected in ids(browser)) == bool(browser.shown)
        first = browser.first_row()
        drawn = ids(browser)[first : first + browser.page_rows]
        assert (browser.selected in drawn) == bool(browser.shown)
