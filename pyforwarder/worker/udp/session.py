"""A UDP session: one client's datagrams to one server, and back.

It is a socket of its own, connected to the server, so that answers find their client and errors
their session. It keeps the generation of the configuration that it was opened under.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.core.address import Address, HostPort, UnixAddress
from pyforwarder.core.session import (
    Carriage,
    CarriageEvent,
    SessionEvent,
    SessionLife,
    next_carriage,
    next_session_life,
)
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.loop import Timed
from pyforwarder.worker.udp.eviction import Assurance
from pyforwarder.worker.udp.runs import MOST_DATAGRAM_BYTES
from pyforwarder.worker.udp.sockets import key_of

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.core.reasons import CloseReason
    from pyforwarder.core.routing import Route, Rule
    from pyforwarder.core.upstreams import ServerState
    from pyforwarder.datapath.splice.sessions import KernelSession, PendingSession
    from pyforwarder.runtime.limits import Limit
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.runtime.resolver import Wait
    from pyforwarder.worker.generation import ListenerState, UpstreamState
    from pyforwarder.worker.udp.connection_ids import SessionTarget
    from pyforwarder.worker.udp.sockets import Key

_CONNECTING: Final = SessionLife.CONNECTING
_ENDED: Final = SessionLife.ENDED
_COPIED: Final = Carriage.COPIED


class SessionOwner(Protocol):
    """Whose sessions these are, as they know it."""

    loop: Loop
    next_id: Callable[[], int]

    def check_idle(self, session: Session) -> None:
        """The session's timer has passed."""

    def end(self, session: Session, reason: CloseReason) -> None:
        """Forget the session."""


class Session(Timed):
    """The datagrams of one client to one server, and back."""

    __slots__ = (
        "accepted_s",
        "active_s",
        "address_asked",
        "answered_s",
        "asking",
        "assurance",
        "carriage",
        "client_keys",
        "destination",
        "down_bytes",
        "down_packets",
        "facts",
        "groups",
        "heard_bytes",
        "id",
        "ids",
        "in_kernel",
        "is_spliced_by_name",
        "key",
        "kind",
        "learning",
        "life",
        "listener",
        "most_of_message",
        "most_segment",
        "name",
        "over_limit",
        "owner",
        "pair_reason",
        "peer",
        "pending",
        "port",
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
        "target",
        "told_bytes",
        "up_bytes",
        "up_packets",
        "upstream",
        "waiting",
        "waiting_bytes",
    )

    has_sent_nothing = False

    def __init__(
        self, owner: SessionOwner, port: DatagramPort, key: Key, route: Route, heard_bytes: int
    ) -> None:
        """`heard_bytes`: of the client's first datagram."""
        super().__init__()
        self.owner = owner
        self.port = port
        # The port may have another by the time the session ends.
        self.listener = port.listener
        self.key = key
        self.name = b""  # the same as the kernel says it, once it has
        self.route = route
        self.facts = route.facts
        self.peer = Address(key[0], key[1])
        self.id = 0
        self.slot = -1
        self.kind = DatapathKind.COPY
        self.pair_reason = PairReason.DATAGRAMS
        self.is_spliced_by_name = False  # the configuration says `splice`, not `auto`
        self.life = _CONNECTING
        self.carriage = _COPIED
        self.in_kernel: KernelSession | None = None  # while the kernel carries it
        self.pending: PendingSession | None = None  # while the keeper is asked to begin it
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
        self.assurance = Assurance.NEW
        self.groups: tuple[Hashable, ...] = ()
        # What the client has sent and been sent: only kept while `assurance` is NEW.
        self.heard_bytes = heard_bytes
        self.told_bytes = 0
        self.reason: CloseReason | None = None
        self.refusal = ""  # why it got no server, in words for the log
        # How often the server has refused a datagram since it last answered, and how many datagrams
        # had gone up and down then.
        self.refused = (0, 0, 0)
        self.asking: Wait | None = None  # for the server's name
        self.address_asked = 0  # the request for a socket with the client's address; 0: none
        # What the server is told about the client, in front of the first datagram; empty once that
        # has been sent.
        self.proxy_header = b""
        # Larger datagrams are sent one by one: more of that size at once do not fit the path.
        self.most_segment = MOST_DATAGRAM_BYTES
        # How many datagrams a message of the server has been, the most that there were on average
        # when some were received at once; 0: none has come yet.
        self.most_of_message = 0
        # QUIC: where its connection id has led; those that its server has said, or its client did,
        # and how many answers are looked through for more.
        self.target: SessionTarget | None = None
        self.ids: tuple[bytes, ...] = ()
        self.learning = 0
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.up_bytes = self.down_bytes = 0
        self.up_packets = self.down_packets = 0

    def happen(self, event: SessionEvent) -> None:
        """Feed one event to the table of the session's life."""
        self.life = next_session_life(self.life, event)

    def carry(self, event: CarriageEvent) -> None:
        """Feed one event to the table of who carries the session's datagrams."""
        self.carriage = next_carriage(self.carriage, event)

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, or is another daemon's."""
        return self.life is _ENDED

    @property
    def is_counted(self) -> bool:
        """Whether it is known what the kernel has carried of it; else the keeper is asked."""
        return self.carriage is not Carriage.COUNTING

    def expired(self) -> None:
        """Time to look whether anybody still speaks."""
        self.owner.check_idle(self)

    def source_address(self) -> Address | None:
        """Where datagrams to the server come from."""
        return self.source

    def asked_address(self) -> Address:
        """The address of ours that the client has sent to."""
        bind = self.listener.bind
        if self.listener.endpoint is not None:
            assert isinstance(bind, Address)
            return bind
        local = self.key[2]
        host = socket.inet_ntop(socket.AF_INET6 if len(local) == 16 else socket.AF_INET, local)
        return Address(host, self.listener.local_port)

    @property
    def listener_name(self) -> str:
        """The listener that received it, for the log."""
        return self.listener.config.name

    @property
    def rule_name(self) -> bytes:
        """The rule that took it, for the table and the log."""
        return self.listener.rule_names[self.route.rule.index]


class RefusedClient:
    """A first datagram that gets no session, or a session that cannot go on, for the log."""

    __slots__ = (
        "accepted_s",
        "facts",
        "id",
        "listener_name",
        "over_limit",
        "owner",
        "peer",
        "pending",
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
        owner: SessionOwner,
        listener: ListenerState,
        peer: Address,
        rule: Rule | None,
        *,
        session_id: int | None = None,
    ) -> None:
        """`session_id`: of a session that another worker had counted."""
        self.owner = owner
        self.accepted_s = owner.loop.now_s
        self.id = owner.next_id() if session_id is None else session_id
        self.listener_name = listener.config.name
        self.rule_name = listener.rule_names[rule.index] if rule is not None else b"-"
        self.route: Route | None = None
        self.peer = peer
        self.over_limit: Limit | None = None
        self.reason: CloseReason | None = None
        self.facts: Facts = ()
        self.refusal = ""

    def source_address(self) -> None:
        """The address from which datagrams are sent: none, as nothing was sent."""


class DatagramPort:
    """A UDP listener: its socket, and the configuration in force for new sessions."""

    def __init__(self, sock: socket.socket, listener: ListenerState) -> None:
        self.sessions: dict[Key, Session] = {}
        self.by_name: dict[bytes, Session] = {}  # those that have a name (sockets.py)
        # Sessions of which something was copied since the kernel was last told that all was; and
        # what
        # it had counted then (handover.py).
        self.behind: dict[Session, None] = {}
        self.counted: list[tuple[Session, int]] | None = None
        self.take(sock, listener)

    def take(self, sock: socket.socket, listener: ListenerState) -> None:
        """Go on with this socket and this configuration."""
        self.sock = sock
        self.listener = listener
        # A wildcard socket must answer from the address that was asked, or the client will not
        # know the answer.
        self.is_wildcard = listener.endpoint is None

    def find(self, name: bytes) -> Session | None:
        """The session of the client with this sockaddr, which is kept in `by_name`; None: none."""
        session = self.sessions.get(key_of(name))
        if session is not None:
            self.by_name.pop(session.name, None)
            session.name = name
            self.by_name[name] = session
        return session

    def forget(self, session: Session) -> None:
        """The session has ended, or is another worker's."""
        del self.sessions[session.key]
        self.by_name.pop(session.name, None)
