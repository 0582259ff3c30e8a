"""The head of a request as an automaton: a table that a program in the kernel can follow.

A state and the class of a byte give the next state. The program stores for each state where it was
entered last, and how often: the method and the host follow from that.

Source: RFC 9112 sections 2 to 5, as strict as `first_packet/http.py`.
"""

from __future__ import annotations

import enum
import string
from dataclasses import dataclass
from typing import Final

# Powers of two, so that a program can bound an index by a mask.
MOST_STATES: Final = 64
MOST_CLASSES: Final = 32


class State(enum.IntEnum):
    """The position in the head after a byte; the numbers are shared with the BPF program."""

    NO_REQUEST = 0  # from here to READ: the automaton stops
    UNKNOWN = 1  # it may be a request, but its request line has an unusual form
    UNREAD = 2  # a request whose host is unknown
    READ = 3  # the empty line was read, after exactly one Host
    START = 4
    METHOD = 5
    BEFORE_TARGET = 6
    TARGET = 7
    VERSION = 8  # and the eight states behind it: after H T T P / 1 . and a digit
    LINE_FEED = 17  # after the CR of the request line
    LINE = 18  # at the beginning of a header line; after a Host header: + SEEN
    NAME = 19
    H = 20
    HO = 21
    HOS = 22
    HOST_NAME = 23
    BEFORE_VALUE = 24
    VALUE = 25
    BEHIND_VALUE = 26  # after a CR
    BEHIND_HEAD = 27
    BEFORE_HOST = 28
    HOST = 29
    PORT = 30
    BEHIND_HOST = 31


SEEN: Final = 16  # added to the states from LINE to BEHIND_HEAD, which become 34 to 43
LAST_FINAL: Final = State.READ

_METHOD: Final = frozenset((string.ascii_uppercase + "_-").encode())
_TOKEN: Final = frozenset((string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode())
_HOST: Final = frozenset((string.ascii_letters + string.digits + "!$&'()*+,;=%._~-").encode())
_TEXT: Final = frozenset({0x09, *range(0x20, 0x7F), *range(0x80, 0x100)})
_TARGET: Final = frozenset({*range(0x21, 0x7F), *range(0x80, 0x100)})
_BLANK: Final = frozenset(b" \t")
_DIGITS: Final = frozenset(string.digits.encode())


@dataclass(frozen=True, slots=True)
class Automaton:
    """The class of each byte, and by state and class the next state."""

    classes: bytes
    following: tuple[bytes, ...]

    def next(self, state: int, byte: int) -> int:
        """The state after this byte."""
        return self.following[state][self.classes[byte]]


def _edges() -> dict[int, list[tuple[frozenset[int], int]]]:
    """By state: sets of bytes, and the next state for each; the first set with the byte counts."""

    def one(text: str) -> frozenset[int]:
        return frozenset(text.encode())

    edges: dict[int, list[tuple[frozenset[int], int]]] = {
        State.START: [(frozenset(string.ascii_uppercase.encode()), State.METHOD)],
        State.METHOD: [(_METHOD, State.METHOD), (one(" "), State.BEFORE_TARGET)],
        State.BEFORE_TARGET: [(_TARGET, State.TARGET)],
        State.TARGET: [(_TARGET, State.TARGET), (one(" "), State.VERSION)],
    }
    version = [*map(one, "HTTP/1."), _DIGITS, one("\r")]
    for place, wanted in enumerate(version):
        edges[State.VERSION + place] = [(wanted, State.VERSION + place + 1)]
    edges[State.LINE_FEED] = [(one("\n"), State.LINE)]
    for seen in (0, SEEN):
        line, name, value = State.LINE + seen, State.NAME + seen, State.VALUE + seen
        before, behind = State.BEFORE_VALUE + seen, State.BEHIND_VALUE + seen
        head = State.BEHIND_HEAD + seen
        edges[line] = [(one("\r"), head), (one("Hh"), State.H + seen), (_TOKEN, name)]
        edges[name] = [(one(":"), before), (_TOKEN, name)]
        letters = ((State.H, "Oo", State.HO), (State.HO, "Ss", State.HOS))
        for state, letter, following in (*letters, (State.HOS, "Tt", State.HOST_NAME)):
            edges[state + seen] = [
                (one(":"), before),
                (one(letter), following + seen),
                (_TOKEN, name),
            ]
        # With two Host headers the host is ambiguous.
        host = State.UNREAD if seen else State.BEFORE_HOST
        edges[State.HOST_NAME + seen] = [(one(":"), host), (_TOKEN, name)]
        edges[before] = [(_BLANK, before), (one("\r"), behind), (_TEXT, value)]
        edges[value] = [(one("\r"), behind), (_TEXT, value)]
        edges[behind] = [(one("\n"), line)]
        edges[head] = [(one("\n"), State.READ if seen else State.UNREAD)]
    end = (one("\r"), State.BEHIND_VALUE + SEEN)
    edges[State.BEFORE_HOST] = [(_BLANK, State.BEFORE_HOST), (_HOST, State.HOST)]
    edges[State.HOST] = [
        (_HOST, State.HOST),
        (one(":"), State.PORT),
        (_BLANK, State.BEHIND_HOST),
        end,
    ]
    edges[State.PORT] = [(_DIGITS, State.PORT), (_BLANK, State.BEHIND_HOST), end]
    edges[State.BEHIND_HOST] = [(_BLANK, State.BEHIND_HOST), end]
    return edges


def _build() -> Automaton:
    edges = _edges()
    rows = {}
    for state in range(MOST_STATES):
        # An invalid byte in the method means that this is no request. Behind the method, userspace
        # decides about unusual bytes.
        odd = State.NO_REQUEST if state in (State.START, State.METHOD) else State.UNKNOWN
        if state >= State.LINE:
            odd = State.UNREAD
        if state <= LAST_FINAL:
            odd = State(state)
        ways = edges.get(state, [])
        rows[state] = [
            next((to for wanted, to in ways if byte in wanted), odd) for byte in range(256)
        ]
    columns = [tuple(rows[state][byte] for state in range(MOST_STATES)) for byte in range(256)]
    kinds = list(dict.fromkeys(columns))
    assert len(kinds) <= MOST_CLASSES
    classes = bytes(kinds.index(column) for column in columns)
    following = tuple(
        bytes(kind[state] for kind in kinds).ljust(MOST_CLASSES, b"\0")
        for state in range(MOST_STATES)
    )
    return Automaton(classes, following)


AUTOMATON: Final = _build()
