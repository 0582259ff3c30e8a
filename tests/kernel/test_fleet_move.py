"""`fleet move`, `take` and `ready`: the addresses go where somebody says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.fleet_of_two import Fleet, fleet_of_two
from tests.helpers.two_machines import BACK, FRONT
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

MOVING = {*FRONT.values(), *BACK.values()}
PAIRS = 8


@pytest.fixture
def fleet(
    start_forwarder: StartForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))
    with fleet_of_two(start_forwarder) as fleet:
        yield fleet


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
    # Who does not run takes nothing, and who asked keeps what it has.
    assert "does not answer" in refused(fleet, "a", "move", "b")
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
