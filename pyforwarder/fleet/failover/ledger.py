"""What a machine writes into the store of its pairs, and what it does about those of others.

Pure: it is told what the kernel has and what the store has, and says what is to be done. It keeps
no queue: what could not be written is what differs the next time, so a store that is down for a
while costs no memory, and is whole again after one turn.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from pyforwarder.fleet.failover.record import SCHEMA, Entry, Half, Pair, RecordFault

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
    """A pair that goes through this machine now."""

    claim: int  # with which it was taken over; 0: it began here
    pair: Pair


@dataclass(slots=True)
class Turn:
    """What is to be done now, in this order; what has begun or ended comes first of each."""

    puts: dict[str, Entry] = field(default_factory=dict)  # by key
    deletes: list[str] = field(default_factory=list)
    hold: dict[str, str] = field(default_factory=dict)  # pairs of others: key -> Entry.encode()
    release: list[str] = field(default_factory=list)
    moved: dict[str, Pair] = field(default_factory=dict)  # that have another owner by now


class _Done(NamedTuple):
    """What was looked at, and when that is worth another look if it is the very same."""

    mine: Own
    stored: tuple[Entry, Pair]
    until_s: float


class _Put(NamedTuple):
    """What a turn has said to write."""

    mine: Own
    stored: tuple[Entry, Pair]  # what the store has then


class Ledger:
    """Knows the pairs in the store, and decides what this machine does about each."""

    def __init__(self, tag: str) -> None:
        """`tag` is what this machine is called in entries."""
        self._tag = tag
        self._own_words = f"{SCHEMA} {tag} ".encode()
        self._stored: dict[str, tuple[Entry, Pair]] = {}
        self._written_s: dict[str, float] = {}
        self._done: dict[str, _Done] = {}
        self._puts: dict[str, _Put] = {}  # of the last turn
        self._held: dict[str, tuple[Entry, Pair]] = {}  # as the keeper was told
        self._told_s: dict[str, float] = {}  # when it was told of those that it holds
        self._refused: dict[str, float] = {}  # when it refused them
        self.faults = 0  # values that are none, or one too many

    @property
    def counts(self) -> tuple[int, int]:
        """How many pairs in the store are this machine's, and how many of others' it holds."""
        own = sum(entry.owner == self._tag for entry, _ in self._stored.values())
        return own, len(self._held)

    @property
    def written(self) -> set[str]:
        """The keys of this machine's pairs that the store has."""
        return {key for key, (entry, _) in self._stored.items() if entry.owner == self._tag}

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """Note all that is in the store."""
        self._stored.clear()
        for key, value in found:
            self._read(key, value)

    def saw(self, key: str, value: bytes | None) -> None:
        """Note that a key of the store has changed, or has gone (None)."""
        if value is None:
            self._stored.pop(key, None)
            return
        before = self._stored.get(key)
        if before and before[0].owner == self._tag and value.startswith(self._own_words):
            return  # our own words; we know of later ones
        self._read(key, value)

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
        """The store has that now; `puts` are entries of the last turn, as it has returned them."""
        for key, entry in puts.items():
            put = self._puts[key]
            assert put.stored[0] is entry
            self._stored[key] = put.stored
            self._written_s[key] = now_s
            # Until the pair or the store has something new.
            self._done[key] = _Done(put.mine, put.stored, math.inf)
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
            self._told_s.pop(key, None)
            self._refused[key] = now_s

    def turn(
        self, own: Mapping[str, Own], now_s: float, addresses: Callable[[], Collection[bytes]]
    ) -> Turn:
        """What follows from what the kernel has now.

        `addresses` says which ones this host has, of those that move; asked where machines differ.
        """
        turn = Turn()
        moved: dict[str, _Put] = {}
        self._puts = {}
        for key, mine in own.items():
            done = self._done.get(key)
            if (
                done is None
                or done.mine is not mine
                or done.stored is not self._stored.get(key)
                or now_s >= done.until_s
            ):
                self._judge_own(turn, moved, key, mine, now_s, addresses)
        # The pairs that have waited longest; the others are due the next time.
        for key in sorted(moved, key=lambda key: self._written_s.get(key, 0.0))[:MOVED_AT_ONCE]:
            self._put(turn, key, moved[key])
        for key in self._done.keys() - own.keys():
            del self._done[key]
        moved_of_others: list[str] = []
        for key, stored in self._stored.items():
            if stored[0].owner == self._tag:
                if key not in own:
                    turn.deletes.append(key)
            elif key not in own:
                self._judge_other(turn, moved_of_others, key, stored, now_s)
        # The pairs of which the keeper was told nothing for longest, however many move.
        for key in heapq.nsmallest(MOVED_AT_ONCE, moved_of_others, key=self._told_s.__getitem__):
            self._hold(turn, key, self._stored[key], now_s)
        for key in self._held:
            known = self._stored.get(key)
            if key in own or known is None or known[0].owner == self._tag:
                turn.release.append(key)
        # A pair that was taken over is in `own`: the keeper holds it no more in any case.
        for key in turn.release:
            del self._held[key]
            del self._told_s[key]
        for key in self._refused.keys() - self._stored.keys():
            del self._refused[key]
        return turn

    def _judge_own(
        self,
        turn: Turn,
        moved: dict[str, _Put],
        key: str,
        mine: Own,
        now_s: float,
        addresses: Callable[[], Collection[bytes]],
    ) -> None:
        stored = self._stored.get(key)
        read, claim = mine, max(1, mine.claim)
        if stored is not None and stored[0].owner != self._tag:
            entry, pair = stored
            is_won = _wins((claim, self._tag), mine.pair, (entry.claim, entry.owner), pair)
            if is_won and pair.deltas == mine.pair.deltas:
                # The pair was taken over here, and the addresses have gone on before the store knew
                # that,
                # as with a machine that died then: the pair is with them.
                ends = mine.pair.ends
                is_won = {ends.listener.ip, ends.source.ip} <= set(addresses())
            if not is_won:
                turn.moved[key] = mine.pair
                return
            if pair.deltas != mine.pair.deltas:
                claim = max(claim, entry.claim)  # of a connection that is past
            else:
                mine = mine._replace(pair=_with_names(mine.pair, pair))
            stored = None
        elif stored is not None:
            mine = mine._replace(pair=_with_names(mine.pair, stored[1]))
        entry = Entry(self._tag, claim, mine.pair.encode())
        put = _Put(read, (entry, mine.pair))
        if stored is None or (stored[0].claim, _ends(stored[1])) != (claim, _ends(mine.pair)):
            self._put(turn, key, put)
            return
        due_s = self._written_s.get(key, 0.0) + MOVING_S
        if entry == stored[0]:
            due_s = math.inf
        if now_s >= due_s:
            moved[key] = put
        else:
            self._done[key] = _Done(read, stored, due_s)

    def _put(self, turn: Turn, key: str, put: _Put) -> None:
        turn.puts[key] = put.stored[0]
        self._puts[key] = put

    def _judge_other(
        self, turn: Turn, moved: list[str], key: str, stored: tuple[Entry, Pair], now_s: float
    ) -> None:
        held = self._held.get(key)
        if held is not None and held[0] == stored[0]:
            return
        refused_s = self._refused.get(key)
        if refused_s is not None and now_s < refused_s + RETRY_S:
            return
        self._refused.pop(key, None)
        if held is not None and _is_only_moved(held, stored):
            moved.append(key)
        else:
            self._hold(turn, key, stored, now_s)

    def _hold(self, turn: Turn, key: str, stored: tuple[Entry, Pair], now_s: float) -> None:
        turn.hold[key], self._held[key] = stored[0].encode(), stored
        self._told_s[key] = now_s


def _is_only_moved(before: tuple[Entry, Pair], now: tuple[Entry, Pair]) -> bool:
    """Whether another machine has written new numbers of a pair, and nothing else."""
    (old, was), (new, pair) = before, now
    return (old.owner, old.claim, _ends(was)) == (new.owner, new.claim, _ends(pair))


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

    # A pair of express is known before its worker says of which listener it is.
    return pair.deltas, end(pair.up), end(pair.down), bool(pair.listener_name)


def _wins(mine: tuple[int, str], my_pair: Pair, theirs: tuple[int, str], their_pair: Pair) -> bool:
    """Whether the pair is ours: by the later claim, or as the later connection at these ports."""
    if my_pair.deltas != their_pair.deltas and my_pair.started_s != their_pair.started_s:
        return my_pair.started_s > their_pair.started_s
    return mine > theirs
