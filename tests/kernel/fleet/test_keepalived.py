"""keepalived moves the addresses, with the example that we ship: nobody calls us."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.keepalived import Keepalived, keepalived
from tests.helpers.two_machines import BACK, FRONT
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.fleet_of_two import Fleet

MOVING = {*FRONT.values(), *BACK.values()}
PAIRS = 12


@pytest.fixture
def movers(fleet: Fleet) -> Iterator[dict[str, Keepalived]]:
    with keepalived(fleet) as movers:
        yield movers


def wait_until_here(fleet: Fleet, movers: dict[str, Keepalived], name: str) -> None:
    """This machine has all addresses."""
    control = fleet.daemons[name].control()

    def are_here() -> bool:
        here = control.failover()["here"]
        return isinstance(here, list) and set(here) == MOVING

    wait_for(
        are_here,
        f"{name} has the addresses; its keepalived: {movers[name].log()}",
        deadline_s=scaled_s(30),
    )


@pytest.mark.timeout(300)
def test_pairs_go_on_when_keepalived_notices_a_death_and_when_it_is_stopped(
    fleet: Fleet, movers: dict[str, Keepalived]
) -> None:
    hosts, traffic = fleet.hosts, fleet.traffic
    for name in ("a", "b"):
        fleet.start(name)
    movers["a"].start()
    wait_until_here(fleet, movers, "a")
    movers["b"].start()
    fleet.open("a", PAIRS)
    fleet.wait_until_held("b", PAIRS)

    traffic.mark()
    cut_s = time.monotonic()
    hosts.cut_off("a")
    fleet.daemons["a"].kill()
    movers["a"].kill()
    fleet.wait_until_spliced("b", PAIRS)
    wait_for(functools.partial(traffic.has_come_since, time.monotonic()), "bytes come everywhere")
    gap_s = traffic.longest_gap_s()
    print(f"longest gap of the death: {gap_s:.2f} s, of {time.monotonic() - cut_s:.2f} s")
    traffic.poke()
    assert traffic.errors() == []
    assert gap_s < scaled_s(1.0) + traffic.host_late_s()

    # It comes back, and does not take them: keepalived begins as BACKUP, behind its daemon.
    for address in MOVING:  # keepalived that is killed leaves them
        hosts.machines["a"].ip(f"address flush to {address}")
    hosts.connect("a")
    fleet.start("a")
    movers["a"].start()
    wait_for(
        lambda: "Entering BACKUP STATE" in movers["a"].log().rpartition("Starting")[2], "a waits"
    )
    fleet.wait_until_held("a", PAIRS)
    assert fleet.daemons["a"].control().failover()["here"] == []

    traffic.mark()
    movers["b"].stop()
    wait_until_here(fleet, movers, "a")
    fleet.wait_until_spliced("a", PAIRS)
    wait_for(functools.partial(traffic.has_come_since, time.monotonic()), "bytes come everywhere")
    print(f"longest gap of the move: {traffic.longest_gap_s():.2f} s")
    traffic.poke()
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.timeout(300)
def test_a_machine_whose_daemon_is_gone_loses_the_addresses_and_gets_none(
    fleet: Fleet, movers: dict[str, Keepalived]
) -> None:
    for name in ("a", "b"):
        fleet.start(name)
    movers["a"].start()
    wait_until_here(fleet, movers, "a")
    movers["b"].start()
    fleet.open("a", 4)
    fleet.wait_until_held("b", 4)
    fleet.daemons["a"].kill()  # its programs go on with the pairs until the addresses have left
    wait_until_here(fleet, movers, "b")
    fleet.wait_until_spliced("b", 4)
    fleet.traffic.poke()
    fleet.traffic.pause()
    wait_for(fleet.traffic.is_whole, "all bytes have come")
    assert fleet.traffic.errors() == []
