"""The daemon's privileged half: owns listeners, maps, workers and the control socket.

It never reads a byte that a client sent. Those are the workers', which have no privilege.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.environment import Environment


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `pyforwarder up` was asked for."""

    instance: str
    config_path: Path | None  # None: the built-in configuration
    listen: str | None  # replaces the first listener's address
    datapath: str | None  # replaces every choice of datapath
    detach: bool
    verbosity: int


def run(env: Environment, options: UpOptions) -> int:
    """Be the daemon until it is told to end; the exit code.

    Raises:
        ForwarderError: it cannot start; nothing is left behind then.
    """
    from pyforwarder.supervisor.daemon import Daemon
    from pyforwarder.supervisor.detaching import detached

    if options.detach:
        return detached(env, options, Daemon)
    return Daemon(env, options).run()
