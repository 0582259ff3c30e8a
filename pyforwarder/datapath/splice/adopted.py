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

# A keeper that does not know by then whose pair it is from now on, sees nobody idle.
_ADOPTED_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Orphan:
    """A spliced pair whose worker is gone: sockets in their place, and what is known of it."""

    index: int
    id: int
    client: socket.socket
    server: socket.socket
    record: PairRecord | None  # what `show` said of it


def _orphan_of(answer: dict[str, Any], fds: list[int]) -> Orphan:
    """The pair that the keeper gives, with the sockets that it has sent, which are taken.

    Raises:
        DatapathError: there was no descriptor left for one of them.
    """
    if len(fds) != 2:
        raise DatapathError("take in a spliced pair", errno.EMFILE)
    said = table.inherited(bytes.fromhex(answer["record"]), answer["id"])
    client, server = (socket.socket(fileno=fds.pop(0)) for _ in range(2))
    return Orphan(answer["index"], answer["id"], client, server, said)


class _Adoption(Timed):
    """A pair that the keeper is told to be this worker's, until it has answered."""

    __slots__ = ("_overdue", "pair", "state")

    def __init__(
        self, pair: Pair, state: Spliced, overdue: Callable[[Pair, Spliced], None]
    ) -> None:
        Timed.__init__(self)
        self._overdue = overdue
        self.pair = pair
        self.state = state

    def expired(self) -> None:
        """It has not answered it."""
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
        """Have `take` called with each spliced pair that has lost its worker and is ours now.

        Then `done`, once; both by the loop, or while the keeper's answers are waited for. Each must
        be given to `resume` or closed, its sockets are the callee's. Before `done`, `later` is
        called if there are some that cannot be had yet, as their old sockets are still there: ask
        again in a while.
        """

        def answered(answer: dict[str, Any] | None, fds: list[int]) -> None:
            if answer is not None and "more" not in answer:
                if "index" not in answer:
                    if "later" in answer:
                        later()
                    done()
                    return
                try:
                    take(_orphan_of(answer, fds))
                except Exception as error:
                    self._loop.on_error(take, error)
                    if answer["index"] not in self._by_index:
                        self.forget(answer["index"], answer["id"])  # it costs this pair alone
            ask()

        def ask() -> None:
            # Behind what was said of the one before: it is not given to us once more.
            if not self._keeper.ask("adopt", answered):
                done()

        ask()

    @staticmethod
    def peek(pair: Pair) -> tuple[int, list[int], bool]:
        """Its index, the bytes that are left to be read in each direction, and if it is mute.

        With the pair's `pending` that is all that another daemon has to know.
        """
        state = pair.state
        assert isinstance(state, Spliced)
        return state.index, state.left_bytes, state.is_mute

    def release(self, pair: Pair) -> None:
        """The pair is another daemon's from here on, and goes on meanwhile."""
        state = pair.state
        assert isinstance(state, Spliced)
        self._ends.pop(pair, None)
        del self._by_index[state.index]
        pair.state = None

    def take_over(
        self,
        index: int,
        client: socket.socket,
        server: socket.socket,
        then: Callable[[Orphan | None], None],
    ) -> bool:
        """Go on with a pair that another daemon has released, with the sockets that it has sent.

        `then` gets the orphan, or None: the pair is not there any more. The sockets stay the
        caller's until then. False: the keeper cannot be asked just now.
        """

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            if answer is None:
                if not self.take_over(index, client, server, then):
                    then(None)
            elif "index" not in answer:
                then(None)
            else:
                said = table.inherited(bytes.fromhex(answer["record"]), answer["id"])
                then(Orphan(index, answer["id"], client, server, said))

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
        """The pair, with the orphan's sockets, id and a slot, is the orphan from here on.

        What it carried before is added to its counts. `left_bytes` are still to be read, and
        `pending` to be written; with such sockets that are not mute, see `release`.
        """
        words, at = self._window.words, pair.slot * self._window.WORDS
        words[at + table.ID] = pair.id
        # From here on the program stores the same here, with every packet.
        record = Splice.from_buffer_copy(self._memory, orphan.index * SPLICE_BYTES)
        for direction in Direction:
            words[at + table.REDIRECTED[direction]] = shown_bytes(record.way[direction])
            words[at + table.REDIRECTED_PACKETS[direction]] = record.way[direction].packets
        self._take(pair, orphan.index, list(left_bytes), is_mute=is_mute)
        state = pair.state
        assert isinstance(state, Spliced)
        adoption = _Adoption(pair, state, self._check_adopted)
        self._loop.deadlines.start(adoption, scaled_s(_ADOPTED_S), time.monotonic())
        self._confirm_adoption(adoption)
        for flow in (pair.up, pair.down):
            if not self._copy_rest(pair, flow):
                return
        self._check_record(pair)

    def _confirm_adoption(self, adoption: _Adoption) -> None:
        """Have what is carried counted in this pair's slot. Meanwhile the pair goes on."""
        pair, state = adoption.pair, adoption.state

        def answered(answer: dict[str, Any] | None, _fds: list[int]) -> None:
            is_there = pair.datapath is self and pair.state is state
            if is_there and answer is None:
                self._confirm_adoption(adoption)
                return
            self._loop.deadlines.stop(adoption)
            if not is_there or answer is None:
                return
            if "error" in answer:
                self._host.broken(pair, CloseReason.INTERNAL)  # it is not ours, or no more
            else:
                self._catch_up(pair)

        slot = self._window.first_slot + pair.slot
        self._keeper.ask("adopted", answered, index=state.index, id=pair.id, slot=slot)

    def _check_adopted(self, pair: Pair, state: Spliced) -> None:
        if pair.datapath is self and pair.state is state:
            # Nobody would see it idle.
            self._host.broken(pair, CloseReason.INTERNAL)
