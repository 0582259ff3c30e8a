"""Spliced connections whose daemon, or a part of it, is killed.

The two ends talk to each other, so none of them may notice: bytes go on, and endings arrive. What
was not yet spliced breaks, and is told so.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from tests.helpers.forged import RST, SYN, Forger, next_of
from tests.helpers.peers import ends_with_reset
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.survival import VERSIONS, comes_to_be_spliced, everyone, finish, held, rows
from tests.helpers.topology import topology
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.topology import Topology
    from tests.helpers.transfers import Transfers
    from tests.kernel.conftest import StartForwarder

# The ports are held by mute sockets of the keeper, two for a pair, and so are they by a worker.
MANY: Final = 1501
AS_MANY_AS_FIT: Final = 9001
# What idle pairs may cost in so long: a look at a clock now and then is allowed, a look at each
# pair is not. Of three such times the one in the middle counts: what others on this host cost it,
# they cost it now and then, and what comes every 7.5 s or more often is in two of three.
IDLE_S: Final = 5.0
IDLE_COST_S: Final = 0.2


@pytest.fixture
def hosts() -> Iterator[Topology]:
    with topology() as hosts:
        yield hosts


@pytest.fixture
def start(hosts: Topology, start_forwarder: StartForwarder) -> Any:
    """Start a forwarder, or its next life, on the middle host."""

    def start(more: str = "") -> Site:
        with hosts.forwarder.entered():
            return Site(hosts, start_forwarder(config(more)))

    return start


@pytest.mark.each_attachment
def test_pairs_outlive_the_daemon_and_the_next_one_goes_on_with_them(
    start: Any, transfers: Transfers
) -> None:
    """Some end while there is none; the others it shows, counts, and releases when they end."""
    site: Site = start()
    with held(transfers, site, 17) as groups:
        before = {row["client"]: row for row in rows(site)}
        site.forwarder.kill()
        wait_for(lambda: not site.forwarder.place.processes(), "all of it has ended")
        finish(groups[:1])
        site = start()
        wait_for(lambda: len(rows(site)) == 17, "those that are left are shown")
        for row in rows(site):
            assert row["client"].startswith("[fd01::2]:")  # the second group's
            for column in ("server", "source", "up_bytes", "down_bytes"):
                assert row[column] == before[row["client"]][column], column
        assert site.stats()["pairs_open"] == 17
        with held(transfers, site, 5, seed=100) as more:
            finish(more)
        finish(groups[1:])
    site.wait_for_no_pairs()
    stats = site.stats()
    closed = {reason: number for reason, number in stats["closed"].items() if number}
    # Those that ended without a daemon are ended by the next one, too.
    assert closed == {"finished": 2 * 17 + 2 * 5}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_syn_finds_no_listener_in_the_place_of_a_dead_worker_s_socket(
    start: Any, version: int
) -> None:
    """Its connection would have the pair's addresses, and nobody could adopt the pair."""
    site: Site = start("workers: 1")
    with site.spliced(site.topology.way(), version) as (client, server, pair_id):
        (worker,) = site.forwarder.workers()
        daemon = site.forwarder.process.pid
        os.kill(daemon, signal.SIGSTOP)  # so that nobody adopts it yet
        try:
            os.kill(worker.pid, signal.SIGKILL)
            wait_for(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the worker is dead")
            forger = Forger(site.topology.client, "c0", site.topology.forwarder, "f0")
            with contextlib.closing(forger), site.topology.client.entered():
                for seq in (0, 5, -5):
                    forger.send(next_of(client, flags=SYN, seq=seq))
                forger.send(next_of(client, flags=RST, seq=1000))  # a challenge is a SYN, too
                exchange(client, server)
            begun = site.topology.forwarder.run("ss", "-tnaH", "state", "syn-recv")
            assert begun == ""
        finally:
            os.kill(daemon, signal.SIGCONT)
        wait_for(lambda: [row["id"] for row in rows(site)] == [pair_id], "adopted")
        exchange(client, server)


def test_the_next_daemon_can_flush_them(start: Any) -> None:
    site: Site = start()
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS * 2]
        for client, server, _ in pairs:
            exchange(client, server)  # so that nothing of before the switch is under way any more
        site.forwarder.kill()
        wait_for(lambda: not site.forwarder.place.processes(), "all of it has ended")
        for client, server, _ in pairs:
            exchange(client, server)
        site = start()
        kept, flushed = pairs[:2], pairs[2:]
        for client, server, _ in flushed:
            row = wait_for(lambda client=client: site.row(client), "it is shown")  # type: ignore[misc]
            assert row is not None
            assert row["up_bytes"] == row["down_bytes"] == 3000
            site.forwarder.control().flush([row["id"]])
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""
        for client, server, _ in kept:
            exchange(client, server)
            row = site.row(client)
            assert row is not None
            assert row["up_bytes"] == row["down_bytes"] == 4000
        assert site.forwarder.stop() == 0
        for client, server, _ in kept:
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""


@pytest.mark.each_attachment
def test_pairs_outlive_every_worker(start: Any, transfers: Transfers) -> None:
    """And go on being shown, counted and collected."""
    site: Site = start()
    with held(transfers, site, 17) as groups:
        workers = site.forwarder.workers()
        before = sorted(row["client"] for row in rows(site))
        for number, worker in enumerate(workers, start=1):
            os.kill(worker.pid, signal.SIGKILL)
            site.forwarder.wait_for_line("worker_died", count=number)
        wait_for(lambda: len(rows(site)) == 34, "all of them are shown")
        assert sorted(row["client"] for row in rows(site)) == before
        finish(groups)
    site.wait_for_no_pairs()
    way = site.topology.way()
    with site.spliced(way, 4) as (client, server, _):
        exchange(client, server)


def test_pairs_outlive_each_process_that_is_killed(start: Any, transfers: Transfers) -> None:
    """One after the other, all but the first, which is the daemon; each is replaced."""
    site: Site = start()
    with held(transfers, site, 5) as groups:
        parent, *children = everyone(site.forwarder)
        for number, child in enumerate(children):
            child.kill()
            wait_until_replaced(site, child, len(children))
            wait_for(lambda: comes_to_be_spliced(site), "pairs are spliced again")
            with held(transfers, site, 3, seed=50 + 10 * number) as more:
                finish(more)
        assert len(rows(site)) == 10
        finish(groups)
        assert parent.is_running()
    site.wait_for_no_pairs()


def wait_until_replaced(site: Site, child: psutil.Process, count: int) -> None:
    def is_replaced() -> bool:
        _, *children = everyone(site.forwarder)
        return child not in children and len(children) == count

    wait_for(is_replaced, f"another process for {child.pid}")


def wait_until_accepted(site: Site, count: int) -> None:
    wait_for(lambda: site.stats()["accepted"] > count, "traffic")


ENDINGS: Final = {"eof", "reset", "refused"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_while_pairs_are_being_switched(
    start: Any, transfers: Transfers, rounds: int, soak_s: float
) -> None:
    """Each connection works to its end or is reset, in a few seconds, at both ends.

    In so many rounds, or those for which a soak has time.
    """
    rng = random.Random(rounds)
    ends_s = time.monotonic() + soak_s
    for round_number in range(rounds):
        if round_number >= 2 and time.monotonic() > ends_s:
            break
        site: Site = start()
        way = site.topology.way()
        with contextlib.ExitStack() as stack:
            groups = []
            for version in VERSIONS:
                server = stack.enter_context(transfers.server(way.server))
                clients = stack.enter_context(
                    transfers.clients(
                        way.client,
                        400,
                        to=(way.destination[version], server.port),
                        via=site.via(way, version),
                        seed=round_number,
                        largest=1 << 21,
                        parallel=40,
                        wait=round_number % 2,
                        stall=8000,
                    )
                )
                groups.append((server, clients))
            least = rng.randrange(50, 400)
            wait_until_accepted(site, least)
            site.forwarder.kill()
            for server, clients in groups:
                ended = clients.wait()
                servers = server.wait()
                assert len(ended) == clients.count
                bad = [
                    line
                    for line in (*ended, *servers)
                    if line.ending not in ENDINGS or (line.ending == "eof" and not line.is_whole)
                ]
                assert not bad, f"round {round_number}\n" + "\n".join(map(str, bad[:10]))
                # A server's whole ending is its client's too, but for what was still under way.
                assert {line.number for line in servers} <= {line.number for line in ended}
        wait_for(lambda site=site: not site.forwarder.place.processes(), "all of it has ended")  # type: ignore[misc]
    site = start()
    with held(transfers, site, 3) as groups:
        finish(groups)
    site.wait_for_no_pairs()


def cpu_s(daemon: Daemon) -> float:
    times = [process.cpu_times() for process in everyone(daemon)]
    return sum(time.user + time.system for time in times)


@pytest.mark.alone
@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [MANY, pytest.param(AS_MANY_AS_FIT, marks=pytest.mark.soak)])
def test_many_idle_pairs_cost_no_time(start: Any, transfers: Transfers, count: int) -> None:
    """All are listed, by the command and by the kernel's file; and then they all go on."""
    site: Site = start()
    half = count // 2
    with held(transfers, site, half) as groups:
        assert len(site.forwarder.pairs()) == 2 * half
        path = site.forwarder.place.run_dir / site.forwarder.instance / "proc/show"
        assert path.read_text().count(f" {DATAPATH} ") == 2 * half
        # A second after it has begun, a pair may be looked at once more.
        stays(lambda: site.forwarder.process.poll() is None, "the daemon", for_s=4.0)
        costs_s: list[float] = []
        for _ in range(3):
            before_s = cpu_s(site.forwarder)
            stays(lambda: site.forwarder.process.poll() is None, "the daemon", for_s=IDLE_S)
            costs_s.append(cpu_s(site.forwarder) - before_s)
        print("cost", costs_s)
        assert statistics.median(costs_s) <= IDLE_COST_S, costs_s
        finish(groups)
    site.wait_for_no_pairs()
