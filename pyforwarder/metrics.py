"""What Prometheus is told, read from shared memory.

Labels come from the configuration and from enums, never from clients, so their number is bounded.
Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from pyforwarder.counters import (
    CLOSED_INDEX,
    Counter,
    Counters,
    ListenerCounter,
    RuleCounter,
)
from pyforwarder.datapath.abi import DatapathKind, Direction, PairState
from pyforwarder.datapath.table import read_records

if TYPE_CHECKING:
    import mmap

    from prometheus_client.metrics_core import Metric

# Prometheus asks one request at a time; a few more for people and probes. What comes beyond that is
# closed at once, so that nobody can fill the process with threads.
_MOST_REQUESTS: Final = 8
_REQUEST_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Everything there is to tell."""

    version: str
    started_unix_s: float
    workers: int
    counters: Counters
    windows: Sequence[mmap.mmap]
    listeners: Mapping[str, int]  # name -> its first counter
    rules: Mapping[tuple[str, str], int]  # listener and rule -> its first counter
    datapaths: Mapping[str, str]  # name -> "available", or why not


class ForwarderCollector(Collector):
    """Makes the metrics of one daemon, all workers summed, at every scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._most_bytes = dict.fromkeys(Direction, 0)
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        yield from self._instance()
        yield from self._connections()
        yield from self._rules()
        with self._lock:
            yield from self._pairs()

    def _instance(self) -> Iterator[Metric]:
        source = self._source
        yield InfoMetricFamily(
            "pyforwarder_build", "The running version.", value={"version": source.version}
        )
        yield GaugeMetricFamily(
            "pyforwarder_start_time_seconds",
            "When the daemon started, in seconds since 1970.",
            value=source.started_unix_s,
        )
        yield GaugeMetricFamily(
            "pyforwarder_workers", "Worker processes that there should be.", value=source.workers
        )
        available = GaugeMetricFamily(
            "pyforwarder_datapath_available",
            "1 if the datapath has passed its self-test on this host.",
            labels=["datapath"],
        )
        for name, state in source.datapaths.items():
            available.add_metric([name], float(state == "available"))
        yield available

    def _connections(self) -> Iterator[Metric]:
        source = self._source
        total = source.counters.total
        accepted = CounterMetricFamily(
            "pyforwarder_connections_accepted",
            "Clients accepted.",
            labels=["listener"],
        )
        refused = CounterMetricFamily(
            "pyforwarder_connections_refused",
            "Clients that were told no, or reset for want of room.",
            labels=["listener"],
        )
        open_now = GaugeMetricFamily(
            "pyforwarder_connections_open",
            "Clients connected, from accept to close.",
            labels=["listener"],
        )
        for name, base in source.listeners.items():
            accepted.add_metric([name], total(base + ListenerCounter.ACCEPTED))
            refused.add_metric([name], total(base + ListenerCounter.REFUSED))
            open_now.add_metric([name], total(base + ListenerCounter.OPEN))
        closed = CounterMetricFamily(
            "pyforwarder_connections_closed", "Connections ended, by reason.", labels=["reason"]
        )
        for reason, index in CLOSED_INDEX.items():
            closed.add_metric([reason.value], total(index))
        limited = CounterMetricFamily(
            "pyforwarder_first_packet_limited",
            "First packets that a limit ended before a rule could decide.",
            labels=["limit"],
        )
        limited.add_metric(["max_bytes"], total(Counter.FIRST_PACKET_FULL))
        limited.add_metric(["timeout"], total(Counter.FIRST_PACKET_TIMEOUT))
        paused = CounterMetricFamily(
            "pyforwarder_accept_pauses",
            "Times a worker stopped accepting for want of descriptors or memory.",
            value=total(Counter.ACCEPT_PAUSED),
        )
        lost = CounterMetricFamily(
            "pyforwarder_datagrams_lost",
            "Datagrams dropped because a queue was full or a server's name not resolved yet.",
            value=total(Counter.DATAGRAMS_LOST),
        )
        failed = CounterMetricFamily(
            "pyforwarder_connects_failed",
            "Attempts to connect to a server that failed; the next server may have served.",
            value=total(Counter.CONNECT_FAILED),
        )
        trips = CounterMetricFamily(
            "pyforwarder_backlog_trips",
            "Times a direction reached the backlog limit, of connections that have ended.",
            value=total(Counter.BACKLOG_TRIPS),
        )
        yield from (accepted, refused, open_now, closed, limited, paused, lost, failed, trips)

    def _rules(self) -> Iterator[Metric]:
        total = self._source.counters.total
        labels = ["listener", "rule"]
        taken = CounterMetricFamily(
            "pyforwarder_rule_taken", "Connections that the rule gave a destination.", labels=labels
        )
        refused = CounterMetricFamily(
            "pyforwarder_rule_refused", "Connections that the rule refused.", labels=labels
        )
        for name, base in self._source.rules.items():
            taken.add_metric(name, total(base + RuleCounter.TAKEN))
            refused.add_metric(name, total(base + RuleCounter.REFUSED))
        yield from (taken, refused)

    def _pairs(self) -> Iterator[Metric]:
        total = self._source.counters.total
        joined = CounterMetricFamily(
            "pyforwarder_pairs_joined",
            "Pairs that a datapath has taken over; one that changed is counted by both.",
            labels=["datapath"],
        )
        for datapath, index in (
            (DatapathKind.COPY, Counter.JOINED_COPY),
            (DatapathKind.SOCKMAP, Counter.JOINED_SOCKMAP),
            (DatapathKind.SPLICE, Counter.JOINED_SPLICE),
        ):
            joined.add_metric([datapath.label], total(index))
        yield joined
        yield CounterMetricFamily(
            "pyforwarder_pairs_opened",
            "Clients that got a destination.",
            value=total(Counter.PAIRS_OPENED),
        )
        yield GaugeMetricFamily(
            "pyforwarder_pairs_open",
            "Clients with a destination, connected or on the way.",
            value=total(Counter.PAIRS_OPEN),
        )
        now = GaugeMetricFamily(
            "pyforwarder_pairs",
            "Connections older than a few milliseconds, by what they do and who moves the bytes.",
            labels=["state", "datapath"],
        )
        found = {(state, kind): 0 for state in PairState if state for kind in DatapathKind}
        carried = {Direction.UP: total(Counter.UP_BYTES), Direction.DOWN: total(Counter.DOWN_BYTES)}
        for window in self._source.windows:
            for record in read_records(window):
                found[PairState(record.state), DatapathKind(record.datapath)] += 1
                for direction in Direction:
                    carried[direction] += (
                        record.worker[direction].carried_bytes
                        + record.verdict[direction].redirected_bytes
                    )
        for (state, kind), count in found.items():
            if count or _is_usual(state, kind):
                mover = kind.label if kind else "none"
                now.add_metric([state.label, mover], count)
        yield now
        bytes_total = CounterMetricFamily(
            "pyforwarder_carried_bytes",
            "Bytes carried between clients and servers; up is from the client.",
            labels=["direction"],
        )
        for direction, count in carried.items():
            # A pair that closes passes from the table to the counters, and one that a dead worker
            # had is in neither: a counter must not go back, Prometheus would take that for a
            # restart and count everything again.
            most = self._most_bytes[direction] = max(self._most_bytes[direction], count)
            bytes_total.add_metric([direction.name.lower()], most)
        yield bytes_total


def _is_usual(state: PairState, kind: DatapathKind) -> bool:
    """Nobody moves bytes before the join, and somebody after it: half of the series less."""
    joined = (PairState.JOINED, PairState.HALF_CLOSED)
    if state is PairState.DRAINING:  # a refused client drains without a datapath
        return True
    return (kind is not DatapathKind.NONE) == (state in joined)


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, sock: socket.socket) -> None:
        """Serve on a socket that listens already."""
        address = sock.getsockname()[:2]
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        # What server_bind() would find out by asking a name server.
        self.server_address = address
        self.server_name, self.server_port = address
        self.setup_environ()
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, if there is room for one more."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was too slow: its own affair."""


def serve(sock: socket.socket, source: Source) -> None:
    """Answer scrapes on a listening socket, for ever."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ForwarderCollector(source))
    with _Server(sock) as server:
        server.set_app(make_wsgi_app(registry))
        server.serve_forever()
