"""A machine dies, and its spliced pairs go on through another one of the fleet."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.etcd import Etcd, running
from tests.helpers.peers import address_text
from tests.helpers.two_machines import (
    BACK,
    FRONT,
    SERVER,
    STORE,
    Machines,
    Traffic,
    two_machines,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

PORT = 9000
PAIRS = 24
ROUNDS = 8


@pytest.fixture
def hosts() -> Iterator[Machines]:
    with two_machines() as hosts:
        yield hosts


@pytest.fixture
def etcd(hosts: Machines) -> Iterator[Etcd]:
    with hosts.switch.entered(), running(host=STORE) as (etcd, _):
        yield etcd


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    with contextlib.closing(Traffic()) as traffic:
        yield traffic


def config(etcd: Etcd, name: str) -> str:
    addresses = ", ".join(f"'{ip}'" for ip in (*FRONT.values(), *BACK.values()))
    listeners = "".join(
        f"- {{name: main{v}, bind: '{address}', rules: [{{name: all, match: any, to: web{v}}}]}}\n"
        for v, address in ((4, f"0.0.0.0:{PORT}"), (6, f"[::]:{PORT}"))
    )
    upstreams = "".join(
        f"  web{v}: {{servers: ['{text}:7000'], source: ['{BACK[v]}']}}\n"
        for v, text in ((4, SERVER[4]), (6, f"[{SERVER[6]}]"))
    )
    return (
        f"fleet: {{endpoints: ['{etcd.endpoint}'], name: edge, instance: {name}, "
        f"failover: {{addresses: [{addresses}]}}}}\n"
        "datapath: splice\nworkers: 2\nlog: {level: debug}\n"
        "handover: {after_bytes: 0, after_round_trips: 0, after: 0s}\n"
        f"upstreams:\n{upstreams}listeners:\n{listeners}"
    )


class Fleet:
    """Both machines' daemons, and connections through them."""

    def __init__(
        self, hosts: Machines, etcd: Etcd, start: StartForwarder, traffic: Traffic
    ) -> None:
        self.hosts, self._etcd, self._start, self.traffic = hosts, etcd, start, traffic
        self.daemons: dict[str, Daemon] = {}
        with hosts.server.entered():
            self._waiting = {
                v: socket.create_server(
                    (SERVER[v], 7000), family=socket.AF_INET if v == 4 else socket.AF_INET6
                )
                for v in (4, 6)
            }

    def start(self, name: str) -> Daemon:
        with self.hosts.machines[name].entered():
            daemon = self._start(config(self._etcd, name), instance=name)
        daemon.wait_for_line("failover_store_connected")
        self.daemons[name] = daemon
        return daemon

    def open(self, name: str, count: int, *, rate: int = 2000) -> None:
        """Spliced connections, of both versions of IP in turns; every fourth is idle."""
        for n in range(count):
            client, server = self._spliced(name, 6 if n % 2 else 4)
            self.traffic.add(client, server, 0 if n % 4 == 3 else rate)

    def _spliced(self, name: str, version: int) -> tuple[socket.socket, socket.socket]:
        for _ in range(20):
            with self.hosts.client.entered():
                client = socket.create_connection((FRONT[version], PORT), timeout=DEADLINE_S)
            client.sendall(b"x")
            self._waiting[version].settimeout(DEADLINE_S)
            server, _ = self._waiting[version].accept()
            assert server.recv(1) == b"x"
            address = address_text(client.getsockname()[:2])

            def datapath(address: str = address) -> str:
                rows = self.daemons[name].control().pairs()
                found = [row["datapath"] for row in rows if row["client"] == address]
                return found[0] if found and found[0] in ("splice", "sockmap") else ""

            if wait_for(datapath, "a datapath") == "splice":
                return client, server
            # On a busy host the keeper is not waited for.
            client.close()
            server.close()
        raise AssertionError("no pair is spliced")

    def wait_until_spliced(self, name: str, count: int) -> None:
        def spliced() -> int:
            return sum(row["datapath"] == "splice" for row in self.daemons[name].control().pairs())

        wait_for(lambda: spliced() == count, f"{count} are spliced at {name}")

    def wait_until_held(self, name: str, count: int) -> None:
        self.daemons[name].wait_for_line(f"failover own=0 held={count} ")

    def close(self) -> None:
        for sock in self._waiting.values():
            sock.close()


@pytest.fixture
def fleet(
    hosts: Machines, etcd: Etcd, start_forwarder: StartForwarder, traffic: Traffic
) -> Iterator[Fleet]:
    with contextlib.closing(Fleet(hosts, etcd, start_forwarder, traffic)) as fleet:
        yield fleet


@pytest.mark.timeout(240)
def test_pairs_go_on_through_a_planned_move_and_a_death(fleet: Fleet) -> None:
    hosts, traffic = fleet.hosts, fleet.traffic
    hosts.give_addresses("a")
    a, b = fleet.start("a"), fleet.start("b")
    fleet.open("a", PAIRS)
    fleet.open("a", 2, rate=200_000)
    count = PAIRS + 2
    fleet.wait_until_spliced("a", count)
    fleet.wait_until_held("b", count)
    traffic.mark()
    hosts.give_addresses("b")
    hosts.take_addresses("a")
    fleet.wait_until_spliced("b", count)
    a.wait_for_line("reason=moved", count=count)
    traffic.poke()
    # It knows of them now as the other did.
    fleet.wait_until_held("a", count)
    print(f"longest gap of the move: {traffic.longest_gap_s():.3f} s")
    traffic.mark()
    hosts.cut_off("b")
    b.kill()
    hosts.give_addresses("a")
    fleet.wait_until_spliced("a", count)
    assert {row["rule"] for row in a.show()} == {"all"}
    traffic.poke()
    print(f"longest gap of the death: {traffic.longest_gap_s():.3f} s")
    fleet.open("a", 2)
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    assert traffic.errors() == []


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_pairs_go_on_through_many_deaths_at_random_moments(fleet: Fleet, soak_s: float) -> None:
    """So many deaths, or those for which a soak has time."""
    ends_s = time.monotonic() + soak_s
    hosts, traffic, rng = fleet.hosts, fleet.traffic, random.Random(16)
    hosts.give_addresses("a")
    here, there = "a", "b"
    for name in (here, there):
        fleet.start(name)
    fleet.open(here, PAIRS)
    fleet.open(here, 2, rate=100_000)
    gaps_s = []
    for number in range(ROUNDS):
        if number >= 2 and time.monotonic() > ends_s:
            break
        fleet.wait_until_held(there, len(traffic.streams))
        time.sleep(rng.uniform(0, 1.5))
        traffic.mark()
        dead = fleet.daemons[here]
        hosts.cut_off(here)
        dead.kill()
        time.sleep(rng.choice((0.0, 0.1, 0.5)))
        hosts.give_addresses(there)
        fleet.wait_until_spliced(there, len(traffic.streams))
        traffic.poke()
        time.sleep(1)
        gaps_s.append(traffic.longest_gap_s())
        assert traffic.errors() == [], number
        # It comes back, with its records or without them.
        hosts.take_addresses(here)
        if number % 2:
            for pin in sorted(dead.place.bpffs.glob(f"{here}/splice/*")):
                pin.unlink()
        hosts.connect(here)
        fleet.start(here)
        fleet.open(there, 1)
        here, there = there, here
    traffic.pause()
    wait_for(traffic.is_whole, "all bytes have come")
    print("longest gaps:", *(f"{gap_s:.2f}" for gap_s in gaps_s))
    assert traffic.errors() == []
