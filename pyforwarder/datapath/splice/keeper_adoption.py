"""Spliced pairs whose worker is gone, until another worker has adopted them: the keeper's part.

A pair's worker has died, or its whole daemon has, or another machine had it, or express opened it.
Such an orphan continues in the kernel. It has an owner, the worker that will adopt it: this worker
asks for it and gets two sockets, either new ones, or those that a worker of the previous daemon has
sent.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import NO_SLOT, Splice, SpliceState
from pyforwarder.datapath.splice.keeper_replies import AdoptReply, AskAgain, Given, NoneLeft
from pyforwarder.datapath.splice.records import LAST_SLOT_AT, SLOT_AT, WORKER_AT, shown_of
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    import mmap
    import socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.express.keeping import ExpressKeeper
    from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
    from pyforwarder.datapath.splice.rerouting import Rerouting

# Two sockets cannot have the same addresses. How long the old ones of a pair without a worker may
# exist (a worker of the previous daemon closes them, or sends them), after what pause each is tried
# again, the more rarely the more there are, and how many are tried for one request.
_IN_USE: Final = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
_IN_USE_S: Final = 60.0
_TRY_AGAIN_S: Final = 0.5
_TRY_EACH_S: Final = 0.0005
_TRIED_AT_ONCE: Final = 16

_Sockets = tuple["socket.socket", "socket.socket"]


class KeeperAdoption:
    """The orphans of one keeper."""

    def __init__(
        self,
        pairs: KeeperPairs,
        table: mmap.mmap,
        rerouting: Rerouting,
        *,
        workers: int,
        sockets_of: Callable[[int], _Sockets | None],
    ) -> None:
        """`table` is the pair table; `sockets_of` gives the sockets that were kept for a pair, if
        any.
        """
        self._pairs = pairs
        self._table = table
        self._rerouting = rerouting
        self._workers = workers
        self._sockets_of = sockets_of
        self.express: ExpressKeeper | None = None  # gets the adoptions of its connections
        # Pairs without a worker: index -> what `show` printed for them. Each has an owner, too: the
        # worker that will adopt it.
        self._orphans: dict[int, bytes] = {}
        # Likewise those that were given to their owner, which has not confirmed it: if it dies
        # before, its successor gets them.
        self._given: dict[int, bytes] = {}
        # Orphans whose old sockets still exist: when that was found first, and last.
        self._in_use: dict[int, tuple[float, float]] = {}
        pairs.when_forgotten.append(self._forgotten)

    def is_orphan(self, index: int) -> bool:
        """Whether a pair waits for a worker to adopt it."""
        return index in self._orphans

    def shown_of(self, index: int, record: Splice) -> bytes:
        """What `show` prints for a pair, or printed before it lost its worker; empty: nothing."""
        waiting = self._orphans.get(index) or self._given.get(index)
        return waiting or shown_of(self._table, record, len(self._table) // PAIR_BYTES)

    def orphan(self, index: int, shown: bytes) -> None:
        """A pair waits for its owner to adopt it; `shown` is what `show` printed for it."""
        self._orphans[index] = shown

    def take_in(self, index: int, shown: bytes, worker: int | None = None) -> int:
        """Give a pair of another machine, or of express, to a worker, which will adopt it; returns
        which one.
        """
        if worker is None:
            worker = index % self._workers
        self._pairs.store(index, WORKER_AT, worker)
        self._pairs.owners[index], self._orphans[index] = worker, shown
        self._rerouting.scan_again()
        return worker

    def worker_died(self, worker: int) -> None:
        """A worker has died: its spliced pairs continue, and go to its successor."""
        for index in self._pairs.of(worker):
            record = self._pairs.record(index)
            if record.state == SpliceState.ACTIVE:
                shown = shown_of(self._table, record, len(self._table) // PAIR_BYTES)
                # Not adopted yet: it has no slot, and is as it was.
                shown = self._orphans.get(index, shown)
                self._orphans[index] = self._given.pop(index, shown)
                if record.slot != NO_SLOT:
                    # For another keeper, which has only the maps.
                    self._pairs.store(index, LAST_SLOT_AT, record.slot)
                self._pairs.store(index, SLOT_AT, NO_SLOT)
                if self.express is not None:
                    self.express.adopted(index, worker, has_it=False)
            else:
                self._pairs.forget(index)

    def adopt(self, worker: int, given: list[socket.socket]) -> AdoptReply:
        """Give a worker one pair that waits for it, with two new sockets.

        `NoneLeft.later`: there are pairs whose old sockets still exist, in a worker that will send
        or close them.
        """
        now_s = time.monotonic()
        for _ in range(_TRIED_AT_ONCE):
            index = next((one for one in self._orphans if self._is_due(one, worker, now_s)), None)
            if index is None:
                is_left = any(self._pairs.owners.get(one) == worker for one in self._orphans)
                return NoneLeft(later=is_left)
            shown = self._orphans.pop(index)
            record = self._pairs.record(index)
            try:
                given.extend(self._sockets_of(index) or ())
                if not given:
                    given.extend(
                        splice_sockets.revive(direction, record.family)
                        for direction in record.direction
                    )
                self._pairs.remember_joined(index, given)
            except OSError as error:
                for sock in given:
                    sock.close()
                given.clear()
                first_s, _ = self._in_use.get(index, (now_s, now_s))
                if error.errno in _IN_USE and now_s - first_s < scaled_s(_IN_USE_S):
                    self._orphans[index] = shown  # at the end of the queue
                    self._in_use[index] = first_s, now_s
                else:
                    # No worker could end it any more: it ends now, by the kernel's RST.
                    self._pairs.forget(index)
                continue
            self._in_use.pop(index, None)
            self._given[index] = shown
            return Given(index, record.id, shown)
        return AskAgain()

    def _is_due(self, index: int, worker: int, now_s: float) -> bool:
        """Whether a pair is the worker's, and was not tried a moment ago."""
        if self._pairs.owners.get(index) != worker:
            return False
        tried = self._in_use.get(index)
        pause_s = _TRY_AGAIN_S + _TRY_EACH_S * len(self._in_use)
        return tried is None or now_s - tried[1] >= pause_s

    def take_back(self, index: int) -> None:
        """A worker did not get a pair that was sent to it: the pair is given when it asks again."""
        if index in self._given:
            self._orphans[index] = self._given.pop(index)

    def adopted(self, index: int) -> None:
        """The pair's worker has adopted it, and does not get it again.

        A pair that an earlier keeper has given away is an orphan to this keeper until the worker
        says so.
        """
        self._given.pop(index, None)
        self._orphans.pop(index, None)
        self._in_use.pop(index, None)
        if self.express is not None:
            self.express.had(index)

    def take_over(self, worker: int, index: int, sockets: Sequence[socket.socket]) -> AdoptReply:
        """Give a worker a pair whose sockets it has got from the previous daemon.

        `NoneLeft`: the pair is not the worker's, or these are not its sockets.
        """
        # A worker that did not get the answer asks again.
        is_due = index in self._orphans or index in self._given
        if not is_due or self._pairs.owners[index] != worker:
            return NoneLeft()
        record, seen = self._pairs.record(index), Splice()
        splice_sockets.describe(seen, *map(splice_sockets.SocketEnd.of, sockets))
        are_its = all(
            bytes(was.from_) == bytes(now.from_)
            for was, now in zip(record.direction, seen.direction, strict=True)
        )
        if not are_its or not all(map(splice_sockets.is_of_our_network, sockets)):
            # Not this worker's fault: it passes on what a worker of the previous daemon has sent.
            return NoneLeft()
        self._in_use.pop(index, None)
        shown = self._given[index] = self._orphans.pop(index, b"") or self._given.get(index, b"")
        self._pairs.remember_joined(index, sockets)
        return Given(index, record.id, shown)

    def _forgotten(self, index: int) -> None:
        for each in (self._orphans, self._given, self._in_use):
            each.pop(index, None)
