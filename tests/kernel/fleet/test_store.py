"""What a real etcd says, however much stands in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet import store as stores
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.store import MOST_ANSWER_BYTES, AnswerTooLongError, Store
from tests.helpers.etcd import running

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
