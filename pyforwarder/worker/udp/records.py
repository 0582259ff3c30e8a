"""The records of sessions in the pair table, which `show` prints."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from pyforwarder.core.address import Address
from pyforwarder.datapath.ebpf.abi import PairState, pack_endpoint

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.worker.udp.session import Session


class SessionRecords:
    """What the table says of a worker's sessions; not all of them have room there."""

    def __init__(self, window: PairWindow, most_shown: int) -> None:
        """`most_shown`: the other slots of the window are for TCP."""
        self.window = window
        self._most_shown = most_shown
        self._shown = 0

    def show(self, session: Session, state: PairState) -> None:
        """Write the session's record, if there is room for one."""
        if session.slot < 0:
            if self._shown >= self._most_shown:
                return  # the rest of the table is for TCP
            session.slot = self.window.allocate()
            if session.slot < 0:
                return
            self._shown += 1
        listener = session.listener
        own = listener.endpoint or pack_endpoint(session.asked_address())
        to = session.destination
        self.window.describe(
            session.slot,
            pair_id=session.id,
            started_ns=int(session.accepted_s * 1e9),
            endpoints=pack_endpoint(session.peer)
            + own
            + pack_endpoint(session.source_address())
            + pack_endpoint(to if isinstance(to, Address) else None),
            rule=session.rule_name,
            listener=listener.name,
            state=state,
            datapath=session.kind,
            reason=session.pair_reason,
            protocol=socket.IPPROTO_UDP,
        )

    def show_again(self, session: Session) -> None:
        """Show a session for which the table had no room when it was new."""
        self.show(session, PairState.JOINED if session.sock is not None else PairState.CONNECTING)

    def show_datapath(self, session: Session) -> None:
        """The session's datapath, or the reason for it, is another."""
        if session.slot >= 0:
            self.window.set_datapath(session.slot, session.kind, session.pair_reason)

    def count(self, session: Session, *, now_ns: int = 0) -> None:
        """What was carried in all, by us and by those before us."""
        if session.slot >= 0:
            for direction, count, packets in (
                (0, session.up_bytes, session.up_packets),
                (1, session.down_bytes, session.down_packets),
            ):
                self.window.count(session.slot, direction, count, packets, now_ns)

    def record_of(self, session: Session) -> bytes:
        """What the table says of it; it has a slot."""
        return self.window.record(session.slot)

    def release(self, session: Session) -> None:
        """The session has ended."""
        if session.slot >= 0:
            self.window.release(session.slot)
            self.forget(session)

    def forget(self, session: Session) -> None:
        """The record stays as it is, and is the session's no more."""
        if session.slot >= 0:
            session.slot = -1
            self._shown -= 1
