"""The keeper's part in counting ended connections by sums, instead of reporting each to a worker.

For rules whose connections have no lines in the log, `go_round` (bpf/express_connect.c) adds up the
connections that have ended, by the rule, the port of its listener and the server. Each sum belongs
to a worker. The keeper reports to it what was added since, and the worker counts that as it counts
the end of one connection.

The meaning of a key does not change while it exists: only connections that began when its first one
did, or later, are added. The key is closed before its table's or its server's number may get
another meaning.
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

# Sums in one message, which is sent whole or not at all; and its size, of which a worker receives
# 64 KiB.
_MOST_REPORTED: Final = 24
_MOST_BYTES: Final = 1 << 15
# Set in `since_ns` of a key that is closed: no connection begins so late.
_CLOSED: Final = 1 << 63


class _Kind(NamedTuple):
    table: int
    rule: int
    target: int
    since_ns: int
    label_since_ns: int  # of its table's
    text: str  # listener, rule, port and server, as JSON


class Counting:
    """The sums of one keeper."""

    def __init__(self, express: Express, workers: int) -> None:
        """`begin` takes over what an earlier keeper has counted."""
        self._express = express
        self._connections = express.connections
        self._workers = workers
        self._kinds: dict[bytes, _Kind] = {}
        self._closed: set[bytes] = set()  # closed keys, to which nothing is added any more
        self._is_reported = True
        self._reported_ends = 0  # how many ends were counted when everything was reported last

    def begin(self) -> None:
        """Take over the sums that an earlier keeper has not reported."""
        for key in self._connections.end_keys():
            ends = self._connections.ends(key)
            parts = abi.EndKey.from_buffer_copy(key)
            self._kinds[key] = self._kind(parts, int(ends.since_ns) & ~_CLOSED)
            # Its table or server may have changed meanwhile: the next connection that ends makes a
            # new key.
            self._close(key)

    @property
    def kinds(self) -> int:
        """How many sums there are."""
        return len(self._kinds)

    @property
    def is_done(self) -> bool:
        """Whether everything that was counted at the last call of `report` is reported."""
        return self._is_reported

    def covers(self, ended: Ended) -> bool:
        """Whether the programs add this end to a sum, in the next round at the latest."""
        label = self._express.label(ended.ask.listener_table, ended.ask.begun_ns)
        if label.is_logged or ended.ask.rule >= len(label.rules):
            return False
        if ended.record.state != SpliceState.ACTIVE:
            return False  # the programs leave it to the keeper
        if self._connections.is_counted(ended.ask):
            return False  # an earlier keeper may have reported it by itself
        up = ended.record.direction[0]
        parts = abi.EndKey(
            ended.ask.listener_table, ended.ask.rule, ended.ask.target, up.from_.dport
        )
        key = bytes(parts)
        known = self._kinds.get(key)
        if known is not None:
            return key not in self._closed and ended.ask.begun_ns >= known.since_ns
        server = Server(bytes(up.target), int(up.dport), int(ended.record.family))
        # Whether its upstream has named the source is not in the record.
        numbers = {
            self._express.number_of(one)
            for one in (server, server._replace(source=bytes(up.source)))
        }
        is_known = ended.ask.target in numbers
        if not is_known or not self._express.is_in_use(ended.ask.listener_table):
            return False  # its number may soon get another meaning
        kind = self._kind(parts, int(ended.ask.begun_ns))
        ends = abi.Ends(since_ns=kind.since_ns, round=time.monotonic_ns())
        try:
            self._connections.write_ends(key, ends)
        except OSError:
            return False  # the map is full
        self._kinds[key] = kind
        return True

    def _kind(self, parts: abi.EndKey, since_ns: int) -> _Kind:
        label = self._express.label(parts.table, since_ns)
        rule = label.rules[parts.rule] if parts.rule < len(label.rules) else "-"
        target = self._connections.target(parts.target)
        server = [bytes(target.server).hex(), socket.ntohs(target.port)]
        text = json.dumps([label.listener, rule, socket.ntohs(parts.port), server])
        return _Kind(
            int(parts.table),
            int(parts.rule),
            int(parts.target),
            since_ns,
            self._express.label_since_ns(parts.table),
            text[1:-1],
        )

    def look(self) -> None:
        """Before a round: close the keys whose table's number may soon get another meaning.

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
            self._close_where(lambda kind: kind.table in old)

    def forget(self, targets: Iterable[int]) -> set[int]:
        """Close the keys of these servers; returns those with sums that are not reported yet.

        Raises:
            OSError: the kernel refuses.
        """
        asked = set(targets)
        self._close_where(lambda kind: kind.target in asked)
        return asked & {kind.target for kind in self._kinds.values()}

    def _close_where(self, is_old: Callable[[_Kind], bool]) -> None:
        for key, kind in self._kinds.items():
            if key not in self._closed and is_old(kind):
                self._close(key)

    def _close(self, key: bytes) -> None:
        ends = self._connections.ends(key)
        ends.since_ns |= _CLOSED
        self._connections.write_ends(key, ends)
        self._closed.add(key)

    def report(self, counted: int) -> None:
        """Report to the workers what was added to the sums; to a busy worker at the next call.

        `counted` is the number of ends that were counted so far: if it has not changed, there is
        nothing to report.
        """
        if self._is_reported and counted == self._reported_ends and not self._closed:
            return
        self._is_reported = False
        unreported: list[list[tuple[bytes, abi.Ends, str]]] = [[] for _ in range(self._workers)]
        for key, kind in list(self._kinds.items()):
            ends = self._connections.ends(key)
            if ends.pairs:
                text = (
                    f'["{key.hex()}", {ends.round}, {kind.text}'
                    f", [{ends.pairs}, {ends.bytes[0]}, {ends.bytes[1]}]]"
                )
                worker = (kind.table + kind.rule + kind.target) % self._workers
                unreported[worker].append((key, ends, text))
            elif key in self._closed:
                self._connections.delete_ends(key)
                self._closed.discard(key)
                del self._kinds[key]
        is_reported = [self._report(worker, ends) for worker, ends in enumerate(unreported)]
        self._is_reported, self._reported_ends = all(is_reported), counted

    def _report(self, worker: int, unreported: list[tuple[bytes, abi.Ends, str]]) -> bool:
        while unreported:
            taken, room = 1, _MOST_BYTES - len(unreported[0][2])
            while (
                taken < min(len(unreported), _MOST_REPORTED) and len(unreported[taken][2]) <= room
            ):
                room -= len(unreported[taken][2])
                taken += 1
            texts = ", ".join(text for _, _, text in unreported[:taken])
            message = f'{{"adopt": 0, "of": [], "ended": [], "counted": [{texts}]}}'
            if not self._express.send(worker, message):
                return False
            for key, ends, _ in unreported[:taken]:
                # If the keeper dies before this, the next one reports it again, and the worker
                # recognizes it by its round.
                self._connections.write_ends(
                    key, abi.Ends(since_ns=ends.since_ns, round=ends.round + 1)
                )
            del unreported[:taken]
        return True
