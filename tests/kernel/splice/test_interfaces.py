"""Interfaces that come, change and go while a forwarder splices.

The programs are on interfaces that had addresses at `up`, and on those that a pair has needed. A
pair whose handshake they have not seen goes another way, and says so; the next one is spliced.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.netns import Network
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.topology import lay_wire, topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
NET: Final = 8  # of the wire that comes late
UNSEEN: Final = "not spliced: its handshake was not seen under these addresses"
PATHS_DIFFER: Final = "not spliced: packets of the one do not fit the other's path"


@pytest.fixture
def hosts() -> Iterator[Topology]:
    with topology() as hosts:
        yield hosts
        assert hosts.checksum_errors() == 0


@pytest.fixture
def site(hosts: Topology, start_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_forwarder(config()))


@pytest.fixture
def newcomer() -> Iterator[Network]:
    """A host with no wire yet."""
    with contextlib.closing(Network()) as network:
        yield network


def lay(site: Site, newcomer: Network, *, mtu: int = 1500) -> None:
    lay_wire(newcomer, "n0", site.topology.forwarder, "f2", mtu=mtu, net=NET)


def way_of(site: Site, newcomer: Network, role: str) -> Way:
    """The newcomer is a client of the server, or a server for the client."""
    way = site.topology.way()
    if role == "client":
        return replace(way, client=newcomer, listener={4: f"10.{NET}.0.1", 6: f"fd{NET:02}::1"})
    return replace(way, server=newcomer, destination={4: f"10.{NET}.0.2", 6: f"fd{NET:02}::2"})


def play(site: Site, way: Way, version: int, *, bytes_each: int = 300_007) -> tuple[str, str]:
    """A pair carries its bytes both ways and ends: (its datapath, the reason for that)."""
    with site.pair(way, version) as (client, server):
        row = wait_for(lambda: settled(site, client), "it is on a kernel datapath")
        exchange(client, server, bytes_each)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"last")
        server.shutdown(socket.SHUT_WR)
        assert client.recv(5) == b"last"
        assert client.recv(1) == b""
    assert row is not None
    return row["datapath"], row["reason"]


def settled(site: Site, client: socket.socket) -> dict[str, str] | None:
    row = site.row(client)
    return row if row and row["datapath"] in (DATAPATH, "sockmap") else None


def comes_to_be_spliced(site: Site, way: Way, version: int) -> None:
    """All pairs carry all their bytes; the first may be unspliced, and says why."""
    datapath, reason = play(site, way, version)
    assert datapath == DATAPATH or reason == UNSEEN
    for _ in range(3):
        assert play(site, way, version)[0] == DATAPATH


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_interface_that_comes_later(site: Site, newcomer: Network, role: str) -> None:
    lay(site, newcomer)
    for version in VERSIONS:
        comes_to_be_spliced(site, way_of(site, newcomer, role), version)
    # It is not only those that are new.
    assert play(site, site.topology.way(), 4)[0] == DATAPATH
    site.wait_for_no_pairs()


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_interface_that_gets_its_first_address_later(
    hosts: Topology, start_forwarder: StartForwarder, newcomer: Network, role: str
) -> None:
    hosts.forwarder.ip(f"link add f2 type veth peer name n0 netns {newcomer.path}")
    with hosts.forwarder.entered():
        site = Site(hosts, start_forwarder(config()))
    hosts.forwarder.ip("link set f2 up", *addresses("f2", 1))
    newcomer.ip("link set n0 up", *addresses("n0", 2))
    for version in VERSIONS:
        comes_to_be_spliced(site, way_of(site, newcomer, role), version)
    site.wait_for_no_pairs()


def test_packets_of_a_narrow_interface_that_comes_later(site: Site, newcomer: Network) -> None:
    """Clients were asked for larger segments than it carries; after a reload they are not."""
    lay(site, newcomer, mtu=1300)
    way = way_of(site, newcomer, "server")
    for version in VERSIONS:
        comes_by = [play(site, way, version) for _ in range(2)]
        assert {datapath for datapath, _ in comes_by} == {"sockmap"}
        assert comes_by[-1][1] == PATHS_DIFFER
    site.forwarder.control().reload()
    for version in VERSIONS:
        comes_to_be_spliced(site, way, version)
    site.wait_for_no_pairs()


@pytest.mark.each_attachment
def test_pairs_by_an_interface_that_came_later_outlive_the_daemon(
    site: Site, newcomer: Network, start_forwarder: StartForwarder
) -> None:
    lay(site, newcomer)
    way = way_of(site, newcomer, "client")
    for version in VERSIONS:
        play(site, way, version)
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS]
        for client, server, _ in pairs:
            exchange(client, server)
        site.forwarder.kill()
        wait_for(lambda: not site.forwarder.place.processes(), "all of it has ended")
        for client, server, _ in pairs:
            exchange(client, server, 100_003)
        with site.topology.forwarder.entered():
            next_site = Site(site.topology, start_forwarder(config()))
        for client, server, pair_id in pairs:
            exchange(client, server, 100_003)
            row = next_site.row(client)
            assert row is not None
            assert (row["id"], row["datapath"]) == (pair_id, DATAPATH)
    next_site.wait_for_no_pairs()
    # The programs were there all the time.
    assert play(next_site, way, 4)[0] == DATAPATH


@pytest.mark.each_attachment
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("how", ["new", "moved"])
def test_an_interface_of_the_same_number_in_the_place_of_one_that_went(
    site: Site, newcomer: Network, role: str, how: str
) -> None:
    """Made anew, or taken to another namespace and back: the programs are not on it any more."""
    way = way_of(site, newcomer, role)
    forwarder = site.topology.forwarder
    lay(site, newcomer)
    comes_to_be_spliced(site, way, 4)
    with forwarder.entered():
        before = socket.if_nametoindex("f2")
    if how == "new":
        forwarder.ip(
            "link delete f2",
            f"link add f2 index {before} type veth peer name n0 netns {newcomer.path}",
        )
        newcomer.ip("link set n0 up", *addresses("n0", 2))
    else:
        with contextlib.closing(Network()) as elsewhere:
            forwarder.ip(f"link set f2 netns {elsewhere.path}")
            elsewhere.ip(f"link set f2 netns {forwarder.path}")
    forwarder.ip("link set f2 up", *addresses("f2", 1))
    with forwarder.entered():
        assert socket.if_nametoindex("f2") == before
    for version in VERSIONS:
        comes_to_be_spliced(site, way, version)
    site.wait_for_no_pairs()


def addresses(name: str, number: int) -> tuple[str, str]:
    return (
        f"address add 10.{NET}.0.{number}/24 dev {name}",
        f"address add fd{NET:02}::{number}/64 dev {name} nodad",
    )
