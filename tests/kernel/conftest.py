"""What every kernel test gets: its own network, its own directories, and no daemon left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.sockmap.maps import KernelMaps
from tests.helpers import daemon as daemons
from tests.helpers.daemon import Daemon, Place
from tests.helpers.faults import Faults, faults
from tests.helpers.fleet_of_two import Fleet, fleet_of_two
from tests.helpers.foreign import Foreign, foreign
from tests.helpers.netns import Network, narrow_the_network, private_network
from tests.helpers.stage import SLOTS
from tests.helpers.topology import Topology, lay_wire, topology
from tests.helpers.transfers import Transfers, compile_program
from tests.helpers.waiting import wait_for


@pytest.fixture(autouse=True, scope="module")
def network() -> Iterator[None]:
    """A network namespace of this module with only `lo`: all ports free, nothing to reach.

    A test that wants one for itself alone enters `private_network` or asks for `narrow_network`.
    """
    with private_network():
        yield


@pytest.fixture
def narrow_network() -> Iterator[None]:
    """A namespace of this test with small buffers and segments."""
    with private_network():
        narrow_the_network()
        yield


@pytest.fixture(autouse=True)
def attachment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is played with programs attached by tcx, and by clsact, see `each_attachment`.

    For every test: one that is only put among a test's fixtures later is not made.
    """
    if getattr(request, "param", "") == "clsact":
        monkeypatch.setenv(attaching.FORCED, "clsact")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Play a test marked `each_attachment` for each way that this kernel has."""
    if metafunc.definition.get_closest_marker("each_attachment"):
        has_tcx = os.geteuid() == 0 and attaching.kind() == "tcx"
        ways = ("tcx", "clsact") if has_tcx else ("clsact",)
        metafunc.parametrize("attachment", ways, indirect=True)


@contextlib.contextmanager
def temporary_place() -> Iterator[Place]:
    """Directories that are removed afterwards, with a bpffs mounted for the pins.

    Not pytest's tmp_path: with a long test name a unix socket's path would exceed its 107 bytes.
    """
    directory = Path(tempfile.mkdtemp(prefix="pyforwarder-"))
    try:
        with daemons.mounted_bpffs(directory / "bpf") as bpffs:
            yield Place(directory / "run", bpffs)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place() -> Iterator[Place]:
    """The directories of this test."""
    with temporary_place() as place:
        yield place


class StartForwarder(Protocol):
    """What the fixture `start_forwarder` gives."""

    def __call__(
        self,
        config: str | None = None,
        *words: str,
        instance: str = "default",
        prefix: Sequence[str] = (),
    ) -> Daemon: ...


@contextlib.contextmanager
def forwarders_at(place: Place, *first: str) -> Iterator[StartForwarder]:
    """Start daemons; at the end they must stop when asked, with code 0, and leave nothing.

    `first` are arguments of each.

    One that was killed may leave files and pins (the next `up` removes them), but no process.
    """
    started: list[Daemon] = []

    def start(
        config: str | None = None,
        *words: str,
        instance: str = "default",
        prefix: Sequence[str] = (),
    ) -> Daemon:
        daemon = daemons.start(place, config, *first, *words, instance=instance, prefix=prefix)
        started.append(daemon)
        return daemon

    try:
        yield start
        for daemon in started:
            if daemon.process.poll() is None:
                assert daemon.stop() == 0
        for daemon in started:
            # One that was killed leaves them to the next, which removes them.
            assert daemon.process.returncode == -signal.SIGKILL or daemon.filters() == []
        last = {daemon.instance: daemon.process.returncode for daemon in started}
        if -signal.SIGKILL in last.values():
            wait_for(lambda: not place.processes(), "the workers of a killed daemon end")
        elif started:
            assert daemons.leftovers(place) == []
    finally:
        for daemon in started:
            daemon.close()
            print(f"--- output of {daemon.instance} (ended with {daemon.process.returncode})")
            print(daemon.output())


@pytest.fixture
def start_forwarder(place: Place, request: pytest.FixtureRequest) -> Iterator[StartForwarder]:
    """A function that starts a daemon for this test."""
    with forwarders_at(place, *_datapath(request.node)) as start:
        yield start


def _datapath(node: pytest.Item | pytest.Collector) -> tuple[str, ...]:
    """The arguments of `up` where tests are marked `copied`, but for those `copied(False)`."""
    marker = node.get_closest_marker("copied")
    return ("--datapath", "copy") if marker and marker.args != (False,) else ()


@pytest.fixture(scope="module")
def start_shared_forwarder(
    network: None, request: pytest.FixtureRequest
) -> Iterator[StartForwarder]:
    """The same for a whole module, for tests that leave the daemon as it was."""
    del network
    words = _datapath(request.node)
    with temporary_place() as place, forwarders_at(place, *words) as start:
        yield start


@pytest.fixture(scope="module")
def hosts(network: None) -> Iterator[Topology]:
    """Three hosts in a row, for all tests of a module."""
    del network
    with topology() as made:
        yield made
        assert made.checksum_errors() == 0


@pytest.fixture(scope="module")
def third(hosts: Topology) -> Iterator[Network]:
    """A host with a wire of its own to the forwarder's, which refuses what comes by a wrong one."""
    with contextlib.closing(Network()) as network:
        lay_wire(network, "x0", hosts.forwarder, "f2", mtu=1500, net=8)
        for name in ("all", "f0", "f1", "f2"):
            hosts.forwarder.set(**{f"ipv4__conf__{name}__rp_filter": 1})
        yield network


@pytest.fixture(scope="module")
def bad_network(network: None) -> Iterator[Faults]:
    """Loaded once; a test puts it where it wants it."""
    del network
    with faults() as made:
        yield made


@pytest.fixture(scope="module")
def somebody(network: None) -> Iterator[Foreign]:
    """Somebody else's program, loaded once; a test puts it where it wants it."""
    del network
    with foreign() as made:
        yield made


@pytest.fixture(scope="session")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Transfers:
    """The program that is both ends of many transfers."""
    return Transfers(compile_program(tmp_path_factory.mktemp("transfers")))


@pytest.fixture(scope="module")
def maps(network: None) -> Iterator[KernelMaps]:
    """Of sockmap, for one worker, with its program; each test leaves them empty."""
    del network
    with contextlib.closing(KernelMaps.load(workers=1, slots=SLOTS)) as maps:
        yield maps


@pytest.fixture
def fleet(
    start_forwarder: StartForwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    """Two machines and their store; what each has kept of it is the test's own."""
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))
    with fleet_of_two(start_forwarder) as fleet:
        yield fleet
