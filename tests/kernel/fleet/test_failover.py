"""A machine dies, and its spliced pairs go on through another one of the fleet."""

from __future__ import annotations

import functools
import itertools
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.draining import going_down
from tests.helpers.two_machines import OFTEN_S
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.fleet_of_two import Fleet

PAIRS = 24
HUNDRED, THOUSAND = 100, 1000
# Rounds, of each three of which two are deaths; in the third the machine is cut off, and lives.
THIRTY = 30
# What is in the store for so long, the other machine has.
HELD_WITHIN_S = scaled_s(1.0)
# After so long others know of a connection that ends with its machine.
STAYS_KNOWN_S = scaled_s(1.5)
WITHIN_S = scaled_s(1.0)


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
    rows = a.show()
    assert {row["rule"] for row in rows} == {"all"}
    assert {row["client"] for row in rows} == traffic.clients()
    traffic.poke()
    print(f"longest gap of the death: {traffic.longest_gap_s():.3f} s")
    fleet.open("a", 2)
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.alone
@pytest.mark.timeout(240)
def test_ends_that_have_waited_longer_and_longer_send_at_once(fleet: Fleet) -> None:
    """A death that nobody notices for 1.7 s: left alone they would try again 3 s after it."""
    hosts, traffic = fleet.hosts, fleet.traffic
    hosts.give_addresses("a")
    fleet.start("a")
    fleet.start("b")
    fleet.open("a", PAIRS)
    fleet.wait_until_held("b", PAIRS)
    traffic.mark()
    cut_s = time.monotonic()
    hosts.cut_off("a")
    fleet.daemons["a"].kill()
    time.sleep(max(0.0, cut_s + 1.7 - time.monotonic()))
    hosts.give_addresses("b")
    moved_s = time.monotonic() - cut_s
    fleet.wait_until_spliced("b", PAIRS)
    given_s = time.monotonic()
    wait_for(functools.partial(traffic.has_come_since, given_s), "bytes come everywhere")
    gap_s = traffic.longest_gap_s()
    print(f"longest gap: {gap_s:.2f} s, of which without addresses {moved_s:.2f} s")
    traffic.poke()
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []
    assert gap_s < moved_s + scaled_s(0.5) + traffic.host_late_s()


def deaths(fleet: Fleet, least: int, *, until_s: float, seed: int) -> None:
    """The machine with the addresses dies or is cut off, `least` times, and on until `until_s`.

    It comes back with its records, without them, or has lived all the time. No pair may notice;
    meanwhile others begin and end, and those of them that the store knew of go on as well. The
    machine that gets the addresses next has the pairs within half a second, and half a second later
    bytes come again everywhere: ends left alone try again after 0.2, 0.6, 1.4 ... s.
    """
    hosts, traffic, rng = fleet.hosts, fleet.traffic, random.Random(seed)
    here, there = "a", "b"
    count = len(traffic.streams)
    released = {"a": 0, "b": 0}
    gaps_s: list[str] = []
    counts: list[tuple[int, ...]] = []
    for number in itertools.count():
        if number >= least and time.monotonic() > until_s:
            break
        fleet.flush_left(there, count)
        fleet.wait_until_held(there, count)
        churn = fleet.churn(seed + number)
        churn.start()
        time.sleep(rng.uniform(0.5, 2.0))
        replicated, looked_s = fleet.replicated(), time.monotonic()
        time.sleep(HELD_WITHIN_S)
        traffic.mark()
        old = fleet.daemons[here]
        cut_s = time.monotonic()
        hosts.cut_off(here)
        comes_back = ("lives", "without", "with")[number % 3]
        if comes_back != "lives":
            old.kill()
        time.sleep(rng.choice((0.0, 0.1, 0.5)))
        hosts.give_addresses(there)
        given_s = time.monotonic()
        moved_s = given_s - cut_s
        fleet.daemons[there].wait_for_line("failover_taken")
        fleet.wait_until_spliced(there, count, or_more=True)
        wait_for(functools.partial(traffic.has_come_since, given_s), "bytes come everywhere")
        time.sleep(1)
        gap_s = traffic.longest_gap_s()
        gaps_s.append(f"{gap_s:.2f} ({moved_s:.2f})")
        churn.stop()
        assert churn.faults == [], number
        # Of what nobody goes on with, the store knows once it has lasted a moment.
        lost = [one for one in churn.broken_ones if one.ended_s > cut_s]
        known = [one for one in lost if one.began_s < cut_s - STAYS_KNOWN_S]
        host_late_s = traffic.host_late_s()
        until_reset_s = given_s + WITHIN_S + host_late_s
        late = [one for one in known if not one.was_reset or one.ended_s > until_reset_s]
        counts += [(len(lost), len(known), len(replicated) - count)]
        assert late == [], (number, given_s, host_late_s)
        left = [one for one in lost if one.client in replicated and one.began_s < looked_s]
        assert left == [], (number, given_s)
        most_s = moved_s + OFTEN_S + scaled_s(0.5) + host_late_s
        assert gap_s < most_s, (number, gap_s, moved_s, host_late_s)
        traffic.poke()
        # Nobody gives them back to the machine that was away; if it lives, it hears that it has no
        # pairs more.
        hosts.take_addresses(here)
        hosts.connect(here)
        if comes_back == "lives":
            released[here] += count
            fleet.wait_until_released(here, released[here])
        else:
            if comes_back == "without":
                for pin in sorted(old.place.bpffs.glob(f"{here}/splice/*")):
                    pin.unlink()
            fleet.start(here)
            released[here] = 0
        assert traffic.errors() == [], number
        fleet.wait_until_spliced(there, count)
        here, there = there, here
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []
    print("longest gap (until the addresses had moved):", *gaps_s)
    print("others that were lost, of these known to the store; others that went on:", *counts)


@pytest.mark.timeout(240)
def test_a_hundred_pairs_go_on_through_three_deaths_after_each_of_which_the_machine_comes_back(
    fleet: Fleet,
) -> None:
    """One that has lived meanwhile, one without its records, and one with them."""
    fleet.hosts.give_addresses("a")
    for name in ("a", "b"):
        fleet.start(name)
    fleet.open_many("a", HUNDRED - 8, rate=400, every=5)
    fleet.open("a", 8)
    deaths(fleet, 3, until_s=0, seed=16)


@pytest.mark.timeout(240)
def test_a_machine_without_addresses_that_hears_nothing_ends_without_a_word(fleet: Fleet) -> None:
    hosts, traffic = fleet.hosts, fleet.traffic
    hosts.give_addresses("a")
    a = fleet.start("a")
    fleet.start("b")
    for version in (4, 6):
        for rate in (0, 2000):
            traffic.add(*fleet.spliced("a", version), rate)
    fleet.wait_until_held("b", 4)
    # Only the store cannot be reached: the packets of this machine get to both ends.
    hosts.switch.ip("link set am down")
    hosts.give_addresses("b")
    hosts.take_addresses("a")
    fleet.wait_until_spliced("b", 4)
    flushed = a.control().flush_all()["flushed"]
    assert len(flushed) == 4
    a.wait_for_no_pairs()
    assert a.stop() == 0
    traffic.poke()
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []
    fleet.wait_until_spliced("b", 4)


@pytest.mark.timeout(240)
def test_a_machine_that_drains_goes_on_with_pairs_though_a_worker_has_ended(fleet: Fleet) -> None:
    """One of two workers waits for a pair that is copied; the other had nothing left.

    The keeper divides the pairs between both. They are shown, and reset by a second `down`.
    """
    hosts, traffic = fleet.hosts, fleet.traffic
    fleet.start("a")
    b = fleet.start("b", drain="300s")
    hosts.give_addresses("b")
    client, server = fleet.connect(4, "copy")
    with client, server:
        wait_for(lambda: fleet.datapath_of("b", client) == "copy", "b copies a pair")
        hosts.take_addresses("b")
        hosts.give_addresses("a")
        fleet.open("a", PAIRS, rate=0)
        fleet.wait_until_spliced("a", PAIRS)
        fleet.wait_until_held("b", PAIRS)
        children = len(b.workers())
        with going_down(b):
            wait_for(lambda: len(b.workers()) == children - 1, "a worker has ended")
            hosts.take_addresses("a")
            hosts.give_addresses("b")
            fleet.wait_until_spliced("b", PAIRS)
            assert {row["client"] for row in b.look()} >= traffic.clients()
            traffic.poke()
            wait_for(traffic.is_whole, "all bytes have come")
            assert traffic.errors() == []
            b.signal(signal.SIGTERM)
            wait_for(lambda: len(traffic.errors()) == 2 * PAIRS, "both ends of each are reset")
            assert b.wait() == 0
        reset = "ConnectionResetError"
        assert {error.rpartition(" ")[2] for error in traffic.errors()} == {reset}


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(1800)
def test_many_pairs_go_on_through_many_deaths_at_random_moments(
    fleet: Fleet, soak_s: float
) -> None:
    """A thousand through twenty deaths at least; fewer where a soak has less than ten minutes."""
    is_long = soak_s >= 600
    count, least = (THOUSAND, THIRTY) if is_long else (3 * HUNDRED, 3)
    until_s = time.monotonic() + soak_s
    fleet.hosts.give_addresses("a")
    for name in ("a", "b"):
        fleet.start(name)
    fleet.open_many("a", count - 24, rate=800, every=count // 20)
    fleet.open("a", 24)
    deaths(fleet, least, until_s=until_s, seed=1)
