"""Writes this machine's spliced pairs into the fleet's store, and tells the keeper of others'.

Runs in a process of its own without privileges, beside the workers: it only reads the maps, and
nobody waits for it. A thread watches the store; the main one looks, decides (`ledger.py`) and
writes. While the store does not answer, pairs go on, and are known to nobody else.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pyforwarder.fleet.exchanges import Exchanges
from pyforwarder.fleet.failover import stays
from pyforwarder.fleet.failover.compaction import Compaction
from pyforwarder.fleet.failover.ledger import MOVED_AT_ONCE, Ledger, Scan, Turn
from pyforwarder.fleet.failover.moves import Asked
from pyforwarder.fleet.failover.stays import EVERY_S, Connection, Stays
from pyforwarder.fleet.store import MOST_IN_ONE, MOST_IN_WRITE, Change, Store, StoreError
from pyforwarder.fleet.watching import UNHEARD, All, Lost, Pause, Watcher

if TYPE_CHECKING:
    from pyforwarder.fleet.echoes import Echoes
    from pyforwarder.fleet.layout import Keys
    from pyforwarder.fleet.supervisor import Supervisor

# The records outlive their machine, so that another can go on with them also if it comes late.
LEASE_S: Final = 600
_RENEW_S: Final = 30.0
_TURN_S: Final = 0.1
# The share of a processor that scans may take: where there are many pairs we scan more seldom.
_SHARE: Final = 0.1
_WRITES_AT_ONCE: Final = 4
_AT_ONCE: Final = 16  # pairs in one request to the keeper
_TOLD_EVERY_S: Final = 1.0

T = TypeVar("T")


class KeeperFault(Exception):
    """The keeper did not answer: the next process begins anew with it."""


class Kernel(Protocol):
    """What the keeper and the maps are to us."""

    def scan(self, now_s: float) -> Scan:
        """The pairs that go through this machine; valid until the next scan."""

    def addresses(self) -> Collection[bytes]:
        """Return the addresses that move and that this host has."""

    def staying(
        self, known: Collection[str], changed: Collection[str]
    ) -> dict[int, list[Connection]]:
        """Connections that nobody could go on with, in groups; call it behind `scan`.

        `known` are the keys of pairs that the store has: of others no machine knows. Keys that have
        come or gone there since the last call are `changed`.
        """

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        """The keeper's answer.

        Raises:
            KeeperFault: there was none.
        """


class Replicator:
    """Looks, decides and writes, for as long as the supervisor lives."""

    def __init__(
        self,
        store: Store,
        watcher: Watcher,
        echoes: Echoes,
        keys: Keys,
        tag: str,
        machine: str,
        kernel: Kernel,
        supervisor: Supervisor,
        *,
        compacts: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`echoes` are the watcher's; `tag` is what this machine is called in entries, `machine`
        says which host it is.

        `compacts`: the store may be made to forget its history.
        """
        self._store = store
        self._watcher = watcher
        self._echoes = echoes
        self._keys = keys
        self._tag = tag
        self._machine = machine
        self._kernel = kernel
        self._supervisor = supervisor
        self._clock = clock
        self._ledger = Ledger(tag)
        self._stays = Stays(tag)
        self._exchanges = Exchanges(supervisor)
        self._stays_s = 0.0  # when they are looked at next
        self._is_known = False  # what is in the store
        self._lease = 0
        self._renew_s = 0.0
        self._write_s = 0.0  # not before
        self._pause = Pause()
        self._said: dict[str, Any] = {}
        self._say_s = 0.0
        self._error = ""
        self._move_key = keys.move(tag)
        self._asked = Asked(store, keys, tag, lambda: self._lease)
        self._compaction = Compaction(store, keys.compaction, tag) if compacts else None
        self._is_asked = False  # to take the addresses
        self._answer: str | None = None  # that is still to be written into the store

    def run(self) -> None:
        """Write and read pairs until the supervisor is gone.

        Raises:
            EOFError, OSError: it is.
            KeeperFault: the keeper does not answer.
        """
        self._kernel.ask("begin")
        self._watcher.start()
        while True:
            started_s, used_s = self._clock(), time.process_time()
            self._turn(started_s)
            took_s, used_s = self._clock() - started_s, time.process_time() - used_s
            # Waiting for the store, or for a processor, is no work.
            message = self._supervisor.wait(max(_TURN_S - took_s, used_s / _SHARE - took_s, 0.01))
            if message is not None:
                self._answer = str(message["moved"])

    def _turn(self, now_s: float) -> None:
        self._take_changes()
        answer = self._kernel.ask("look")
        if answer["waiting"]:
            self._supervisor.send({"waiting": answer["waiting"], "taken": answer["taken"]})
        if self._is_known:
            addresses = functools.cache(self._kernel.addresses)
            turn = self._ledger.turn(self._kernel.scan(now_s), now_s, addresses)
            self._update_keeper(turn, now_s)
            if now_s >= self._write_s:
                try:
                    self._write(turn, now_s)
                    # Behind that: what other machines know by now does not stay.
                    self._write_staying(self._look_at_staying(now_s), now_s)
                    if self._compaction is not None:
                        self._compaction.run_due(now_s, lease=self._lease)
                    self._speak_of_moves()
                except StoreError as error:
                    self._error = str(error)[:500]
                    self._write_s = now_s + self._pause.next_s()
                    self._renew_s = 0.0  # the store is asked, even if there is nothing to write
                else:
                    self._error = ""
                    self._pause.end()
            self._look_at_staying(now_s)
            self._watcher.expect(self._store.written, now_s)
            if self._watcher.is_lost(now_s):
                self._error = UNHEARD
        self._report(now_s)
        unusable = self._ledger.faults + self._stays.faults
        self._exchanges.tell(self._store.answered_s, self._clock(), unusable=unusable)

    def _take_changes(self) -> None:
        """Take what the watching thread has received."""
        for change in self._watcher.changes():
            match change:
                case All(entries=entries):
                    prefix = self._keys.pairs
                    self._ledger.saw_all(
                        (key.removeprefix(prefix), value)
                        for key, value in entries
                        if key.startswith(prefix)
                    )
                    prefix = self._keys.stays
                    self._stays.saw_all(
                        (key.removeprefix(prefix), value)
                        for key, value in entries
                        if key.startswith(prefix)
                    )
                    self._is_asked |= any(key == self._move_key for key, _ in entries)
                    self._is_known = True
                    self._error = ""
                case Change(key=key, value=value) if key.startswith(self._keys.stays):
                    self._stays.saw(key.removeprefix(self._keys.stays), value)
                case Change(key=key, value=value) if not key.startswith(self._keys.pairs):
                    self._is_asked |= key == self._move_key and value is not None
                case Change(key=key, value=value):
                    self._ledger.saw(key.removeprefix(self._keys.pairs), value)
                case Lost(error):
                    self._error = error
                    self._renew_s = 0.0

    def _speak_of_moves(self) -> None:
        """Tell of planned moves, once the keeper knows all that came before.

        Raises:
            StoreError: what we wrote has not come; it is written again.
        """
        is_asked, self._is_asked = self._is_asked, False
        if is_asked:
            by = self._asked.begin()
            if by:
                self._supervisor.send({"move_from": by[:128]})
        if self._answer is not None:
            self._asked.end(self._answer)
            self._answer = None

    def _update_keeper(self, turn: Turn, now_s: float) -> None:
        """Tell the keeper of others' pairs, and of those of ours that are others' by now."""
        for keys in _pieces(turn.release, _AT_ONCE):
            self._kernel.ask("release", keys=keys)
        # Those that cannot be released yet are named again, as the others are, in the next turn.
        for pairs in _pieces(list(turn.moved.values())[:MOVED_AT_ONCE], _AT_ONCE):
            self._kernel.ask("let_go", pairs=[pair.encode() for pair in pairs])
        for some in _pieces(list(turn.hold.items()), _AT_ONCE):
            answer = self._kernel.ask("hold", pairs=[list(one) for one in some])
            self._ledger.refused(answer["refused"], now_s)

    def _look_at_staying(self, now_s: float) -> stays.Turn:
        """What is to be written, if that is due; the keeper is told of others'."""
        if now_s < self._stays_s:
            return stays.Turn()
        self._stays_s = now_s + EVERY_S
        ledger = self._ledger
        staying = self._kernel.staying(ledger.written, ledger.take_written())
        turn = self._stays.turn(staying, now_s)
        for key, text in turn.tell.items():
            self._kernel.ask("stay", group=[key, text])
            self._stays.mark_known(key, text)
        return turn

    def _write(self, turn: Turn, now_s: float) -> None:
        self._keep_lease(now_s)
        # Removals first: what is gone must not be gone on with.
        keys = [*turn.deletes, *turn.puts]
        count = len(turn.deletes)
        prefix, text = self._keys.pairs, self._ledger.text
        for first in range(0, min(len(keys), _WRITES_AT_ONCE * MOST_IN_WRITE), MOST_IN_WRITE):
            some = keys[first : first + MOST_IN_WRITE]
            deletes, puts = some[: max(0, count - first)], some[max(0, count - first) :]
            changes: list[tuple[str, str | None]] = [(prefix + key, None) for key in deletes]
            changes += [(prefix + key, text(turn.puts[key])) for key in puts]
            self._write_in_one(changes)
            self._ledger.wrote(puts, deletes, now_s)

    def _write_in_one(self, changes: Sequence[tuple[str, str | None]]) -> None:
        """Write these keys, of which nothing is read when the watch tells of them.

        Raises:
            StoreError: perhaps they were not written.
        """
        with self._echoes.writing():
            revision = self._store.write(changes, lease=self._lease)
            if revision:
                self._echoes.wrote(revision, [key for key, _ in changes])

    def _write_staying(self, turn: stays.Turn, now_s: float) -> None:
        """What is left over is due the next time."""
        changes: list[tuple[str, str | None]] = [(key, None) for key in turn.deletes]
        changes += turn.puts.items()
        for some in list(_pieces(changes, MOST_IN_ONE))[:_WRITES_AT_ONCE]:
            self._write_in_one([(self._keys.stays + key, value) for key, value in some])
            self._stays.wrote(
                {key: value for key, value in some if value is not None},
                [key for key, value in some if value is None],
                now_s,
            )

    def _keep_lease(self, now_s: float) -> None:
        """Keep a lease, and the name for this machine.

        Raises:
            StoreError: it cannot be had, or the name is another host's.
        """
        if self._lease and now_s < self._renew_s:
            return
        if not self._lease or not self._store.renew(self._lease):
            self._lease = 0
            lease = self._store.grant(LEASE_S)
            key = self._keys.machines + self._tag
            if not self._store.create(key, self._machine, lease=lease):
                found = self._store.get(key)
                if found is not None and found[0] != self._machine.encode():
                    self._store.revoke(lease)
                    raise StoreError("another machine of this fleet has our name (`instance`)")
                self._store.put(key, self._machine, lease=lease)
            self._lease = lease
            self._ledger.lost_lease()
            self._stays.lost_lease()
        self._renew_s = now_s + _RENEW_S

    def _report(self, now_s: float) -> None:
        if now_s < self._say_s or not (self._is_known or self._error):
            return
        own, held = self._ledger.counts
        state = "lost" if self._error else "connected"
        message = {"replicas": state, "error": self._error, "own": own, "held": held}
        if message != self._said:
            self._supervisor.send(message)
            self._said, self._say_s = message, now_s + _TOLD_EVERY_S


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
