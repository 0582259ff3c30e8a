"""What a machine of a fleet does in one look at its pairs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from pyforwarder.fleet.echoes import Echoes
from pyforwarder.fleet.failover.ledger import Own, Scan
from pyforwarder.fleet.failover.record import tag_of
from pyforwarder.fleet.failover.replicator import Replicator
from pyforwarder.fleet.failover.stays import EVERY_S, Connection
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.store import StoreError
from pyforwarder.fleet.watching import All, Lost, Watcher
from tests.helpers.failover_records import a_pair

KEYS: Final = Keys("edge")
PAIR: Final = a_pair()
OWN: Final = Own(1, PAIR.pack())
STAYS: Final = Connection(PAIR.ends.listener, PAIR.ends.client, True)


class Kernel:
    """One spliced pair; until others know of it, it is a connection that ends with its machine."""

    def __init__(self) -> None:
        self.known: list[Collection[str]] = []
        self.is_spliced = True

    def scan(self, now_s: float) -> Scan:
        del now_s
        return Scan({PAIR.key: OWN} if self.is_spliced else {}, [PAIR.key])

    def addresses(self) -> Collection[bytes]:
        return ()

    def staying(
        self, known: Collection[str], changed: Collection[str]
    ) -> dict[int, list[Connection]]:
        assert set(changed) == set(known) ^ set(self.known[-1] if self.known else ())
        self.known.append(list(known))
        return {} if PAIR.key in known else {0: [STAYS]}

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        del do, fields
        return {"waiting": [], "taken": 0, "refused": []}


class Store:
    """Writes what it is told, once it is there."""

    endpoint = "etcd"
    answered_s = 0.0

    def __init__(self) -> None:
        self.is_there = False
        self.written = 0
        self.values: dict[str, str | None] = {}

    def write(self, changes: Sequence[tuple[str, str | None]], *, lease: int) -> int:
        del lease
        if not self.is_there:
            raise StoreError("not there")
        self.values.update(changes)
        self.written = 7
        return self.written

    def grant(self, seconds: int) -> int:
        return seconds

    def renew(self, lease: int) -> bool:
        if not self.is_there:
            raise StoreError("not there")
        return bool(lease)

    def create(self, key: str, value: str, *, lease: int) -> bool:
        del key, value, lease
        return True


def replicating(
    kernel: Kernel, store: Store, watcher: Watcher, said: list[Mapping[str, Any]]
) -> Replicator:
    return Replicator(
        cast("Any", store),
        cast("Any", watcher),
        Echoes(),
        KEYS,
        tag_of("one"),
        "machine",
        kernel,
        cast("Any", SimpleNamespace(send=said.append)),
        compacts=False,
    )


@pytest.mark.parametrize("by", ["watch", "write"])
def test_a_store_that_was_lost_is_there_when_it_has_answered_and_not_when_nothing_is_to_be_said(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    kernel, store = Kernel(), Store()
    store.is_there = True
    watcher = Watcher(cast("Any", None), KEYS.failover)
    monkeypatch.setattr(watcher, "is_lost", lambda _now_s: False)
    watcher.received.put(All([]))
    said: list[Mapping[str, Any]] = []
    replicator = replicating(kernel, store, watcher, said)
    replicator._turn(100.0)
    store.is_there = False
    if by == "watch":
        watcher.received.put(Lost("not there"))
    kernel.is_spliced = False  # the store would have to be told
    replicator._turn(110.0)
    kernel.is_spliced = True  # of what it has: there is nothing to tell
    for now_s in (120.0, 121.0, 130.0):
        replicator._turn(now_s)
    assert [one["replicas"] for one in said] == ["connected", "lost"]
    store.is_there = True
    replicator._turn(150.0)
    assert [one["replicas"] for one in said] == ["connected", "lost", "connected"]


def test_a_pair_is_named_as_one_to_be_reset_until_the_store_has_it() -> None:
    """Else nobody knew of it in between: neither gone on with nor reset, its ends would wait."""
    kernel, store = Kernel(), Store()
    watcher = Watcher(cast("Any", None), KEYS.failover)
    watcher.received.put(All([]))
    said: list[Mapping[str, Any]] = []
    replicator = replicating(kernel, store, watcher, said)
    replicator._turn(100.0)
    assert store.values == {}
    store.is_there = True
    kernel.is_spliced = False
    replicator._turn(200.0)
    stays = f"{KEYS.stays}{tag_of('one')}.0"
    assert store.values.keys() == {stays}
    kernel.is_spliced = True
    replicator._turn(201.0)
    assert store.values[stays] is None
    assert store.values[KEYS.pairs + PAIR.key] is not None
    replicator._turn(201.0 + EVERY_S)
    assert kernel.known == [[], [], [PAIR.key], [PAIR.key]]
    # Nothing of it was heard.
    assert [one["replicas"] for one in said if "replicas" in one][-1] == "connected"
    replicator._turn(207.0 + EVERY_S)
    assert [one["replicas"] for one in said if "replicas" in one][-1] == "lost"
