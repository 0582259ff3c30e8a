"""UDP sessions of which `auto` decides when the kernel gets them: in the middle of their talk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.sessions import SessionSite, config, numbered

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
# With room between the first datagrams and a handover, also on a slow machine.
HANDOVER: Final = "handover: {after_round_trips: 8, after: 10m}"


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> SessionSite:
    with hosts.forwarder.entered():
        return SessionSite(hosts, start_shared_forwarder(config(HANDOVER, datapath="auto")))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server_local", [False, True])
@pytest.mark.parametrize("client_local", [False, True])
def test_a_session_is_spliced_in_the_middle_of_its_talk(
    site: SessionSite, version: int, *, client_local: bool, server_local: bool
) -> None:
    """Both directions, in order, while datagrams come from both sides."""
    way = site.topology.way(client_local=client_local, server_local=server_local)
    with site.copied(way, version) as talk:
        row = site.row(talk.client)
        assert row is not None
        assert (row["datapath"], row["reason"]) == ("copy", "too young to pay for a handover")
        for first in range(0, 200, 20):
            numbers = range(first, first + 20)
            for number in numbers:
                talk.client.send(numbered(number, 200))
                talk.server.send(numbered(number, 300))
            for number in numbers:
                assert talk.server.recv(1 << 16) == numbered(number, 200)
                assert talk.client.recv(1 << 16) == numbered(number, 300)
        site.wait_until_spliced(talk, local=client_local + server_local)
        row = site.row(talk.client)
        assert row is not None
        assert row["reason"] == "the best this host and this pair allow"
        assert all(each.latched for each in site.record(talk).direction)
        before = site.copies()
        for number in range(20):
            talk.exchange(numbered(number, 200))
        # What the ends' own sockets get on that host is not ours.
        assert site.copies() - before == 20 * (client_local + server_local)
    assert site.stats()["datagrams_overtaken"] == 0


def test_a_session_that_is_over_soon_is_copied(site: SessionSite) -> None:
    with site.copied(site.topology.way(), 6) as talk:
        talk.exchange()
        row = site.row(talk.client)
        assert row is not None
        assert row["datapath"] == "copy"
