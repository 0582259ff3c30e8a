"""Tokens that were used: once is once, whichever worker is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyforwarder.worker import used_tokens
from pyforwarder.worker.used_tokens import SharedUsedTokens
from tests.unit.test_counters import in_processes


@pytest.fixture
def used() -> Iterator[SharedUsedTokens]:
    memory = SharedUsedTokens()
    yield memory
    memory.close()


def test_a_token_is_good_once(used: SharedUsedTokens) -> None:
    assert used.spend(b"a", expires_unix_s=100, now_unix_s=50)
    assert not used.spend(b"a", expires_unix_s=100, now_unix_s=50)
    assert not used.spend(b"a", expires_unix_s=100, now_unix_s=100)
    assert used.spend(b"b", expires_unix_s=100, now_unix_s=100)


def test_an_expired_token_makes_room(
    used: SharedUsedTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_tokens, "_BUCKETS", 1)
    for number in range(64):
        assert used.spend(b"%d" % number, expires_unix_s=100 + number, now_unix_s=50)
    assert not used.spend(b"one more", expires_unix_s=300, now_unix_s=100)
    # At 101 the first has expired: its place, and no other, is free.
    assert used.spend(b"one more", expires_unix_s=300, now_unix_s=101)
    assert not used.spend(b"another", expires_unix_s=300, now_unix_s=101)
    assert not used.spend(b"one more", expires_unix_s=300, now_unix_s=200)


def test_of_all_processes_only_one_may_use_a_token(used: SharedUsedTokens) -> None:
    tokens = [b"token %d" % number for number in range(997)]
    read_fd, write_fd = os.pipe()

    def spend(_worker: int) -> None:
        spent = sum(used.spend(t, expires_unix_s=100, now_unix_s=50) for t in tokens)
        os.write(write_fd, b"%d\n" % spent)

    in_processes(3, spend)
    os.close(write_fd)
    with open(read_fd) as answers:
        counts = [int(line) for line in answers]
    assert len(counts) == 3
    assert sum(counts) == 997


def test_a_process_that_dies_holding_the_lock_does_not_keep_it(used: SharedUsedTokens) -> None:
    import fcntl

    def die(_worker: int) -> None:
        fcntl.lockf(used._fd, fcntl.LOCK_EX)
        os._exit(0)

    in_processes(1, die)
    assert used.spend(b"a", expires_unix_s=100, now_unix_s=50)
