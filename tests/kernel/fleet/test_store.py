"""What a real etcd says, however much stands in it."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet import store as stores
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.store import (
    MOST_ANSWER_BYTES,
    MOST_IN_WRITE,
    AnswerTooLongError,
    Change,
    Echo,
    NoSuchLeaseError,
    Store,
    StoreError,
    changes_in,
)
from tests.helpers.etcd import Tls, running

# etcd takes a request of 1.5 MB by default; in base64 a value is a third longer.
LONG = 1_050_000


@pytest.fixture
def store() -> Iterator[Store]:
    with running() as (etcd, _):
        fleet = Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"})
        with contextlib.closing(open_store(fleet)) as opened:
            yield opened


def test_keys_are_listed_in_pages_as_they_were_at_one_moment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"/many/{n:05}" for n in range(1500)]
    for first in range(0, len(keys), 100):
        store.write([(key, key) for key in keys[first : first + 100]])
    store.put("/manz", "x")
    asked: list[int] = []
    post = store._post

    def change_meanwhile(path: str, body: dict[str, object]) -> dict[str, object]:
        answer = post(path, body)
        if path == "/kv/range":
            asked.append(len(answer.get("kvs", [])))
            post("/kv/deleterange", {"key": stores._encode(keys[-1])})
        return answer

    monkeypatch.setattr(store, "_post", change_meanwhile)
    revision = store.written
    found = store.list("/many/")
    assert found.entries == [(key, key.encode()) for key in keys]
    assert found.revision == revision
    assert asked == [256, 512, 732]
    assert store.list("/many/").entries == found.entries[:-1]
    assert store.list("/none/").entries == []


def test_values_as_long_as_they_can_be_are_listed_and_no_more_than_there_is_room_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write in the store cannot have a machine run out of memory."""
    count = 2 * MOST_ANSWER_BYTES // LONG
    for n in range(count):
        store.put(f"/long/{n:02}", f"{n:02}" + "x" * LONG)
    entries = store.list("/long/").entries
    assert [(key, value[:2], len(value)) for key, value in entries] == [
        (f"/long/{n:02}", b"%02d" % n, LONG + 2) for n in range(count)
    ]
    monkeypatch.setattr(stores, "MOST_LIST_BYTES", 3 * LONG)
    with pytest.raises(AnswerTooLongError, match="more below /long/ than fits"):
        store.list("/long/")
    monkeypatch.setattr(stores, "MOST_ANSWER_BYTES", LONG)
    with pytest.raises(AnswerTooLongError, match="an answer too long"):
        store.get("/long/00")
    store.put("/short", "x")
    assert store.get("/short") is not None


def test_many_keys_are_written_in_the_same_moment(store: Store) -> None:
    """More than etcd takes in a plain transaction, and with removals among them."""
    keys = [f"/many/{n:03}" for n in range(MOST_IN_WRITE)]
    first = store.write([(key, key) for key in keys])
    assert store.written == first == store.list("/many/").revision
    changes = [(key, None if n % 2 else "x") for n, key in enumerate(keys)]
    second = store.write(changes)
    assert second == first + 1
    told = list(itertools.islice(store.events("/many/", after=first, until_s=math.inf), len(keys)))
    assert {change.revision for change in told} == {second}
    assert {change.key: change.value for change in told} == {
        key: value and value.encode() for key, value in changes
    }
    # Removals alone: whether something was there says whether anything has changed.
    assert store.write([(keys[0], None), (keys[1], None)]) == second + 1
    assert store.write([(keys[0], None), (keys[1], None)]) == 0
    assert store.written == second
    with pytest.raises(NoSuchLeaseError, match="lease not found"):
        store.write([("/many/x", "x")], lease=77)


def test_a_message_that_may_be_an_echo_is_passed_on_as_it_is(store: Store) -> None:
    first = store.write([("/some/a", "x"), ("/some/b", "y")])
    may_be: set[int] = set()
    heard = store.events_or_echoes(
        "/some/", after=first - 1, until_s=math.inf, is_echo=may_be.__contains__
    )
    assert [next(heard), next(heard)] == [
        Change(first, "/some/a", b"x"),
        Change(first, "/some/b", b"y"),
    ]
    may_be.add(first + 1)
    assert store.write([("/some/a", None), ("/some/b", "z")]) == first + 1
    echo = next(heard)
    assert isinstance(echo, Echo)
    assert echo.revision == first + 1
    assert list(changes_in(echo.message)) == [
        Change(first + 1, "/some/a", None),
        Change(first + 1, "/some/b", b"z"),
    ]


def test_keys_are_written_where_certificates_and_a_user_are_wanted(tmp_path: Path) -> None:
    with running(with_tls=True) as (etcd, tls):
        assert tls is not None
        for words in (
            ("user", "add", "root:secret"),
            ("role", "add", "root"),
            ("user", "grant-role", "root", "root"),
            ("auth", "enable"),
        ):
            etcd.ctl(*words)
        password = tmp_path / "password"
        password.write_text("secret\n")
        fleet = {
            "endpoints": [etcd.endpoint],
            "name": "edge",
            "tls": {"ca": str(tls.certificate), "cert": str(tls.certificate), "key": str(tls.key)},
            "user": "root",
            "password": str(password),
        }
        with contextlib.closing(open_store(Fleet.model_validate(fleet))) as store:
            first = store.write([("/a", "x")])
            assert store.write([("/a", None), ("/b", "y")]) == first + 1
            assert store.list("/").entries == [("/b", b"y")]
            # The token is no longer good: we say again who we are.
            store._clients[0].session.headers["Authorization"] = "wrong"
            with pytest.raises(StoreError, match="invalid auth token"):
                store.write([("/b", "z")])
            assert store.write([("/b", "z")]) == first + 2
        (tmp_path / "other").mkdir()
        fleet["tls"] = {"ca": str(Tls(tmp_path / "other").certificate)}
        with contextlib.closing(open_store(Fleet.model_validate(fleet))) as store:
            store._is_known = True  # so that it is the quick way that sees it
            with pytest.raises(StoreError, match="its certificate is not good"):
                store.write([("/b", "!")])
