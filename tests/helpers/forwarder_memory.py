"""The memory that a daemon shares with its workers, for what is read from it."""

from __future__ import annotations

import mmap

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, DatapathKind, Direction, PairState
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.runtime.counters import (
    Counters,
    Directory,
)
from pyforwarder.status.metrics import ForwarderCollector, Source

WORKERS = 2


SLOTS = 8


class Forwarder:
    """The shared memory of a daemon with two workers."""

    def __init__(self) -> None:
        memory = Counters.memory(WORKERS)
        self.counters = Counters(memory)
        self.directory = Directory()
        maps = [mmap.mmap(-1, SLOTS * PAIR_BYTES) for _ in range(WORKERS)]
        self.windows = [
            PairWindow(memory, first_slot=n * SLOTS, worker_index=n)
            for n, memory in enumerate(maps)
        ]
        names = ("main", "web")
        self.server = self.directory.server_index("up", "10.0.0.1:80") or 0
        self.times = self.directory.upstream_index("up") or 0
        self.collector = ForwarderCollector(
            Source(
                version="1.2.3",
                started_unix_s=1_700_000_000.5,
                workers=WORKERS,
                counters=self.counters,
                windows=maps,
                listeners={name: self.directory.index(name) for name in names},
                rules={(name, "any"): self.directory.index(name, "any") for name in names},
                servers={("up", "10.0.0.1:80"): self.server},
                upstreams={"up": self.times},
                datapaths={"copy": "available", "sockmap": "failed its self-test: x"},
                fleet=[
                    {
                        "instance": "one",
                        "version": "1",
                        "serial": 4,
                        "refused": 5,
                        "pairs": 6,
                        "datapaths": ["copy"],
                        "unavailable": {"splice": "no"},
                    }
                ],
                exchanges=[{"part": "health", "answered_s": 0.0, "unusable": 3}],
            )
        )

    def add(self, worker: int, word: int, count: int) -> None:
        self.counters.block(worker)[word] += count

    def pair(self, worker: int, state: PairState, kind: DatapathKind, up: int, down: int) -> int:
        window = self.windows[worker]
        slot = window.allocate()
        window.count(slot, Direction.UP, up, 1, 5)
        window.count(slot, Direction.DOWN, down, 1, 5)
        window.describe(
            slot,
            pair_id=1,
            started_ns=1,
            endpoints=bytes(80),
            rule=b"any",
            listener=b"main",
            state=state,
            datapath=kind,
            reason=0,
        )
        return slot

    def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Sample name -> label values in the order of their names -> value."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.collector)
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            assert family.documentation
            for sample in family.samples:
                values = tuple(sample.labels[name] for name in sorted(sample.labels))
                found.setdefault(sample.name, {})[values] = sample.value
        return found

    def labels(self) -> dict[str, set[str]]:
        """Sample name -> the names of its labels, those that a scrape adds included."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.collector)
        known: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                known.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
        return known
