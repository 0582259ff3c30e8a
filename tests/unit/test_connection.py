"""The tables of a connection's life: walked, and driven at random against a model."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import pyforwarder
from pyforwarder.core.connection import (
    LIFE,
    PHASES,
    Command,
    Event,
    Life,
    Phase,
    Step,
    UnexpectedEventError,
    diagram,
    next_life,
    next_phase,
    shown_state,
)
from pyforwarder.datapath.ebpf.abi import PairState

PACKAGE = Path(pyforwarder.__file__).parent
STATES = {"life", "phase", "carriage"}
# Who does so, and why.
BESIDE_THE_TABLE = {
    "datapath/base.py": "a direction begins",
    "worker/client.py": "a connection begins",
    "worker/closing.py": "FINISHED and CLOSE in one: nearly every connection ends so",
    "worker/plain.py": "ROUTED, CONNECTED, FLUSHED in one: nothing holds the connection up",
    "worker/udp/session.py": "a session begins",
    "worker/server.py": "BROKEN, after a fault of ours; and ENDED, as often as a connection ends",
}


def lives_from(start: Life) -> set[Life]:
    """Every state that can be reached, the start included."""
    found = {start}
    waiting = [start]
    while waiting:
        for following, _ in LIFE[waiting.pop()].values():
            if following not in found:
                found.add(following)
                waiting.append(following)
    return found


def missing_steps() -> list[tuple[Phase, Step]]:
    return [(phase, step) for phase in Phase for step in Step if step not in PHASES[phase]]


# The life table


def test_every_state_has_a_row() -> None:
    assert set(LIFE) == set(Life)


def test_every_state_is_reached_from_the_first() -> None:
    assert lives_from(Life.SNIFFING) == set(Life)


@pytest.mark.parametrize("life", Life)
def test_every_state_can_reach_closed(life: Life) -> None:
    assert Life.CLOSED in lives_from(life)


@pytest.mark.parametrize("life", [life for life in Life if life is not Life.CLOSED])
def test_every_state_can_break(life: Life) -> None:
    # Resets, deadlines and `flush` come at any time.
    assert LIFE[life][Event.BROKEN] == (Life.CLOSED, (Command.RESET,))


def test_nothing_happens_after_closed() -> None:
    assert LIFE[Life.CLOSED] == {}


def test_every_command_is_given_by_some_transition() -> None:
    given = {
        command for row in LIFE.values() for _, commands in row.values() for command in commands
    }
    assert given == set(Command)


def test_every_event_has_a_place() -> None:
    assert {event for row in LIFE.values() for event in row} == set(Event)


@pytest.mark.parametrize("life", Life)
def test_closing_commands_lead_to_closed_and_nothing_else_does(life: Life) -> None:
    for event, (following, commands) in LIFE[life].items():
        ends = [c for c in commands if c in (Command.CLOSE, Command.RESET)]
        if event is Event.RELEASED:  # its peers are to notice nothing
            assert (following, commands) == (Life.CLOSED, ())
            continue
        assert len(ends) == (1 if following is Life.CLOSED else 0)
        if ends:
            assert commands[-1] is ends[0]


@pytest.mark.parametrize("life", Life)
@pytest.mark.parametrize("event", Event)
def test_next_life_is_the_tables_and_raises_where_it_has_none(life: Life, event: Event) -> None:
    if event in LIFE[life]:
        assert next_life(life, event) == LIFE[life][event]
    else:
        with pytest.raises(UnexpectedEventError, match=f"^{event.name} while {life.name}$"):
            next_life(life, event)


def test_only_what_does_as_the_rows_say_sets_a_state_without_the_table() -> None:
    # A state that is set to a name, and not to what the table answers.
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Attribute) and to.attr in STATES for to in node.targets)
        and isinstance(node.value, ast.Name | ast.Attribute)
    }
    assert found == set(BESIDE_THE_TABLE)


# The phases of a direction


def test_every_phase_has_a_row() -> None:
    assert set(PHASES) == set(Phase)


def test_phases_go_from_open_to_closed_by_way_of_draining() -> None:
    assert next_phase(Phase.OPEN, Step.FIN) is Phase.FIN_SEEN
    assert next_phase(Phase.FIN_SEEN, Step.DELIVERED) is Phase.CLOSED
    assert PHASES[Phase.CLOSED] == {}


@pytest.mark.parametrize(("phase", "step"), missing_steps())
def test_step_without_an_entry_raises(phase: Phase, step: Step) -> None:
    with pytest.raises(UnexpectedEventError, match=f"{step.name} while {phase.name}"):
        next_phase(phase, step)


# What users see


@pytest.mark.parametrize(
    ("up", "down", "shown"),
    [
        (Phase.OPEN, Phase.OPEN, "joined"),
        (Phase.FIN_SEEN, Phase.OPEN, "draining"),
        (Phase.OPEN, Phase.FIN_SEEN, "draining"),
        (Phase.CLOSED, Phase.OPEN, "half-closed"),
        (Phase.OPEN, Phase.CLOSED, "half-closed"),
        (Phase.CLOSED, Phase.FIN_SEEN, "draining"),
        (Phase.FIN_SEEN, Phase.CLOSED, "draining"),
        (Phase.FIN_SEEN, Phase.FIN_SEEN, "draining"),
        (Phase.CLOSED, Phase.CLOSED, "half-closed"),
    ],
)
def test_state_of_a_joined_pair_tells_its_phases(up: Phase, down: Phase, shown: str) -> None:
    assert shown_state(Life.JOINED, up, down) == shown


@pytest.mark.parametrize("life", [life for life in Life if life is not Life.CLOSED])
@pytest.mark.parametrize(("up", "down"), list(itertools.product(Phase, Phase)))
def test_every_shown_state_is_one_that_the_table_can_hold(
    life: Life, up: Phase, down: Phase
) -> None:
    labels = {state.label for state in PairState if state is not PairState.FREE}
    assert shown_state(life, up, down) in labels


def test_diagram_has_every_transition_once() -> None:
    lines = diagram().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        life.name.lower() for life in Life if life is not Life.CLOSED
    ]
    for line in lines:
        name, _, arrows = line.partition(":")
        row = LIFE[Life[name.upper()]]
        assert arrows.strip().split(", ") == [
            f"{event.name.lower()} -> {following.name.lower()}"
            for event, (following, _) in row.items()
        ]


class Connections(RuleBasedStateMachine):
    """Random events, right and wrong ones, at the life and the two phases of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life.SNIFFING
        self.phases = [Phase.OPEN, Phase.OPEN]
        self.done: list[Command] = []
        self.events: list[Event] = []
        self.fins_sent = 0

    @precondition(lambda self: bool(LIFE[self.life]))
    @rule(data=st.data())
    def something_that_can_happen(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(sorted(LIFE[self.life])))
        self.life, commands = next_life(self.life, event)
        self.done += commands
        self.events.append(event)

    @precondition(lambda self: self.life is Life.CLOSED)
    @rule(event=st.sampled_from(Event))
    def anything_at_the_end(self, event: Event) -> None:
        assert event not in LIFE[self.life]

    @precondition(lambda self: self.life is Life.JOINED)
    @rule(direction=st.sampled_from((0, 1)), step=st.sampled_from(Step))
    def direction_goes_on(self, direction: int, step: Step) -> None:
        phase = self.phases[direction]
        possible = {
            Phase.OPEN: (Step.FIN, Step.ENDED),
            Phase.FIN_SEEN: (Step.DELIVERED,),
            Phase.CLOSED: (),
        }
        if step not in possible[phase]:
            with pytest.raises(UnexpectedEventError):
                next_phase(phase, step)
            return
        self.phases[direction] = next_phase(phase, step)
        self.fins_sent += step is not Step.FIN
        if self.phases == [Phase.CLOSED, Phase.CLOSED]:
            self.life, commands = LIFE[self.life][Event.FINISHED]
            self.done += commands

    @invariant()
    def each_command_runs_as_often_as_it_may(self) -> None:
        for command in Command:
            if command is not Command.CONNECT_NEXT:
                assert self.done.count(command) <= 1, command
        ends = self.done.count(Command.CLOSE) + self.done.count(Command.RESET)
        is_others = Event.RELEASED in self.events
        assert ends == (1 if self.life is Life.CLOSED and not is_others else 0)

    @invariant()
    def commands_come_in_the_only_order_that_makes_sense(self) -> None:
        order = [Command.CONNECT, Command.CONNECT_NEXT, Command.FLUSH, Command.JOIN]
        course = [command for command in self.done if command in order]
        assert course == sorted(course, key=order.index)
        if {Event.GIVEN, Event.ADOPTED} & set(self.events):
            # They come with a server, and with nothing to send in front of their own bytes.
            assert self.events[0] in (Event.GIVEN, Event.ADOPTED)
            assert Event.CONNECTED not in self.events
            assert set(course) <= {Command.JOIN}
            return
        if course:
            assert course[0] is Command.CONNECT
        if Command.JOIN in course:
            assert Command.FLUSH in course
        if Command.ANSWER in self.done:
            # A refused client's server was never written to.
            assert not {Command.FLUSH, Command.JOIN} & set(self.done)
        if self.done and {Command.CLOSE, Command.RESET} & set(self.done):
            assert self.done[-1] in (Command.CLOSE, Command.RESET)

    @invariant()
    def each_direction_sends_one_fin_at_most(self) -> None:
        assert self.fins_sent == self.phases.count(Phase.CLOSED)


TestConnections = Connections.TestCase
