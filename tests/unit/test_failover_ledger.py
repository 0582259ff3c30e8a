"""What two machines write of their pairs, who holds them, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from pyforwarder.fleet.failover.ledger import MOVING_S, RETRY_S, Ledger, Own, Turn
from pyforwarder.fleet.failover.record import Entry, Fin, Pair, tag_of
from tests.helpers.failover_records import a_pair

A, B = tag_of("a"), tag_of("b")
PAIR: Final = a_pair()
KEY: Final = PAIR.key
OTHER: Final = PAIR.deltas._replace(up_seq=99)


class Store:
    """Keys and values, and the ledgers that hear of each change."""

    def __init__(self, *ledgers: Ledger) -> None:
        self.values: dict[str, str] = {}
        self.ledgers = ledgers

    def apply(self, ledger: Ledger, turn: Turn, now_s: float) -> None:
        """As a machine writes what its turn says."""
        for key, entry in turn.puts.items():
            self.values[key] = entry.encode()
        for key in turn.deletes:
            self.values.pop(key, None)
        ledger.wrote(turn.puts, turn.deletes, now_s)
        for each in self.ledgers:
            for key in (*turn.puts, *turn.deletes):
                value = self.values.get(key)
                each.saw(key, value.encode() if value is not None else None)


def moved(pair: Pair, by: int) -> Pair:
    return replace(pair, up=replace(pair.up, last_end=pair.up.last_end + by))


def entry_at(store: Store, key: str = KEY) -> tuple[Entry, Pair]:
    return Entry.decode(key, store.values[key])


def test_a_pair_is_written_when_it_has_begun_and_removed_when_it_has_ended() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    assert entry_at(store) == (Entry(A, 1, PAIR.encode()), PAIR)
    assert a.counts == (1, 0)
    assert a.turn({KEY: Own(0, PAIR)}, 100.0) == Turn()  # nothing has moved
    assert a.turn({}, 100.0) == Turn(deletes=[KEY])


def test_numbers_that_move_are_written_once_a_second() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    assert a.turn({KEY: Own(0, moved(PAIR, 1))}, MOVING_S - 0.01).puts == {}
    turn = a.turn({KEY: Own(0, moved(PAIR, 2))}, MOVING_S)
    assert turn.puts == {KEY: Entry(A, 1, moved(PAIR, 2).encode())}


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_half_end_is_written_at_once(way: str) -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    half = replace(PAIR.up, fin=Fin.DUE | Fin.SEEN, fin_seq=9)
    ended = replace(PAIR, up=half) if way == "up" else replace(PAIR, down=half)
    assert list(a.turn({KEY: Own(0, ended)}, 0.01).puts) == [KEY]


def test_what_could_not_be_written_is_written_later_and_takes_no_room() -> None:
    a = Ledger(A)
    for n in range(100):  # the store is down
        turn = a.turn({KEY: Own(0, moved(PAIR, n))}, float(n))
        assert turn.puts == {KEY: Entry(A, 1, moved(PAIR, n).encode())}
    assert a.counts == (0, 0)


def test_a_lost_lease_has_everything_written_again() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    a.lost_lease()
    assert list(a.turn({KEY: Own(0, PAIR)}, 0.01).puts) == [KEY]


def test_another_machine_holds_the_pair_as_it_moves_and_lets_go_at_its_end() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    assert b.turn({}, 0.0).hold == {KEY: store.values[KEY]}
    assert b.turn({}, 0.1) == Turn()
    store.apply(a, a.turn({KEY: Own(0, moved(PAIR, 1))}, 2.0), 2.0)
    assert b.turn({}, 2.0).hold == {KEY: store.values[KEY]}
    assert b.counts == (0, 1)
    store.apply(a, a.turn({}, 3.0), 3.0)
    assert b.turn({}, 3.0) == Turn(release=[KEY])
    assert b.counts == (0, 0)


def test_what_could_not_be_held_is_tried_again_later() -> None:
    b = Ledger(B)
    b.saw(KEY, Entry(A, 1, PAIR.encode()).encode().encode())
    assert list(b.turn({}, 0.0).hold) == [KEY]
    b.refused([KEY], 0.0)
    assert b.turn({}, RETRY_S - 0.01) == Turn()
    assert list(b.turn({}, RETRY_S).hold) == [KEY]


def test_a_pair_that_was_taken_over_is_let_go_by_who_had_it() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, a.turn({KEY: Own(0, PAIR)}, 0.0), 0.0)
    b.turn({}, 0.0)
    # Its keeper has taken it, with the claim that follows.
    taken = b.turn({KEY: Own(2, PAIR)}, 1.0)
    assert taken.release == [KEY]
    store.apply(b, taken, 1.0)
    assert entry_at(store)[0] == Entry(B, 2, PAIR.encode())
    turn = a.turn({KEY: Own(0, moved(PAIR, 5))}, 1.1)
    assert turn == Turn(let_go={KEY: moved(PAIR, 5)})
    # And holds it from then on, for the way back.
    assert a.turn({}, 1.2).hold == {KEY: store.values[KEY]}
    store.apply(a, a.turn({KEY: Own(3, PAIR)}, 2.0), 2.0)
    assert entry_at(store)[0].owner == A
    assert b.turn({KEY: Own(2, PAIR)}, 2.1).let_go == {KEY: PAIR}


def test_a_pair_that_no_worker_has_yet_keeps_its_names() -> None:
    b = Ledger(B)
    b.saw(KEY, Entry(A, 1, PAIR.encode()).encode().encode())
    half = replace(PAIR.up, carried_bytes=0)
    bare = replace(PAIR, started_s=1, rule=b"", listener_name=b"", up=half, down=half)
    turn = b.turn({KEY: Own(2, bare)}, 0.0)
    assert turn.puts == {KEY: Entry(B, 2, PAIR.encode())}
    b.wrote(turn.puts, [], 0.0)
    assert b.turn({KEY: Own(2, bare)}, 9.0) == Turn()


def test_a_machine_that_had_not_heard_of_it_yet_does_not_win_by_writing_last() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    late = Entry(A, 1, moved(PAIR, 9).encode())
    store.apply(b, b.turn({KEY: Own(2, PAIR)}, 0.0), 0.0)
    b.saw(KEY, late.encode().encode())
    assert b.turn({KEY: Own(2, PAIR)}, 0.1).puts == {KEY: Entry(B, 2, PAIR.encode())}


def test_a_new_connection_at_the_same_ports_is_the_later_ones() -> None:
    a = Ledger(A)
    past = replace(PAIR, deltas=OTHER, started_s=PAIR.started_s - 10)
    a.saw(KEY, Entry(B, 7, past.encode()).encode().encode())
    assert a.turn({KEY: Own(0, PAIR)}, 0.0).puts == {KEY: Entry(A, 7, PAIR.encode())}
    later = replace(PAIR, deltas=OTHER, started_s=PAIR.started_s + 10)
    a.saw(KEY, Entry(B, 1, later.encode()).encode().encode())
    assert a.turn({KEY: Own(0, PAIR)}, 0.0).let_go == {KEY: PAIR}


def test_what_is_no_entry_is_left_out() -> None:
    b = Ledger(B)
    b.saw_all([(KEY, b"?"), ("x", Entry(A, 1, PAIR.encode()).encode().encode())])
    assert b.turn({}, 0.0) == Turn()
    assert b.faults == 2
