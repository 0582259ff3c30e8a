"""What becomes of a spliced pair whose keeper does not answer, for each thing that it is asked for.

The keeper is played: each request is answered, or lost with a keeper that died over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Flow
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.datapath.splice.adopted import _Adoption
from pyforwarder.datapath.splice.datapath import MOST_PAUSED, SpliceDatapath
from pyforwarder.datapath.splice.paused_pair import PausedPair
from pyforwarder.datapath.splice.spliced import Spliced
from pyforwarder.runtime.loop import Deadlines
from tests.helpers.fake_asker import FakeAsker

PLACE = {"index": 7, "id": 42}


class OtherPair:
    """As much of one as matters here."""

    def __init__(self, datapath: object, state: object, number: int) -> None:
        self.datapath = datapath
        self.datapath_record = state
        self.id = number
        self.client_fd, self.server_fd = 5, 6


def _never(_pair: object) -> None:
    raise AssertionError("it has not waited")


class Stage:
    """A splice datapath with one pair."""

    def __init__(self) -> None:
        self.asker = FakeAsker()
        self.later: list[Callable[[], None]] = []
        self.broken: list[CloseReason] = []
        self.faults: list[Exception] = []
        counts = {"bytes": 0, "repeated_bytes": 0, "packets": 0}
        ways = [SimpleNamespace(fin_acked=0, tail_open=0, narrow_mtu=0, **counts) for _ in range(2)]
        self.record = SimpleNamespace(direction=ways, reset=0, state=0, id=42)
        splice: Any = object.__new__(SpliceDatapath)
        splice._keeper = self.asker
        self.deadlines = Deadlines()
        splice._loop = SimpleNamespace(
            after=lambda _s, call: self.later.append(call),
            deadlines=self.deadlines,
            on_error=lambda _owner, error: self.faults.append(error),
        )
        splice._host = SimpleNamespace(broken=lambda _pair, why: self.broken.append(why))
        words = [0] * (4 * PairWindow.WORDS64)
        splice._window = SimpleNamespace(first_slot=100, words64=words, WORDS64=PairWindow.WORDS64)
        splice._record = lambda _pair: self.record
        self.splice = splice
        self.state = Spliced(7, [0, 0], is_mute=False)
        self.pair: Any = SimpleNamespace(
            datapath=splice,
            datapath_record=self.state,
            slot=3,
            id=42,
            client_fd=5,
            server_fd=6,
            up=SimpleNamespace(),
            down=SimpleNamespace(),
        )
        splice._by_index = {7: self.pair}
        splice._ends = {}

    def another_pair(self, index: int) -> Any:
        state = Spliced(index, [0, 0], is_mute=True)
        pair = OtherPair(self.splice, state, index)
        self.splice._by_index[index] = pair
        return pair

    def pass_time(self) -> None:
        later, self.later = self.later, []
        for call in later:
            call()
        self.deadlines.run_expired(time.monotonic() + 3600.0, _raise)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    assert made.asker.asked == []
    assert made.deadlines.next_s() is None


def _raise(_owner: object, error: Exception) -> None:
    raise error


# Its end


@pytest.mark.parametrize(("acked", "do"), [(1, "leave"), (0, "reset")])
def test_an_end_takes_the_sockets_along_and_is_told_once(stage: Stage, acked: int, do: str) -> None:
    for direction in stage.record.direction:
        direction.fin_acked = acked
    stage.splice.leave(stage.pair)
    assert stage.splice._by_index == {}
    assert stage.asker.take() == (do, {**PLACE, "fds": [5, 6]})
    stage.asker.answer()


def test_an_end_that_is_lost_is_asked_for_by_the_pair_s_number_until_it_is_answered(
    stage: Stage,
) -> None:
    """It may have been obeyed, and its place be another's: the number says whose end is meant."""
    stage.splice.leave(stage.pair)
    for _ in range(3):
        stage.asker.lose()
        assert stage.asker.take() == ("abort", PLACE)
    stage.asker.answer(error="not yours")


def test_a_pair_that_may_not_wait_for_room_is_told_of_without_its_sockets(stage: Stage) -> None:
    """A fault of ours."""
    stage.asker.has_room = False
    stage.splice.leave(stage.pair)
    assert stage.asker.take() == ("abort", PLACE)
    stage.asker.answer()


def test_an_end_that_is_told_of_before_is_told_of_once(stage: Stage) -> None:
    assert stage.splice.end(stage.pair, _never)
    assert stage.asker.take() == ("reset", {**PLACE, "fds": [5, 6]})
    stage.splice.leave(stage.pair)
    assert stage.splice._by_index == {}
    stage.asker.answer()


def test_ends_without_room_wait_for_it_and_are_told_of_in_turn(stage: Stage) -> None:
    """With their sockets, each; a few at a time, as others wait for this loop, too."""
    stage.asker.has_room = False
    pairs = [stage.another_pair(100 + number) for number in range(20)]
    ended: list[object] = []

    def then(pair: Any) -> None:
        ended.append(pair)
        stage.splice.leave(pair)

    for pair in pairs:
        assert not stage.splice.end(pair, then)
    assert stage.splice.unsettled == 20
    assert stage.asker.make_room()  # there is none yet
    assert (stage.asker.asked, ended) == ([], [])
    stage.asker.has_room = True
    late = stage.another_pair(200)
    assert not stage.splice.end(late, then)  # not before those that wait
    for number in range(20):
        if number % 8 == 0:
            assert stage.asker.make_room() is (number < 16)
            assert len(stage.asker.asked) == min(8, 21 - number)
            assert {do for do, *_ in stage.asker.asked} == {"reset"}
            assert all(fields["fds"] == [5, 6] for _, fields, _ in stage.asker.asked)
        stage.asker.answer()
    while stage.asker.asked:
        stage.asker.answer()
    assert not stage.splice._end_some()
    assert ended == [*pairs, late]
    while stage.asker.asked:
        stage.asker.answer()
    assert set(stage.splice._by_index) == {7}


def test_a_pair_that_goes_meanwhile_waits_for_no_room(stage: Stage) -> None:
    stage.asker.has_room = False
    pair = stage.another_pair(100)
    assert not stage.splice.end(pair, _never)
    stage.splice.leave(pair)
    assert stage.asker.take() == ("abort", {"index": 100, "id": 100})
    stage.asker.answer()
    assert not stage.asker.make_room()


def test_without_a_keeper_for_ever_no_pair_waits(stage: Stage) -> None:
    stage.asker.has_room = False
    ended: list[object] = []
    pairs = [stage.another_pair(100 + number) for number in range(20)]
    for pair in pairs:
        assert not stage.splice.end(pair, ended.append)
    stage.asker.is_over = True
    assert not stage.asker.make_room()
    assert ended == pairs


# Its sockets


def test_sockets_are_mute_when_the_keeper_says_so_and_are_asked_for_once(stage: Stage) -> None:
    for _ in range(3):
        stage.splice._mute(stage.pair, stage.state)
    assert stage.asker.take() == ("mute", {**PLACE, "fds": [5, 6]})
    assert not stage.state.is_mute
    stage.asker.answer(mute=False)
    assert not stage.state.is_mute
    stage.splice._mute(stage.pair, stage.state)
    stage.asker.answer(mute=True)
    assert stage.state.is_mute


@pytest.mark.parametrize("has_room", [True, False])
def test_sockets_that_may_be_mute_are_asked_for_again(stage: Stage, *, has_room: bool) -> None:
    stage.asker.has_room = has_room
    stage.splice._mute(stage.pair, stage.state)
    if has_room:
        stage.asker.lose()
    stage.asker.has_room = True
    assert not stage.state.is_mute
    stage.splice._mute(stage.pair, stage.state)
    stage.asker.answer(mute=True)
    assert stage.state.is_mute


# Packets that are too long for our interface


def test_a_narrow_interface_is_told_of_once_and_again_if_that_is_lost(stage: Stage) -> None:
    direction = stage.record.direction[0]
    direction.narrow_mtu = 1280
    looks: list[object] = []
    stage.splice._check_record = lambda pair: looks.append(pair)
    stage.splice._report_narrow_interface(stage.pair, stage.state, stage.record)
    assert stage.asker.take() == ("narrow", PLACE)
    stage.state.narrow_told_s -= 60.0
    stage.splice._report_narrow_interface(stage.pair, stage.state, stage.record)
    stage.asker.lose()
    assert looks == [stage.pair]
    stage.state.narrow_told_s -= 60.0
    direction.bytes = 1  # it goes on
    stage.splice._report_narrow_interface(stage.pair, stage.state, stage.record)
    stage.asker.answer()
    assert looks == [stage.pair]


# A pair that has changed hands


def confirm_adoption(stage: Stage) -> None:
    adoption = _Adoption(stage.pair, stage.state, stage.splice._check_adopted)
    stage.deadlines.start(adoption, 10.0, time.monotonic())
    stage.splice._confirm_adoption(adoption)


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_new_worker_s_slot_is_told_until_that_is_answered(stage: Stage, times: int) -> None:
    confirm_adoption(stage)
    for _ in range(times):
        stage.asker.lose()
    assert stage.asker.take() == ("adopted", {**PLACE, "slot": 103})
    stage.asker.answer()
    stage.pass_time()
    assert not stage.broken


def test_a_pair_that_nobody_would_see_idle_is_reset(stage: Stage) -> None:
    confirm_adoption(stage)
    stage.pass_time()
    assert stage.broken == [CloseReason.INTERNAL]
    stage.asker.answer()


def test_a_pair_that_the_keeper_does_not_know_is_reset(stage: Stage) -> None:
    confirm_adoption(stage)
    stage.asker.answer(error="not yours")
    assert stage.broken == [CloseReason.INTERNAL]


def test_one_that_has_ended_meanwhile_is_not_asked_about(stage: Stage) -> None:
    confirm_adoption(stage)
    stage.pair.datapath_record = None  # and its slot another's
    stage.asker.lose()
    stage.pass_time()
    assert not stage.broken


def test_a_pair_whose_sockets_have_not_come_is_let_go_of_and_the_next_one_adopted(
    stage: Stage,
) -> None:
    """There was no descriptor left for them: it would be nobody's."""
    taken: list[object] = []
    done: list[bool] = []
    stage.splice.adopt(taken.append, lambda: done.append(True))
    stage.asker.answer(index=9, id=43, record="")
    assert [(do, fields) for do, fields, _ in stage.asker.asked] == [
        ("abort", {"index": 9, "id": 43}),
        ("adopt", {}),
    ]
    stage.asker.answer()
    assert not done
    stage.asker.answer()
    assert (taken, done, len(stage.faults)) == ([], [True], 1)


def test_pairs_are_adopted_one_by_one_also_over_the_death_of_a_keeper(stage: Stage) -> None:
    done: list[bool] = []
    stage.splice.adopt(lambda _orphan: None, lambda: done.append(True))
    for _ in range(3):
        stage.asker.lose()
        assert stage.asker.take() == ("adopt", {})
    assert not done
    stage.asker.answer()
    assert done == [True]


def test_pairs_that_cannot_be_had_yet_are_asked_for_later(stage: Stage) -> None:
    heard: list[str] = []
    stage.splice.adopt(
        lambda _orphan: None, lambda: heard.append("done"), lambda: heard.append("later")
    )
    # Some were tried in vain, and the keeper had others to serve.
    stage.asker.answer(more=True)
    assert not heard
    stage.asker.answer(later=True)
    assert heard == ["later", "done"]


def test_a_pair_of_another_daemon_s_is_taken_over_also_over_the_death_of_a_keeper(
    stage: Stage,
) -> None:
    found: list[object] = []
    sock: Any = SimpleNamespace(fileno=lambda: 9)
    assert stage.splice.take_over(3, sock, sock, found.append)
    stage.asker.lose()
    assert stage.asker.take() == ("take_over", {"index": 3, "fds": [9, 9]})
    stage.asker.answer()
    assert found == [None]  # it is not there any more


# What it has carried


def carried(stage: Stage) -> list[tuple[int, int, int]]:
    """Of each direction: bytes, packets, and bytes that are left."""
    flows = [Flow(direction, 5, 6) for direction in (Direction.UP, Direction.DOWN)]
    return [stage.splice.carried(stage.pair, flow) for flow in flows]


def test_what_the_programs_counted_while_a_pair_was_adopted_is_counted(stage: Stage) -> None:
    """They stored the sum in a slot that was not this one yet, and no packet has followed."""
    stage.record.direction[1].bytes, stage.record.direction[1].packets = 23, 2
    stage.splice._window.words64[3 * PairWindow.WORDS64 + table.REDIRECTED[1]] = 18
    assert carried(stage) == [(0, 0, 0), (23, 2, 0)]
    # It is not less because a record is read that is older than what is shown.
    stage.record.direction[1].bytes = 20
    assert carried(stage) == [(0, 0, 0), (23, 2, 0)]


def test_what_is_counted_of_a_pair_whose_end_is_told_is_that_of_before(stage: Stage) -> None:
    """Its record is the keeper's from then on, and may be another pair's."""
    stage.record.direction[0].bytes = 7
    assert stage.splice.end(stage.pair, _never)
    stage.record.direction[0].bytes = 1000
    assert carried(stage)[0] == (7, 0, 0)
    stage.record.id = 43
    stage.state.end_reported = False
    assert carried(stage)[0] == (7, 0, 0)
    stage.asker.answer()


# How its server is reached


class Copied:
    """A stage whose pair is copied, and a list of the keeper's looks that were reported."""

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = stage
        self.told: list[object] = []
        self.went_on: list[object] = []
        stage.splice._showing_routes = {}
        stage.splice._paused = {}
        stage.splice._loop.redirect = lambda _fd, _to: None
        self.copying: Any = object.__new__(CopyDatapath)
        self.pair = self.another()
        monkeypatch.setattr(
            PausedPair, "resume_copy", lambda _self, pair: self.went_on.append(pair)
        )

    def another(self) -> Any:
        return SimpleNamespace(datapath=self.copying, id=42, client_fd=5, server_fd=6)

    def show_route(self, pair: Any) -> bool:
        return bool(self.stage.splice.show_route(pair, self.told.append))


@pytest.fixture
def copied(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Copied:
    return Copied(stage, monkeypatch)


@pytest.mark.parametrize("how", ["answered", "lost", "late", "stopping"])
def test_a_copied_pair_goes_on_once_when_the_keeper_has_looked_or_is_late(
    stage: Stage, copied: Copied, how: str
) -> None:
    assert copied.show_route(copied.pair)
    assert isinstance(copied.pair.datapath, PausedPair)
    match how:
        case "answered":
            stage.asker.answer(learned=1)
        case "lost":
            stage.asker.lose()
        case "late":
            stage.pass_time()
        case "stopping":
            stage.splice.finish_paused()
    assert copied.pair.datapath is copied.copying
    assert copied.told == copied.went_on == [copied.pair]
    if stage.asker.asked:  # an answer that nobody waits for any more
        stage.asker.answer(learned=1)
    assert copied.told == [copied.pair]
    assert stage.broken == []


def test_a_pair_that_ends_while_the_keeper_looks_ends_afterwards(
    stage: Stage, copied: Copied
) -> None:
    copied.show_route(copied.pair)
    copied.pair.datapath.ends_with = CloseReason.CLIENT_RESET
    stage.asker.answer(learned=0)
    assert stage.broken == [CloseReason.CLIENT_RESET]


def test_a_pair_that_is_gone_is_told_of_to_nobody(stage: Stage, copied: Copied) -> None:
    copied.show_route(copied.pair)
    copied.pair.datapath.leave(copied.pair)
    stage.asker.answer(learned=1)
    assert copied.told == []


def test_a_keeper_that_is_busy_keeps_no_more_pairs_waiting(stage: Stage, copied: Copied) -> None:
    pairs = [copied.another() for _ in range(MOST_PAUSED + 1)]
    assert [copied.show_route(pair) for pair in pairs] == [True] * MOST_PAUSED + [False]
    assert pairs[-1].datapath is copied.copying
    stage.pass_time()
    assert copied.told == pairs[:-1]
    while stage.asker.asked:
        stage.asker.answer(learned=1)
    stage.asker.has_room = False
    assert not copied.show_route(pairs[-1])
    assert pairs[-1].datapath is copied.copying
