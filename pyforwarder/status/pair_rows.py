"""The pairs of a sample as rows of the page: in an order, filtered, a screen at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import (
    DatapathKind,
    Direction,
    PairRecord,
    PairState,
    unpack_endpoint,
)
from pyforwarder.datapath.ebpf.pair_table import ACTIVE_NS, LAST_NS, PairWindow, read_slot

if TYPE_CHECKING:
    from collections.abc import Callable

# As many rows fit on no screen.
MOST_ROWS: Final = 100
# Orders and filters that are kept for as long as a sample is the newest.
_MOST_ORDERS: Final = 32
STATES: Final = {int(state): state.label for state in PairState}
KINDS: Final = {int(kind): kind.label for kind in DatapathKind}
_UP, _DOWN = Direction.UP, Direction.DOWN


class Pair:
    """A connection as the last sample has it."""

    __slots__ = (
        "_text",
        "client",
        "datapath",
        "down_bytes",
        "down_per_s",
        "id",
        "listener",
        "listener_at",
        "listener_name",
        "rule",
        "rule_at",
        "sequence",
        "server",
        "server_at",
        "slot",
        "source",
        "started_ns",
        "state",
        "up_bytes",
        "up_per_s",
        "upstream_at",
        "window",
    )

    def __init__(self, window: int, slot: int, sequence: int, record: PairRecord) -> None:
        self.window = window
        self.slot = slot
        self.sequence = sequence
        self.id: int = record.id
        self.started_ns: int = record.started_ns
        self.client = unpack_endpoint(record.client)
        self.listener = unpack_endpoint(record.listener)
        self.source = unpack_endpoint(record.source)
        self.server = unpack_endpoint(record.server)
        self.rule = record.rule.decode(errors="replace")
        self.listener_name = record.listener_name.decode(errors="replace")
        self.state = 0
        self.datapath = 0
        self.up_bytes = self.down_bytes = 0
        self.up_per_s = self.down_per_s = 0.0
        # Where it belongs in the plan; None: nowhere.
        self.listener_at: int | None = None
        self.rule_at: int | None = None
        self.upstream_at: int | None = None
        self.server_at: int | None = None
        self._text = ""

    @property
    def per_s(self) -> float:
        """Both directions together."""
        return self.up_per_s + self.down_per_s

    @property
    def bytes(self) -> int:
        """Both directions together."""
        return self.up_bytes + self.down_bytes

    def has(self, words: Sequence[str]) -> bool:
        """Whether every word is in what is shown of it; the words are in lower case."""
        if not self._text:
            said = (self.client, self.listener, self.source, self.server, self.rule)
            self._text = " ".join((str(self.id), *said, self.listener_name)).lower()
        now = f"{self._text} {STATES[self.state]} {KINDS[self.datapath]}"
        return all(word in now for word in words)


# What pairs can be ordered by; those that are no attribute are in `PairRows._order`.
SORTS: Final[Mapping[str, Callable[[Pair], Any]]] = {
    "rate": attrgetter("per_s"),
    "up": attrgetter("up_per_s"),
    "down": attrgetter("down_per_s"),
    "bytes": attrgetter("bytes"),
    "id": attrgetter("id"),
    "client": attrgetter("client"),
    "server": attrgetter("server"),
    "rule": attrgetter("rule"),
    "state": lambda pair: STATES[pair.state],
    "datapath": lambda pair: KINDS[pair.datapath],
    "age": lambda pair: -pair.started_ns,
    "idle": lambda pair: 0,
}


class PairRows:
    """The pairs of the last sample, for those who ask for some of them."""

    def __init__(self, views: Sequence[memoryview], words: Sequence[memoryview]) -> None:
        """The windows of the pair table, as bytes and as words of 64 bits."""
        self._views = views
        self._words = words
        self._pairs: Sequence[Mapping[int, Pair]] = ()
        self._by_id: list[Pair] | None = None
        self._orders: dict[tuple[str, bool, str], list[Pair]] = {}

    def show(self, pairs: Sequence[Mapping[int, Pair]]) -> None:
        """From here on these are the pairs: by slot, for each window."""
        self._pairs = pairs
        self._by_id = None
        self._orders.clear()

    def page(
        self, *, sort: str, rising: bool, filter: str, first: int, count: int, now_ns: int
    ) -> dict[str, Any]:
        """Return at most `MOST_ROWS` rows of the last sample, from place `first` on in this
        order.

        Raises:
            KeyError: there is no such order.
        """
        ordered = self._order(sort, rising, filter)
        rows = ordered[first : first + min(count, MOST_ROWS)]
        return {
            "total": sum(map(len, self._pairs)),
            "shown": len(ordered),
            "first": first,
            "rows": [self._row(pair, now_ns) for pair in rows],
        }

    def pairs_to_order(self, sort: str, rising: bool, filter: str) -> int:
        """How many pairs have to be read for a page of this order; 0: it is there already."""
        known = _order_key(sort, rising, filter) in self._orders
        return 0 if known else sum(map(len, self._pairs))

    def _order(self, sort: str, rising: bool, filter: str) -> list[Pair]:
        key = _order_key(sort, rising, filter)
        words = key[2].split()
        ordered = self._orders.get(key)
        if ordered is None:
            value = self._active_ns if sort == "idle" else SORTS[sort]
            if self._by_id is None:
                every = [pair for pairs in self._pairs for pair in pairs.values()]
                self._by_id = sorted(every, key=SORTS["id"])
            # Equal ones stand in the order of their ids, whichever way round.
            kept = [pair for pair in self._by_id if pair.has(words)] if words else self._by_id
            falls = (not rising) if sort != "idle" else rising  # who was active first is idle most
            ordered = sorted(kept, key=value, reverse=falls)
            if len(self._orders) >= _MOST_ORDERS:
                self._orders.clear()
            self._orders[key] = ordered
        return ordered

    def pair_ids(self, *, listener: str | None = None, rule: str | None = None) -> list[int]:
        """The ids of all pairs of the last sample, of a listener or of one of its rules."""
        return [
            pair.id
            for pairs in self._pairs
            for pair in pairs.values()
            if listener in (None, pair.listener_name) and rule in (None, pair.rule)
        ]

    def _active_ns(self, pair: Pair) -> int:
        words, at = self._words[pair.window], pair.slot * PairWindow.WORDS64
        return max(
            pair.started_ns,
            words[at + ACTIVE_NS],
            words[at + LAST_NS[_UP]],
            words[at + LAST_NS[_DOWN]],
        )

    def _row(self, pair: Pair, now_ns: int) -> dict[str, Any]:
        record = read_slot(self._views[pair.window], pair.slot)
        reason = ""
        if record is not None and record.id == pair.id:
            try:
                reason = PairReason(record.reason).text
            except ValueError:
                reason = "unknown"
        return {
            "id": pair.id,
            "state": STATES[pair.state],
            "datapath": KINDS[pair.datapath],
            "client": pair.client,
            "listener": pair.listener,
            "source": pair.source,
            "server": pair.server,
            "up_bytes": pair.up_bytes,
            "down_bytes": pair.down_bytes,
            "up_per_s": round(pair.up_per_s),
            "down_per_s": round(pair.down_per_s),
            "age_s": round(max(0, now_ns - pair.started_ns) / 1e9),
            "idle_s": round(max(0, now_ns - self._active_ns(pair)) / 1e9),
            "rule": pair.rule,
            "listener_name": pair.listener_name,
            "reason": reason,
        }


def _order_key(sort: str, rising: bool, filter: str) -> tuple[str, bool, str]:
    return sort, rising, " ".join(filter.lower().split())
