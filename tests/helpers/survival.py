"""Spliced pairs of which processes of the daemon die meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import transfers as judge
from tests.helpers.spliced import DATAPATH, Site, exchange
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.transfers import Clients, Server, Transfers

VERSIONS: Final = (4, 6)
BYTES: Final = 40_009  # each way; a quarter of them after the kill


def everyone(daemon: Daemon) -> list[psutil.Process]:
    """The daemon and all its children, the daemon first."""
    parent = psutil.Process(daemon.process.pid)
    return [parent, *parent.children(recursive=True)]


def rows(site: Site) -> list[dict[str, Any]]:
    """What `show` says of the pairs that are spliced (or of all, where all are copied)."""
    return [row for row in site.pairs() if row["datapath"] == DATAPATH]


@contextlib.contextmanager
def held(
    transfers: Transfers, site: Site, count: int, *, seed: int = 1
) -> Iterator[list[tuple[Server, Clients]]]:
    """`count` spliced pairs of either version, three quarters of their bytes through.

    No row is asked for meanwhile: that would cost the daemon memory, which a caller may measure.
    """
    with contextlib.ExitStack() as stack:
        before = site.joined()
        groups = []
        way = site.topology.way()
        for version in VERSIONS:
            server = stack.enter_context(transfers.server(way.server))
            clients = stack.enter_context(
                transfers.clients(
                    way.client,
                    count,
                    to=(way.destination[version], server.port),
                    via=site.via(way, version),
                    seed=seed + version,
                    exactly=BYTES,
                    parallel=100,
                    hold=1,
                )
            )
            clients.wait_until_held()
            groups.append((server, clients))
        wait_for(
            lambda: site.joined() - before == 2 * count, "all spliced", deadline_s=scaled_s(60)
        )
        yield groups


def finish(groups: list[tuple[Server, Clients]]) -> None:
    """The rest of the bytes goes through, and both ends of all of them end as they must."""
    for _, clients in groups:
        clients.go()
    for server, clients in groups:
        ended = clients.wait()
        bad = judge.faults(clients.count, ended, server.wait())
        assert not bad, f"{len(bad)} faults\n" + "\n".join(bad[:10])


def comes_to_be_spliced(site: Site) -> bool:
    """Whether a pair is by the time that `show` has it; it carries its bytes in any case."""
    with site.pair(site.topology.way(), 4) as (client, server):
        row = wait_for(lambda: site.row(client), "it is shown")
        exchange(client, server)
        return row is not None and row["datapath"] == DATAPATH
