"""The maps of UDP sessions: created, or taken over from an earlier daemon.

Both are written by the keeper and the programs only. No entry is ever evicted: a session for which
there is no room is copied.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice import records
from pyforwarder.datapath.splice.abi import NO_SLOT
from pyforwarder.datapath.splice.records import (
    FLOW,
    KEY_BYTES,
    forget_flows,
    shown_of,
    shown_slot,
)
from pyforwarder.datapath.splice.session_abi import (
    SESSION_BYTES,
    SESSION_VERSION,
    SessionDirection,
    SessionRecord,
    SessionState,
)
from pyforwarder.runtime.one_store import store32, store64

PINS: Final = (f"session_flows_{SESSION_VERSION}", f"sessions_{SESSION_VERSION}")
# The most entries: no host forwards more clients by one table, which has 42 MB at that size.
_MOST: Final = 1 << 16
_LEAST: Final = 1024


@dataclass(frozen=True, slots=True)
class FoundSession:
    """A session of an earlier daemon that continues."""

    index: int
    id: int
    record: bytes  # of the pair table: what `show` printed for it; empty: not known


@dataclass(slots=True)
class SessionMaps:
    """The maps that the programs and the keeper share for sessions."""

    flows_fd: int
    sessions_fd: int
    entries: int
    is_left: bool  # whether an earlier daemon has left them
    find_fd: int = -1  # the program that the keeper runs
    found: tuple[FoundSession, ...] = ()

    def take_over(self, pairs_fd: int) -> None:
        """Find the sessions of an earlier daemon that continue.

        `pairs_fd` is the pair table in which they had slots.
        """
        if self.is_left:
            self.found = take_over(self.flows_fd, self.sessions_fd, self.entries, pairs_fd)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.flows_fd, self.sessions_fd, self.find_fd):
            if fd >= 0:
                os.close(fd)


def room_for(most_sessions: int, workers: int) -> int:
    """The number of entries for so many sessions (0: any number).

    Clients are distributed to workers by their addresses, unevenly, and each worker has its share.
    """
    most = min(most_sessions or _MOST, _MOST)
    return workers * max(_LEAST, 2 * most // workers)


def make(entries: int) -> tuple[int, int]:
    """Create the maps of flows and of sessions; the caller closes the descriptors.

    Raises:
        OSError: the kernel refuses.
    """
    flows = bpf.create_map(
        bpf.MapType.HASH,
        key_bytes=KEY_BYTES,
        value_bytes=FLOW.size,
        entries=2 * entries,
        flags=bpf.F_NO_PREALLOC,
        name="pf_session_flows",
    )
    try:
        sessions = bpf.create_map(
            bpf.MapType.ARRAY,
            key_bytes=4,
            value_bytes=SESSION_BYTES,
            entries=entries,
            flags=bpf.F_MMAPABLE,
            name="pf_sessions",
        )
    except OSError:
        os.close(flows)
        raise
    return flows, sessions


def open_left(pins: Path) -> tuple[int, int, int] | None:
    """The maps that an earlier daemon has pinned, and their number of entries; the caller closes
    them.

    None if there are none, or of another version.
    """
    opened: list[int] = []
    try:
        opened.extend(bpf.open_pin(pins / name) for name in PINS)
        flows, sessions = opened
        sizes = bpf.map_sizes(sessions)
        is_ours = sizes.value_bytes == SESSION_BYTES
        is_ours = is_ours and bpf.map_sizes(flows)[:2] == (KEY_BYTES, FLOW.size)
    except (OSError, ValueError):
        is_ours = False
    if is_ours:
        return flows, sessions, sizes.entries
    for fd in opened:
        os.close(fd)
    return None


def take_over(
    flows_fd: int, sessions_fd: int, entries: int, pairs_fd: int
) -> tuple[FoundSession, ...]:
    """The sessions that continue, without slots; the others are forgotten.

    `pairs_fd` is the pair table in which they had slots.
    """
    slots = bpf.map_sizes(pairs_fd).entries
    table = bpf.map_memory(pairs_fd, slots * PAIR_BYTES, write=False)
    memory = bpf.map_memory(sessions_fd, entries * SESSION_BYTES, write=True)
    flows = bpf.Map(flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
    found = []
    try:
        for index in used_indexes(memory):
            record = record_of(memory, index)
            is_left = record.state == SessionState.ACTIVE and record.id
            if not is_left or is_over(record, time.monotonic_ns()):
                forget_flows(flows, index, record)
                store(memory, index, "state", SessionState.FREE)
                continue
            shown = shown_of(table, record, slots)
            if shown:
                store(memory, index, "last_slot", shown_slot(table, record, slots))
            store(memory, index, "slot", NO_SLOT)
            found.append(FoundSession(index, record.id, shown))
    finally:
        memory.close()
        table.close()
    return tuple(found)


def record_of(memory: mmap.mmap, index: int) -> SessionRecord:
    """A copy of a session's record."""
    return SessionRecord.from_buffer_copy(memory, index * SESSION_BYTES)


def store(memory: mmap.mmap, index: int, name: str, number: int) -> None:
    """Write a 32-bit field of a record, with one store."""
    at = index * SESSION_BYTES + int(getattr(SessionRecord, name).offset)
    store32(memory, at, number)


def store_wide(memory: mmap.mmap, index: int, name: str, number: int) -> None:
    """Write a 64-bit field of a record, with one store."""
    at = index * SESSION_BYTES + int(getattr(SessionRecord, name).offset)
    store64(memory, at, number)


def is_over(record: SessionRecord, now_ns: int) -> bool:
    """Whether the programs regard a session as expired (`has_expired` in splice_udp.h).

    `now_ns` is of the monotonic clock.
    """
    last_ns = max(record.began_ns, *(direction.last_ns for direction in record.direction))
    return bool(now_ns - last_ns > record.idle_ns)


def store_direction(memory: mmap.mmap, index: int, direction: int, name: str, number: int) -> None:
    """`store` of one direction."""
    store32(memory, _at_direction(index, direction, name), number)


def store_direction_wide(
    memory: mmap.mmap, index: int, direction: int, name: str, number: int
) -> None:
    """`store_wide` of one direction."""
    store64(memory, _at_direction(index, direction, name), number)


def _at_direction(index: int, direction: int, name: str) -> int:
    at = index * SESSION_BYTES + SessionRecord.direction.offset
    at += direction * ctypes.sizeof(SessionDirection)
    return at + int(getattr(SessionDirection, name).offset)


def used_indexes(memory: mmap.mmap) -> Iterator[int]:
    """The records that are not free."""
    return records.used_indexes(
        memory, state_at=SessionRecord.state.offset, record_bytes=SESSION_BYTES
    )
