"""`fleet move`, `take` and `ready`: the addresses go where somebody says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.two_machines import BACK, FRONT
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.fleet_of_two import Fleet

MOVING = {*FRONT.values(), *BACK.values()}
PAIRS = 8


def refused(fleet: Fleet, name: str, *words: str) -> str:
    """What a command says that fails, and moves nothing."""
    before = fleet.daemons[name].control().failover()["here"]
    done = fleet.command(name, *words)
    assert (done.returncode, done.stdout) != (0, ""), done
    assert done.returncode != 0
    assert fleet.daemons[name].control().failover()["here"] == before
    return done.stderr


@pytest.mark.timeout(300)
def test_addresses_are_taken_moved_and_taken_from_a_dead_machine(fleet: Fleet) -> None:
    hosts, traffic = fleet.hosts, fleet.traffic
    a, b = fleet.start("a", mover="command"), fleet.start("b", mover="command")
    # Nobody has them: they are anybody's.
    assert "none of the addresses" in refused(fleet, "a", "move", "b")
    done = fleet.command("a", "take")
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, MOVING, "")
    a.wait_for_line("failover_addresses_taken")
    fleet.open("a", PAIRS)
    fleet.wait_until_held("b", PAIRS)
    ready = fleet.command("b", "ready")
    assert (ready.returncode, ready.stdout) == (
        0,
        f"ready=yes here=- store=connected own=0 held={PAIRS}\n",
    )
    # A machine that lives keeps them.
    text = refused(fleet, "b", "take")
    assert all(f"{address} (" in text for address in MOVING), text
    assert "is this machine" in refused(fleet, "a", "move", "a")
    assert "no machine 'c'" in refused(fleet, "a", "move", "c")

    traffic.mark()
    done = fleet.command("a", "move", "b")
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, MOVING, "")
    b.wait_for_line("failover_asked by=a")
    a.wait_for_line("reason=moved", count=PAIRS)
    fleet.wait_until_spliced("b", PAIRS)
    traffic.poke()
    print(f"longest gap of the move: {traffic.longest_gap_s():.3f} s")
    assert traffic.errors() == []

    fleet.wait_until_held("a", PAIRS)
    hosts.cut_off("b")
    b.kill()
    done = fleet.command("a", "take")
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, MOVING, "")
    fleet.wait_until_spliced("a", PAIRS)
    # A machine that does not run takes nothing, and the one that asked keeps its addresses.
    assert "does not answer" in refused(fleet, "a", "move", "b")
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.timeout(300)
def test_pairs_go_on_where_the_machine_that_has_taken_them_dies_at_once(fleet: Fleet) -> None:
    """Before its workers have them, and the store its claim: then with both, and the first again.

    The first one comes back with its own records.
    """
    hosts, traffic = fleet.hosts, fleet.traffic
    first, second = "a", "b"
    for name in (first, second):
        fleet.start(name, mover="command")
    assert fleet.command(first, "take").returncode == 0
    fleet.open(first, PAIRS)
    for is_known in (False, True):
        fleet.wait_until_held(second, PAIRS)
        hosts.cut_off(first)
        fleet.daemons[first].kill()
        done = fleet.command(second, "take")
        assert (done.returncode, done.stderr) == (0, "")
        if is_known:
            fleet.wait_until_spliced(second, PAIRS)
            fleet.daemons[second].wait_for_line("failover_taken")
        hosts.cut_off(second)
        fleet.daemons[second].kill()
        hosts.take_addresses(first)
        hosts.connect(first)
        fleet.start(first, mover="command")
        done = fleet.command(first, "take")
        assert (done.returncode, done.stderr) == (0, "")
        fleet.wait_until_spliced(first, PAIRS)
        traffic.poke()
        assert traffic.errors() == [], is_known
        hosts.take_addresses(second)
        hosts.connect(second)
        fleet.start(second, mover="command")
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.timeout(120)
def test_where_something_else_moves_the_addresses_no_command_does(fleet: Fleet) -> None:
    fleet.hosts.give_addresses("a")
    fleet.start("a")
    fleet.hosts.take_addresses("a")
    for words in (("take",), ("take", "--force"), ("move", "b")):
        assert "something else moves the addresses" in refused(fleet, "a", *words)
