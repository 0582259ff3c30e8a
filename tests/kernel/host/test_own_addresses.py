"""Which addresses are this host's: not all to which a socket can be bound."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import pytest

from pyforwarder.runtime.own_addresses import this_host_has
from pyforwarder.worker.generation import is_local
from tests.helpers.netns import Network, private_network

OWN = ["127.0.0.1", "127.3.2.1", "10.9.0.1", "10.8.0.1", "10.77.3.4", "::1", "fd09::1", "fd08::1"]
OTHERS = ["10.9.0.2", "10.9.0.255", "198.51.100.1", "fd09::2", "2001:db8::1"]


@pytest.fixture(params=[0, 1])
def net(request: pytest.FixtureRequest) -> Iterator[Network]:
    """With and without `ip_nonlocal_bind`, and with routes to everywhere."""
    with private_network() as network:
        network.ip(
            "link add d0 type veth peer name d1",
            "link set d0 up",
            "link set d1 up",
            "address add 10.9.0.1/24 dev d0",
            "address add fd09::1/64 dev d0 nodad",
            "address add fe80::a/64 dev d0 nodad",
            "address add 10.8.0.1/32 dev lo",
            "address add fd08::1/128 dev lo nodad",
            "route add local 10.77.0.0/16 dev lo",
            "route add default via 10.9.0.2",
            "route add ::/0 via fd09::2",
        )
        network.set(ipv4__ip_nonlocal_bind=request.param, ipv6__ip_nonlocal_bind=request.param)
        yield network


def test_own_addresses_are_told_from_those_that_can_be_bound(net: Network) -> None:
    del net
    found = {ip: this_host_has(ipaddress.ip_address(ip)) for ip in OWN + OTHERS}
    assert found == dict.fromkeys(OWN, True) | dict.fromkeys(OTHERS, False)
    assert {ip: is_local(ip) for ip in found} == found
    assert is_local("::ffff:10.9.0.1")
    assert not is_local("::ffff:10.9.0.2")


def test_link_local_addresses_are_ones_own_on_their_link(net: Network) -> None:
    del net
    own, other = (ipaddress.ip_address(ip) for ip in ("fe80::a", "fe80::b"))
    link, another = (socket.if_nametoindex(name) for name in ("d0", "d1"))
    assert this_host_has(own, link)
    assert not this_host_has(own, another)
    assert not this_host_has(other, link)
    assert not this_host_has(own)
    for zone in ("d0", str(link)):
        assert is_local(f"fe80::a%{zone}")
        assert not is_local(f"fe80::b%{zone}")
