"""A pair that the keeper was asked for, until it is known what has become of it.

It stands still meanwhile: nothing of it is read or written. The keeper joins the two connections by
the numbers of their sockets, and by how many bytes we have read and not yet written: one that we
moved between the question and its answer would be lost, or come twice. So copying cannot go on. The
pause is a millisecond as a rule, and a second where the keeper hangs (`KeeperAsker.longest_s`);
what comes meanwhile waits in the sockets, whose buffers are bounded.

Nor does it end before: the pair may have begun this very moment, and only who knows its place can
end it then.
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
    from pyforwarder.datapath.splice.keeper_asker import Asked
    from pyforwarder.runtime.loop import Loop

    Then = Callable[[Pair, PairReason | None], None]


class Question(Timed):
    """What has the pair in the place of its datapath while the keeper is asked."""

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
        asked: Asked,
        then: Then,
        on_overdue: Callable[[Question], None],
    ) -> None:
        """`before` has it so far. `then` gets what `join` would return.

        `on_overdue` is called when the pair has begun or never will; the deadline is the caller's.
        """
        Timed.__init__(self)
        self._loop = loop
        self._before = before
        self._on_overdue = on_overdue
        self._seen: dict[int, int] = {}  # descriptor -> the events that came meanwhile
        self.pair: Pair | None = pair  # None: it is gone, by a fault of ours
        self.id = pair.id
        self.asked = asked
        self.then = then
        self.polls = 0  # at a record whose program is still running
        self.ends_with: CloseReason | None = None  # the pair is to end, when it is known how
        pair.datapath = self
        for fd in (pair.client_fd, pair.server_fd):
            loop.redirect(fd, self.ready)

    @property
    def due_s(self) -> float:
        """When it is overdue."""
        return self._expires_s

    def ready(self, _pair: Pair, fd: int, mask: int) -> None:
        """Keep an event of a socket, for the datapath that has the pair afterwards."""
        self._seen[fd] = self._seen.get(fd, 0) | mask

    def release(self, pair: Pair) -> None:
        """The answer is known: the pair is copied again, or another datapath takes it now."""
        pair.datapath = self._before

    def resume_copy(self, pair: Pair) -> None:
        """It is copied as before; what came meanwhile is reported once more."""
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
        """The keeper has not answered, and will not begin any more."""
        self._on_overdue(self)

    # Datapath

    def join(self, pair: Pair) -> PairReason | None:
        """Never: the keeper is asked."""
        raise NotImplementedError

    def carried(self, _pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """What was copied."""
        return flow.carried_bytes, flow.carried_packets, 0

    def active_s(self, pair: Pair) -> float:
        """When a byte last moved."""
        return pair.active_s

    def trips(self, _pair: Pair) -> int:
        """Never."""
        return 0

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Never called: its caller ends it by `ends_with`."""
        return True

    def leave(self, _pair: Pair) -> None:
        """The pair is gone before its answer has come: only a fault of ours does that."""
        self.pair = None
