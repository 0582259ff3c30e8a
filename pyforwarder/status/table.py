"""Every number that is counted, one row each, for `show stats`, its file and Prometheus.

A row says where the number stands in a worker's block, what Prometheus calls it and what it means.
Labels come from enums and from the configuration, never from clients, so there are as many series
as the configuration has listeners, rules and servers; those for which a block has no words left
have none. Families that Prometheus alone has, and that are no sum of words (whether a server is up,
what a fleet's machines report), are named here beside the rows; status/metrics.py fills them.

To add a number: its word in `runtime.counters`, and a row here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pyforwarder.core.datapaths import DATAPATHS
from pyforwarder.datapath.ebpf.abi import LineKind
from pyforwarder.datapath.express.connect_abi import Count
from pyforwarder.datapath.splice.abi import Invalid
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    CONNECT_BOUNDS_S,
    CONNECT_FIRST,
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    EXPRESS_CONNECT_FAILED,
    EXPRESS_FIRST,
    EXPRESS_PORTS,
    EXPRESS_PORTS_MOST,
    EXPRESS_PORTS_USED,
    INVALID_FIRST,
    LIMITED_INDEX,
    Counter,
    ListenerCounter,
    RuleCounter,
    ServerCounter,
    ServerFailure,
)


class Family(NamedTuple):
    """What Prometheus is told of one name."""

    name: str  # of a counter without the final `_total`
    help: str
    labels: tuple[str, ...] = ()
    is_gauge: bool = False


class Row(NamedTuple):
    """A number: its word in a block, from the block's beginning or from that of a name's words."""

    word: int
    family: Family | None  # None: Prometheus is told of it otherwise, or as a sum
    values: tuple[str, ...] = ()  # of the family's own labels
    stats: str = ""  # its name in `show stats`, a dot being a level of the JSON; empty: not there
    kind: LineKind = LineKind.COUNTER
    # Another word of the whole daemon's that is added to it; 0: none.
    also: int = 0


class Histogram(NamedTuple):
    """Times by their length: a word for each bound, one beyond the last, and the sum in ns."""

    word: int
    family: Family
    bounds_s: tuple[float, ...]


def _counter(name: str, help: str, *labels: str) -> Family:
    return Family(f"pyforwarder_{name}", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Family:
    return Family(f"pyforwarder_{name}", help, labels, is_gauge=True)


_CLOSED = _counter("connections_closed", "Connections ended, by reason.", "reason")
_JOINED = _counter(
    "pairs_joined",
    "Pairs that a datapath has taken over; one that changed is counted by both.",
    "datapath",
)
_LIMITED = _counter("limited", "Connections that were one too many for a limit.", "limit")
_CUT = _counter(
    "first_packet_limited", "First packets that a limit ended before a rule could decide.", "limit"
)
_INVALID = _counter(
    "splice_invalid", "Packets of spliced pairs that were not believed, by what was wrong.", "kind"
)

_LEFT = _counter(
    "express_left",
    "First packets that the kernel has left to workers where express is asked for, by reason.",
    "reason",
)
# What is said of each; docs/datapaths.md explains them.
EXPRESS_LEFT: Final = {
    Count.UNDECIDED: "undecided",
    Count.LONG: "long",
    Count.SILENT: "silent",
    Count.NO_TARGET: "no_way",
    Count.NO_PORT: "no_port",
    Count.REFUSED: "refused",
    Count.UNANSWERED: "unanswered",
    Count.NO_REQUEST: "no_handshake",
    Count.ODD_REQUEST: "handshake",
    Count.ODD_NUMBERS: "numbers",
    Count.ODD_PACKET: "packet",
    Count.DEVICE: "device",
    Count.TAKEN_PORT: "taken_port",
    Count.FAILED: "failed",
}

# Numbers of the whole daemon, in the order of `show stats`.
ROWS: Final[tuple[Row, ...]] = (
    Row(Counter.ACCEPTED, None, stats="accepted"),
    Row(Counter.OPEN, None, stats="open"),
    Row(
        Counter.PAIRS_OPEN,
        _gauge("pairs_open", "Clients with a destination, connected or on the way."),
        stats="pairs_open",
    ),
    Row(
        Counter.PAIRS_OPENED,
        _counter("pairs_opened", "Clients that got a destination."),
        stats="pairs_opened",
    ),
    *(
        Row(Counter[f"JOINED_{row.name.upper()}"], _JOINED, (row.name,), f"joined.{row.name}")
        for row in reversed(DATAPATHS)
    ),
    Row(Counter.JOINED_EXPRESS, _JOINED, ("express",), "joined.express"),
    *(
        Row(word, _CLOSED, (reason.value,), f"closed.{reason.value}", LineKind.NONZERO)
        for reason, word in CLOSED_INDEX.items()
    ),
    *(
        Row(word, _LIMITED, (limit.value,), f"limited.{limit.value}", LineKind.NONZERO)
        for limit, word in LIMITED_INDEX.items()
    ),
    # Bytes of closed pairs; those of open ones are added where they are shown.
    Row(Counter.UP_BYTES, None, stats="bytes_up", kind=LineKind.UP_BYTES),
    Row(Counter.DOWN_BYTES, None, stats="bytes_down", kind=LineKind.DOWN_BYTES),
    Row(Counter.FIRST_PACKET_FULL, _CUT, ("max_bytes",), "first_packet_full"),
    Row(Counter.FIRST_PACKET_TIMEOUT, _CUT, ("timeout",), "first_packet_timeout"),
    Row(
        Counter.ACCEPT_PAUSED,
        _counter(
            "accept_pauses",
            "Times a worker stopped accepting for want of descriptors or memory.",
        ),
        stats="accept_paused",
    ),
    Row(
        Counter.DATAGRAMS_LOST,
        _counter(
            "datagrams_lost",
            "Datagrams dropped because a queue was full or a server's name not resolved yet.",
        ),
        stats="datagrams_lost",
    ),
    Row(
        Counter.HELD_BYTES,
        _gauge(
            "held_bytes",
            "What pairs hold in memory for peers that do not read, once it is worth measuring.",
        ),
        stats="held_bytes",
    ),
    Row(
        Counter.PAIRS_SLOWED,
        _counter(
            "pairs_slowed",
            "Pairs that got small buffers because memory was tight (`limits.memory`).",
        ),
        stats="pairs_slowed",
    ),
    Row(
        Counter.DATAGRAMS_HELD_BACK,
        _counter(
            "datagrams_held_back",
            "Answers dropped because the client has sent one datagram and `amplification` is set.",
        ),
        stats="datagrams_held_back",
    ),
    Row(
        Counter.SESSIONS_UNSPLICED,
        _counter(
            "sessions_unspliced", "Sessions of UDP for which there was no room in the kernel."
        ),
        stats="sessions_unspliced",
    ),
    Row(
        Counter.DATAGRAMS_OVERTAKEN,
        _counter(
            "datagrams_overtaken",
            "Datagrams that went on behind later ones as the kernel took their session over.",
        ),
        stats="datagrams_overtaken",
    ),
    Row(
        Counter.ERRORS_DOUBTED,
        _counter(
            "errors_doubted",
            "ICMP errors about sessions of UDP that did not end them: anybody may have sent them.",
        ),
        stats="errors_doubted",
    ),
    Row(
        Counter.CONNECT_FAILED,
        _counter(
            "connects_failed",
            "Attempts to connect to a server that failed, those of express among them; the next one"
            " may have served.",
        ),
        stats="connect_failed",
        also=EXPRESS_CONNECT_FAILED,
    ),
    Row(
        Counter.BACKLOG_TRIPS,
        _counter(
            "backlog_trips",
            "Times a direction reached the backlog limit, of connections that have ended.",
        ),
        stats="backlog_trips",
    ),
    Row(
        Counter.NAMES_REFUSED,
        _counter(
            "names_refused",
            "Names of clients that were not resolved because too many were being resolved.",
        ),
        stats="names_refused",
    ),
    *(
        Row(
            INVALID_FIRST + kind,
            _INVALID,
            (kind.name.lower(),),
            f"splice_invalid.{kind.name.lower()}",
            LineKind.NONZERO,
        )
        for kind in Invalid
    ),
    Row(
        EXPRESS_PORTS,
        _gauge("express_ports", "Ports that are kept for connections that the kernel opens."),
        stats="express.ports",
        kind=LineKind.NONZERO,
    ),
    Row(
        EXPRESS_PORTS_USED,
        _gauge(
            "express_ports_used",
            "Ports of express that are used, or kept for a while after their connection's end.",
        ),
        stats="express.ports_used",
        kind=LineKind.NONZERO,
    ),
    Row(
        EXPRESS_PORTS_MOST,
        _gauge(
            "express_ports_most",
            "The most ports of express that were used at once, as seen at least twice a second.",
        ),
        stats="express.ports_most",
        kind=LineKind.NONZERO,
    ),
    *(
        Row(EXPRESS_FIRST + count, _LEFT, (reason,), f"express_left.{reason}", LineKind.NONZERO)
        for count, reason in EXPRESS_LEFT.items()
    ),
)

LISTENER_ROWS: Final[tuple[Row, ...]] = (
    Row(
        ListenerCounter.ACCEPTED, _counter("connections_accepted", "Clients accepted.", "listener")
    ),
    Row(
        ListenerCounter.REFUSED,
        _counter(
            "connections_refused",
            "Clients that were not served: told no, reset or, by UDP, left without an answer.",
            "listener",
        ),
    ),
    Row(
        ListenerCounter.OPEN,
        _gauge("connections_open", "Clients connected, from accept to close.", "listener"),
    ),
)
# Bytes of open pairs are added, so this is no row.
LISTENER_BYTES: Final = _counter(
    "listener_bytes",
    "Bytes carried between clients of a listener and servers; up is from the client.",
    "listener",
    "direction",
)

RULE_ROWS: Final[tuple[Row, ...]] = (
    Row(
        RuleCounter.TAKEN,
        _counter("rule_taken", "Connections that the rule gave a destination.", "listener", "rule"),
    ),
    Row(
        RuleCounter.REFUSED,
        _counter(
            "rule_refused",
            "Connections that the rule took or matched and that were not served.",
            "listener",
            "rule",
        ),
    ),
)

_FAILURES = _counter(
    "server_failures",
    "Attempts to connect to a server that failed, by cause; `local` is a shortage of ours,"
    " `express` are attempts of the kernel.",
    "upstream",
    "server",
    "cause",
)
SERVER_ROWS: Final[tuple[Row, ...]] = (
    Row(
        ServerCounter.CONNECTS,
        _counter("server_connects", "Connections to a server that stood.", "upstream", "server"),
    ),
    *(
        Row(ServerCounter.FAILURES + cause, _FAILURES, (cause.name.lower(),))
        for cause in ServerFailure
    ),
    Row(
        ServerCounter.PAIRS,
        _gauge("server_pairs", "Pairs that a server has now.", "upstream", "server"),
    ),
)
# Each worker has its own opinion: 0 if any of them says no.
SERVER_UP: Final = _gauge(
    "server_up", "1 unless health checks say that the server is down.", "upstream", "server"
)
SERVER_DRAINED: Final = _gauge(
    "server_drained",
    "1 if the server gets no new pairs, by weight 0 or by the command `server`.",
    "upstream",
    "server",
)

_DECISION = _gauge(
    "decision_seconds", "From accept until a rule had decided, the client's own pauses included."
)
_CONNECT = _gauge(
    "connect_seconds",
    "How long it took to connect to a server; `-` for those that belong to no upstream.",
    "upstream",
)
HISTOGRAMS: Final[tuple[Histogram, ...]] = (
    Histogram(DECISION_FIRST, _DECISION, DECISION_BOUNDS_S),
)
CONNECT: Final = Histogram(CONNECT_FIRST, _CONNECT, CONNECT_BOUNDS_S)

# What each machine of a fleet says of itself.
FLEET_PAIRS: Final = _gauge("fleet_pairs", "Open pairs of a machine of the fleet.", "instance")
FLEET_SERIAL: Final = _gauge(
    "fleet_serial", "The fleet's edition that is in force at a machine; 0: none.", "instance"
)
FLEET_REFUSED: Final = _gauge(
    "fleet_refused_serial", "The newest edition that a machine could not use; 0: none.", "instance"
)
# What this machine asks the fleet's store for, and when it was answered.
FLEET_SILENT: Final = _gauge(
    "fleet_store_silent_seconds",
    "How long ago the fleet's store has answered last; from the start, if it never has.",
    "part",
)
FLEET_UNUSABLE: Final = _counter(
    "fleet_store_unusable", "Values in the fleet's store that could not be used.", "part"
)
FLEET_DATAPATH: Final = _gauge(
    "fleet_datapath_available", "1 if a machine has that datapath.", "instance", "datapath"
)
