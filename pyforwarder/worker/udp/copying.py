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
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.loop import EPOLLERR
from pyforwarder.worker.udp.connection_ids import Way
from pyforwarder.worker.udp.runs import UNSEGMENTED, Run, send_segments
from pyforwarder.worker.udp.sockets import ANCILLARY_BYTES, from_address, local_address, name_of
from pyforwarder.worker.udp.standing import Standing

if TYPE_CHECKING:
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
_NEW: Final = Standing.NEW
_STEADY: Final = Standing.STEADY


class Copying:
    """What moves the datagrams of a worker's sessions, as far as userspace does."""

    def __init__(self, server: DatagramServer, losses: ServerLosses, window: PairWindow) -> None:
        self._server = server
        self._losses = losses
        self._window = window
        self._loop = server.loop
        self._counters = server.counters
        self._run = Run()
        self._waiting_bytes = 0  # of all sessions whose server is not known yet

    # From clients

    def readable(self, port: DatagramPort, _fd: int, _mask: int) -> None:
        """A listener's socket has datagrams of clients, or an error."""
        run = self._run
        port.counted = None
        for _ in range(BATCH):
            local = b""
            try:
                if port.is_wildcard:
                    size, ancillary, _, name = port.sock.recvmsg_into([run.room], ANCILLARY_BYTES)
                    local = local_address(ancillary)
                else:
                    size, name = port.sock.recvfrom_into(run.room)
            except BlockingIOError:
                if self._server.handover.is_quiet(port):
                    break
                continue
            except OSError:
                continue  # an ICMP error about an earlier answer: nobody is there to tell
            port.counted = None
            key = (name[0], name[1], local, name[3] if len(name) == 4 else 0)
            session = port.sessions.get(key)
            datagram = run.received(size)
            try:
                if session is None:
                    self.send_run()  # its session may have to make room
                    self._server.deciding.open(port, key, bytes(datagram))
                else:
                    if session.standing is not _STEADY:
                        self._server.standings.heard(session, self._loop.now_s)
                        if session.slot < 0:
                            self._server.records.show_again(session)
                    if run.goes_on(session, size):
                        continue
                    self.send_run()
                    if session.sock is not None and self._may_run(session, size):
                        run.begin(session, size)
                    else:
                        self.send_up(session, datagram)
            except Exception as error:
                self._server.blame(port, key, error)
        self.send_run()

    @staticmethod
    def _may_run(session: Session, size: int) -> bool:
        """Whether the datagram may wait for the others that have come with it."""
        # Not of one that the kernel has as well: of those each is counted.
        return (
            session.place is None and 0 < size <= session.most_segment and not session.proxy_header
        )

    def send_run(self) -> None:
        """Send on what is left of a client's datagrams."""
        run = self._run
        session = run.session
        if session is None:
            return
        try:
            if session.sock is not None and not self._send_segments(session, run):
                for datagram in run.datagrams():
                    if session.life_ended:
                        return
                    self.send_up(session, datagram)
        except Exception as error:
            self._server.blame(session.listener, session.key, error)
        finally:
            run.clear()

    def _send_segments(self, session: Session, run: Run) -> bool:
        """False: these have to be sent one by one."""
        assert session.sock is not None
        if run.count == 1:
            return False
        try:
            send_segments(session.sock, run)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EPERM):
                self._counters[Counter.DATAGRAMS_LOST] += run.count
                return True
            if error.errno in UNSEGMENTED:
                session.most_segment = run.size - 1
            return False
        session.up_bytes += len(run.data)
        session.up_packets += run.count
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
                if not self._losses.hear_errors(session):
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
        """Its server is known: send what has waited for that, in its order."""
        waiting = self.forget_waiting(session)
        for datagram in waiting:
            if session.life_ended:
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
        if mask & EPOLLERR and not self._losses.hear_errors(session):
            return
        run, handover = self._run, self._server.handover
        try:
            for _ in range(BATCH):
                passed = handover.passed_down(session) if session.place is not None else None
                try:
                    size = session.sock.recv_into(run.room)
                except BlockingIOError:
                    if passed is not None:
                        handover.caught_up_down(session, passed)
                    break
                except OSError:
                    self._tell_run(session)
                    if not self._losses.hear_errors(session):
                        return
                    continue
                session.answered_s = self._loop.now_s
                datagram = run.received(size)
                if session.learning:
                    self._learn(session, datagram)
                if run.goes_on(session, size):
                    continue
                self._tell_run(session)
                if session.standing is not _NEW and self._may_run(session, size):
                    run.begin(session, size)
                elif self.tell(session, datagram):
                    self._told(session, size, 1)
            self._tell_run(session)
        finally:
            run.clear()

    def _tell_run(self, session: Session) -> None:
        """Send on what is left of a server's datagrams."""
        run = self._run
        if not run.count:
            return
        if run.count > 1:
            key = session.key
            try:
                send_segments(session.listener.sock, run, from_address(key[2]), name_of(key))
            except OSError as error:
                if error.errno not in UNSEGMENTED:
                    self._counters[Counter.DATAGRAMS_LOST] += run.count
                    run.clear()
                    return
                session.most_segment = run.size - 1
            else:
                self._told(session, len(run.data), run.count)
                run.clear()
                return
        for datagram in run.datagrams():
            if self.tell(session, datagram):
                self._told(session, len(datagram), 1)
        run.clear()

    def _told(self, session: Session, size: int, count: int) -> None:
        session.down_bytes += size
        session.down_packets += count
        self._moved(session, 1, session.down_bytes, session.down_packets)

    def _learn(self, session: Session, answer: memoryview) -> None:
        """Remember the connection id that a server says, with the way to that server."""
        session.learning -= 1
        connection_id = id_of_server(answer)
        if not connection_id or connection_id in session.ids:
            return
        state, rule = session.state, session.route.rule
        number = -1
        if session.upstream is not None and session.server_state is not None:
            servers = session.upstream.balancer.servers
            if session.server_state not in servers:
                return  # a reload has taken it away
            number = servers.index(session.server_state)
        assert isinstance(session.destination, Address)
        if "%" in session.destination.host:
            return  # a zone has no room in the table
        way = Way(session.destination, state.counter, state.rule_counters[rule.index], number)
        self._server.ids.learn(connection_id, way, self._loop.now_s)
        session.ids = (*session.ids, connection_id)

    def tell(self, session: Session, data: bytes | memoryview) -> bool:
        """Whether the datagram went out to the session's client.

        A client that has sent one datagram may have made its address up: what a server answers
        goes to somebody who has not asked. So it may be bounded (`amplification`; QUIC has 3 for
        servers, RFC 9000 8.1). A second datagram ends that, though it may be made up as well: no
        bound that real clients can live with holds against a sender who repeats himself.
        """
        if session.standing is _NEW:
            amplification = session.state.amplification
            most = amplification * session.heard_bytes
            if amplification and session.told_bytes + len(data) > most:
                self._counters[Counter.DATAGRAMS_HELD_BACK] += 1
                return False
            session.told_bytes += len(data)
        return self.send_down(session.listener, session.key, data)

    def send_down(self, port: DatagramPort, key: Key, data: bytes | memoryview) -> bool:
        """Whether the datagram went out; one that does not is lost, as on any path."""
        try:
            port.sock.sendmsg([data], from_address(key[2]), 0, name_of(key))
        except OSError:
            self._counters[Counter.DATAGRAMS_LOST] += 1
            return False
        return True

    # Both

    def _failed(self, session: Session, error: OSError) -> None:
        """This host cannot send it: a full queue loses a datagram, the rest end the session."""
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
        if session.earns:
            self._server.handover.moved(session)
        elif session.place is not None:
            self._server.handover.copied(session, direction)

    def look_at_both(self, session: Session) -> None:
        """Copy what has come for a session, from whichever side, before the next event."""
        self.readable(session.listener, -1, 0)
        if session.sock is not None:
            self.answered(session, -1, 0)
