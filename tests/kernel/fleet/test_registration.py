"""A server registers itself in a real etcd, and stays registered whatever happens to its key."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.registration import Registration
from tests.helpers.etcd import Etcd, running
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

KEY = "/pyforwarder/edge/current/servers/web/10.0.0.7:443"
TTL_S = 3
AGAIN = "registered again: the key was gone from the store"
ANOTHER = (
    "another has registered this server: what it says holds until its key is gone, "
    "then this one's again"
)


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


def open_at(etcd: Etcd) -> Store:
    return open_store(Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"}))


@pytest.fixture
def store(etcd: Etcd) -> Iterator[Store]:
    with contextlib.closing(open_at(etcd)) as opened:
        yield opened


class Server:
    """One that registers with a value of its own, and what it was told."""

    def __init__(self, etcd: Etcd, value: str) -> None:
        self.said: list[str] = []
        self.times = 0  # it was told that it is in the store
        self._store = open_at(etcd)
        self._registration = Registration(
            self._store, KEY, value, ttl_s=TTL_S, say=self.said.append, registered=self._count
        )
        self._thread = threading.Thread(target=self._registration.run)

    def _count(self) -> None:
        self.times += 1

    def __enter__(self) -> Server:
        self._thread.start()
        self.wait("registered")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait(self, *words: str) -> None:
        """Until it was told all of this, and nothing else."""
        wait_for(lambda: len(self.said) >= len(words), f"it is told {words}: {self.said}")
        assert self.said == list(words)

    def end(self) -> None:
        if self._thread.is_alive():
            self._registration.end()
            self._thread.join(DEADLINE_S)
            assert not self._thread.is_alive()
            self._store.close()


def value(store: Store) -> bytes | None:
    found = store.get(KEY)
    return None if found is None else found[0]


def test_a_server_is_there_while_it_runs_and_its_lease_goes_with_it(
    etcd: Etcd, store: Store
) -> None:
    with Server(etcd, "a"):
        assert value(store) == b"a"
        assert etcd.ctl("lease", "list").startswith("found 1 leases")
    assert value(store) is None
    assert etcd.ctl("lease", "list").startswith("found 0 leases")


def test_the_first_of_two_has_the_key_again_when_the_second_ends(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "first") as first:
        with Server(etcd, "second"):
            assert value(store) == b"second"
            first.wait("registered", ANOTHER)
            assert value(store) == b"second"
        first.wait("registered", ANOTHER, AGAIN)
        assert value(store) == b"first"
    assert value(store) is None


def test_the_first_of_two_ends_and_the_second_never_notices(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "first") as first, Server(etcd, "second") as second:
        first.wait("registered", ANOTHER)
        before = store.standing(KEY)
        first.end()
        assert store.standing(KEY) == before
        assert value(store) == b"second"
        assert second.said == ["registered"]


def test_the_second_of_two_ends_before_the_first_has_noticed(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "first") as first:
        with Server(etcd, "second"):
            assert value(store) == b"second"
        wait_for(lambda: value(store) == b"first", "the first is there again")
        wait_for(lambda: first.said[-1] == AGAIN, "it says so")
    assert value(store) is None


def test_the_first_of_two_has_the_key_again_when_the_second_has_died(
    etcd: Etcd, store: Store
) -> None:
    """Nobody renews its lease then."""
    with Server(etcd, "first") as first:
        store.put(KEY, "second", lease=store.grant(TTL_S))
        first.wait("registered", ANOTHER)
        first.wait("registered", ANOTHER, AGAIN)
        assert value(store) == b"first"


def test_a_key_that_was_deleted_is_written_again(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "a") as server:
        etcd.ctl("del", KEY)
        server.wait("registered", AGAIN)
        assert value(store) == b"a"
    assert value(store) is None


def test_what_somebody_else_has_put_there_is_not_touched_and_stays(
    etcd: Etcd, store: Store
) -> None:
    """An operator drains a server so, and deletes the key to have it back."""
    with Server(etcd, "a") as server:
        etcd.ctl("put", KEY, "drained")
        server.wait("registered", ANOTHER)
        assert value(store) == b"drained"
        etcd.ctl("del", KEY)
        server.wait("registered", ANOTHER, AGAIN)
        etcd.ctl("put", KEY, "drained")
        server.wait("registered", ANOTHER, AGAIN, ANOTHER)
    assert value(store) == b"drained"


def test_a_server_whose_lease_is_revoked_takes_another_one(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "a") as server:
        standing = store.standing(KEY)
        assert standing is not None
        etcd.ctl("lease", "revoke", f"{standing.lease:x}")
        server.wait("registered", AGAIN)
        renewed = store.standing(KEY)
        assert renewed is not None
        assert renewed.lease not in (0, standing.lease)
    assert value(store) is None


def test_a_store_that_comes_back_empty_has_the_server_again(etcd: Etcd, store: Store) -> None:
    with Server(etcd, "a") as server:
        etcd.stop()
        wait_for(lambda: len(server.said) == 2, "the store is lost")
        assert server.said[1].startswith("etcd at ")
        etcd.empty()
        etcd.start()
        wait_for(lambda: server.said[2:] == [AGAIN], "it is there again")
        wait_for(lambda: server.times == 2, "it is told so")
        assert value(store) == b"a"
    assert value(store) is None


def test_a_store_that_comes_back_with_what_it_had_has_the_server_still(
    etcd: Etcd, store: Store
) -> None:
    with Server(etcd, "a") as server:
        before = store.standing(KEY)
        etcd.stop()
        wait_for(lambda: len(server.said) == 2, "the store is lost")
        etcd.start()
        wait_for(lambda: server.said[2:] == ["registered"], "it is found again")
        wait_for(lambda: server.times == 2, "it is told so")
        assert store.standing(KEY) == before
