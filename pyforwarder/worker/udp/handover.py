"""When a UDP session leaves userspace for the kernel, and in which order its datagrams do.

Only where its rule has `datapath: auto` or `splice`, and a session earns it. Its client must have
sent a second datagram and its server have answered: so nobody fills the kernel's table with
addresses that were made up, and an answer that `amplification` holds back is never sent on by the
kernel. A server that never answers is as good if its client has gone on speaking for a while and
has sent what is worth it. With `auto` a session must also have lived or carried as much as
`handover` says: one that ends before, as most of DNS do, would not pay for being begun and ended
there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from pyforwarder.core.datapaths import DATAPATHS
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.session import Carriage, CarriageEvent
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.splice.sessions import KernelSession, PendingSession
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.udp.eviction import Assurance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.splice.sessions import Carried, SessionOrphan, SpliceSessions
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import DatagramPort, Session

# The keeper serves pairs of TCP, too: beginning a session takes it half a millisecond. A sender
# with made-up addresses can have it asked by two datagrams from each of them.
MOST_PER_S: Final = 250.0
_MOST_AT_ONCE: Final = 100.0
# So long our sockets may have no quiet moment before the kernel's datagrams overtake those that
# wait there.
_OVERTAKE_AFTER_S: Final = 0.1
_FOR_SESSIONS: Final = frozenset(row.name for row in DATAPATHS if row.takes_sessions)
_COPIED: Final = Carriage.COPIED
_EARNING: Final = Carriage.EARNING
_UP: Final = int(Direction.UP)
_DOWN: Final = int(Direction.DOWN)


class SessionHandover:
    """Moves sessions from copy to the kernel, and ends them there."""

    def __init__(self, server: DatagramServer, kernel: SpliceSessions | None) -> None:
        """`kernel` is None where this host cannot, or it is not configured.

        Whether it works is not known before `settle`: until then sessions are copied.
        """
        self._server = server
        self._kernel = kernel
        self._works: bool | None = None
        self._tokens = _MOST_AT_ONCE
        self._tokens_s = 0.0

    def settle(self, *, splice: bool) -> None:
        """Note whether the kernel may be given sessions from now on; it keeps those that it has.

        If that becomes so only after a reload, sessions that there are already are given to it,
        too.
        """
        is_late = splice and self._works is False
        self._works = splice
        if is_late:
            for session in self._server.by_id.values():
                if session.sock is not None and session.carriage in (_COPIED, _EARNING):
                    self.established(session)
                    self._server.records.show_datapath(session)

    def established(self, session: Session) -> None:
        """A session begins to flow: settle whether it may be handed over."""
        listener = session.listener
        choice = listener.datapaths[session.route.rule.index]
        if choice != "auto" and choice not in _FOR_SESSIONS:
            return
        if session.upstream is not None and session.upstream.transparent:
            return  # the keeper takes datagrams for this host's own addresses only
        session.is_spliced_by_name = choice != "auto"
        if not listener.config.splice:
            session.pair_reason = PairReason.SPLICE_OFF
        elif self._kernel is None or self._works is False:
            session.pair_reason = _not_here(session)
        else:
            session.pair_reason = PairReason.SHORT
            session.carry(CarriageEvent.MAY_EARN)

    def moved(self, session: Session) -> None:
        """A datagram was copied: it may have been the one that earns the handover."""
        if session.assurance is Assurance.NEW:
            return
        if not session.down_packets and not self._is_stream(session):
            return
        if self._works is None:
            return
        if self._server.waits_for_sessions:
            return  # the listener is not to be read now, which a handover begins with
        if not self._works:
            session.carry(CarriageEvent.MAY_NOT)
            session.pair_reason = _not_here(session)
            self._server.records.show_datapath(session)
            return
        if session.learning:
            return  # what the server says next may be a connection id
        if not session.is_spliced_by_name and not self._pays(session):
            return
        if self._take_token():
            session.carry(CarriageEvent.EARNED)
            # Not now: the server is in the middle of a socket's datagrams.
            self._server.loop.defer(self._attempt, session)

    @staticmethod
    def _is_stream(session: Session) -> bool:
        """Whether an unanswered client is worth being carried by the kernel all the same.

        Made-up addresses cost their sender seconds and bytes then, for each of them.
        """
        return (
            session.assurance is Assurance.STEADY
            and session.up_bytes >= session.listener.generation.handover.after_bytes
        )

    def _pays(self, session: Session) -> bool:
        """Whether `auto` hands the session over by now.

        A datagram each way is a round trip here: nobody counts whose turn it is.
        """
        when = session.listener.generation.handover
        return (
            min(session.up_packets, session.down_packets) >= when.after_round_trips
            or session.up_bytes + session.down_bytes >= when.after_bytes
            or self._server.loop.now_s - session.accepted_s >= when.after_s
        )

    def _take_token(self) -> bool:
        """Take one of the tokens, which come with time; False: there is none."""
        now_s = self._server.loop.now_s
        grown = self._tokens + (now_s - self._tokens_s) * MOST_PER_S
        self._tokens, self._tokens_s = min(grown, _MOST_AT_ONCE), now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _attempt(self, session: Session) -> None:
        if session.carriage is not Carriage.DUE:
            return  # it has ended meanwhile
        if self._server.is_ending(session):
            session.carry(CarriageEvent.DECLINED)
            return  # its listener may be gone already
        answer = self._open(session)
        if isinstance(answer, PendingSession):
            session.carry(CarriageEvent.ASKED)
            session.pending = answer
        else:
            self._opened(session, answer)

    def _opened(self, session: Session, answer: KernelSession | PairReason) -> None:
        """The kernel carries the session, or why it does not."""
        session.pending = None
        reason: PairReason
        if isinstance(answer, KernelSession):
            session.carry(CarriageEvent.TAKEN)
            session.in_kernel = answer
            reason = PairReason.FORCED if session.is_spliced_by_name else PairReason.BEST
            session.kind = DatapathKind.SPLICE
            self._server.counters[Counter.JOINED_SPLICE] += 1
        else:
            reason = answer
            # Another keeper may be there before long.
            is_late = reason is PairReason.NO_KEEPER
            session.carry(CarriageEvent.NOT_NOW if is_late else CarriageEvent.DECLINED)
            if reason is PairReason.MAP_FULL:
                self._server.counters[Counter.SESSIONS_UNSPLICED] += 1
        session.pair_reason = reason
        self._server.records.show_datapath(session)
        if session.in_kernel is not None:
            session.port.behind[session] = None
            self._server.copying.watch_both(session)

    def _open(self, session: Session) -> PendingSession | PairReason:
        if self._kernel is None or session.slot < 0:
            return PairReason.MAP_FULL
        if session.key[3]:
            return PairReason.LINK_LOCAL  # only such addresses have a scope
        assert session.sock is not None
        copied = session.up_packets, session.down_packets

        def then(answer: KernelSession | PairReason) -> None:
            if isinstance(answer, KernelSession):
                # Some of what the kernel has passed to us is copied already.
                for direction, before in enumerate(copied):
                    now = (session.up_packets, session.down_packets)[direction]
                    assert self._kernel is not None
                    passed = self._kernel.passed(answer, direction)
                    answer.copied[direction] = min(now - before, passed)
            self._opened(session, answer)

        return self._kernel.open(
            session_id=session.id,
            slot=session.slot,
            client=session.key[:2],
            local=session.asked_address().host,
            sockets=(session.port.sock, session.sock),
            any_interface=session.listener.generation.config.splice_interfaces == "any",
            idle_s=session.listener.session_idle_s,
            now_s=self._server.loop.now_s,
            then=then,
        )

    def resume(self, session: Session, orphan: SessionOrphan) -> bool:
        """The session is the orphan from here on; False: it cannot be, and is forgotten."""
        assert self._kernel is not None
        if session.slot < 0:
            self._kernel.forget(orphan.index, orphan.id)
            return False
        session.carry(CarriageEvent.RESUMED)
        session.in_kernel = self._kernel.resume(
            orphan,
            session.slot,
            session.listener.session_idle_s,
            lambda: self._server.end(session, CloseReason.INTERNAL),
        )
        return True

    def end_orphan(
        self, orphan: SessionOrphan, then: Callable[[Carried], None] | None = None
    ) -> None:
        """Nobody goes on with it.

        `then` gets the bytes and datagrams that the kernel has sent on, up and down, in a second at
        most.
        """
        orphan.server.close()
        if orphan.index < 0:  # another worker has copied it
            if then is not None:
                then(((0, 0), (0, 0)))
            return
        assert self._kernel is not None
        in_kernel = KernelSession(orphan.index, orphan.id, -1)
        self._kernel.close([in_kernel], lambda carried: then and then(carried[0]))

    # Order

    def copied(self, session: Session, direction: int) -> None:
        """A datagram of a session that the kernel has was copied all the same.

        Before the direction is latched that is so with each; later with those that the program does
        not understand.
        """
        assert self._kernel is not None
        in_kernel = session.in_kernel
        assert in_kernel is not None
        if self._kernel.is_latched(in_kernel, direction):
            if in_kernel.copied[direction] < self._kernel.passed(in_kernel, direction):
                # This datagram came before those that have gone by it meanwhile.
                in_kernel.copied[direction] += 1
                self._server.counters[Counter.DATAGRAMS_OVERTAKEN] += 1
            return
        in_kernel.copied[direction] += 1
        if direction == _UP:
            session.port.behind[session] = None
        now_s = self._server.loop.now_s
        if not in_kernel.behind_s[direction]:
            in_kernel.behind_s[direction] = now_s
        elif now_s - in_kernel.behind_s[direction] > _OVERTAKE_AFTER_S:
            self._kernel.latch_now(in_kernel)

    def report_queue_empty(self, port: DatagramPort) -> bool:
        """Tell the programs that the listener's queue is empty; False: look once more before that.

        What the programs have counted is read first, and only what comes in front of the next look
        is known to be ours: else one that is just coming would be taken for copied.
        """
        if not port.behind:
            return True
        assert self._kernel is not None
        if port.counted is None:
            port.counted = [
                (session, self._kernel.passed(session.in_kernel, _UP))
                for session in port.behind
                if session.in_kernel is not None
            ]
            return False
        for session, passed in port.counted:
            if session.in_kernel is not None:
                self._kernel.caught_up(session.in_kernel, _UP, passed)
        port.behind.clear()
        port.counted = None
        return True

    def passed_down(self, session: Session) -> int | None:
        """What the program has counted, if it waits to know that all of that was copied."""
        in_kernel = session.in_kernel
        if in_kernel is None or self._kernel is None or self._kernel.is_latched(in_kernel, _DOWN):
            return None
        return self._kernel.passed(in_kernel, _DOWN)

    def caught_up_down(self, session: Session, passed: int) -> None:
        """The queue of the socket to the server is empty, since after `passed` was read."""
        if session.in_kernel is not None and self._kernel is not None:
            self._kernel.caught_up(session.in_kernel, _DOWN, passed)

    # Life

    def active_s(self, session: Session) -> float:
        """When a datagram last moved."""
        if session.in_kernel is None or self._kernel is None:
            return session.active_s
        last_s = (self._kernel.last_s(session.in_kernel, direction) for direction in Direction)
        return max(session.active_s, *last_s)

    def heard_s(self, session: Session) -> float:
        """When the kernel last had a datagram of the client; 0: never."""
        if session.in_kernel is None or self._kernel is None:
            return 0.0
        return self._kernel.last_s(session.in_kernel, _UP)

    def answered_s(self, session: Session) -> float:
        """When the server last answered; -inf: never."""
        if session.in_kernel is None or self._kernel is None:
            return session.answered_s
        return max(session.answered_s, self._kernel.last_s(session.in_kernel, _DOWN) or -math.inf)

    def packets(self, session: Session) -> tuple[int, int]:
        """How many datagrams have gone up and down so far, copied and by the kernel."""
        up, down = session.up_packets, session.down_packets
        if session.in_kernel is not None and self._kernel is not None:
            up += self._kernel.carried(session.in_kernel, _UP)[1]
            down += self._kernel.carried(session.in_kernel, _DOWN)[1]
        return up, down

    def leave(self, sessions: Sequence[Session]) -> None:
        """The sessions end: take them from the kernel, and add up what that has carried.

        That is known in a second at most, and then `count_ended` of those that it carried. There
        are ENDS_AT_ONCE of them at most.
        """
        left = []
        for session in sessions:
            session.carry(CarriageEvent.LEFT)
            self._abandon(session)
            if session.in_kernel is not None:
                session.port.behind.pop(session, None)
                left.append((session, session.in_kernel))
                session.in_kernel = None
        if not left or self._kernel is None:
            return

        is_asked = False

        def then(all_carried: Sequence[Carried]) -> None:
            for (session, _), (up, down) in zip(left, all_carried, strict=True):
                session.up_bytes += up[0]
                session.up_packets += up[1]
                session.down_bytes += down[0]
                session.down_packets += down[1]
                session.carry(CarriageEvent.COUNTED)
                if session.has_ended and is_asked:  # else who ends it tells
                    self._server.count_ended(session)

        try:
            self._kernel.close([in_kernel for _, in_kernel in left], then)
        except Exception:
            for session, _ in left:
                session.carry(CarriageEvent.COUNTED)
            raise
        is_asked = True

    def withdraw(self, sessions: Sequence[Session]) -> None:
        """Take sessions back from the kernel, or from the way there: they are copied from now on.

        What the kernel has carried of each is known in a second at most (`is_counted`). There are
        ENDS_AT_ONCE of them at most.
        """
        for session in sessions:
            if session.in_kernel is not None:
                self._server.confirm_if_steady(session)
                session.active_s = self.active_s(session)
                session.answered_s = self.answered_s(session)
            session.kind = DatapathKind.COPY
        self.leave(sessions)
        for session in sessions:
            self._server.records.show_datapath(session)

    def release(self, session: Session) -> None:
        """The session is another daemon's from here on; one that the kernel has, stays there."""
        session.carry(CarriageEvent.RELEASED)
        self._abandon(session)
        session.in_kernel = None

    def _abandon(self, session: Session) -> None:
        """Have the keeper end what it was asked to begin."""
        if session.pending is not None and self._kernel is not None:
            self._kernel.abandon(session.pending)
            session.pending = None

    def finish(self) -> None:
        """The worker is about to end: nothing is waited for any more."""
        if self._kernel is not None:
            self._kernel.count_now()


def _not_here(session: Session) -> PairReason:
    """The reason of a session that this host cannot give to the kernel."""
    return PairReason.NOT_ELIGIBLE if session.is_spliced_by_name else PairReason.DATAGRAMS
