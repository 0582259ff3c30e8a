"""Machines of a fleet that share their health checks, with a real etcd."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import psutil
import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.etcd import Etcd, running
from tests.helpers.peers import unused_port
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = [pytest.mark.copied, pytest.mark.timeout(scaled_s(240))]

HOST: Final = "192.0.2.91"  # a server at loopback is another one at each machine
# Of which address each machine checks: so the server knows which one it was.
SOURCES: Final = {"one": "127.0.0.2", "two": "127.0.0.3", "three": "127.0.0.4"}


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


@pytest.fixture(autouse=True)
def server_address() -> Iterator[None]:
    subprocess.run(["ip", "address", "add", f"{HOST}/32", "dev", "lo"], check=True)
    yield
    subprocess.run(["ip", "address", "del", f"{HOST}/32", "dev", "lo"], check=True)


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))


class CountingServer:
    """Knows from which addresses it was connected to; it can go, and come back."""

    def __init__(self) -> None:
        self.port: Final = unused_port()
        self._sources: list[str] = []
        self._listening: socket.socket | None = None
        self.accept()

    def accept(self) -> None:
        """Be there."""
        self._listening = socket.create_server((HOST, self.port))
        threading.Thread(target=self._run, args=(self._listening,), daemon=True).start()

    def _run(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, (host, _) = listening.accept()
                self._sources.append(host)
                sock.close()

    def refuse(self) -> None:
        """Be gone."""
        if self._listening is not None:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None

    def sources(self) -> list[str]:
        """Of all connections so far."""
        return list(self._sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()


class Machines:
    """Daemons that check one server."""

    def __init__(
        self, start: StartForwarder, etcd: Etcd, server: CountingServer, health: str
    ) -> None:
        self._start, self._etcd, self._server, self._health = start, etcd, server, health
        self.more: list[str] = []  # servers beside it
        self.daemons: dict[str, Daemon] = {}

    def start(self, name: str) -> None:
        """It shares its checks when this returns."""
        servers = ", ".join((f"'{HOST}:{self._server.port}'", *map(repr, self.more)))
        daemon = self.daemons[name] = self._start(
            f"fleet: {{endpoints: ['{self._etcd.endpoint}'], name: edge, instance: {name}, "
            f"health: {self._health}}}\n"
            "workers: 1\n"
            f"upstreams: {{web: {{servers: [{servers}], "
            f"source: [{SOURCES[name]}], "
            "health: {interval: 200ms, timeout: 150ms, rise: 2, fall: 2}}}\n"
            "listeners: [{name: main, bind: '127.0.0.1:0', rules: [{match: any, to: web}]}]\n",
            instance=name,
        )
        daemon.wait_for_line("fleet_health_connected")

    def say(self, **wanted: str) -> None:
        """Wait until each of these machines says this of the server."""

        def states() -> dict[str, str]:
            return {name: str(self.daemons[name].look("upstreams")[0]["state"]) for name in wanted}

        wait_for(lambda: states() == wanted, f"{wanted}", deadline_s=4 * DEADLINE_S)

    def checked_by(self, name: str) -> object:
        """The machine that checks the server, by another one's `show upstreams`."""
        return self.daemons[name].look("upstreams")[0]["checked_by"]

    def checker(self) -> str:
        """The machine from which all of the next checks come, once that is one."""

        def only() -> str:
            seen = self._server.sources()
            wait_for(lambda: len(self._server.sources()) >= len(seen) + 10, "more checks")
            sources = set(self._server.sources()[len(seen) :])
            return sources.pop() if len(sources) == 1 else ""

        found = wait_for(only, "one machine that checks", deadline_s=4 * DEADLINE_S)
        return next(name for name, source in SOURCES.items() if source == found)


def test_of_processes_that_die_together_each_is_told_and_replaced(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    """One signal tells of both, and without its fleet a machine has others check at once."""
    with CountingServer() as server:
        machines = Machines(start_forwarder, etcd, server, "{checks: one}")
        # Where nobody is: so many that neither machine checks all.
        machines.more = [f"{HOST}:{unused_port()}" for _ in range(16)]
        for name in ("one", "two"):
            machines.start(name)
        daemon = machines.daemons[machines.checker()]
        helpers = [
            process
            for process in psutil.Process(daemon.process.pid).children()
            if not any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
        ]

        def have_ended() -> bool:
            return all(helper.status() == psutil.STATUS_ZOMBIE for helper in helpers)

        daemon.process.send_signal(signal.SIGSTOP)
        for helper in helpers:
            helper.kill()
        wait_for(have_ended, "they have ended")
        daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for_line("fleet_health_died")
        daemon.wait_for_line("health_checks_died")
        daemon.wait_for_line("fleet_health_connected", count=2)


def test_one_machine_checks_a_server_and_when_it_dies_another_one(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    with CountingServer() as server:
        machines = Machines(start_forwarder, etcd, server, "{checks: one}")
        for name in ("one", "two"):
            machines.start(name)
        first = machines.checker()
        (second,) = {"one", "two"} - {first}
        for name, checker in ((first, "here"), (second, first)):
            wait_for(
                lambda name=name, checker=checker: machines.checked_by(name) == checker,  # type: ignore[misc]
                f"{name} says who checks",
            )
        server.refuse()
        machines.say(one="down", two="down")
        server.accept()
        machines.say(one="up", two="up")
        machines.daemons[first].kill()
        assert machines.checker() == second
        assert machines.checked_by(second) == "here"
        server.refuse()
        machines.say(**{second: "down"})


def test_when_the_checks_of_a_machine_stand_still_another_one_checks(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    def checks_of(daemon: Daemon) -> psutil.Process:
        """Of its children the one that neither listens nor speaks to the store."""
        (found,) = (
            process
            for process in daemon.workers()
            if not any(
                one.status == psutil.CONN_LISTEN or etcd.port in one.raddr
                for one in process.net_connections("tcp")
            )
        )
        return found

    with CountingServer() as server:
        machines = Machines(start_forwarder, etcd, server, "{checks: one}")
        for name in ("one", "two"):
            machines.start(name)
        first = machines.checker()
        (second,) = {"one", "two"} - {first}
        checks = checks_of(machines.daemons[first])
        checks.send_signal(signal.SIGSTOP)
        assert machines.checker() == second
        server.refuse()
        machines.say(one="down", two="down")
        server.accept()
        machines.say(one="up", two="up")
        checks.send_signal(signal.SIGCONT)
        assert machines.checker() == first


@pytest.fixture
def cut_off() -> Iterator[set[str]]:
    """Machines whose connections to the server are reset: call `refresh` after a change."""
    yield set()
    subprocess.run(["nft", "flush", "ruleset"], check=True)


def refresh(cut_off: set[str], port: int) -> None:
    rules = "".join(
        f"    ip saddr {SOURCES[name]} tcp dport {port} reject with tcp reset\n"
        for name in sorted(cut_off)
    )
    table = (
        "flush ruleset\ntable ip cut {\n  chain in {\n"
        f"    type filter hook input priority 0;\n{rules}  }}\n}}\n"
    )
    subprocess.run(["nft", "-f", "-"], input=table.encode(), check=True)


def test_a_server_is_down_when_enough_machines_say_so_and_each_is_alone_without_the_store(
    start_forwarder: StartForwarder, etcd: Etcd, cut_off: set[str]
) -> None:
    with CountingServer() as server:
        machines = Machines(start_forwarder, etcd, server, "{checks: all, quorum: 2}")
        for name in SOURCES:
            machines.start(name)
        machines.say(one="up", two="up", three="up")

        def cut(*names: str) -> None:
            cut_off.clear()
            cut_off.update(names)
            refresh(cut_off, server.port)

        cut("two", "three")
        machines.say(one="down", two="down", three="down")
        line = machines.daemons["one"].wait_for_line("server_down")
        assert "2 of 3 machines" in line
        cut("two")
        machines.say(one="up", two="up", three="up")
        etcd.stop()
        machines.say(one="up", two="down", three="up")
        machines.daemons["two"].wait_for_line("fleet_health_lost")
        etcd.start()
        machines.say(one="up", two="up", three="up")
