"""UDP: a session for each client address, decided by its first datagram.

Every datagram is whole, so there is mostly nothing to wait for: a rule that would need more bytes
does not match. Where a protocol's first word may take several datagrams they are held until it is
there (undecided.py), and then go on in their order. A session is a socket of its own, connected to
the server, so that answers find their client and errors their session. It has no end of its own; it
ends when nobody has spoken for a while.

Datagrams are copied with their boundaries, until the kernel has the session (handover.py);
those of one session and size that have come together are sent on together (runs.py). As on any
path, one that finds a full queue is lost; it is counted.

Who sends from made-up addresses can open sessions: they are counted apart from TCP, those whose
client is not heard again end after seconds, and make room for others before that. Who sends twice
from each is taken for a client; nothing in UDP tells them apart.

A session keeps the generation of the configuration that it was opened under.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address, HostPort, NameIn, SamePort, UnixAddress
from pyforwarder.core.eyeballs import MOST_ATTEMPTS, interleave
from pyforwarder.core.first_packet.datagrams import Datagrams, datagrams_in
from pyforwarder.core.first_packet.quic_ids import id_of_server
from pyforwarder.core.reasons import CloseReason, refusal_code
from pyforwarder.core.routing import NEED_MORE, Claim, Decision, End, Refuse, Route, Rule
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import NAME_BYTES, DatapathKind, PairState, pack_endpoint
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    LIMITED_INDEX,
    Counter,
    ListenerCounter,
    RuleCounter,
    change,
    count_connect,
    count_disconnect,
    count_failure,
)
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLERR, EPOLLIN, Timed
from pyforwarder.runtime.refusals import count_refusal
from pyforwarder.runtime.resolver import KEEP_S, MOST_ADDRESSES, TooManyNamesError, addresses_of
from pyforwarder.runtime.sockaddr import sockaddr
from pyforwarder.worker.connector import CONNECT_ERRORS
from pyforwarder.worker.udp.client_addresses import ClientAddresses
from pyforwarder.worker.udp.connection_ids import Way
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE, Endings
from pyforwarder.worker.udp.handover import SessionHandover
from pyforwarder.worker.udp.icmp_errors import Refusal, refusals, want_errors
from pyforwarder.worker.udp.runs import MOST_DATAGRAM_BYTES, UNSEGMENTED, Run, send_segments
from pyforwarder.worker.udp.standing import (
    STEADY_AFTER_S,
    UNCONFIRMED_IDLE_S,
    Standing,
    Standings,
)
from pyforwarder.worker.udp.undecided import Undecided, UndecidedClients

if TYPE_CHECKING:
    from pyforwarder.core.address import ServerAddress
    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.core.upstreams import Balancer, ServerState
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.sessions import Place, SessionOrphan, SpliceSessions
    from pyforwarder.runtime.limits import SharedLimits
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.runtime.resolver import Names, Wait
    from pyforwarder.worker.generation import ListenerState, UpstreamState
    from pyforwarder.worker.log import ConnectionLog
    from pyforwarder.worker.token_claims import TokenClaims
    from pyforwarder.worker.udp.connection_ids import ConnectionIds

IDLE_CHECKS: Final = 8
# What one session may have waiting while the name of its server is being resolved, and what all
# sessions of a worker may. A first datagram of an ordinary size always may: sessions are bounded.
MOST_WAITING: Final = 16
MOST_WAITING_BYTES: Final = 64 * 1024
MOST_WAITING_BYTES_OF_ALL: Final = 8 * 1024 * 1024
ORDINARY_BYTES: Final = 1500
# A server says its connection id in its first answers, until the handshake is done.
LEARN_FROM: Final = 16
# How often a datagram is tried: what the kernel answers may be about an earlier one.
TRIES: Final = 3
# A server that has answered is gone once it has refused so many datagrams, and answered none: its
# address may be forged, too.
REFUSALS_OF_A_SERVER: Final = 3
# And one that has answered anybody so lately is not ejected for a refusal.
ANSWERED_LATELY_S: Final = 2.0
# How many datagrams one socket gets served before the others have their turn.
BATCH: Final = 64

_IPV6_RECVPKTINFO: Final = 49  # linux/in6.h
_IPV6_PKTINFO: Final = 50
_IP_PKTINFO: Final = 8  # linux/in.h
_PKTINFO4: Final = struct.Struct("=I4s4s")  # ifindex, local address, header's destination
_PKTINFO6: Final = struct.Struct("=16sI")  # address, ifindex
_ANCILLARY_BYTES: Final = 64

_NEW: Final = Standing.NEW
_STEADY: Final = Standing.STEADY

# The client's address, ours as the packet named it, and the client's scope (the interface, for a
# link-local IPv6 address, ipv6(7); else 0): without it no answer finds the way, and clients with
# one address on two links are two.
Key = tuple[str, int, bytes, int]


class Session(Timed):
    """One client's datagrams to one server, and back."""

    __slots__ = (
        "accepted_s",
        "active_s",
        "address_asked",
        "answered_s",
        "asking",
        "candidates",
        "client_keys",
        "destination",
        "down_bytes",
        "down_packets",
        "earns",
        "facts",
        "groups",
        "heard_bytes",
        "id",
        "ids",
        "is_spliced_by_name",
        "key",
        "kind",
        "learning",
        "life_ended",
        "listener",
        "most_segment",
        "over_limit",
        "owner",
        "pair_reason",
        "peer",
        "place",
        "proxy_header",
        "reason",
        "refusal",
        "refused",
        "route",
        "server_opened",
        "server_state",
        "slot",
        "sock",
        "source",
        "standing",
        "state",
        "told_bytes",
        "up_bytes",
        "up_packets",
        "upstream",
        "waiting",
        "waiting_bytes",
        "way",
    )

    has_sent_nothing = False

    def __init__(
        self, owner: DatagramServer, port: DatagramPort, key: Key, route: Route, heard_bytes: int
    ) -> None:
        """`heard_bytes`: of the client's first datagram."""
        super().__init__()
        self.owner = owner
        self.listener = port
        # The port may have another by the time the session ends.
        self.state = port.state
        self.key = key
        self.route = route
        self.facts = route.facts
        self.peer = Address(key[0], key[1])
        self.id = 0
        self.slot = -1
        self.kind = DatapathKind.COPY
        self.pair_reason = PairReason.DATAGRAMS
        self.earns = False  # it may be handed over to the kernel
        self.is_spliced_by_name = False  # the configuration says `splice`, not `auto`
        self.place: Place | None = None  # there
        self.accepted_s = self.active_s = owner.loop.now_s
        self.answered_s = -math.inf  # when our socket last got something of the server
        self.sock: socket.socket | None = None
        self.destination: Address | HostPort | UnixAddress | None = None
        self.source: Address | None = None
        self.upstream: UpstreamState | None = None
        self.server_state: ServerState | None = None
        self.server_opened = False
        self.client_keys: tuple[int, ...] = ()
        self.over_limit: Limit | None = None
        self.standing = Standing.NEW
        self.groups: tuple[Hashable, ...] = ()
        # What the client has sent and been sent: only kept while `standing` is NEW.
        self.heard_bytes = heard_bytes
        self.told_bytes = 0
        self.reason: CloseReason | None = None
        self.refusal = ""  # why it got no server, in words for the log
        # How often the server has refused a datagram since it last answered, and how many datagrams
        # had gone up and down then.
        self.refused = (0, 0, 0)
        self.life_ended = False
        self.asking: Wait | None = None  # for the server's name
        self.address_asked = 0  # the request for a socket with the client's address; 0: none
        # What the server is told about the client, in front of the first datagram; empty once that
        # has been sent.
        self.proxy_header = b""
        # Larger datagrams are sent one by one: more of that size at once do not fit the path.
        self.most_segment = MOST_DATAGRAM_BYTES
        # QUIC: where its connection id has led; those that its server has said, or its client did,
        # and how many answers are looked through for more.
        self.way: Way | None = None
        self.ids: tuple[bytes, ...] = ()
        self.learning = 0
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.up_bytes = self.down_bytes = 0
        self.up_packets = self.down_packets = 0

    def expired(self) -> None:
        """Time to look whether anybody still speaks."""
        self.owner.look_at_idle(self)

    def source_address(self) -> Address | None:
        """Where datagrams to the server come from."""
        return self.source

    def asked_address(self) -> Address:
        """The address of ours that the client has sent to."""
        bind = self.state.bind
        if self.state.endpoint is not None:
            assert isinstance(bind, Address)
            return bind
        local = self.key[2]
        host = socket.inet_ntop(socket.AF_INET6 if len(local) == 16 else socket.AF_INET, local)
        return Address(host, self.state.local_port)

    @property
    def listener_name(self) -> str:
        """The listener that received it, for the log."""
        return self.state.config.name

    @property
    def rule_name(self) -> bytes:
        """The rule that took it, for the table and the log."""
        return self.state.rule_names[self.route.rule.index]


class Refused:
    """A first datagram that gets no session, or a session nobody goes on with, for the log."""

    __slots__ = (
        "accepted_s",
        "facts",
        "id",
        "listener_name",
        "over_limit",
        "owner",
        "peer",
        "reason",
        "refusal",
        "route",
        "rule_name",
    )

    destination = None
    has_sent_nothing = False
    kind = DatapathKind.NONE
    pair_reason = PairReason.DATAGRAMS

    def __init__(
        self,
        owner: DatagramServer,
        state: ListenerState,
        peer: Address,
        rule: Rule | None,
        *,
        session_id: int | None = None,
    ) -> None:
        """`session_id`: of a session that another worker had counted."""
        self.owner = owner
        self.accepted_s = owner.loop.now_s
        self.id = owner.next_id() if session_id is None else session_id
        self.listener_name = state.config.name
        self.rule_name = state.rule_names[rule.index] if rule is not None else b"-"
        self.route: Route | None = None
        self.peer = peer
        self.over_limit: Limit | None = None
        self.reason: CloseReason | None = None
        self.facts: Facts = ()
        self.refusal = ""

    def source_address(self) -> None:
        """Nothing has been sent from anywhere."""


class DatagramPort:
    """One UDP listener: its socket, and the configuration in force for new sessions."""

    def __init__(self, sock: socket.socket, state: ListenerState) -> None:
        self.sessions: dict[Key, Session] = {}
        # Those of which something was copied since the kernel was last told that all was; and what
        # it had counted then (handover.py).
        self.behind: dict[Session, None] = {}
        self.counted: list[tuple[Session, int]] | None = None
        self.take(sock, state)

    def take(self, sock: socket.socket, state: ListenerState) -> None:
        """Go on with this socket and this configuration."""
        self.sock = sock
        self.state = state
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
        names: Names,
        most_sessions: int,
        most_shown: int,
        ids: ConnectionIds,
        ask_supervisor: Callable[[str, list[int], int], None],
        kernel: SpliceSessions | None = None,
        claims: TokenClaims | None = None,
    ) -> None:
        """`next_id` also counts the session as accepted.

        `most_sessions` are bounded by the descriptors that this process may have, `most_shown` by
        the slots of the table that are not kept for TCP. `kernel` may take sessions over.
        `ask_supervisor(what, descriptors, number)` asks for what needs a privilege, and does not
        wait.
        """
        self.loop = loop
        self.counters = counters
        self._limits = limits
        self._window = window
        self.log = log
        self.next_id = next_id
        self.most_sessions = most_sessions
        self._most_shown = most_shown
        self._shown = 0
        self._waiting_bytes = 0
        self._standings: Standings[Session] = Standings()
        self._undecided = UndecidedClients(loop, self._decide_now)
        self._endings = Endings(loop, self._end_some)
        self._ids = ids
        self._claims = claims
        self._client_addresses = ClientAddresses(ask_supervisor)
        self.handover = SessionHandover(self, kernel)
        self._balancers: Mapping[str, Balancer] | None = None  # in force; None: not known
        self._names = names
        self._ports: dict[str, DatagramPort] = {}
        # Datagrams wait in the kernel: another daemon's worker has sessions that are to be ours.
        self.waits_for_sessions = False
        self._sessions: dict[int, Session] = {}
        self._run = Run()

    # Listeners

    def listen(self, name: str, sock: socket.socket, state: ListenerState) -> None:
        """Serve this socket under this configuration; sessions of the name go on.

        The socket is ours from here on. A socket of the same name is replaced.
        """
        port = self._ports.get(name)
        if port is None:
            self._ports[name] = port = DatagramPort(sock, state)
        else:
            self.loop.forget(port.sock.fileno())
            port.sock.close()
            port.take(sock, state)
        self.loop.watch(
            sock.fileno(), 0 if self.waits_for_sessions else EPOLLIN, self._readable, port
        )

    def sessions_have_come(self) -> None:
        """Nobody else has sessions of these listeners any more: read what waits there."""
        self.waits_for_sessions = False
        for port in self._ports.values():
            self.loop.change(port.sock.fileno(), EPOLLIN)

    def listen_no_more(self) -> None:
        """Leave clients' datagrams to another daemon, which has the same sockets.

        Sessions go on sending what their servers answer.
        """
        self._send_run()
        for port in self._ports.values():
            self.loop.forget(port.sock.fileno())

    def keep_only(self, names: Sequence[str]) -> None:
        """Close the listeners that are not among `names`, and end their sessions."""
        for name in [name for name in self._ports if name not in names]:
            port = self._ports.pop(name)
            self.end_many(port.sessions.values(), CloseReason.SHUTDOWN)
            self.counters[Counter.DATAGRAMS_LOST] += self._undecided.forget_all(port)
            self.loop.forget(port.sock.fileno())
            port.sock.close()

    # From clients

    def _readable(self, port: DatagramPort, _fd: int, _mask: int) -> None:
        run = self._run
        port.counted = None
        for _ in range(BATCH):
            local = b""
            try:
                if port.is_wildcard:
                    size, ancillary, _, name = port.sock.recvmsg_into([run.room], _ANCILLARY_BYTES)
                    local = _local_address(ancillary)
                else:
                    size, name = port.sock.recvfrom_into(run.room)
            except BlockingIOError:
                if self.handover.is_quiet(port):
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
                    self._send_run()  # its session may have to make room
                    self._open(port, key, bytes(datagram))
                else:
                    if session.standing is not _STEADY:
                        self._standings.heard(session, self.loop.now_s)
                        if session.slot < 0:
                            self._show_again(session)
                    if run.goes_on(session, size):
                        continue
                    self._send_run()
                    if session.sock is not None and self._may_run(session, size):
                        run.begin(session, size)
                    else:
                        self._send_up(session, datagram)
            except Exception as error:
                self._blame(port, key, error)
        self._send_run()

    @staticmethod
    def _may_run(session: Session, size: int) -> bool:
        """Whether the datagram may wait for the others that have come with it."""
        # Not of one that the kernel has as well: of those each is counted.
        return (
            session.place is None and 0 < size <= session.most_segment and not session.proxy_header
        )

    def _send_run(self) -> None:
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
                    self._send_up(session, datagram)
        except Exception as error:
            self._blame(session.listener, session.key, error)
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
                self.counters[Counter.DATAGRAMS_LOST] += run.count
                return True
            if error.errno in UNSEGMENTED:
                session.most_segment = run.size - 1
            return False
        session.up_bytes += len(run.data)
        session.up_packets += run.count
        self._moved(session, 0, session.up_bytes, session.up_packets)
        return True

    def _open(self, port: DatagramPort, key: Key, datagram: bytes) -> None:
        """A client without a session has sent a datagram."""
        if port.state.ruleset.followed and self._follow(port, key, datagram):
            return
        undecided = self._undecided.get(port, key)
        if undecided is not None and undecided.claim is not None:
            count, size_bytes = len(undecided.datagrams), undecided.size_bytes
            if self._undecided.may_wait(port, count, size_bytes):
                self._undecided.hold(port, key, datagram)
            else:
                self.counters[Counter.DATAGRAMS_LOST] += 1
            return
        if undecided is None:
            count, size_bytes, data = 1, len(datagram), datagram
        else:
            data = Datagrams((*undecided.datagrams, datagram))
            count, size_bytes = len(data.all), undecided.size_bytes + len(datagram)
        ruleset = port.state.ruleset
        may_wait = ruleset.spans_datagrams and self._undecided.may_wait(port, count, size_bytes)
        decision = self._decide(port, key, data, End.OPEN if may_wait else End.FULL)
        if decision is NEED_MORE:
            self._undecided.hold(port, key, datagram)
            return
        if isinstance(decision, Claim):
            self._claim(port, key, datagram, decision)
            return
        if undecided is not None:
            self._undecided.forget(undecided)
        self._act(port, key, data, decision)

    def _claim(self, port: DatagramPort, key: Key, datagram: bytes, claim: Claim) -> None:
        """Have a token used up in the fleet; what the client sends meanwhile waits."""
        self._undecided.hold(port, key, datagram)
        undecided = self._undecided.get(port, key)
        if undecided is None:  # it had to make room at once
            return
        undecided.claim = claim

        def answer(is_first: bool | None) -> None:
            if self._undecided.get(port, key) is undecided:
                self._claimed(undecided, is_first)

        asked = self._claims and self._claims.ask(
            claim.digest, until_unix_s=claim.until_unix_s, wait_s=claim.wait_s, answer=answer
        )
        if asked is None:
            self._claimed(undecided, None)

    def _claimed(self, undecided: Undecided, is_first: bool | None) -> None:
        port, key, claim = undecided.port, undecided.key, undecided.claim
        assert claim is not None
        self._undecided.forget(undecided)
        try:
            self._act(port, key, Datagrams(undecided.datagrams), claim.then(is_first))
        except Exception as error:
            self._blame(port, key, error)

    def _decide_now(self, undecided: Undecided) -> None:
        """The client has sent no more in time, or has to make room for another."""
        if undecided.claim is not None:
            self._claimed(undecided, None)
            return
        port, key = undecided.port, undecided.key
        self._undecided.forget(undecided)
        data = Datagrams(undecided.datagrams)
        try:
            self._act(port, key, data, self._decide(port, key, data, End.TIMEOUT))
        except Exception as error:
            self._blame(port, key, error)

    def _decide(self, port: DatagramPort, key: Key, data: bytes, end: End) -> Decision:
        state = port.state
        return state.ruleset.decide(
            data,
            client=Address(key[0], key[1]),
            local_port=state.local_port,
            end=end,
            now_unix_s=time.time() if state.ruleset.needs_clock else None,  # noqa: TID251 - expiry
            state=state.ruleset.begin(),
        )

    def _blame(self, port: DatagramPort, key: Key, error: Exception) -> None:
        """The socket is everybody's: a fault costs the session that it happened to."""
        self.log.internal_error(error)
        session = port.sessions.get(key)
        if session is not None:
            self.end(session, CloseReason.INTERNAL)

    def _follow(self, port: DatagramPort, key: Key, datagram: bytes) -> bool:
        """Whether a connection id leads to a server: then the client has a session with that.

        It is a session of its own, by another socket. So the server sees that the address has
        changed, and has the client prove it (RFC 9000 section 9); one who has only seen the id
        turns nobody's answers away.
        """
        state = port.state
        found = self._ids.find(datagram, listener=state.counter, now_s=self.loop.now_s)
        if found is None:
            return False
        connection_id, way = found
        route = followed_route(state, way)
        if route is None:
            return False
        self._act(port, key, datagram, route, way)
        session = port.sessions.get(key)
        if session is not None:
            self._ids.learn(connection_id, way, self.loop.now_s)
            session.ids = (connection_id,)
        return True

    def _act(
        self,
        port: DatagramPort,
        key: Key,
        data: bytes,
        decision: Decision,
        way: Way | None = None,
    ) -> None:
        """Do with a client's first datagrams what has been decided."""
        state = port.state
        counters = self.counters
        client = Address(key[0], key[1])
        first, *later = datagrams_in(data)
        if isinstance(decision, Route):
            counters[state.counter + ListenerCounter.ACCEPTED] += 1
            heard_bytes = len(first) + sum(map(len, later))
            session = Session(self, port, key, decision, heard_bytes)
            session.way = way
            session.facts = (*decision.facts, *state.ruleset.facts(decision.rule, data))
            limit = self._admit(session)
            if limit is not None:
                counters[LIMITED_INDEX[limit]] += 1
                self._say_no(session, CloseReason.BUSY)
                refused = Refused(self, state, client, decision.rule)
                refused.route, refused.facts = decision, session.facts
                refused.over_limit = limit
                self._turn_away(refused, state, decision.rule, CloseReason.BUSY)
                return
            session.id = self.next_id()
            rule_counter = state.rule_counters[decision.rule.index]
            counters[rule_counter + RuleCounter.TAKEN] += 1
            counters[Counter.PAIRS_OPENED] += 1
            self._enter(session)
            self._show(session, PairState.CONNECTING)
            payload = first[decision.skip :]
            if payload or not decision.skip:
                self._hold(session, payload)
            for datagram in later:
                self._hold(session, datagram)
            self._choose(session)
            return
        # Not ours to serve: one word if the protocol has one, never more than was sent.
        rule = decision.rule if isinstance(decision, Refuse) else None
        refused = Refused(self, state, client, rule)
        if isinstance(decision, Refuse):
            reason = decision.reason
            refused.refusal = decision.cause
            refused.facts = (*state.ruleset.read(data), *decision.facts)
            if decision.reply and len(decision.reply) <= len(first):
                self._send_down(port, key, decision.reply)
        else:
            reason = CloseReason.MALFORMED
            refused.refusal = "the protocol is a dialogue, which needs a stream"
        counters[state.counter + ListenerCounter.ACCEPTED] += 1
        self._turn_away(refused, state, rule, reason)

    def _enter(self, session: Session) -> None:
        """Count a session that has its id among those that are open; `end` takes it out."""
        counters, state = self.counters, session.state
        counters[state.counter + ListenerCounter.OPEN] += 1
        counters[Counter.OPEN] += 1
        counters[Counter.PAIRS_OPEN] += 1
        self._limits.add_session(state.counter)
        session.groups = (None, session.listener, *session.client_keys)
        self._standings.add(session)
        session.listener.sessions[session.key] = session
        self._sessions[session.id] = session

    def take_in(self, orphans: Sequence[SessionOrphan]) -> int:
        """Go on with sessions that have lost their worker; how many of them do.

        Their sockets are ours from here on. Those that the configuration would not have any more,
        and those that nobody here can speak for, end.
        """
        taken = []
        for orphan in orphans:
            try:
                session = self._take_in(orphan)
            except Exception as error:
                # What a dead worker has left may be anything: it costs that session alone.
                self.log.internal_error(error)
                session = self._sessions.get(orphan.id)
                if session is not None and session.sock is orphan.server:
                    self.end(session, CloseReason.INTERNAL)
                self.handover.end_orphan(orphan)
                session = None
            if session is not None:
                taken.append(session)
        # Not before all are known: the listener's queue has datagrams of all clients', and whose
        # session is not known yet gets a second one.
        for session in taken:
            if not session.life_ended:
                self.look_at_both(session)
        return len(taken)

    def _take_in(self, orphan: SessionOrphan) -> Session | None:
        port = self._port_of(orphan)
        if port is None:
            self.handover.end_orphan(orphan)
            return None
        host, number = orphan.client
        local = ipaddress.ip_address(orphan.local[0]).packed if port.is_wildcard else b""
        key = (host, number, local, 0)
        route = route_of(port.state, orphan, self.loop.now_s)
        if key in port.sessions or orphan.id in self._sessions:
            route = CloseReason.INTERNAL, "there is another session of that client or number"
        if not isinstance(route, Route):
            self._end_orphan(port.state, orphan, *route)
            return None
        session = Session(self, port, key, route, 0)
        session.id = orphan.id
        session.sock = orphan.server
        session.source = Address(*orphan.server.getsockname()[:2])
        session.destination = Address(*orphan.server.getpeername()[:2])
        is_copied = orphan.index < 0
        if not is_copied:
            session.kind = DatapathKind.SPLICE
            session.pair_reason = PairReason.GOES_ON
        record = orphan.record
        if record is not None:
            session.accepted_s = record.started_ns / 1e9
            up, down = record.worker
            session.up_bytes, session.up_packets = up.carried_bytes, up.carried_packets
            session.down_bytes, session.down_packets = down.carried_bytes, down.carried_packets
        answer = self._limits.admit(host, port.state.scopes, self.loop.now_s)
        if not isinstance(answer, Limit):  # it is no new one: it may be one too many
            session.client_keys = answer
        self._enter(session)
        self._standings.heard(session, self.loop.now_s)
        self._hold_server(session)
        want_errors(session.sock)
        self.loop.watch(session.sock.fileno(), EPOLLIN, self._answered, session)
        self._watch_idle(session)
        self._show(session, PairState.JOINED)
        for direction, count, packets in (
            (0, session.up_bytes, session.up_packets),
            (1, session.down_bytes, session.down_packets),
        ):
            if session.slot >= 0:
                self._window.count(session.slot, direction, count, packets, 0)
        if is_copied:
            self.handover.established(session)
        elif not self.handover.go_on_with(session, orphan):
            self.end(session, CloseReason.INTERNAL)
            return None
        return session

    def _end_orphan(
        self, state: ListenerState, orphan: SessionOrphan, reason: CloseReason, cause: str
    ) -> None:
        """Nobody goes on with a session: say why, and what it has carried."""
        refused = Refused(self, state, Address(*orphan.client), None, session_id=orphan.id)
        refused.reason, refused.refusal = reason, cause
        up, down = (0, 0), (0, 0)
        record = orphan.record
        if record is not None:
            refused.rule_name = record.rule
            refused.accepted_s = record.started_ns / 1e9
            up, down = [(flow.carried_bytes, flow.carried_packets) for flow in record.worker]
        more_up, more_down = self.handover.end_orphan(orphan)
        self._count_end(state, None, reason, is_served=True)
        self.log.closed(
            refused,
            (up[0] + more_up[0], up[1] + more_up[1]),
            (down[0] + more_down[0], down[1] + more_down[1]),
        )

    def _port_of(self, orphan: SessionOrphan) -> DatagramPort | None:
        """Where its client speaks to; under whatever name."""
        host, number = orphan.local
        is_ipv6 = ":" in host
        for port in self._ports.values():
            bind = port.state.bind
            if (
                isinstance(bind, Address)
                and (bind.port, bind.is_ipv6) == (number, is_ipv6)
                and (port.is_wildcard or bind.host == host)
            ):
                return port
        return None

    def _hold_server(self, session: Session) -> None:
        """Count a session that goes on for its server."""
        to = session.route.rule.to
        if not isinstance(to, str):
            return
        assert isinstance(session.destination, Address)
        upstream = session.state.generation.upstreams[to]
        server = _server_of(upstream, session.destination, session.state.local_port)
        if server is not None:
            session.upstream, session.server_state = upstream, server
            upstream.balancer.hold(server)
            upstream.balancer.opened(server)
            count_connect(self.counters, server.counter)
            session.server_opened = True

    def _turn_away(
        self, refused: Refused, state: ListenerState, rule: Rule | None, reason: CloseReason
    ) -> None:
        """Count and log a first datagram that gets no session."""
        refused.reason = reason
        self._count_end(state, rule, reason, is_served=False)
        self.log.closed(refused, (0, 0), (0, 0))

    def _count_end(
        self, state: ListenerState, rule: Rule | None, reason: CloseReason, *, is_served: bool
    ) -> None:
        self.counters[CLOSED_INDEX[reason]] += 1
        if not is_served:
            count_refusal(
                self.counters,
                reason,
                listener=state.counter,
                rule=state.rule_counters[rule.index] if rule is not None else None,
            )

    def _admit(self, session: Session) -> Limit | None:
        """The limit that the session is one too many for, once others have made room; None: none.

        What it counts for from here on is given back by `end`.
        """
        state, now_s = session.state, self.loop.now_s
        host = session.peer.host
        answer = self._limits.admit(host, state.scopes, now_s)
        # Somebody else may have used the client's address: its own unconfirmed ones go first.
        if answer is Limit.SESSIONS_PER_CLIENT and self._make_room_of_client(host, state):
            answer = self._limits.admit(host, state.scopes, now_s)
        if isinstance(answer, Limit):
            return answer
        limit = None
        if state.most_here and self._limits.count(state.counter) >= state.most_here:
            limit = None if self._make_room(session.listener) else Limit.SESSIONS
        elif self._limits.sessions >= state.generation.most_sessions:
            limit = None if self._make_room(None) else Limit.SESSIONS
        elif len(self._sessions) >= self.most_sessions:
            limit = None if self._make_room(None) else Limit.DESCRIPTORS
        if limit is not None:
            self._limits.give_back(answer)
        else:
            session.client_keys = answer
        return limit

    def _make_room_of_client(self, host: str, state: ListenerState) -> bool:
        """End sessions of the client wherever it has as many as it may; whether all have room now.

        The listener's scope comes first: a session that ends there makes room in the shared one.
        """
        count = self._limits.client_count
        full = {
            key: bounds.per_client
            for bounds in state.scopes
            if bounds.per_client
            and count(key := self._limits.key(host, bounds)) >= bounds.per_client
        }
        if any(self._standings.first_to_go(key) is None for key in full):
            return False  # and so none of the others need end
        return all(count(key) < most or self._make_room(key) for key, most in full.items())

    def _make_room(self, group: Hashable) -> bool:
        """End the session of the group that is known least, for another; whether there was one."""
        while True:
            session = self._standings.first_to_go(group)
            if session is None:
                return False
            # One that only the kernel has heard of late may be better known than that.
            if not self._is_steady_in_kernel(session):
                self.end(session, CloseReason.EVICTED)
                return True

    def _refuse(self, session: Session, reason: CloseReason, cause: str) -> None:
        """End a session that has no server (yet), and tell its client why.

        `cause` is for the log.
        """
        session.refusal = cause
        self._say_no(session, reason)
        self.end(session, reason)

    def _say_no(self, session: Session, reason: CloseReason) -> None:
        """Tell the client why it has no session, if its protocol has words for it."""
        negotiation = session.route.negotiation
        if negotiation is not None:
            answer = negotiation.refused(refusal_code(reason))
            if answer:
                self._tell(session, answer)

    # To a server

    def _choose(self, session: Session) -> None:
        to = session.route.to
        generation = session.state.generation
        timeout_s = generation.connect_s
        if isinstance(to, str):
            session.upstream = upstream = generation.upstreams[to]
            timeout_s = upstream.timeout_s
            chosen = (
                upstream.balancer.servers[session.way.number]
                if session.way is not None
                else upstream.balancer.choose(session.peer.host, self.loop.now_s)
            )
            if chosen is None:
                why = upstream.balancer.why_none(self.loop.now_s)
                cause = f"no server of upstream {to}: {why}"
                self._refuse(session, CloseReason.UNREACHABLE, cause)
                return
            session.server_state = chosen
            upstream.balancer.hold(chosen)
            to = chosen.address
        if isinstance(to, SamePort):
            to = to.at(session.state.local_port)
        session.destination = to
        self.loop.deadlines.start(session, timeout_s, self.loop.now_s)
        if isinstance(to, UnixAddress):
            self._refuse(session, CloseReason.UNREACHABLE, f"{to} takes no datagrams")
        elif isinstance(to, HostPort):
            self._resolve(session, to)
        else:
            self._connect(session, [to])

    def _resolve(self, session: Session, to: HostPort) -> None:
        route = session.route
        by_client = route.named_by_client
        allow = route.rule.allow
        if by_client and allow is not None and not allow.permits_port(to.port):
            self._refuse(session, CloseReason.DENIED, f"allow does not list port {to.port}")
            return

        def answer(hosts: list[str]) -> None:
            # Deferred, so that what goes wrong is this session's and nobody else's.
            self.loop.defer(lambda _: self._resolved(session, to, hosts), session)

        resolver = self._names.of(named_by_client=by_client, by_datagram=True)
        keep_s = session.upstream.keep_s if session.upstream is not None else KEEP_S
        client = session.peer.host if by_client else None
        try:
            session.asking = resolver.resolve(to.name, answer, keep_s=keep_s, client=client)
        except TooManyNamesError:
            self.counters[Counter.NAMES_REFUSED] += 1
            self._refuse(session, CloseReason.BUSY, "too many names at once")

    def _resolved(self, session: Session, to: HostPort, hosts: list[str]) -> None:
        """Connect to one of the addresses, unless the session has ended in the meantime."""
        if session.life_ended:
            return
        session.asking = None
        if session.route.named_by_client and len(hosts) > MOST_ADDRESSES:
            self._refuse(session, CloseReason.UNRESOLVED, "the name has too many addresses")
            return
        addresses = addresses_of(hosts, to.port)
        if session.way is not None and session.way.server in addresses:
            addresses = [session.way.server]
        if addresses:
            self._connect(session, addresses)
        else:
            self._refuse(session, CloseReason.UNRESOLVED, "the name has no address")

    def _deny(self, session: Session, address: Address) -> None:
        """The client may not be connected to the address."""
        allow = session.route.rule.allow
        cause = allow.refusal(address.host, address.port) if allow is not None else None
        self._refuse(session, CloseReason.DENIED, cause or f"{address} is this forwarder")

    def _connect(self, session: Session, addresses: Sequence[Address]) -> None:
        generation, rule = session.state.generation, session.route.rule
        for address in addresses:
            if not generation.permits(rule, address, self.loop.now_s, protocol="udp"):
                self._deny(session, address)
                return
        if session.upstream is not None and session.upstream.transparent:
            is_ipv6 = session.peer.is_ipv6
            same = [address for address in addresses if address.is_ipv6 == is_ipv6]
            if same:
                self._ask_for_clients_address(session, same[0])
                return
        code = 0
        for address in interleave(addresses)[:MOST_ATTEMPTS]:
            family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                code = error.errno or errno.EIO
                break
            try:
                if session.upstream is not None:
                    source = session.upstream.source_for(session.id, family)
                    if source:
                        sock.bind((source, 0))
                sock.connect(sockaddr(address))
                want_errors(sock)
                name = sock.getsockname()
            except OSError as error:
                sock.close()
                code = error.errno or errno.EIO
                continue
            self._connected(session, sock, address, name)
            return
        self._not_connected(session, code)

    def _ask_for_clients_address(self, session: Session, address: Address) -> None:
        """Have the supervisor prepare a socket; what the client sends meanwhile waits."""
        family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._not_connected(session, error.errno or errno.EIO)
            return
        session.destination = address

        def granted(sock: socket.socket, done: bool) -> None:
            session.address_asked = 0
            # Deferred, so that what goes wrong is this session's and nobody else's.
            self.loop.defer(
                lambda _: self._connect_as_client(session, sock, address, done=done), session
            )

        session.address_asked = self._client_addresses.ask_for(sock, granted, now_s=self.loop.now_s)
        if not session.address_asked:
            sock.close()
            cause = "too many sessions at once that are to have their client's address"
            self._refuse(session, CloseReason.BUSY, cause)

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer to what `ask_supervisor` asked under this number."""
        self._client_addresses.answered(number, done=done)

    def _connect_as_client(
        self, session: Session, sock: socket.socket, address: Address, *, done: bool
    ) -> None:
        """Connect from the client's address, unless the session has ended in the meantime."""
        if session.life_ended:
            sock.close()
            return
        if not done:
            sock.close()
            cause = "this host does not let a socket have the client's address"
            self._refuse(session, CloseReason.UNREACHABLE, cause)
            return
        host, _, _, scope = session.key
        try:
            sock.bind((host, 0, 0, scope) if address.is_ipv6 else (host, 0))
            sock.connect(sockaddr(address))
            want_errors(sock)
            name = sock.getsockname()
        except OSError as error:
            sock.close()
            # No server is to blame: the address may be made up, and none that can be used.
            reason = CONNECT_ERRORS.get(error.errno or errno.EIO, CloseReason.UNREACHABLE)
            self._refuse(session, reason, os.strerror(error.errno or errno.EIO))
            return
        self._connected(session, sock, address, name)

    def _connected(
        self, session: Session, sock: socket.socket, address: Address, name: tuple[str, int]
    ) -> None:
        """The session has a socket to its server, of this name."""
        session.sock = sock
        session.source = Address(name[0], name[1])
        session.destination = address
        self._established(session)

    def _not_connected(self, session: Session, code: int) -> None:
        """This host has no way to the session's server."""
        reason = CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE)
        if session.upstream is not None and session.server_state is not None:
            session.upstream.balancer.failed(session.server_state, self.loop.now_s)
            count_failure(self.counters, session.server_state.counter, reason)
        self._refuse(session, reason, os.strerror(code))

    def _established(self, session: Session) -> None:
        assert session.sock is not None
        if session.upstream is not None and session.server_state is not None:
            session.upstream.balancer.opened(session.server_state)
            count_connect(self.counters, session.server_state.counter)
            session.server_opened = True
        self.loop.watch(session.sock.fileno(), EPOLLIN, self._answered, session)
        self._watch_idle(session)
        self.handover.established(session)
        self._show(session, PairState.JOINED)
        self.counters[Counter.JOINED_COPY] += 1
        if session.route.rule.index in session.state.ruleset.followed:
            session.learning = LEARN_FROM
        negotiation = session.route.negotiation
        if negotiation is not None:
            assert session.source is not None
            answer = negotiation.granted(session.source)
            if answer:
                self._tell(session, answer)
        if session.state.send_proxy is not None:
            session.proxy_header = self._proxy_header(session)
        waiting, session.waiting = session.waiting, []
        self._waiting_bytes -= session.waiting_bytes
        session.waiting_bytes = 0
        for datagram in waiting:
            if session.life_ended:
                return  # the server has refused the one before
            self._send_up(session, datagram)

    @staticmethod
    def _proxy_header(session: Session) -> bytes:
        forms = session.state.send_proxy
        if forms is None or forms[session.route.rule.index] == "off":
            return b""
        # The id that `show` and the log know the session by, as for TCP.
        unique_id = (proxy_protocol.TLV_UNIQUE_ID, b"%d" % session.id)
        return proxy_protocol.build_v2(
            session.peer, session.asked_address(), [unique_id], datagrams=True
        )

    def _hold(self, session: Session, datagram: bytes | memoryview) -> None:
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
            self.counters[Counter.DATAGRAMS_LOST] += 1

    def _send_up(self, session: Session, datagram: bytes | memoryview) -> None:
        if session.sock is None:
            self._hold(session, datagram)
            return
        sent = session.proxy_header + datagram if session.proxy_header else datagram
        for tries_left in reversed(range(TRIES)):
            try:
                session.sock.send(sent)
                break
            except OSError as error:
                # The one before may have met an error of ICMP: then this one was not even tried.
                if not self._hear_errors(session):
                    return
                if error.errno == errno.EAGAIN or not tries_left:
                    self._failed(session, error)
                    return
        session.proxy_header = b""
        session.up_bytes += len(datagram)
        session.up_packets += 1
        self._moved(session, 0, session.up_bytes, session.up_packets)

    # From a server

    def _answered(self, session: Session, _fd: int, mask: int) -> None:
        assert session.sock is not None
        if mask & EPOLLERR and not self._hear_errors(session):
            return
        run = self._run
        try:
            for _ in range(BATCH):
                passed = self.handover.passed_down(session) if session.place is not None else None
                try:
                    size = session.sock.recv_into(run.room)
                except BlockingIOError:
                    if passed is not None:
                        self.handover.caught_up_down(session, passed)
                    break
                except OSError:
                    self._tell_run(session)
                    if not self._hear_errors(session):
                        return
                    continue
                session.answered_s = self.loop.now_s
                datagram = run.received(size)
                if session.learning:
                    self._learn(session, datagram)
                if run.goes_on(session, size):
                    continue
                self._tell_run(session)
                if session.standing is not _NEW and self._may_run(session, size):
                    run.begin(session, size)
                elif self._tell(session, datagram):
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
                send_segments(session.listener.sock, run, _from_address(key[2]), _name_of(key))
            except OSError as error:
                if error.errno not in UNSEGMENTED:
                    self.counters[Counter.DATAGRAMS_LOST] += run.count
                    run.clear()
                    return
                session.most_segment = run.size - 1
            else:
                self._told(session, len(run.data), run.count)
                run.clear()
                return
        for datagram in run.datagrams():
            if self._tell(session, datagram):
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
        self._ids.learn(connection_id, way, self.loop.now_s)
        session.ids = (*session.ids, connection_id)

    def _tell(self, session: Session, data: bytes | memoryview) -> bool:
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
                self.counters[Counter.DATAGRAMS_HELD_BACK] += 1
                return False
            session.told_bytes += len(data)
        return self._send_down(session.listener, session.key, data)

    def _send_down(self, port: DatagramPort, key: Key, data: bytes | memoryview) -> bool:
        """Whether the datagram went out; one that does not is lost, as on any path."""
        try:
            port.sock.sendmsg([data], _from_address(key[2]), 0, _name_of(key))
        except OSError:
            self.counters[Counter.DATAGRAMS_LOST] += 1
            return False
        return True

    def _failed(self, session: Session, error: OSError) -> None:
        """This host cannot send it: a full queue loses a datagram, the rest end the session."""
        if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE, errno.EPERM):
            self.counters[Counter.DATAGRAMS_LOST] += 1
            return
        self._lose_server(session, error.errno or errno.EIO, is_sure=not self._has_answer(session))

    def _hear_errors(self, session: Session) -> bool:
        """Judge what ICMP says about the session's datagrams; whether it goes on."""
        assert session.sock is not None
        for refusal in refusals(session.sock):
            if self._is_believed(session, refusal):
                is_sure = self._is_of_server(session, refusal)
                self._lose_server(session, refusal.errno, is_sure=is_sure)
                return False
            self.counters[Counter.ERRORS_DOUBTED] += 1
        return True

    def _is_believed(self, session: Session, refusal: Refusal) -> bool:
        """Whether the session ends.

        A server that has never answered is not missed: the client's next datagram finds another.
        One that has answered must say so itself, about several datagrams, and answer none.
        """
        if not self._has_answer(session):
            return True
        if not self._is_of_server(session, refusal):
            return False
        up, down = self.handover.packets(session)
        times, up_before, down_before = session.refused
        if down != down_before:
            times = 0
        elif up == up_before:
            return False  # about the same datagram, at best
        session.refused = (times + 1, up, down)
        return times + 1 >= REFUSALS_OF_A_SERVER

    @staticmethod
    def _has_answer(session: Session) -> bool:
        """Whether the server has ever answered; the kernel has no others."""
        return session.place is not None or session.answered_s > -math.inf

    @staticmethod
    def _is_of_server(session: Session, refusal: Refusal) -> bool:
        to = session.destination
        return isinstance(to, Address) and to.host.partition("%")[0] == refusal.host

    def _lose_server(self, session: Session, code: int, *, is_sure: bool) -> None:
        """End the session; if it is sure that the server is gone, it counts for others, too."""
        server, upstream = session.server_state, session.upstream
        if is_sure and server is not None and upstream is not None:
            now_s = self.loop.now_s
            if server.is_ejected(now_s) or not self._answers(server):
                upstream.balancer.failed(server, now_s)
        if not session.down_packets:
            session.refusal = os.strerror(code)
        self.end(session, CONNECT_ERRORS.get(code, CloseReason.UNREACHABLE))
        if self._has_lost_server(session):
            self.servers_changed()  # others have the same

    def _answers(self, server: ServerState) -> bool:
        """Whether the server has answered a session lately."""
        since_s = self.loop.now_s - ANSWERED_LATELY_S
        return any(
            session.server_state is server and self.handover.answered_s(session) > since_s
            for session in self._sessions.values()
        )

    # Life

    def servers_changed(self, balancers: Mapping[str, Balancer] | None = None) -> None:
        """End the sessions whose server is down, ejected, or no more in the configuration.

        Their clients' next datagrams find another. What the kernel sends on would go nowhere, and
        nobody would notice. `balancers` are those of the configuration in force from now on.
        """
        if balancers is not None:
            self._balancers = balancers
        lost = filter(self._has_lost_server, self._sessions.values())
        self.end_many(lost, CloseReason.UNREACHABLE)

    def _has_lost_server(self, session: Session) -> bool:
        server, upstream = session.server_state, session.upstream
        if server is None or upstream is None:
            return False
        balancer = upstream.balancer
        if self._balancers is not None and balancer not in self._balancers.values():
            return True
        if not server.is_up or server not in balancer.servers:
            return True
        now_s = self.loop.now_s
        # Where all of them are, it is as good as any.
        return server.is_ejected(now_s) and any(
            other.is_up and other.weight and not other.is_ejected(now_s)
            for other in balancer.servers
        )

    def _moved(self, session: Session, direction: int, count: int, packets: int) -> None:
        session.active_s = self.loop.now_s
        if session.slot >= 0:
            now_ns = int(self.loop.now_s * 1e9)
            self._window.count(session.slot, direction, count, packets, now_ns)
        if session.earns:
            self.handover.moved(session)
        elif session.place is not None:
            self.handover.copied(session, direction)

    def look_at_both(self, session: Session) -> None:
        """Copy what has come for a session, from whichever side, before the next event."""
        self._readable(session.listener, -1, 0)
        if session.sock is not None:
            self._answered(session, -1, 0)

    def _watch_idle(self, session: Session) -> None:
        self.loop.deadlines.start(session, self._idle_s(session) / IDLE_CHECKS, self.loop.now_s)

    @staticmethod
    def _idle_s(session: Session) -> float:
        idle_s = session.state.session_idle_s
        return min(UNCONFIRMED_IDLE_S, idle_s) if session.standing is _NEW else idle_s

    def look_at_idle(self, session: Session) -> None:
        """The session's timer: silent for too long, or not connected in time."""
        if session.sock is None:
            self._refuse(session, CloseReason.TIMEOUT, "no answer in time")
            return
        if session.standing is not _STEADY:
            self._is_steady_in_kernel(session)
        # Those that have begun together fall silent together: not all of them end in one turn.
        if self._is_idle(session):
            self._endings.add([session], CloseReason.IDLE)
        elif self._has_lost_server(session):  # by what happened to a connection of TCP
            self._endings.add([session], CloseReason.UNREACHABLE)
        else:
            self._watch_idle(session)

    def _is_idle(self, session: Session) -> bool:
        return self.loop.now_s - self.handover.active_s(session) >= self._idle_s(session)

    def end_many(self, sessions: Iterable[Session], reason: CloseReason) -> None:
        """End sessions: the first ENDS_AT_ONCE now, the others in the next turns of the loop."""
        self._endings.add(sessions, reason)
        self._endings.begin()

    def is_ending(self, session: Session) -> bool:
        """Whether one of the next turns ends it."""
        return session in self._endings

    def _end_some(self, due: Sequence[tuple[Session, CloseReason]]) -> None:
        """End at most ENDS_AT_ONCE; a fault costs nobody else anything."""
        ends = []
        for session, reason in due:
            if reason is CloseReason.IDLE and not self._is_idle(session):
                self._watch_idle(session)  # it has spoken meanwhile
            else:
                ends.append((session, reason))
        try:
            self.handover.leave([session for session, _ in ends])
        except Exception as error:
            self.log.internal_error(error)
        for session, reason in ends:
            try:
                self.end(session, reason)
            except Exception as error:
                self.log.internal_error(error)

    def _is_steady_in_kernel(self, session: Session) -> bool:
        """Whether the client has gone on speaking, as the kernel has seen."""
        if self.handover.heard_s(session) - session.accepted_s < STEADY_AFTER_S:
            return False
        self._standings.heard(session, self.loop.now_s)
        return True

    def end(self, session: Session, reason: CloseReason) -> None:
        """Forget the session; UDP has no way to tell anybody."""
        if session.life_ended:
            return
        session.life_ended = True
        session.reason = reason
        # First what others need, last what is only told: a fault there must cost nobody a place.
        del session.listener.sessions[session.key]
        del self._sessions[session.id]
        self._standings.leave(session)
        self.handover.leave([session])
        self.loop.deadlines.stop(session)
        if session.sock is not None:
            self.loop.close(session.sock.detach())
            session.sock = None
        if session.slot >= 0:
            self._window.release(session.slot)
            session.slot = -1
            self._shown -= 1
        for connection_id in session.ids:
            self._ids.forget(connection_id, self.loop.now_s)
        self._waiting_bytes -= session.waiting_bytes
        session.waiting, session.waiting_bytes = [], 0
        counters = self.counters
        state = session.state
        self._limits.remove_session(state.counter)
        self._limits.give_back(session.client_keys)
        for index, by in (
            (Counter.OPEN, -1),
            (Counter.PAIRS_OPEN, -1),
            (state.counter + ListenerCounter.OPEN, -1),
            (Counter.UP_BYTES, session.up_bytes),
            (Counter.DOWN_BYTES, session.down_bytes),
            (state.counter + ListenerCounter.UP_BYTES, session.up_bytes),
            (state.counter + ListenerCounter.DOWN_BYTES, session.down_bytes),
        ):
            change(counters, index, by)
        if session.upstream is not None and session.server_state is not None:
            if session.server_opened:
                session.upstream.balancer.closed(session.server_state)
                count_disconnect(self.counters, session.server_state.counter)
            session.upstream.balancer.release(session.server_state)
        if session.asking is not None:
            session.asking.stop()
        if session.address_asked:
            self._client_addresses.give_up(session.address_asked)
        is_served = session.down_packets > 0
        self._count_end(state, session.route.rule, reason, is_served=is_served)
        self.log.closed(
            session,
            (session.up_bytes, session.up_packets),
            (session.down_bytes, session.down_packets),
        )

    # Between daemons

    def sessions(self) -> list[Session]:
        """All that are open."""
        return list(self._sessions.values())

    def record_of(self, session: Session) -> bytes:
        """What the table says of it; it has a slot."""
        return self._window.record(session.slot)

    def let_go(self, session: Session) -> None:
        """The session is another daemon's from here on, with its socket: forget it."""
        session.life_ended = True
        del session.listener.sessions[session.key]
        del self._sessions[session.id]
        self._standings.leave(session)
        session.listener.behind.pop(session, None)
        self.loop.deadlines.stop(session)
        if session.sock is not None:
            self.loop.forget(session.sock.fileno())
            self.loop.close(session.sock.detach())
            session.sock = None
        if session.slot >= 0:
            if session.place is None:
                self._window.release(session.slot)
            session.slot = -1  # else the record tells the other daemon what `show` said
            self._shown -= 1
        session.place = None
        for connection_id in session.ids:
            self._ids.forget(connection_id, self.loop.now_s)
        self._waiting_bytes -= session.waiting_bytes
        session.waiting, session.waiting_bytes = [], 0
        self._limits.remove_session(session.state.counter)
        self._limits.give_back(session.client_keys)
        for index in (
            Counter.OPEN,
            Counter.PAIRS_OPEN,
            session.state.counter + ListenerCounter.OPEN,
        ):
            change(self.counters, index, -1)
        if session.upstream is not None and session.server_state is not None:
            if session.server_opened:
                session.upstream.balancer.closed(session.server_state)
                count_disconnect(self.counters, session.server_state.counter)
            session.upstream.balancer.release(session.server_state)

    def flush_ids(self, ids: list[int] | None) -> list[int]:
        """End the sessions with these ids, or all (None); the ids that were found.

        Of many, most end in the next turns of the loop.
        """
        wanted = None if ids is None else set(ids)
        found = [s for s in self._sessions.values() if wanted is None or s.id in wanted]
        self.end_many(found, CloseReason.FLUSHED)
        return [session.id for session in found]

    def drain(self, reason: CloseReason) -> None:
        """End every session, some in each turn of the loop, and listen no more."""
        self.end_many(self._sessions.values(), reason)
        self.keep_only(())

    def end_all(self, reason: CloseReason) -> None:
        """End every session now, however long that takes, and listen no more."""
        sessions = list(self._sessions.values())
        for first in range(0, len(sessions), ENDS_AT_ONCE):
            some = sessions[first : first + ENDS_AT_ONCE]
            self._end_some([(session, reason) for session in some])
        self.keep_only(())

    def _show_again(self, session: Session) -> None:
        """There was no room in the table for the session when it was new."""
        self._show(session, PairState.JOINED if session.sock is not None else PairState.CONNECTING)

    def _show(self, session: Session, state: PairState) -> None:
        if session.slot < 0:
            if self._shown >= self._most_shown:
                return  # the rest of the table is for TCP
            session.slot = self._window.allocate()
            if session.slot < 0:
                return
            self._shown += 1
        listener = session.state
        own = listener.endpoint or pack_endpoint(session.asked_address())
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
            datapath=session.kind,
            reason=session.pair_reason,
        )

    def show_datapath(self, session: Session) -> None:
        """The session's datapath, or the reason for it, is another."""
        if session.slot >= 0:
            self._window.set_datapath(session.slot, session.kind, session.pair_reason)


def route_of(
    state: ListenerState, orphan: SessionOrphan, now_s: float
) -> Route | tuple[CloseReason, str]:
    """As it would be had it come by its rule now; or why no rule leads there any more.

    The worker that opened it may have been taken over, and the configuration may be another.
    """
    # `show` has as much of the name as there is room for.
    name = orphan.record.rule if orphan.record is not None else b""
    names = [each[: NAME_BYTES - 1] for each in state.rule_names]
    if name not in names:
        return CloseReason.NO_MATCH, "its rule is not there any more"
    rule = state.ruleset.rules[names.index(name)]
    if rule.reject is not None:
        return CloseReason.REJECTED, "its rule rejects"
    server = Address(*orphan.server.getpeername()[:2])
    to, generation = rule.to, state.generation
    if isinstance(to, str):
        if _server_of(generation.upstreams[to], server, state.local_port) is None:
            return CloseReason.UNREACHABLE, f"{server} is not in its upstream any more"
        by_client = False
    elif to is None or isinstance(to, NameIn):
        by_client = True  # under `allow`
    elif _may_be(to, server, state.local_port):
        by_client = False
    else:
        return CloseReason.UNREACHABLE, f"its rule does not lead to {server} any more"
    if not generation.permits(rule, server, now_s, protocol="udp"):
        cause = rule.allow.refusal(server.host, server.port) if rule.allow is not None else None
        return CloseReason.DENIED, cause or f"{server} is this forwarder"
    return Route(rule, server, 0, None, by_client)


def _may_be(to: ServerAddress, server: Address, local_port: int) -> bool:
    """Whether a rule or an upstream that leads to `to` can have led there."""
    if isinstance(to, SamePort):
        to = to.at(local_port)
    if isinstance(to, HostPort):
        return to.port == server.port  # its name has stood for that address
    return to == server


def _server_of(upstream: UpstreamState, server: Address, local_port: int) -> ServerState | None:
    """Which server of the upstream that is; None: it has no such one."""
    fit = [s for s in upstream.balancer.servers if _may_be(s.address, server, local_port)]
    # Rather than one whose name may stand for it.
    return next((s for s in fit if s.address == server), fit[0] if fit else None)


def followed_route(state: ListenerState, way: Way) -> Route | None:
    """Where a connection id leads under this configuration; None: no rule has it go there.

    Another worker may have written what `way` says.
    """
    if way.rule not in state.rule_counters:
        return None
    rule = state.ruleset.rules[state.rule_counters.index(way.rule)]
    to = rule.to
    if rule.index not in state.ruleset.followed or rule.reject is not None:
        return None
    if to is None or isinstance(to, NameIn):
        # Under `allow`, as every destination that a client has named.
        return Route(rule, way.server, 0, None, named_by_client=True)
    wanted: ServerAddress = to if not isinstance(to, str) else way.server
    if isinstance(to, str):
        servers = state.generation.upstreams[to].balancer.servers
        if not 0 <= way.number < len(servers):
            return None
        wanted = servers[way.number].address
    if isinstance(wanted, SamePort):
        wanted = wanted.at(state.local_port)
    if isinstance(wanted, Address) and wanted != way.server:
        return None
    return Route(rule, to, 0, None, named_by_client=False)


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


def _name_of(key: Key) -> tuple[str, int] | tuple[str, int, int, int]:
    """The client's address for sendmsg(2)."""
    host, port, _, scope = key
    return (host, port, 0, scope) if scope else (host, port)


def _from_address(local: bytes) -> list[tuple[int, int, bytes]]:
    """What makes sendmsg(2) send from that address."""
    if len(local) == 4:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, local, b""))]
    if len(local) == 16:
        return [(socket.IPPROTO_IPV6, _IPV6_PKTINFO, _PKTINFO6.pack(local, 0))]
    return []
