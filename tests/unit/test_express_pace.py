"""How soon the keeper goes round all places again, and when their connections rest for less."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from pyforwarder.datapath.express import keeping
from pyforwarder.datapath.express.connection_maps import LEAST_REST_S
from pyforwarder.datapath.express.grace import Grace
from pyforwarder.datapath.express.pace import Pace
from tests.helpers.express_keeper import Stage
from tests.helpers.waiting import wait_for

PLACES = 9870


@pytest.fixture
def pace() -> Pace:
    return Pace(PLACES, taken=1000)


def test_while_nothing_begins_it_is_seldom(pace: Pace) -> None:
    for now_s in (100.0, 100.2, 160.0):
        pace.glance(now_s, 1000)
        assert (pace.pause_s, pace.is_short, pace.left) == (0.2, False, PLACES)


def test_a_burst_that_begins_right_behind_a_glance_is_known_while_places_are_left(
    pace: Pace,
) -> None:
    """At the rate of a host's own clients."""
    pace.glance(100.0, 1000)
    taken = 1000 + int(26_700 * pace.pause_s)
    pace.glance(100.0 + pace.pause_s, taken)
    assert pace.is_short
    assert pace.left == PLACES - 5340
    assert pace.pause_s == pytest.approx((PLACES - 5340) / 26_700 / 8, rel=0.01)


def test_the_fewer_are_left_the_sooner_but_no_more_than_fifty_times_a_second(pace: Pace) -> None:
    pauses = []
    pace.glance(100.0, 1000)
    for number in range(1, 12):
        pace.glance(100.0 + number * 0.1, 1000 + number * 1000)
        pauses.append(pace.pause_s)
    assert pauses == sorted(pauses, reverse=True)
    assert pauses[0] == pytest.approx((PLACES - 1000) / 10_000 / 8)
    assert (pauses[-1], pace.left) == (0.02, 0)
    pace.went_round(PLACES - 100)
    assert (pace.left, pace.is_short) == (PLACES - 100, False)
    pace.glance(105.0, 12_000)  # it is over
    assert pace.pause_s == 0.2


@pytest.mark.parametrize(("taken", "is_short"), [(2467, False), (2468, False), (2469, True)])
def test_a_quarter_taken_is_short(pace: Pace, taken: int, *, is_short: bool) -> None:
    pace.glance(100.0, 1000 + taken)
    assert pace.is_short is is_short


def test_two_glances_at_once_are_none(pace: Pace) -> None:
    pace.glance(100.0, 1000)
    pace.glance(100.0, 1500)
    assert pace.pause_s == 0.2


# ------------------------------------------------------------------------------- the keeper


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr("pyforwarder.datapath.express.ports.hold_port", lambda _port: _Held())
    with contextlib.closing(Stage(places=64)) as made:
        yield made


class _Held:
    def close(self) -> None:
        """Nobody asks for it again."""


def glance(stage: Stage) -> None:
    """One turn, in which no look is due."""
    keeper = stage.keeper
    keeper._glance_s, keeper._next_s = 0.0, time.monotonic() + 60
    keeper.go_on()


def test_places_come_back_between_looks_while_they_are_short(stage: Stage) -> None:
    stage.start()
    stage.keeper.go_on()
    for place in range(40):
        word = stage.connections.join(place)
        stage.connections.rest(place, word, time.monotonic() - LEAST_REST_S)
        for direction in stage.connections.record(place).direction:
            direction.interface = 2
        stage.connections.asks[place].begun_ns -= 10**9
    for _ in range(2):
        glance(stage)
    assert len(stage.connections.queue) == 64
    assert stage.keeper._places.is_through


def test_places_that_are_not_short_rest_between_looks(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start()
    stage.keeper.go_on()
    rounds: list[object] = []
    monkeypatch.setattr(stage.connections, "go_round", rounds.append)
    for place in range(16):
        stage.connections.join(place)
    glance(stage)
    assert not rounds
    assert stage.keeper._next_s > time.monotonic() + 10


def test_a_look_comes_soon_where_a_glance_finds_them_short(stage: Stage) -> None:
    """A worker is to be told of what the programs do not count."""
    stage.start()
    stage.keeper.go_on()
    for place in range(40):
        stage.connections.join(place)
    glance(stage)
    assert stage.keeper._next_s <= time.monotonic() + keeping._LOOK_WHEN_SHORT_S


def test_an_idle_keeper_glances_five_times_a_second_at_most(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start()
    stage.keeper.go_on()
    monkeypatch.setattr(stage.connections, "words", lambda: pytest.fail("it has looked at all"))
    glance(stage)
    now_s = time.monotonic()
    assert stage.keeper._glance_s == pytest.approx(now_s + 0.2, abs=0.1)
    stage.keeper._next_s = now_s
    stage.keeper.go_on()  # a look, too, has nothing to look at
    assert stage.keeper.wait_s(1.0) == pytest.approx(0.2, abs=0.1)


# -------------------------------------------------------------------------------- programs


def test_what_is_wanted_while_it_waits_is_for_the_next_wait() -> None:
    """A program that has begun meanwhile may run still."""
    is_waiting, may_end = threading.Semaphore(0), threading.Semaphore(0)

    def wait() -> None:
        is_waiting.release()
        may_end.acquire()

    grace = Grace(wait)
    grace.want(1)
    is_waiting.acquire()
    for later in (2, 3):
        grace.want(later)
    assert grace.passed_ns == 0
    may_end.release()
    is_waiting.acquire()
    assert grace.passed_ns == 1
    may_end.release()
    wait_for(lambda: grace.passed_ns == 3, "the second wait is over")
    assert not is_waiting.acquire(blocking=False)


def test_a_wait_that_fails_has_not_been_one(capsys: pytest.CaptureFixture[str]) -> None:
    fails = [True, True, False]

    def wait() -> None:
        if fails.pop(0):
            raise OSError(12, "made up")

    grace = Grace(wait)
    for passed_ns in (0, 0, 7):
        grace.pass_by(7)
        assert grace.passed_ns == passed_ns
    assert capsys.readouterr().err.count("waits for no program") == 1


def test_a_thread_that_cannot_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there are no tasks left, places must not stay away for good."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    grace = Grace(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        grace.want(1)
        grace.want(2)
    assert grace.passed_ns == 0
    assert capsys.readouterr().err.count("can't start new thread") == 1
    grace.want(3)
    wait_for(lambda: grace.passed_ns == 3, "it waits after all")
