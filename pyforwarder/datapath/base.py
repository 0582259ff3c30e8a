"""The seam between a connection and what moves its bytes.

A `Pair` is two connected sockets and two `Flow`s. The worker makes it, and gives it to a
`Datapath` with `join`; from then on the datapath answers the events of both sockets and reports
through `PairHost`: a FIN seen, a direction delivered, the pair broken. It never closes a socket:
that is the worker's, after `leave`.
"""

from __future__ import annotations

import _socket
import enum
import errno
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.core.connection import Phase
from pyforwarder.core.datapaths import DATAPATHS, OUTLIVING
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.runtime.loop import Timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.loop import Loop


# What `core/datapaths.py` says of datapaths, by their numbers.
END_TO_END: Final = frozenset(
    DatapathKind[row.name.upper()] for row in DATAPATHS if row.is_end_to_end
)
WITH_BACKLOG: Final = frozenset(
    DatapathKind[row.name.upper()] for row in DATAPATHS if row.has_backlog
)
OUTLIVING_KINDS: Final = frozenset(DatapathKind[name.upper()] for name in OUTLIVING)


class PairReason(enum.IntEnum):
    """Why a pair is on its datapath; the text is what `show --json` calls `reason`."""

    UNDECIDED = 0
    BEST = 1
    FORCED = 2
    SHORT = 3
    UNIX_SOCKET = 4
    HALF_CLOSED = 5
    NOT_AVAILABLE = 6
    MAP_FULL = 7
    NOT_PLAIN_TCP = 8
    REFUSED_BY_KERNEL = 9
    UNREAD_BYTES = 10
    # 11 was a reason that no pair ever had.
    NOT_ELIGIBLE = 12
    DATAGRAMS = 13
    TWO_FAMILIES = 14
    LINK_LOCAL = 15
    ONE_HAS_TIMESTAMPS = 16
    PATHS_DIFFER = 17
    NOT_ETHERNET = 18
    HANDSHAKE_UNSEEN = 19
    CHAINED = 20
    SPLICE_OFF = 21
    GOES_ON = 22
    NO_KEEPER = 23
    INTERFACE_TAKEN = 24
    SMALL_WINDOW = 25
    OTHER_SOCKET = 26
    DECIDED = 27
    DECIDED_BEFORE = 28

    @property
    def text(self) -> str:
        """One clause for people."""
        return _REASON_TEXT[self]


_REASON_TEXT: Final = {
    PairReason.UNDECIDED: "not joined yet",
    PairReason.BEST: "the best this host and this pair allow",
    PairReason.FORCED: "the configuration says so",
    PairReason.SHORT: "too young to pay for a handover",
    PairReason.UNIX_SOCKET: "one end is a unix socket",
    PairReason.HALF_CLOSED: "one end had already sent FIN at the handover",
    PairReason.NOT_AVAILABLE: "no kernel datapath on this host, see pyforwarder doctor",
    PairReason.MAP_FULL: "the socket map is full",
    PairReason.NOT_PLAIN_TCP: "one end is not plain TCP (MPTCP or kTLS)",
    PairReason.REFUSED_BY_KERNEL: "the kernel refused to take the sockets",
    PairReason.UNREAD_BYTES: "bytes kept coming while the sockets changed hands",
    PairReason.DATAGRAMS: "datagrams are copied",
    PairReason.SMALL_WINDOW: "not spliced: one end's window is less than two steps of the other's",
    PairReason.NOT_ELIGIBLE: "splice was asked for, and this host cannot, see pyforwarder doctor",
    PairReason.TWO_FAMILIES: "not spliced: one connection is IPv4, the other IPv6",
    PairReason.LINK_LOCAL: "not spliced: a peer has a link-local address",
    PairReason.ONE_HAS_TIMESTAMPS: "not spliced: only one of the connections has TCP timestamps",
    PairReason.PATHS_DIFFER: "not spliced: packets of the one do not fit the other's path",
    PairReason.NOT_ETHERNET: "not spliced: it goes by an interface that is not like Ethernet",
    PairReason.HANDSHAKE_UNSEEN: "not spliced: its handshake was not seen under these addresses",
    PairReason.CHAINED: "not spliced: its peer is, by another forwarder on this host",
    PairReason.SPLICE_OFF: "not spliced: the listener says `splice: off`",
    PairReason.GOES_ON: "it was spliced before this daemon or worker started",
    PairReason.INTERFACE_TAKEN: "not spliced: an interface has another program's qdisc or filter",
    PairReason.OTHER_SOCKET: "not spliced: its datagrams are another socket's",
    PairReason.DECIDED: "the kernel has decided on its first packet",
    PairReason.DECIDED_BEFORE: (
        "the kernel had decided on its first packet before this daemon or worker started"
    ),
    PairReason.NO_KEEPER: "not spliced: the process that does it did not answer",
}
# Of pairs that the kernel has opened by itself; the view's programs know them, too.
OPENED_BY_KERNEL: Final = (PairReason.DECIDED, PairReason.DECIDED_BEFORE)

# Made for every connection: looking a member up in its enum costs more than storing it.
_OPEN: Final = Phase.OPEN
_UP: Final = Direction.UP
_DOWN: Final = Direction.DOWN
_NONE: Final = DatapathKind.NONE
_UNDECIDED: Final = PairReason.UNDECIDED


# In the place of a socket that has ended.
_CLOSED: Final = _socket.socket()
_CLOSED.close()


class Flow:
    """One direction of a pair, as userspace knows it."""

    __slots__ = (
        "blocked",
        "bulk",
        "carried_bytes",
        "carried_packets",
        "direction",
        "end_seen",
        "pending",
        "phase",
        "read_bytes",
        "readable",
        "source_fd",
        "target_fd",
        "urgent",
        "written_bytes",
    )

    def __init__(self, direction: Direction, source_fd: int, target_fd: int) -> None:
        self.direction = direction
        self.source_fd = source_fd
        self.target_fd = target_fd
        self.phase = _OPEN
        # Bytes that were read and that the target's TCP has not taken yet: at most one read.
        self.pending: bytes | memoryview | None = None
        self.readable = False  # the source may have bytes: an edge was seen and not used up
        self.blocked = False  # the target took less than it was offered
        self.end_seen = False  # epoll has reported the source's FIN
        self.bulk = False  # the last read filled its buffer
        # An urgent byte is in the queue: a read stops in front of it, however much is behind
        # (net/ipv4/tcp.c, tcp_recvmsg_locked), so a short read does not mean an empty queue.
        self.urgent = False
        self.read_bytes = 0  # everything ever read from the source, instruction included
        self.written_bytes = 0  # everything ever written to the target, ack and header included
        self.carried_bytes = 0  # of those, what the source meant for the target
        self.carried_packets = 0


class Pair(Timed):
    """Two connected sockets on their way together; the worker's connection extends it."""

    __slots__ = (
        "_client",
        "active_s",
        "client_fd",
        "client_mask",
        "datapath",
        "datapath_record",
        "down",
        "id",
        "is_foreign",
        "is_shared",
        "kind",
        "pair_reason",
        "server",
        "server_fd",
        "server_mask",
        "slot",
        "up",
    )

    server: _socket.socket | None

    def __init__(self, client: _socket.socket | None, client_fd: int) -> None:
        """`client` may be None for a socket of which only the descriptor is known so far."""
        self._queue = None
        self._expires_s = 0.0
        self._client = client
        self.client_fd = client_fd
        self.client_mask = 0  # what epoll watches for
        self.server = None
        self.server_fd = -1
        self.server_mask = 0
        self.up = Flow(_UP, client_fd, -1)
        self.down = Flow(_DOWN, -1, client_fd)
        self.datapath: Datapath | None = None
        self.kind = _NONE
        self.pair_reason = _UNDECIDED
        self.datapath_record: object | None = None  # the datapath's own record of this pair
        self.slot = -1  # in the pair table; -1 while it has none
        self.id = 0
        self.is_foreign = False  # another program connected these sockets, and may still have them
        self.is_shared = False  # another process of ours may have descriptors of its sockets
        self.active_s = 0.0  # when userspace last moved a byte

    @property
    def client(self) -> _socket.socket:
        """The client's socket as an object, made when it is asked for: of most clients never."""
        sock = self._client
        if sock is None:
            sock = self._client = _socket.socket(fileno=self.client_fd)
        return sock

    def give_up_client(self) -> _socket.socket | None:
        """The client's socket, if there is an object, before its end; `client` is closed after.

        None: the caller closes the descriptor. No object may be made of its number any more, which
        will be another socket's.
        """
        sock = self._client
        if sock is None:
            self._client = _CLOSED
        return sock

    def attach_server(self, server: _socket.socket, server_fd: int) -> None:
        """Give the pair its second socket; a server that failed before is replaced."""
        self.server = server
        self.server_fd = server_fd
        self.up.target_fd = server_fd
        self.down.source_fd = server_fd


def failure(pair: Pair, fd: int, error: int) -> CloseReason:
    """Why a pair ends whose socket `fd` has failed with that errno; 0: it is not known."""
    if error == errno.ETIMEDOUT:  # nobody has acknowledged its bytes, or answered its keepalives
        return CloseReason.CLIENT_TIMEOUT if fd == pair.client_fd else CloseReason.SERVER_TIMEOUT
    return CloseReason.CLIENT_RESET if fd == pair.client_fd else CloseReason.SERVER_RESET


def error_of(pair: Pair, fd: int) -> int:
    """The error that the socket has (SO_ERROR), which forgets it."""
    sock = pair.client if fd == pair.client_fd else pair.server
    return sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) if sock is not None else 0


class PairHost(Protocol):
    """What a datapath may ask of the worker. All calls are made from the loop."""

    loop: Loop

    def fin_seen(self, pair: Pair, flow: Flow) -> None:
        """The flow's source has sent FIN."""

    def delivered(self, pair: Pair, flow: Flow) -> None:
        """Every byte of the flow is with the target's TCP, and its FIN is due: shuts it down.

        Not a spliced pair's, which has got its FIN from the other end.
        """

    def ended(self, pair: Pair, flow: Flow) -> None:
        """`fin_seen` and `delivered` in one, of a flow that was copied to its end."""

    def broken(self, pair: Pair, reason: CloseReason) -> None:
        """The pair cannot be continued correctly: both ends are reset."""

    def moved(self, pair: Pair, flow: Flow) -> None:
        """Userspace has moved bytes of this flow (for counters and the handover's timing)."""

    def enlarge(self, pair: Pair | None, sock: _socket.socket, by_bytes: int) -> None:
        """Let the socket's send queue hold so many more bytes, beyond the system's limit.

        Needs CAP_NET_ADMIN, so it may be done later, by another process, or not at all. `pair` is
        whose socket it is, and is shared with that process from here on.
        """


class Datapath(Protocol):
    """Who moves the bytes. One instance serves all pairs of a worker.

    Before `join`, all that was read from the client before is written, or stands in
    `flow.pending`; `flow.readable` says what is known of the sources.
    """

    kind: DatapathKind

    def join(self, pair: Pair) -> PairReason | None:
        """Take the pair over; None if taken, else why not, and then nothing has changed."""

    def carried(self, pair: Pair, flow: Flow) -> tuple[int, int, int]:
        """Bytes and packets of the flow so far, and how many of the bytes wait in the kernel."""

    def active_s(self, pair: Pair) -> float:
        """When a byte last moved, on the monotonic clock."""

    def trips(self, pair: Pair) -> int:
        """How often a backlog limit gave a direction back to userspace."""

    def end(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """The pair is to be closed or reset: whether it can be at once, by `leave`.

        False: `then` is called with it as soon as it can, and it goes on as it is until then.
        """

    def leave(self, pair: Pair) -> None:
        """Release the pair, which is about to be closed or reset. Never raises."""
