"""What sessions of UDP ask the kernel for, as a test says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.splice.sessions import Carried, KernelSession, PendingSession


class FakeKernel:
    """What a test says that the programs have counted, and what they are told."""

    def __init__(self, defer: Callable[[Callable[[Any], None], Any], None]) -> None:
        """`defer` is the loop's: no answer comes before the question has returned."""
        self.answer: PairReason | None = None
        self.opened: list[dict[str, Any]] = []
        self.latched = [False, False]
        self.counted = [0, 0]
        self.told: list[tuple[int, int]] = []
        self.is_told_now = False
        self.last = [0.0, 0.0]
        self.sent_on = [(0, 0), (0, 0)]
        self.closed: list[int] = []  # how many at a time
        self.defer = defer
        self.is_slow = False  # it says nothing of itself
        self.asked: list[PendingSession] = []  # and of these nothing was said yet
        self.abandoned = 0
        self.uncounted: list[Callable[[], None]] = []

    def open(self, **words: Any) -> PendingSession | PairReason:
        """A session is to be carried by the kernel."""
        then = words.pop("then")
        self.opened.append(words)
        if self.answer is PairReason.NO_KEEPER:
            return self.answer
        pending = PendingSession(words["session_id"], words["slot"], then)
        if self.is_slow:
            self.asked.append(pending)
        else:
            self.defer(self.say, pending)
        return pending

    def say(self, pending: PendingSession) -> None:
        """The keeper has done what it was asked."""
        session = KernelSession(0, pending.id, pending.slot)
        if pending.then is not None:
            pending.then(self.answer if self.answer is not None else session)

    def abandon(self, pending: PendingSession) -> None:
        """Nobody waits for it any more."""
        pending.then = None
        self.abandoned += 1

    def is_latched(self, _session: KernelSession, direction: int) -> bool:
        """Whether the direction is the kernel's."""
        return self.latched[direction]

    def passed(self, _session: KernelSession, direction: int) -> int:
        """How many datagrams went to our sockets."""
        return self.counted[direction]

    def caught_up(self, session: KernelSession, direction: int, passed: int) -> None:
        """So many of them were copied."""
        self.told.append((direction, passed))
        session.behind_s[direction] = 0.0

    def latch_now(self, _session: KernelSession) -> None:
        """At once."""
        self.is_told_now = True

    def last_s(self, _session: KernelSession, direction: int) -> float:
        """When a datagram last moved."""
        return self.last[direction]

    def carried(self, _session: KernelSession, direction: int) -> tuple[int, int]:
        """Bytes and datagrams that were sent on."""
        return self.sent_on[direction]

    def close(
        self, sessions: Sequence[KernelSession], then: Callable[[list[Carried]], None]
    ) -> None:
        """What they have carried is told."""
        self.closed.append(len(sessions))

        def say() -> None:
            then([(self.sent_on[0], self.sent_on[1]) for _ in sessions])

        if self.is_slow:
            self.uncounted.append(say)
        else:
            say()
