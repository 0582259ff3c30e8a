"""A pair that was replicated gives the record that it was made of."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf.abi import PairRecord
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Routing, Splice, SpliceState
from pyforwarder.datapath.splice.replicas import (
    Interfaces,
    boot_unix_s,
    is_replicable,
    is_wide,
    narrow,
    shown,
    slack_for,
    splice_of,
)
from tests.helpers.failover_records import a_pair, pairs
from tests.helpers.plain_replicas import pair_of

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.record import Pair

INTERFACES: Final = Interfaces(3, 5)
WORD: Final = 1 << 32


def record_of(pair: Pair, *, slack: int = 0) -> Splice:
    return splice_of(pair, 7, INTERFACES, claim=2, slack=slack)


@given(pairs())
def test_the_record_says_what_the_pair_said(pair: Pair) -> None:
    record = record_of(pair)
    boot_s = boot_unix_s()
    said = PairRecord.from_buffer_copy(shown(pair, record, boot_unix_s=boot_s))
    ends = (said.client, said.listener, said.source, said.server)
    assert [end.port for end in ends] == [end.port for end in pair.ends]
    again = pair_of(record, said, boot_unix_s=boot_s)
    # A machine's clock begins when it was started; no pair is older there.
    assert replace(again, started_s=pair.started_s) == pair


@given(pairs())
def test_both_directions_fit_together(pair: Pair) -> None:
    up, down = record_of(pair).direction
    for direction, back in ((up, down), (down, up)):
        assert (direction.seq_delta + back.ack_delta) % WORD == 0
        assert (direction.tsval_delta + back.tsecr_delta) % WORD == 0
        # What goes on by the one direction answers what came by the other.
        assert list(direction.source) == list(back.from_.target)
        assert list(direction.target) == list(back.from_.source)
        assert (direction.sport, direction.dport) == (back.from_.dport, back.from_.sport)
    assert (up.interface, down.interface) == (5, 3)


def test_what_may_have_passed_since_is_believed_until_both_were_heard() -> None:
    pair, slack = a_pair(), 1 << 28
    memory = bytearray(bytes(record_of(pair, slack=slack)))
    assert len(memory) == SPLICE_BYTES
    record = Splice.from_buffer(memory)
    assert is_wide(record)
    up, down = record.direction
    assert (up.max_edge - pair.up.limit) % WORD == up.max_window == slack
    # As the programs store what the peers have said.
    up.last_ack, up.window_edge = 1000, 51_000
    down.last_ack, down.window_edge = 2000, 302_000
    narrow(memory, 0)
    assert not is_wide(record)
    assert up.max_window == 600_000
    assert down.max_window == 100_000
    sent = (pair.down.last_end + pair.deltas.down_seq + slack) % WORD
    assert (up.socket_sent_end, up.tail_end) == (sent, sent)


def test_a_limit_is_never_moved_forward() -> None:
    pair = a_pair()
    memory = bytearray(bytes(record_of(pair)))
    record = Splice.from_buffer(memory)
    record.direction[1].window_edge = (
        int(record.direction[0].max_edge) - record.direction[1].ack_delta
    ) % WORD
    before = record.direction[0].max_edge
    narrow(memory, 0)
    assert record.direction[0].max_edge == before


def test_how_much_is_believed_follows_how_much_has_passed() -> None:
    pair = a_pair()
    assert slack_for(None, pair) == slack_for(pair, pair) == 1 << 28
    moved = replace(pair, up=replace(pair.up, last_end=pair.up.last_end + (100 << 20)))
    assert slack_for(pair, moved) == 800 << 20
    moved = replace(pair, down=replace(pair.down, last_end=pair.up.last_end + (1 << 30)))
    assert slack_for(pair, moved) == 1 << 30


@pytest.mark.parametrize(
    ("field", "value"),
    [("state", SpliceState.ARMED), ("id", 0), ("reset", 1), ("out", 1)],
)
def test_what_cannot_go_on_elsewhere_is_not_replicated(field: str, value: int) -> None:
    record = record_of(a_pair())
    assert is_replicable(record)
    if field == "out":
        record.out[0] = value
    else:
        setattr(record, field, value)
    assert not is_replicable(record)


@pytest.mark.parametrize("direction", [0, 1])
def test_a_pair_with_a_tail_or_a_way_of_its_own_is_not_replicated(direction: int) -> None:
    for routing in Routing:
        record = record_of(a_pair())
        record.direction[direction].routing = routing
        assert not is_replicable(record)
    record = record_of(a_pair())
    record.direction[direction].tail_open = 1
    assert not is_replicable(record)


@given(st.binary(min_size=SPLICE_BYTES, max_size=SPLICE_BYTES))
def test_no_record_makes_the_reader_fail(data: bytes) -> None:
    record = Splice.from_buffer_copy(data)
    if is_replicable(record):
        pair_of(record, None, boot_unix_s=0.0)
