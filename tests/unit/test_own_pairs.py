"""Which spliced pairs a machine tells the others of, and in which order it reads them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord
from pyforwarder.datapath.express.connect_abi import NO_WORKER
from pyforwarder.datapath.splice.abi import HELD, SPLICE_BYTES, Splice, SpliceState
from pyforwarder.datapath.splice.own_pairs import READ_AT_ONCE, OwnPairs
from pyforwarder.datapath.splice.replicas import Interfaces, splice_of
from pyforwarder.fleet.failover.ledger import MOVING_S, Own
from pyforwarder.fleet.failover.record import Fin
from tests.helpers.failover_records import a_pair

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.record import Pair

COUNT: Final = 2 * READ_AT_ONCE + 10
ADDRESSES: Final = ["2.2.2.2", "3.3.3.3"]


class Table:
    """The map with the records, and who reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._records = mmap.mmap(-1, (COUNT + 1) * SPLICE_BYTES)
        self._pairs = pairs = mmap.mmap(-1, PAIR_BYTES)
        maps = SimpleNamespace(splices_fd=1, pairs_fd=2, entries=COUNT + 1, workers=1, slots=1)
        self._maps = maps
        self._both = {1: self._records, 2: pairs}
        self.own = self.another_reader(monkeypatch)
        self._found: dict[str, Own] = {}

    def scan(self, now_s: float) -> dict[str, Own]:
        """What is found; it says as well which keys that is of."""
        before = self._found
        scan = self.own.scan(now_s)
        self._found = found = dict(scan.own)
        differ = {key for key in before | found if before.get(key) is not found.get(key)}
        assert set(scan.changed) == differ
        return found

    def another_reader(self, monkeypatch: pytest.MonkeyPatch) -> OwnPairs:
        """One that has seen nothing yet."""
        monkeypatch.setattr(bpf, "map_memory", lambda fd, *_, **__: self._both[fd])
        return OwnPairs(cast("Any", self._maps), ADDRESSES)

    def write(self, index: int, pair: Pair, pair_id: int = 0, *, worker: int = 0) -> str:
        """A pair of this machine's; its key."""
        record = splice_of(pair, pair_id or index + 1, Interfaces(3, 5), claim=0, slack=0)
        record.worker = worker
        self._records[index * SPLICE_BYTES : (index + 1) * SPLICE_BYTES] = bytes(record)
        return pair.key

    def give(self, index: int, worker: int) -> None:
        """It is that worker's now."""
        with self._record(index) as record:
            record.worker = worker

    def name(self, index: int, listener: bytes) -> None:
        """A worker has it in its part of the pair table."""
        with self._record(index) as record:
            shown = PairRecord(id=record.id, listener_name=listener, rule=b"all")
            self._pairs[:] = bytes(shown).ljust(PAIR_BYTES, b"\0")
            record.slot = 0

    def move(self, index: int, last_end: int) -> None:
        """Bytes have passed."""
        with self._record(index) as record:
            record.direction[0].last_end = last_end

    def half_end(self, index: int) -> None:
        """A FIN of the client has come."""
        with self._record(index) as record:
            record.direction[0].fin_due = 1

    def open_tail(self, index: int, *, is_open: bool) -> None:
        """Our socket has something to send, or not any more."""
        with self._record(index) as record:
            record.direction[1].tail_open = is_open

    def end(self, index: int) -> None:
        """The record is free."""
        with self._record(index) as record:
            record.state = SpliceState.FREE

    @contextlib.contextmanager
    def _record(self, index: int) -> Iterator[Splice]:
        record = Splice.from_buffer(self._records, index * SPLICE_BYTES)
        yield record
        del record  # the memory is free again


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    return Table(monkeypatch)


def test_a_pair_has_its_names_as_soon_as_a_worker_shows_it(table: Table) -> None:
    """Else they would be forgotten where this machine died within the next second."""
    key = table.write(0, a_pair())
    assert table.scan(0.0)[key].pair.listener_name == b""
    table.name(0, b"web")
    assert table.scan(0.1)[key].pair.listener_name == b"web"


def test_one_that_begins_is_read_at_once_and_many_that_move_in_turn(table: Table) -> None:
    keys = [table.write(index, a_pair(port=1000 + 4 * index)) for index in range(COUNT)]
    assert list(table.scan(0.0)) == keys
    for index in range(COUNT):
        table.move(index, 99)
    young = table.write(COUNT, a_pair(port=60_000))
    read: set[str] = set()
    for number in range(3):
        found = table.scan(MOVING_S + number / 100)
        assert found.keys() == {*keys, young}  # none is thought to have ended meanwhile
        now = {key for key, own in found.items() if own.pair.up.last_end == 99}
        assert read <= now
        assert len(now - read) <= READ_AT_ONCE
        read = now
    assert read == set(keys)


def test_one_that_stands_still_is_the_same_object_and_costs_nobody_a_look(table: Table) -> None:
    still, moves = (table.write(index, a_pair(port=1000 + 4 * index)) for index in range(2))
    before = dict(table.scan(0.0))
    table.move(1, 99)
    now = table.scan(MOVING_S)
    assert now[still] is before[still]
    assert now[moves] is not before[moves]
    assert now[moves].pair.up.last_end == 99
    table.move(0, 77)
    assert table.scan(MOVING_S + 0.1)[still] is before[still]  # a second has not passed
    assert table.scan(MOVING_S + 0.2).keys() == {still, moves}
    assert table.scan(2 * MOVING_S)[still].pair.up.last_end == 77


def test_what_begins_and_ends_is_seen_in_the_next_scan(table: Table) -> None:
    keys = [table.write(index, a_pair(port=1000 + 4 * index)) for index in range(3)]
    table.open_tail(1, is_open=True)
    assert table.scan(0.0).keys() == {keys[0], keys[2]}
    table.open_tail(1, is_open=False)  # now another machine can go on with it
    table.end(2)
    assert table.scan(0.1).keys() == {keys[0], keys[1]}
    table.half_end(0)
    assert table.scan(0.2)[keys[0]].pair.up.fin == Fin.DUE
    other = table.write(2, a_pair(port=50_000), pair_id=77)  # the record has another pair now
    assert table.scan(0.3).keys() == {keys[0], keys[1], other}
    other = table.write(2, a_pair(port=60_000), pair_id=78)
    assert table.scan(0.4).keys() == {keys[0], keys[1], other}
    # Two records with the same ports: the later one is the pair.
    again = table.write(3, a_pair(port=60_000), pair_id=79)
    assert table.scan(0.5).keys() == {keys[0], keys[1], again}
    table.end(2)
    assert table.scan(0.6).keys() == {keys[0], keys[1], again}
    table.write(2, a_pair(port=60_000), pair_id=80)
    assert table.scan(0.7)[again].pair.ends.client.port == 60_000
    table.end(2)  # the record that stood still is the pair again, in a second at most
    table.scan(0.8)
    assert table.scan(0.8 + MOVING_S).keys() == {keys[0], keys[1], again}
    table.end(3)
    assert table.scan(2.0).keys() == {keys[0], keys[1]}
    for index in (0, 1):
        table.end(index)
    assert not table.scan(10.0)
    assert not table.own.ids([*keys, again], [*keys, again])


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("wemht")), max_size=40))
def test_a_scan_finds_what_a_scan_of_all_would_find(steps: list[tuple[int, str]]) -> None:
    """Whatever happens between scans, one a second later has all that a new reader has."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        table = Table(monkeypatch)
        for number, (index, step) in enumerate(steps):
            match step:
                case "w":
                    table.write(index, a_pair(port=1000 + 8 * number), pair_id=number + 10)
                case "e":
                    table.end(index)
                case "m":
                    table.move(index, number)
                case "h":
                    table.half_end(index)
                case _:
                    table.open_tail(index, is_open=bool(number % 2))
            if number % 3:
                table.scan(float(number))
        found = {key: own.pair.up for key, own in table.scan(1000.0).items()}
        new = table.another_reader(monkeypatch).scan(1000.0).own
        assert found == {key: own.pair.up for key, own in new.items()}


def test_only_what_others_know_of_is_theirs_to_go_on_with(table: Table) -> None:
    keys = [table.write(index, a_pair(port=1000 + 4 * index)) for index in range(3)]
    table.scan(0.0)
    assert table.own.ids([], []) == set()
    known = [keys[0], keys[2], "another's"]
    assert table.own.ids(known, known) == {1, 3}
    table.write(2, a_pair(port=1008), pair_id=77)
    table.scan(0.1)
    assert table.own.ids(known, []) == {1, 77}
    again = table.write(1, a_pair(port=1008), pair_id=78)  # the same ports, as the later one
    table.scan(0.2)
    assert again == keys[2]
    assert table.own.ids(known, []) == {1, 77, 78}
    table.end(0)
    table.scan(0.3)
    assert table.own.ids([], known) == set()


@pytest.mark.parametrize("worker", [0, 1, HELD & 0xFF, NO_WORKER & 0xFF])
@pytest.mark.parametrize("before", [HELD, NO_WORKER])
def test_it_is_told_of_from_the_moment_at_which_a_worker_has_it(
    table: Table, before: int, worker: int
) -> None:
    """Not one that the kernel has opened, and that most likely ends within a second."""
    key = table.write(0, a_pair(), worker=before)
    for n in range(3):
        table.move(0, n)
        assert not table.scan(float(n))
    assert not table.own.ids([key], [key])
    table.give(0, worker)
    assert table.scan(3.0).keys() == {key}
    # Its place has another connection, as young.
    table.write(0, a_pair(port=60_000), pair_id=77, worker=NO_WORKER)
    assert not table.scan(3.1)
