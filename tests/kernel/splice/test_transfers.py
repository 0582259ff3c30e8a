"""Every byte and every ending of many spliced connections, on good networks and on bad ones.

helpers/transfers.c is both ends and compares each byte; what it did is printed where it failed, and
PYFORWARDER_TEST_SEED=NUMBER plays the same once more.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers import transfers as judge
from tests.helpers.faults import FIN, Action, Faults
from tests.helpers.spliced import Site, config
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology, Way
    from tests.helpers.transfers import Transfers
    from tests.kernel.conftest import StartForwarder

SEED: Final = int(
    os.environ.get("PYFORWARDER_TEST_SEED") or random.SystemRandom().randrange(1 << 32)
)
# (client is local, server is local)
WAYS: Final = {
    "remote-remote": (False, False),
    "local-remote": (True, False),
    "remote-local": (False, True),
    "local-local": (True, True),
}
VERSIONS: Final = (4, 6)
# When the bytes begin to flow, as options of the transfers.
STARTS: Final[dict[str, dict[str, int]]] = {
    "rest": {"wait": 1, "quiet": 1},  # after the switch: both ends are silent until then
    "eager": {"wait": 1},  # as soon as the client has its answer
    "mid": {"wait": 0},  # before: the client does not wait for it
}
# The same for where it may not come to the switch: a time that is long enough as a rule.
SILENT: Final = {"wait": 1, "rest": 50}
# Of all pairs, how many must have been spliced for a test to prove anything: all that were at rest
# before, and all that are long. Of short ones that were busy from the start many are over, or have
# a FIN, before they can be: at a load of 5, 59 to 100 of 100 that were eager were spliced, and 21
# to 98 in mid-stream; with packets lost or late 34 to 46, and 20 to 38.
LEAST_SPLICED: Final = {"rest": 1.0, "eager": 0.4, "mid": 0.1}
MOST_TURNS: Final = 4


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Iterator[Site]:
    with hosts.forwarder.entered():
        forwarder = start_shared_forwarder(config())
    yield Site(hosts, forwarder)
    assert forwarder.stop() == 0


def play(
    transfers: Transfers,
    site: Site,
    way: Way,
    version: int,
    count: int,
    *,
    least: float,
    **options: int,
) -> None:
    """So many connections, each of them whole, and counted by the forwarder as what they were.

    `least` is the share of them that must have been spliced. How many are caught in mid-stream is
    chance, and fewer on a busy host: if they are too few, others are played, a few times.
    """
    spliced = 0
    for turn in range(MOST_TURNS):
        options["seed"] += turn
        spliced += play_once(transfers, site, way, version, count, least=least, **options)
        if spliced >= least * count:
            return
    raise AssertionError(f"{spliced} of {MOST_TURNS * count} were spliced, from {options}")


def play_once(
    transfers: Transfers,
    site: Site,
    way: Way,
    version: int,
    count: int,
    *,
    least: float,
    **options: int,
) -> int:
    """How many of so many connections were spliced; all that are silent until then wait for it."""
    stats = site.stats()
    before = site.joined()
    with transfers.server(way.server) as server:
        to = (way.destination[version], server.port)
        via = site.via(way, version)
        with transfers.clients(way.client, count, to=to, via=via, **options) as running:
            if options.get("quiet"):
                running.wait_until_held()
                wait_for(lambda: site.joined() - before >= least * count, "they are spliced")
                running.go()
            clients = running.wait()
        servers = server.wait()
    bad = judge.faults(count, clients, servers)
    assert not bad, f"seed {options['seed']}, {way.name}: {len(bad)} faults\n" + "\n".join(bad[:20])
    site.wait_for_no_pairs()
    after = site.stats()
    closed = {
        reason: number - stats["closed"].get(reason, 0)
        for reason, number in after["closed"].items()
        if number != stats["closed"].get(reason, 0)
    }
    assert closed == {"finished": count}
    carried = (after["bytes_up"] - stats["bytes_up"], after["bytes_down"] - stats["bytes_down"])
    assert carried == judge.totals(clients)
    return site.joined() - before


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("way", "wire"),
    [
        ("remote-remote", "wide"),
        ("remote-remote", "plain"),
        ("remote-remote", "merged"),
        ("local-remote", "plain"),
        ("remote-local", "wide"),
        ("local-local", "wide"),
    ],
)
def test_transfers_are_whole(
    site: Site, transfers: Transfers, way: str, wire: str, version: int, start: str
) -> None:
    site.topology.wire(wire)
    client_local, server_local = WAYS[way]
    chosen = site.topology.way(client_local=client_local, server_local=server_local)
    play(
        transfers,
        site,
        chosen,
        version,
        61,
        least=LEAST_SPLICED[start],
        seed=SEED,
        **STARTS[start],
    )


@pytest.mark.parametrize("start", ["eager", "mid"])
@pytest.mark.parametrize("version", VERSIONS)
def test_long_transfers_are_whole(
    site: Site, transfers: Transfers, version: int, start: str
) -> None:
    """However busy both ends are when they are switched."""
    site.topology.wire("wide")
    play(
        transfers,
        site,
        site.topology.way(),
        version,
        29,
        least=0.9,
        seed=SEED,
        **STARTS[start],
        parallel=4,
        exactly=8_000_009,
        calm=1,
    )


def name_of(parameter: object) -> str:
    """A case's name in the test's."""
    return "-".join(map(str, parameter)) if isinstance(parameter, tuple) else str(parameter)


# Of all packets at each of the doors that a connection passes, on its way there and back.
BAD: Final[dict[str, dict[str, float]]] = {
    "lossy": {"lose": 0.01},
    "doubling": {"duplicate": 0.1},
    "late": {"delay": 0.1},
    "all": {"lose": 0.01, "duplicate": 0.02, "delay": 0.05},
}
# So that each way, version, start and kind is met; every combination of them is soaked.
CASES: Final = (
    ("wide", ("remote-remote", 4, "rest", "lossy")),
    ("plain", ("remote-remote", 6, "mid", "lossy")),
    ("plain", ("remote-remote", 4, "mid", "all")),
    ("wide", ("remote-remote", 6, "rest", "all")),
    ("plain", ("remote-remote", 4, "eager", "doubling")),
    ("plain", ("remote-remote", 6, "eager", "late")),
    ("wide", ("local-remote", 6, "mid", "all")),
    ("plain", ("remote-local", 4, "rest", "all")),
    ("wide", ("local-local", 4, "mid", "lossy")),
    ("wide", ("local-local", 6, "rest", "all")),
)


def play_badly(
    transfers: Transfers,
    site: Site,
    bad_network: Faults,
    case: tuple[str, int, str, str],
    *,
    count: int,
    seed: int,
    **options: int,
) -> None:
    """The same as `play` on a bad network, which has been one."""
    name, version, start, kind = case
    client_local, server_local = WAYS[name]
    way = site.topology.way(client_local=client_local, server_local=server_local)
    rules = BAD[kind]
    bad_network.set(
        seed=seed,
        lose=rules.get("lose", 0.0),
        duplicate=rules.get("duplicate", 0.0),
        delay=rules.get("delay", 0.0),
    )
    with bad_network.put_on(*way.doors):
        play(
            transfers,
            site,
            way,
            version,
            count,
            least=0.7 * LEAST_SPLICED[start],
            seed=seed,
            **STARTS[start],
            **options,
        )
    counts = bad_network.counts()
    for rule, done in (("lose", "lost"), ("duplicate", "duplicated"), ("delay", "delayed")):
        share = counts[done] / counts["matched"]
        assert share == pytest.approx(rules.get(rule, 0.0), rel=0.6), counts


@pytest.mark.parametrize(("wire", "case"), CASES, ids=name_of)
def test_transfers_are_whole_on_a_bad_network(
    site: Site,
    transfers: Transfers,
    bad_network: Faults,
    wire: str,
    case: tuple[str, int, str, str],
) -> None:
    site.topology.wire(wire)
    play_badly(transfers, site, bad_network, case, count=61, seed=SEED, largest=1 << 18)


# A conversation of this size has fewer packets than that at all doors together.
PACKETS: Final = 60


@pytest.mark.parametrize(
    ("start", "action"),
    [
        ("rest", Action.LOSE),
        ("rest", Action.DUPLICATE),
        ("rest", Action.DELAY),
        ("eager", Action.LOSE),
        ("mid", Action.LOSE),
    ],
)
def test_each_packet_of_a_conversation_may_go_astray(
    site: Site, transfers: Transfers, bad_network: Faults, action: Action, start: str
) -> None:
    """One after the other, and each is the only one."""
    site.topology.wire("plain")
    way = site.topology.way()
    with transfers.server(way.server) as server, bad_network.put_on(*way.doors):
        to, via = (way.destination[4], server.port), site.via(way, 4)
        clients = []
        for number in range(1, PACKETS + 1):
            bad_network.set(exact={number: action})
            with transfers.clients(
                way.client,
                1,
                to=to,
                via=via,
                exactly=5003,
                first=number,
                order=number % 3,
                **(SILENT if start == "rest" else STARTS[start]),
            ) as running:
                clients += running.wait()
            counts = bad_network.counts()
            if counts["matched"] < number:
                break  # it was over before
        servers = server.wait()
    bad = judge.faults(len(clients), clients, servers)
    assert not bad, "\n".join(bad)
    assert 10 < len(clients) < PACKETS


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("order", [judge.BOTH_FIRST, judge.CLIENT_FIRST, judge.SERVER_FIRST])
@pytest.mark.parametrize("door", range(4), ids=["client", "near", "far", "server"])
def test_a_lost_fin_comes_again(
    site: Site, transfers: Transfers, bad_network: Faults, door: int, order: int, times: int
) -> None:
    """Once and twice: at the client, at the forwarder's two interfaces, at the server."""
    way = site.topology.way()
    site.topology.wire("plain")
    bad_network.set(flags=FIN, exact=dict.fromkeys(range(1, times + 1), Action.LOSE))
    with bad_network.put_on(way.doors[door]):
        play(
            transfers,
            site,
            way,
            4,
            1,
            least=1.0,
            seed=SEED,
            exactly=20_011,
            order=order,
            **STARTS["rest"],
        )
    assert bad_network.counts()["lost"] == times


@pytest.mark.parametrize("name", ["remote-remote", "remote-local"])
@pytest.mark.parametrize("start", STARTS)
def test_a_server_that_misses_the_end_of_the_handshake_gets_it_again(
    site: Site, transfers: Transfers, bad_network: Faults, start: str, name: str
) -> None:
    """The packet behind its SYN-ACK: until it comes again, there is no connection at all."""
    client_local, server_local = WAYS[name]
    way = site.topology.way(client_local=client_local, server_local=server_local)
    # On lo what the server says comes by the same door as what is said to it.
    bad_network.set(exact={3 if server_local else 2: Action.LOSE})
    with bad_network.put_on(way.doors[-1]):
        play(transfers, site, way, 4, 1, least=0.0, seed=SEED, exactly=20_011, **STARTS[start])
    assert bad_network.counts()["lost"] == 1


@pytest.mark.soak
def test_soak(site: Site, transfers: Transfers, bad_network: Faults, soak_s: float) -> None:
    """All ways, versions, starts and kinds of bad network, in any order, until the time is up."""
    ends_s = time.monotonic() + soak_s
    seed, count = SEED, 0
    cases = list(
        itertools.product(("wide", "plain"), itertools.product(WAYS, VERSIONS, STARTS, BAD))
    )
    random.Random(SEED).shuffle(cases)  # a short one begins elsewhere each time
    for wire, case in itertools.cycle(cases):
        site.topology.wire(wire)
        play_badly(
            transfers,
            site,
            bad_network,
            case,
            count=301,
            seed=seed,
            parallel=64,
            largest=1 << 20,
        )
        seed, count = seed + 1, count + 301
        if time.monotonic() > ends_s:
            break
    print(f"{count} connections, from seed {SEED}")
