"""What the status page reads, without a daemon: a pair table and counters in plain memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus

from pyforwarder.config import parse_config
from pyforwarder.core.address import Address
from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    PairState,
    pack_endpoint,
)
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.runtime.counters import Counters, Directory, ListenerCounter, RuleCounter
from pyforwarder.status.http import Answer, Request
from pyforwarder.status.plan import ListenerPlan, Plan, RulePlan, ServerPlan

PLAN_NAMES = (("web", "tls"), ("web", "rest"), ("dns", "all"))


@dataclass(slots=True)
class Memory:
    """Two workers' windows and counters, and what a daemon writes there."""

    slots: int = 64
    windows: list[mmap.mmap] = field(init=False)
    writers: list[PairWindow] = field(init=False)
    counters: Counters = field(init=False)
    directory: Directory = field(default_factory=Directory)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.windows = [mmap.mmap(-1, self.slots * PAIR_BYTES) for _ in range(2)]
        self.writers = [
            PairWindow(memory, first_slot=n * self.slots, worker_index=n)
            for n, memory in enumerate(self.windows)
        ]
        self.counters = Counters(Counters.memory(2))
        index = self.directory.index
        self.plan = Plan(
            listeners=(
                ListenerPlan("web", "0.0.0.0:443", "tcp", index("web")),
                ListenerPlan("dns", "127.0.0.1:53", "udp", index("dns")),
            ),
            rules=tuple(
                RulePlan(
                    listener,
                    rule,
                    "pool" if rule == "tls" else "(client)",
                    "pool" if rule == "tls" else None,
                    index(listener, rule),
                )
                for listener, rule in PLAN_NAMES
            ),
            servers=(
                ServerPlan("pool", "10.0.0.1:443", None, is_checked=True),
                ServerPlan("pool", "10.0.0.2:443", None, True, weight=7, is_backup=True),
                ServerPlan("pool", "host.example:8443", None, is_checked=False),
            ),
        )

    def pair(
        self,
        pair_id: int,
        *,
        worker: int = 0,
        client: str = "192.0.2.1",
        server: Address | None = None,
        listener: str = "web",
        rule: str = "tls",
        state: PairState = PairState.JOINED,
        datapath: DatapathKind = DatapathKind.SOCKMAP,
        started_ns: int = 0,
    ) -> int:
        """A connection begins; its slot."""
        window = self.writers[worker]
        slot = window.allocate()
        self.describe(
            slot,
            pair_id,
            worker=worker,
            client=client,
            server=server,
            listener=listener,
            rule=rule,
            state=state,
            datapath=datapath,
            started_ns=started_ns,
        )
        return slot

    def describe(
        self,
        slot: int,
        pair_id: int,
        *,
        worker: int = 0,
        client: str = "192.0.2.1",
        server: Address | None = None,
        listener: str = "web",
        rule: str = "tls",
        state: PairState = PairState.JOINED,
        datapath: DatapathKind = DatapathKind.SOCKMAP,
        started_ns: int = 0,
    ) -> None:
        """What is known of a slot's connection has changed."""
        self.writers[worker].describe(
            slot,
            pair_id=pair_id,
            started_ns=started_ns,
            endpoints=b"".join(
                pack_endpoint(address)
                for address in (
                    Address(client, 1024 + pair_id % 60000),
                    Address("192.0.2.254", 443),
                    Address("10.0.0.254", 40000),
                    server or Address("10.0.0.1", 443),
                )
            ),
            rule=rule.encode(),
            listener=listener.encode(),
            state=state,
            datapath=datapath,
            reason=1,
        )

    def carry(self, slot: int, up: int, down: int, *, worker: int = 0, now_ns: int = 0) -> None:
        """A connection has carried so much since its begin."""
        self.writers[worker].count(slot, Direction.UP, up, 1, now_ns)
        self.writers[worker].count(slot, Direction.DOWN, down, 1, now_ns)

    def count(self, word: int, by: int = 1, *, worker: int = 0) -> None:
        """A counter goes on."""
        self.counters.block(worker)[word] += by

    def accepted(self, listener: str, by: int = 1) -> None:
        """Connections have come."""
        self.count(self.directory.index(listener) + ListenerCounter.ACCEPTED, by)

    def taken(self, listener: str, rule: str, by: int = 1) -> None:
        """A rule has taken connections."""
        self.count(self.directory.index(listener, rule) + RuleCounter.TAKEN, by)


CONFIG = parse_config(
    """
listeners:
  - name: web
    bind: 0.0.0.0:443
    rules:
      - {name: tls, match: {tls: {sni: ["*.example.com"]}}, to: pool}
      - {name: rest, match: instruction, allow: [loopback]}
  - name: dns
    bind: 127.0.0.1:53
    protocol: udp
    rules: [{name: all, match: any, to: 10.0.0.3:53}]
upstreams: {pool: {servers: [10.0.0.1:443, 10.0.0.2:443, "host.example:8443"], health: {}}}
status: {control: true}
""",
    source="test",
)


def request(method: str, target: str, body: bytes = b"", **headers: str) -> Request:
    """A request of the page's own."""
    message = Message()
    for name, value in {"Host": "127.0.0.1:9997", **headers}.items():
        message[name.replace("_", "-")] = value
    path, _, query = target.partition("?")
    return Request(method, path, query, message, body)


class FakeVisitor:
    """A connection that a site keeps: what it was told, and whether it reads."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.headers: dict[str, str] = {}
        self.told = b""
        self.answers: list[Answer] = []
        self.is_behind = False
        self.is_ended = False
        self.leave: Callable[[], None] = lambda: None

    def wait(self, gone: Callable[[], None]) -> None:
        self.leave = gone

    def finish(self, answer: Answer) -> None:
        self.answers.append(answer)

    def end(self) -> None:
        self.is_ended = True
        self.leave()

    def stream(
        self, headers: tuple[tuple[str, str], ...], first: bytes, gone: Callable[[], None]
    ) -> None:
        self.headers = dict(headers)
        self.told += first
        self.leave = gone

    def send(self, piece: bytes) -> bool:
        if self.is_behind:
            return False
        self.told += piece
        return True


def ok(answer: Answer | None) -> Answer:
    """An answer that is good."""
    assert answer is not None
    assert answer.status == HTTPStatus.OK, answer
    return answer
