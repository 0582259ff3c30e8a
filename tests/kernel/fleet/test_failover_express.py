"""Pairs that the kernel has opened by itself (express) go on through another machine."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest

from pyforwarder.datapath.proof.apart import prove_express_apart, prove_splice_apart
from pyforwarder.datapath.proof.remembered import proven
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.peers import address_text, seconds_until_reset
from tests.helpers.successive_daemons import Lineage
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.fleet_of_two import Fleet

PORTS = 256
PAIRS = 16
# So few that places are not short: the ended ones rest for a minute, and are known to the programs.
SHORT = 32
YOUNG = 8
WITHIN_S = scaled_s(1.0)
# What is in the store for so long, the other machine has.
HELD_WITHIN_S = scaled_s(1.0)


@pytest.fixture(scope="module", autouse=True)
def is_proven(network: None) -> None:
    """Compiled and proven once, so that no daemon has to do it within its deadline."""
    del network
    for name, prove in (("splice", prove_splice_apart), ("express", prove_express_apart)):
        proven(name, "nobody", prove, anew=False)


@pytest.fixture
def express(fleet: Fleet) -> Fleet:
    """Both machines keep the same ports for express."""
    fleet.express_ports = PORTS
    return fleet


def play_short_ones(fleet: Fleet) -> None:
    """Connections that begin and end, each with an exchange."""
    for n in range(SHORT):
        client, server = fleet.by_kernel(6 if n % 2 else 4)
        with client, server:
            for one, other in ((client, server), (server, client)):
                one.sendall(b"short")
                assert other.recv(5) == b"short"
                one.shutdown(socket.SHUT_WR)
            assert client.recv(1) == server.recv(1) == b""


def are_named(fleet: Fleet, name: str, clients: set[str]) -> bool:
    """Whether these pairs, and no others, are shown with their listener and rule."""
    rows = fleet.daemons[name].control().pairs()
    named = {(row["client"], row["datapath"], row["rule"]) for row in rows}
    return named == {(client, "splice", "all") for client in clients}


def left_by_kernel(fleet: Fleet, name: str) -> dict[str, int]:
    """What the kernel has left to workers of this machine, by why."""
    stats = fleet.daemons[name].look("stats")
    assert isinstance(stats, dict)
    left: dict[str, int] = stats["express_left"]
    return left


@pytest.mark.timeout(300)
@pytest.mark.parametrize("comes_back", ["lives", "without", "with"])
def test_pairs_of_express_go_on_through_deaths_and_moves_and_new_ones_get_other_ports(
    express: Fleet, comes_back: str
) -> None:
    """What each machine has had a moment ago are the ports that the other one uses then."""
    fleet, hosts, traffic = express, express.hosts, express.traffic
    hosts.give_addresses("a")
    a, _ = fleet.start("a"), fleet.start("b")
    play_short_ones(fleet)
    fleet.open_by_kernel(PAIRS)
    fleet.wait_until_spliced("a", PAIRS)
    fleet.wait_until_held("b", PAIRS)
    wait_for(lambda: are_named(fleet, "a", traffic.clients()), "they are shown")
    wait_for(lambda: all(pair.listener_name for pair in fleet.in_store()), "the store knows how")
    time.sleep(HELD_WITHIN_S)
    taken = {stream.sock.getpeername()[:2] for _, stream in traffic.streams}
    traffic.mark()
    hosts.cut_off("a")
    if comes_back != "lives":
        a.kill()
    hosts.give_addresses("b")
    fleet.wait_until_spliced("b", PAIRS)
    wait_for(lambda: are_named(fleet, "b", traffic.clients()), "b shows them as a did")
    traffic.poke()
    # New ones, while the ports of the others are taken.
    fleet.open_by_kernel(PAIRS)
    new = {stream.sock.getpeername()[:2] for _, stream in traffic.streams[PAIRS:]}
    assert len(new) == PAIRS
    play_short_ones(fleet)
    assert not new & taken
    # The ports that are taken had their turn, and a worker has served.
    wait_for(lambda: left_by_kernel(fleet, "b").get("taken_port"), "they are counted")
    assert traffic.errors() == []
    print(f"longest gap of the death: {traffic.longest_gap_s():.3f} s")
    # The first one comes back, and may get all of them again.
    hosts.take_addresses("a")
    hosts.connect("a")
    if comes_back != "lives":
        if comes_back == "without":
            for pin in sorted(a.place.bpffs.glob("a/splice/*")):
                pin.unlink()
        else:
            fleet.express_ports = 2 * PORTS  # they need not be the same
        fleet.start("a")
    fleet.wait_until_spliced("b", 2 * PAIRS)
    fleet.wait_until_held("a", 2 * PAIRS)
    traffic.mark()
    hosts.give_addresses("a")
    hosts.take_addresses("b")
    fleet.wait_until_spliced("a", 2 * PAIRS)
    traffic.poke()
    fleet.open_by_kernel(PAIRS)
    print(f"longest gap of the move: {traffic.longest_gap_s():.3f} s")
    count = 3 * PAIRS
    fleet.wait_until_spliced("a", count)
    fleet.wait_until_held("b", count)
    hosts.cut_off("a")
    fleet.daemons["a"].kill()
    hosts.give_addresses("b")
    fleet.wait_until_spliced("b", count)
    traffic.poke()
    fleet.open_by_kernel(4)
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []
    peers = [stream.sock.getpeername()[:2] for _, stream in traffic.streams]
    assert len(set(peers)) == len(peers)


@pytest.mark.timeout(300)
def test_pairs_that_were_taken_over_go_on_through_an_upgrade_to_other_ports_and_a_death(
    express: Fleet,
) -> None:
    fleet, hosts, traffic = express, express.hosts, express.traffic
    hosts.give_addresses("a")
    a, b = fleet.start("a"), fleet.start("b")
    fleet.open_by_kernel(PAIRS)
    fleet.wait_until_held("b", PAIRS)
    hosts.cut_off("a")
    a.kill()
    hosts.give_addresses("b")
    fleet.wait_until_spliced("b", PAIRS)
    fleet.open_by_kernel(PAIRS)
    fleet.wait_until_spliced("b", 2 * PAIRS)
    fleet.express_ports = 2 * PORTS
    b.reconfigure(fleet.config("b"))
    with hosts.machines["b"].entered():
        Lineage(b).upgrade()
    try:
        fleet.wait_until_spliced("b", 2 * PAIRS)
        fleet.open_by_kernel(PAIRS)
        fleet.wait_until_spliced("b", 3 * PAIRS)
        traffic.poke()
        hosts.take_addresses("a")
        hosts.connect("a")
        fleet.start("a")
        fleet.wait_until_held("a", 3 * PAIRS)
        assert traffic.errors() == []
        hosts.cut_off("b")
        hosts.give_addresses("a")
        fleet.wait_until_spliced("a", 3 * PAIRS)
        traffic.poke()
        fleet.open_by_kernel(4)
        traffic.pause()
        wait_for(traffic.is_whole, "all bytes have come")
        assert traffic.errors() == []
    finally:
        assert b.command("down", "--now").returncode == 0


@pytest.mark.timeout(240)
def test_what_is_younger_than_a_second_is_reset_as_soon_as_its_ends_speak(express: Fleet) -> None:
    """The store hears nothing of it."""
    fleet, hosts = express, express.hosts
    hosts.give_addresses("a")
    fleet.start("a")
    fleet.start("b")
    fleet.open_by_kernel(4)
    fleet.wait_until_held("b", 4)
    with contextlib.ExitStack() as stack:
        ends = []
        for version in (4, 6):
            client, server = fleet.by_kernel(version)
            stack.callback(client.close)
            stack.callback(server.close)
            ends += [(f"client{version}", client), (f"server{version}", server)]
        hosts.switch.ip("link set am down")
        hosts.cut_off("a")
        fleet.daemons["a"].kill()
        fleet.traffic.mark()
        for _, sock in ends[::2]:
            sock.sendall(b"y")
        hosts.give_addresses("b")
        since_s = time.monotonic()
        for _, sock in ends[1::2]:
            with contextlib.suppress(ConnectionResetError):
                sock.sendall(b"y")
        took_s = {what: seconds_until_reset(what, sock, since_s) for what, sock in ends}
        assert max(took_s.values()) < WITHIN_S + fleet.traffic.host_late_s(), took_s
    # Nobody else's pair was.
    fleet.traffic.pause()
    wait_for(fleet.traffic.is_whole, "all bytes have come")
    assert fleet.traffic.errors() == []


@pytest.mark.timeout(240)
def test_a_planned_move_takes_what_lasts_and_loses_no_byte_of_what_is_young(
    express: Fleet,
) -> None:
    """Whose ends speak before the other machine knows of them are reset: never wrong bytes."""
    fleet, traffic = express, express.traffic
    for name in ("a", "b"):
        fleet.start(name, mover="command")
    assert fleet.command("a", "take").returncode == 0
    fleet.open_by_kernel(PAIRS)
    fleet.wait_until_held("b", PAIRS)
    done = fleet.command("a", "move", "b")
    assert (done.returncode, done.stderr) == (0, "")
    fleet.wait_until_spliced("b", PAIRS)
    traffic.poke()
    fleet.wait_until_held("a", PAIRS)
    fleet.open_by_kernel(YOUNG)
    # At once, and not by a command, which takes a second.
    fleet.hosts.give_addresses("a")
    fleet.hosts.take_addresses("b")
    fleet.wait_until_spliced("a", PAIRS, or_more=True)
    traffic.poke()
    # All that go on are a's.
    fleet.daemons["b"].wait_for_no_pairs()
    young = set(range(PAIRS, PAIRS + YOUNG))
    failed = [error.split() for error in traffic.errors()]
    assert {int(number) for number, *_ in failed} <= young, failed
    assert {what for _, _, what in failed} <= {"ConnectionResetError", "BrokenPipeError"}, failed
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    print(f"{len({number for number, *_ in failed})} of {YOUNG} young ones were reset")
    gone = {int(number) for number, *_ in failed}
    left = {
        address_text(client.sock.getsockname()[:2])
        for n, (client, _) in enumerate(traffic.streams)
        if n not in gone
    }
    wait_for(lambda: are_named(fleet, "a", left), "a shows what goes on")
