"""Many spliced pairs end at the same moment: every peer hears of it, also one that only listens.

Its own connection is silent, so it would learn nothing by itself: it has to be told, with a RST.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.peers import Waiting, dial_through
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.topology import topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

# More than a worker tells the keeper of at the same time, by far.
MANY: Final = 300
# Each takes a millisecond or less; and an end that is not told at all hangs for hours.
WITHIN_S: Final = 10.0
pytestmark = pytest.mark.timeout(scaled_s(180))

Pairs = list[tuple[socket.socket, socket.socket]]


@pytest.fixture
def site(start_forwarder: StartForwarder) -> Iterator[Site]:
    with topology() as hosts, hosts.forwarder.entered():
        yield Site(hosts, start_forwarder(config("workers: 1")))


@contextlib.contextmanager
def many(site: Site) -> Iterator[Pairs]:
    """Spliced pairs in which nobody says anything any more."""
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        with way.server.entered():
            waiting = stack.enter_context(Waiting(way.destination[4]))
        pairs: Pairs = []
        for _ in range(MANY):
            with way.client.entered():
                client = dial_through(site.via(way, 4), waiting.address)
            stack.enter_context(client)
            server = stack.enter_context(waiting.accept())
            exchange(client, server)
            pairs.append((client, server))
        wait_for(lambda: site.joined() == MANY, "all are on the datapath")
        # Such a one has no tail that its peer has not acknowledged.
        wait_for(
            lambda: all(row["datapath"] == DATAPATH for row in site.pairs()), "and shown there"
        )
        yield pairs


def hear_of_it(ends: list[socket.socket]) -> None:
    """Each gets a RST, and says nothing before; the slowest within `WITHIN_S`."""
    poll = select.poll()
    silent = {end.fileno(): end for end in ends}
    for fd in silent:
        poll.register(fd, select.POLLIN)
    until_s = time.monotonic() + scaled_s(WITHIN_S)
    while silent:
        left_s = until_s - time.monotonic()
        assert left_s > 0, f"{len(silent)} of {len(ends)} have heard of nothing"
        for fd, _ in poll.poll(left_s * 1000):
            with pytest.raises(ConnectionResetError):
                silent.pop(fd).recv(100)
            poll.unregister(fd)


def flush(site: Site) -> None:
    assert len(site.forwarder.control().flush_all()["flushed"]) == MANY


def flush_by_number(site: Site) -> None:
    numbers = [row["id"] for row in site.pairs()]
    assert sorted(site.forwarder.control().flush(numbers)["flushed"]) == sorted(numbers)


@pytest.mark.parametrize("end", [flush, flush_by_number])
def test_every_peer_of_many_flushed_pairs_hears_of_it(
    site: Site, end: Callable[[Site], None]
) -> None:
    (worker,) = site.forwarder.workers()
    descriptors = worker.num_fds()
    with many(site) as pairs:
        end(site)
        hear_of_it([end for pair in pairs for end in pair])
        site.wait_for_no_pairs()
        closed = site.stats()["closed"]
        assert closed["flushed"] == MANY
        assert closed.get("internal", 0) == 0
        wait_for(lambda: worker.num_fds() <= descriptors, "it has no more descriptors than before")
        with site.spliced(site.topology.way(), 4) as (client, server, _):
            exchange(client, server, 100_003)


@pytest.mark.parametrize("now", [True, False], ids=["now", "after the drain"])
def test_every_peer_hears_of_the_daemon_s_end(
    start_forwarder: StartForwarder, *, now: bool
) -> None:
    more = "workers: 1" if now else "workers: 1\ntimeouts: {connect: 30s, drain: 1s}"
    with topology() as hosts, hosts.forwarder.entered():
        site = Site(hosts, start_forwarder(config(more)))
        with many(site) as pairs:
            site.forwarder.control().down(now=now)
            hear_of_it([end for pair in pairs for end in pair])
            assert site.forwarder.wait() == 0


def test_every_client_hears_that_the_way_to_a_network_is_gone(site: Site) -> None:
    site.topology.forwarder.set(ipv4__tcp_retries2=3)  # so long it may come back
    with many(site) as pairs:
        site.topology.forwarder.ip("link set f1 down")
        hear_of_it([client for client, _ in pairs])
        site.wait_for_no_pairs()
        assert site.stats()["closed"]["no_route"] == MANY
