"""What two machines write of their pairs, which one holds them, and whose they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final
from weakref import WeakKeyDictionary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyforwarder.fleet.failover.ledger import (
    MOVED_AT_ONCE,
    MOVING_S,
    RETRY_S,
    Ledger,
    Own,
    Scan,
    Turn,
)
from pyforwarder.fleet.failover.record import Entry, Fin, Pair, tag_of
from tests.helpers.failover_records import a_pair
from tests.helpers.whole_ledger import WholeLedger

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
        for key, own in turn.puts.items():
            self.values[key] = ledger.text(own)
        for key in turn.deletes:
            self.values.pop(key, None)
        ledger.wrote(turn.puts, turn.deletes, now_s)
        for each in self.ledgers:
            for key in (*turn.puts, *turn.deletes):
                value = self.values.get(key)
                each.saw(key, value.encode() if value is not None else None)


HERE: Final = [PAIR.ends.listener.ip, PAIR.ends.source.ip]


def turn_of(
    ledger: Ledger, own: Mapping[str, Own], now_s: float, addresses: Collection[bytes] = HERE
) -> Turn:
    """What a machine does that has the addresses."""
    before = _BEFORE.get(ledger, {})
    _BEFORE[ledger] = own
    changed = [key for key in before.keys() | own.keys() if before.get(key) != own.get(key)]
    return ledger.turn(Scan(own, sorted(changed)), now_s, lambda: addresses)


_BEFORE: Final[WeakKeyDictionary[Ledger, Mapping[str, Own]]] = WeakKeyDictionary()


def owned(claim: int, pair: Pair) -> Own:
    """As a scan finds it."""
    return Own(claim, pair.pack())


def moved(pair: Pair, by: int) -> Pair:
    return replace(pair, up=replace(pair.up, last_end=pair.up.last_end + by))


def entry_at(store: Store, key: str = KEY) -> tuple[Entry, Pair]:
    return Entry.decode(key, store.values[key])


def test_a_pair_is_written_when_it_has_begun_and_removed_when_it_has_ended() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    assert entry_at(store) == (Entry(A, 1, PAIR.encode()), PAIR)
    assert a.counts == (1, 0)
    assert turn_of(a, {KEY: owned(1, PAIR)}, 100.0) == Turn()  # nothing has moved
    assert turn_of(a, {}, 100.0) == Turn(deletes=[KEY])


def test_numbers_that_move_are_written_once_a_second() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    assert turn_of(a, {KEY: owned(1, moved(PAIR, 1))}, MOVING_S - 0.01).puts == {}
    turn = turn_of(a, {KEY: owned(1, moved(PAIR, 2))}, MOVING_S)
    assert turn.puts == {KEY: owned(1, moved(PAIR, 2))}


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_half_end_is_written_at_once(way: str) -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    half = replace(PAIR.up, fin=Fin.DUE | Fin.SEEN, fin_seq=9)
    ended = replace(PAIR, up=half) if way == "up" else replace(PAIR, down=half)
    assert list(turn_of(a, {KEY: owned(1, ended)}, 0.01).puts) == [KEY]


def test_what_could_not_be_written_is_written_later_and_takes_no_room() -> None:
    a = Ledger(A)
    for n in range(100):  # the store is down
        turn = turn_of(a, {KEY: owned(1, moved(PAIR, n))}, float(n))
        assert turn.puts == {KEY: owned(1, moved(PAIR, n))}
    assert a.counts == (0, 0)


def test_a_lost_lease_has_everything_written_again() -> None:
    a = Ledger(A)
    store = Store(a)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    a.lost_lease()
    assert list(turn_of(a, {KEY: owned(1, PAIR)}, 0.01).puts) == [KEY]


def test_another_machine_holds_the_pair_as_it_moves_and_lets_go_at_its_end() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    assert turn_of(b, {}, 0.0).hold == {KEY: store.values[KEY]}
    assert turn_of(b, {}, 0.1) == Turn()
    store.apply(a, turn_of(a, {KEY: owned(1, moved(PAIR, 1))}, 2.0), 2.0)
    assert turn_of(b, {}, 2.0).hold == {KEY: store.values[KEY]}
    assert b.counts == (0, 1)
    store.apply(a, turn_of(a, {}, 3.0), 3.0)
    assert turn_of(b, {}, 3.0) == Turn(release=[KEY])
    assert b.counts == (0, 0)


def test_what_could_not_be_held_is_tried_again_later() -> None:
    b = Ledger(B)
    b.saw(KEY, Entry(A, 1, PAIR.encode()).encode().encode())
    assert list(turn_of(b, {}, 0.0).hold) == [KEY]
    b.refused([KEY], 0.0)
    assert turn_of(b, {}, RETRY_S - 0.01) == Turn()
    assert list(turn_of(b, {}, RETRY_S).hold) == [KEY]


def test_a_pair_that_was_taken_over_is_let_go_by_its_machine_before() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    turn_of(b, {}, 0.0)
    # Its keeper has taken it, with the claim that follows.
    taken = turn_of(b, {KEY: owned(2, PAIR)}, 1.0)
    assert taken.release == [KEY]
    store.apply(b, taken, 1.0)
    assert entry_at(store)[0] == Entry(B, 2, PAIR.encode())
    turn = turn_of(a, {KEY: owned(1, moved(PAIR, 5))}, 1.1)
    assert turn == Turn(moved={KEY: moved(PAIR, 5)})
    # And holds it from then on, for the way back.
    assert turn_of(a, {}, 1.2).hold == {KEY: store.values[KEY]}
    store.apply(a, turn_of(a, {KEY: owned(3, PAIR)}, 2.0), 2.0)
    assert entry_at(store)[0].owner == A
    assert turn_of(b, {KEY: owned(2, PAIR)}, 2.1).moved == {KEY: PAIR}


def test_a_pair_that_was_taken_over_and_has_ended_before_the_store_knew_is_not_held_again() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(b, turn_of(b, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    assert list(turn_of(a, {}, 0.0).hold) == [KEY]
    taken = owned(2, moved(PAIR, 5))
    assert turn_of(a, {KEY: taken}, 1.0).puts  # the store is down
    for now_s in (2.0, 3.0):
        assert turn_of(a, {}, now_s) == Turn(deletes=[KEY])
    everything = [(KEY, store.values[KEY].encode())]
    a.saw_all(everything)  # it answers again
    turn = turn_of(a, {}, 4.0)
    assert turn == Turn(deletes=[KEY])
    store.apply(a, turn, 4.0)
    assert store.values == {}
    assert turn_of(a, {}, 5.0) == Turn()


def test_a_pair_that_has_ended_here_as_its_addresses_had_gone_on_is_the_other_machines() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(b, turn_of(b, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    turn_of(a, {}, 0.0)
    assert turn_of(a, {KEY: owned(2, PAIR)}, 1.0).puts
    assert list(turn_of(a, {}, 2.0, addresses=[]).hold) == [KEY]


@pytest.mark.parametrize("addresses", [[], HERE[:1]])
def test_a_pair_that_was_taken_over_goes_on_with_the_addresses(addresses: list[bytes]) -> None:
    """A machine has taken it and died, before the store knew: it comes back, with a later claim.

    Meanwhile the one before has the addresses again, and goes on.
    """
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.0), 0.0)
    assert turn_of(b, {KEY: owned(2, PAIR)}, 1.0, addresses) == Turn(moved={KEY: PAIR})
    assert turn_of(b, {}, 1.1, addresses).hold == {KEY: store.values[KEY]}
    assert turn_of(a, {KEY: owned(1, PAIR)}, 1.1) == Turn()


def test_a_pair_that_no_worker_has_yet_keeps_its_names() -> None:
    b = Ledger(B)
    b.saw(KEY, Entry(A, 1, PAIR.encode()).encode().encode())
    half = replace(PAIR.up, carried_bytes=0)
    bare = replace(PAIR, started_s=1, rule=b"", listener_name=b"", up=half, down=half)
    turn = turn_of(b, {KEY: owned(2, bare)}, 0.0)
    assert turn.puts == {KEY: owned(2, PAIR)}
    b.wrote(turn.puts, [], 0.0)
    assert turn_of(b, {KEY: owned(2, bare)}, 9.0) == Turn()


def test_a_machine_that_had_not_heard_of_it_yet_does_not_win_by_writing_last() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    late = Entry(A, 1, moved(PAIR, 9).encode())
    store.apply(b, turn_of(b, {KEY: owned(2, PAIR)}, 0.0), 0.0)
    b.saw(KEY, late.encode().encode())
    assert turn_of(b, {KEY: owned(2, PAIR)}, 0.1).puts == {KEY: owned(2, PAIR)}


def test_a_new_connection_at_the_same_ports_is_the_later_ones() -> None:
    a = Ledger(A)
    past = replace(PAIR, deltas=OTHER, started_s=PAIR.started_s - 10)
    a.saw(KEY, Entry(B, 7, past.encode()).encode().encode())
    assert turn_of(a, {KEY: owned(1, PAIR)}, 0.0).puts == {KEY: owned(7, PAIR)}
    later = replace(PAIR, deltas=OTHER, started_s=PAIR.started_s + 10)
    a.saw(KEY, Entry(B, 1, later.encode()).encode().encode())
    assert turn_of(a, {KEY: owned(1, PAIR)}, 0.0).moved == {KEY: PAIR}


def test_what_is_no_entry_is_left_out() -> None:
    b = Ledger(B)
    b.saw_all([(KEY, b"?"), ("x", Entry(A, 1, PAIR.encode()).encode().encode())])
    assert turn_of(b, {}, 0.0) == Turn()
    assert b.faults == 2


MANY: Final = {
    pair.key: pair for pair in (a_pair(port=1000 + 4 * n) for n in range(2 * MOVED_AT_ONCE + 10))
}
YOUNG: Final = a_pair(port=60_000)


def all_moved(by: int) -> dict[str, Own]:
    return {key: owned(1, moved(pair, by)) for key, pair in MANY.items()}


def test_what_begins_or_ends_is_written_in_front_of_many_that_move() -> None:
    """Of those some at a time, and each as often as the others."""
    a = Ledger(A)
    store = Store(a)
    store.apply(a, turn_of(a, all_moved(0), 0.0), 0.0)
    assert a.written == MANY.keys()
    ended, *_ = reversed(MANY)
    half = replace(MANY[ended].up, fin=Fin.DUE | Fin.SEEN, fin_seq=9)
    written: list[str] = []
    for now_s in (2.0, 2.1, 2.2):
        own = all_moved(1) | {ended: owned(1, replace(MANY[ended], up=half))}
        if now_s > 2.0:
            own[YOUNG.key] = owned(1, YOUNG)
        turn = turn_of(a, own, now_s)
        first = {2.0: ended, 2.1: YOUNG.key}.get(now_s)
        keys = list(turn.puts)
        if first is not None:
            assert keys.pop(0) == first
        assert len(keys) <= MOVED_AT_ONCE
        written += keys
        store.apply(a, turn, now_s)
    assert sorted(written) == sorted(MANY.keys() - {ended})
    assert turn_of(a, own, 2.3) == Turn()


def test_another_machine_holds_what_has_begun_in_front_of_many_that_have_moved() -> None:
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    store.apply(a, turn_of(a, all_moved(0), 0.0), 0.0)
    assert turn_of(b, {}, 0.0).hold.keys() == MANY.keys()  # none waits for another
    now_s = 2.0
    while (turn := turn_of(a, all_moved(1) | {YOUNG.key: owned(1, YOUNG)}, now_s)) != Turn():
        store.apply(a, turn, now_s)
    first, *others = turn_of(b, {}, now_s).hold
    assert first == YOUNG.key
    assert len(others) == MOVED_AT_ONCE
    told = set(others)
    while hold := turn_of(b, {}, now_s).hold:
        assert len(hold) <= MOVED_AT_ONCE
        assert not told & hold.keys()
        told |= hold.keys()
    assert told == MANY.keys()


def test_the_keeper_is_told_of_all_that_move_however_many_do_all_the_time() -> None:
    b = Ledger(B)
    told: set[str] = set()
    for turn in range(5):
        for key, pair in MANY.items():
            b.saw(key, Entry(A, 1, moved(pair, turn).encode()).encode().encode())
        hold = turn_of(b, {}, float(turn)).hold
        if turn:
            assert len(hold) == MOVED_AT_ONCE
            told |= hold.keys()
    assert told == MANY.keys()


def test_what_has_not_changed_since_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a thousand pairs most are the same in the next turn, a tenth of a second later."""
    a = Ledger(A)
    store = Store(a)
    same = {KEY: owned(1, PAIR)}
    store.apply(a, turn_of(a, same, 0.0), 0.0)
    newer = {KEY: owned(1, moved(PAIR, 1))}
    for own, now_s in ((same, 0.1), (newer, 0.2)):
        assert turn_of(a, own, now_s) == Turn()
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_judge_own", None)
        assert turn_of(a, newer, 0.3) == Turn()
    assert list(turn_of(a, newer, MOVING_S).puts) == [KEY]


def test_a_pair_of_express_is_written_again_as_soon_as_its_worker_names_it() -> None:
    """Its listener and rule would be forgotten if this machine died within a second."""
    a, b = Ledger(A), Ledger(B)
    store = Store(a, b)
    bare = replace(PAIR, rule=b"", listener_name=b"")
    store.apply(a, turn_of(a, {KEY: owned(1, bare)}, 0.0), 0.0)
    turn_of(b, {}, 0.0)
    store.apply(a, turn_of(a, {KEY: owned(1, PAIR)}, 0.1), 0.1)
    assert store.values[KEY] == Entry(A, 1, PAIR.encode()).encode()
    assert turn_of(b, {}, 0.1).hold == {KEY: store.values[KEY]}


def variant(pair: Pair, by: int, **other: Any) -> Pair:
    return replace(moved(pair, by), **other)


FEW: Final = [a_pair(port=1000 + 4 * n) for n in range(2)]
FEW_KEYS: Final = st.sampled_from([pair.key for pair in FEW])
# As one of a few machines may have it: it moves, ends, has no worker yet, is another connection.
VARIANTS: Final = st.builds(
    lambda pair, by, other, claim: owned(claim, variant(pair, by, **other)),
    st.sampled_from(FEW),
    st.integers(0, 2),
    st.sampled_from(
        [
            *({}, {}, {}),
            {"down": replace(PAIR.up, fin=Fin.DUE, fin_seq=9)},
            {"rule": b"", "listener_name": b"", "started_s": 1},
            {"deltas": OTHER, "started_s": 1},
        ]
    ),
    st.integers(1, 2),
)
# What the store says of a pair.
VALUES: Final = st.builds(
    lambda owner, own: Entry(owner, own.claim, own.pair.encode()).encode().encode(),
    st.sampled_from([A, B, B, tag_of("c")]),
    VARIANTS,
)
EVENTS: Final = st.one_of(
    st.tuples(st.just("own"), VARIANTS),
    st.tuples(st.just("store"), VALUES),
    st.tuples(
        st.sampled_from(["own", "ends", "gone", "store?"]),
        FEW_KEYS,
    ).filter(lambda one: one[0] != "own"),
    st.tuples(st.just("all"), st.lists(VALUES, max_size=2)),
    st.tuples(st.sampled_from(["lease", "nothing", "nothing"]), st.none()),
    st.tuples(st.just("addresses"), st.sampled_from([HERE, HERE[:1]])),
)
STEPS: Final = st.tuples(
    EVENTS,
    st.sampled_from([None, 0.0, 0.1, 0.5, MOVING_S, RETRY_S]),  # so long after is a turn, if any
    st.sampled_from(["all", "all", "all", "none", "first", "refused"]),  # what is written then
)


def key_of(value: bytes) -> str:
    """Where that stands in the store."""
    return Pair.decode(value.decode().split()[3]).key


@settings(max_examples=400)
@given(st.lists(STEPS, min_size=3, max_size=25))
def test_what_looks_at_changes_alone_decides_what_a_look_at_all_would(
    steps: list[tuple[tuple[str, Any], float | None, str]],
) -> None:
    """Whatever becomes of pairs, of the store, and of what is written there."""
    ledger, model = Ledger(A), WholeLedger(A)
    own: dict[str, Own] = {}
    addresses = HERE
    named: set[str] = set()
    now_s = 0.0
    for (kind, said), after_s, fate in steps:
        for each in (ledger, model):
            match kind:
                case "own":
                    own = own | {said.pair.key: said}
                case "ends":
                    own = {key: one for key, one in own.items() if key != said}
                case "addresses":
                    addresses = said
                case "store":
                    each.saw(key_of(said), said)
                case "store?":
                    each.saw(said, b"?")
                case "gone":
                    each.saw(said, None)
                case "all":
                    each.saw_all([(key_of(value), value) for value in said])
                case "lease":
                    each.lost_lease()
        if after_s is None:
            continue
        now_s += after_s
        turn = turn_of(ledger, own, now_s, addresses)
        expected = model.turn(own, now_s, addresses)
        for one in (turn, expected):
            one.deletes.sort()
            one.release.sort()
        assert turn == expected
        count = {"none": 0, "first": 1}.get(fate, len(own) + len(turn.deletes))
        for each in (ledger, model):
            each.wrote(sorted(turn.puts)[:count], turn.deletes[:count], now_s)
            if fate == "refused":
                each.refused(turn.hold, now_s)
        assert ledger.counts == model.counts
        for key in ledger.take_written():
            named.discard(key)
            named |= {key} & set(ledger.written)
        assert named == set(ledger.written) == model.written
