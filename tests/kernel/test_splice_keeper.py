"""A keeper of spliced pairs that hangs: stopped, so that it lives and answers nothing.

Nobody may wait for it but a moment, and nobody's bytes may get lost.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import psutil
import pytest

from pyforwarder.datapath.kernel import KernelMaps
from pyforwarder.datapath.splice_keeper import Splicing
from pyforwarder.datapath.splice_maps import SpliceMaps
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.stage import SLOTS
from tests.helpers.topology import topology
from tests.helpers.waiting import DEADLINE_S, stays, wait_for
from tests.kernel.test_splice_survival import comes_to_be_spliced, rows

if TYPE_CHECKING:
    import socket

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
PAIRS: Final = 20
# All of these pairs together, the first of which waits for a quarter of a second. With a worker
# that waits for two it would be more; without any waiting it is a tenth.
MOST_S: Final = 1.8
NO_KEEPER: Final = "not spliced: the process that does it did not answer"


@pytest.fixture
def site(start_forwarder: StartForwarder) -> Iterator[Site]:
    """One worker, so that whoever waits, all wait."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config("workers: 1")))
        yield site
        assert site.stats()["closed"].get("internal", 0) == 0


def keeper_of(daemon: Daemon) -> psutil.Process:
    """The only one of the daemon's children that stays root."""
    children = psutil.Process(daemon.process.pid).children()
    (keeper,) = (child for child in children if child.uids().real == 0)
    return keeper


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It does nothing meanwhile."""
    process.suspend()
    try:
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "it is stopped")
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def open_pairs(
    site: Site, stack: contextlib.ExitStack, count: int = PAIRS
) -> tuple[list[tuple[socket.socket, socket.socket]], float]:
    """So many pairs whose bytes go both ways, and how long that took."""
    way = site.topology.way()
    began_s = time.monotonic()
    pairs = [stack.enter_context(site.pair(way, VERSIONS[n % 2])) for n in range(count)]
    return pairs, time.monotonic() - began_s


def test_a_keeper_that_hangs_keeps_nobody_waiting_and_is_replaced(site: Site) -> None:
    """Pairs that are spliced go on and end, new ones are carried by another datapath meanwhile."""
    with contextlib.ExitStack() as stack:
        kept, ending = (
            stack.enter_context(site.spliced(site.topology.way(), version)) for version in VERSIONS
        )
        keeper = keeper_of(site.forwarder)
        with stopped(keeper):
            pairs, took_s = open_pairs(site, stack)
            assert took_s < MOST_S
            for client, _ in pairs:
                row = site.row(client)
                assert row is not None
                assert (row["datapath"], row["reason"]) == ("sockmap", NO_KEEPER)
            client, server, pair_id = ending
            client.close()
            assert server.recv(1) == b""
            server.close()
            site.wait_until_gone(pair_id)
            site.forwarder.wait_for_line(f"error: splice_keeper_hangs pid={keeper.pid}")
            site.forwarder.wait_for_line("splice_keeper_died")
        wait_for(lambda: comes_to_be_spliced(site), "pairs are spliced again")
        assert keeper_of(site.forwarder) != keeper
        for client, server in (kept[:2], *pairs):
            exchange(client, server, 100_003)
    site.wait_for_no_pairs()


def test_a_keeper_that_goes_on_is_asked_again_at_once(site: Site) -> None:
    """It finds what it was asked, and leaves it, because that pair is another's by now."""
    supervisor = psutil.Process(site.forwarder.process.pid)
    with contextlib.ExitStack() as stack:
        keeper = keeper_of(site.forwarder)
        with stopped(supervisor):  # so that it is not replaced
            with stopped(keeper):
                before, took_s = open_pairs(site, stack)
                assert took_s < MOST_S
            # Nothing tells when it has read what it found.
            wait_for(lambda: keeper.status() == psutil.STATUS_SLEEPING, "it has gone on")
            after, _ = open_pairs(site, stack)
        for pairs, datapath in ((before, "sockmap"), (after, DATAPATH)):
            for client, server in pairs:
                row = site.row(client)
                assert row is not None
                assert row["datapath"] == datapath, row
                exchange(client, server, 100_003)
        # The supervisor, too, was stopped for longer than a keeper may be: that proves nothing.
        stays(lambda: keeper_of(site.forwarder) == keeper, "the same keeper", for_s=5.0)
    site.wait_for_no_pairs()


def test_pairs_of_a_worker_that_dies_while_the_keeper_hangs(site: Site) -> None:
    """Its successor comes when there is a keeper that can give them to it."""
    with contextlib.ExitStack() as stack:
        way = site.topology.way()
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS * 3]
        for client, server, _ in pairs:
            exchange(client, server)  # so that nothing of before the switch is under way any more
        # And the worker has seen that, before it came to another pair.
        wait_for(lambda: comes_to_be_spliced(site), "another pair is spliced")
        wait_for(lambda: len(rows(site)) == len(pairs), "the other pair is gone")
        (worker,) = site.forwarder.workers()
        with stopped(keeper_of(site.forwarder)):
            worker.kill()
            site.forwarder.wait_for_line("worker_died")
            for client, server, _ in pairs:
                exchange(client, server)
            site.forwarder.wait_for_line("adopted .*pairs=6")
        assert sorted(row["id"] for row in rows(site)) == sorted(pair[2] for pair in pairs)
        for client, server, _ in pairs:
            exchange(client, server)
    site.wait_for_no_pairs()
    wait_for(lambda: comes_to_be_spliced(site), "new pairs are spliced")


def test_a_worker_that_reads_no_answers_keeps_no_other_waiting(network: None) -> None:
    del network
    with contextlib.ExitStack() as stack:
        maps = KernelMaps.load(workers=2, slots=SLOTS)
        stack.callback(maps.close)
        splicing = Splicing(
            SpliceMaps.load(workers=2, slots=SLOTS, pairs_fd=maps.pairs_fd), workers=2
        )
        stack.callback(splicing.close)
        sock = splicing.keeper.clients[0]
        sock.settimeout(DEADLINE_S)
        request = json.dumps({"do": "clear", "n": 1, "until": time.monotonic() + DEADLINE_S})
        for _ in range(1000):  # a queue takes some hundreds
            sock.send(request.encode())
        assert splicing.client(1).ask("adopt").keys() == {"n"}
