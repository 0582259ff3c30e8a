"""What Prometheus is told, read from shared memory.

Labels come from the configuration and from enums, never from clients, so their number is bounded.
Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairState
from pyforwarder.datapath.ebpf.pair_table import read_records
from pyforwarder.runtime.counters import Counter, Counters, ListenerCounter, ServerCounter
from pyforwarder.status import table
from pyforwarder.status.allowance import Rate
from pyforwarder.status.http import Answer, Request

if TYPE_CHECKING:
    import mmap

    from prometheus_client.metrics_core import Metric

    from pyforwarder.status.server import Visitor


@dataclass(frozen=True, slots=True)
class Source:
    """Everything there is to tell."""

    version: str
    started_unix_s: float
    workers: int
    counters: Counters
    windows: Sequence[mmap.mmap]
    listeners: Mapping[str, int]  # name -> its first counter
    rules: Mapping[tuple[str, ...], int]  # listener and rule -> its first counter
    servers: Mapping[tuple[str, ...], int]  # upstream and server -> its first counter
    upstreams: Mapping[str, int]  # name -> the first word of its connect times
    datapaths: Mapping[str, str]  # name -> "available", or why not
    # The machines of the fleet, as `supervisor.messages.FleetInstance` has them: the list changes.
    fleet: list[Mapping[str, Any]] = field(default_factory=list)
    # What the fleet's store is asked for, and when it has answered: `StoreProcess.exchange`.
    exchanges: list[Mapping[str, Any]] = field(default_factory=list)


class ForwarderCollector(Collector):
    """Makes the metrics of one daemon, all workers summed, at every scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._most_bytes: dict[tuple[str, Direction], int] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        yield from self._instance()
        yield from self._rows(table.ROWS, {(): 0})
        yield from self._rows(table.LISTENER_ROWS, _keyed(self._source.listeners))
        yield from self._rows(table.RULE_ROWS, self._source.rules)
        yield from self._rows(table.SERVER_ROWS, self._source.servers)
        yield from self._servers()
        yield from self._times()
        with self._lock:
            yield from self._pairs()
        yield from self._fleet()

    def _fleet(self) -> Iterator[Metric]:
        info = InfoMetricFamily(
            "pyforwarder_fleet_instance", "Machines of the fleet.", labels=["instance"]
        )
        pairs, serial, refused, available = map(
            _metric,
            (
                table.FLEET_PAIRS,
                table.FLEET_SERIAL,
                table.FLEET_REFUSED,
                table.FLEET_DATAPATH,
            ),
        )
        for one in self._source.fleet:
            name = one["instance"]
            info.add_metric([name], {"version": one["version"]})
            pairs.add_metric([name], one["pairs"])
            serial.add_metric([name], one["serial"])
            refused.add_metric([name], one["refused"])
            for datapath in one["datapaths"]:
                available.add_metric([name, datapath], 1.0)
            for datapath in one["unavailable"]:
                available.add_metric([name, datapath], 0.0)
        yield from (info, pairs, serial, refused, available)
        silent, unusable = map(_metric, (table.FLEET_SILENT, table.FLEET_UNUSABLE))
        for one in self._source.exchanges:
            silent.add_metric([one["part"]], max(0.0, time.monotonic() - one["answered_s"]))
            unusable.add_metric([one["part"]], one["unusable"])
        yield from (silent, unusable)

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

    def _rows(
        self, rows: Sequence[table.Row], bases: Mapping[tuple[str, ...], int]
    ) -> Iterator[Metric]:
        """The rows' families, for everything whose words begin at one of `bases`."""
        total = self._source.counters.total
        for family, members in itertools.groupby(
            (row for row in rows if row.family is not None), key=lambda row: row.family
        ):
            assert family is not None
            metric = _metric(family)
            own = list(members)
            for names, base in bases.items():
                for row in own:
                    number = total(base + row.word) + (total(row.also) if row.also else 0)
                    metric.add_metric([*names, *row.values], number)
            yield metric

    def _servers(self) -> Iterator[Metric]:
        total = self._source.counters.total
        up, drained = _metric(table.SERVER_UP), _metric(table.SERVER_DRAINED)
        for names, base in self._source.servers.items():
            up.add_metric(names, float(not total(base + ServerCounter.DOWN)))
            drained.add_metric(names, float(bool(total(base + ServerCounter.DRAINED))))
        yield from (up, drained)

    def _times(self) -> Iterator[Metric]:
        for each in table.HISTOGRAMS:
            metric = _histogram(each.family)
            self._add_times(metric, (), each.word, each.bounds_s)
            yield metric
        connect = _histogram(table.CONNECT.family)
        words = {"-": table.CONNECT.word, **self._source.upstreams}
        for name, word in words.items():
            self._add_times(connect, (name,), word, table.CONNECT.bounds_s)
        yield connect

    def _add_times(
        self,
        metric: HistogramMetricFamily,
        labels: Sequence[str],
        word: int,
        bounds_s: Sequence[float],
    ) -> None:
        total = self._source.counters.total
        below = 0
        buckets = []
        for number, bound in enumerate((*bounds_s, math.inf)):
            below += total(word + number)
            buckets.append(("+Inf" if bound == math.inf else f"{bound:g}", float(below)))
        metric.add_metric(labels, buckets, total(word + len(bounds_s) + 1) / 1e9)

    def _pairs(self) -> Iterator[Metric]:
        total = self._source.counters.total
        now = GaugeMetricFamily(
            "pyforwarder_pairs",
            "Connections older than a few milliseconds, by what they do and who moves the bytes.",
            labels=["state", "datapath"],
        )
        found = {(state, kind): 0 for state in PairState if state for kind in DatapathKind}
        # By listener, "" being all: of closed connections here, of open ones from the table.
        carried = {
            ("", Direction.UP): total(Counter.UP_BYTES),
            ("", Direction.DOWN): total(Counter.DOWN_BYTES),
        }
        for name, base in self._source.listeners.items():
            carried[name, Direction.UP] = total(base + ListenerCounter.UP_BYTES)
            carried[name, Direction.DOWN] = total(base + ListenerCounter.DOWN_BYTES)
        for window in self._source.windows:
            for record in read_records(window):
                found[PairState(record.state), DatapathKind(record.datapath)] += 1
                # A listener that a reload has taken out has pairs, but no series.
                listener = record.listener_name.decode(errors="replace")
                for direction in Direction:
                    count = (
                        record.worker[direction].carried_bytes
                        + record.kernel[direction].redirected_bytes
                    )
                    carried["", direction] += count
                    if (listener, direction) in carried:
                        carried[listener, direction] += count
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
        of_listeners = _metric(table.LISTENER_BYTES)
        for (name, direction), count in carried.items():
            # A pair that closes passes from the table to the counters, and one that a dead worker
            # had is in neither: a counter must not go back, Prometheus would take that for a
            # restart and count everything again.
            most = max(self._most_bytes.get((name, direction), 0), count)
            self._most_bytes[name, direction] = most
            label = direction.name.lower()
            if name:
                of_listeners.add_metric([name, label], most)
            else:
                bytes_total.add_metric([label], most)
        yield from (bytes_total, of_listeners)


def _metric(family: table.Family) -> CounterMetricFamily | GaugeMetricFamily:
    kind = GaugeMetricFamily if family.is_gauge else CounterMetricFamily
    return kind(family.name, family.help, labels=family.labels)


def _histogram(family: table.Family) -> HistogramMetricFamily:
    return HistogramMetricFamily(family.name, family.help, labels=family.labels)


def _keyed(names: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(name,): base for name, base in names.items()}


def _is_usual(state: PairState, kind: DatapathKind) -> bool:
    """Whether a pair can be in this state on this datapath: bytes have a datapath once the pair is
    joined. The others are left out, half of the series.
    """
    joined = (PairState.JOINED, PairState.HALF_CLOSED)
    if state is PairState.DRAINING:  # a refused client drains without a datapath
        return True
    return (kind is not DatapathKind.NONE) == (state in joined)


_PATH: Final = "/metrics"
_METHODS: Final = "GET, HEAD, OPTIONS"

# Each takes as long as a sample of all pairs: so many at once, and so many a second. Clients
# that ask for more, however many, are told what was true within the last second.
_FRESH: Final = Rate(20, 10)
_KEPT_S: Final = 1.0

# A WSGI application (PEP 3333): environ and start_response to pieces of the body.
Application = Any


class MetricsSite:
    """`/metrics`, and nothing else."""

    most_body_bytes = 0

    def __init__(self, application: Application) -> None:
        self._application = application
        self._fresh = _FRESH.budget()
        self._kept: dict[tuple[bool, bool], tuple[float, Answer]] = {}

    def answer(self, request: Request, visitor: Visitor) -> Answer:
        """The metrics as they are now, to every client."""
        del visitor
        if request.method == "OPTIONS":
            return Answer(HTTPStatus.NO_CONTENT, (("Allow", _METHODS),))
        if request.method not in ("GET", "HEAD"):  # nothing can be changed here
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, (("Allow", _METHODS),))
        if request.path != _PATH:
            return Answer.words(HTTPStatus.NOT_FOUND, f"Try {_PATH}.")
        now_s = time.monotonic()
        kind = (
            "openmetrics" in request.header("Accept"),
            "gzip" in request.header("Accept-Encoding"),
        )
        kept_s, kept = self._kept.get(kind, (0.0, None))
        if not self._fresh.take(now_s) and kept is not None and now_s - kept_s < _KEPT_S:
            return kept
        answer = self._told_now(request)
        self._kept[kind] = (now_s, answer)
        return answer

    def _told_now(self, request: Request) -> Answer:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.headers.get("Accept"),
            "HTTP_ACCEPT_ENCODING": request.headers.get("Accept-Encoding"),
        }
        told: list[tuple[str, list[tuple[str, str]]]] = []
        body = b"".join(self._application(environ, lambda *how: told.append(how)))
        status, headers = told[0]
        return Answer(HTTPStatus(int(status.split()[0])), tuple(headers), body)


def metrics_site(source: Source) -> MetricsSite:
    """The site of one daemon."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ForwarderCollector(source))
    return MetricsSite(make_wsgi_app(registry))
