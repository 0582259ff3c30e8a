"""Workers that die or hang at random, while connections come and go.

Every connection works to its end or is reset, at both ends; none gets a byte that is not its own,
and afterwards everything works as before.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import transfers as judge
from tests.helpers.spliced import Site, config
from tests.helpers.topology import topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.transfers import Line, Transfers
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
ENDINGS: Final = {"eof", "reset", "refused"}


def hurt(daemon: Daemon, rng: random.Random) -> str:
    """Kill or stop one worker; the name of the signal."""
    workers = daemon.workers()
    number = rng.choice((signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP))
    if workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(workers).send_signal(number)
    return signal.Signals(number).name


def is_right(line: Line) -> bool:
    return line.ending in ENDINGS and (line.ending != "eof" or line.is_whole)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("datapath", ["auto", "copy"])
@pytest.mark.parametrize("times", [5, pytest.param(60, marks=pytest.mark.soak)])
def test_no_fault_of_a_worker_makes_a_wrong_byte(
    start_forwarder: StartForwarder,
    transfers: Transfers,
    datapath: str,
    times: int,
    soak_s: float,
) -> None:
    """So many faults, or those for which a soak has time."""
    ends_s = time.monotonic() + soak_s
    rng = random.Random(f"{datapath} {times}")
    early = "handover: {after_bytes: 64KiB, splice_after_bytes: 64KiB}"
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config(early, datapath=datapath)))
        way = hosts.way()
        for number in range(times):
            if number >= 5 and time.monotonic() > ends_s:
                break
            with contextlib.ExitStack() as stack:
                groups: list[tuple[Any, Any]] = []
                for version in VERSIONS:
                    server = stack.enter_context(transfers.server(way.server))
                    clients = stack.enter_context(
                        transfers.clients(
                            way.client,
                            150,
                            to=(way.destination[version], server.port),
                            via=site.via(way, version),
                            seed=rng.randrange(1 << 30),
                            largest=1 << 20,
                            parallel=30,
                            stall=60_000,
                        )
                    )
                    groups.append((server, clients))
                before = site.stats()["accepted"]
                least = before + rng.randrange(20, 150)
                wait_for(lambda least=least: site.stats()["accepted"] > least, "traffic")  # type: ignore[misc]
                what = hurt(site.forwarder, rng)
                for _, clients in groups:
                    ended = clients.wait(deadline_s=scaled_s(120))
                    assert len(ended) == clients.count
                    wrong = [line for line in ended if not is_right(line)]
                    assert not wrong, f"{what}\n" + "\n".join(map(str, wrong[:10]))
                for server, _ in groups:
                    wrong = [line for line in server.wait() if not is_right(line)]
                    assert not wrong, f"{what}\n" + "\n".join(map(str, wrong[:10]))
        site.wait_for_no_pairs()
        assert "supervisor_fault" not in site.forwarder.output()
        # And now all of it works again, without a fault.
        with transfers.server(way.server) as server:
            with transfers.clients(
                way.client,
                40,
                to=(way.destination[4], server.port),
                via=site.via(way, 4),
                seed=1,
                largest=1 << 18,
                parallel=10,
            ) as clients:
                ended = clients.wait()
            assert not judge.faults(40, ended, server.wait())
