"""keepalived on the machines of a fleet, with the example that we ship for it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from tests.helpers.daemon import COMMAND
from tests.helpers.two_machines import BACK, FRONT
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.fleet_of_two import Fleet

EXAMPLE: Final = Path(__file__).parents[2] / "examples/keepalived/keepalived.conf"
ADVERT_INT_S: Final = 0.1
_PID_FILES: Final = ("pid", "vrrp_pid")


def config(name: str, ready: Path) -> str:
    """The example, with the addresses and interfaces of this machine; nobody is notified."""
    text = EXAMPLE.read_text()
    for old, new in (
        ("router_id one", f"router_id {name}"),
        ("/usr/bin/pyforwarder fleet ready", str(ready)),
        ("interface front", f"interface {name}0"),
        ("advert_int 1", f"advert_int {ADVERT_INT_S}"),
        ("192.0.2.1/32 dev front", f"{FRONT[4]}/32 dev {name}0"),
        (
            "10.0.9.1/32 dev back",
            f"{BACK[4]}/32 dev {name}1\n{FRONT[6]}/128 dev {name}0\n{BACK[6]}/128 dev {name}1",
        ),
        (
            "    track_interface {\n        back\n",
            f"    track_interface {{\n        {name}1\n",
        ),
        ('    notify "/etc/keepalived/pyforwarder-notify"\n', ""),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


class Keepalived:
    """Of one machine, from `start` to `stop` or `kill`."""

    def __init__(self, fleet: Fleet, name: str, directory: Path) -> None:
        """`directory` is root's alone, all the way: keepalived runs no other scripts."""
        self._fleet, self._name = fleet, name
        self._directory = directory / name
        self._directory.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, as BACKUP. The machine's daemon has been started before."""
        daemon = self._fleet.daemons[self._name]
        ready = self._directory / "ready"
        words = [*COMMAND, "fleet", "ready", "--instance", self._name]
        told = [
            f"{key}={value}"
            for key, value in daemon.place.environ().items()
            if key.startswith("PYFORWARDER")
        ]
        ready.write_text(f"#!/bin/sh\nexec env {shlex.join([*told, *words])}\n")
        ready.chmod(0o755)
        conf = self._directory / "keepalived.conf"
        conf.write_text(config(self._name, ready))
        conf.chmod(0o644)
        pids = [f"--{what}={self._directory}/{what}" for what in _PID_FILES]
        with (
            self._fleet.hosts.machines[self._name].entered(),
            (self._directory / "log").open("ab") as log,
        ):
            self._process = subprocess.Popen(
                ["keepalived", "--vrrp", "--dont-fork", "--log-console", "-f", str(conf), *pids],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        """What it has said."""
        return (self._directory / "log").read_text()

    def stop(self) -> None:
        """As `systemctl stop` does: it gives the addresses up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(DEADLINE_S)
            self._process = None

    def kill(self) -> None:
        """All of its processes at once: the addresses stay. None of them lives afterwards.

        Nor is a pid file left: whose process is still there, dying or not waited for by anybody,
        keeps the next keepalived from starting.
        """
        if self._process is None:
            return
        session = self._process.pid  # it leads one of its own; a script has a process group, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)
        wait_for(lambda: not _kill_those_left(session), "all of keepalived has ended")
        self._process.wait(DEADLINE_S)
        self._process = None
        for name in _PID_FILES:
            (self._directory / name).unlink(missing_ok=True)


def _kill_those_left(session: int) -> list[int]:
    """Kill the processes of a session; which of them were still alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)
    return found


@contextlib.contextmanager
def keepalived(fleet: Fleet) -> Iterator[dict[str, Keepalived]]:
    """One for each machine, not started yet."""
    directory = Path(tempfile.mkdtemp(prefix="pyforwarder-keepalived-", dir="/run"))
    directory.chmod(0o755)
    try:
        found = {name: Keepalived(fleet, name, directory) for name in fleet.hosts.machines}
        try:
            yield found
        finally:
            for one in found.values():
                one.kill()
    finally:
        shutil.rmtree(directory)
