"""Silent peers: those that are there are left alone, those that are gone are found out.

On every datapath: copied and redirected pairs have their sockets' keepalives, and for spliced
ones the keeper asks in their sockets' name.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.peers import ends_with_reset
from tests.helpers.spliced import Site, config, exchange
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.faults import Faults
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
DATAPATHS: Final = ("copy", "sockmap", "splice")
QUICK: Final = "keepalive: {idle: 1s, interval: 1s, count: 2}"


@pytest.fixture(scope="module")
def sites(hosts: Topology, start_shared_forwarder: StartForwarder) -> dict[str, Site]:
    made = {}
    for number, datapath in enumerate(DATAPATHS):
        text = config(QUICK, datapath=datapath).replace(":700", f":70{number + 1}")
        with hosts.forwarder.entered():
            made[datapath] = Site(hosts, start_shared_forwarder(text, instance=datapath))
    return made


@contextlib.contextmanager
def pairs(
    site: Site, datapath: str, *ways: Way
) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with contextlib.ExitStack() as stack:
        made = []
        for way in ways:
            for version in VERSIONS:
                client, server = stack.enter_context(site.pair(way, version))
                wait_until_on(site, client, datapath)
                made.append((client, server))
        yield made


def wait_until_on(site: Site, client: socket.socket, datapath: str) -> None:
    def look() -> bool:
        return (site.row(client) or {}).get("datapath") == datapath

    try:
        wait_for(look, f"on {datapath}")
    except AssertionError as error:
        raise AssertionError(f"{error}; {site.pairs()}") from None


def left_to_send(site: Site) -> list[int]:
    """Of each of the forwarder's connected sockets: bytes that nobody has acknowledged to it."""
    listed = site.topology.forwarder.run("ss", "-tnH", "state", "established")
    return [int(line.split()[1]) for line in listed.splitlines()]


def heard(sock: socket.socket) -> int:
    """Segments that have come to its TCP (TCP_INFO: tcpi_segs_in)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
    return int.from_bytes(info[140:144], "little")


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_a_silent_peer_that_is_there_is_asked_and_left_alone(
    sites: dict[str, Site], datapath: str
) -> None:
    site = sites[datapath]
    remote = site.topology.way()
    local = site.topology.way(client_local=True, server_local=True)
    with pairs(site, datapath, remote, local) as made:
        made[0][0].shutdown(socket.SHUT_WR)  # half-closed, too
        assert made[0][1].recv(1) == b""
        before = {end: heard(end) for pair in made for end in pair}
        ids = [row["id"] for row in site.pairs()]
        assert len(ids) == len(made)
        stays(lambda: [row["id"] for row in site.pairs()] == ids, "all are there", for_s=6.0)
        for end, number in before.items():
            # One of them answers, and the other hears of that: at least two of six seconds.
            assert heard(end) >= number + 2, end
        for client, server in made[1:]:
            exchange(client, server, 100_003)


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("datapath", DATAPATHS)
def test_a_peer_that_is_cut_off_is_found_out(
    sites: dict[str, Site], bad_network: Faults, datapath: str, end: str
) -> None:
    site = sites[datapath]
    door = (site.topology.forwarder, "f0" if end == "client" else "f1")
    before = site.stats()["closed"].get(f"{end}_timeout", 0)
    with pairs(site, datapath, site.topology.way()) as made:
        # What TCP has sent it sends again and again, and as long asks no questions.
        wait_for(lambda: not any(left_to_send(site)), "all has been acknowledged")
        bad_network.set(lose=1.0)
        with bad_network.put_on(door):
            for client, server in made:
                assert ends_with_reset(server if end == "client" else client) == b""
            site.wait_for_no_pairs()
        assert site.stats()["closed"][f"{end}_timeout"] == before + len(made)


@pytest.mark.parametrize("datapath", ["copy", "splice"])
def test_it_can_be_switched_off(sites: dict[str, Site], datapath: str) -> None:
    site = sites[datapath]
    text = config("keepalive: off", datapath=datapath)
    number = DATAPATHS.index(datapath) + 1
    site.forwarder.reconfigure(text.replace(":700", f":70{number}"))
    site.forwarder.control().reload()
    try:
        with pairs(site, datapath, site.topology.way()) as made:
            # What was said last is acknowledged late.
            stays(lambda: len(site.pairs()) == len(made), "all are there", for_s=0.5)
            before = {end: heard(end) for pair in made for end in pair}
            stays(lambda: len(site.pairs()) == len(made), "all are there", for_s=4.0)
            assert {end: heard(end) for end in before} == before
    finally:
        site.forwarder.reconfigure(config(QUICK, datapath=datapath).replace(":700", f":70{number}"))
        site.forwarder.control().reload()
