"""The tables of a UDP session: walked, and driven at random against a model."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyforwarder.core.connection import UnexpectedEventError
from pyforwarder.core.session import (
    CARRIAGE,
    SESSION,
    Carriage,
    CarriageEvent,
    SessionEvent,
    SessionLife,
    next_carriage,
    next_session_life,
    session_diagram,
)

TABLES: list[tuple[Any, type[enum.IntEnum], Any]] = [
    (SESSION, SessionEvent, next_session_life),
    (CARRIAGE, CarriageEvent, next_carriage),
]


def reached(table: Mapping[Any, Mapping[Any, Any]], start: enum.IntEnum) -> set[enum.IntEnum]:
    """Every state that can be reached, the start included."""
    found, waiting = {start}, [start]
    while waiting:
        new = set(table[waiting.pop()].values()) - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize(("table", "start"), [(SESSION, SessionLife(0)), (CARRIAGE, Carriage(0))])
def test_every_state_has_a_row_and_is_reached(table: Any, start: enum.IntEnum) -> None:
    assert set(table) == set(type(start)) == reached(table, start)


@pytest.mark.parametrize("life", SessionLife)
def test_every_session_can_end(life: SessionLife) -> None:
    assert SessionLife.ENDED in reached(SESSION, life)


@pytest.mark.parametrize("carriage", Carriage)
def test_every_session_can_be_copied_again(carriage: Carriage) -> None:
    assert Carriage.COPIED in reached(CARRIAGE, carriage)
    # It may end at any time.
    assert CARRIAGE[carriage][CarriageEvent.LEFT] in (Carriage.COPIED, Carriage.COUNTING)


def test_only_what_the_kernel_had_is_counted() -> None:
    before = {
        carriage
        for carriage, row in CARRIAGE.items()
        if Carriage.COUNTING in row.values() and carriage is not Carriage.COUNTING
    }
    assert before == {Carriage.KERNEL}


def test_the_keeper_is_asked_for_a_session_that_has_earned_it_and_once() -> None:
    assert [c for c, row in CARRIAGE.items() if CarriageEvent.ASKED in row] == [Carriage.DUE]
    assert [c for c, row in CARRIAGE.items() if Carriage.DUE in row.values()] == [Carriage.EARNING]


@pytest.mark.parametrize(("table", "events", "following"), TABLES)
def test_an_event_without_an_entry_raises(
    table: Mapping[Any, Mapping[Any, Any]], events: type[enum.IntEnum], following: Any
) -> None:
    for state, row in table.items():
        for event in events:
            if event in row:
                assert following(state, event) is row[event]
                continue
            with pytest.raises(UnexpectedEventError, match=f"^{event.name} while {state.name}$"):
                following(state, event)


def test_the_diagram_has_every_transition_once() -> None:
    lines = [line for line in session_diagram().splitlines() if line]
    rows = [(state, row) for table, _, _ in TABLES for state, row in table.items() if row]
    assert len(lines) == len(rows)
    for line, (state, row) in zip(lines, rows, strict=True):
        name, _, arrows = line.partition(":")
        assert name == state.name.lower()
        assert arrows.strip().split(", ") == [
            f"{event.name.lower()} -> {to.name.lower()}" for event, to in row.items()
        ]


class Sessions(RuleBasedStateMachine):
    """One session, as a worker leads it: what it holds in the kernel, and what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.life = SessionLife.CONNECTING
        self.carriage = Carriage.COPIED
        self.asked = self.held = self.uncounted = 0  # by us: requests, records, counts to come
        self.ends = 0  # how often its end was told

    def carry(self, event: CarriageEvent) -> None:
        self.carriage = next_carriage(self.carriage, event)

    def tell_end_if_known(self) -> None:
        if self.life is SessionLife.ENDED and self.carriage is not Carriage.COUNTING:
            self.ends += 1

    @precondition(lambda self: self.life is SessionLife.CONNECTING)
    @rule(is_resumed=st.booleans())
    def gets_a_server(self, is_resumed: bool) -> None:
        self.life = next_session_life(self.life, SessionEvent.CONNECTED)
        if is_resumed:
            self.carry(CarriageEvent.RESUMED)
            self.held += 1

    @precondition(lambda self: self.life is SessionLife.OPEN)
    @rule(data=st.data())
    def goes_on(self, data: st.DataObject) -> None:
        ends = (CarriageEvent.LEFT, CarriageEvent.RELEASED, CarriageEvent.RESUMED)
        possible = sorted(set(CARRIAGE[self.carriage]) - set(ends))
        if not possible:
            return
        event = data.draw(st.sampled_from(possible))
        was_asked = self.carriage is Carriage.ASKED
        self.carry(event)
        if event is CarriageEvent.ASKED:
            self.asked += 1
        elif was_asked:
            self.asked -= 1
        if event is CarriageEvent.TAKEN:
            self.held += 1
        elif event is CarriageEvent.COUNTED:
            self.uncounted -= 1

    def leave(self) -> None:
        """What `SessionHandover.leave` does."""
        self.carry(CarriageEvent.LEFT)
        self.asked = 0
        if self.held:
            self.held, self.uncounted = 0, self.uncounted + 1

    @precondition(lambda self: self.life is SessionLife.OPEN)
    @rule()
    def is_withdrawn(self) -> None:
        self.leave()

    @precondition(lambda self: self.life is not SessionLife.ENDED)
    @rule(is_one_of_many=st.booleans())
    def ends_here(self, is_one_of_many: bool) -> None:
        if is_one_of_many:
            self.leave()  # with the others, and again by itself
        self.life = next_session_life(self.life, SessionEvent.ENDED)
        self.leave()
        self.tell_end_if_known()

    @precondition(
        lambda self: self.life is SessionLife.OPEN and self.carriage is not Carriage.COUNTING
    )
    @rule()
    def is_released(self) -> None:
        self.life = next_session_life(self.life, SessionEvent.RELEASED)
        self.carry(CarriageEvent.RELEASED)
        self.asked = self.held = 0  # the other daemon has it
        self.ends += 1

    @precondition(
        lambda self: self.life is SessionLife.ENDED and self.carriage is Carriage.COUNTING
    )
    @rule()
    def is_counted_after_its_end(self) -> None:
        self.carry(CarriageEvent.COUNTED)
        self.uncounted -= 1
        self.tell_end_if_known()

    @precondition(lambda self: self.life is SessionLife.ENDED)
    @rule(event=st.sampled_from(SessionEvent))
    def nothing_happens_after_the_end(self, event: SessionEvent) -> None:
        with pytest.raises(UnexpectedEventError):
            next_session_life(self.life, event)

    @invariant()
    def what_is_held_is_what_the_carriage_says(self) -> None:
        assert self.asked == (self.carriage is Carriage.ASKED)
        assert self.held == (self.carriage is Carriage.KERNEL)
        assert self.uncounted == (self.carriage is Carriage.COUNTING)

    @invariant()
    def an_end_is_told_once_and_when_all_is_counted(self) -> None:
        is_known = self.life is SessionLife.ENDED and not self.uncounted
        assert self.ends == is_known
        if self.life is SessionLife.ENDED:
            assert not self.asked
            assert not self.held


TestSessions = Sessions.TestCase
