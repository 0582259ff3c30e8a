"""Single-use tokens that were used, remembered for all workers and across reloads.

One table in memory that the supervisor makes and every worker inherits. A token may come to two
workers at the same instant, so looking and remembering are one step, under a lock. It is a record
lock (fcntl(2)): the kernel releases it when a worker dies while holding it.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
from typing import Final

# 65,536 tokens that have not expired. A bucket that is full refuses: with random keys that begins
# when about two thirds of the table are taken, and only who holds a key can fill it at all.
_BUCKETS: Final = 1 << 10
_WAYS: Final = 64
_ENTRY: Final = struct.Struct("=16sd")  # a token's digest, and until when it has to be remembered
_BUCKET_BYTES: Final = _WAYS * _ENTRY.size


class SharedUsedTokens:
    """Implements `token.TokenMemory` over memory that is shared by fork."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("pyforwarder-tokens", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _BUCKETS * _BUCKET_BYTES)
        self._memory = mmap.mmap(self._fd, _BUCKETS * _BUCKET_BYTES)

    def spend(self, signature: bytes, *, expires_unix_s: float, now_unix_s: float) -> bool:
        """Whether this is the first use, and there was room to remember it."""
        digest = hashlib.blake2b(signature, digest_size=16).digest()
        start = int.from_bytes(digest[:8], "big") % _BUCKETS * _BUCKET_BYTES
        # Held for some microseconds, by whoever holds it.
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            return self._remember(start, digest, expires_unix_s, now_unix_s)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _remember(self, start: int, digest: bytes, until_s: float, now_unix_s: float) -> bool:
        bucket = self._memory[start : start + _BUCKET_BYTES]
        free = -1
        for index, (known, known_until_s) in enumerate(_ENTRY.iter_unpack(bucket)):
            if known_until_s < now_unix_s:
                free = index if free < 0 else free
            elif known == digest:
                return False
        if free < 0:
            return False
        _ENTRY.pack_into(self._memory, start + free * _ENTRY.size, digest, until_s)
        return True

    def close(self) -> None:
        """Unmap the memory here; other processes keep theirs."""
        self._memory.close()
        os.close(self._fd)
