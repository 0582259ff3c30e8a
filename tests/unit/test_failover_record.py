"""A pair as another machine of the fleet reads it: exact, bounded, and nothing else."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.fleet.failover.record import (
    MOST_STORED_BYTES,
    Endpoint,
    Entry,
    Fin,
    Pair,
    RecordFault,
    tag_of,
)
from tests.helpers.failover_records import a_pair, pairs


@given(pairs())
def test_a_pair_is_read_as_it_was_written(pair: Pair) -> None:
    assert Pair.decode(pair.encode()) == pair
    entry = Entry(tag_of("one"), 4_294_967_294, pair.encode())
    assert Entry.decode(pair.key, entry.encode()) == (entry, pair)


@pytest.mark.parametrize("version", [4, 6])
def test_a_pair_costs_at_most_400_bytes_in_the_store(version: int) -> None:
    pair = a_pair(version)
    key = f"/pyforwarder/{'f' * 40}/failover/pairs/{pair.key}"
    value = Entry(tag_of("one"), 4_294_967_294, pair.encode()).encode()
    assert len(key) + len(value) <= MOST_STORED_BYTES


@given(st.text(max_size=500) | st.binary(max_size=500))
def test_no_value_raises_anything_else(value: str | bytes) -> None:
    with contextlib.suppress(RecordFault):
        Entry.decode("x", value)
    if isinstance(value, str):
        with contextlib.suppress(RecordFault):
            Pair.decode(value)


@given(pairs(), st.data())
def test_a_changed_text_is_another_pair_or_none(pair: Pair, data: st.DataObject) -> None:
    text = list(pair.encode())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.sampled_from("AQgw-_09"))
    with contextlib.suppress(RecordFault):
        again = Pair.decode("".join(text))
        assert Pair.decode(again.encode()) == again


def test_what_no_machine_writes_is_refused() -> None:
    pair = a_pair()
    half = pair.up
    wrong = [
        replace(pair, ends=pair.ends._replace(client=Endpoint(pair.ends.client.ip, 0))),
        replace(pair, scales=(15, 0, 0, 0)),
        replace(pair, keepalive=(60, 0, 3)),
        replace(pair, keepalive=(32768, 1, 3)),
        replace(pair, rule=b"a\nb"),
        replace(pair, listener_name=b"l" * 16),
        replace(pair, up=replace(half, fin=Fin.ACKED)),
        replace(pair, up=replace(half, fin=Fin.SEEN)),
        replace(pair, up=replace(half, fin=Fin(8))),
        replace(pair, up=replace(half, carried_bytes=(1 << 62) + 1)),
    ]
    for each in wrong:
        with pytest.raises(RecordFault):
            Pair.decode(each.encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2 {tag} 1 {data}",
        "1 {tag} 0 {data}",
        "1 {tag} -1 {data}",
        "1 {tag} 4294967295 {data}",
        "1 short 1 {data}",
        "1 {tag} 1 {data} more",
        "1 {tag} 1 {data}=",
        "1 {tag} \u0661 {data}",
    ],
)
def test_what_is_no_entry_is_refused(text: str) -> None:
    pair = a_pair()
    with pytest.raises(RecordFault):
        Entry.decode(pair.key, text.format(tag=tag_of("one"), data=pair.encode()))


def test_an_entry_stands_at_the_key_of_its_pair() -> None:
    pair, other = a_pair(), a_pair(port=40_000)
    entry = Entry(tag_of("one"), 1, pair.encode())
    assert Entry.decode(pair.key, entry.encode())[1] == pair
    with pytest.raises(RecordFault):
        Entry.decode(other.key, entry.encode())
