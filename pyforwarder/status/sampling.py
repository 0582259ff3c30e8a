"""What the page shows, read from the pair table and the counters: one sample for all viewers.

A sample is compared with the one before it, so that counters become rates. Descriptions are read
once for each connection and its changes, numbers at every sample: 30 ms for ten thousand pairs.
What a worker that was taken over writes into its window spoils its own pairs, and no others.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
)
from pyforwarder.datapath.ebpf.pair_table import (
    CARRIED,
    DATAPATH,
    REDIRECTED,
    SEQUENCE,
    STATE,
    PairWindow,
    read_slot,
    used_slots,
)
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    Counter,
    Counters,
    ListenerCounter,
    RuleCounter,
    ServerCounter,
    ServerFailure,
)
from pyforwarder.status.pair_rows import KINDS, STATES, Pair, PairRows

if TYPE_CHECKING:
    from pyforwarder.status.plan import Plan

LANES: Final = tuple(kind for kind in DatapathKind if kind is not DatapathKind.NONE)
_UP, _DOWN = Direction.UP, Direction.DOWN


@dataclass(slots=True)
class Traffic:
    """What went by between two samples, and how many pairs there are at the second."""

    pairs: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    new: int = 0
    up_carried: int = 0  # by those pairs, since their begin
    down_carried: int = 0


class ServerNow(NamedTuple):
    """What is counted of a server, by all workers together."""

    held: int  # pairs, and connections that are being made
    is_down: bool = False  # to some worker
    is_drained: bool = False
    connects: int = 0
    failures: int = 0


@dataclass(slots=True)
class Sample:
    """The state at one moment, and what happened since the sample before."""

    span_s: float  # since then; 0: there was none
    total: Traffic
    lanes: list[Traffic]
    listeners: list[Traffic]
    rules: list[Traffic]
    upstreams: list[Traffic]
    servers: list[Traffic]
    up_bytes: int = 0  # since the daemon's start
    down_bytes: int = 0
    refused: int = 0  # between the two samples
    counts: Mapping[str, Any] = field(default_factory=dict)  # as they are now, see `_counts`


class Sampler:
    """Looks at one daemon's tables, whenever it is told to."""

    def __init__(self, plan: Plan, counters: Counters, windows: Sequence[mmap.mmap]) -> None:
        """Nobody closes what is passed in before the process ends."""
        self.plan = plan
        self._counters = counters
        self._views = [memoryview(window) for window in windows]
        self._words = [view.cast("Q") for view in self._views]
        self._indexes = _PlanIndexes(plan)
        self._at_s: float | None = None
        self._pairs: list[dict[int, Pair]] = [{} for _ in windows]
        self.rows = PairRows(self._views, self._words)  # of the last sample
        self._before: dict[int, int] = {}  # counters at the sample before
        self._carried: dict[tuple[str, int], int] = {}

    def forget(self) -> None:
        """Forget the pairs: no viewer was there for long, and the next sample is the first."""
        self._at_s = None
        self._pairs = [{} for _ in self._views]
        self.rows.show(self._pairs)

    def sample(self, now_s: float) -> Sample:
        """What is there now, and what went by since the last sample; `now_s` by a steady clock."""
        span_s = 0.0 if self._at_s is None else max(now_s - self._at_s, 0.001)
        plan = self.plan
        sample = Sample(
            span_s,
            Traffic(),
            [Traffic() for _ in LANES],
            [Traffic() for _ in plan.listeners],
            [Traffic() for _ in plan.rules],
            [Traffic() for _ in plan.upstreams],
            [Traffic() for _ in plan.servers],
        )
        for window in range(len(self._views)):
            self._sample_window(window, span_s, sample)
        self._sample_counters(sample, is_first=self._at_s is None)
        self._at_s = now_s
        self.rows.show(self._pairs)
        return sample

    def _sample_window(self, window: int, span_s: float, sample: Sample) -> None:
        view, words = self._views[window], self._words[window]
        known = self._pairs[window]
        found: dict[int, Pair] = {}
        up_carried, down_carried = CARRIED
        up_redirected, down_redirected = REDIRECTED
        for slot in used_slots(view):
            at = slot * PairWindow.WORDS64
            pair = known.get(slot)
            is_new = False
            if pair is None or pair.sequence != words[at + SEQUENCE]:
                before, pair = pair, self._describe(window, slot)
                if pair is None:
                    continue
                if before is not None and (before.id, before.client) == (pair.id, pair.client):
                    pair.up_bytes, pair.down_bytes = before.up_bytes, before.down_bytes
                else:
                    is_new = True
            state, datapath = view[slot * PAIR_BYTES + STATE], view[slot * PAIR_BYTES + DATAPATH]
            if not state or state not in STATES or datapath not in KINDS:
                continue
            pair.state, pair.datapath = state, datapath
            up_bytes = words[at + up_carried] + words[at + up_redirected]
            down_bytes = words[at + down_carried] + words[at + down_redirected]
            if span_s:
                up = max(0, up_bytes - pair.up_bytes)
                down = max(0, down_bytes - pair.down_bytes)
            else:
                up = down = 0  # since when is not known
            pair.up_bytes, pair.down_bytes = up_bytes, down_bytes
            pair.up_per_s = up / span_s if up else 0.0
            pair.down_per_s = down / span_s if down else 0.0
            found[slot] = pair
            for traffic in self._traffic(pair, sample):
                traffic.pairs += 1
                traffic.up_bytes += up
                traffic.down_bytes += down
                traffic.new += is_new and span_s > 0
                traffic.up_carried += up_bytes
                traffic.down_carried += down_bytes
            sample.up_bytes += up_bytes
            sample.down_bytes += down_bytes
        self._pairs[window] = found

    @staticmethod
    def _traffic(pair: Pair, sample: Sample) -> Iterable[Traffic]:
        yield sample.total
        if pair.datapath:
            yield sample.lanes[pair.datapath - 1]
        if pair.listener_at is not None:
            yield sample.listeners[pair.listener_at]
        if pair.rule_at is not None:
            yield sample.rules[pair.rule_at]
        if pair.upstream_at is not None:
            yield sample.upstreams[pair.upstream_at]
        if pair.server_at is not None:
            yield sample.servers[pair.server_at]

    def _describe(self, window: int, slot: int) -> Pair | None:
        """A connection that is new, or has changed; None: what is there is none."""
        view = self._views[window]
        record = read_slot(view, slot)
        if record is None:
            return None
        try:
            pair = Pair(window, slot, record.sequence, record)
        except ValueError:
            return None
        self._indexes.find(pair)
        return pair

    def _sample_counters(self, sample: Sample, *, is_first: bool) -> None:
        """Totals, and what is counted whether or not a pair lived until now."""
        total = self._counters.total

        def carried(key: tuple[str, int], live: int, word: int) -> tuple[int, int]:
            """Bytes since the start, of pairs that live and that ended; how many are new."""
            # A pair that closes passes from the table to the counters, and may be in neither.
            most = self._carried.get(key, 0)
            now = self._carried[key] = max(most, live + total(word))
            return now, 0 if is_first else now - most

        sample.up_bytes, sample.total.up_bytes = carried(
            ("", _UP), sample.up_bytes, Counter.UP_BYTES
        )
        sample.down_bytes, sample.total.down_bytes = carried(
            ("", _DOWN), sample.down_bytes, Counter.DOWN_BYTES
        )
        before, self._before = self._before, {}

        def since(index: int) -> tuple[int, int]:
            """What is counted now, and how many of them came since the last sample."""
            now = self._before[index] = total(index)
            return now, 0 if is_first else max(0, now - before.get(index, 0))

        plan = self.plan
        listeners, rules, servers = [], [], []
        for listener, traffic in zip(plan.listeners, sample.listeners, strict=True):
            accepted, traffic.new = since(listener.counter + ListenerCounter.ACCEPTED)
            refused, more = since(listener.counter + ListenerCounter.REFUSED)
            sample.refused += more
            open_now = total(listener.counter + ListenerCounter.OPEN)
            # With bytes of pairs that have ended, which no rule and no server is told of.
            traffic.up_bytes = carried(
                (listener.name, _UP),
                traffic.up_carried,
                listener.counter + ListenerCounter.UP_BYTES,
            )[1]
            traffic.down_bytes = carried(
                (listener.name, _DOWN),
                traffic.down_carried,
                listener.counter + ListenerCounter.DOWN_BYTES,
            )[1]
            listeners.append((open_now, accepted, refused))
        for rule, traffic in zip(plan.rules, sample.rules, strict=True):
            taken, traffic.new = since(rule.counter + RuleCounter.TAKEN)
            refused, _ = since(rule.counter + RuleCounter.REFUSED)
            rules.append((taken, refused))
        for server, traffic in zip(plan.servers, sample.servers, strict=True):
            if server.counter is None:
                servers.append(ServerNow(traffic.pairs))
                continue
            words = {name: total(server.counter + name) for name in ServerCounter}
            connects, traffic.new = since(server.counter + ServerCounter.CONNECTS)
            first = server.counter + ServerCounter.FAILURES
            servers.append(
                ServerNow(
                    words[ServerCounter.HELD],
                    words[ServerCounter.DOWN] > 0,
                    words[ServerCounter.DRAINED] > 0,
                    connects,
                    sum(total(first + cause) for cause in ServerFailure),
                )
            )
        _, sample.total.new = since(Counter.ACCEPTED)
        ends = [(reason.value, *since(index)) for reason, index in CLOSED_INDEX.items()]
        sample.counts = {
            "listeners": listeners,
            "rules": rules,
            "servers": servers,
            "ends": [end for end in ends if end[1]],
        }


class _PlanIndexes:
    """Finds a pair's listener, rule and server in the plan, by names and addresses."""

    def __init__(self, plan: Plan) -> None:
        self._listeners = {one.name: n for n, one in enumerate(plan.listeners)}
        self._rules = {(one.listener, one.rule): n for n, one in enumerate(plan.rules)}
        self._upstreams = [one.upstream for one in plan.rules]
        self._upstreams_at = {name: n for n, name in enumerate(plan.upstreams)}
        self._servers = {(one.upstream, one.server): n for n, one in enumerate(plan.servers)}
        # Servers that are named: their addresses are known only to those who resolve them.
        named: dict[tuple[str, str], list[int]] = {}
        for n, one in enumerate(plan.servers):
            host, _, port = one.server.rpartition(":")
            if host and not host.startswith("[") and not host.replace(".", "").isdigit():
                named.setdefault((one.upstream, port), []).append(n)
        # By port, if that tells which.
        self._named = {key: places[0] for key, places in named.items() if len(places) == 1}

    def find(self, pair: Pair) -> None:
        """Set the pair's indexes in the plan."""
        pair.listener_at = self._listeners.get(pair.listener_name)
        pair.rule_at = self._rules.get((pair.listener_name, pair.rule))
        if pair.rule_at is None:
            return
        upstream = self._upstreams[pair.rule_at]
        if upstream is not None:
            pair.upstream_at = self._upstreams_at.get(upstream)
            place = self._servers.get((upstream, pair.server))
            host, _, port = pair.server.rpartition(":")
            if place is None:
                place = self._servers.get((upstream, f"{host}:same"))
            if place is None:
                place = self._named.get((upstream, port))
            pair.server_at = place
