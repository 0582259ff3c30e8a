"""What every kernel test gets: its own network, its own directories, and no daemon left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.helpers import daemon as daemons
from tests.helpers.daemon import Daemon, Place
from tests.helpers.netns import private_network


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    """A fresh network namespace with only `lo`: every port is free, nothing can be reached."""
    with private_network():
        yield


@pytest.fixture
def place() -> Iterator[Place]:
    """Directories of this test, with a bpffs mounted for the pins.

    Not pytest's tmp_path: with a long test name a unix socket's path would exceed its 107 bytes.
    """
    directory = Path(tempfile.mkdtemp(prefix="pyforwarder-"))
    try:
        with daemons.mounted_bpffs(directory / "bpf") as bpffs:
            yield Place(directory / "run", bpffs)
    finally:
        shutil.rmtree(directory)


class StartForwarder(Protocol):
    """What the fixture `start_forwarder` gives."""

    def __call__(
        self, config: str | None = None, *words: str, instance: str = "default"
    ) -> Daemon: ...


@pytest.fixture
def start_forwarder(place: Place) -> Iterator[StartForwarder]:
    """Start daemons; at the end they must stop when asked, with code 0, and leave nothing."""
    started: list[Daemon] = []

    def start(config: str | None = None, *words: str, instance: str = "default") -> Daemon:
        daemon = daemons.start(place, config, *words, instance=instance)
        started.append(daemon)
        return daemon

    try:
        yield start
        for daemon in started:
            if daemon.process.poll() is None:
                assert daemon.stop() == 0
        if started:
            assert daemons.leftovers(place) == []
    finally:
        for daemon in started:
            daemon.close()
            print(f"--- output of {daemon.instance} (ended with {daemon.process.returncode})")
            print(daemon.output())
