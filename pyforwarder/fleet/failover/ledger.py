"""What a machine writes into the store of its pairs, and what it does about those of others.

Pure: it is told what the kernel has and what the store has, and says what is to be done. It keeps
no queue: what could not be written is what differs the next time, so a store that is down for a
while costs no memory, and is whole again after one turn. A turn looks at those pairs only of which
something has changed, here or in the store, or that are due: the others cost nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pyforwarder.fleet.failover.record import (
    SCHEMA,
    Entry,
    Half,
    Pair,
    RecordFault,
    has_names,
    text_of,
    told_at_once,
    with_names_of,
)

# Numbers that move are written so often; a half-end is written at once.
MOVING_S: Final = 1.0
# So many pairs that only move are written, or told to the keeper, in one turn: what begins or
# ends meanwhile waits for few of them.
MOVED_AT_ONCE: Final = 256
# What could not be held may be possible a moment later (the port was still our own).
RETRY_S: Final = 5.0
# Entries of all machines, in the store.
MOST_ENTRIES: Final = 100_000


class Own(NamedTuple):
    """A pair that goes through this machine now, or that the store has of this machine."""

    claim: int  # with which it was taken over; 1: it began here
    packed: bytes  # `Pair.pack`

    @property
    def pair(self) -> Pair:
        """The pair, read."""
        return Pair.unpack(self.packed)


class Scan(NamedTuple):
    """The pairs that go through this machine now, by key."""

    own: Mapping[str, Own]
    changed: Collection[str]  # the keys that are new, have another value, or are gone since before


@dataclass(slots=True)
class Turn:
    """What is to be done now, in this order; what has begun or ended comes first of each."""

    puts: dict[str, Own] = field(default_factory=dict)  # by key; see `Ledger.text`
    deletes: list[str] = field(default_factory=list)
    hold: dict[str, str] = field(default_factory=dict)  # pairs of others: key -> Entry.encode()
    release: list[str] = field(default_factory=list)
    moved: dict[str, Pair] = field(default_factory=dict)  # that have another owner by now


class _Line:
    """Keys in the order of a time that each has, which may change."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # the same, and past ones

    def put(self, key: str, at: float) -> None:
        if self._at.get(key) != at:
            self._at[key] = at
            heapq.heappush(self._heap, (at, key))

    def drop(self, key: str) -> None:
        self._at.pop(key, None)

    def take(self, until: float) -> str | None:
        """The first key with a time until then, which leaves; None: there is none."""
        while self._heap and self._heap[0][0] <= until:
            at, key = heapq.heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                return key
        return None


class Ledger:
    """Knows the pairs in the store, and decides what this machine does about each."""

    def __init__(self, tag: str) -> None:
        """`tag` is what this machine is called in entries."""
        self._tag = tag
        self._words = f"{SCHEMA} {tag} "
        self._own_words = self._words.encode()
        # What the store has: no key is in both.
        self._mine: dict[str, Own] = {}
        self._theirs: dict[str, tuple[Entry, Pair]] = {}
        self._written_s: dict[str, float] = {}
        self._written_changed: dict[str, None] = {}  # see `take_written`
        self._puts: dict[str, Own] = {}  # of the last turn
        # Pairs that are ours by now, while the store says another machine's.
        self._won_over: dict[str, Own] = {}
        self._held: dict[str, tuple[Entry, Pair]] = {}  # as the keeper was told
        self._told_s: dict[str, float] = {}  # when it was told of those that it holds
        self._refused: dict[str, float] = {}  # when it refused them
        # What the next turn looks at, in this order.
        self._look: dict[str, None] = {}
        self._looks_at_all = False
        # Of ours what has only moved, by when that is due; of others', by when it was told.
        self._moving = _Line()
        self._telling = _Line()
        self._retries = _Line()
        self.faults = 0  # values that are none, or one too many

    @property
    def counts(self) -> tuple[int, int]:
        """How many pairs in the store are this machine's, and how many of others' it holds."""
        return len(self._mine), len(self._held)

    @property
    def written(self) -> Collection[str]:
        """The keys of this machine's pairs that the store has, as it changes."""
        return self._mine.keys()

    def take_written(self) -> Collection[str]:
        """The keys that have come or gone in `written` since the last call; others may be there."""
        changed, self._written_changed = self._written_changed, {}
        return changed

    def text(self, own: Own) -> str:
        """What is written into the store of a pair of this machine's: `Entry.encode`."""
        return f"{self._words}{own.claim} {text_of(own.packed)}"

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """Note all that is in the store."""
        # What is gone is looked at, too.
        self._look.update(dict.fromkeys([*self._mine, *self._theirs]))
        self._written_changed.update(dict.fromkeys(self._mine))
        self._mine.clear()
        self._theirs.clear()
        for key, value in found:
            self._read(key, value)
        self._looks_at_all = True

    def saw(self, key: str, value: bytes | None) -> None:
        """Note that a key of the store has changed, or has gone (None)."""
        if value is None:
            self._remove(key)
        elif key in self._mine and value.startswith(self._own_words):
            return  # our own words; we know of later ones
        else:
            self._read(key, value)
        self._look[key] = None

    def _read(self, key: str, value: bytes) -> None:
        self._remove(key)
        if len(self._mine) + len(self._theirs) >= MOST_ENTRIES:
            self.faults += 1
            return
        try:
            entry, pair = Entry.decode(key, value)
        except RecordFault:
            self.faults += 1
            return
        if entry.owner == self._tag:
            self._mine[key] = Own(entry.claim, pair.pack())
            self._written_changed[key] = None
        else:
            self._theirs[key] = entry, pair

    def _remove(self, key: str) -> None:
        if self._mine.pop(key, None) is not None:
            self._written_changed[key] = None
        self._theirs.pop(key, None)

    def wrote(self, puts: Iterable[str], deletes: Iterable[str], now_s: float) -> None:
        """The store has that now: `puts` are keys of the last turn's, written as it has said."""
        for key in puts:
            self._theirs.pop(key, None)
            if key not in self._mine:
                self._written_changed[key] = None
            self._mine[key] = self._puts[key]
            self._won_over.pop(key, None)
            self._written_s[key] = now_s
            # Until the pair or the store has something new.
            self._look.pop(key, None)
        for key in deletes:
            if self._mine.pop(key, None) is not None:
                self._written_changed[key] = None
            self._written_s.pop(key, None)
            self._won_over.pop(key, None)
            self._look.pop(key, None)
            if self._theirs.pop(key, None) is not None or key in self._refused:
                self._look[key] = None

    def lost_lease(self) -> None:
        """What we had written is gone, or will be: write all of it again."""
        self._look.update(dict.fromkeys(self._mine))
        self._written_changed.update(dict.fromkeys(self._mine))
        self._mine.clear()

    def refused(self, keys: Iterable[str], now_s: float) -> None:
        """The keeper cannot hold these just now."""
        for key in keys:
            self._held.pop(key, None)
            self._told_s.pop(key, None)
            self._refused[key] = now_s
            self._retries.put(key, now_s + RETRY_S)

    def turn(self, scan: Scan, now_s: float, addresses: Callable[[], Collection[bytes]]) -> Turn:
        """What follows from what the kernel has now.

        `addresses` says which ones this host has, of those that move; asked where machines differ.
        """
        turn = Turn()
        self._puts = turn.puts
        own = scan.own
        look, self._look = self._look, {}
        look.update(dict.fromkeys(scan.changed))
        if self._looks_at_all:
            self._looks_at_all = False
            look.update(dict.fromkeys([*own, *self._mine, *self._theirs, *self._held]))
        while (key := self._retries.take(now_s)) is not None:
            look[key] = None
        for key in look:
            mine = own.get(key)
            if mine is not None:
                self._judge_own(turn, key, mine, now_s, addresses)
            elif key in self._mine:
                turn.deletes.append(key)
                self._look[key] = None  # until it is written
            elif (theirs := self._theirs.get(key)) is not None:
                if self._has_ended_here(key, theirs, addresses):
                    turn.deletes.append(key)
                    self._look[key] = None  # until it is written
                else:
                    self._judge_other(turn, key, theirs, now_s)
            else:
                self._refused.pop(key, None)
                self._won_over.pop(key, None)
                self._written_s.pop(key, None)
            if key in self._held and (mine is not None or key not in self._theirs):
                # A pair that was taken over is in `own`: the keeper holds it no more in any case.
                turn.release.append(key)
                del self._held[key], self._told_s[key]
        self._take_moved(turn, own, now_s)
        self._take_telling(turn, own, now_s)
        return turn

    def _take_moved(self, turn: Turn, own: Mapping[str, Own], now_s: float) -> None:
        """Of ours, those that have waited longest; the others are due the next time."""
        left = MOVED_AT_ONCE
        while left and (key := self._moving.take(now_s)) is not None:
            mine, stored = own.get(key), self._mine.get(key)
            if mine is not None and stored is not None:
                put = _with_names(mine, stored)
                if put != stored:
                    self._put(turn, key, put)
                    left -= 1

    def _take_telling(self, turn: Turn, own: Mapping[str, Own], now_s: float) -> None:
        """Of others', those of which the keeper was told nothing for longest, however many move."""
        left = MOVED_AT_ONCE
        while left and (key := self._telling.take(now_s)) is not None:
            theirs, held = self._theirs.get(key), self._held.get(key)
            if theirs is not None and held is not None and key not in own and theirs[0] != held[0]:
                self._hold(turn, key, theirs, now_s)
                left -= 1

    def _judge_own(
        self,
        turn: Turn,
        key: str,
        mine: Own,
        now_s: float,
        addresses: Callable[[], Collection[bytes]],
    ) -> None:
        theirs = self._theirs.get(key)
        if theirs is not None:
            put = self._won(mine, *theirs, addresses)
            if put is None:
                turn.moved[key] = mine.pair
                self._look[key] = None  # until it has gone
                self._won_over.pop(key, None)
            else:
                self._put(turn, key, put)
                self._won_over[key] = put
            return
        stored = self._mine.get(key)
        if stored is None:
            self._put(turn, key, mine)
            return
        put = _with_names(mine, stored)
        if put == stored:
            return
        if (stored.claim, told_at_once(stored.packed)) == (put.claim, told_at_once(put.packed)):
            self._moving.put(key, self._written_s.get(key, 0.0) + MOVING_S)
        else:
            self._put(turn, key, put)

    def _won(
        self, mine: Own, entry: Entry, pair: Pair, addresses: Callable[[], Collection[bytes]]
    ) -> Own | None:
        """What is written in place of another machine's entry; None: the pair is that machine's."""
        my_pair, claim = mine.pair, mine.claim
        is_won = _wins((claim, self._tag), my_pair, (entry.claim, entry.owner), pair)
        if is_won and pair.deltas == my_pair.deltas:
            # The pair was taken over here, and the addresses have gone on before the store knew
            # that,
            # as with a machine that died then: the pair is with them.
            ends = my_pair.ends
            is_won = {ends.listener.ip, ends.source.ip} <= set(addresses())
        if not is_won:
            return None
        if pair.deltas != my_pair.deltas:
            return Own(max(claim, entry.claim), mine.packed)  # the other connection is past
        return _with_names(mine, Own(entry.claim, pair.pack()))

    def _has_ended_here(
        self, key: str, theirs: tuple[Entry, Pair], addresses: Callable[[], Collection[bytes]]
    ) -> bool:
        """Whether another machine's entry is of a pair that has ended here after it was taken over,
        while the store could not be told. To hold it would be to go on with it.
        """
        won = self._won_over.get(key)
        if won is None:
            return False
        if self._won(won, *theirs, addresses) is not None:
            return True
        del self._won_over[key]
        return False

    def _put(self, turn: Turn, key: str, put: Own) -> None:
        turn.puts[key] = put
        self._moving.drop(key)
        self._look[key] = None  # until it is written

    def _judge_other(self, turn: Turn, key: str, theirs: tuple[Entry, Pair], now_s: float) -> None:
        held = self._held.get(key)
        if held is not None and held[0] == theirs[0]:
            return
        refused_s = self._refused.get(key)
        if refused_s is not None and now_s < refused_s + RETRY_S:
            return
        self._refused.pop(key, None)
        if held is not None and _is_only_moved(held, theirs):
            self._telling.put(key, self._told_s[key])
        else:
            self._hold(turn, key, theirs, now_s)

    def _hold(self, turn: Turn, key: str, theirs: tuple[Entry, Pair], now_s: float) -> None:
        turn.hold[key], self._held[key] = theirs[0].encode(), theirs
        self._told_s[key] = now_s
        self._telling.drop(key)


def _is_only_moved(before: tuple[Entry, Pair], now: tuple[Entry, Pair]) -> bool:
    """Whether another machine has written new numbers of a pair, and nothing else."""
    (old, was), (new, pair) = before, now
    return (old.owner, old.claim, _ends(was)) == (new.owner, new.claim, _ends(pair))


def _with_names(mine: Own, known: Own) -> Own:
    """The pair, that no worker has yet, as it was shown before."""
    if has_names(mine.packed):
        return mine
    return Own(mine.claim, with_names_of(known.packed, mine.packed))


def _ends(pair: Pair) -> tuple[object, ...]:
    """What is written at once when it changes."""

    def end(half: Half) -> tuple[int, int]:
        return int(half.fin), half.fin_seq if half.fin else 0

    # A pair of express is known before its worker says of which listener it is.
    return pair.deltas, end(pair.up), end(pair.down), bool(pair.listener_name)


def _wins(mine: tuple[int, str], my_pair: Pair, theirs: tuple[int, str], their_pair: Pair) -> bool:
    """Whether the pair is ours: by the later claim, or as the later connection at these ports."""
    if my_pair.deltas != their_pair.deltas and my_pair.started_s != their_pair.started_s:
        return my_pair.started_s > their_pair.started_s
    return mine > theirs
