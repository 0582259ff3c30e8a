"""Single-use tokens that were used, remembered for all workers and across reloads.

Each worker writes down in a table of its own what it has let in, and looks into those of all, which
it cannot write. So a worker that is taken over makes no token good again that another has seen, and
locks no token out: its digest is not known to others before it is used.

A token may come to two workers at the same instant. Each first writes down that it is about to use
it, then looks at the others' tables (a barrier in between: at least one of two sees the other):

- a worker has used it, or one of a lower number is about to: not this one;
- a worker of a higher number is about to: it will see us and withdraw, or has looked before we
  wrote, and will have used it. So wait, for a moment; if it says neither, refuse.

A daemon that takes another one's place (`pyforwarder upgrade`) goes on with the same tables, so
that no token is good again. The workers of both may decide at the same time, so there are SHARES
tables for each worker, and a daemon's workers write those of its share: the next one after its
predecessor's. A worker whose daemon has retired lets nothing in any more after SPENDS_FOR_S; only
then may a later daemon have its share.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core.token import digest_of
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    import mmap

# 65,536 tokens for each worker that have not expired. A bucket that is full refuses: with random
# keys that begins when about two thirds of the table are taken, and only who holds a key can fill
# it at all.
_BUCKETS: Final = 1 << 10
_WAYS: Final = 64
# A token's digest, until when it has to be remembered, and how far its use has come.
_ENTRY: Final = struct.Struct("=16sdQ")
_STATE: Final = struct.Struct("=Q")
_STATE_AT: Final = _ENTRY.size - _STATE.size
_BUCKET_BYTES: Final = _WAYS * _ENTRY.size
TABLE_BYTES: Final = _BUCKETS * _BUCKET_BYTES

SHARES: Final = 4
# Seconds of CLOCK_MONOTONIC. Longer than a first packet takes by default; what comes later than
# that to a daemon that has retired is refused as if it had been used.
SPENDS_FOR_S: Final = 10.0

_ABOUT_TO, _USED = 1, 2
_GONE: Final = bytes(_ENTRY.size)
# Two workers that have a token at the same instant need some microseconds, unless one of them does
# not run; until then this one does nothing else.
_PATIENCE_S: Final = 0.05


class SharedUsedTokens:
    """Implements `token.TokenMemory` over the tables of all workers."""

    def __init__(
        self,
        tables: Sequence[mmap.mmap],
        own: int,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tables` have TABLE_BYTES each; the one with the number `own` is writable."""
        self._tables = tables
        self._own = tables[own]
        self._number = own
        self._monotonic_s = monotonic_s
        self._ends_s = float("inf")

    def retire(self) -> None:
        """Another daemon has taken the place of ours: let tokens in for SPENDS_FOR_S yet."""
        self._ends_s = self._monotonic_s() + SPENDS_FOR_S

    def spend(self, signature: bytes, *, expires_unix_s: float, now_unix_s: float) -> bool:
        """Whether this is the first use, and there was room to remember it."""
        if self._monotonic_s() >= self._ends_s:
            return False
        digest = digest_of(signature)
        start = int.from_bytes(digest[:8], "big") % _BUCKETS * _BUCKET_BYTES
        if any(_find(table, start, digest) for table in self._tables):
            return False
        at = self._vacant(start, now_unix_s)
        if at is None:
            return False
        _ENTRY.pack_into(self._own, at, digest, expires_unix_s, _ABOUT_TO)
        # The barrier: schedule() has a full one (kernel/sched/core.c, for membarrier(2)).
        os.sched_yield()
        if self._is_taken(start, digest):
            self._own[at : at + _ENTRY.size] = _GONE
            return False
        _STATE.pack_into(self._own, at + _STATE_AT, _USED)
        return True

    def _is_taken(self, start: int, digest: bytes) -> bool:
        """Whether another worker uses it."""
        give_up_s = None
        while True:
            states = [
                (number, _find(table, start, digest))
                for number, table in enumerate(self._tables)
                if number != self._number
            ]
            if any(state and (state != _ABOUT_TO or n < self._number) for n, state in states):
                return True
            if not any(state for _, state in states):
                return False
            now_s = time.monotonic()
            give_up_s = give_up_s or now_s + scaled_s(_PATIENCE_S)
            if now_s > give_up_s:
                return True
            os.sched_yield()

    def _vacant(self, start: int, now_unix_s: float) -> int | None:
        bucket = self._own[start : start + _BUCKET_BYTES]
        for index, (_, until_s, _) in enumerate(_ENTRY.iter_unpack(bucket)):
            if until_s < now_unix_s:
                return start + index * _ENTRY.size
        return None


def _find(table: mmap.mmap, start: int, digest: bytes) -> int:
    """How far the token's use has come there; 0: it is not in that bucket."""
    bucket = table[start : start + _BUCKET_BYTES]
    at = bucket.find(digest)
    while at >= 0:
        if at % _ENTRY.size == 0:
            (state,) = _STATE.unpack_from(bucket, at + _STATE_AT)
            return int(state) or _ABOUT_TO  # it is just being written
        at = bucket.find(digest, at + 1)
    return 0
