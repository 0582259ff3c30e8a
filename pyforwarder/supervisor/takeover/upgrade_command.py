"""`pyforwarder upgrade`: a daemon that begins with what the running one has (messages.py)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyforwarder.errors import ControlError
from pyforwarder.supervisor import UpOptions
from pyforwarder.supervisor.daemon import Daemon
from pyforwarder.supervisor.detaching import detached
from pyforwarder.supervisor.takeover.messages import network_namespace
from pyforwarder.supervisor.takeover.predecessor import Predecessor, find

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.instance import Instance


def succeed(
    env: Environment,
    instance: Instance,
    config_path: Path | None,
    introduce: Callable[[int], object],
) -> str:
    """Take the running daemon's place, in a process of its own; returns once that serves.

    The result is what an operator is to know of the running one; empty: nothing.

    `introduce` hands the running daemon a descriptor by its control socket, with `succeed`.

    Raises:
        ForwarderError: it cannot; the one that is running goes on as before.
    """
    if config_path is not None:
        config_path = config_path.absolute()
    options = UpOptions(
        instance=instance.name,
        config_path=config_path,
        listen=None,
        datapath=None,
        detach=False,
        verbosity=0,
    )

    def make(env: Environment, options: UpOptions) -> Daemon:
        predecessor = find(introduce)
        reason = why_not_here(predecessor)
        if predecessor.offer.is_draining:
            reason = "the daemon is ending: `pyforwarder up` starts another one beside it"
        if reason:
            predecessor.discard()
            raise ControlError(reason)
        return Daemon(_environment(env, predecessor), _options(options, predecessor), predecessor)

    return detached(env, options, make, has_output=True)


def why_not_here(predecessor: Predecessor, advice: str = "") -> str:
    """Why this process cannot be what the running daemon is; empty: it can.

    `advice` is what to do instead, where that is not what an upgrade would want.
    """
    pid = predecessor.offer.pid
    if pid == 1:
        return (
            "the running daemon is process 1: all of its container ends with it, so that "
            f"nothing can take its place there; {advice or 'start another container'}"
        )
    if predecessor.offer.network not in (None, network_namespace()):
        return (
            "the running daemon is in another network namespace: its servers are not reached from "
            f"this one; `nsenter --all --target {pid}` runs a command in its own"
        )
    if "NOTIFY_SOCKET" in predecessor.offer.environ and _group_of(pid) != _group_of(os.getpid()):
        # It would have neither the service's limits nor its walls, and end with a login.
        return "the running daemon is a service of systemd, and this command is not run in it: " + (
            advice or "`systemctl reload` its unit, whose ExecReload= runs it there"
        )
    return ""


def _group_of(pid: int) -> str:
    """The control groups of a process (cgroups(7)); empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def _options(options: UpOptions, predecessor: Predecessor) -> UpOptions:
    offer = predecessor.offer
    path = options.config_path
    if path is None and offer.config_path is not None:
        path = Path(offer.config_path)
    return replace(options, config_path=path, detach=offer.detach, verbosity=offer.verbosity)


def _environment(env: Environment, predecessor: Predecessor) -> Environment:
    """What systemd has told the running daemon; and where that writes, we do from here on."""
    env.stdout.flush()
    env.stderr.flush()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for fd, standard in ((predecessor.stdout_fd, 1), (predecessor.stderr_fd, 2)):
        os.dup2(fd, standard)
        os.close(fd)  # its reader waits for the end of the last holder
    own = {
        key: value
        for key, value in env.environ.items()
        if not key.startswith(("LISTEN_", "WATCHDOG_", "NOTIFY_", "JOURNAL_"))
    }
    return replace(env, environ={**own, **predecessor.offer.environ})
