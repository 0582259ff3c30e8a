"""A pair's report is read in one go as it is field by field."""

from __future__ import annotations

import time
from dataclasses import replace as _replaced
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice
from pyforwarder.datapath.splice.packing import pack
from pyforwarder.datapath.splice.replicas import Interfaces, is_replicable, shown, splice_of
from pyforwarder.fleet.failover.record import (
    Pair,
    has_names,
    key_of,
    text_of,
    told_at_once,
    with_names_of,
)
from tests.helpers.failover_records import a_pair, pairs
from tests.helpers.plain_replicas import pair_of

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.record import Half

BOOT_S: Final = 1_000_000.0
ID: Final = 7


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that is not shown begins now."""
    monkeypatch.setattr(time, "monotonic", lambda: 77.0)


def packed_of(raw: bytes, said: bytes = b"") -> tuple[int, bytes, str] | None:
    """At all addresses."""
    record = Splice.from_buffer_copy(raw)
    up = record.direction[0]
    ips = {bytes(up.from_.target), bytes(up.source)}
    addresses = ips | {ip[12:] for ip in ips}
    packed = pack(raw, record.id, said, addresses, boot_unix_s=BOOT_S)
    assert pack(raw, record.id, said, set(), boot_unix_s=BOOT_S) is None
    assert pack(raw, record.id ^ 1, said, addresses, boot_unix_s=BOOT_S) is None
    return packed and (packed[0], packed[1], key_of(*packed[2]))


# Records as anybody could write them: bytes that are 0 are those that most depends on.
RAW: Final = st.lists(st.tuples(st.integers(0, SPLICE_BYTES - 1), st.integers(0, 255)), max_size=40)


@given(pairs(), st.booleans(), RAW, st.binary(min_size=PAIR_BYTES, max_size=PAIR_BYTES))
def test_it_says_the_same_whatever_stands_in_the_record(
    pair: Pair, is_shown: bool, noise: list[tuple[int, int]], table: bytes
) -> None:
    record = splice_of(pair, ID, Interfaces(3, 5), claim=2, slack=0)
    raw = bytearray(bytes(record))
    for at, byte in noise:
        raw[at] = byte
    # Keepers write no keepalive that a record could not have.
    raw[Splice.keep_idle_s.offset :] = bytes(record)[Splice.keep_idle_s.offset :]
    record = Splice.from_buffer_copy(raw)
    entry = PairRecord.from_buffer_copy(table)
    if is_shown:
        entry = PairRecord.from_buffer_copy(shown(pair, record, boot_unix_s=BOOT_S))
    packed = packed_of(bytes(raw), bytes(entry))
    if not is_replicable(record):
        assert packed is None
        return
    is_its = entry.id == record.id
    expected = pair_of(record, entry if is_its else None, boot_unix_s=BOOT_S)
    claim = record.direction[0].claim
    assert packed == (claim, expected.pack(), expected.key)
    assert text_of(expected.pack()) == expected.encode()


@given(pairs(), pairs(), st.booleans())
def test_a_pair_without_names_gets_those_that_were_told(
    pair: Pair, known: Pair, is_same: bool
) -> None:
    if is_same:
        known = _replaced(known, ends=pair.ends, deltas=pair.deltas)
    assert has_names(pair.pack()) == bool(pair.listener_name)
    mixed = Pair.unpack(with_names_of(known.pack(), pair.pack()))
    if pair.deltas != known.deltas or pair.family != known.family:
        assert mixed == pair
        return
    assert mixed == _replaced(
        pair,
        started_s=known.started_s,
        rule=known.rule,
        listener_name=known.listener_name,
        up=_replaced(pair.up, carried_bytes=known.up.carried_bytes),
        down=_replaced(pair.down, carried_bytes=known.down.carried_bytes),
    )


@given(pairs(), pairs())
def test_what_is_told_at_once_is_how_far_the_ends_have_come(one: Pair, other: Pair) -> None:
    def ends(pair: Pair) -> tuple[object, ...]:
        def end(half: Half) -> tuple[object, ...]:
            return half.fin, half.fin_seq

        return pair.deltas, end(pair.up), end(pair.down), bool(pair.listener_name)

    for pair in (other, _replaced(other, deltas=one.deltas, up=one.up, down=one.down)):
        is_same = ends(one) == ends(pair)
        assert (told_at_once(one.pack()) == told_at_once(pair.pack())) == is_same
    assert told_at_once(a_pair().pack()) == told_at_once(a_pair(6).pack())
