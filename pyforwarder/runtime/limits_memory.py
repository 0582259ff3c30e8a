"""The layout of the limits' shared memory: workers' columns, and what other machines have.

`SharedLimits` writes its worker's column (limits.py), `OtherMachines` the rest (fleet_counts.py).
All words have 64 bits.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

SCOPES: Final = 16_384  # as many as there are counters

TABLE_ENTRIES: Final = 1 << 15  # clients with open connections, per worker and scope they count in
PROBES: Final = 16
ENTRY_WORDS: Final = 2  # a client's 64-bit key, its count
RATE_ROWS: Final = 4
RATE_BUCKETS: Final = 1 << 14  # in each row

# In a column.
PAIRS_AT: Final = 0  # by scope
SECONDS_AT: Final = PAIRS_AT + SCOPES  # by scope: a clock second, and how many were admitted in it
HELD_AT: Final = SECONDS_AT + SCOPES  # by scope: bytes that pairs hold in memory
TABLE_AT: Final = HELD_AT + SCOPES
RATES_AT: Final = TABLE_AT + TABLE_ENTRIES * ENTRY_WORDS
NAMES_AT: Final = RATES_AT + RATE_ROWS * RATE_BUCKETS  # by entry of the table: that client's name
NAME_WORDS: Final = 4  # key; scope, version and bits of the network; its leading bits, high, low
COLUMN_WORDS: Final = NAMES_AT + TABLE_ENTRIES * NAME_WORDS
# Whole pages, also where those have 64 KiB: a column is given back to the kernel by itself.
_LARGEST_PAGE_BYTES: Final = 1 << 16
COLUMN_BYTES: Final = -(-COLUMN_WORDS * 8 // _LARGEST_PAGE_BYTES) * _LARGEST_PAGE_BYTES

# In what other machines of the fleet have, for all workers.
EDITION_AT: Final = 0  # odd while it is written
UNTIL_AT: Final = 1  # microseconds of the steady clock: what stands here is good until then
MACHINES_AT: Final = 2  # of the fleet, with this one
ENTRIES_AT: Final = 3
OTHERS_AT: Final = 4  # a client's key, its count
OTHERS_BYTES: Final = 2 * _LARGEST_PAGE_BYTES
MOST_OTHERS: Final = (OTHERS_BYTES // 8 - OTHERS_AT) // 2
MOST_MACHINES: Final = 256

SECOND_US: Final = 1_000_000
_KEY: Final = struct.Struct("=Q")
WORD_MASK: Final = (1 << 64) - 1


def share_of(most: int, machines: int) -> int:
    """What a client may have at each machine of a fleet, however many it has at others.

    No machine reports a client that has no more than this.
    """
    return most // (2 * machines)


def key_of(text: bytes, secret: bytes) -> int:
    """The number of a client, by a text that says the scope and its network; never 0."""
    digest = hashlib.blake2b(text, digest_size=8, key=secret).digest()
    key: int = _KEY.unpack(digest)[0]
    return key or 1


def name_place(entry: int) -> int:
    """Where the client is named whose entry begins there."""
    return NAMES_AT + (entry - TABLE_AT) * (NAME_WORDS // ENTRY_WORDS)
