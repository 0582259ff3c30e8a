"""Of tables in the kernel only those are there that a listener has, or had just now."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pyforwarder.core.address import Address
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express import rule_maps, sharing
from pyforwarder.datapath.express.sharing import Decided, Express, Label
from tests.helpers.express import Rules, compiled


@dataclass
class Clock:
    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def monotonic_ns(self) -> int:
        return int(self.now_s * 1e9)


class Map:
    """One that has room for anything, and says how often it was changed."""

    changes = 0

    def __init__(self, *_args: object, **_room: object) -> None:
        self.entries: dict[bytes, bytes] = {}

    def update(self, key: bytes, value: bytes) -> None:
        Map.changes += 1
        self.entries[key] = value

    def delete(self, key: bytes) -> None:
        Map.changes += 1
        if self.entries.pop(key, None) is None:
            raise FileNotFoundError


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[rule_maps.Tables]:
    monkeypatch.setattr(bpf, "create_map", lambda *_, **__: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(bpf, "Map", Map)
    with contextlib.closing(rule_maps.Tables(sharing.TABLES)) as made:
        yield made


@dataclass
class Supervisor:
    """What it puts, into a kernel that has only tables."""

    tables: rule_maps.Tables
    clock: Clock
    express: Express = field(init=False)

    def __post_init__(self) -> None:
        nothing = SimpleNamespace(keep=lambda *_: None, rests_until_s=lambda _: math.inf)
        connections: Any = SimpleNamespace(
            places=1,
            tables=self.tables,
            choices=nothing,
            add_listener=lambda *_: None,
            remove_listener=lambda *_: None,
            close=lambda: None,
        )
        self.express = Express(connections, workers=1)

    def put(self, names: int, start: int = 0) -> list[str]:
        """Rules of one listener with so many names."""
        rules: Rules = [
            {
                "match": {"tls": {"sni": [f"n{n}.example" for n in range(start, start + names)]}},
                "to": "127.0.0.1:1",
            }
        ]
        _, found = compiled(rules)
        assert found.table is not None
        label = Label("main", ["rule"], [0, 0, 0], [])
        here = {Address("127.0.0.1", 80): 1460}
        server = Address("127.0.0.1", 1)
        said = self.express.put([Decided(label, found.table, {0: server}, here, 0)])
        return [left.get(0, "") for left in said]


@pytest.fixture
def supervisor(tables: rule_maps.Tables, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    clock = Clock()
    monkeypatch.setattr(sharing, "time", clock)
    made = Supervisor(tables, clock)
    with contextlib.closing(made.express):
        yield made


def test_names_of_rules_that_are_not_in_force_any_more_leave_the_kernel(
    supervisor: Supervisor, tables: rule_maps.Tables
) -> None:
    """Or after some reloads there would be no room for others."""
    names: Any = tables._maps["names"]
    for start in range(5):
        assert supervisor.put(50, start) == [""]
        # A program that reads them may still run.
        assert len(names.entries) == (50 if not start else 100)
        supervisor.clock.now_s += sharing._REST_S + 1
    before = Map.changes
    for _ in range(3):
        assert supervisor.put(50, 4) == [""]
    assert len(names.entries) == 50
    assert Map.changes - before == 50 + 1  # once


def test_rules_for_whose_names_there_is_no_room_cost_nothing(
    supervisor: Supervisor, tables: rule_maps.Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule_maps, "MOST_NAMES", 100)
    assert supervisor.put(60) == [""]
    before = Map.changes
    for _ in range(3):
        (said,) = supervisor.put(60, 1)
        assert "no room" in said
    assert Map.changes - before <= 3 * 2  # the tables themselves, and not their names
    # Nor does it take from what lasts what is said of it.
    assert supervisor.express.label(2, 1 << 62) == sharing._NO_LABEL
    supervisor.clock.now_s += sharing._REST_S + 1
    assert supervisor.put(60, 1) == [""]
    names: Any = tables._maps["names"]
    assert len(names.entries) == 60
