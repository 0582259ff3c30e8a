"""The daemon's privileged half: owns listeners, maps, workers and the control socket.

It never reads a byte that a client sent. Those are the workers', which have no privilege.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.instance import Instance


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `pyforwarder up` was asked for."""

    instance: str
    config_path: Path | None  # None: the built-in configuration
    listen: str | None  # replaces the first listener's address
    datapath: str | None  # replaces every choice of datapath
    detach: bool
    verbosity: int
    prove: bool = False  # also what has been proven since the host was booted


def run(env: Environment, options: UpOptions, ask: Callable[[str, Sequence[int]], object]) -> int:
    """Be the daemon until it is told to end; the exit code.

    `ask` sends a request, with descriptors, to the one that runs, if there is: one that drains
    gives way.

    Raises:
        ForwarderError: it cannot start; nothing is left behind then.
    """
    from pyforwarder.runtime.instance import Instance
    from pyforwarder.supervisor.daemon import Daemon
    from pyforwarder.supervisor.detaching import detached
    from pyforwarder.supervisor.takeover.draining_daemon import find_draining

    def make(env: Environment, options: UpOptions) -> Daemon:
        instance = Instance.named(options.instance, env.environ)
        return Daemon(env, options, find_draining(instance, ask))

    if options.detach:
        remark = detached(env, options, make)
        if remark:
            env.stdout.write(f"{remark}\n")
        return 0
    return make(env, options).run()


def upgrade(
    env: Environment,
    instance: Instance,
    config_path: Path | None,
    introduce: Callable[[int], object],
) -> str:
    """Have a daemon of this version take the running one's place; returns once it has.

    The result is what an operator is to know of that one; empty: nothing.

    `config_path` is its configuration; None: that of the running one. `introduce` hands that a
    descriptor by its control socket, with the request `succeed`.

    Raises:
        ForwarderError: it cannot; the one that is running goes on as before.
    """
    from pyforwarder.supervisor.takeover.upgrade_command import succeed

    return succeed(env, instance, config_path, introduce)
