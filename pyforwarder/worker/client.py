"""What a worker knows of one client, from accept to close."""

from __future__ import annotations

import _socket
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.core.address import Address
from pyforwarder.core.connection import Life
from pyforwarder.datapath.base import Pair
from pyforwarder.runtime.keepalive import keep_alive
from pyforwarder.runtime.loop import Timed
from pyforwarder.runtime.raw_sockets import address_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.core.address import HostPort, UnixAddress
    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.core.reasons import CloseReason
    from pyforwarder.core.routing import Conversation, Route, Rule
    from pyforwarder.core.upstreams import ServerState
    from pyforwarder.datapath.base import PairReason
    from pyforwarder.datapath.ebpf.abi import Direction
    from pyforwarder.runtime.limits import Limit
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.generation import ListenerState, UpstreamState


_SNIFFING: Final = Life.SNIFFING


class ClientOwner(Protocol):
    """The worker, as its clients know it."""

    loop: Loop

    def expired(self, client: Client) -> None:
        """A deadline of the client has passed."""


class Approach(Protocol):
    """What goes on outside of the loop before a client has its server."""

    def stop(self) -> None:
        """Nobody wants it any more: the client is gone, or has been given another server."""
        ...


class KeeperWait(Timed):
    """A pair waits until the splice keeper is asked for it again."""

    __slots__ = ("_is_due", "pair", "times")

    def __init__(self, is_due: Callable[[Client], None], pair: Client) -> None:
        """`is_due` is called then."""
        Timed.__init__(self)
        self._is_due = is_due
        self.pair = pair
        self.times = 0  # how often there was no answer

    @property
    def goes_on(self) -> bool:
        """Whether the wait is not over yet."""
        return self._queue is not None

    def expired(self) -> None:
        """Ask the keeper for the pair again."""
        self._is_due(self.pair)


class Client(Pair):
    """A connection: the pair it becomes, and how it got there."""

    __slots__ = (
        "_peer",
        "accepted_s",
        "approach",
        "asked",
        "candidates",
        "client_keys",
        "connecting_s",
        "conversation",
        "cookies",
        "counts_busy",
        "counts_pair",
        "deciding_s",
        "destination",
        "each_timeout_s",
        "expects_splice",
        "facts",
        "handover_asked",
        "header",
        "is_bare",
        "is_eager",
        "is_refused",
        "keeper_wait",
        "life",
        "listener",
        "not_spliced",
        "over_limit",
        "owner",
        "proxied",
        "proxied_to",
        "reason",
        "received",
        "refusal",
        "refused_by",
        "route",
        "server_opened",
        "server_state",
        "source",
        "tried",
        "turn_direction",
        "turns",
        "upstream",
        "waits_for_handover",
    )

    # Set on listeners that accept PROXY headers, and only there: whether the header has come, where
    # it says that the client connected to, and what has been read of it while it was incomplete.
    proxied: bool
    proxied_to: Address | None
    header: bytes

    def __init__(
        self,
        owner: ClientOwner,
        listener: ListenerState,
        sock: _socket.socket | None,
        fd: int,
        peer: Address | bytes | None,
        now_s: float,
    ) -> None:
        """`sock` may be made of `fd` later; `peer` may be as the kernel writes it."""
        Pair.__init__(self, sock, fd)
        self.owner = owner
        self.listener = listener
        self._peer = peer
        self.life = _SNIFFING
        self.accepted_s = now_s
        self.active_s = now_s
        self.received = b""  # the first packet so far, without what a dialogue has used up
        self.deciding_s = 0.0  # processor time for all its pieces but the first
        self.asked = 0  # the number of what the supervisor is to answer; 0: nothing
        self.conversation: Conversation | None = None
        self.route: Route | None = None
        self.reason: CloseReason | None = None  # why it ends, once it does
        self.refused_by: Rule | None = None  # the rule that said no, without a route
        self.facts: Facts = ()  # what it was decided on, if the log wants to know
        self.refusal = ""  # why it was refused, in words for the log
        self.is_refused = False  # and counted as that
        # What goes on: a password that is being verified; later a name's resolving, its answer, or
        # a race of several addresses. Then the addresses still to be tried one by one.
        self.approach: Approach | None = None
        self.candidates: Sequence[Address] = ()
        self.connecting_s = 0.0  # when this server was chosen, by time.monotonic()
        self.each_timeout_s = 0.0
        self.destination: Address | HostPort | UnixAddress | None = None
        self.source: Address | None = None  # the local end of the outgoing connection
        self.upstream: UpstreamState | None = None
        self.server_state: ServerState | None = None
        self.server_opened = False  # the balancer counts this pair as open
        self.tried: Sequence[ServerState] = ()
        # Its server's socket has only the options that a first message needs: see `settle`.
        self.is_bare = False
        # Joined: whether and when a better datapath takes over.
        self.waits_for_handover = False
        self.expects_splice = False  # it has not been asked yet, and may take this pair
        self.is_eager = False  # a handover that cannot be made just now is tried at every move
        self.handover_asked = False
        self.keeper_wait: KeeperWait | None = None  # it was asked for in vain, see `Handover`
        self.not_spliced: PairReason | None = None  # what splice said when it refused
        self.turns = 0
        self.turn_direction: Direction | None = None
        # The cookies of both sockets, if another program gave them to us.
        self.cookies: tuple[int, ...] = ()
        # Which limits count this connection, to be given back exactly once.
        self.counts_pair = False
        self.counts_busy = False
        self.client_keys: tuple[int, ...] = ()
        self.over_limit: Limit | None = None  # the one that it is one too many for

    @property
    def peer(self) -> Address | None:
        """The client's address; None on a unix socket. Made of its bytes only when it is asked
        for.
        """
        peer = self._peer
        if isinstance(peer, bytes):
            self._peer = peer = address_in(peer)
        return peer

    @peer.setter
    def peer(self, peer: Address | None) -> None:
        self._peer = peer

    def expired(self) -> None:
        """The connection's deadline has passed; what that means depends on its life."""
        self.owner.expired(self)

    def source_address(self) -> Address | None:
        """The local address of the outgoing connection; None without one and on a unix socket."""
        if self.server is None:
            return None
        if self.source is None and self.server.fileno() >= 0:
            self.source = address_of(self.server.getsockname())
        return self.source

    def settle(self) -> None:
        """Have the server's socket do what matters only once the connection has lived a while.

        Not to wait for an ACK with a small write (the first one never does), and to ask whether
        the peer is still there.
        """
        self.is_bare = False
        if self.server is not None:
            self.server.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            keepalive = self.listener.generation.keepalive
            if keepalive.idle_s:
                keep_alive(self.server, keepalive)

    @property
    def is_unix(self) -> bool:
        """Whether the client came by a unix socket."""
        if self._client is None:
            return self.listener.is_unix
        return self._client.family == _socket.AF_UNIX

    @property
    def has_sent_nothing(self) -> bool:
        """Whether the client was connected, and not one byte came."""
        return not self.up.read_bytes and self.route is None

    @property
    def listener_name(self) -> str:
        """The listener that accepted it, for the log."""
        return self.listener.config.name

    @property
    def rule_name(self) -> bytes:
        """The rule that took or refused it, for the table and the log."""
        rule = self.rule
        return self.listener.rule_names[rule.index] if rule is not None else b"-"

    @property
    def rule(self) -> Rule | None:
        """The rule that took or refused it; None: none has decided."""
        return self.route.rule if self.route is not None else self.refused_by


def address_of(name: object) -> Address | None:
    """What getpeername(2) or getsockname(2) gave, as an address; None for a unix socket."""
    return Address(name[0], name[1]) if isinstance(name, tuple) else None
