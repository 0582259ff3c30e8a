"""What a watch tells of a process's own writing is left out, and nothing else is."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.fleet import store as stores
from pyforwarder.fleet.echoes import Echoes
from pyforwarder.fleet.store import Change, Echo, changes_in
from pyforwarder.fleet.watching import All, Lost, Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX: Final = "/p/"


def message(*changes: Change) -> bytes:
    """As etcd's gateway says it."""

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    events: list[dict[str, Any]] = []
    for revision, key, value in changes:
        entry = {"key": text(key.encode()), "mod_revision": str(revision)}
        if value is None:
            events.append({"type": "DELETE", "kv": entry})
        else:
            events.append({"kv": entry | {"value": text(value)}})
    said = {"result": {"header": {"revision": "99"}, "events": events}}
    return json.dumps(said, separators=(",", ":")).encode()


CHANGES: Final = st.builds(
    Change, st.integers(1, 3), st.sampled_from(["/p/a", "/p/b"]), st.none() | st.binary(max_size=9)
)


@given(st.lists(CHANGES, max_size=4))
def test_a_message_that_may_be_an_echo_tells_of_one_revision(changes: list[Change]) -> None:
    changes.sort(key=lambda change: change.revision)  # as etcd tells of them
    said = message(*changes)
    assert list(changes_in(said)) == changes
    revisions = {change.revision for change in changes}
    assert stores._one_revision(said) == (revisions.pop() if len(revisions) == 1 else 0)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{}",
        b'{"result":{"header":{"revision":"5"},"created":true}}',
        b'{"result":{"canceled":true,"compact_revision":"7"}}',
        b'{"error":{"message":"mod_revision"}}',
        b'"mod_revision":"',
        b'"mod_revision":"x"',
        b'"mod_revision":"1',
    ],
)
def test_another_message_is_none(said: bytes) -> None:
    assert stores._one_revision(said) == 0


class Store:
    """Tells of this, and of no more."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = messages

    def list(self, prefix: str) -> stores.Found:
        assert prefix == PREFIX
        return stores.Found(1, [])

    def events_or_echoes(
        self, prefix: str, *, after: int, until_s: float, is_echo: Callable[[int], bool]
    ) -> Iterator[Change | Echo]:
        del prefix, after, until_s
        for said in self._messages:
            revision = stores._one_revision(said)
            if revision and is_echo(revision):
                yield Echo(revision, said)
            else:
                yield from changes_in(said)
        raise stores.StoreError("over")


def heard(echoes: Echoes, *messages: bytes) -> Watcher:
    """Who has heard of all that; the list of what was there is taken."""
    watcher = Watcher(cast("Any", Store(*messages)), PREFIX, echoes=echoes, most_bytes=4)
    watcher.start()
    assert isinstance(watcher.received.get(timeout=30.0), All)
    received: list[Any] = []
    while not isinstance(one := watcher.received.get(timeout=30.0), Lost):
        received.append(one)
    watcher._is_over = True
    for one in received:
        watcher.received.put(one)
    return watcher


OURS: Final = Change(5, "/p/a", b"x")


def test_what_we_have_written_is_not_read_when_the_watch_tells_of_it() -> None:
    echoes = Echoes()
    echoes.wrote(5, ["/p/a"])
    others = Change(6, "/p/a", b"y")
    watcher = heard(echoes, message(OURS), message(others))
    assert list(watcher.changes()) == [others]
    assert watcher._revision == 6


def test_what_is_heard_before_the_answer_is_ours_all_the_same() -> None:
    echoes = Echoes()
    with echoes.writing():
        watcher = heard(echoes, message(OURS))
        echoes.wrote(5, ["/p/a"])
    assert list(watcher.changes()) == []


def test_what_others_have_written_meanwhile_is_read() -> None:
    """Also where our own writing has failed."""
    echoes = Echoes()
    several = [Change(5, "/p/b", b"longer than there is room for"), Change(5, "/p/c", None)]
    with echoes.writing():
        watcher = heard(echoes, message(*several), message(Change(6, "/p/d", None)))
        echoes.wrote(6, ["/p/d"])
    assert list(watcher.changes()) == [several[0]._replace(value=b"longe"), several[1]]


def test_what_others_have_written_before_us_is_past() -> None:
    """We have written over it, without having heard of it."""
    echoes = Echoes()
    echoes.wrote(5, ["/p/a"])
    before = Change(4, "/p/a", b"y"), Change(4, "/p/b", b"y")
    watcher = heard(echoes, message(*before), message(OURS))
    assert list(watcher.changes()) == [before[1]]


def test_what_was_written_before_a_list_is_read_behind_it() -> None:
    """The list may be of a moment before that."""
    echoes = Echoes()
    echoes.wrote(5, ["/p/a"])
    watcher = heard(echoes, message(OURS))
    received = [watcher.received.get_nowait() for _ in range(1)]
    watcher.received.put(All([], 4))
    for one in received:
        watcher.received.put(one)
    assert list(watcher.changes()) == [All([], 4), OURS]


def test_a_message_that_is_none_has_the_store_asked_anew() -> None:
    echoes = Echoes()
    watcher = heard(echoes)
    watcher.received.put(Echo(5, b"?"))
    (lost,) = watcher.changes()
    assert isinstance(lost, Lost)
    assert watcher._is_doubted


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyforwarder.fleet.echoes._MOST", 2)
    echoes = Echoes()
    for revision in (5, 6, 7):
        echoes.wrote(revision, [str(revision)])
    assert [echoes.may_be(revision) for revision in (5, 6, 7)] == [False, True, True]
    echoes.wrote(3, ["3"])  # the store was set up anew
    assert [echoes.is_ours(revision) for revision in (7, 3)] == [False, False]
    echoes.wrote(4, ["4"])
    echoes.wrote(8, ["8"])
    assert [echoes.is_ours(revision) for revision in (4, 8, 8)] == [True, True, False]
