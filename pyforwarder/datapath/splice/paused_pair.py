"""A pair while the keeper is asked to splice it, until the outcome is known.

It is paused meanwhile: nothing of it is read or written. The keeper joins the two connections by
the sequence numbers of their sockets, and by the bytes that we have read and not written yet: a
byte that we copied between the request and the answer would be lost or doubled. The pause is a
millisecond as a rule, and a second where the keeper hangs (`KeeperAsker.longest_s`). Bytes that
arrive meanwhile wait in the sockets, whose buffers are bounded.

The pair does not end before either: it may have been spliced at this very moment, and ending it
then takes its index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.loop import Timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.core.reasons import CloseReason
    from pyforwarder.datapath.base import Flow, Pair, PairReason
    from pyforwarder.datapath.copying import CopyDatapath
    from pyforwarder.datapath.splice.keeper_asker import PendingRequest
    from pyforwarder.runtime.loop import Loop

    Then = Callable[[Pair, PairReason | None], None]


class PausedPair(Timed):
    """The datapath of a pair while the keeper is asked."""

    __slots__ = (
        "_before",
        "_loop",
        "_on_overdue",
        "_seen",
        "asked",
        "ends_with",
        "id",
        "pair",
        "polls",
        "then",
    )

    kind = DatapathKind.COPY

    def __init__(
        self,
        loop: Loop,
        pair: Pair,
        before: CopyDatapath,
        asked: PendingRequest,
        then: Then,
        on_overdue: Callable[[PausedPair], None],
    ) -> None:
        """`before` is its datapath so far. `then` gets what `join` would return.

        `on_overdue` is called at the deadline: by then the pair has begun or never will.
        """
        Timed.__init__(self)
        self._loop = loop
        self._before = before
        self._on_overdue = on_overdue
        self._seen: dict[int, int] = {}  # descriptor -> events that came meanwhile
        self.pair: Pair | None = pair  # None: it is gone, by an internal error
        self.id = pair.id
        self.asked = asked
        self.then = then
        self.polls = 0  # of a record whose program is still running
        self.ends_with: CloseReason | None = None  # why the pair ends, once the outcome is known
        pair.datapath = self
        for fd in (pair.client_fd, pair.server_fd):
            loop.redirect(fd, self.ready)

    @property
    def due_s(self) -> float:
        """The deadline."""
        return self._expires_s

    def ready(self, _pair: Pair, fd: int, mask: int) -> None:
        """Store an event of a socket, for the datapath that gets the pair afterwards."""
        self._seen[fd] = self._seen.get(fd, 0) | mask

    def release(self, pair: Pair) -> None:
        """The outcome is known: the pair is copied again, or goes to another datapath."""
        pair.datapath = self._before

    def resume_copy(self, pair: Pair) -> None:
        """Copy it as before; the events that came meanwhile are reported again."""
        for fd, mask, flow in (
            (pair.client_fd, pair.client_mask, pair.up),
            (pair.server_fd, pair.server_mask, pair.down),
        ):
            self._loop.redirect(fd, self._before.ready)
            if self._seen.get(fd):
                self._loop.change(fd, mask)
            if fd in self._seen or flow.readable:
                self._loop.soon(pair, fd)  # a turn that was due, or its first one

    def expired(self) -> None:
        """The keeper has not answered in time, and the pair will not begin any more."""
        self._on_overdue(self)

    # Datapath

    def join(self, pair: Pair) -> PairReason | None:
        """Never called: the keeper is asked."""
        raise NotImplementedError

    def carried(self, _pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """The counts of what was copied."""
        return flow.carried_bytes, flow.carried_packets, 0

    def active_s(self, pair: Pair) -> float:
        """When a byte last moved."""
        return pair.active_s

    def trips(self, _pair: Pair) -> int:
        """Never."""
        return 0

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Never called: the pair is ended by `ends_with`."""
        return True

    def leave(self, _pair: Pair) -> None:
        """The pair is gone before the answer: only an internal error does that."""
        self.pair = None
