"""What a ledger decides, written so that it is easily seen to be right: each turn looks at all.

A model for `pyforwarder.fleet.failover.ledger`, which looks at what has changed alone. It is for
fewer pairs than those tell of in one turn that only move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from pyforwarder.fleet.failover.ledger import MOVING_S, RETRY_S, Own, Turn
from pyforwarder.fleet.failover.record import Entry, Pair, RecordFault


class WholeLedger:
    """Knows the pairs in the store, and decides what this machine does about each."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._stored: dict[str, tuple[Entry, Pair]] = {}
        self._written_s: dict[str, float] = {}
        self._puts: dict[str, Own] = {}
        self._own: Mapping[str, Own] = {}
        # What was written, and for which pair: that is enough until one of both is another.
        self._done: dict[str, tuple[Own, tuple[Entry, Pair]]] = {}
        self._held: dict[str, tuple[Entry, Pair]] = {}
        self._won_over: dict[str, Own] = {}
        self._refused: dict[str, float] = {}

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.written), len(self._held)

    @property
    def written(self) -> set[str]:
        return {key for key, (entry, _) in self._stored.items() if entry.owner == self._tag}

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        self._stored.clear()
        for key, value in found:
            self._read(key, value)

    def saw(self, key: str, value: bytes | None) -> None:
        before = self._stored.get(key)
        words = f"1 {self._tag} ".encode()
        if before and before[0].owner == self._tag and value and value.startswith(words):
            return
        self._stored.pop(key, None)
        if value is not None:
            self._read(key, value)

    def _read(self, key: str, value: bytes) -> None:
        self._stored.pop(key, None)
        with contextlib.suppress(RecordFault):
            self._stored[key] = Entry.decode(key, value)

    def wrote(self, puts: Iterable[str], deletes: Iterable[str], now_s: float) -> None:
        for key in puts:
            own = self._puts[key]
            self._stored[key] = Entry(self._tag, own.claim, own.pair.encode()), own.pair
            self._written_s[key] = now_s
            self._won_over.pop(key, None)
            self._done[key] = self._own[key], self._stored[key]
        for key in deletes:
            self._stored.pop(key, None)
            self._written_s.pop(key, None)
            self._won_over.pop(key, None)

    def lost_lease(self) -> None:
        for key in self.written:
            del self._stored[key]

    def refused(self, keys: Iterable[str], now_s: float) -> None:
        for key in keys:
            self._held.pop(key, None)
            self._refused[key] = now_s

    def turn(self, own: Mapping[str, Own], now_s: float, addresses: Collection[bytes]) -> Turn:
        turn = Turn()
        self._own = own
        for key in self._done.keys() - own.keys():
            del self._done[key]
        for key, mine in own.items():
            done = self._done.get(key)
            if done is not None and done[0] == mine and done[1] is self._stored.get(key):
                continue
            self._judge_own(turn, key, mine, now_s, set(addresses))
        for key, (entry, pair) in self._stored.items():
            if key in own:
                continue
            if entry.owner == self._tag:
                turn.deletes.append(key)
                continue
            won = self._won_over.pop(key, None)
            if won is not None and self._is_won(won.claim, won.pair, (entry, pair), addresses):
                self._won_over[key] = won
                turn.deletes.append(key)
            elif key not in self._held or self._held[key][0] != entry:
                refused_s = self._refused.get(key)
                if refused_s is None or now_s >= refused_s + RETRY_S:
                    self._refused.pop(key, None)
                    turn.hold[key], self._held[key] = entry.encode(), (entry, pair)
        for key in list(self._held):
            known = self._stored.get(key)
            if key in own or known is None or known[0].owner == self._tag:
                turn.release.append(key)
                del self._held[key]
        for key in self._refused.keys() - self._stored.keys():
            del self._refused[key]
        for key in self._written_s.keys() - self._stored.keys() - own.keys():
            del self._written_s[key]
        self._puts = turn.puts
        return turn

    def _judge_own(
        self, turn: Turn, key: str, mine: Own, now_s: float, addresses: set[bytes]
    ) -> None:
        pair, claim = mine.pair, mine.claim
        stored = self._stored.get(key)
        if stored is not None and stored[0].owner != self._tag:
            entry, theirs = stored
            if not self._is_won(claim, pair, stored, addresses):
                turn.moved[key] = pair
                self._won_over.pop(key, None)
                return
            claim = claim if theirs.deltas == pair.deltas else max(claim, entry.claim)
            turn.puts[key] = self._won_over[key] = Own(claim, _with_names(pair, theirs).pack())
            return
        if stored is not None:
            pair = _with_names(pair, stored[1])
        put = Own(claim, pair.pack())
        is_due = now_s >= self._written_s.get(key, 0.0) + MOVING_S
        if (
            stored is None
            or (stored[0].claim, _at_once(stored[1])) != (claim, _at_once(pair))
            or (pair != stored[1] and is_due)
        ):
            turn.puts[key] = put

    def _is_won(
        self, claim: int, pair: Pair, stored: tuple[Entry, Pair], addresses: Collection[bytes]
    ) -> bool:
        entry, theirs = stored
        is_same = theirs.deltas == pair.deltas
        is_won = (claim, self._tag) > (entry.claim, entry.owner)
        if not is_same and theirs.started_s != pair.started_s:
            is_won = pair.started_s > theirs.started_s
        if is_won and is_same:
            is_won = {pair.ends.listener.ip, pair.ends.source.ip} <= set(addresses)
        return is_won


def _with_names(pair: Pair, known: Pair) -> Pair:
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


def _at_once(pair: Pair) -> tuple[object, ...]:
    ends = [(half.fin, half.fin_seq if half.fin else 0) for half in (pair.up, pair.down)]
    return pair.deltas, bool(pair.listener_name), *ends
