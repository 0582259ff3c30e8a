"""What spliced pairs that do nothing cost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

from bench.memory import tree_bytes
from tests.helpers.spliced import Site, config
from tests.helpers.survival import finish, held, rows
from tests.helpers.topology import topology
from tests.helpers.waiting import stays

if TYPE_CHECKING:
    from tests.helpers.netns import Network
    from tests.helpers.transfers import Transfers
    from tests.kernel.conftest import StartForwarder

IDLE_S: Final = 5.0
# Of the daemon's processes together, its keeper and every worker: some objects of Python's.
MOST_OF_OURS: Final = 8 << 10
# What our two sockets have in their queues, and what TCP has set aside for those: next to nothing.
MOST_OF_QUEUES: Final = 1 << 10
# `ss --memory`: what is received, what is to be sent, what is set aside (man 8 ss).
SKMEM: Final = re.compile(r"skmem:\(r(\d+),rb\d+,t(\d+),tb\d+,f(\d+),w(\d+),")


def queue_bytes(network: Network, *, at_least: int) -> int:
    """Of all connections there, which are at least so many."""
    found = SKMEM.findall(network.run("ss", "--tcp", "--memory", "--numeric", "--no-header"))
    assert len(found) >= at_least
    return sum(int(number) for numbers in found for number in numbers)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_memory_of_idle_pairs(
    start_forwarder: StartForwarder, transfers: Transfers, count: int
) -> None:
    """It is bounded, all of them go on afterwards, and none was closed."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config("limits: {pairs: 12000}")))
        daemon = site.forwarder.process.pid
        with held(transfers, site, 5, seed=100) as groups:  # what is made once for all
            finish(groups)
        site.wait_for_no_pairs()
        before = tree_bytes(daemon)
        closed = site.stats()["closed"]
        with held(transfers, site, count // 2) as groups:
            stays(lambda: site.forwarder.process.poll() is None, "the daemon", for_s=IDLE_S)
            ours = (tree_bytes(daemon) - before) // count
            queues = queue_bytes(hosts.forwarder, at_least=2 * count) // count
            print(f"of each of {count} idle pairs: {ours} bytes of ours, {queues} of queues")
            assert len(rows(site)) == site.stats()["open"] == count
            assert site.stats()["closed"] == closed
            assert ours < MOST_OF_OURS
            assert queues < MOST_OF_QUEUES
            finish(groups)
        site.wait_for_no_pairs()
        finished = site.stats()["closed"]["finished"] - closed["finished"]
        assert finished == count
