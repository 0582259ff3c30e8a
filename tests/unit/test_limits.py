"""Limits that hold across workers: each has its column of shared memory, and reads all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyforwarder import limits
from pyforwarder.limits import COLUMN_BYTES, SharedLimits, new_secret, shared_memory
from tests.unit.test_counters import in_processes

WORKERS = 3


@pytest.fixture
def views() -> list[SharedLimits]:
    """One view per worker, over the same memory."""
    memory = shared_memory(WORKERS)
    return [
        SharedLimits(memory, worker=worker, workers=WORKERS, secret=b"s" * 16)
        for worker in range(WORKERS)
    ]


def colliding_hosts(view: SharedLimits, count: int) -> list[str]:
    """Addresses whose keys begin their probes at the same entry."""
    found: dict[int, list[str]] = {}
    for number in range(1 << 24):
        host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        same = found.setdefault(view._key(host) % limits._TABLE_ENTRIES, [])
        same.append(host)
        if len(same) == count:
            return same
    raise AssertionError("no collisions")


# Pairs


def test_pairs_of_all_workers_count(views: list[SharedLimits]) -> None:
    for view, pairs in zip(views, (1, 5, 17), strict=True):
        for _ in range(pairs):
            view.add_pair()
    views[2].remove_pair()
    assert [view.pairs for view in views] == [22, 22, 22]


def test_pairs_are_exact_though_processes_count_at_the_same_time() -> None:
    memory = shared_memory(WORKERS)

    def count(worker: int) -> None:
        view = SharedLimits(memory, worker=worker, workers=WORKERS, secret=b"s" * 16)
        for n in range(10_007):
            view.add_pair()
            assert view.add_client("192.0.2.1", 1_000_000)
            if n % 3 == 0:
                view.remove_pair()
                view.remove_client("192.0.2.1")

    in_processes(WORKERS, count)
    view = SharedLimits(memory, worker=0, workers=WORKERS, secret=b"s" * 16)
    left = 10_007 - 3336
    assert view.pairs == WORKERS * left
    assert not view.add_client("192.0.2.1", WORKERS * left)
    assert view.add_client("192.0.2.1", WORKERS * left + 1)


def test_replacement_forgets_what_its_predecessor_counted(views: list[SharedLimits]) -> None:
    for view in views:
        view.add_pair()
        assert view.add_client("192.0.2.1", 10)
        assert view.admit_this_second(10, 1000.0)
    views[1].reset_own()
    assert views[0].pairs == 2
    assert views[0].add_client("192.0.2.1", 3)
    assert not views[0].add_client("192.0.2.1", 3)


# Per second


def test_as_many_as_allowed_are_admitted_in_a_second_by_all_together(
    views: list[SharedLimits],
) -> None:
    admitted = [views[n % WORKERS].admit_this_second(23, 1000.0 + n / 100) for n in range(50)]
    assert admitted == [True] * 23 + [False] * 27


def test_next_second_begins_at_0(views: list[SharedLimits]) -> None:
    for now_s in (1000.0, 1001.0, 1002.9):
        admitted = [view.admit_this_second(2, now_s) for view in views]
        assert admitted == [True, True, False]


def test_worker_without_connections_in_this_second_does_not_count_its_last(
    views: list[SharedLimits],
) -> None:
    assert views[0].admit_this_second(1, 1000.0)
    assert views[1].admit_this_second(1, 1001.0)
    assert not views[0].admit_this_second(1, 1001.5)


# Per client


def test_client_has_as_many_connections_as_allowed_at_all_workers_together(
    views: list[SharedLimits],
) -> None:
    admitted = [views[n % WORKERS].add_client("192.0.2.1", 5) for n in range(7)]
    assert admitted == [True] * 5 + [False] * 2
    assert views[0].add_client("192.0.2.2", 5)
    views[1].remove_client("192.0.2.1")
    assert views[0].add_client("192.0.2.1", 5)
    assert not views[0].add_client("192.0.2.1", 5)


def test_connection_given_back_too_often_counts_nothing_below_0(
    views: list[SharedLimits],
) -> None:
    views[0].remove_client("192.0.2.1")
    assert views[0].add_client("192.0.2.1", 1)
    views[0].remove_client("192.0.2.1")
    views[0].remove_client("192.0.2.1")
    assert views[0].add_client("192.0.2.1", 1)
    assert not views[0].add_client("192.0.2.1", 1)


def test_clients_that_hash_together_are_counted_apart(views: list[SharedLimits]) -> None:
    hosts = colliding_hosts(views[0], 5)
    for n, host in enumerate(hosts, start=1):
        assert [views[0].add_client(host, n) for _ in range(n + 1)] == [True] * n + [False]


def test_client_that_leaves_makes_room_and_hides_nobody(views: list[SharedLimits]) -> None:
    # The second stands behind the first in the probe order: it must be found when the first left.
    first, second, third = colliding_hosts(views[0], 3)
    assert views[0].add_client(first, 1)
    assert views[0].add_client(second, 1)
    views[0].remove_client(first)
    assert not views[0].add_client(second, 1)
    assert views[0].add_client(third, 1)
    assert not views[0].add_client(second, 1)
    assert not views[0].add_client(third, 1)


def test_more_clients_that_hash_together_than_are_looked_at_are_refused(
    views: list[SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_PROBES", 1)
    first, second = colliding_hosts(views[0], 2)
    assert [views[0].add_client(host, 9) for host in (first, second)] == [True, False]
    views[0].remove_client(first)
    assert views[0].add_client(second, 9)


def test_count_of_a_client_that_took_over_an_entry_begins_at_0(
    views: list[SharedLimits],
) -> None:
    first, second = colliding_hosts(views[0], 2)
    for _ in range(3):
        assert views[0].add_client(first, 9)
    for _ in range(3):
        views[0].remove_client(first)
    assert views[1].add_client(second, 2)
    assert views[0].add_client(second, 2)
    assert not views[2].add_client(second, 2)


def test_many_clients_fit(views: list[SharedLimits]) -> None:
    # Half full, which is more than the default of 10,000 pairs makes likely, nobody is refused.
    hosts = [f"2001:db8::{number:x}" for number in range(limits._TABLE_ENTRIES // 2)]
    refused = [host for host in hosts if not views[0].add_client(host, 1)]
    assert refused == []


def test_keys_depend_on_the_secret() -> None:
    memory = shared_memory(1)
    keys = {
        SharedLimits(memory, worker=0, workers=1, secret=new_secret())._key("192.0.2.1")
        for _ in range(5)
    }
    assert len(keys) == 5


def test_memory_has_a_column_per_worker() -> None:
    assert len(shared_memory(5)) == 5 * COLUMN_BYTES


class ClientsModel(RuleBasedStateMachine):
    """Connections of few clients at several workers, in a table of few entries."""

    def __init__(self) -> None:
        super().__init__()
        memory = shared_memory(WORKERS)
        self.views = [
            SharedLimits(memory, worker=n, workers=WORKERS, secret=b"s" * 16)
            for n in range(WORKERS)
        ]
        self.hosts = _SAME[:6]
        self.open: list[tuple[int, str]] = []

    @rule(worker=st.integers(0, WORKERS - 1), n=st.integers(0, 5), most=st.integers(1, 4))
    def connect(self, worker: int, n: int, most: int) -> None:
        host = self.hosts[n]
        has = sum(1 for _, other in self.open if other == host)
        assert self.views[worker].add_client(host, most) == (has < most)
        if has < most:
            self.open.append((worker, host))

    @rule(source=st.randoms(use_true_random=False))
    def disconnect(self, source: random.Random) -> None:
        if self.open:
            worker, host = self.open.pop(source.randrange(len(self.open)))
            self.views[worker].remove_client(host)

    @invariant()
    def counts_are_those_of_the_open_ones(self) -> None:
        for host in self.hosts:
            has = sum(1 for _, other in self.open if other == host)
            assert not self.views[0].add_client(host, has) if has else True
            counted = sum(_counts(view, host) for view in self.views)
            assert counted == has


def _counts(view: SharedLimits, host: str) -> int:
    at = view._find(view._own, view._key(host))
    return 0 if at is None else view._own[at + 1]


def _same() -> Iterator[str]:
    yield from colliding_hosts(
        SharedLimits(shared_memory(1), worker=0, workers=1, secret=b"s" * 16), 6
    )


_SAME = list(_same())
TestClientsModel = ClientsModel.TestCase
