"""Limits on one client that hold at all machines of a fleet, with a real etcd."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND
from tests.helpers.etcd import Etcd, running
from tests.helpers.instruction import instruction
from tests.helpers.limited_clients import CLIENT, OTHER_CLIENT, Machines, client_addresses
from tests.helpers.peers import address_text
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = [pytest.mark.copied, pytest.mark.timeout(scaled_s(240))]

MakeMachines = Callable[..., Machines]
PACE_S = 0.05


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


@pytest.fixture(autouse=True)
def addresses() -> Iterator[None]:
    with client_addresses():
        yield


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def machines(start_forwarder: StartForwarder, etcd: Etcd) -> Iterator[MakeMachines]:
    with contextlib.ExitStack() as stack:

        def make(most: int, *, scope: str = "fleet") -> Machines:
            made = Machines(start_forwarder, etcd, most, scope=scope)
            stack.callback(made.end)
            return made

        yield make


def listed(machine: Daemon, *words: str) -> str:
    return subprocess.run(
        [*COMMAND, "fleet", "clients", "-c", str(machine.config_path), *words],
        env=machine.place.environ(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    ).stdout


def test_client_that_has_what_it_may_at_one_machine_gets_its_share_at_another(
    machines: MakeMachines,
) -> None:
    here = machines(20)
    here.start("one", "two")
    here.fill("one", 20)
    assert not here.admits("one")
    here.fill("two", 5)  # 20 // (2 * 2)
    here.wait_until_refused("two")
    line = here.daemons["two"].wait_for_line("limit pairs_per_client in the fleet")
    assert "reason=busy" in line
    limited = here.daemons["two"].control().stats()["limited"]
    assert limited == {"pairs_per_client": 1}
    assert here.admits("two", OTHER_CLIENT)
    # Who has so much, and where; that the other had more than its share for a moment is past.
    at = {"client": f"{CLIENT}/32", "protocol": "tcp", "listener": None}
    rows = [{**at, "total": 20, "machines": {"one": 20}}]
    wait_for(lambda: json.loads(listed(here.daemons["two"], "--json")) == rows, f"{rows}")
    assert listed(here.daemons["two"]).split()[-1] == "one=20"
    # What ends at one machine is room at the other.
    here.close("one", 20)
    for _ in range(15):  # it may be told of some of them first
        here.wait_until_admitted("two")
    assert not here.admits("two")


def test_client_that_goes_from_machine_to_machine_has_little_more_than_it_may(
    machines: MakeMachines,
) -> None:
    here = machines(60)
    names = ("one", "two", "three")
    here.start(*names)
    refused = 0
    for name in itertools.cycle(names):
        refused = 0 if here.admits(name) else refused + 1
        time.sleep(PACE_S)
        if refused == 30:
            break
    total = sum(map(len, here.opened.values()))
    # The limit, the shares of two machines, and what is opened until a machine has been told:
    # that is a third of a second on a quiet host.
    assert 60 <= total <= 60 + 2 * 10 + scaled_s(1.5) / PACE_S
    assert total < 3 * 60


def test_what_a_client_had_at_a_machine_that_has_died_is_free_after_its_lease(
    machines: MakeMachines,
) -> None:
    here = machines(8)
    here.start("one", "two")
    here.fill("one", 8)
    here.fill("two", 2)
    here.wait_until_refused("two")
    here.kill("one")
    assert not here.admits("two")
    here.wait_until_admitted("two", deadline_s=2 * DEADLINE_S)
    here.fill("two", 5)
    assert not here.admits("two")


def test_without_the_store_each_machine_counts_alone_and_together_again_with_it(
    machines: MakeMachines, etcd: Etcd
) -> None:
    here = machines(8)
    here.start("one", "two")
    here.fill("one", 8)
    here.fill("two", 2)
    here.wait_until_refused("two")
    etcd.stop()
    here.wait_until_admitted("two", deadline_s=2 * DEADLINE_S)
    for name in ("one", "two"):
        here.daemons[name].wait_for_line("fleet_limits_lost")
    here.fill("two", 5)
    for name in ("one", "two"):  # never more than at each machine alone
        assert not here.admits(name)
    etcd.start()
    for name in ("one", "two"):
        here.daemons[name].wait_for_line("fleet_limits_connected", count=2)
    here.close("two", 4)
    here.wait_until_refused("two")


def test_sessions_of_a_client_count_in_the_fleet_too(machines: MakeMachines) -> None:
    here = machines(4)
    here.start("one", "two")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server.bind(("127.0.0.1", 0))
        server.settimeout(DEADLINE_S)

        def begin(name: str) -> bool:
            """Whether a session of the client begins there: its server hears of it."""
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.bind((CLIENT, 0))
            client.settimeout(DEADLINE_S)
            client.connect(here.daemons[name].listeners()["udp"])
            client.send(instruction(address_text(server.getsockname())) + b"hello")
            answer = client.recv(100)
            if b"OK" not in answer:
                assert b"busy" in answer
                return False
            # A client that is heard twice and answered has no made-up address.
            _, session = server.recvfrom(100)
            server.sendto(b"welcome", session)
            assert client.recv(100) == b"welcome"
            client.send(b"thanks")
            assert server.recvfrom(100)[0] == b"thanks"
            return True

        assert [begin("one") for _ in range(4)] == [True] * 4
        assert begin("two")
        wait_for(lambda: not begin("two"), "two has heard")
        assert len(here.daemons["one"].look()) == 4


def test_limits_are_each_machines_own_unless_the_configuration_says_otherwise(
    machines: MakeMachines, etcd: Etcd
) -> None:
    here = machines(4, scope="machine")
    here.start("one", "two")
    for name in ("one", "two"):
        here.fill(name, 4)
        assert not here.admits(name)
        here.daemons[name].wait_for_line('refusal="limit pairs_per_client"')
    assert not etcd.ctl("get", "--prefix", "/pyforwarder/edge/limits/")


def test_pairs_that_go_on_in_an_upgrade_count_in_the_fleet(machines: MakeMachines) -> None:
    here = machines(8)
    here.start("one", "two")
    here.fill("one", 8)
    here.wait_until_told("one", 8)
    done = here.daemons["one"].command("upgrade", deadline_s=scaled_s(60))
    assert done.returncode == 0, done.stderr
    wait_for(lambda: len(here.daemons["one"].look()) == 8, "the next daemon has the pairs")
    here.wait_until_told("one", 8)
    here.fill("two", 2)
    here.wait_until_refused("two")
    here.close("one", 8)
    here.wait_until_admitted("two")
    assert here.daemons["one"].command("down", "--now").returncode == 0
