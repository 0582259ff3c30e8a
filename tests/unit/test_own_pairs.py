"""Which spliced pairs a machine tells the others of, and in which order it reads them."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice
from pyforwarder.datapath.splice.own_pairs import READ_AT_ONCE, OwnPairs
from pyforwarder.datapath.splice.replicas import Interfaces, splice_of
from pyforwarder.fleet.failover.ledger import MOVING_S
from tests.helpers.failover_records import a_pair

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.record import Pair

COUNT: Final = 2 * READ_AT_ONCE + 10
ADDRESSES: Final = ["2.2.2.2", "3.3.3.3"]


class Table:
    """The map with the records, and who reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._records = mmap.mmap(-1, (COUNT + 1) * SPLICE_BYTES)
        pairs = mmap.mmap(-1, PAIR_BYTES)
        maps = SimpleNamespace(splices_fd=1, pairs_fd=2, entries=COUNT + 1, workers=1, slots=1)
        both = {1: self._records, 2: pairs}
        monkeypatch.setattr(bpf, "map_memory", lambda fd, *_, **__: both[fd])
        self.own = OwnPairs(cast("Any", maps), ADDRESSES)

    def write(self, index: int, pair: Pair) -> str:
        """A pair of this machine's; its key."""
        record = splice_of(pair, index + 1, Interfaces(3, 5), claim=0, slack=0)
        record.worker = 0
        self._records[index * SPLICE_BYTES : (index + 1) * SPLICE_BYTES] = bytes(record)
        return pair.key

    def move(self, index: int, last_end: int) -> None:
        """Bytes have passed."""
        record = Splice.from_buffer(self._records, index * SPLICE_BYTES)
        record.direction[0].last_end = last_end
        del record  # the memory is free again


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    return Table(monkeypatch)


def test_one_that_begins_is_read_at_once_and_many_that_move_in_turn(table: Table) -> None:
    keys = [table.write(index, a_pair(port=1000 + 4 * index)) for index in range(COUNT)]
    assert list(table.own.scan(0.0)) == keys
    for index in range(COUNT):
        table.move(index, 99)
    young = table.write(COUNT, a_pair(port=60_000))
    read: set[str] = set()
    for number in range(3):
        found = table.own.scan(MOVING_S + number / 100)
        assert found.keys() == {*keys, young}  # none is thought to have ended meanwhile
        now = {key for key, own in found.items() if own.pair.up.last_end == 99}
        assert read <= now
        assert len(now - read) <= READ_AT_ONCE
        read = now
    assert read == set(keys)


def test_only_what_others_know_of_is_theirs_to_go_on_with(table: Table) -> None:
    keys = [table.write(index, a_pair(port=1000 + 4 * index)) for index in range(3)]
    table.own.scan(0.0)
    assert table.own.ids([]) == set()
    assert table.own.ids([keys[0], keys[2], "another's"]) == {1, 3}
