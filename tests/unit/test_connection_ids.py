"""Which server a QUIC connection id leads to: what is learnt, by whom, and for how long."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.quic_ids import id_of_client, id_of_server
from pyforwarder.runtime.shared_memory import SharedBlocks
from pyforwarder.worker.udp import connection_ids
from pyforwarder.worker.udp.connection_ids import KEEP_S, PART_BYTES, ConnectionIds, SessionTarget
from tests.helpers.quic import HANDSHAKE, INITIAL, RETRY, V1, V2, header

TARGET = SessionTarget(Address("192.0.2.1", 443), 3, 7, 1)
TARGET6 = SessionTarget(Address("2001:db8::1", 8443), 3, 8, -1)


def short(connection_id: bytes, more: bytes = b"\x55" * 30) -> bytes:
    return b"\x41" + connection_id + more


def take(shared: SharedBlocks, worker: int) -> ConnectionIds:
    return ConnectionIds(shared.map(writable=[worker]), worker)


@pytest.fixture
def two() -> Iterator[tuple[ConnectionIds, ConnectionIds]]:
    """The table as two workers have it."""
    shared = SharedBlocks.make("ids", 2, PART_BYTES)
    taken = take(shared, 0), take(shared, 1)
    shared.close()
    yield taken
    for each in taken:
        each.close()


def found(ids: ConnectionIds, connection_id: bytes, now_s: float = 0.0) -> SessionTarget | None:
    answer = ids.find(short(connection_id), listener=3, now_s=now_s)
    return answer[1] if answer is not None else None


# Headers


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("kinds", [INITIAL, HANDSHAKE])
def test_server_says_its_id_in_long_headers(version: int, kinds: dict[int, int]) -> None:
    datagram = header(kinds[version], version=version, dcid=b"client", scid=b"server-id")
    assert id_of_server(datagram + bytes(30)) == b"server-id"
    assert id_of_server(memoryview(datagram + bytes(30))) == b"server-id"


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        short(b"server-id"),
        header(0, version=0, scid=b"server-id"),
        header(0, version=0xFF00001D, scid=b"server-id"),
        header(RETRY[V1], scid=b"server-id") + bytes(40),  # replaced by another one
        header(RETRY[V2], version=V2, scid=b"server-id") + bytes(40),
        header(0, scid=b"abc"),  # too short to be met by nothing else
        header(0, scid=b""),
        header(0, scid=bytes(21)),
        header(0, scid=b"server-id")[:-1],
        header(0, dcid=bytes(20))[:20],
    ],
    ids=repr,
)
def test_other_datagrams_say_none(datagram: bytes) -> None:
    assert id_of_server(datagram) == b""


def test_client_says_an_id_in_short_headers() -> None:
    assert id_of_client(short(b"server-id"), 9) == b"server-id"
    assert id_of_client(b"\x41server-i", 9) == b""
    assert id_of_client(header(0, dcid=b"server-id"), 9) == b""
    assert id_of_client(b"", 9) == b""


# The table


def test_what_one_worker_learns_all_find(two: tuple[ConnectionIds, ConnectionIds]) -> None:
    two[0].learn(b"first-id", TARGET, 0.0)
    two[1].learn(b"i" * 20, TARGET6, 0.0)
    for ids in two:
        assert found(ids, b"first-id") == TARGET
        assert found(ids, b"i" * 20) == TARGET6
        assert found(ids, b"first-ie") is None
        assert ids.find(short(b"first-id"), listener=4, now_s=0.0) is None
        assert ids.find(b"", listener=3, now_s=0.0) is None
    assert two[0].find(short(b"first-id"), listener=3, now_s=0.0) == (b"first-id", TARGET)


def test_part_of_another_worker_cannot_be_written(two: tuple[ConnectionIds, ConnectionIds]) -> None:
    with pytest.raises(TypeError):
        two[0]._parts[1][0] = 1
    libc = ctypes.CDLL(None, use_errno=True)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    others = [words for words in maps if "pyforwarder-ids" in words[-2] and words[1] == "r--s"]
    assert len(others) == 2  # this process has the part of each worker twice
    for words in others:
        start, end = (int(number, 16) for number in words[0].split("-"))
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), access) == -1
        assert ctypes.get_errno() == errno.EACCES
    assert not any(
        "pyforwarder-ids" in os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    )


def test_id_is_known_for_a_while_after_its_last_session(
    two: tuple[ConnectionIds, ConnectionIds],
) -> None:
    ids = two[0]
    ids.learn(b"first-id", TARGET, 0.0)
    ids.learn(b"first-id", TARGET, 50.0)
    ids.forget(b"first-id", 100.0)
    assert found(two[1], b"first-id", 1e9) == TARGET
    ids.forget(b"first-id", 200.0)
    assert found(two[1], b"first-id", 200.0 + KEEP_S) == TARGET
    assert found(two[1], b"first-id", 200.1 + KEEP_S) is None
    ids.learn(b"first-id", TARGET, 500.0)
    assert found(two[1], b"first-id", 1e9) == TARGET


def test_oldest_makes_room(
    two: tuple[ConnectionIds, ConnectionIds], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_ids, "_BUCKETS", 1)
    ids = two[0]
    names = [b"id-%05d" % number for number in range(connection_ids._WAYS)]
    for name in names:
        ids.learn(name, TARGET, 0.0)
    ids.forget(names[5], 1.0)
    ids.forget(names[6], 0.5)
    ids.learn(b"another-", TARGET, 2.0)
    assert [name for name in names if found(ids, name, 2.0) is None] == [names[6]]
    assert found(ids, b"another-", 2.0) == TARGET
    # Of one whose place is taken nothing is left to forget.
    ids.learn(b"one-more", TARGET, 2.0)
    ids.learn(b"and-more", TARGET, 2.0)
    for name in names:
        if name not in (names[5], names[6]):
            ids.forget(name, 3.0)
    assert not [name for name in ids._held if name in names]


def test_worker_that_takes_a_part_empties_it() -> None:
    shared = SharedBlocks.make("ids", 2, PART_BYTES)
    first, other = take(shared, 0), take(shared, 1)
    first.learn(b"first-id", TARGET, 0.0)
    other.learn(b"other-id", TARGET, 0.0)
    again = take(shared, 0)
    assert found(again, b"first-id") is None
    assert found(again, b"other-id") == TARGET
    for each in (first, other, again):
        each.close()
    shared.close()


def test_ids_of_every_length_are_found(two: tuple[ConnectionIds, ConnectionIds]) -> None:
    names = [bytes(range(1, length + 1)) for length in range(4, 21)]
    for name in reversed(names):
        two[0].learn(name, TARGET._replace(number=len(name)), 0.0)
    for name in names:
        answer = found(two[1], name)
        assert answer is not None
        # The shortest that fits: the longer ones begin alike here.
        assert answer.number == 4


def test_entries_stand_in_whole_places() -> None:
    assert connection_ids._ENTRY.size == 64
    assert connection_ids._UNTIL.unpack_from(
        connection_ids._ENTRY.pack(4, b"", 0, b"", 0, 0, 0, 0, math.inf), connection_ids._UNTIL_AT
    ) == (math.inf,)
