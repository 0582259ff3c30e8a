"""Spliced pairs when interfaces and routes change under them: they go on, or are reset.

A pair of a plain TCP proxy does the one or the other, too; none may hang in silence.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.rerouting import gives_up_after_s
from pyforwarder.datapath.splice.splicing import Splicing
from tests.helpers.keepers import keeper_of
from tests.helpers.netns import Network
from tests.helpers.peers import Waiting, dial, ends_with_reset
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.stage import SLOTS
from tests.helpers.topology import lay_wire, topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
# The server's address that both of its wires lead to.
ANYCAST: Final = {4: "10.9.0.1", 6: "fd09::1"}


@pytest.fixture
def hosts() -> Iterator[Topology]:
    with topology() as hosts:
        yield hosts


@pytest.fixture
def site(hosts: Topology, start_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_forwarder(config()))


def goes_on(
    site: Site, pairs: list[tuple[socket.socket, socket.socket, int]], size: int = 100_003
) -> None:
    for client, server, pair_id in pairs:
        exchange(client, server, size)
        row = site.row(client)
        assert row is not None
        assert (row["id"], row["datapath"]) == (pair_id, DATAPATH)


def move_addresses(site: Site, old: str, new: str, net: int) -> None:
    site.topology.forwarder.ip(
        f"address del 10.{net}.0.1/24 dev {old}",
        f"address del fd{net:02}::1/64 dev {old}",
        f"address add 10.{net}.0.1/24 dev {new}",
        f"address add fd{net:02}::1/64 dev {new} nodad",
    )


@pytest.mark.each_attachment
def test_an_interface_becomes_a_port_of_a_bridge_and_is_released(site: Site) -> None:
    forwarder, way = site.topology.forwarder, site.topology.way()
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS]
        for name, net in (("f0", 1), ("f1", 2)):
            forwarder.ip("link add b0 type bridge", "link set b0 up", f"link set {name} master b0")
            move_addresses(site, name, "b0", net)
            goes_on(site, pairs)
            with site.pair(way, 4) as (client, server):
                exchange(client, server, 100_003)
            forwarder.ip(f"link set {name} nomaster")
            move_addresses(site, "b0", name, net)
            goes_on(site, pairs)
            forwarder.ip("link delete b0")
            goes_on(site, pairs)
        with site.spliced(way, 4) as (client, server, _):
            exchange(client, server, 100_003)


def two_wires(hosts: Topology) -> None:
    """A second one between forwarder and server, f3 and s3."""
    lay_wire(hosts.server, "s3", hosts.forwarder, "f3", mtu=1500, net=3)
    hosts.server.ip(*(f"address add {address} dev lo" for address in ANYCAST.values()))
    hosts.server.set(ipv4__conf__all__rp_filter=0)
    route_by(hosts, "add", 2)


def route_by(hosts: Topology, verb: str, net: int) -> None:
    name = {2: "f1", 3: "f3"}[net]
    hosts.forwarder.ip(
        f"route {verb} {ANYCAST[4]}/32 via 10.{net}.0.2 dev {name} src 10.2.0.1",
        f"route {verb} {ANYCAST[6]}/128 via fd{net:02}::2 dev {name} src fd02::1",
    )


@pytest.fixture
def twofold(hosts: Topology, start_forwarder: StartForwarder) -> Site:
    two_wires(hosts)
    with hosts.forwarder.entered():
        return Site(hosts, start_forwarder(config()))


@contextlib.contextmanager
def pairs_by_either(site: Site) -> Iterator[list[tuple[socket.socket, socket.socket, int]]]:
    way = site.topology.way()
    way = type(way)(way.name, way.client, way.server, way.listener, ANYCAST, way.doors)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(site.spliced(way, version)) for version in VERSIONS]


@pytest.mark.each_attachment
def test_a_route_moves_to_another_interface(twofold: Site) -> None:
    hosts = twofold.topology
    with pairs_by_either(twofold) as pairs:
        route_by(hosts, "replace", 3)
        wait_for(lambda: counts_by(twofold, "f3", pairs), "packets go by the other interface")
        goes_on(twofold, pairs)
        # What the server says may come by either as long as both are there.
        hosts.server.ip(
            "route replace 10.2.0.1/32 via 10.3.0.1 dev s3",
            "route replace fd02::1/128 via fd03::1 dev s3",
        )
        goes_on(twofold, pairs)
        hosts.forwarder.ip("link set f1 down", "address add 10.2.0.1/32 dev lo")
        hosts.forwarder.ip("address add fd02::1/128 dev lo")
        goes_on(twofold, pairs)


def counts_by(site: Site, name: str, pairs: list[tuple[socket.socket, socket.socket, int]]) -> bool:
    """Whether bytes of all of them leave by that interface."""

    def sent() -> int:
        said = site.topology.forwarder.run("ip", "-s", "-j", "link", "show", "dev", name)
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    before = sent()
    for client, server, _ in pairs:
        exchange(client, server, 50_000)
    return sent() - before >= 50_000 * len(pairs)


def test_without_an_interface_another_route_leads_there(twofold: Site) -> None:
    hosts = twofold.topology
    hosts.forwarder.ip(
        "route add 10.9.0.0/16 via 10.3.0.2 dev f3",
        "route add fd09::/64 via fd03::2 dev f3",
        "address add 10.2.0.1/32 dev lo",
    )
    hosts.server.ip(
        "route add 10.2.0.1/32 via 10.3.0.1 dev s3 metric 5",
        "route add fd02::1/128 via fd03::1 dev s3 metric 5",
    )
    with pairs_by_either(twofold) as pairs:
        hosts.forwarder.ip("address add fd02::1/128 dev lo")
        hosts.forwarder.ip("link delete f1")
        goes_on(twofold, pairs)


def check_reset(site: Site, *pairs: tuple[socket.socket, socket.socket, int]) -> None:
    """All of them, because there is no way any more."""
    for client, _, pair_id in pairs:
        assert ends_with_reset(client) == b""
        site.wait_until_gone(pair_id)


def test_without_a_way_a_pair_is_reset(site: Site) -> None:
    """When TCP would have given up, and not before: a route may come back."""
    hosts = site.topology
    hosts.forwarder.set(ipv4__tcp_retries2=3)
    way = hosts.way()
    unreachable = [f"unreachable {way.destination[4]}/32", f"unreachable {way.destination[6]}/128"]
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS]
        hosts.forwarder.ip(*(f"route {verb} {u}" for verb in ("add", "del") for u in unreachable))
        goes_on(site, pairs)
        hosts.forwarder.ip(*(f"route add {u}" for u in unreachable))
        check_reset(site, *pairs)
        hosts.forwarder.ip(*(f"route del {u}" for u in unreachable))
        # A tunnel without Ethernet's header takes a route over: our programs cannot be there.
        pair = stack.enter_context(site.spliced(way, 4))
        hosts.forwarder.ip("tuntap add t0 mode tun", "link set t0 up")
        hosts.forwarder.ip(f"route add {way.destination[4]}/32 dev t0 src 10.2.0.1")
        check_reset(site, pair)
        hosts.forwarder.ip("link delete t0")
        pair = stack.enter_context(site.spliced(way, 4))
        hosts.forwarder.ip("link set f1 down")
        check_reset(site, pair)
        assert site.stats()["closed"]["no_route"] == 4


def test_a_keeper_that_is_replaced_looks_at_what_has_changed(twofold: Site) -> None:
    """Nobody was there to hear of it."""
    hosts = twofold.topology
    with pairs_by_either(twofold) as pairs:
        keeper = keeper_of(twofold.forwarder)
        keeper.suspend()
        route_by(hosts, "replace", 3)
        keeper.kill()
        wait_for(lambda: counts_by(twofold, "f3", pairs), "packets go by the other interface")
        goes_on(twofold, pairs)


def programs_on(interface: int) -> int:
    """How many look at what comes in there."""
    return bpf.query_interface(interface, bpf.AttachType.TCX_INGRESS)


def test_a_keeper_that_dies_where_nothing_is_pinned(hosts: Topology) -> None:
    """Programs that it had put on an interface go with it, and the next one puts them back."""
    with contextlib.ExitStack() as stack:
        newcomer = stack.enter_context(contextlib.closing(Network()))
        # No address comes late, which the next keeper would hear of.
        for network in (hosts.forwarder, newcomer):
            network.set(ipv6__conf__default__accept_dad=0)
        stack.enter_context(hosts.forwarder.entered())
        maps = KernelMaps.load(workers=1, slots=SLOTS)
        stack.callback(maps.close)
        splicing = Splicing(
            SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd), workers=1
        )
        stack.callback(splicing.close)
        lay_wire(newcomer, "n0", hosts.forwarder, "f2", mtu=1500, net=8)
        listener = stack.enter_context(socket.create_server(("10.8.0.1", 0)))
        with hosts.server.entered():
            waiting = stack.enter_context(Waiting("10.2.0.2"))

        def joined() -> tuple[socket.socket, socket.socket] | None:
            with newcomer.entered():
                client = stack.enter_context(dial(listener.getsockname()))
            accepted = stack.enter_context(listener.accept()[0])
            outgoing = stack.enter_context(dial(waiting.address))
            server = stack.enter_context(waiting.accept())
            fds = [accepted.fileno(), outgoing.fileno()]
            fields = {"pending": [0, 0], "any_interface": 0, "keepalive": [0, 0, 0]}
            said = splicing.patient_client(0).ask("join", fds, id=1, slot=0, **fields)
            return (client, server) if said.get("busy") == 0 else None

        # The programs are put there for the first pair, whose handshake they have not seen.
        assert joined() is None
        client, server = wait_for(joined, "spliced") or (listener, listener)
        exchange(client, server)
        splicing.keeper.kill()
        wait_for(splicing.keeper.has_died, "it has ended")
        if attaching.kind() == "tcx":  # filters stay
            interface = socket.if_nametoindex("f2")
            wait_for(lambda: not programs_on(interface), "its programs went with it")
        splicing.keeper.restart()
        exchange(client, server, 100_003)


def test_tcp_gives_up_when_the_kernel_s_manual_says_so() -> None:
    """15, the default, is said to be 924.6 s (Documentation/networking/ip-sysctl.rst)."""
    assert round(gives_up_after_s(15), 1) == 924.6
    assert round(gives_up_after_s(3), 1) == 3.0
