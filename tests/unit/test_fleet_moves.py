"""A planned move is agreed on through the store."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyforwarder.fleet.failover.moves import Asked, Move, MoveError, ask
from pyforwarder.fleet.failover.record import tag_of
from pyforwarder.fleet.layout import Keys

KEYS = Keys("edge")
KEY = KEYS.move(tag_of("two"))


class FakeStore:
    """Keys and revisions, without a network."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[bytes, int]] = {}
        self._revision = 0

    def get(self, key: str) -> tuple[bytes, int] | None:
        return self.found.get(key)

    def grant(self, ttl_s: int) -> int:
        return ttl_s

    def revoke(self, lease: int) -> None:
        self.found.clear()

    def change(self, key: str, value: str, *, was: int, lease: int) -> bool:
        if self.found.get(key, (b"", 0))[1] != was:
            return False
        self.put(key, value, lease=lease)
        return True

    def put(self, key: str, value: str, *, lease: int) -> None:
        self._revision += 1
        self.found[key] = value.encode(), self._revision

    @property
    def state(self) -> str:
        return Move.decode(self.found[KEY][0]).state


class Time:
    """A clock that goes when somebody sleeps; then something happens, too."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        self.now_s = 0.0
        self._happens = list(happens)

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s
        if self._happens:
            self._happens.pop(0)()


def play(store: FakeStore, *happens: Callable[[], object]) -> None:
    time = Time(*happens)
    ask(
        store,  # type: ignore[arg-type]
        KEYS,
        "one",
        "two",
        answer_s=1.0,
        clock=lambda: time.now_s,
        sleep=time.sleep,
    )


def asked(store: FakeStore) -> Asked:
    return Asked(store, KEYS, tag_of("two"), lambda: 7)  # type: ignore[arg-type]


def test_the_asked_machine_says_that_it_begins_and_that_it_is_done() -> None:
    store = FakeStore()
    two = asked(store)
    seen = []

    def begin() -> None:
        seen.append(two.begin())
        seen.append(store.state)

    play(store, begin, lambda: two.end(""))
    assert seen == ["one", "begun"]
    assert KEY not in store.found


def test_a_machine_that_cannot_take_them_says_why() -> None:
    store = FakeStore()
    two = asked(store)
    with pytest.raises(MoveError, match="'two' cannot take them: no interface"):
        play(store, two.begin, lambda: two.end("no interface"))


def test_a_question_that_nobody_answers_is_taken_back() -> None:
    store = FakeStore()
    with pytest.raises(MoveError, match="does not answer"):
        play(store)
    assert asked(store).begin() == ""


def test_what_was_taken_back_in_the_meantime_is_not_begun() -> None:
    store = FakeStore()
    two = asked(store)
    store.put(KEY, Move(by="one", to="two").encode(), lease=0)
    change = store.change

    def late(key: str, value: str, *, was: int, lease: int) -> bool:
        store.put(key, Move(by="one", to="two", state="failed").encode(), lease=0)
        return change(key, value, was=was, lease=lease)

    store.change = late  # type: ignore[method-assign]
    assert two.begin() == ""


def test_a_machine_that_has_begun_and_says_no_more_may_have_them() -> None:
    store = FakeStore()
    with pytest.raises(MoveError, match="look there"):
        play(store, asked(store).begin)


@pytest.mark.parametrize("state", ["asked", "begun"])
def test_one_move_at_a_time(state: str) -> None:
    store = FakeStore()
    store.put(KEY, f'{{"by": "three", "to": "two", "state": "{state}"}}', lease=0)
    with pytest.raises(MoveError, match="under way"):
        play(store)


@pytest.mark.parametrize(
    "value", ["", "{}", '{"by": "one"}', '{"by":"one","to":"two","state":"x"}']
)
def test_what_is_no_question_is_none(value: str) -> None:
    store = FakeStore()
    store.put(KEY, value, lease=0)
    assert asked(store).begin() == ""
