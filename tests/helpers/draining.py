"""A daemon that drains: told to end, until its pairs have ended."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon


def state(daemon: Daemon) -> object:
    """How far it has come towards its end, as it says itself."""
    said = daemon.control().ping()
    assert isinstance(said, dict)
    return said["state"]


@contextlib.contextmanager
def going_down(daemon: Daemon, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`down` as it waits; it has ended after this block."""
    command = subprocess.Popen(
        [*COMMAND, "down", "--instance", daemon.instance, *words],
        env=daemon.place.environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with command:
        try:
            wait_for(lambda: state(daemon) == "draining", "it drains")
            yield command
            command.wait(scaled_s(60.0))
        finally:
            command.kill()
