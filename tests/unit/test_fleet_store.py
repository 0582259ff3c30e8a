"""How long a store is waited for, without one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from pyforwarder.config import Fleet
from pyforwarder.fleet.files import Credentials, StoreFiles
from pyforwarder.fleet.store import Store, StoreError

TIMEOUT_S = 3.0
LOGIN, RANGE = "/auth/authenticate", "/kv/range"


@dataclass(slots=True)
class Play:
    """Members that take their time, and what was asked: whom, what, how long it was waited for."""

    now_s: float = 1000.0
    takes_s: dict[tuple[str, str], float] = field(default_factory=dict)
    asked: list[tuple[str, str, float]] = field(default_factory=list)


class Member:
    """A client of etcd3gw, as `Store` uses it."""

    def __init__(self, play: Play, name: str) -> None:
        self._play = play
        self.base_url = name
        self.timeout = 0.0
        self.session = SimpleNamespace(headers={}, post=self._watch)

    def _watch(self, *_: object, **__: object) -> None:
        raise requests.exceptions.ReadTimeout  # nothing has changed

    def get_url(self, path: str) -> str:
        return path

    def post(self, path: str, json: object) -> dict[str, Any]:
        del json
        self._play.asked.append((self.base_url, path, round(self.timeout, 3)))
        takes_s = self._play.takes_s.get((self.base_url, path), 0.0)
        self._play.now_s += min(takes_s, self.timeout)
        if takes_s > self.timeout:
            raise requests.exceptions.ReadTimeout
        return {"token": "x"} if path == LOGIN else {"kvs": []}


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    made = Play()
    monkeypatch.setattr(time, "monotonic", lambda: made.now_s)
    return made


def store_of(play: Play, members: str = "ab") -> Store:
    """Of these members, which must be told who we are."""
    fleet = Fleet.model_validate({"endpoints": ["http://a:1"], "name": "edge"})
    store = Store(fleet, StoreFiles(Credentials("we", "x"), None), timeout_s=TIMEOUT_S)
    clients: list[Any] = [Member(play, name) for name in members]
    store._clients = clients
    return store


def test_a_member_has_one_deadline_for_our_name_and_for_what_is_asked(play: Play) -> None:
    play.takes_s["a", LOGIN] = 2.0
    assert store_of(play).get("x") is None
    assert play.asked == [("a", LOGIN, 3.0), ("a", RANGE, 1.0)]


def test_a_member_that_takes_too_long_for_both_is_given_up_and_the_next_one_has_as_long(
    play: Play,
) -> None:
    play.takes_s = {("a", LOGIN): 2.0, ("a", RANGE): 2.0}
    assert store_of(play).get("x") is None
    assert play.asked == [
        *(("a", LOGIN, 3.0), ("a", RANGE, 1.0)),
        *(("b", LOGIN, 3.0), ("b", RANGE, 3.0)),
    ]
    assert play.now_s == 1003.0


def test_a_member_that_knows_us_at_the_last_moment_is_asked_nothing(play: Play) -> None:
    play.takes_s["a", LOGIN] = 3.0
    assert store_of(play).get("x") is None
    assert play.asked == [("a", LOGIN, 3.0), ("b", LOGIN, 3.0), ("b", RANGE, 3.0)]


def test_both_answers_are_waited_for_no_longer_than_the_caller_says(play: Play) -> None:
    store = store_of(play)
    store.until_s = play.now_s + 1.5
    play.takes_s = {("a", LOGIN): 1.0, ("a", RANGE): 1.0}
    with pytest.raises(StoreError, match="etcd at a: "):
        store.get("x")
    assert play.asked == [("a", LOGIN, 1.5), ("a", RANGE, 0.5)]
    assert play.now_s == 1001.5


def test_one_that_knows_us_has_all_the_time_for_what_is_asked(play: Play) -> None:
    store = store_of(play)
    store.get("x")
    store.get("y")
    assert play.asked[1:] == [("a", RANGE, 3.0)] * 2


def test_a_watch_says_who_we_are_with_all_the_time_that_a_member_has(play: Play) -> None:
    """Also after a request that had less."""
    store = store_of(play, "a")
    store.until_s = play.now_s + 0.5
    play.takes_s["a", RANGE] = 1.0
    with pytest.raises(StoreError):
        store.get("x")
    assert list(store.events("/x/", after=1, until_s=play.now_s + 5.0)) == []
    assert play.asked[1:] == [("a", RANGE, 0.5), ("a", LOGIN, 3.0)]
