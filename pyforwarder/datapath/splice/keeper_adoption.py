"""Spliced pairs whose worker is gone, until another worker has them: the keeper's part.

A pair's worker died, or its whole daemon did, or another machine had it, or express opened it. Such
an orphan goes on in the kernel. It has an owner, the worker that is to adopt it, which asks for it
and is given two sockets: new ones, or those that the worker of the daemon before has sent.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import NO_SLOT, Splice, SpliceState
from pyforwarder.datapath.splice.records import SLOT_AT, WORKER_AT
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    import mmap
    import socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.express.keeping import ExpressKeeper
    from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
    from pyforwarder.datapath.splice.ways import Ways

# Two sockets of the same addresses cannot be. How long the old ones of a pair may be there that has
# no worker (one of the daemon before closes them, or sends them), after what pause each is tried
# again, the more seldom the more there are, and how many are tried for one request.
_IN_USE: Final = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
_IN_USE_S: Final = 60.0
_TRY_AGAIN_S: Final = 0.5
_TRY_EACH_S: Final = 0.0005
_TRIED_AT_ONCE: Final = 16

_Sockets = tuple["socket.socket", "socket.socket"]


class Adoption:
    """Of one keeper."""

    def __init__(
        self,
        pairs: KeeperPairs,
        table: mmap.mmap,
        ways: Ways,
        *,
        workers: int,
        sockets_of: Callable[[int], _Sockets | None],
    ) -> None:
        """`table` is the pair table; `sockets_of` are those that were kept for a pair, if any."""
        self._pairs = pairs
        self._table = table
        self._ways = ways
        self._workers = workers
        self._sockets_of = sockets_of
        self.express: ExpressKeeper | None = None  # is told of its connections that go on
        # Pairs without a worker: index -> what `show` said of them. Each has an owner, too: the
        # worker that is to adopt it.
        self._orphans: dict[int, bytes] = {}
        # The same of those that their owner was given and has no place for yet: if it dies before,
        # they are its successor's.
        self._given: dict[int, bytes] = {}
        # Orphans whose old sockets are still there: when that was seen first, and last.
        self._in_use: dict[int, tuple[float, float]] = {}
        pairs.when_forgotten.append(self._forgotten)

    def is_orphan(self, index: int) -> bool:
        """Whether it waits for a worker that adopts it."""
        return index in self._orphans

    def orphan(self, index: int, said: bytes) -> None:
        """A pair that has an owner waits until that adopts it; `said` is what `show` said of it."""
        self._orphans[index] = said

    def take_in(self, index: int, said: bytes, worker: int | None = None) -> int:
        """It was another machine's, and is a worker's from now on, which is to adopt it."""
        if worker is None:
            worker = index % self._workers
        self._pairs.store(index, WORKER_AT, worker)
        self._pairs.owners[index], self._orphans[index] = worker, said
        self._ways.scan_again()
        return worker

    def worker_died(self, worker: int) -> None:
        """A worker died: its spliced pairs go on, and are its successor's."""
        for index in self._pairs.of(worker):
            record = self._pairs.record(index)
            if record.state == SpliceState.ACTIVE:
                at = record.slot * PAIR_BYTES
                said = self._table[at : at + PAIR_BYTES] if record.slot != NO_SLOT else b""
                # It has no slot, and was not given yet: it is as it was.
                said = self._orphans.get(index, said)
                self._orphans[index] = self._given.pop(index, said)
                self._pairs.store(index, SLOT_AT, NO_SLOT)
                if self.express is not None:
                    self.express.adopted(index, worker, has_it=False)
            else:
                self._pairs.forget(index)

    def adopt(self, worker: int, given: list[socket.socket]) -> dict[str, object]:
        """One pair that has no worker, with two new sockets; {} if there is none left.

        `later`: some are left whose old sockets are still there, with a worker that hands them
        over, or ends. `more`: there may be others that can be had now.
        """
        now_s = time.monotonic()
        for _ in range(_TRIED_AT_ONCE):
            index = next((one for one in self._orphans if self._is_due(one, worker, now_s)), None)
            if index is None:
                is_left = any(self._pairs.owners.get(one) == worker for one in self._orphans)
                return {"later": True} if is_left else {}
            said = self._orphans.pop(index)
            record = self._pairs.record(index)
            try:
                given.extend(self._sockets_of(index) or ())
                if not given:
                    given.extend(splice_sockets.revive(way, record.family) for way in record.way)
                self._pairs.remember_joined(index, given)
            except OSError as error:
                for sock in given:
                    sock.close()
                given.clear()
                first_s, _ = self._in_use.get(index, (now_s, now_s))
                if error.errno in _IN_USE and now_s - first_s < scaled_s(_IN_USE_S):
                    self._orphans[index] = said  # behind all others
                    self._in_use[index] = first_s, now_s
                else:
                    # Nobody could end it any more: it ends now, by the kernel's RST.
                    self._pairs.forget(index)
                continue
            self._in_use.pop(index, None)
            self._given[index] = said
            return {"index": index, "id": record.id, "record": said.hex()}
        return {"more": True}

    def _is_due(self, index: int, worker: int, now_s: float) -> bool:
        """Whether it is the worker's, and has not been tried a moment ago."""
        if self._pairs.owners.get(index) != worker:
            return False
        tried = self._in_use.get(index)
        pause_s = _TRY_AGAIN_S + _TRY_EACH_S * len(self._in_use)
        return tried is None or now_s - tried[1] >= pause_s

    def take_back(self, index: int) -> None:
        """A worker has not got what it was to be given: it is given when it asks again."""
        if index in self._given:
            self._orphans[index] = self._given.pop(index)

    def adopted(self, index: int) -> None:
        """The pair's worker has it, and is not given it again.

        A pair that an earlier keeper gave away is an orphan to this one until the worker says so.
        """
        self._given.pop(index, None)
        self._orphans.pop(index, None)
        self._in_use.pop(index, None)
        if self.express is not None:
            self.express.had(index)

    def take_over(
        self, worker: int, index: int, sockets: Sequence[socket.socket]
    ) -> dict[str, object]:
        """The same of one whose sockets its worker has, from the daemon before.

        {}: it is not the worker's, or these are not its sockets.
        """
        # A worker that has not got the answer asks again.
        is_due = index in self._orphans or index in self._given
        if not is_due or self._pairs.owners[index] != worker:
            return {}
        record, seen = self._pairs.record(index), Splice()
        splice_sockets.describe(seen, *map(splice_sockets.End.of, sockets))
        are_its = all(
            bytes(was.from_) == bytes(now.from_)
            for was, now in zip(record.way, seen.way, strict=True)
        )
        if not are_its or not all(map(splice_sockets.is_of_our_network, sockets)):
            # Not this worker's fault: it hands on what a worker of the daemon before has sent.
            return {}
        self._in_use.pop(index, None)
        said = self._given[index] = self._orphans.pop(index, b"") or self._given.get(index, b"")
        self._pairs.remember_joined(index, sockets)
        return {"index": index, "id": record.id, "record": said.hex()}

    def _forgotten(self, index: int) -> None:
        for each in (self._orphans, self._given, self._in_use):
            each.pop(index, None)
