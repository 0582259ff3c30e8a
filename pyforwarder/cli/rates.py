"""What `top` shows, without the screen: rates from counters, order, filter, what a key does.

Pure: rows and the time are passed in, so a test needs neither a terminal nor a daemon.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.client import PairRow

E = TypeVar("E", bound=enum.Enum)


class PairRate(NamedTuple):
    """One pair and how fast it goes, in bytes per second."""

    row: PairRow
    up_per_s: float
    down_per_s: float

    @property
    def per_s(self) -> float:
        """Both directions together."""
        return self.up_per_s + self.down_per_s


class Meter:
    """Turns counters that are read now and then into rates per second."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[int, int]] = {}
        self._at_s: float | None = None

    def update(self, rows: Sequence[PairRow], *, now_s: float) -> list[PairRate]:
        """The rates since the last call; 0 for all at the first one.

        A pair that is new since then is measured by its own age, so that a short one counts.
        """
        seen: dict[tuple[int, str], tuple[int, int]] = {}
        rates = []
        for row in rows:
            key = row["id"], row["client"]  # an id may come back, for another client
            counters = row["up_bytes"], row["down_bytes"]
            seen[key] = counters
            before = self._before.get(key, (0, 0))
            if self._at_s is None:
                span_s = 0.0
            elif key in self._before:
                span_s = now_s - self._at_s
            else:
                span_s = min(max(row["age_s"], _SHORTEST_S), max(now_s - self._at_s, _SHORTEST_S))
            rates.append(
                PairRate(
                    row,
                    _per_s(counters[0] - before[0], span_s),
                    _per_s(counters[1] - before[1], span_s),
                )
            )
        self._before = seen
        self._at_s = now_s
        return rates


_SHORTEST_S: Final = 0.001


def _per_s(count: int, span_s: float) -> float:
    return max(count, 0) / span_s if span_s > 0 else 0.0


class TotalsMeter:
    """Rates of totals: accepted, closed, bytes."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._at_s: float | None = None

    def update(self, totals: Mapping[str, float], *, now_s: float) -> dict[str, float]:
        """Per second since the last call; 0 for all at the first one and after a restart."""
        span_s = 0.0 if self._at_s is None else now_s - self._at_s
        rates = {
            name: max(value - self._before.get(name, value), 0.0) / span_s if span_s > 0 else 0.0
            for name, value in totals.items()
        }
        self._before = dict(totals)
        self._at_s = now_s
        return rates


class Sort(enum.Enum):
    """What the pairs are ordered by; the largest comes first, unless reversed."""

    RATE = "rate"
    UP = "up"
    DOWN = "down"
    BYTES = "bytes"
    BACKLOG = "backlog"
    AGE = "age"
    IDLE = "idle"
    ID = "id"

    def value_of(self, rate: PairRate) -> float:
        """The number that this order compares."""
        row = rate.row
        match self:
            case Sort.RATE:
                return rate.per_s
            case Sort.UP:
                return rate.up_per_s
            case Sort.DOWN:
                return rate.down_per_s
            case Sort.BYTES:
                return row["up_bytes"] + row["down_bytes"]
            case Sort.BACKLOG:
                return row["backlog_bytes"] or 0
            case Sort.AGE:
                return row["age_s"]
            case Sort.IDLE:
                return row["idle_s"]
            case Sort.ID:
                return row["id"]


class View(enum.Enum):
    """Which table fills the screen."""

    PAIRS = "pairs"
    LISTENERS = "listeners"
    RULES = "rules"
    UPSTREAMS = "upstreams"


class Mode(enum.Enum):
    """What the next key means."""

    BROWSE = "browse"
    FILTER = "filter"  # it is typed into the filter
    CONFIRM = "confirm"  # it says yes or no to flushing the selected pair
    HELP = "help"  # any key leads back


class Quit(NamedTuple):
    """End the screen."""


class Flush(NamedTuple):
    """Reset this pair."""

    pair_id: int


Command = Quit | Flush | None

HELP: Final = (
    ("up down", "select a pair (also k j, page up, page down)"),
    ("s S", "sort by the next, the previous column"),
    ("r", "reverse the order"),
    ("/", "show only pairs that contain a text; enter keeps it, escape drops it"),
    ("x", "reset the selected pair (asks first)"),
    ("tab", "pairs, listeners, rules, upstreams"),
    ("space", "stand still; again: go on"),
    ("q", "quit"),
)


@dataclass(slots=True)
class Browser:
    """Where the user is: order, filter, selection, and what keys do to them."""

    sort: Sort = Sort.RATE
    is_reversed: bool = False
    filter: str = ""
    view: View = View.PAIRS
    mode: Mode = Mode.BROWSE
    is_paused: bool = False
    selected: int | None = None  # a pair's id
    is_chosen: bool = False  # by a key; else it is whichever comes first
    doomed: int | None = None  # the pair that CONFIRM asks about
    rates: Sequence[PairRate] = ()  # what was measured last
    shown: list[PairRate] = field(default_factory=list)  # of them, filtered, in order
    page_rows: int = 10

    def arrange(self, rates: Sequence[PairRate]) -> list[PairRate]:
        """The pairs to show, in order.

        The first one is selected until a key chooses another; that stays selected as long as it
        lives, then its neighbour is.
        """
        self.rates = rates
        position = self._position()
        words = self.filter.lower().split()
        kept = [rate for rate in rates if all(word in _text(rate.row) for word in words)]
        # Equal values stand in the order of their ids, whichever way round: without that the idle
        # pairs, which are most, would change places at every look.
        kept.sort(key=lambda rate: rate.row["id"])
        kept.sort(key=self.sort.value_of, reverse=not self.is_reversed)
        self.shown = kept
        if not self.is_chosen:
            self._select(0)
        elif self._position() is None:
            self._select(position or 0)
        return kept

    def selected_pair(self) -> PairRate | None:
        """The selected pair, if there is any."""
        position = self._position()
        return None if position is None else self.shown[position]

    def first_row(self) -> int:
        """The first of `page_rows` rows to draw so that the selection is among them."""
        position = self._position() or 0
        return max(0, min(position - self.page_rows // 2, len(self.shown) - self.page_rows))

    def press(self, key: str) -> Command:
        """Take one key: a character, or a name as `keyboard.decode` gives it."""
        match self.mode:
            case Mode.FILTER:
                self._type(key)
                return None
            case Mode.CONFIRM:
                self.mode = Mode.BROWSE
                # the pair that was asked about: it may have ended and the selection moved on
                pair_id, self.doomed = self.doomed, None
                return Flush(pair_id) if key in ("y", "Y") and pair_id is not None else None
            case Mode.HELP:
                self.mode = Mode.BROWSE
                return None
            case Mode.BROWSE:
                return self._browse(key)

    def _browse(self, key: str) -> Command:
        match key:
            case "q" | "Q" | "ctrl-c" | "ctrl-d":
                return Quit()
            case "s":
                self.sort = _next(self.sort, 1)
            case "S":
                self.sort = _next(self.sort, -1)
            case "r":
                self.is_reversed = not self.is_reversed
            case "/":
                self.mode = Mode.FILTER
            case "escape":
                self.filter = ""
                self.is_chosen = False
            case "x" if self.selected is not None and self.view is View.PAIRS:
                self.mode, self.doomed = Mode.CONFIRM, self.selected
            case "tab":
                self.view = _next(self.view, 1)
            case " ":
                self.is_paused = not self.is_paused
            case "h" | "?":
                self.mode = Mode.HELP
            case "up" | "k":
                self._choose(-1)
            case "down" | "j":
                self._choose(1)
            case "page-up":
                self._choose(-self.page_rows)
            case "page-down":
                self._choose(self.page_rows)
            case "home" | "g":
                self._choose(-len(self.shown))
            case "end" | "G":
                self._choose(len(self.shown))
        return None

    def _type(self, key: str) -> None:
        match key:
            case "enter":
                self.mode = Mode.BROWSE
            case "escape" | "ctrl-c":
                self.filter = ""
                self.mode = Mode.BROWSE
            case "backspace":
                self.filter = self.filter[:-1]
            case _ if len(key) == 1:
                self.filter += key

    def _position(self) -> int | None:
        for position, rate in enumerate(self.shown):
            if rate.row["id"] == self.selected:
                return position
        return None

    def _choose(self, by: int) -> None:
        self.is_chosen = True
        self._select((self._position() or 0) + by)

    def _select(self, position: int) -> None:
        if not self.shown:
            self.selected = None
            return
        self.selected = self.shown[min(max(position, 0), len(self.shown) - 1)].row["id"]


def _text(row: PairRow) -> str:
    """What the filter looks at."""
    words = (row["state"], row["datapath"], row["client"], row["listener"], row["source"])
    return " ".join([str(row["id"]), *words, row["server"], row["rule"]]).lower()


def _next(member: E, by: int) -> E:
    members = list(type(member))
    return members[(members.index(member) + by) % len(members)]
