"""What a worker knows of one client, from accept to close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.address import Address
from pyforwarder.connection import Life
from pyforwarder.datapath.base import Pair

if TYPE_CHECKING:
    import _socket
    from collections.abc import Sequence

    from pyforwarder.address import HostPort, UnixAddress
    from pyforwarder.datapath.abi import Direction
    from pyforwarder.datapath.base import PairReason
    from pyforwarder.reasons import CloseReason
    from pyforwarder.routing import Conversation, Route
    from pyforwarder.upstreams import ServerState
    from pyforwarder.worker.generation import ListenerState, UpstreamState
    from pyforwarder.worker.server import Server


_SNIFFING: Final = Life.SNIFFING


class Client(Pair):
    """A connection: the pair it becomes, and how it got there."""

    __slots__ = (
        "accepted_s",
        "candidates",
        "conversation",
        "cookies",
        "counts_client",
        "counts_pair",
        "deciding_s",
        "destination",
        "expects_splice",
        "handover_asked",
        "header",
        "is_eager",
        "life",
        "listener",
        "not_spliced",
        "over_limit",
        "owner",
        "peer",
        "proxied",
        "proxied_to",
        "reason",
        "received",
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
        owner: Server,
        listener: ListenerState,
        sock: _socket.socket,
        fd: int,
        peer: Address | None,
        now_s: float,
    ) -> None:
        Pair.__init__(self, sock, fd)
        self.owner = owner
        self.listener = listener
        self.peer = peer  # None on a unix socket
        self.life = _SNIFFING
        self.accepted_s = now_s
        self.active_s = now_s
        self.received = b""  # the first packet so far, without what a dialogue has used up
        self.deciding_s = 0.0  # processor time for all its pieces but the first
        self.conversation: Conversation | None = None
        self.route: Route | None = None
        self.reason: CloseReason | None = None  # why it ends, once it does
        # Connecting: addresses still to be tried, and the one being tried.
        self.candidates: Sequence[Address] = ()
        self.destination: Address | HostPort | UnixAddress | None = None
        self.source: Address | None = None  # the local end of the outgoing connection
        self.upstream: UpstreamState | None = None
        self.server_state: ServerState | None = None
        self.server_opened = False  # the balancer counts this pair as open
        self.tried: Sequence[ServerState] = ()
        # Joined: whether and when a better datapath takes over.
        self.waits_for_handover = False
        self.expects_splice = False  # it has not been asked yet, and may take this pair
        self.is_eager = False  # a handover that cannot be made just now is tried at every move
        self.handover_asked = False
        self.not_spliced: PairReason | None = None  # what splice said when it refused
        self.turns = 0
        self.turn_direction: Direction | None = None
        # Of its sockets, if another program gave them to us.
        self.cookies: tuple[int, ...] = ()
        # Which limits count this connection, to be given back exactly once.
        self.counts_pair = False
        self.counts_client = False
        self.over_limit = False

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

    @property
    def listener_name(self) -> str:
        """The listener that accepted it, for the log."""
        return self.listener.config.name

    @property
    def rule_name(self) -> bytes:
        """The rule that took it, for the table."""
        return self.listener.rule_names[self.route.rule.index] if self.route else b"-"


def address_of(name: object) -> Address | None:
    """What getpeername(2) or getsockname(2) gave, as an address; None for a unix socket."""
    return Address(name[0], name[1]) if isinstance(name, tuple) else None
