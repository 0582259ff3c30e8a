"""The life of a connection as tables: states, events, and the commands each event calls for.

Nothing here knows sockets, clocks or buffers. The worker feeds events and obeys commands; an event
that the table does not have for a state raises. What nothing holds up goes through worker/plain.py,
which does what the rows say without asking for them. Connections that come from another program,
worker or daemon enter the table by events of their own. Two tables, because two things go on at
once:

- the *life* of the connection, from accept to close, and
- the *phase* of each direction, which follows a FIN from one side through to the other.

What users see as STATE is a function of both (`shown_state`). The table of the life in
docs/architecture.md is printed from here, and a test compares the two.
"""

from __future__ import annotations

import enum
from typing import Final


class Life(enum.IntEnum):
    """Where a connection is between accept and close."""

    SNIFFING = 0  # reading the first packet until a rule decides
    CONNECTING = 1  # resolving a name, connecting to a server
    # Not the handover to a datapath of the kernel, which comes later: the word is STATE's.
    HANDOVER = 2  # flushing what came before: ack, PROXY header, first bytes
    JOINED = 3  # bytes flow both ways
    ENDING = 4  # it is to end, and its datapath has to do something for that before
    REFUSING = 5  # the refusal is sent; waiting a moment for the client to close
    CLOSED = 6


class Event(enum.IntEnum):
    """What can happen to a connection as a whole."""

    ROUTED = 0  # a rule named a destination
    REFUSED = 1  # a rule, a policy or a failed connect says no
    SERVER_FAILED = 2  # this server cannot be reached, another may
    CONNECTED = 3
    FLUSHED = 4  # TCP has accepted all that came before the join
    FINISHED = 5  # both directions closed in order, or the refused client has gone
    BROKEN = 6  # a reset, an error or a deadline: cannot be continued correctly
    PUT_OFF = 7  # FINISHED or BROKEN, and comes again when the datapath is ready for it
    GIVEN = 8  # another program has connected both sockets
    ADOPTED = 9  # the pair was joined before: by another worker, another daemon, or the kernel
    RELEASED = 10  # another daemon has the pair from here on: nothing is said to its peers


class Command(enum.IntEnum):
    """What the worker must do next."""

    CONNECT = 0  # choose the first server and connect
    CONNECT_NEXT = 1
    ANSWER = 2  # tell the client why not, half-close, wait for its close
    FLUSH = 3  # write ack, header and first bytes
    JOIN = 4  # start the datapath
    CLOSE = 5  # orderly: FIN has been sent where one was due
    RESET = 6  # both sides, so that nobody takes a cut stream for a whole one


Transition = tuple[Life, tuple[Command, ...]]

_RESET: Final[Transition] = (Life.CLOSED, (Command.RESET,))

LIFE: Final[dict[Life, dict[Event, Transition]]] = {
    Life.SNIFFING: {
        Event.ROUTED: (Life.CONNECTING, (Command.CONNECT,)),
        Event.REFUSED: (Life.REFUSING, (Command.ANSWER,)),
        Event.FINISHED: (Life.CLOSED, (Command.CLOSE,)),
        Event.BROKEN: _RESET,
        Event.GIVEN: (Life.HANDOVER, ()),
        Event.ADOPTED: (Life.JOINED, ()),
    },
    Life.CONNECTING: {
        Event.CONNECTED: (Life.HANDOVER, (Command.FLUSH,)),
        Event.SERVER_FAILED: (Life.CONNECTING, (Command.CONNECT_NEXT,)),
        Event.REFUSED: (Life.REFUSING, (Command.ANSWER,)),
        Event.BROKEN: _RESET,
    },
    Life.HANDOVER: {
        Event.FLUSHED: (Life.JOINED, (Command.JOIN,)),
        Event.BROKEN: _RESET,
    },
    Life.JOINED: {
        Event.FINISHED: (Life.CLOSED, (Command.CLOSE,)),
        Event.BROKEN: _RESET,
        Event.PUT_OFF: (Life.ENDING, ()),
        Event.RELEASED: (Life.CLOSED, ()),
    },
    Life.ENDING: {
        Event.FINISHED: (Life.CLOSED, (Command.CLOSE,)),
        Event.BROKEN: _RESET,
        Event.RELEASED: (Life.CLOSED, ()),
    },
    Life.REFUSING: {
        Event.FINISHED: (Life.CLOSED, (Command.CLOSE,)),
        Event.BROKEN: _RESET,
    },
    Life.CLOSED: {},
}


class Phase(enum.IntEnum):
    """How far one direction has come to its end."""

    OPEN = 0
    FIN_SEEN = 1  # its source has sent FIN; bytes are still on their way to the target
    CLOSED = 2  # the last byte is with the target's TCP, and the FIN behind it


class Step(enum.IntEnum):
    """What can happen to one direction."""

    FIN = 0  # the source will send no more
    DELIVERED = 1  # all it sent is with the target's TCP: time for SHUT_WR
    ENDED = 2  # both at once


PHASES: Final[dict[Phase, dict[Step, Phase]]] = {
    Phase.OPEN: {Step.FIN: Phase.FIN_SEEN, Step.ENDED: Phase.CLOSED},
    Phase.FIN_SEEN: {Step.DELIVERED: Phase.CLOSED},
    Phase.CLOSED: {},
}


class UnexpectedEventError(AssertionError):
    """An event that the table has no entry for: a bug of ours, never a peer's fault."""


def next_life(life: Life, event: Event) -> Transition:
    """The new state and the commands, in order, for a caller that obeys these itself.

    Raises:
        UnexpectedEventError: this event cannot happen in this state.
    """
    try:
        return LIFE[life][event]
    except KeyError:
        raise UnexpectedEventError(f"{event.name} while {life.name}") from None


def next_phase(phase: Phase, step: Step) -> Phase:
    """The direction's new phase.

    Raises:
        UnexpectedEventError: this step cannot happen in this phase.
    """
    try:
        return PHASES[phase][step]
    except KeyError:
        raise UnexpectedEventError(f"{step.name} while {phase.name}") from None


_SHOWN: Final = {
    Life.SNIFFING: "sniffing",
    Life.CONNECTING: "connecting",
    Life.HANDOVER: "handover",
    Life.ENDING: "draining",
    Life.REFUSING: "draining",
    Life.CLOSED: "closed",
}


def shown_state(life: Life, up: Phase, down: Phase) -> str:
    """The word for STATE: a joined pair is `draining` or `half-closed` once a FIN has come."""
    if life is not Life.JOINED:
        return _SHOWN[life]
    if Phase.FIN_SEEN in (up, down):
        return "draining"
    return "half-closed" if Phase.CLOSED in (up, down) else "joined"


def diagram() -> str:
    """The life table as text, one line per state: `sniffing: routed -> connecting, ...`."""
    lines = []
    for life, row in LIFE.items():
        if row:
            arrows = ", ".join(f"{e.name.lower()} -> {t.name.lower()}" for e, (t, _) in row.items())
            lines.append(f"{life.name.lower() + ':':<12}{arrows}")
    return "\n".join(lines)
