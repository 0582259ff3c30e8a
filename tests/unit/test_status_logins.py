"""Which logins wait for the comparison of their password, and which make room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.loop import Loop
from pyforwarder.status import logins
from pyforwarder.status.gate import Doubt
from pyforwarder.status.logins import MOST_WAITING, LoginQueue

if TYPE_CHECKING:
    from pyforwarder.status.http import Answer


@dataclass(slots=True)
class Login:
    """One that asks, and what it is told."""

    client: str
    password: bytes = b"wrong"
    is_suspect: bool = False
    told: list[str] = field(default_factory=list)

    def doubt(self) -> Doubt:
        host = client = self.client
        return Doubt(
            b"right", self.password, host, client, self.is_suspect, self.settle, self.dropped
        )

    def settle(self, is_right: bool) -> str | Answer:
        self.told.append("settled right" if is_right else "settled wrong")
        return ""

    def dropped(self) -> None:
        self.told.append("dropped")

    def answer(self, is_right: bool) -> None:
        self.told.append("right" if is_right else "wrong")

    def pushed_out(self) -> None:
        self.told.append("pushed out")


class Play:
    """A queue whose comparisons wait until they may."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.may = threading.Event()
        self.compared: list[bytes] = []
        self.queue = LoginQueue(self.loop, self.is_right)

    def is_right(self, stored: bytes, password: bytes) -> bool:
        assert self.may.wait(30)
        self.compared.append(password)
        return stored == password

    def ask(self, login: Login) -> int | bool | None:
        return self.queue.ask(login.doubt(), login.answer, login.pushed_out)

    def settle(self) -> None:
        self.may.set()
        for _ in range(3000):
            if not len(self.queue):
                return
            self.loop.run_once(0.01)
        raise AssertionError("they are not compared")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    monkeypatch.setattr(logins, "PACE_S", 0.0)
    play = Play()
    yield play
    play.may.set()
    play.loop.dispose()


def test_each_is_told_what_was_found(play: Play) -> None:
    wrong, right = Login("a"), Login("b", b"right")
    for login in (wrong, right):
        assert type(play.ask(login)) is int
    play.settle()
    assert (wrong.told, right.told) == (["wrong"], ["right"])
    assert play.ask(Login("c", b"right")) is True  # it is known now
    assert play.compared == [b"wrong", b"right"]


def test_a_flood_of_those_that_were_wrong_does_not_keep_a_right_one_out(play: Play) -> None:
    flood = [Login(f"bad {n}", is_suspect=True) for n in range(MOST_WAITING)]
    assert all(play.ask(login) for login in flood)
    late = Login("bad late", is_suspect=True)
    assert play.ask(late) is None
    assert late.told == ["dropped"]
    right = Login("good", b"right")
    assert play.ask(right)
    assert [login.told for login in flood].count(["dropped", "pushed out"]) == 1
    assert len(play.queue) == MOST_WAITING
    play.settle()
    assert right.told == ["right"]
    assert len(play.compared) <= MOST_WAITING + 1


def test_a_client_that_asks_much_makes_room_for_another(play: Play) -> None:
    many = [Login("a", b"%d" % n) for n in range(MOST_WAITING)]
    assert all(play.ask(login) for login in many)
    again = Login("a")
    assert play.ask(again) is None
    other = Login("b", b"right")
    assert play.ask(other)
    assert sum("pushed out" in login.told for login in many) == 1
    play.settle()
    assert other.told == ["right"]


def test_a_network_that_asks_much_makes_room_for_another(play: Play) -> None:
    many = [Login(f"10.0.0.{n}") for n in range(MOST_WAITING)]
    assert all(play.ask(login) for login in many)
    assert play.ask(Login("10.0.0.99")) is None
    assert play.ask(Login("10.1.0.1"))
    # One that was wrong lately pushes nobody out who was not.
    assert play.ask(Login("10.2.0.1", is_suspect=True)) is None
    assert len(play.queue) == MOST_WAITING


def test_a_client_that_has_waited_long_is_told_to_come_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "MOST_S", 0.01)
    login = Login("a", b"right")
    assert play.ask(login)
    for _ in range(3000):
        if login.told:
            break
        play.loop.run_once(0.01)
    assert login.told == ["dropped", "pushed out"]
    assert len(play.queue) == 0


def test_a_client_that_leaves_is_not_told_and_counts_as_wrong(play: Play) -> None:
    leaver = Login("a")
    number = play.ask(leaver)
    assert type(number) is int
    play.queue.forget(number)
    play.queue.forget(number)
    assert leaver.told == ["settled wrong"]
    assert len(play.queue) == 0
    stays = Login("b", b"right")
    assert play.ask(stays)
    play.settle()
    assert (leaver.told, stays.told) == (["settled wrong"], ["right"])
