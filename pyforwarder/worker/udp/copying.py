"""Copies the datagrams of sessions, with their boundaries.

Those of one session and size that have come together are sent on together (runs.py). As on any
path, one that finds a full queue is lost; it is counted. What the kernel sends on of a session
does not come here (handover.py).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.quic_ids import id_of_server
from pyforwarder.core.session import Carriage, SessionLife
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.loop import EPOLLERR
from pyforwarder.runtime.recvmmsg import Receiver, Room
from pyforwarder.worker.udp.connection_ids import SessionTarget
from pyforwarder.worker.udp.eviction import Assurance
from pyforwarder.worker.udp.runs import (
    GRO_BYTES,
    UNSEGMENTED,
    cut,
    end_of_run,
    send_segments,
    size_of_run,
)
from pyforwarder.worker.udp.sockets import (
    ANCILLARY_BYTES,
    NAME_BYTES,
    from_address,
    key_of,
    local_address_in,
    name_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.server_losses import ServerLosses
    from pyforwarder.worker.udp.session import DatagramPort, Session
    from pyforwarder.worker.udp.sockets import Key

# What one session may have waiting while the name of its server is being resolved, and what all
# sessions of a worker may. A first datagram of an ordinary size always may: sessions are bounded.
MOST_WAITING: Final = 16
MOST_WAITING_BYTES: Final = 64 * 1024
MOST_WAITING_BYTES_OF_ALL: Final = 8 * 1024 * 1024
ORDINARY_BYTES: Final = 1500
# How often a datagram is tried: what the kernel answers may be about an earlier one.
TRIES: Final = 3
# How many datagrams one socket gets served before the others have their turn.
BATCH: Final = 64
# One message of a server may be as many datagrams (runs.py), which nobody knows before it is
# received. So few are where that is not known yet, and where each datagram is sent by itself.
_FEW_MESSAGES: Final = 2
_NEW: Final = Assurance.NEW
_ENDED: Final = SessionLife.ENDED
_EARNING: Final = Carriage.EARNING
_STEADY: Final = Assurance.STEADY


class Copying:
    """What moves the datagrams of a worker's sessions, as far as userspace does."""

    def __init__(self, server: DatagramServer, losses: ServerLosses, window: PairWindow) -> None:
        self._server = server
        self._losses = losses
        self._window = window
        self._loop = server.loop
        self._counters = server.counters
        self._room = Room()
        self._from_servers = Receiver(self._room, control_bytes=GRO_BYTES)
        self._receivers: dict[tuple[int, bool], Receiver] = {}  # by family, and if wildcard
        self._waiting_bytes = 0  # of all sessions whose server is not known yet

    # From clients

    def readable(self, port: DatagramPort, _fd: int, _mask: int) -> None:
        """A listener's socket has datagrams of clients, or an error."""
        if self._server.waits_for_sessions:
            return  # whose session is still to come would get another one
        port.counted = None
        fd, receiver = port.sock.fileno(), self._receiver_of(port)
        left = BATCH
        while left > 0:
            try:
                datagrams = receiver.receive(fd, left)
            except OSError:
                left -= 1
                continue  # an ICMP error about an earlier answer: nobody is there to send to
            if not datagrams:
                if self._server.handover.report_queue_empty(port):
                    break
                left -= 1
                continue
            port.counted = None
            were_all = len(datagrams) < left
            left -= len(datagrams)
            names = receiver.names()
            if port.is_wildcard:
                controls = receiver.controls()
                names = [
                    name + local_address_in(control)
                    for name, control in zip(names, controls, strict=True)
                ]
            self._take(port, names, datagrams)
            if were_all and not port.behind:
                break

    def _receiver_of(self, port: DatagramPort) -> Receiver:
        """What receives of its socket."""
        kind = port.sock.family, port.is_wildcard
        receiver = self._receivers.get(kind)
        if receiver is None:
            receiver = self._receivers[kind] = Receiver(
                self._room,
                name_bytes=NAME_BYTES[port.sock.family],
                control_bytes=ANCILLARY_BYTES if port.is_wildcard else 0,
            )
        return receiver

    def _take(
        self, port: DatagramPort, names: Sequence[bytes], datagrams: Sequence[memoryview]
    ) -> None:
        """Send on what has been received, each client's in its order."""
        by_name = port.by_name
        of_sessions: dict[Session, list[memoryview]] = {}
        for name, datagram in zip(names, datagrams, strict=True):
            session = by_name.get(name) or port.find(name)
            if session is not None:
                of_one = of_sessions.get(session)
                if of_one is None:
                    of_sessions[session] = [datagram]
                else:
                    of_one.append(datagram)
                continue
            self._send_all(of_sessions)  # one of them may have to make room
            of_sessions.clear()
            self._take_one(port, key_of(name), datagram)
        self._send_all(of_sessions)

    def _take_one(self, port: DatagramPort, key: Key, datagram: memoryview) -> None:
        """A datagram whose client may have no session any more, or none yet."""
        session = port.sessions.get(key)
        try:
            if session is None:
                self._server.deciding.open(port, key, bytes(datagram))
            else:
                self._heard(session)
                self.send_up(session, datagram)
        except Exception as error:
            self._server.blame(port, key, error)

    def _send_all(self, of_sessions: Mapping[Session, Sequence[memoryview]]) -> None:
        for session, datagrams in of_sessions.items():
            try:
                sent = self._send_many(session, datagrams) if session.life is not _ENDED else 0
            except Exception as error:
                self._server.blame(session.port, session.key, error)
                continue
            # Its server is lost: what came behind that is for another.
            for datagram in datagrams[sent:]:
                self._take_one(session.port, session.key, datagram)

    def _heard(self, session: Session) -> None:
        """Note that the session's client has sent something."""
        if session.assurance is not _STEADY:
            self._server.eviction.confirm(session, self._loop.now_s)
            if session.slot < 0:
                self._server.records.show_again(session)

    def _send_many(self, session: Session, datagrams: Sequence[memoryview]) -> int:
        """Send datagrams to the server, together where they can be; returns how many were sent.

        That is not all if the session ends.
        """
        self._heard(session)
        at, count = 0, len(datagrams)
        while at < count and session.life is not _ENDED:
            end = at + 1
            if end < count and self._may_run(session):
                end = end_of_run(datagrams, at, session.most_segment)
                if end > at + 1 and self._send_segments(session, datagrams[at:end]):
                    at = end
                    continue
            for datagram in datagrams[at:end]:
                self.send_up(session, datagram)
                at += 1
                if session.has_ended:
                    break
        return at

    @staticmethod
    def _may_run(session: Session) -> bool:
        """Whether the session's datagrams may go together."""
        # Not if the kernel has the session as well: each of its datagrams is counted.
        return session.sock is not None and session.in_kernel is None and not session.proxy_header

    def _send_segments(self, session: Session, datagrams: Sequence[memoryview]) -> bool:
        """False: these have to be sent one by one."""
        assert session.sock is not None
        try:
            send_segments(session.sock, datagrams)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EPERM):
                self._counters[Counter.DATAGRAMS_LOST] += len(datagrams)
                return True
            if error.errno in UNSEGMENTED:
                session.most_segment = len(datagrams[0]) - 1
            return False
        session.up_bytes += size_of_run(datagrams)
        session.up_packets += len(datagrams)
        self._moved(session, 0, session.up_bytes, session.up_packets)
        return True

    def send_up(self, session: Session, datagram: bytes | memoryview) -> None:
        """Send a client's datagram to the server, once that is known."""
        if session.sock is None:
            self.hold(session, datagram)
            return
        sent = session.proxy_header + datagram if session.proxy_header else datagram
        for tries_left in reversed(range(TRIES)):
            try:
                session.sock.send(sent)
                break
            except OSError as error:
                # The one before may have met an error of ICMP: then this one was not even tried.
                if not self._losses.read_errors(session):
                    return
                if error.errno == errno.EAGAIN or not tries_left:
                    self._failed(session, error)
                    return
        session.proxy_header = b""
        session.up_bytes += len(datagram)
        session.up_packets += 1
        self._moved(session, 0, session.up_bytes, session.up_packets)

    # Until the server is known

    def hold(self, session: Session, datagram: bytes | memoryview) -> None:
        """Keep a datagram until the server is known, if there is room for it."""
        size = len(datagram)
        of_all = self._waiting_bytes + size
        has_room = (
            len(session.waiting) < MOST_WAITING
            and session.waiting_bytes + size <= MOST_WAITING_BYTES
            and of_all <= MOST_WAITING_BYTES_OF_ALL
        )
        if has_room or (not session.waiting and size <= ORDINARY_BYTES):
            session.waiting.append(bytes(datagram))
            session.waiting_bytes += size
            self._waiting_bytes = of_all
        else:
            self._counters[Counter.DATAGRAMS_LOST] += 1

    def send_waiting(self, session: Session) -> None:
        """Send the datagrams that have waited until the session's server is known, in order."""
        waiting = self.forget_waiting(session)
        for datagram in waiting:
            if session.life is _ENDED:
                return  # the server has refused the one before
            self.send_up(session, datagram)

    def forget_waiting(self, session: Session) -> list[bytes]:
        """What has waited; it does no more."""
        waiting, session.waiting = session.waiting, []
        self._waiting_bytes -= session.waiting_bytes
        session.waiting_bytes = 0
        return waiting

    # From servers

    def answered(self, session: Session, _fd: int, mask: int) -> None:
        """A session's socket has datagrams of its server, or an error."""
        assert session.sock is not None
        if mask & EPOLLERR and not self._losses.read_errors(session):
            return
        fd, handover = session.sock.fileno(), self._server.handover
        left = BATCH
        while left > 0:
            passed = handover.passed_down(session) if session.in_kernel is not None else None
            asked = self._messages_at_once(session, left)
            try:
                datagrams = self._from_servers.receive(fd, asked)
            except OSError:
                left -= 1
                if not self._losses.read_errors(session):
                    return
                continue
            if not datagrams:
                if passed is not None:
                    handover.caught_up_down(session, passed)
                break
            session.answered_s = self._loop.now_s
            received = len(datagrams)
            were_all = received < asked
            if self._from_servers.has_controls():
                datagrams = cut(datagrams, self._from_servers.controls())
            left -= len(datagrams)
            of_one = -(-len(datagrams) // received)
            session.most_of_message = max(session.most_of_message, of_one)
            if session.learning:
                for datagram in datagrams[: session.learning]:
                    self._learn(session, datagram)
            self._send_all_to_client(session, datagrams)
            if were_all and session.in_kernel is None:
                break

    def _messages_at_once(self, session: Session, left: int) -> int:
        """How many messages of the server may be received, if so many datagrams may be sent on."""
        most = max(1, left // max(1, session.most_of_message))
        is_together = session.assurance is not _NEW and self._may_run(session)
        return most if is_together and session.most_of_message else min(most, _FEW_MESSAGES)

    def _send_all_to_client(self, session: Session, datagrams: Sequence[memoryview]) -> None:
        """Send on what a server has answered, together where it can be."""
        at, count = 0, len(datagrams)
        while at < count:
            end = at + 1
            # Not to a client of one datagram: `amplification` may bound what it gets.
            if end < count and session.assurance is not _NEW and self._may_run(session):
                end = end_of_run(datagrams, at, session.most_segment)
                if end > at + 1 and self._send_segments_to_client(session, datagrams[at:end]):
                    at = end
                    continue
            for datagram in datagrams[at:end]:
                if self.send_to_client(session, datagram):
                    self._count_sent(session, len(datagram), 1)
            at = end

    def _send_segments_to_client(self, session: Session, datagrams: Sequence[memoryview]) -> bool:
        """False: these have to be sent one by one."""
        key = session.key
        try:
            send_segments(session.port.sock, datagrams, from_address(key[2]), name_of(key))
        except OSError as error:
            if error.errno in UNSEGMENTED:
                session.most_segment = len(datagrams[0]) - 1
                return False
            self._counters[Counter.DATAGRAMS_LOST] += len(datagrams)
            return True
        self._count_sent(session, size_of_run(datagrams), len(datagrams))
        return True

    def _count_sent(self, session: Session, size: int, count: int) -> None:
        session.down_bytes += size
        session.down_packets += count
        self._moved(session, 1, session.down_bytes, session.down_packets)

    def _learn(self, session: Session, answer: memoryview) -> None:
        """Remember the connection id that a server says, with the way to that server."""
        session.learning -= 1
        connection_id = id_of_server(answer)
        if not connection_id or connection_id in session.ids:
            return
        listener, rule = session.listener, session.route.rule
        number = -1
        if session.upstream is not None and session.server_state is not None:
            servers = session.upstream.balancer.servers
            if session.server_state not in servers:
                return  # a reload has taken it away
            number = servers.index(session.server_state)
        assert isinstance(session.destination, Address)
        if "%" in session.destination.host:
            return  # a zone has no room in the table
        target = SessionTarget(
            session.destination, listener.counter, listener.rule_counters[rule.index], number
        )
        self._server.ids.learn(connection_id, target, self._loop.now_s)
        session.ids = (*session.ids, connection_id)

    def send_to_client(self, session: Session, data: bytes | memoryview) -> bool:
        """Whether the datagram went out to the session's client.

        A client that has sent one datagram may have made its address up: what a server answers
        goes to somebody who has not asked. So it may be bounded (`amplification`; QUIC has 3 for
        servers, RFC 9000 8.1). A second datagram ends that, though it may be made up as well: no
        bound that real clients can live with holds against a sender who repeats himself.
        """
        if session.assurance is _NEW:
            amplification = session.listener.amplification
            most = amplification * session.heard_bytes
            if amplification and session.told_bytes + len(data) > most:
                self._counters[Counter.DATAGRAMS_HELD_BACK] += 1
                return False
            session.told_bytes += len(data)
        return self.send_down(session.port, session.key, data)

    def send_down(self, port: DatagramPort, key: Key, data: bytes | memoryview) -> bool:
        """Whether the datagram went out; one that does not is lost, as on any path."""
        try:
            if key[2]:
                port.sock.sendmsg([data], from_address(key[2]), 0, name_of(key))
            else:
                port.sock.sendto(data, name_of(key))
        except OSError:
            self._counters[Counter.DATAGRAMS_LOST] += 1
            return False
        return True

    # Both

    def _failed(self, session: Session, error: OSError) -> None:
        """Handle an error of sending: a full queue loses a datagram, others end the session."""
        if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE, errno.EPERM):
            self._counters[Counter.DATAGRAMS_LOST] += 1
            return
        is_sure = not self._losses.has_answer(session)
        self._losses.lose(session, error.errno or errno.EIO, is_sure=is_sure)

    def _moved(self, session: Session, direction: int, count: int, packets: int) -> None:
        session.active_s = self._loop.now_s
        if session.slot >= 0:
            now_ns = int(self._loop.now_s * 1e9)
            self._window.count(session.slot, direction, count, packets, now_ns)
        if session.carriage is _EARNING:
            self._server.handover.moved(session)
        elif session.in_kernel is not None:
            self._server.handover.copied(session, direction)

    def watch_both(self, session: Session) -> None:
        """Copy what has come for a session, from whichever side, before the next event."""
        self.readable(session.port, -1, 0)
        if session.sock is not None:
            self.answered(session, -1, 0)
