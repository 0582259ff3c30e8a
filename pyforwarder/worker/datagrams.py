"""UDP: a session for each client address, decided by its first datagram.

Every datagram is whole, so there is nothing to wait for: a rule that would need more bytes does not
match. A session is a socket of its own, connected to the server, so that answers find their client
and errors their session. It has no end of its own; it ends when nobody has spoken for a while.

Datagrams are copied, one by one, with their boundaries. As on any path, one that finds a full
queue is lost; it is counted.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.address import Address, HostPort, UnixAddress
from pyforwarder.counters import CLOSED_INDEX, Counter, ListenerCounter, RuleCounter
from pyforwarder.datapath.abi import DatapathKind, PairState, pack_endpoint
from pyforwarder.datapath.base import PairReason
from pyforwarder.loop import EPOLLIN, Timed
from pyforwarder.reasons import CloseReason, refusal_code
from pyforwarder.routing import NEED_MORE, End, Refuse, Route
from pyforwarder.worker.connector import CONNECT_ERRORS
from pyforwarder.worker.resolver import Resolver, addresses_of

if TYPE_CHECKING:
    from pyforwarder.datapath.table import PairWindow
    from pyforwarder.limits import SharedLimits
    from pyforwarder.loop import Loop
    from pyforwarder.upstreams import Balancer, ServerState
    from pyforwarder.worker.generation import Generation, ListenerState
    from pyforwarder.worker.log import ConnectionLog

# RFC 4787 REQ-5: a mapping must live for two minutes of silence; a longer one only helps those who
# send from made-up addresses to fill the table.
IDLE_S: Final = 120.0
IDLE_CHECKS: Final = 8
MOST_BYTES: Final = 65535
# What one session may have waiting while the name of its server is being resolved.
MOST_WAITING: Final = 16
# How many datagrams one socket gets served before the others have their turn.
BATCH: Final = 64

_IPV6_RECVPKTINFO: Final = 49  # linux/in6.h
_IPV6_PKTINFO: Final = 50
_IP_PKTINFO: Final = 8  # linux/in.h
_PKTINFO4: Final = struct.Struct("=I4s4s")  # ifindex, local address, header's destination
_PKTINFO6: Final = struct.Struct("=16sI")  # address, ifindex
_ANCILLARY_BYTES: Final = 64

Key = tuple[str, int, bytes]  # the client's address, and ours as the packet named it


class Session(Timed):
    """One client's datagrams to one server, and back."""

    __slots__ = (
        "accepted_s",
        "active_s",
        "balancer",
        "candidates",
        "counts_client",
        "destination",
        "down_bytes",
        "down_packets",
        "id",
        "key",
        "kind",
        "life_ended",
        "listener",
        "owner",
        "peer",
        "reason",
        "route",
        "server_opened",
        "server_state",
        "slot",
        "sock",
        "up_bytes",
        "up_packets",
        "waiting",
    )

    pair_reason = PairReason.DATAGRAMS

    def __init__(self, owner: DatagramServer, port: _Port, key: Key, route: Route) -> None:
        super().__init__()
        self.owner = owner
        self.listener = port
        self.key = key
        self.route = route
        self.peer = Address(key[0], key[1])
        self.id = 0
        self.slot = -1
        self.kind = DatapathKind.COPY
        self.accepted_s = self.active_s = owner.loop.now_s
        self.sock: socket.socket | None = None
        self.destination: Address | HostPort | UnixAddress | None = None
        self.balancer: Balancer | None = None
        self.server_state: ServerState | None = None
        self.server_opened = False
        self.counts_client = False
        self.reason: CloseReason | None = None
        self.life_ended = False
        self.waiting: list[bytes] = []
        self.up_bytes = self.down_bytes = 0
        self.up_packets = self.down_packets = 0

    def expired(self) -> None:
        """Time to look whether anybody still speaks."""
        self.owner.look_at_idle(self)

    def source_address(self) -> Address | None:
        """Where datagrams to the server come from."""
        if self.sock is None:
            return None
        name = self.sock.getsockname()
        return Address(name[0], name[1])

    @property
    def listener_name(self) -> str:
        """The listener that received it, for the log."""
        return self.listener.state.config.name

    @property
    def rule_name(self) -> bytes:
        """The rule that took it, for the table and the log."""
        return self.listener.state.rule_names[self.route.rule.index]


class _Port:
    """One UDP listener: its socket, and the configuration in force for new sessions."""

    def __init__(self, sock: socket.socket, state: ListenerState) -> None:
        self.sock = sock
        self.state = state
        self.sessions: dict[Key, Session] = {}
        # A wildcard socket must answer from the address that was asked, or the client will not
        # know the answer.
        self.is_wildcard = state.endpoint is None


class DatagramServer:
    """All UDP listeners and sessions of one worker."""

    def __init__(
        self,
        loop: Loop,
        *,
        counters: memoryview,
        limits: SharedLimits,
        window: PairWindow,
        log: ConnectionLog,
        next_id: Callable[[], int],
        most_sessions: int,
    ) -> None:
        """`next_id` also counts the session as accepted."""
        self.loop = loop
        self._counters = counters
        self._limits = limits
        self._window = window
        self._log = log
        self._next_id = next_id
        self._most_sessions = most_sessions
        self._resolver = Resolver(loop)
        self._ports: dict[str, _Port] = {}
        self._sessions: dict[int, Session] = {}
        self._buffer = bytearray(MOST_BYTES)
        self._view = memoryview(self._buffer)

    # Listeners

    def listen(self, name: str, sock: socket.socket, state: ListenerState) -> None:
        """Serve this socket under this configuration; sessions of the name go on.

        The socket is ours from here on. A socket of the same name is replaced.
        """
        port = self._ports.get(name)
        if port is None:
            self._ports[name] = port = _Port(sock, state)
        else:
            self.loop.forget(port.sock.fileno())
            port.sock.close()
            port.sock, port.state = sock, state
        self.loop.watch(sock.fileno(), EPOLLIN, self._readable, port)

    def keep_only(self, names: Sequence[str]) -> None:
        """Close the listeners that are not among `names`, and end their sessions."""
        for name in [name for name in self._ports if name not in names]:
            port = self._ports.pop(name)
            for session in list(port.sessions.values()):
                self.end(session, CloseReason.SHUTDOWN)
            self.loop.forget(port.sock.fileno())
            port.sock.close()

    # From clients

    def _readable(self, port: _Port, _fd: int, _mask: int) -> None:
        for _ in range(BATCH):
            local = b""
            try:
                if port.is_wildcard:
                    size, ancillary, _, name = port.sock.recvmsg_into(
                        [self._buffer], _ANCILLARY_BYTES
                    )
                    local = _local_address(ancillary)
                else:
                    size, name = port.sock.recvfrom_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer: nobody is there to tell
            key = (name[0], name[1], local)
            session = port.sessions.get(key)
            if session is None:
                self._open(port, key, bytes(self._view[:size]))
            else:
                self._send_up(session, self._view[:size])

    def _open(self, port: _Port, key: Key, data: bytes) -> None:
        """The first datagram of a client decides."""
        state = port.state
        counters = self._counters
        client = Address(key[0], key[1])
        decision = state.ruleset.decide(
            data,
            client=client,
            local_port=state.local_port,
            end=End.FULL,
            now_unix_s=time.time() if state.ruleset.needs_clock else None,  # noqa: TID251 - expiry
            state=state.ruleset.begin(),
        )
        if isinstance(decision, Route):
            session = Session(self, port, key, decision)
            session.id = self._next_id()
            counters[state.counter + ListenerCounter.ACCEPTED] += 1
            rule_counter = state.rule_counters[decision.rule.index]
            if not self._admit(session):
                counters[rule_counter + RuleCounter.REFUSED] += 1
                self._refuse(session, CloseReason.BUSY)
                return
            counters[rule_counter + RuleCounter.TAKEN] += 1
            counters[state.counter + ListenerCounter.OPEN] += 1
            counters[Counter.OPEN] += 1
            counters[Counter.PAIRS_OPEN] += 1
            counters[Counter.PAIRS_OPENED] += 1
            self._limits.add_pair()
            port.sessions[key] = session
            self._sessions[session.id] = session
            self._show(session, PairState.CONNECTING)
            first = data[decision.skip :]
            if first or not decision.skip:
                session.waiting.append(first)
            self._choose(session)
            return
        # Not ours to serve: one word if the protocol has one, never more than was sent.
        reason = CloseReason.NO_MATCH
        if isinstance(decision, Refuse):
            reason = decision.reason
            if decision.reply and len(decision.reply) <= len(data):
                self._send_down(port, key, decision.reply)
        elif decision is not NEED_MORE:
            reason = CloseReason.MALFORMED  # a dialogue needs a stream
        self._next_id()
        counters[state.counter + ListenerCounter.ACCEPTED] += 1
        counters[state.counter + ListenerCounter.REFUSED] += 1
        counters[CLOSED_INDEX[reason]] += 1

    def _admit(self, session: Session) -> bool:
        limits = session.listener.state.generation.limits
        if len(self._sessions) >= self._most_sessions or self._limits.pairs >= limits.pairs:
            return False
        if limits.new_per_second and not self._limits.admit_this_second(
            limits.new_per_second, self.loop.now_s
        ):
            return False
        if limits.pairs_per_client:
            session.counts_client = self._limits.add_client(
                session.peer.host, limits.pairs_per_client
            )
            return session.counts_client
        return True

    def _refuse(self, session: Session, reason: CloseReason) -> None:
        """Tell a client that has no session (yet) why not, if its protocol has words for it."""
        negotiation = session.route.negotiation
        if negotiation is not None:
            answer = negotiation.refused(refusal_code(reason))
            if answer:
                self._send_down(session.listener, session.key, answer)
        if session.id in self._sessions:
            self.end(session, reason)
        else:
            counter = session.listener.state.counter
            self._counters[counter + ListenerCounter.REFUSED] += 1
            self._counters[CLOSED_INDEX[reason]] += 1

    # To a server

    def _choose(self, session: Session) -> None:
        to = session.route.to
        generation = session.listener.state.generation
        if isinstance(to, str):
            session.balancer = generation.balancers[to]
            chosen = session.balancer.choose(session.peer.host, self.loop.now_s)
            if chosen is None:
                self._refuse(session, CloseReason.UNREACHABLE)
                return
            session.server_state = chosen
            session.balancer.hold(chosen)
            to = chosen.address
        session.destination = to
        self.loop.deadlines.start(session, generation.connect_s, self.loop.now_s)
        if isinstance(to, UnixAddress):
            self._refuse(session, CloseReason.UNREACHABLE)
        elif isinstance(to, HostPort):
            if not self._resolver.resolve(to.name, self._resolved(session, to)):
                self._refuse(session, CloseReason.BUSY)
        else:
            self._connect(session, generation, [to])

    def _resolved(self, session: Session, to: HostPort) -> Callable[[list[str]], None]:
        def answer(hosts: list[str]) -> None:
            if session.life_ended or session.sock is not None:
                return
            addresses = addresses_of(hosts, to.port)
            if addresses:
                self._connect(session, session.listener.state.generation, addresses)
            else:
                self._refuse(session, CloseReason.UNRESOLVED)

        return answer

    def _connect(
        self, session: Session, generation: Generation, addresses: Sequence[Address]
    ) -> None:
        for address in addresses:
            if not generation.permits(session.route.rule, address, self.loop.now_s, protocol="udp"):
                self._refuse(session, CloseReason.DENIED)
                return
        reason = CloseReason.UNREACHABLE
        for address in addresses:
            family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                reason = CONNECT_ERRORS.get(error.errno or 0, CloseReason.UNREACHABLE)
                break
            try:
                to = session.route.to
                if isinstance(to, str):
                    source = generation.upstreams[to].source_for(session.id, family)
                    if source:
                        sock.bind((source, 0))
                sock.connect(address)
            except OSError as error:
                sock.close()
                reason = CONNECT_ERRORS.get(error.errno or 0, CloseReason.UNREACHABLE)
                continue
            session.sock = sock
            session.destination = address
            self._established(session)
            return
        if session.balancer is not None and session.server_state is not None:
            session.balancer.failed(session.server_state, self.loop.now_s)
        self._refuse(session, reason)

    def _established(self, session: Session) -> None:
        assert session.sock is not None
        if session.balancer is not None and session.server_state is not None:
            session.balancer.opened(session.server_state)
            session.server_opened = True
        self.loop.watch(session.sock.fileno(), EPOLLIN, self._answered, session)
        self._watch_idle(session)
        self._show(session, PairState.JOINED)
        self._counters[Counter.JOINED_COPY] += 1
        negotiation = session.route.negotiation
        if negotiation is not None:
            name = session.sock.getsockname()
            answer = negotiation.granted(Address(name[0], name[1]))
            if answer:
                self._send_down(session.listener, session.key, answer)
        waiting, session.waiting = session.waiting, []
        for datagram in waiting:
            self._send_up(session, datagram)

    def _send_up(self, session: Session, datagram: bytes | memoryview) -> None:
        if session.sock is None:
            if len(session.waiting) < MOST_WAITING:
                session.waiting.append(bytes(datagram))
            else:
                self._counters[Counter.DATAGRAMS_LOST] += 1
            return
        try:
            session.sock.send(datagram)
        except OSError as error:
            self._failed(session, error)
            return
        session.up_bytes += len(datagram)
        session.up_packets += 1
        self._moved(session, 0, session.up_bytes, session.up_packets)

    # From a server

    def _answered(self, session: Session, _fd: int, _mask: int) -> None:
        assert session.sock is not None
        for _ in range(BATCH):
            try:
                size = session.sock.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(session, error)
                return
            if self._send_down(session.listener, session.key, self._view[:size]):
                session.down_bytes += size
                session.down_packets += 1
                self._moved(session, 1, session.down_bytes, session.down_packets)

    def _send_down(self, port: _Port, key: Key, data: bytes | memoryview) -> bool:
        """Whether the datagram went out; one that does not is lost, as on any path."""
        try:
            port.sock.sendmsg([data], _from_address(key[2]), 0, key[:2])
        except OSError:
            self._counters[Counter.DATAGRAMS_LOST] += 1
            return False
        return True

    def _failed(self, session: Session, error: OSError) -> None:
        """A send or receive went wrong: a full queue loses a datagram, the rest end the session."""
        if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE, errno.EPERM):
            self._counters[Counter.DATAGRAMS_LOST] += 1
            return
        if session.balancer is not None and session.server_state is not None:
            session.balancer.failed(session.server_state, self.loop.now_s)
        self.end(session, CONNECT_ERRORS.get(error.errno or 0, CloseReason.UNREACHABLE))

    # Life

    def _moved(self, session: Session, direction: int, count: int, packets: int) -> None:
        session.active_s = self.loop.now_s
        if session.slot >= 0:
            now_ns = int(self.loop.now_s * 1e9)
            self._window.count(session.slot, direction, count, packets, now_ns)

    def _watch_idle(self, session: Session) -> None:
        limit_s = min(IDLE_S, session.listener.state.generation.config.timeouts.idle_s)
        self.loop.deadlines.start(session, limit_s / IDLE_CHECKS, self.loop.now_s)

    def look_at_idle(self, session: Session) -> None:
        """The session's timer: silent for too long, or not connected in time."""
        if session.sock is None:
            self._refuse(session, CloseReason.TIMEOUT)
            return
        limit_s = min(IDLE_S, session.listener.state.generation.config.timeouts.idle_s)
        if self.loop.now_s - session.active_s >= limit_s:
            self.end(session, CloseReason.IDLE)
        else:
            self._watch_idle(session)

    def end(self, session: Session, reason: CloseReason) -> None:
        """Forget the session; UDP has no way to tell anybody."""
        if session.life_ended:
            return
        session.life_ended = True
        session.reason = reason
        counters = self._counters
        state = session.listener.state
        counters[CLOSED_INDEX[reason]] += 1
        counters[Counter.OPEN] -= 1
        counters[Counter.PAIRS_OPEN] -= 1
        counters[state.counter + ListenerCounter.OPEN] -= 1
        counters[Counter.UP_BYTES] += session.up_bytes
        counters[Counter.DOWN_BYTES] += session.down_bytes
        self._limits.remove_pair()
        if session.counts_client:
            self._limits.remove_client(session.peer.host)
        if session.balancer is not None and session.server_state is not None:
            if session.server_opened:
                session.balancer.closed(session.server_state)
            session.balancer.release(session.server_state)
        self.loop.deadlines.stop(session)
        self._log.closed(
            session,
            (session.up_bytes, session.up_packets),
            (session.down_bytes, session.down_packets),
        )
        if session.sock is not None:
            self.loop.close(session.sock.detach())
        if session.slot >= 0:
            self._window.release(session.slot)
            session.slot = -1
        del session.listener.sessions[session.key]
        del self._sessions[session.id]

    def flush_ids(self, ids: list[int] | None) -> list[int]:
        """End the sessions with these ids, or all (None); the ids that were found."""
        wanted = None if ids is None else set(ids)
        found = [s for s in self._sessions.values() if wanted is None or s.id in wanted]
        for session in found:
            self.end(session, CloseReason.FLUSHED)
        return [session.id for session in found]

    def end_all(self, reason: CloseReason) -> None:
        """End every session and listen no more."""
        for session in list(self._sessions.values()):
            self.end(session, reason)
        self.keep_only(())

    def _show(self, session: Session, state: PairState) -> None:
        if session.slot < 0:
            session.slot = self._window.allocate()
            if session.slot < 0:
                return
        listener = session.listener.state
        own = listener.endpoint
        if own is None:
            local = session.key[2]
            host = socket.inet_ntop(socket.AF_INET6 if len(local) == 16 else socket.AF_INET, local)
            own = pack_endpoint(Address(host, listener.local_port))
        to = session.destination
        self._window.describe(
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
            datapath=DatapathKind.COPY,
            reason=session.pair_reason,
        )


def adopt_datagram_socket(fd: int, *, ipv6: bool, wildcard: bool) -> socket.socket:
    """A bound UDP socket from its descriptor, which is the socket's from here on."""
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM, 0, fd)
    os.set_blocking(fd, False)
    sock.setblocking(False)
    if wildcard:
        if ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    return sock


def _local_address(ancillary: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The address of ours that the packet was sent to (ip(7), ipv6(7)); empty if not told."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return bytes(_PKTINFO4.unpack_from(data)[2])
        if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
            return bytes(_PKTINFO6.unpack_from(data)[0])
    return b""


def _from_address(local: bytes) -> list[tuple[int, int, bytes]]:
    """What makes sendmsg(2) send from that address."""
    if len(local) == 4:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, local, b""))]
    if len(local) == 16:
        return [(socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO6.pack(local, 0))]
    return []
