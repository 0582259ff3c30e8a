"""Spliced pairs that change hands: from a worker that has died to another, or between daemons."""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice
from pyforwarder.datapath.splice.keeper_replies import (
    AskAgain,
    Given,
    NoneLeft,
    adopt_reply,
    has_failed,
)
from pyforwarder.datapath.splice.spliced import Spliced, SplicedPairs, shown_bytes
from pyforwarder.errors import DatapathError
from pyforwarder.runtime.loop import Timed
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.base import Pair, PairHost
    from pyforwarder.datapath.ebpf.abi import PairRecord
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.keeper_asker import KeeperAsker
    from pyforwarder.datapath.splice.maps import SpliceMaps

# By then the keeper must have confirmed an adoption: until then the pair's idle time is not known.
_ADOPTED_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Orphan:
    """A spliced pair whose worker is gone: sockets in place of the old ones, and its record."""

    index: int
    id: int
    client: socket.socket
    server: socket.socket
    record: PairRecord | None  # what `show` printed for it


def _orphan_of(given: Given, fds: list[int]) -> Orphan:
    """The pair in an answer of the keeper, with the sockets that came with it, which are removed
    from `fds`.

    Raises:
        DatapathError: the process had no descriptor left for one of them.
    """
    if len(fds) != 2:
        raise DatapathError("take in a spliced pair", errno.EMFILE)
    shown = table.inherited(given.record, given.id)
    client, server = (socket.socket(fileno=fds.pop(0)) for _ in range(2))
    return Orphan(given.index, given.id, client, server, shown)


class _Adoption(Timed):
    """The report to the keeper that this worker has adopted a pair, until it has answered."""

    __slots__ = ("_overdue", "pair", "state")

    def __init__(
        self, pair: Pair, state: Spliced, overdue: Callable[[Pair, Spliced], None]
    ) -> None:
        Timed.__init__(self)
        self._overdue = overdue
        self.pair = pair
        self.state = state

    def expired(self) -> None:
        """The keeper has not answered in time."""
        self._overdue(self.pair, self.state)


class AdoptedPairs(SplicedPairs):
    """The spliced pairs of one worker, which may come from another, and go to one."""

    def __init__(
        self,
        host: PairHost,
        maps: SpliceMaps,
        keeper: KeeperAsker,
        *,
        window: PairWindow,
        worker: int,
    ) -> None:
        """See `SplicedPairs`."""
        super().__init__(host, maps, keeper, window=window, worker=worker)
        self.adopts_later = False  # a timer to adopt is set (see `adopt`)

    def adopt(
        self,
        take: Callable[[Orphan], None],
        done: Callable[[], None],
        later: Callable[[], None] = lambda: None,
    ) -> None:
        """Adopt spliced pairs: `take` is called with each that has lost its worker and is this
        worker's now.

        Then `done` is called, once. Both are called by the loop, or while the keeper's answers are
        awaited. Each pair must be given to `resume` or closed; its sockets belong to the callee.
        Before `done`, `later` is called if some pairs cannot be adopted yet, as their old sockets
        still exist: call this again later.
        """

        def answered(answer: dict[str, Any] | None, fds: list[int]) -> None:
            reply = AskAgain() if answer is None else adopt_reply(answer)
            if isinstance(reply, NoneLeft):
                if reply.later:
                    later()
                done()
                return
            if isinstance(reply, Given):
                try:
                    take(_orphan_of(reply, fds))
                except Exception as error:
                    self._loop.on_error(take, error)
                    if reply.index not in self._by_index:
                        self.forget(reply.index, reply.id)  # only this pair is lost
            ask()

        def ask() -> None:
            # After the request about the one before: so that one is not given to this worker again.
            if not self._keeper.ask("adopt", answered):
                done()

        ask()

    @staticmethod
    def peek(pair: Pair) -> tuple[int, list[int], bool]:
        """The pair's index, the bytes that are left to be read in each direction, and whether it is
        mute.

        With the pair's `pending` that is all that another daemon needs.
        """
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        return state.index, state.left_bytes, state.is_mute

    def release(self, pair: Pair) -> None:
        """Release the pair to another daemon; it continues meanwhile."""
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        self._ends.pop(pair, None)
        del self._by_index[state.index]
        pair.datapath_record = None

    def take_over(
        self,
        index: int,
        client: socket.socket,
        server: socket.socket,
        then: Callable[[Orphan | None], None],
    ) -> bool:
        """Continue a pair that another daemon has released, with the sockets that it has sent.

        `then` gets the orphan, or None: the pair no longer exists. The caller keeps the sockets
        until then. False: the keeper cannot be asked at the moment.
        """

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                if not self.take_over(index, client, server, then):
                    then(None)
                return
            reply = adopt_reply(answer)
            if isinstance(reply, Given):
                shown = table.inherited(reply.record, reply.id)
                then(Orphan(index, reply.id, client, server, shown))
            else:
                then(None)

        fds = [client.fileno(), server.fileno()]
        return self._keeper.ask("take_over", answered, fds, index=index)

    def resume(
        self,
        pair: Pair,
        orphan: Orphan,
        *,
        left_bytes: Sequence[int] = (0, 0),
        is_mute: bool = True,
    ) -> None:
        """Continue an orphan as this pair, which has the orphan's sockets and id, and a slot.

        What the orphan has carried is added to the pair's counts. `left_bytes` are still to be
        read, and `pending` to be written; with sockets that are not mute, see `release`.
        """
        words, at = self._window.words64, pair.slot * self._window.WORDS64
        words[at + table.ID] = pair.id
        # From here on the program stores these counts with every packet.
        record = Splice.from_buffer_copy(self._memory, orphan.index * SPLICE_BYTES)
        for direction in Direction:
            words[at + table.REDIRECTED[direction]] = shown_bytes(record.direction[direction])
            words[at + table.REDIRECTED_PACKETS[direction]] = record.direction[direction].packets
        self._take(pair, orphan.index, list(left_bytes), is_mute=is_mute)
        state = pair.datapath_record
        assert isinstance(state, Spliced)
        adoption = _Adoption(pair, state, self._check_adopted)
        self._loop.deadlines.start(adoption, scaled_s(_ADOPTED_S), time.monotonic())
        self._confirm_adoption(adoption)
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                return
        self._check_record(pair)

    def _confirm_adoption(self, adoption: _Adoption) -> None:
        """Have the programs count in this pair's slot. The pair continues meanwhile."""
        pair, state = adoption.pair, adoption.state

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            is_there = pair.datapath is self and pair.datapath_record is state
            if is_there and answer is None:
                self._confirm_adoption(adoption)
                return
            self._loop.deadlines.stop(adoption)
            if not is_there or answer is None:
                return
            if has_failed(answer):
                # It is not this worker's, or no longer.
                self._host.broken(pair, CloseReason.INTERNAL)
            else:
                self._catch_up(pair)

        slot = self._window.first_slot + pair.slot
        self._keeper.ask("adopted", answered, index=state.index, id=pair.id, slot=slot)

    def _check_adopted(self, pair: Pair, state: Spliced) -> None:
        if pair.datapath is self and pair.datapath_record is state:
            # Its idle time would not be noticed.
            self._host.broken(pair, CloseReason.INTERNAL)
