"""Ends that nobody needs to be told of one by one: every one is counted, and once."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import Counter as Tally
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express import keeping, ports
from pyforwarder.datapath.express.connection_maps import (
    LEAST_REST_HERE_S,
    LEAST_REST_S,
    REST_S,
)
from pyforwarder.datapath.express.sharing import Label
from pyforwarder.datapath.splice.abi import SpliceState
from tests.helpers.express_keeper import FIRST_SPLICE, Stage

pytestmark = pytest.mark.usefixtures("still_clock")

PLACES: Final = 64
QUIET: Final = Label("main", ("rest", "other"), (0, 0, 0), (), is_logged=False)
SERVER: Final = b"\0" * 10 + b"\xff\xff" + bytes([192, 0, 2, 9])
PORT_BE: Final = socket.htons(9001)


class Hearing:
    """What workers count of what they are told, as `worker/express.py` does it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sums: dict[str, tuple[int, list[int]]] = {}
        self._last: dict[int, int] = {}
        self.counted: Tally[tuple[object, ...]] = Tally()
        self.told = 0  # of ends, one by one
        self.messages = 0

    def hear(self) -> None:
        """All that they have been told since."""
        for end in self._stage.express.workers:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._take(json.loads(end.recv(1 << 16)))

    def _take(self, message: dict[str, Any]) -> None:
        self.messages += 1
        for place, word in message["of"]:
            self.told += self._last.get(place) != word
            self._last[place] = word
        for key, round_, listener, rule, port, server, numbers in message.get("counted", ()):
            before_round, before = self._sums.get(key, (0, [0, 0, 0]))
            if before_round != round_:
                before = [0, 0, 0]
            self._sums[key] = round_, numbers
            what = (listener, rule, port, *server)
            for name, now, then in zip(("pairs", "up", "down"), numbers, before, strict=True):
                self.counted[(*what, name)] += now - then

    def pairs(self) -> int:
        """How many in all, those that were told of alone among them."""
        return self.told + sum(n for what, n in self.counted.items() if what[-1] == "pairs")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(ports, "hold_port", lambda _: SimpleNamespace(close=lambda: None))
    with contextlib.closing(Stage(places=PLACES)) as made:
        made.express.said = QUIET
        for number in (1, 2):
            target = abi.Target(port=PORT_BE if number == 1 else socket.htons(9002), out=3)
            target.server[:] = memoryview(SERVER).cast("I").tolist()
            made.connections.targets[number] = target
        made.start()
        yield made


@pytest.fixture
def hearing(stage: Stage) -> Hearing:
    return Hearing(stage)


def end(
    stage: Stage, place: int, *, target: int = 1, rule: int = 0, up: int = 5, down: int = 7
) -> None:
    """A connection begins and ends there."""
    stage.connections.join(place, has_ended=True)
    ask = stage.connections.asks[place]
    ask.listener_table, ask.rule, ask.target = 0, rule, target
    record = stage.connections.record(place)
    record.family = 4
    direction = record.direction[0]
    direction.from_.dport = socket.htons(443)
    direction.target[:] = memoryview(SERVER).cast("I").tolist()
    direction.dport = stage.connections.targets[target].port
    for one, carried in zip(record.direction, (up, down), strict=True):
        one.bytes, one.begin_seq, one.fin_seq = carried, 0, carried + 1


def go_on(stage: Stage) -> None:
    """Two rounds: what the first one sees the second one counts."""
    for _ in range(2):
        stage.keeper._next_s = 0.0
        stage.keeper.go_on()


def test_ends_are_counted_together(stage: Stage, hearing: Hearing) -> None:
    for place in range(10):
        end(stage, place, up=place)
    go_on(stage)
    hearing.hear()
    what = ("main", "rest", 443, SERVER.hex(), 9001)
    assert (hearing.told, hearing.messages) == (0, 1)
    assert hearing.counted == {(*what, "pairs"): 10, (*what, "up"): 45, (*what, "down"): 70}
    go_on(stage)
    hearing.hear()
    assert (hearing.pairs(), hearing.messages) == (10, 1)
    words = stage.connections.words()
    assert [word & abi.STATE_MASK for word in words[:10]] == [abi.AskState.RESTING] * 10


def test_each_rule_port_and_server_has_a_sum_of_its_own(stage: Stage, hearing: Hearing) -> None:
    for place in range(12):
        end(stage, place, target=1 + place % 2, rule=place % 4 // 2)
    go_on(stage)
    hearing.hear()
    found = {what[:-1]: n for what, n in hearing.counted.items() if what[-1] == "pairs"}
    assert found == {
        ("main", rule, 443, SERVER.hex(), port): 3
        for rule in ("rest", "other")
        for port in (9001, 9002)
    }


def test_what_the_log_wants_is_told_of_one_by_one(stage: Stage, hearing: Hearing) -> None:
    stage.express.said = Label("main", ("rest",), (0, 0, 0))
    end(stage, 3)
    go_on(stage)
    hearing.hear()
    assert (hearing.told, sum(hearing.counted.values())) == (1, 0)


@pytest.mark.parametrize("change", ["label", "table", "server"])
def test_what_may_soon_be_another_s_is_counted_no_more(
    stage: Stage, hearing: Hearing, change: str
) -> None:
    """A table whose listener is gone, and a server's number that is given back."""
    end(stage, 0)
    go_on(stage)
    end(stage, 1)
    if change == "label":
        # Its number is another's by now: the pair is older.
        stage.express.since_ns = time.monotonic_ns()
        stage.express.said = Label("another", ("rest",), (0, 0, 0), (), is_logged=False)
    elif change == "table":
        stage.express.tables.clear()
    else:
        stage.express.back.append(1)
    go_on(stage)
    hearing.hear()
    if change == "server":
        assert stage.express.back == []
    assert (hearing.told, hearing.pairs()) == (int(change != "server"), 2)
    assert not any(what[0] == "another" for what in hearing.counted)
    go_on(stage)
    assert stage.connections.sums == {}


def test_a_server_s_number_is_kept_until_its_worker_knows_all(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(stage, 0)
    with monkeypatch.context() as patched:
        patched.setattr(stage.keeper._counting, "_report", lambda *_: False)
        go_on(stage)
        stage.express.back.append(1)
        go_on(stage)
        assert stage.express.back == [1]
    go_on(stage)
    go_on(stage)
    hearing.hear()
    assert (stage.express.back, hearing.pairs()) == ([], 1)


@pytest.mark.parametrize("is_told", [False, True])
def test_a_keeper_that_dies_between_counting_and_telling_loses_and_doubles_nothing(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch, *, is_told: bool
) -> None:
    for place in range(4):
        end(stage, place)
    with monkeypatch.context() as patched:
        if is_told:
            # It dies right behind the message.
            kept = stage.connections.write_ends

            def write_ends(key: bytes, ends: abi.Ends) -> None:
                if not stage.connections.sums.get(key, abi.Ends()).pairs:
                    kept(key, ends)

            patched.setattr(stage.connections, "write_ends", write_ends)
        else:
            patched.setattr(stage.keeper._counting, "_report", lambda *_: False)
        go_on(stage)
        hearing.hear()
        assert hearing.pairs() == 4 * is_told
    for place in range(4, 9):
        end(stage, place)
    stage.start()
    for _ in range(3):
        go_on(stage)
    hearing.hear()
    assert hearing.pairs() == 9
    end(stage, 9)
    go_on(stage)
    hearing.hear()
    assert hearing.pairs() == 10


def test_a_pair_that_ends_while_it_waits_for_a_worker_is_counted_and_given_to_none(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(stage, 0)
    go_on(stage)
    with monkeypatch.context() as patched:
        patched.setattr(stage.keeper, "_take_in_some", lambda: False)
        stage.connections.join(1, age_s=5.0)
        go_on(stage)
        assert list(stage.keeper._lasting[1]) == [1]
        begun_ns = stage.connections.asks[1].begun_ns
        end(stage, 1)
        stage.connections.asks[1].word -= 8  # it is the same
        stage.connections.asks[1].begun_ns = begun_ns
        stage.keeper._counting._kinds.clear()
        for ends in stage.connections.sums.values():
            ends.since_ns = 0
        stage.keeper._counting.begin()
        for ends in stage.connections.sums.values():
            ends.since_ns = 0
        go_on(stage)
    go_on(stage)
    hearing.hear()
    assert (stage.taken, hearing.pairs()) == ([], 2)


@pytest.mark.parametrize(
    ("interface", "least_s"), [(2, LEAST_REST_S), (0, LEAST_REST_HERE_S)], ids=["far", "here"]
)
def test_a_place_is_used_again_once_it_has_rested_and_no_program_knows_it(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interface: int,
    least_s: float,
) -> None:
    def refuse() -> None:
        raise OSError(12, "made up")

    end(stage, 0)
    for direction in stage.connections.record(0).direction:
        direction.interface = interface
    go_on(stage)
    places, now_s = stage.keeper._places, time.monotonic()
    places.look(now_s + REST_S - 1)
    assert 0 not in stage.connections.queue
    # Where more than a quarter are taken, soon.
    for place in range(1, PLACES // 3):
        stage.connections.join(place)
    for by_s in (0.0, least_s / 2):
        places.look(now_s + by_s)
    assert 0 not in stage.connections.queue
    with monkeypatch.context() as held_up:
        # No packet finds it any more; programs that have found it before may still run.
        held_up.setattr(places._grace, "_wait", refuse)
        for by_s in (0.1, 0.2, 60.0):
            places.look(now_s + least_s + by_s)
            assert stage.connections.record(0).state == SpliceState.FREE
            assert stage.connections.word(0) & abi.STATE_MASK == abi.AskState.LEAVING
            assert 0 not in stage.connections.queue
        assert capsys.readouterr().err.count("waits for no program") == 1
    for by_s, is_free in ((61.0, False), (61.1, True)):
        places.look(now_s + least_s + by_s)
        assert (0 in stage.connections.queue) is is_free


def test_down_waits_for_what_is_not_counted(stage: Stage, hearing: Hearing) -> None:
    end(stage, 0)
    stage.express.is_to_stop = True
    stage.keeper._next_s = 0.0
    stage.keeper.go_on()
    assert not stage.express.has_stopped
    go_on(stage)
    assert stage.express.has_stopped
    hearing.hear()
    assert hearing.pairs() == 1


def test_what_the_programs_leave_is_told_of(stage: Stage, hearing: Hearing) -> None:
    end(stage, 0)
    stage.connections.store(0, state=SpliceState.RESET)
    go_on(stage)
    hearing.hear()
    assert (hearing.told, hearing.pairs()) == (1, 1)
    assert stage.connections.word(0) & abi.STATE_MASK == abi.AskState.RESTING


def test_no_more_sums_than_there_is_room_for(stage: Stage, hearing: Hearing) -> None:
    def refuse(_key: bytes, _ends: abi.Ends) -> None:
        raise OSError(7, "made up")

    stage.connections.write_ends = refuse  # type: ignore[method-assign, assignment]
    end(stage, 0)
    go_on(stage)
    hearing.hear()
    assert (hearing.told, hearing.pairs()) == (1, 1)


def test_a_burst_of_a_new_kind_is_counted_once_a_few_of_it_were_looked_at(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns that are short, so that the others do not wait for that either."""
    monkeypatch.setattr(keeping, "_LOOKS_AT_ONCE", 4)
    looked: list[int] = []
    ask = stage.connections.ask

    def look(place: int) -> abi.Ask:
        looked.append(place)
        return ask(place)

    monkeypatch.setattr(stage.connections, "ask", look)
    for place in range(PLACES):
        end(stage, place, target=1 + place % 2)
    turns = 0
    stage.keeper._next_s = 0.0
    while not looked or stage.keeper._next_s <= time.monotonic():
        stage.keeper.go_on()
        turns += 1
    assert (len(looked), turns) == (4, 2)
    hearing.hear()
    assert (hearing.told, hearing.pairs()) == (0, PLACES)


def test_a_pair_of_a_worker_s_is_not_counted(stage: Stage, hearing: Hearing) -> None:
    end(stage, 0)
    go_on(stage)
    end(stage, 1)
    stage.connections.store(1, worker=0)
    stage.keeper.adopted(FIRST_SPLICE + 1, 0, has_it=True)
    go_on(stage)
    hearing.hear()
    assert hearing.pairs() == 1
    assert stage.connections.record(1).state == SpliceState.ACTIVE


def test_an_end_that_waits_for_a_busy_worker_is_told_of_or_counted_and_not_both(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no room for its sum; then another one made it that had begun before."""

    def refuse(_key: bytes, _ends: abi.Ends) -> None:
        raise OSError(7, "made up")

    telling = stage.keeper._telling
    with monkeypatch.context() as busy:
        busy.setattr(telling, "go_on", lambda: False)
        with monkeypatch.context() as full:
            full.setattr(stage.connections, "write_ends", refuse)
            for place in (1, 3, 5):
                end(stage, place)
                stage.connections.asks[place].begun_ns += place
            go_on(stage)
        assert [one.place for one in telling._unreported[1]] == [1, 3, 5]
        end(stage, 0)
        stage.connections.asks[0].begun_ns = stage.connections.asks[1].begun_ns + 1
        go_on(stage)
    go_on(stage)
    hearing.hear()
    assert (hearing.told, hearing.pairs()) == (1, 4)
    assert telling.is_done


@pytest.mark.parametrize("by", ["itself", "another"])
def test_an_end_that_a_dying_keeper_has_told_of_alone_is_not_counted_again(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """There was no room for its sum; the next keeper has some."""

    def refuse(_key: bytes, _ends: abi.Ends) -> None:
        raise OSError(7, "made up")

    with monkeypatch.context() as dying:
        dying.setattr(stage.connections, "write_ends", refuse)
        # It dies right behind the message.
        dying.setattr(stage.keeper._telling, "_told", lambda *_: None)
        end(stage, 1)
        go_on(stage)
        hearing.hear()
        assert (hearing.told, hearing.pairs()) == (1, 1)
    if by == "another":  # whose sum it would be in
        end(stage, 0)
        stage.connections.asks[0].begun_ns = stage.connections.asks[1].begun_ns - 1
    stage.start()
    for _ in range(3):
        go_on(stage)
    hearing.hear()
    assert hearing.pairs() == (2 if by == "another" else 1)
    for place in (0, 1)[by == "itself" :]:
        assert stage.connections.word(place) & abi.STATE_MASK == abi.AskState.RESTING


def test_ends_are_told_of_one_by_one_while_the_kernel_cannot_count(
    stage: Stage,
    hearing: Hearing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said once; and each is told of once, also where it can count again meanwhile."""

    def fail(_now_s: float, **_: object) -> Any:
        raise OSError(12, "made up")

    end(stage, 0)
    go_on(stage)
    with monkeypatch.context() as patched:
        patched.setattr(stage.connections, "go_round", fail)
        for place in range(1, 4):
            end(stage, place)
            go_on(stage)
        hearing.hear()
        assert (hearing.told, hearing.pairs()) == (3, 4)
        patched.setattr(stage.keeper._telling, "go_on", lambda: False)
        end(stage, 4)
        go_on(stage)
    go_on(stage)
    hearing.hear()
    assert (hearing.told, hearing.pairs()) == (3, 5)
    assert capsys.readouterr().err.count("go_round") == 1


def test_sums_are_looked_at_where_something_may_have_come_to_them_alone(
    stage: Stage, hearing: Hearing, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bytes] = []
    ends = stage.connections.ends

    def look(key: bytes) -> abi.Ends:
        looked.append(key)
        return ends(key)

    monkeypatch.setattr(stage.connections, "ends", look)
    end(stage, 0)
    go_on(stage)
    looked.clear()
    go_on(stage)
    assert not looked
    with monkeypatch.context() as patched:
        patched.setattr(stage.keeper._counting, "_report", lambda *_: False)  # its worker is busy
        end(stage, 1)
        go_on(stage)
    looked.clear()
    go_on(stage)
    hearing.hear()
    assert hearing.pairs() == 2
    assert len(looked) == 1
