"""A machine dies, and its spliced pairs go on through another one of the fleet."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.fleet_of_two import Fleet, fleet_of_two
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

PAIRS = 24
ROUNDS = 8


@pytest.fixture
def fleet(
    start_forwarder: StartForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))
    with fleet_of_two(start_forwarder) as fleet:
        yield fleet


@pytest.mark.timeout(240)
def test_pairs_go_on_through_a_planned_move_and_a_death(fleet: Fleet) -> None:
    hosts, traffic = fleet.hosts, fleet.traffic
    hosts.give_addresses("a")
    a, b = fleet.start("a"), fleet.start("b")
    fleet.open("a", PAIRS)
    fleet.open("a", 2, rate=200_000)
    count = PAIRS + 2
    fleet.wait_until_spliced("a", count)
    fleet.wait_until_held("b", count)
    traffic.mark()
    hosts.give_addresses("b")
    hosts.take_addresses("a")
    fleet.wait_until_spliced("b", count)
    a.wait_for_line("reason=moved", count=count)
    traffic.poke()
    # It knows of them now as the other did.
    fleet.wait_until_held("a", count)
    print(f"longest gap of the move: {traffic.longest_gap_s():.3f} s")
    traffic.mark()
    hosts.cut_off("b")
    b.kill()
    hosts.give_addresses("a")
    fleet.wait_until_spliced("a", count)
    assert {row["rule"] for row in a.show()} == {"all"}
    traffic.poke()
    print(f"longest gap of the death: {traffic.longest_gap_s():.3f} s")
    fleet.open("a", 2)
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_pairs_go_on_through_many_deaths_at_random_moments(fleet: Fleet, soak_s: float) -> None:
    """So many deaths, or those for which a soak has time."""
    ends_s = time.monotonic() + soak_s
    hosts, traffic, rng = fleet.hosts, fleet.traffic, random.Random(16)
    hosts.give_addresses("a")
    here, there = "a", "b"
    for name in (here, there):
        fleet.start(name)
    fleet.open(here, PAIRS)
    fleet.open(here, 2, rate=100_000)
    gaps_s = []
    for number in range(ROUNDS):
        if number >= 2 and time.monotonic() > ends_s:
            break
        fleet.wait_until_held(there, len(traffic.streams))
        time.sleep(rng.uniform(0, 1.5))
        traffic.mark()
        dead = fleet.daemons[here]
        hosts.cut_off(here)
        dead.kill()
        time.sleep(rng.choice((0.0, 0.1, 0.5)))
        hosts.give_addresses(there)
        fleet.wait_until_spliced(there, len(traffic.streams))
        traffic.poke()
        time.sleep(1)
        gaps_s.append(traffic.longest_gap_s())
        assert traffic.errors() == [], number
        # It comes back, with its records or without them.
        hosts.take_addresses(here)
        if number % 2:
            for pin in sorted(dead.place.bpffs.glob(f"{here}/splice/*")):
                pin.unlink()
        hosts.connect(here)
        fleet.start(here)
        fleet.open(there, 1)
        here, there = there, here
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    print("longest gaps:", *(f"{gap_s:.2f}" for gap_s in gaps_s))
    assert traffic.errors() == []
