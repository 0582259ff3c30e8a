"""Upgrades of a daemon with thousands of pairs: none is harmed, and how long each stands still."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import pauses
from tests.helpers.successive_daemons import Lineage, lineages
from tests.helpers.waiting import PATIENCE_S, wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

PORTS: Final = {"copy": 9711, "splice": 9712, "sockmap": 9713}
UDP_PORTS: Final = {"udp": 9714, "udp_splice": 9715}
SHARES: Final = {"copy": 2, "splice": 1, "sockmap": 1}
# Of each group some ask often, so that hardly a pause of theirs is missed; the others take turns.
OFTEN_S: Final = 0.01
UDP_CLIENTS: Final = 50
UPGRADES: Final = 20
DRAIN_S: Final = scaled_s(60.0)


@dataclass(frozen=True, slots=True)
class Load:
    """What goes through the daemon."""

    pairs: int  # of TCP
    often: int  # of each datapath
    turns_per_s: float  # of all others
    new_per_s: float


def configured(tcp_port: int, udp_port: int) -> str:
    listeners = "".join(
        f"  - {{name: {name}, bind: '127.0.0.1:{port}', datapath: {name}, "
        f"rules: [{{match: any, to: '127.0.0.1:{tcp_port}'}}]}}\n"
        for name, port in PORTS.items()
    )
    datagrams = "".join(
        f"  - {{name: {name}, bind: '127.0.0.1:{port}', protocol: udp, datapath: {datapath}, "
        f"rules: [{{match: any, to: '127.0.0.1:{udp_port}'}}]}}\n"
        for (name, port), datapath in zip(UDP_PORTS.items(), ("copy", "splice"), strict=True)
    )
    return (
        f"workers: 2\nlisteners:\n{listeners}{datagrams}"
        "handover: {after_round_trips: 1}\ntimeouts: {drain: 120s}\nlog: {level: warning}\n"
    )


@pytest.fixture
def begin(start_forwarder: StartForwarder) -> Iterator[Any]:
    """Start the first of a lineage."""
    with lineages(start_forwarder) as start:
        yield start


def open_all(clients: pauses.Clients, load: Load) -> Counter[str]:
    """Clients of every datapath; how many of each there are."""
    wanted: Counter[str] = Counter()
    for name, share in SHARES.items():
        address = ("127.0.0.1", PORTS[name])
        count = load.pairs * share // sum(SHARES.values())
        every_s = load.pairs / load.turns_per_s
        clients.open(name, address, count - load.often, every_s=every_s, most_bytes=8192)
        clients.open(f"{name}_often", address, load.often, every_s=OFTEN_S, most_bytes=512)
        wanted[name] += count
    for name, port in UDP_PORTS.items():
        clients.open(name, ("127.0.0.1", port), UDP_CLIENTS, every_s=0.1, most_bytes=1000, udp=True)
    wanted["copy"] += UDP_CLIENTS
    wanted["splice"] += UDP_CLIENTS
    return wanted


def datapaths(lineage: Lineage) -> dict[int, str]:
    """Of all pairs and sessions that are joined, by their ids."""
    return {row["id"]: row["datapath"] for row in lineage.first.look() if row["state"] == "joined"}


def settled(lineage: Lineage, wanted: Counter[str]) -> dict[int, str]:
    """Once there are so many, and each that will be spliced is.

    On a busy machine the keeper is given up after some seconds, and a pair goes another way.
    """
    until_s = time.monotonic() + PATIENCE_S

    def look() -> dict[int, str]:
        found = datapaths(lineage)
        spliced = Counter(found.values())["splice"]
        is_settled = spliced == wanted["splice"] or time.monotonic() > until_s
        return found if len(found) == wanted.total() and is_settled else {}

    found = wait_for(look, f"{wanted}", deadline_s=4 * PATIENCE_S)
    assert Counter(found.values())["splice"] >= wanted["splice"] // 2
    return found


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def go_on(lineage: Lineage, before: dict[int, str]) -> bool:
    """Whether all that were there are, and what was spliced is."""
    now = datapaths(lineage)
    return all(
        one in now and (now[one] == "splice" or was != "splice") for one, was in before.items()
    )


def play(begin: Any, load: Load, *, upgrades: int, within_s: float) -> None:
    """So many upgrades, or those for which there is time; two at least, and one that fails."""
    ends_s = time.monotonic() + within_s
    with pauses.clients() as clients:
        config = configured(clients.tcp_port, clients.udp_port)
        lineage = begin(config)
        broken = lineage.place.run_dir.parent / "broken.yaml"
        broken.write_text(config.replace("match: any", "match: many"))
        wanted = open_all(clients, load)
        before = settled(lineage, wanted)
        for name, port in PORTS.items():
            clients.connect(f"{name}_new", ("127.0.0.1", port), load.new_per_s / len(PORTS))
        clients.report()
        time.sleep(2)
        usual = clients.report()
        print("without an upgrade:", *usual.lines(), sep="\n  ", flush=True)
        assert usual.longest_ms("copy_new") < 1000.0, "so much is too much for this machine"
        assert "match" in lineage.fail_to_upgrade("-c", str(broken))
        print("one that fails:", *clients.report().lines(), sep="\n  ", flush=True)
        reports: list[pauses.Report] = []
        while len(reports) < upgrades and (len(reports) < 2 or time.monotonic() < ends_s):
            pid = lineage.pid
            lineage.upgrade()
            # All that it had has gone along by then.
            wait_for(lambda: has_ended(pid), "the daemon before has ended", deadline_s=DRAIN_S)  # noqa: B023
            reports.append(clients.report())
            print(f"upgrade {len(reports)}:", *reports[-1].lines(), sep="\n  ", flush=True)
            assert not reports[-1].faults, reports[-1].kinds
            wait_for(lambda: go_on(lineage, before), "all are known", deadline_s=5 * PATIENCE_S)
        last = clients.stop()
        assert not last.faults, last.kinds
        print(f"the longest wait of each, p99, in {len(reports)} upgrades; and of all together:")
        for name in reports[0].groups:
            p99s = [one.longest_ms(name) for one in reports]
            of_all = pauses.p99_of_all_ms(reports, name)
            print(
                f"  {name:14} median {statistics.median(p99s):6.1f}, worst {max(p99s):6.1f}, "
                f"all {of_all:6.1f} ms"
            )


@pytest.mark.timeout(scaled_s(240))
def test_no_pair_of_hundreds_is_harmed_by_two_upgrades(begin: Any) -> None:
    load = Load(pairs=300, often=3, turns_per_s=300, new_per_s=50)
    play(begin, load, upgrades=2, within_s=0)


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.parametrize("pairs", [3000, 9000])
def test_no_pair_of_thousands_is_harmed_by_twenty_upgrades(
    begin: Any, soak_s: float, pairs: int
) -> None:
    """Fewer upgrades where a soak has less time. What is printed is how long pairs stood still.

    How many there can be says RLIMIT_NOFILE: a worker has two descriptors for each of its pairs,
    and the programs here one for each at either end.
    """
    load = Load(pairs=pairs, often=8, turns_per_s=2000, new_per_s=500)
    play(begin, load, upgrades=UPGRADES, within_s=soak_s)
