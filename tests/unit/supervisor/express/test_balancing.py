"""The balancers of what the kernel decides; time is a number here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest

from pyforwarder.config import Upstream, parse_config
from pyforwarder.core.address import Address
from pyforwarder.core.express.choosing import InTurn, Target
from pyforwarder.supervisor.express.balancing import KernelBalancers

FIRST, SECOND = Address("10.0.0.1", 80), Address("10.0.0.2", 80)
PORT = 7000


@dataclass
class FakeOutcome:
    opened: int = 0
    failed: int = 0
    in_a_row: int = 0


@dataclass
class Kernel:
    """What became of connections."""

    outcomes: dict[Target, FakeOutcome] = field(default_factory=dict)

    def of_target(self, target: Target) -> FakeOutcome:
        return self.outcomes.setdefault(target, FakeOutcome())

    def of(self, address: Address) -> FakeOutcome:
        return self.of_target(Target(address))

    def fail(self, address: Address, times: int = 1) -> None:
        self.of(address).failed = (self.of(address).failed + times) & 0xFFFFFFFF
        self.of(address).in_a_row += times

    def open(self, address: Address, times: int = 1) -> None:
        self.of(address).opened += times
        self.of(address).in_a_row = 0


def upstreams(**more: object) -> dict[str, Upstream]:
    up = {"servers": [str(FIRST), str(SECOND)], "eject": {"failures": 3, "for": "10s"}, **more}
    return dict(parse_config(json.dumps({"upstreams": {"up": up}}), source="test").upstreams)


class Chosen:
    """Balancers of one upstream, and what they say."""

    def __init__(self, **more: object) -> None:
        self.kernel = Kernel()
        self.failed: list[tuple[str, str, int]] = []
        self.balancers = KernelBalancers(
            self.kernel.of_target, lambda *said: self.failed.append(said)
        )
        self.upstreams = upstreams(**more)

    def at(
        self,
        now_s: float = 0.0,
        *,
        down: tuple[Address, ...] = (),
        drained: tuple[Address, ...] = (),
    ) -> list[Address]:
        """The servers that are chosen among."""
        self.balancers.configure(
            self.upstreams,
            down={("up", str(one)) for one in down},
            drained={("up", str(one)) for one in drained},
            now_s=now_s,
        )
        chosen = self.balancers.leads_to("up", PORT, now_s)
        if isinstance(chosen, Address):
            return [chosen]
        assert chosen is None or isinstance(chosen, InTurn)
        return list(chosen.servers) if chosen else []

    def update(self, now_s: float = 0.0) -> bool:
        return self.balancers.update(now_s)


def test_a_server_that_is_down_or_drained_gets_nothing_and_comes_back() -> None:
    chosen = Chosen()
    assert chosen.at() == [FIRST, SECOND]
    assert chosen.at(down=(FIRST,)) == [SECOND]
    assert chosen.at(drained=(SECOND,)) == [FIRST]
    assert chosen.at(down=(FIRST,), drained=(SECOND,)) == []
    assert chosen.at() == [FIRST, SECOND]


def test_a_server_that_fails_in_a_row_rests_and_longer_each_time() -> None:
    chosen = Chosen()
    chosen.at()
    chosen.kernel.fail(FIRST, 2)
    assert not chosen.update(1.0)
    assert chosen.at(1.0) == [FIRST, SECOND]
    chosen.kernel.fail(FIRST)
    assert chosen.update(2.0)
    assert chosen.at(2.0) == [SECOND]
    assert chosen.balancers.rests_until_s(2.0) == 12.0
    assert chosen.at(12.0) == [FIRST, SECOND]
    chosen.kernel.fail(FIRST)
    assert chosen.update(13.0)
    assert chosen.balancers.rests_until_s(13.0) == 33.0
    chosen.kernel.open(FIRST)
    assert not chosen.update(34.0)
    assert chosen.balancers.rests_until_s(34.0) == math.inf
    chosen.kernel.fail(FIRST, 2)
    assert not chosen.update(35.0)


def test_one_that_was_opened_in_between_ends_the_row() -> None:
    chosen = Chosen()
    chosen.at()
    chosen.kernel.fail(FIRST, 5)
    chosen.kernel.open(FIRST)
    chosen.kernel.fail(FIRST, 2)
    chosen.update()
    assert chosen.at() == [FIRST, SECOND]
    chosen.kernel.fail(FIRST)
    assert chosen.update()
    assert chosen.at() == [SECOND]


def test_the_last_server_is_tried_by_workers_though_it_is_ejected() -> None:
    chosen = Chosen()
    chosen.at(down=(SECOND,))
    chosen.kernel.fail(FIRST, 3)
    assert chosen.update()
    assert chosen.at(down=(SECOND,)) == []


def test_what_came_before_a_server_was_configured_is_not_its() -> None:
    chosen = Chosen()
    chosen.kernel.fail(FIRST, 3)
    assert chosen.at() == [FIRST, SECOND]
    assert not chosen.update()
    assert chosen.at() == [FIRST, SECOND]
    chosen.balancers.configure({}, down=(), drained=(), now_s=0.0)
    chosen.kernel.fail(FIRST, 7)
    chosen.kernel.open(FIRST)
    chosen.kernel.fail(FIRST, 3)
    assert not chosen.update()
    assert chosen.at() == [FIRST, SECOND]
    assert not chosen.update()


def test_counts_may_wrap_around() -> None:
    chosen = Chosen()
    chosen.kernel.of(FIRST).failed = 0xFFFFFFFE
    chosen.at()
    assert not chosen.update()
    chosen.at(100.0)
    chosen.kernel.fail(FIRST, 3)
    assert chosen.update(100.0)
    assert chosen.at(100.0) == [SECOND]


def test_a_reload_keeps_what_is_known_of_servers_that_stay() -> None:
    chosen = Chosen()
    chosen.at()
    chosen.kernel.fail(FIRST, 3)
    chosen.update()
    chosen.upstreams = upstreams(servers=[str(FIRST), str(SECOND), "10.0.0.3:80"])
    assert chosen.at() == [SECOND, Address("10.0.0.3", 80)]


def test_failures_are_told_of_once_also_where_nobody_is_ejected() -> None:
    chosen = Chosen(eject={"failures": 0})
    assert not chosen.balancers.is_leading  # it has no upstream yet
    chosen.at()
    assert chosen.balancers.is_leading
    chosen.kernel.fail(FIRST, 2345)
    assert not chosen.update()
    chosen.kernel.open(FIRST)
    assert not chosen.update()
    chosen.kernel.fail(SECOND)
    chosen.kernel.open(SECOND)
    assert not chosen.update()
    assert chosen.failed == [("up", str(FIRST), 2345), ("up", str(SECOND), 1)]
    assert chosen.at() == [FIRST, SECOND]


def test_what_came_before_a_server_was_an_upstreams_is_not_its() -> None:
    chosen = Chosen()
    chosen.kernel.fail(FIRST, 7)
    chosen.at()
    chosen.update()
    assert chosen.failed == []


@pytest.mark.parametrize("times", [1, 3])
def test_failures_are_reported_as_workers_report_theirs(times: int) -> None:
    chosen = Chosen()
    chosen.at()
    chosen.kernel.fail(FIRST, times)
    chosen.update()
    assert chosen.balancers.report(0.0) == {
        "up": {
            str(FIRST): {
                "state": "ejected" if times == 3 else "up",
                "pairs": 0,
                "connects": 0,
                "failures": times,
            },
            str(SECOND): {"state": "up", "pairs": 0, "connects": 0, "failures": 0},
        }
    }


def test_connections_from_a_source_have_outcomes_of_their_own() -> None:
    """What an upstream's `source` cannot reach, others may."""
    kernel = Kernel()
    failed: list[tuple[str, str, int]] = []
    balancers = KernelBalancers(kernel.of_target, lambda *said: failed.append(said))
    both = {**upstreams(), "from": upstreams()["up"]}
    balancers.configure(both, down=(), drained=(), now_s=0.0)
    assert balancers.leads_to("up", PORT, 0.0) == InTurn("up", (FIRST, SECOND))
    chosen = balancers.leads_to("from", PORT, 0.0, "10.0.0.9")
    assert chosen == InTurn("from", (FIRST, SECOND), "10.0.0.9")
    assert set(balancers.targets) == {
        Target(server, source) for server in (FIRST, SECOND) for source in ("", "10.0.0.9")
    }
    outcome = kernel.of_target(Target(FIRST, "10.0.0.9"))
    outcome.failed = outcome.in_a_row = 3
    assert balancers.update(0.0)
    assert failed == [("from", str(FIRST), 3)]
    assert balancers.leads_to("up", PORT, 0.0) == InTurn("up", (FIRST, SECOND))
    alone = balancers.leads_to("from", PORT, 0.0, "10.0.0.9")
    assert alone == InTurn("from", (SECOND,), "10.0.0.9")
