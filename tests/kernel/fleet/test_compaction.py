"""What a real etcd does when a fleet has it drop its history."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet.failover.compaction import PERIOD_S, Compaction
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.store import Change, CompactedError, Store
from pyforwarder.fleet.watching import Watcher
from tests.helpers.etcd import Etcd, running
from tests.helpers.waiting import DEADLINE_S

KEYS = Keys("edge")


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


def store_of(etcd: Etcd) -> Store:
    return open_store(Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"}))


def test_one_machine_has_it_forget_what_is_older_than_a_period(etcd: Etcd) -> None:
    store = store_of(etcd)
    lease = store.grant(600)
    one, two = (Compaction(store_of(etcd), KEYS.compaction, name) for name in ("one", "two"))
    revisions: list[int] = []

    def period(number: int) -> None:
        """All values of a key, and one look of each machine."""
        for machine in (one, two):
            store.put("/key", str(number))
            revisions.append(store.list("/key/").revision)
            machine.run_due(number * PERIOD_S, lease=lease)
            machine.run_due(number * PERIOD_S + 1.0, lease=lease)  # not due

    def is_kept(revision: int) -> bool:
        try:
            return bool(etcd.ctl("get", "/key", f"--rev={revision}"))
        except subprocess.CalledProcessError as error:
            if "compacted" in str(error.stderr):
                return False
            raise

    period(0)
    period(1)  # one of them writes the key
    assert all(map(is_kept, revisions))
    period(2)
    period(3)
    period(4)
    kept = [is_kept(revision) for revision in revisions]
    assert kept == sorted(kept)  # none is missing in between
    assert not kept[0]
    assert all(kept[-3:])  # since one of them looked a period ago
    assert store.get("/key") is not None


def test_a_quiet_watch_goes_on_where_the_history_is_gone(etcd: Etcd) -> None:
    store = store_of(etcd)
    store.put(f"{KEYS.pairs}a", "1")
    revision = store.list(KEYS.failover).revision
    for number in range(5):
        store.put("/another", str(number))
    store.compact(store.list("/").revision)
    with pytest.raises(CompactedError):
        next(store.events(KEYS.failover, after=revision, until_s=float("inf")))
    # A watcher is told of everything anew, and of no loss.
    watched = store_of(etcd)
    listed = watched.list

    def list_before(prefix: str) -> object:
        found = listed(prefix)
        watched.list = listed  # type: ignore[method-assign]
        return found._replace(revision=revision)

    watched.list = list_before  # type: ignore[method-assign, assignment]
    watcher = Watcher(watched, KEYS.failover)
    watcher.start()
    for _ in range(2):
        heard = watcher.received.get(timeout=DEADLINE_S)
        assert getattr(heard, "entries", None) == [(f"{KEYS.pairs}a", b"1")]
    store.put(f"{KEYS.pairs}b", "2")
    change = watcher.received.get(timeout=DEADLINE_S)
    assert isinstance(change, Change)
    assert (change.key, change.value) == (f"{KEYS.pairs}b", b"2")
    # A thread that went on would disturb the tests after this one.
    another = threading.Timer(0.1, store.put, (f"{KEYS.pairs}c", "3"))
    another.start()
    assert watcher.stop(DEADLINE_S)
    another.cancel()
    another.join()
