"""What a machine writes into the store of its pairs, and what it does about those of others.

Pure: it is told what the kernel has and what the store has, and says what is to be done. It keeps
no queue: what could not be written is what differs the next time, so a store that is down for a
while costs no memory, and is whole again after one turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from pyforwarder.fleet.failover.record import Entry, Half, Pair, RecordFault

# Numbers that move are written so often; a half-end is written at once.
MOVING_S: Final = 1.0
# What could not be held may be possible a moment later (the port was still our own).
RETRY_S: Final = 5.0
# Of all machines.
MOST_ENTRIES: Final = 100_000


class Own(NamedTuple):
    """A pair that goes through this machine now."""

    claim: int  # with which it was taken over; 0: it began here
    pair: Pair


@dataclass(slots=True)
class Turn:
    """What is to be done now."""

    puts: dict[str, Entry] = field(default_factory=dict)  # by key
    deletes: list[str] = field(default_factory=list)
    hold: dict[str, str] = field(default_factory=dict)  # pairs of others: key -> Entry.encode()
    release: list[str] = field(default_factory=list)
    let_go: dict[str, Pair] = field(default_factory=dict)  # that have another owner by now


class Ledger:
    """Of one machine."""

    def __init__(self, tag: str) -> None:
        """`tag` is what this machine is called in entries."""
        self._tag = tag
        self._stored: dict[str, tuple[Entry, Pair]] = {}
        self._written_s: dict[str, float] = {}
        self._held: dict[str, str] = {}  # as the keeper was told
        self._refused: dict[str, float] = {}  # when it refused them
        self.faults = 0  # values that are none, or one too many

    @property
    def counts(self) -> tuple[int, int]:
        """How many pairs in the store are this machine's, and how many of others' it holds."""
        own = sum(entry.owner == self._tag for entry, _ in self._stored.values())
        return own, len(self._held)

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """All that is in the store."""
        self._stored.clear()
        for key, value in found:
            self._read(key, value)

    def saw(self, key: str, value: bytes | None) -> None:
        """One key has changed, or has gone (None)."""
        if value is None:
            self._stored.pop(key, None)
            return
        before = self._stored.get(key)
        self._read(key, value)
        entry = self._stored.get(key)
        if before and entry and entry[0].owner == before[0].owner == self._tag:
            self._stored[key] = before  # our own words; we know of later ones

    def _read(self, key: str, value: bytes) -> None:
        self._stored.pop(key, None)
        if len(self._stored) >= MOST_ENTRIES:
            self.faults += 1
            return
        try:
            self._stored[key] = Entry.decode(key, value)
        except RecordFault:
            self.faults += 1

    def wrote(self, puts: Mapping[str, Entry], deletes: Iterable[str], now_s: float) -> None:
        """The store has that now."""
        for key, entry in puts.items():
            self._stored[key] = entry, Pair.decode(entry.data)
            self._written_s[key] = now_s
        for key in deletes:
            self._stored.pop(key, None)
            self._written_s.pop(key, None)

    def lost_lease(self) -> None:
        """What we had written is gone, or will be: write all of it again."""
        for key, (entry, _) in list(self._stored.items()):
            if entry.owner == self._tag:
                del self._stored[key]

    def refused(self, keys: Iterable[str], now_s: float) -> None:
        """The keeper cannot hold these just now."""
        for key in keys:
            self._held.pop(key, None)
            self._refused[key] = now_s

    def turn(self, own: Mapping[str, Own], now_s: float) -> Turn:
        """What follows from what the kernel has now."""
        turn = Turn()
        for key, mine in own.items():
            self._look_at_own(turn, key, mine, now_s)
        for key, (entry, _) in self._stored.items():
            if entry.owner == self._tag:
                if key not in own:
                    turn.deletes.append(key)
            elif key not in own:
                self._look_at_other(turn, key, entry, now_s)
        for key in self._held:
            stored = self._stored.get(key)
            if key in own or stored is None or stored[0].owner == self._tag:
                turn.release.append(key)
        # One that was taken over is in `own`: the keeper holds it no more, whatever we say.
        for key in turn.release:
            del self._held[key]
        for key in self._refused.keys() - self._stored.keys():
            del self._refused[key]
        return turn

    def _look_at_own(self, turn: Turn, key: str, mine: Own, now_s: float) -> None:
        claim = max(1, mine.claim)
        stored = self._stored.get(key)
        if stored is not None and stored[0].owner != self._tag:
            entry, pair = stored
            if not _wins((claim, self._tag), mine.pair, (entry.claim, entry.owner), pair):
                turn.let_go[key] = mine.pair
                return
            if pair.deltas != mine.pair.deltas:
                claim = max(claim, entry.claim)  # of a connection that is past
            else:
                mine = mine._replace(pair=_with_names(mine.pair, pair))
            stored = None
        elif stored is not None:
            mine = mine._replace(pair=_with_names(mine.pair, stored[1]))
        entry = Entry(self._tag, claim, mine.pair.encode())
        if stored is not None and entry == stored[0]:
            return
        if (
            stored is None
            or stored[0].claim != claim
            or _ends(stored[1]) != _ends(mine.pair)
            or now_s >= self._written_s.get(key, 0.0) + MOVING_S
        ):
            turn.puts[key] = entry

    def _look_at_other(self, turn: Turn, key: str, entry: Entry, now_s: float) -> None:
        text = entry.encode()
        if self._held.get(key) == text:
            return
        refused_s = self._refused.get(key)
        if refused_s is not None and now_s < refused_s + RETRY_S:
            return
        self._refused.pop(key, None)
        turn.hold[key] = self._held[key] = text


def _with_names(pair: Pair, known: Pair) -> Pair:
    """The pair, that no worker has yet, as it was shown before."""
    if pair.listener_name or pair.deltas != known.deltas:
        return pair
    return replace(
        pair,
        started_s=known.started_s,
        rule=known.rule,
        listener_name=known.listener_name,
        up=replace(pair.up, carried_bytes=known.up.carried_bytes),
        down=replace(pair.down, carried_bytes=known.down.carried_bytes),
    )


def _ends(pair: Pair) -> tuple[object, ...]:
    """What is written at once when it changes."""

    def end(half: Half) -> tuple[int, int]:
        return int(half.fin), half.fin_seq if half.fin else 0

    return pair.deltas, end(pair.up), end(pair.down)


def _wins(mine: tuple[int, str], my_pair: Pair, theirs: tuple[int, str], their_pair: Pair) -> bool:
    """Whether the pair is ours: by the later claim, or as the later connection at these ports."""
    if my_pair.deltas != their_pair.deltas and my_pair.started_s != their_pair.started_s:
        return my_pair.started_s > their_pair.started_s
    return mine > theirs
