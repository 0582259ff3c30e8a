"""The keeper's part of ends that nobody needs to be told of one by one: their sums alone.

Of a rule whose connections have no lines in the log, `go_round` (bpf/express_connect.c) adds up
what has ended, by the rule, the port of its listener and the server. Each such sum has its worker,
which is told what has come to it since, and counts that as it counts the end of one connection.

A key means the same as long as it is there: of connections that began when its first one did, or
later. It goes before its table or its server may be another.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.numbering import Server
from pyforwarder.datapath.splice.abi import SpliceState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyforwarder.datapath.express.places import Ended
    from pyforwarder.datapath.express.sharing import Express

# In one message, which is taken whole or not at all; and its bytes, of which a worker takes 64 KiB.
_MOST_TOLD: Final = 24
_MOST_BYTES: Final = 1 << 15
# In `since_ns` of a key that is to go: no connection begins so late.
_GOES: Final = 1 << 63


class _Kind(NamedTuple):
    table: int
    rule: int
    target: int
    since_ns: int
    label_since_ns: int  # of its table's
    said: str  # listener, rule, port and server, in JSON


class Counting:
    """One keeper's."""

    def __init__(self, express: Express, workers: int) -> None:
        """Nothing is known of what an earlier keeper has counted before `begin`."""
        self._express = express
        self._connecting = express.connecting
        self._workers = workers
        self._kinds: dict[bytes, _Kind] = {}
        self._going: set[bytes] = set()  # keys to which nothing is added any more
        self._is_told = True
        self._told_of = 0  # ends that were counted when all was told last

    def begin(self) -> None:
        """Go on with what an earlier keeper has counted, and has not told."""
        for key in self._connecting.end_keys():
            ends = self._connecting.ends(key)
            parts = abi.EndKey.from_buffer_copy(key)
            self._kinds[key] = self._kind(parts, int(ends.since_ns) & ~_GOES)
            # What it is of may have changed meanwhile: the next one that ends makes it anew.
            self._go(key)

    @property
    def kinds(self) -> int:
        """How many sums there are."""
        return len(self._kinds)

    @property
    def is_done(self) -> bool:
        """Whether workers know of all that was counted when `tell` was called last."""
        return self._is_told

    def covers(self, ended: Ended) -> bool:
        """Whether the programs count this end, in the next round at the latest."""
        label = self._express.label(ended.ask.listener_table, ended.ask.begun_ns)
        if label.is_logged or ended.ask.rule >= len(label.rules):
            return False
        if ended.record.state != SpliceState.ACTIVE:
            return False  # the programs leave it to us
        if self._connecting.is_counted(ended.ask):
            return False  # an earlier keeper may have told of it alone
        up = ended.record.way[0]
        parts = abi.EndKey(
            ended.ask.listener_table, ended.ask.rule, ended.ask.target, up.from_.dport
        )
        key = bytes(parts)
        known = self._kinds.get(key)
        if known is not None:
            return key not in self._going and ended.ask.begun_ns >= known.since_ns
        server = Server(bytes(up.target), int(up.dport), int(ended.record.family))
        is_known = self._express.number_of(server) == ended.ask.target
        if not is_known or not self._express.is_in_use(ended.ask.listener_table):
            return False  # what is it now may soon be another
        kind = self._kind(parts, int(ended.ask.begun_ns))
        ends = abi.Ends(since_ns=kind.since_ns, round=time.monotonic_ns())
        try:
            self._connecting.count_ends(key, ends)
        except OSError:
            return False  # there is no room
        self._kinds[key] = kind
        return True

    def _kind(self, parts: abi.EndKey, since_ns: int) -> _Kind:
        label = self._express.label(parts.table, since_ns)
        rule = label.rules[parts.rule] if parts.rule < len(label.rules) else "-"
        aimed = self._connecting.aimed(parts.target)
        server = [bytes(aimed.server).hex(), socket.ntohs(aimed.port)]
        said = json.dumps([label.listener, rule, socket.ntohs(parts.port), server])
        return _Kind(
            int(parts.table),
            int(parts.rule),
            int(parts.target),
            since_ns,
            self._express.label_since_ns(parts.table),
            said[1:-1],
        )

    def look(self) -> None:
        """Before a round: nothing more is added to what may soon be another's.

        Raises:
            OSError: the kernel refuses; call it again before the next round.
        """
        tables = {kind.table: kind.label_since_ns for kind in self._kinds.values()}
        old = {
            table
            for table, since_ns in tables.items()
            if not self._express.is_in_use(table) or self._express.label_since_ns(table) != since_ns
        }
        if old:
            self._go_where(lambda kind: kind.table in old)

    def forget(self, targets: Iterable[int]) -> set[int]:
        """Count no more of these servers; those of which a worker has still to be told.

        Raises:
            OSError: the kernel refuses.
        """
        asked = set(targets)
        self._go_where(lambda kind: kind.target in asked)
        return asked & {kind.target for kind in self._kinds.values()}

    def _go_where(self, is_old: Callable[[_Kind], bool]) -> None:
        for key, kind in self._kinds.items():
            if key not in self._going and is_old(kind):
                self._go(key)

    def _go(self, key: bytes) -> None:
        ends = self._connecting.ends(key)
        ends.since_ns |= _GOES
        self._connecting.count_ends(key, ends)
        self._going.add(key)

    def tell(self, counted: int) -> None:
        """Tell workers what has come to the sums; one that is busy is told the next time.

        `counted` is another number if an end may have been counted since: else there is nothing.
        """
        if self._is_told and counted == self._told_of and not self._going:
            return
        self._is_told = False
        unreported: list[list[tuple[bytes, abi.Ends, str]]] = [[] for _ in range(self._workers)]
        for key, kind in list(self._kinds.items()):
            ends = self._connecting.ends(key)
            if ends.pairs:
                text = (
                    f'["{key.hex()}", {ends.round}, {kind.said}'
                    f", [{ends.pairs}, {ends.bytes[0]}, {ends.bytes[1]}]]"
                )
                worker = (kind.table + kind.rule + kind.target) % self._workers
                unreported[worker].append((key, ends, text))
            elif key in self._going:
                self._connecting.count_ends_no_more(key)
                self._going.discard(key)
                del self._kinds[key]
        is_told = [self._tell(worker, ends) for worker, ends in enumerate(unreported)]
        self._is_told, self._told_of = all(is_told), counted

    def _tell(self, worker: int, unreported: list[tuple[bytes, abi.Ends, str]]) -> bool:
        while unreported:
            taken, room = 1, _MOST_BYTES - len(unreported[0][2])
            while taken < min(len(unreported), _MOST_TOLD) and len(unreported[taken][2]) <= room:
                room -= len(unreported[taken][2])
                taken += 1
            texts = ", ".join(text for _, _, text in unreported[:taken])
            message = f'{{"adopt": 0, "of": [], "ended": [], "counted": [{texts}]}}'
            if not self._express.send(worker, message):
                return False
            for key, ends, _ in unreported[:taken]:
                # A keeper that dies in front of this has the next one tell it again: by its round
                # the worker knows it.
                self._connecting.count_ends(
                    key, abi.Ends(since_ns=ends.since_ns, round=ends.round + 1)
                )
            del unreported[:taken]
        return True
