"""Limits that hold across workers: each has its column of shared memory, and reads all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyforwarder.runtime import limits, limits_memory
from pyforwarder.runtime.client_network import network_of
from pyforwarder.runtime.counters import BLOCK_WORDS
from pyforwarder.runtime.limits import (
    TCP,
    UDP,
    Bounds,
    Limit,
    SharedLimits,
    new_secret,
    shared_memory,
)
from pyforwarder.runtime.limits_memory import COLUMN_BYTES
from tests.helpers.forks import in_processes

WORKERS = 3
LISTENER = 200  # the scope of a listener
WHOLE = Bounds(TCP, ipv6_bits=128)  # every address is a client


def key(host: str) -> int:
    """Under what number the client counts, for every view of this module."""
    return _KEYS.key(host, WHOLE)


_KEYS = SharedLimits(shared_memory(1), worker=0, secret=b"s" * 16)


@pytest.fixture
def views() -> list[SharedLimits]:
    """One view per worker, over the same memory."""
    memory = shared_memory(WORKERS)
    return [SharedLimits(memory, worker=worker, secret=b"s" * 16) for worker in range(WORKERS)]


def colliding_hosts(count: int) -> list[str]:
    """Addresses whose keys begin their probes at the same entry."""
    found: dict[int, list[str]] = {}
    for number in range(1 << 24):
        host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        same = found.setdefault(key(host) % limits_memory.TABLE_ENTRIES, [])
        same.append(host)
        if len(same) == count:
            return same
    raise AssertionError("no collisions")


# Pairs


def test_pairs_of_all_workers_count(views: list[SharedLimits]) -> None:
    for view, pairs in zip(views, (1, 5, 17), strict=True):
        for _ in range(pairs):
            view.add_pair(LISTENER)
    views[2].remove_pair(LISTENER)
    assert [view.pairs for view in views] == [22, 22, 22]


def test_pairs_are_exact_though_processes_count_at_the_same_time() -> None:
    memory = shared_memory(WORKERS)

    def count(worker: int) -> None:
        view = SharedLimits(memory, worker=worker, secret=b"s" * 16)
        for n in range(10_007):
            view.add_pair(LISTENER)
            assert view.add_client(key("192.0.2.1"), 1_000_000)
            if n % 3 == 0:
                view.remove_pair(LISTENER)
                view.remove_client(key("192.0.2.1"))

    in_processes(WORKERS, count)
    view = SharedLimits(memory, worker=0, secret=b"s" * 16)
    left = 10_007 - 3336
    assert view.pairs == WORKERS * left
    assert not view.add_client(key("192.0.2.1"), WORKERS * left)
    assert view.add_client(key("192.0.2.1"), WORKERS * left + 1)


def test_replacement_forgets_what_its_predecessor_counted(views: list[SharedLimits]) -> None:
    for view in views:
        view.add_pair(LISTENER)
        assert view.add_client(key("192.0.2.1"), 10)
        assert view.admit_this_second(10, 1000.0)
    views[1].reset_own()
    assert views[0].pairs == 2
    assert views[0].add_client(key("192.0.2.1"), 3)
    assert not views[0].add_client(key("192.0.2.1"), 3)


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
    admitted = [bool(views[n % WORKERS].add_client(key("192.0.2.1"), 5)) for n in range(7)]
    assert admitted == [True] * 5 + [False] * 2
    assert views[0].add_client(key("192.0.2.2"), 5)
    views[1].remove_client(key("192.0.2.1"))
    assert views[0].add_client(key("192.0.2.1"), 5)
    assert not views[0].add_client(key("192.0.2.1"), 5)


def test_connection_given_back_too_often_counts_nothing_below_0(
    views: list[SharedLimits],
) -> None:
    views[0].remove_client(key("192.0.2.1"))
    assert views[0].add_client(key("192.0.2.1"), 1)
    views[0].remove_client(key("192.0.2.1"))
    views[0].remove_client(key("192.0.2.1"))
    assert views[0].add_client(key("192.0.2.1"), 1)
    assert not views[0].add_client(key("192.0.2.1"), 1)


def test_clients_that_hash_together_are_counted_apart(views: list[SharedLimits]) -> None:
    hosts = colliding_hosts(5)
    for n, host in enumerate(hosts, start=1):
        admitted = [bool(views[0].add_client(key(host), n)) for _ in range(n + 1)]
        assert admitted == [True] * n + [False]


def test_client_that_leaves_makes_room_and_hides_nobody(views: list[SharedLimits]) -> None:
    # The second stands behind the first in the probe order: it must be found when the first left.
    first, second, third = colliding_hosts(3)
    assert views[0].add_client(key(first), 1)
    assert views[0].add_client(key(second), 1)
    views[0].remove_client(key(first))
    assert not views[0].add_client(key(second), 1)
    assert views[0].add_client(key(third), 1)
    assert not views[0].add_client(key(second), 1)
    assert not views[0].add_client(key(third), 1)


def test_more_clients_that_hash_together_than_are_looked_at_are_refused(
    views: list[SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PROBES", 1)
    first, second = colliding_hosts(2)
    assert views[0].add_client(key(first), 9)
    assert not views[0].add_client(key(second), 9)
    views[0].remove_client(key(first))
    assert views[0].add_client(key(second), 9)


def test_count_of_a_client_that_took_over_an_entry_begins_at_0(
    views: list[SharedLimits],
) -> None:
    first, second = colliding_hosts(2)
    for _ in range(3):
        assert views[0].add_client(key(first), 9)
    for _ in range(3):
        views[0].remove_client(key(first))
    assert views[1].add_client(key(second), 2)
    assert views[0].add_client(key(second), 2)
    assert not views[2].add_client(key(second), 2)


def test_many_clients_fit(views: list[SharedLimits]) -> None:
    # Half full, which is more than the default of 10,000 pairs makes likely, nobody is refused.
    hosts = [f"2001:db8::{number:x}" for number in range(limits_memory.TABLE_ENTRIES // 2)]
    refused = [host for host in hosts if not views[0].add_client(key(host), 1)]
    assert refused == []


def test_keys_depend_on_the_secret() -> None:
    memory = shared_memory(1)
    keys = {
        SharedLimits(memory, worker=0, secret=new_secret()).key("192.0.2.1", WHOLE)
        for _ in range(5)
    }
    assert len(keys) == 5


def test_memory_has_a_column_per_worker() -> None:
    assert [len(column) for column in shared_memory(5)] == [COLUMN_BYTES] * 5
    assert COLUMN_BYTES % (64 << 10) == 0  # the largest page of a kernel that we run on
    assert limits_memory.SCOPES == BLOCK_WORDS  # a scope is the index of a listener's first counter


# Scopes


def test_listener_has_as_many_pairs_as_it_may_and_no_more_than_all_may(
    views: list[SharedLimits],
) -> None:
    first, second = 200, 203
    assert [views[n % WORKERS].add_pair_below(5, first, 2) for n in range(3)] == [True, True, False]
    assert [views[n % WORKERS].add_pair_below(5, second) for n in range(4)] == [True] * 3 + [False]
    views[0].remove_pair(first)
    assert views[1].add_pair_below(5, first, 2)
    assert [views[2].count(scope) for scope in (TCP, first, second)] == [5, 2, 3]


def test_sessions_are_no_pairs(views: list[SharedLimits]) -> None:
    for _ in range(7):
        views[0].add_session(LISTENER)
    assert (views[1].sessions, views[1].pairs, views[1].count(LISTENER)) == (7, 0, 7)
    assert views[1].add_pair_below(1, 300)
    views[0].remove_session(LISTENER)
    assert (views[2].sessions, views[2].count(LISTENER)) == (6, 6)


def test_scopes_have_seconds_of_their_own(views: list[SharedLimits]) -> None:
    for scope in (TCP, UDP, LISTENER):
        admitted = [view.admit_this_second(2, 1000.0, scope) for view in views]
        assert admitted == [True, True, False]


def test_replacement_leaves_the_columns_of_the_others_alone(views: list[SharedLimits]) -> None:
    for view in views:
        view.add_session(LISTENER)
        view.set_held(TCP, 1000)
    views[1].reset_own()
    assert (views[0].sessions, views[0].held(TCP)) == (2, 2000)
    assert views[1]._own.tolist() == [0] * (COLUMN_BYTES // 8)


# Rates of clients


def test_client_has_its_rate_at_all_workers_together(views: list[SharedLimits]) -> None:
    admitted = [views[n % WORKERS].admit_client(key("192.0.2.1"), 5, 1000.0) for n in range(7)]
    assert admitted == [True] * 5 + [False] * 2
    assert views[0].admit_client(key("192.0.2.2"), 5, 1000.0)


def test_tokens_come_back_one_by_one(views: list[SharedLimits]) -> None:
    for _ in range(4):
        assert views[0].admit_client(key("192.0.2.1"), 4, 1000.0)
    seen = [views[1].admit_client(key("192.0.2.1"), 4, 1000.0 + n / 10) for n in range(1, 11)]
    # A quarter of a second for each; no window that begins anew lets twice as many in.
    assert seen == [False, False, True, False, True, False, False, True, False, True]


def test_bucket_is_never_fuller_than_a_second(views: list[SharedLimits]) -> None:
    assert views[0].admit_client(key("192.0.2.1"), 3, 1000.0)
    admitted = [views[0].admit_client(key("192.0.2.1"), 3, 9000.0) for _ in range(5)]
    assert admitted == [True] * 3 + [False] * 2


def test_debt_of_a_client_outlasts_a_flood_of_other_addresses(views: list[SharedLimits]) -> None:
    for _ in range(10):
        assert views[0].admit_client(key("192.0.2.1"), 10, 1000.0)
    for number in range(100_000):
        views[0].admit_client(number * 0x9E3779B97F4A7C15 & (1 << 64) - 1, 10, 1000.0)
        if number % 1000 == 0:
            assert not views[0].admit_client(key("192.0.2.1"), 10, 1000.0)


def test_flood_of_other_addresses_leaves_a_client_its_rate(views: list[SharedLimits]) -> None:
    # 10,000 new clients a second, each with one connection: every client has all its own.
    source = random.Random(23)
    for _ in range(10_000):
        views[0].admit_client(source.getrandbits(64), 10, 1000.0)
    hosts = [f"198.51.100.{n}" for n in range(250)]
    admitted = sum(views[1].admit_client(key(host), 10, 1000.0) for host in hosts for _ in range(9))
    assert admitted == 250 * 9


# What a client is


@pytest.mark.parametrize(
    ("hosts", "same"),
    [
        (("192.0.2.1", "192.0.2.1"), True),
        (("192.0.2.1", "192.0.2.2"), False),
        (("2001:db8:0:1::1", "2001:db8:0:1:ffff::9"), True),
        (("2001:db8:0:1::1", "2001:db8:0:2::1"), False),
        # On a socket for both, and behind a translator: IPv4 clients are no network of IPv6.
        (("::ffff:192.0.2.1", "192.0.2.1"), True),
        (("::ffff:192.0.2.1", "::ffff:192.0.2.2"), False),
        (("64:ff9b::192.0.2.1", "192.0.2.1"), True),
        # A whole link has one prefix; what comes by two links is not the same.
        (("fe80::1%2", "fe80::2%2"), False),
        (("fe80::1%2", "fe80::1%3"), False),
        # IPv4 and IPv6 do not meet.
        (("0.0.0.1", "::1"), False),
    ],
)
def test_network_of_an_ipv6_address_is_one_client(hosts: tuple[str, str], same: bool) -> None:
    first, second = (network_of(host, ipv4_bits=32, ipv6_bits=64) for host in hosts)
    assert (first == second) == same


def test_prefixes_are_as_long_as_configured() -> None:
    def client(host: str) -> bytes:
        return network_of(host, ipv4_bits=24, ipv6_bits=56)

    assert client("192.0.2.1") == client("192.0.2.200") != client("192.0.3.1")
    assert client("2001:db8:0:100::1") == client("2001:db8:0:1ff::1") != client("2001:db8:0:200::1")


# All together


def test_each_scope_has_its_say_and_nothing_is_kept_of_a_refusal(
    views: list[SharedLimits],
) -> None:
    all_of_tcp = Bounds(TCP, per_client=5)
    here = Bounds(LISTENER, per_client=2, per_second=3)
    scopes = (all_of_tcp, here)
    first = views[0].admit("192.0.2.1", scopes, 1000.0)
    assert isinstance(first, tuple)
    assert len(first) == 2
    assert isinstance(views[1].admit("192.0.2.1", scopes, 1000.0), tuple)
    # The listener's limit; what the other scope had counted by then is given back.
    assert views[2].admit("192.0.2.1", scopes, 1000.0) is Limit.PAIRS_PER_CLIENT
    assert sum(_counts(view, views[0].key("192.0.2.1", all_of_tcp)) for view in views) == 2
    # The refused one did not use the second up.
    assert isinstance(views[0].admit("192.0.2.2", scopes, 1000.0), tuple)
    assert views[0].admit("192.0.2.3", scopes, 1000.0) is Limit.NEW_PER_SECOND
    assert views[0].add_client(views[0].key("192.0.2.3", here), 1)
    views[0].give_back(first)
    assert isinstance(views[2].admit("192.0.2.1", scopes, 1001.0), tuple)


def test_connection_over_one_scopes_number_uses_up_no_rate_of_another(
    views: list[SharedLimits],
) -> None:
    here = Bounds(LISTENER, per_second_per_client=2)
    scopes = (here, Bounds(TCP, per_client=1))
    first = views[0].admit("192.0.2.1", scopes, 1000.0)
    assert isinstance(first, tuple)
    for view in views:
        assert view.admit("192.0.2.1", scopes, 1000.0) is Limit.PAIRS_PER_CLIENT
    views[0].give_back(first)
    assert isinstance(views[1].admit("192.0.2.1", scopes, 1000.0), tuple)


def test_client_over_its_rate_is_not_counted_in_any_scope(views: list[SharedLimits]) -> None:
    here = Bounds(LISTENER, per_client=9)
    of_all = Bounds(TCP, per_client=9, per_second_per_client=1)
    assert isinstance(views[0].admit("192.0.2.1", (here, of_all), 1000.0), tuple)
    refusal = views[1].admit("192.0.2.1", (here, of_all), 1000.0)
    assert refusal is Limit.NEW_PER_SECOND_PER_CLIENT
    keys = [views[0].key("192.0.2.1", bounds) for bounds in (here, of_all)]
    assert [views[2].client_count(key) for key in keys] == [1, 1]


def test_sessions_of_a_client_are_counted_apart_from_its_pairs(views: list[SharedLimits]) -> None:
    tcp, udp = Bounds(TCP, per_client=1), Bounds(UDP, per_client=1, is_udp=True)
    assert isinstance(views[0].admit("192.0.2.1", (udp,), 1000.0), tuple)
    assert views[0].admit("192.0.2.1", (udp,), 1000.0) is Limit.SESSIONS_PER_CLIENT
    assert isinstance(views[0].admit("192.0.2.1", (tcp,), 1000.0), tuple)


def test_client_that_comes_too_often_is_told_so(views: list[SharedLimits]) -> None:
    scopes = (Bounds(TCP, per_second_per_client=1, per_client=9),)
    assert isinstance(views[0].admit("2001:db8::1", scopes, 1000.0), tuple)
    assert views[0].admit("2001:db8::2", scopes, 1000.0) is Limit.NEW_PER_SECOND_PER_CLIENT
    assert _counts(views[0], views[0].key("2001:db8::2", scopes[0])) == 1


class ClientsModel(RuleBasedStateMachine):
    """Connections of few clients at several workers, in a table of few entries."""

    def __init__(self) -> None:
        super().__init__()
        memory = shared_memory(WORKERS)
        self.views = [SharedLimits(memory, worker=n, secret=b"s" * 16) for n in range(WORKERS)]
        self.hosts = _SAME[:6]
        self.open: list[tuple[int, str]] = []

    @rule(worker=st.integers(0, WORKERS - 1), n=st.integers(0, 5), most=st.integers(1, 4))
    def connect(self, worker: int, n: int, most: int) -> None:
        host = self.hosts[n]
        has = sum(1 for _, other in self.open if other == host)
        assert bool(self.views[worker].add_client(key(host), most)) == (has < most)
        if has < most:
            self.open.append((worker, host))

    @rule(source=st.randoms(use_true_random=False))
    def disconnect(self, source: random.Random) -> None:
        if self.open:
            worker, host = self.open.pop(source.randrange(len(self.open)))
            self.views[worker].remove_client(key(host))

    @invariant()
    def counts_are_those_of_the_open_ones(self) -> None:
        for host in self.hosts:
            has = sum(1 for _, other in self.open if other == host)
            assert not self.views[0].add_client(key(host), has) if has else True
            counted = sum(_counts(view, key(host)) for view in self.views)
            assert counted == has


def _counts(view: SharedLimits, client: int) -> int:
    at = view._find(view._own, client)
    return 0 if at is None else view._own[at + 1]


def _same() -> Iterator[str]:
    yield from colliding_hosts(6)


_SAME = list(_same())
TestClientsModel = ClientsModel.TestCase
