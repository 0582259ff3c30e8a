"""Counters in shared memory: exact across processes, and the same words across reloads."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.express.connect_abi import Count
from pyforwarder.datapath.splice.abi import Invalid
from pyforwarder.runtime.counters import (
    BLOCK_BYTES,
    BLOCK_WORDS,
    CLOSED_INDEX,
    CONNECT_BOUNDS_S,
    CONNECT_FIRST,
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    EXPRESS_CONNECT_FAILED,
    EXPRESS_FIRST,
    EXPRESS_PORTS,
    EXPRESS_PORTS_MOST,
    EXPRESS_PORTS_USED,
    INVALID_FIRST,
    LIMITED_INDEX,
    NAMED_FIRST,
    REASONS,
    SERVER_WORDS,
    Counter,
    Counters,
    Directory,
    ListenerCounter,
    RuleCounter,
    ServerCounter,
    SharedHeld,
    change,
    count_disconnect,
    observe,
)
from pyforwarder.runtime.limits import Limit
from tests.helpers.forks import in_processes


def words_in_use() -> Iterator[int]:
    """Every word that has a meaning before those of names, once for each meaning."""
    yield from Counter
    yield from LIMITED_INDEX.values()
    yield from CLOSED_INDEX.values()
    yield from (INVALID_FIRST + kind for kind in Invalid)
    yield from range(DECISION_FIRST, DECISION_FIRST + len(DECISION_BOUNDS_S) + 2)
    yield from range(CONNECT_FIRST, CONNECT_FIRST + len(CONNECT_BOUNDS_S) + 2)
    yield from (EXPRESS_PORTS, EXPRESS_PORTS_USED, EXPRESS_PORTS_MOST, EXPRESS_CONNECT_FAILED)
    yield from (EXPRESS_FIRST + kind for kind in Count)


def test_words_of_different_things_do_not_overlap() -> None:
    words = list(words_in_use())
    assert [word for word, times in collections.Counter(words).items() if times > 1] == []
    assert max(words) < NAMED_FIRST
    assert len(CLOSED_INDEX) == len(REASONS) == len(CloseReason)
    assert len(LIMITED_INDEX) == len({limit.counted_as for limit in Limit})


def test_a_counter_has_no_gap_in_front_of_it() -> None:
    """The next one gets the number behind the last, and everything behind it moves."""
    assert sorted(Counter) == list(range(len(Counter)))


def test_an_observed_time_stays_within_its_words() -> None:
    memory = Counters.memory(1)
    block = Counters(memory).block(0)
    for took_s in (0.0, *CONNECT_BOUNDS_S, 3600.0):
        observe(block, CONNECT_FIRST, CONNECT_BOUNDS_S, took_s)
    used = {word for word in range(BLOCK_WORDS) if block[word]}
    assert used == set(range(CONNECT_FIRST, CONNECT_FIRST + len(CONNECT_BOUNDS_S) + 2))


def test_total_is_exact_though_processes_add_at_the_same_time() -> None:
    workers, times = 3, 20_011
    memory = Counters.memory(workers)
    counters = Counters(memory)

    def add(worker: int) -> None:
        block = counters.block(worker)
        for _ in range(times):
            block[Counter.ACCEPTED] += 1
        block[Counter.UP_BYTES] += 1 << 40

    in_processes(workers, add)
    assert counters.total(Counter.ACCEPTED) == workers * times
    assert counters.total(Counter.UP_BYTES) == workers << 40


def test_workers_write_into_blocks_of_their_own() -> None:
    memory = Counters.memory(2)
    assert [len(block) for block in memory] == [BLOCK_BYTES] * 2
    assert BLOCK_BYTES % (64 << 10) == 0  # the largest page of a kernel that we run on
    counters = Counters(memory)
    counters.block(0)[BLOCK_WORDS - 1] = 7
    assert list(counters.block(1)) == [0] * BLOCK_WORDS
    assert counters.total(BLOCK_WORDS - 1) == 7


def test_name_has_the_same_words_whenever_it_is_asked_for() -> None:
    directory = Directory()
    first = directory.index("main")
    rule = directory.index("main", "named")
    assert first == NAMED_FIRST
    assert rule == first + len(ListenerCounter)
    assert directory.index("other") == rule + len(RuleCounter)
    assert (directory.index("main"), directory.index("main", "named")) == (first, rule)


def test_names_beyond_the_block_share_the_last_words_and_touch_no_other() -> None:
    directory = Directory()
    given = [directory.index(f"listener {n}") for n in range(4000)]
    shared = BLOCK_WORDS - len(ListenerCounter)
    most = (shared - NAMED_FIRST) // len(ListenerCounter)
    assert len(set(given[:most])) == most
    assert max(given[:most]) + len(ListenerCounter) <= shared
    assert set(given[most:]) == {shared}
    assert max(given) + len(ListenerCounter) <= BLOCK_WORDS


def test_servers_have_words_of_their_own_or_none() -> None:
    directory = Directory()
    listener = directory.index("main")
    one = directory.server_index("web", "10.0.0.1:80")
    assert one == listener + len(ListenerCounter)
    assert directory.server_index("web", "10.0.0.2:80") == one + SERVER_WORDS
    assert directory.server_index("other", "10.0.0.1:80") == one + 2 * SERVER_WORDS
    assert directory.server_index("web", "10.0.0.1:80") == one
    given = [directory.server_index("many", str(n)) for n in range(5000)]
    known = [index for index in given if index is not None]
    assert given == known + [None] * (len(given) - len(known))
    # What listeners beyond the block share is no server's.
    assert max(known) < directory.index("late")


def test_what_a_server_holds_is_summed_over_the_workers_that_live() -> None:
    counters = Counters(Counters.memory(2))
    directory = Directory()
    index = directory.server_index("web", "10.0.0.1:80")
    assert index is not None
    first, second = (SharedHeld(counters, worker, index) for worker in (0, 1))
    first.add(3)
    second.add(5)
    second.add(-1)
    assert (first.total(), second.total()) == (7, 7)
    counters.forget_gauges(1, directory)
    assert first.total() == 3


def test_gauges_of_a_dead_worker_are_forgotten_and_its_counts_kept() -> None:
    counters = Counters(Counters.memory(2))
    directory = Directory()
    listener, rule = directory.index("main"), directory.index("main", "named")
    for worker in (0, 1):
        block = counters.block(worker)
        block[Counter.ACCEPTED] = 23
        block[Counter.OPEN] = 5
        block[Counter.PAIRS_OPEN] = 3
        block[listener + ListenerCounter.ACCEPTED] = 23
        block[listener + ListenerCounter.OPEN] = 5
        block[rule + RuleCounter.TAKEN] = 3
    counters.forget_gauges(1, directory)
    assert counters.total(Counter.ACCEPTED) == 46
    assert counters.total(Counter.OPEN) == 5
    assert counters.total(Counter.PAIRS_OPEN) == 3
    assert counters.total(listener + ListenerCounter.ACCEPTED) == 46
    assert counters.total(listener + ListenerCounter.OPEN) == 5
    assert counters.total(rule + RuleCounter.TAKEN) == 6


def test_no_gauge_falls_below_nothing() -> None:
    """A count that is wrong by one must not end a worker."""
    block = Counters(Counters.memory(1)).block(0)
    count_disconnect(block, NAMED_FIRST)
    assert block[NAMED_FIRST + ServerCounter.PAIRS] == 0
    change(block, Counter.OPEN, -1)
    assert block[Counter.OPEN] == 0
    change(block, Counter.UP_BYTES, (1 << 64) - 2)
    change(block, Counter.UP_BYTES, 5)
    assert block[Counter.UP_BYTES] == (1 << 64) - 1


def test_a_server_that_nobody_holds_is_held_by_nobody_after_another_release() -> None:
    counters = Counters(Counters.memory(1))
    held = SharedHeld(counters, 0, NAMED_FIRST)
    held.add(-1)
    assert held.total() == 0


def test_what_a_dead_worker_cannot_have_counted_is_bounded() -> None:
    counters = Counters(Counters.memory(1))
    block = counters.block(0)
    block[Counter.UP_BYTES] = (1 << 64) - 1
    block[Counter.DOWN_BYTES] = 1 << 50
    counters.forget_gauges(0, Directory())
    assert block[Counter.UP_BYTES] == 1 << 56
    assert block[Counter.DOWN_BYTES] == 1 << 50
