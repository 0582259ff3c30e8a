"""What a thread that watches a fleet's store has received: no more than there is room for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Final, cast

import pytest

from pyforwarder.fleet import watching
from pyforwarder.fleet.store import Change, Found, StoreError
from pyforwarder.fleet.watching import All, Lost, Received, Watcher

KEY: Final = "/pyforwarder/edge/health/a"
TIMEOUT_S: Final = 30.0


def received(watcher: Watcher) -> list[All | Lost | Change]:
    return list(watcher.changes())


def test_of_a_key_that_changes_again_and_again_the_last_change_is_read() -> None:
    watcher = Watcher(cast("Any", None), "/")
    first, last = Change(1, "/a", b"1"), Change(9, "/a", b"9")
    gone = Change(5, "/b", None)
    for one in (first, All([]), Change(4, "/b", b"4"), Lost("why"), gone, last):
        watcher.received.put(one)
    assert received(watcher) == [All([]), Lost("why"), gone, last]
    assert received(watcher) == []


def test_who_writes_more_than_is_read_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_WAITING_BYTES", 10_000)
    waiting = Received()
    for _ in range(3):
        waiting.put_nowait(Change(1, KEY, bytes(4000)))
    for item in (Change(1, KEY, None), All([(KEY, b"x")]), Lost("why")):
        with pytest.raises(queue.Full):
            waiting.put_nowait(item)
    waiting.get_nowait()
    waiting.put_nowait(Lost("why"))
    for _ in range(3):
        waiting.get_nowait()
    assert waiting.empty()
    # Many small ones are bounded, too.
    count = 0
    while not waiting.full():
        waiting.put_nowait(Change(1, KEY, None))
        count += 1
    assert count == 19


def test_long_keys_and_long_lists_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_WAITING_BYTES", 10_000)
    for long in (
        Change(1, KEY + 10_000 * "x", None),
        All([(KEY + 10_000 * "x", b"")]),
        All([(KEY, bytes(5000))] * 2),
        All([(KEY, b"")] * 20),
    ):
        waiting = Received()
        waiting.put_nowait(long)
        with pytest.raises(queue.Full):
            waiting.put_nowait(Lost("why"))
        assert waiting.get_nowait() == long
        assert waiting.empty()


def test_of_what_has_come_one_turn_takes_no_more_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread puts more there while the other takes."""
    watcher = Watcher(cast("Any", None), "/")
    changes = [Change(number, f"/{number}", bytes(4000)) for number in range(5)]
    for one in changes:
        watcher.received.put(one)
    monkeypatch.setattr(watching, "_MOST_WAITING_BYTES", 10_000)
    assert received(watcher) == changes[:3]
    assert received(watcher) == changes[3:]


def test_of_a_value_that_is_too_long_no_more_is_kept_than_it_takes_to_see_that() -> None:
    is_over = threading.Event()

    class Store:
        def list(self, prefix: str) -> Found:
            return Found(5, [(f"{prefix}a", bytes(11)), (f"{prefix}b", bytes(10))])

        def events(self, prefix: str, *, after: int, until_s: float) -> Iterator[Change]:
            del until_s
            assert after == 5
            yield Change(6, f"{prefix}a", bytes(99))
            yield Change(7, f"{prefix}a", None)
            is_over.wait(TIMEOUT_S)
            raise StoreError("over")

    watcher = Watcher(cast("Any", Store()), "/", most_bytes=10)
    watcher.start()
    all_of_it = watcher.received.get(timeout=TIMEOUT_S)
    changes = [watcher.received.get(timeout=TIMEOUT_S) for _ in range(2)]
    is_over.set()
    assert watcher.stop(TIMEOUT_S)
    assert all_of_it == All([("/a", bytes(11)), ("/b", bytes(10))], 5)
    assert changes == [Change(6, "/a", bytes(11)), Change(7, "/a", None)]
