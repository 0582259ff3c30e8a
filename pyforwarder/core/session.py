"""The life of a UDP session as tables: whether it has a server, and who carries its datagrams.

Nothing here knows sockets or clocks. An event that a table does not have for a state raises. Two
tables, because two things go on at once:

- the *life* of the session, from its client's first datagram to its end, and
- its *carriage*: datagrams are copied, until the session has earned that the kernel carries them.

Both are printed in docs/architecture.md, from here.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, TypeVar

from pyforwarder.core.connection import UnexpectedEventError

if TYPE_CHECKING:
    from collections.abc import Mapping


class SessionLife(enum.IntEnum):
    """Where a session is between its first datagram and its end."""

    CONNECTING = 0  # it has no server yet: what its client sends waits
    OPEN = 1  # it has a socket to its server
    ENDED = 2


class SessionEvent(enum.IntEnum):
    """What can happen to a session as a whole."""

    CONNECTED = 0  # it has a server, or comes with one from another worker or daemon
    ENDED = 1  # for one of the reasons in core/reasons.py
    RELEASED = 2  # another daemon has it from here on


SESSION: Final[Mapping[SessionLife, Mapping[SessionEvent, SessionLife]]] = {
    SessionLife.CONNECTING: {
        SessionEvent.CONNECTED: SessionLife.OPEN,
        SessionEvent.ENDED: SessionLife.ENDED,
    },
    SessionLife.OPEN: {
        SessionEvent.ENDED: SessionLife.ENDED,
        SessionEvent.RELEASED: SessionLife.ENDED,
    },
    SessionLife.ENDED: {},
}


class Carriage(enum.IntEnum):
    """Who carries the datagrams of a session."""

    COPIED = 0  # we do
    EARNING = 1  # we do, until the session has earned its handover
    DUE = 2  # it has: the keeper is asked in this turn of the loop
    ASKED = 3  # we do, until the keeper has answered
    KERNEL = 4  # the kernel does
    COUNTING = 5  # we do again, or nobody: what the kernel has carried is known in a moment


class CarriageEvent(enum.IntEnum):
    """What can happen to the carriage of a session."""

    MAY_EARN = 0  # its rule lets the kernel have it, and this host can
    MAY_NOT = 1  # this host cannot, as it has turned out
    EARNED = 2
    ASKED = 3  # the keeper is
    TAKEN = 4  # the kernel has it
    DECLINED = 5  # the kernel does not get it
    NOT_NOW = 6  # nor now, as no keeper is there; perhaps later
    RESUMED = 7  # the kernel had it before: it comes from another worker or daemon
    LEFT = 8  # it ends, or is to be copied
    COUNTED = 9  # what the kernel had carried is known
    RELEASED = 10  # another daemon has it from here on, in the kernel or not


CARRIAGE: Final[Mapping[Carriage, Mapping[CarriageEvent, Carriage]]] = {
    Carriage.COPIED: {
        CarriageEvent.MAY_EARN: Carriage.EARNING,
        CarriageEvent.RESUMED: Carriage.KERNEL,
        CarriageEvent.LEFT: Carriage.COPIED,
        CarriageEvent.RELEASED: Carriage.COPIED,
    },
    Carriage.EARNING: {
        CarriageEvent.MAY_EARN: Carriage.EARNING,  # found anew, after a reload
        CarriageEvent.MAY_NOT: Carriage.COPIED,
        CarriageEvent.EARNED: Carriage.DUE,
        CarriageEvent.LEFT: Carriage.COPIED,
        CarriageEvent.RELEASED: Carriage.COPIED,
    },
    Carriage.DUE: {
        CarriageEvent.ASKED: Carriage.ASKED,
        CarriageEvent.DECLINED: Carriage.COPIED,
        CarriageEvent.NOT_NOW: Carriage.EARNING,
        CarriageEvent.LEFT: Carriage.COPIED,
        CarriageEvent.RELEASED: Carriage.COPIED,
    },
    Carriage.ASKED: {
        CarriageEvent.TAKEN: Carriage.KERNEL,
        CarriageEvent.DECLINED: Carriage.COPIED,
        CarriageEvent.NOT_NOW: Carriage.EARNING,
        CarriageEvent.LEFT: Carriage.COPIED,
        CarriageEvent.RELEASED: Carriage.COPIED,
    },
    Carriage.KERNEL: {
        CarriageEvent.LEFT: Carriage.COUNTING,
        CarriageEvent.RELEASED: Carriage.COPIED,
    },
    Carriage.COUNTING: {
        CarriageEvent.LEFT: Carriage.COUNTING,  # it ends while it is counted
        CarriageEvent.COUNTED: Carriage.COPIED,
    },
}

State = TypeVar("State", bound=enum.IntEnum)
Happening = TypeVar("Happening", bound=enum.IntEnum)


def _following(
    table: Mapping[State, Mapping[Happening, State]], state: State, event: Happening
) -> State:
    try:
        return table[state][event]
    except KeyError:
        raise UnexpectedEventError(f"{event.name} while {state.name}") from None


def next_session_life(life: SessionLife, event: SessionEvent) -> SessionLife:
    """The session's new state.

    Raises:
        UnexpectedEventError: this event cannot happen in this state.
    """
    return _following(SESSION, life, event)


def next_carriage(carriage: Carriage, event: CarriageEvent) -> Carriage:
    """Who carries the session's datagrams from here on.

    Raises:
        UnexpectedEventError: this event cannot happen now.
    """
    return _following(CARRIAGE, carriage, event)


def session_diagram() -> str:
    """Both tables as text, one line per state, as `connection.diagram` has them."""
    return "\n".join([*_lines(SESSION), "", *_lines(CARRIAGE)])


def _lines(table: Mapping[State, Mapping[Happening, State]]) -> list[str]:
    return [
        f"{state.name.lower() + ':':<12}"
        + ", ".join(f"{event.name.lower()} -> {to.name.lower()}" for event, to in row.items())
        for state, row in table.items()
        if row
    ]
