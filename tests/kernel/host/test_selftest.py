"""The self-test: believes a datapath that works, and survives one that does not."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express.connection_maps import ConnectionMaps, OwnPrograms
from pyforwarder.datapath.proof import selftest
from pyforwarder.datapath.proof.apart import prove_express_apart
from pyforwarder.datapath.proof.rig import Rig, RigError
from pyforwarder.datapath.proof.scenarios import SELF_TEST
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import slowness
from tests.helpers.express_rig import expressing
from tests.helpers.plays import round_trips
from tests.helpers.stage import keys_in, open_fds
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.maps import SpliceMaps

SLOTS = 64


@pytest.fixture
def maps(network: None) -> Iterator[KernelMaps]:
    del network
    loaded = KernelMaps.load(workers=1, slots=SLOTS)
    yield loaded
    loaded.close()


def prove(maps: KernelMaps) -> selftest.Proof:
    """Run it as `up` does, and look that it leaves nothing behind."""
    before = open_fds()
    proof = selftest.prove_sockmap(maps, slots=SLOTS, user="nobody")
    assert open_fds() == before
    assert keys_in(maps.of[0].owners_fd) == keys_in(maps.of[0].sockets_fd) == 0
    with bpf.map_memory(maps.pairs_fd, SLOTS * 512, write=False) as memory:
        assert memory[:] == bytes(SLOTS * 512)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    return proof


def only(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Rig], None]) -> None:
    monkeypatch.setattr(selftest, "SELF_TEST", {"first": round_trips, "second": scenario})


def test_datapath_that_works_is_believed(maps: KernelMaps) -> None:
    proof = prove(maps)
    assert (proof.passed, proof.reason) == (True, "")
    assert list(proof.scenarios) == list(SELF_TEST)


def test_play_that_fails_is_named_with_its_reason(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rig: Rig) -> None:
        rig.join(rig.connect()[1])
        raise RigError("server got 7 of 8 bytes")

    only(monkeypatch, fail)
    proof = prove(maps)
    assert (proof.passed, proof.reason) == (False, "second: server got 7 of 8 bytes")
    assert list(proof.scenarios) == ["first"]


def test_datapath_that_leaves_all_to_userspace_is_not_believed(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_only(rig: Rig) -> None:
        rig.datapath = rig.copying
        round_trips(rig)

    only(monkeypatch, copy_only)
    assert prove(maps).reason == "second: the kernel moved nothing"


def test_process_that_dies_in_the_middle_costs_only_the_datapath(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(rig: Rig) -> None:
        rig.join(rig.connect()[1])
        os._exit(0)

    only(monkeypatch, die)
    proof = prove(maps)
    assert not proof.passed
    assert "died" in proof.reason


def test_process_that_hangs_is_ended(maps: KernelMaps, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(rig: Rig) -> None:
        rig.join(rig.connect()[1])
        threading.Event().wait()

    only(monkeypatch, hang)
    monkeypatch.setattr(selftest, "TIMEOUT_S", 1.0)
    monkeypatch.setenv(slowness.VARIABLE, "1")
    proof = prove(maps)
    assert not proof.passed
    assert "did not end within 1 s; this host may be too slow" in proof.reason


def test_it_runs_without_privileges(maps: KernelMaps, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(rig: Rig) -> None:
        round_trips(rig)
        if os.geteuid() == 0 or os.getegid() == 0:
            raise RigError("still root")

    only(monkeypatch, look)
    assert prove(maps).passed


def test_express_that_cannot_be_loaded_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs are loaded last."""

    def refuse(_connections: ConnectionMaps, _maps: SpliceMaps) -> OwnPrograms:
        raise LoadError("load by_rules() of express_connect.c: no", cause=Refusal.OTHER)

    monkeypatch.setattr(ConnectionMaps, "load", refuse)
    before = open_fds()
    proof = prove_express_apart("nobody")
    assert (proof.passed, proof.cause) == (False, Refusal.OTHER)
    assert open_fds() == before


def test_express_is_proven_while_the_addresses_of_this_host_change() -> None:
    """As they do while a host starts: the keeper forgets how servers are reached."""
    with expressing(lasts=False) as made:
        assert made.splicing.express is not None
        connections = made.splicing.express.connections
        assert connections.target(1).out
        subprocess.run(["ip", "address", "add", "10.99.0.1/32", "dev", "lo"], check=True)
        wait_for(lambda: not connections.target(1).out, "the keeper has heard of it")
        client, served = made.stage.taken()
        client.close()
        served.close()
