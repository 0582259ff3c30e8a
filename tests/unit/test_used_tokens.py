"""Tokens that were used: once is once, whichever worker is asked."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Iterator

import pytest

from pyforwarder.runtime.shared_memory import SharedBlocks
from pyforwarder.worker import used_tokens
from pyforwarder.worker.used_tokens import SPENDS_FOR_S, TABLE_BYTES, SharedUsedTokens
from tests.helpers.forks import in_processes

WORKERS = 3


@pytest.fixture
def tables() -> Iterator[list[mmap.mmap]]:
    blocks = SharedBlocks.make("tokens", WORKERS, TABLE_BYTES)
    made = blocks.map_all()
    blocks.close()
    yield made
    for table in made:
        table.close()


@pytest.fixture
def workers(tables: list[mmap.mmap]) -> list[SharedUsedTokens]:
    return [SharedUsedTokens(tables, worker) for worker in range(WORKERS)]


def test_a_token_is_good_once_at_all_workers(workers: list[SharedUsedTokens]) -> None:
    for first in workers:
        token = b"of %d" % first._number
        assert first.spend(token, expires_unix_s=100, now_unix_s=50)
        for any_of_them in workers:
            assert not any_of_them.spend(token, expires_unix_s=100, now_unix_s=50)
            assert not any_of_them.spend(token, expires_unix_s=100, now_unix_s=100)


def test_an_expired_token_makes_room(
    workers: list[SharedUsedTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_tokens, "_BUCKETS", 1)
    used = workers[0]
    for number in range(64):
        assert used.spend(b"%d" % number, expires_unix_s=100 + number, now_unix_s=50)
    assert not used.spend(b"one more", expires_unix_s=300, now_unix_s=100)
    # At 101 the first has expired: its place, and no other, is free.
    assert used.spend(b"one more", expires_unix_s=300, now_unix_s=101)
    assert not used.spend(b"another", expires_unix_s=300, now_unix_s=101)
    assert not used.spend(b"one more", expires_unix_s=300, now_unix_s=200)


def test_of_all_processes_only_one_may_use_a_token(workers: list[SharedUsedTokens]) -> None:
    tokens = [b"token %d" % number for number in range(997)]
    read_fd, write_fd = os.pipe()

    def spend(worker: int) -> None:
        used = workers[worker]
        spent = sum(used.spend(t, expires_unix_s=100, now_unix_s=50) for t in tokens)
        os.write(write_fd, b"%d\n" % spent)

    in_processes(WORKERS, spend)
    os.close(write_fd)
    with open(read_fd) as answers:
        counts = [int(line) for line in answers]
    assert len(counts) == WORKERS
    assert sum(counts) == 997


def put(table: mmap.mmap, token: bytes, state: int) -> None:
    """How far another worker has come with a token; 0: it has withdrawn."""
    digest = hashlib.blake2b(token, digest_size=16).digest()
    at = int.from_bytes(digest[:8], "big") % used_tokens._BUCKETS * used_tokens._BUCKET_BYTES
    entry = used_tokens._ENTRY.pack(digest, 100.0, state) if state else used_tokens._GONE
    table[at : at + len(entry)] = entry


ABOUT_TO, USED = used_tokens._ABOUT_TO, used_tokens._USED


@pytest.mark.parametrize(
    ("other", "states", "may"),
    [
        pytest.param(0, [ABOUT_TO], False, id="a lower number goes first"),
        pytest.param(0, [USED], False, id="a lower number was first"),
        pytest.param(2, [USED], False, id="a higher number was first"),
        pytest.param(2, [ABOUT_TO, ABOUT_TO, USED], False, id="a higher number saw nobody"),
        pytest.param(2, [ABOUT_TO, ABOUT_TO, 0], True, id="a higher number withdraws"),
        pytest.param(2, [ABOUT_TO] * 4, False, id="a higher number stops in the middle"),
    ],
)
def test_of_two_at_the_same_instant_one_may(
    tables: list[mmap.mmap],
    monkeypatch: pytest.MonkeyPatch,
    other: int,
    states: list[int],
    may: bool,
) -> None:
    """The other comes after we have looked for the first time, and goes on each time we wait."""
    clock_s = 0.0

    def yield_to_the_other() -> None:
        nonlocal clock_s
        if states:
            put(tables[other], b"a", states.pop(0))
        else:
            clock_s += 60.0

    monkeypatch.setattr(os, "sched_yield", yield_to_the_other)
    monkeypatch.setattr(time, "monotonic", lambda: clock_s)
    mine = SharedUsedTokens(tables, 1)
    assert mine.spend(b"a", expires_unix_s=100, now_unix_s=50) is may
    assert states == []
    # What was refused has left nothing.
    assert any(bytes(tables[1])) is may


@pytest.mark.parametrize("dead", [0, 2])
def test_a_worker_that_died_in_the_middle_has_used_it(tables: list[mmap.mmap], dead: int) -> None:
    put(tables[dead], b"a", ABOUT_TO)
    mine = SharedUsedTokens(tables, 1)
    assert not mine.spend(b"a", expires_unix_s=100, now_unix_s=50)


def test_a_digest_across_two_entries_is_none(tables: list[mmap.mmap]) -> None:
    digest = hashlib.blake2b(b"a", digest_size=16).digest()
    at = int.from_bytes(digest[:8], "big") % used_tokens._BUCKETS * used_tokens._BUCKET_BYTES
    tables[0][at + 8 : at + 24] = digest
    assert SharedUsedTokens(tables, 1).spend(b"a", expires_unix_s=100, now_unix_s=50)


def test_a_retired_daemons_worker_lets_nothing_in_after_a_while(tables: list[mmap.mmap]) -> None:
    clock_s = 1000.0
    mine = SharedUsedTokens(tables, 1, monotonic_s=lambda: clock_s)
    mine.retire()
    clock_s += SPENDS_FOR_S - 0.1
    assert mine.spend(b"a", expires_unix_s=100, now_unix_s=50)
    clock_s += 0.1
    assert not mine.spend(b"b", expires_unix_s=100, now_unix_s=50)
    # Nor has it written anything: these tables may be another's.
    assert SharedUsedTokens(tables, 0).spend(b"b", expires_unix_s=100, now_unix_s=50)
