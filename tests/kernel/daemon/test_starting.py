"""A start: connections are served before it is known what the kernel can do for them.

The processes that load and prove are stopped for as long as a test looks at the time before.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import psutil
import pytest

from pyforwarder.runtime import store
from tests.helpers import daemon as daemons
from tests.helpers.daemon import LISTENING, START_DEADLINE_S
from tests.helpers.instruction import instruction
from tests.helpers.peers import EchoServer, address_text, dial, read_exactly
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    import socket

    from tests.helpers.daemon import Daemon, Place

ATTEMPTS: Final = 9
ADDRESS: Final = ("127.0.0.1", 9217)
CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:9217
    rules: [{match: instruction, allow: [loopback]}]
datapath: DATAPATH
handover: {after: 0s}
"""


class Starting(Protocol):
    """What the fixture gives."""

    def __call__(self, datapath: str = "auto") -> Daemon: ...


def helpers_of(daemon: Daemon) -> list[psutil.Process]:
    """What works for it as root and is no keeper: those that load and prove."""
    children = psutil.Process(daemon.process.pid).children()
    return [child for child in children if child.uids().real == 0]


@pytest.fixture
def starting(place: Place) -> Iterator[Starting]:
    """Start a daemon; it has workers, and nobody proves anything, when this returns."""
    started: list[Daemon] = []

    def start(datapath: str = "auto") -> Daemon:
        for _ in range(ATTEMPTS):
            daemon = daemons.start(place, CONFIG.replace("DATAPATH", datapath), wait=False)
            started.append(daemon)
            daemon.wait_for_line(" accepting ", deadline_s=START_DEADLINE_S)
            for child in helpers_of(daemon):
                child.suspend()
            # Messages of its children that came before are in the log once it answers.
            daemon.control().show("stats")
            if not re.search(r" datapath=(splice|sockmap) | started | no_view ", daemon.output()):
                return daemon
            for child in helpers_of(daemon):
                child.resume()
            assert daemon.stop() == 0
        raise AssertionError("it is proven before anybody can look")

    try:
        yield start
        for daemon in started:
            if daemon.process.poll() is None:
                assert daemon.stop() == 0
            assert daemons.leftovers(place) == []
    finally:
        for daemon in started:
            daemon.close()
            print(daemon.output())


def go_on(daemon: Daemon) -> None:
    assert LISTENING.search(daemon.output()) is None
    for child in helpers_of(daemon):
        child.resume()
    daemon.wait_for_line(LISTENING.pattern, deadline_s=START_DEADLINE_S)


@contextlib.contextmanager
def connection(server: EchoServer) -> Iterator[socket.socket]:
    """Through the forwarder; nothing was read yet."""
    with dial(ADDRESS) as client:
        client.sendall(instruction(address_text(server.address)))
        yield client


def echoes(client: socket.socket, data: bytes) -> bool:
    client.sendall(data)
    return read_exactly(client, len(data)) == data


def rows(daemon: Daemon) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", daemon.control().show("pairs"))


def datapath_of(daemon: Daemon) -> str:
    (row,) = rows(daemon)
    return str(row["datapath"])


def is_spliced_now(daemon: Daemon) -> bool:
    """Whether a new connection is; on a busy host the keeper is late for one or the other."""

    def look() -> bool:
        with EchoServer() as server, connection(server) as client:
            assert read_exactly(client, 6) == b"06OK56"
            assert echoes(client, b"then")
            wait_for(lambda: "copy" not in [row["datapath"] for row in rows(daemon)], "handed over")
            return "splice" in [row["datapath"] for row in rows(daemon)]

    return wait_for(look, "a spliced connection")


def test_connections_are_copied_at_once_and_handed_over_later(starting: Starting) -> None:
    daemon = starting()
    with EchoServer() as server, connection(server) as client:
        assert read_exactly(client, 6) == b"06OK56"
        assert echoes(client, b"before" * 5000)
        assert datapath_of(daemon) == "copy"
        stays(lambda: datapath_of(daemon) == "copy", "copied", for_s=0.3)
        go_on(daemon)
        # Its handshake was not seen by the programs of splice, which were not there.
        wait_for(lambda: datapath_of(daemon) == "sockmap", "handed over")
        assert echoes(client, b"after" * 5000)
    assert is_spliced_now(daemon)
    said = daemon.output()
    assert said.index(" accepting ") < said.index("datapath=sockmap") < said.index(" started ")


def test_listener_that_names_a_datapath_lets_its_connections_wait(
    starting: Starting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With nothing kept there is more to do than a moment's work.
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "programs"))
    daemon = starting("sockmap")
    with EchoServer() as server, connection(server) as client:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        stays(lambda: rows(daemon) == [], "nothing accepted", for_s=0.3)
        client.settimeout(START_DEADLINE_S)
        go_on(daemon)
        assert read_exactly(client, 6) == b"06OK56"
        assert datapath_of(daemon) == "sockmap"
        assert echoes(client, b"after")


def test_worker_that_dies_meanwhile_is_replaced_by_one_that_hands_over(starting: Starting) -> None:
    daemon = starting()
    before = {worker.pid for worker in daemon.workers()}
    for worker in daemon.workers():
        worker.kill()
    wait_for(
        lambda: len(now := {w.pid for w in daemon.workers()}) == len(before) and not now & before,
        "other workers",
    )
    go_on(daemon)
    assert is_spliced_now(daemon)


def test_without_those_that_load_it_goes_on_by_copy(starting: Starting) -> None:
    daemon = starting()
    for child in helpers_of(daemon):
        child.send_signal(signal.SIGKILL)
    daemon.wait_for_line(LISTENING.pattern, deadline_s=START_DEADLINE_S)
    said = daemon.output()
    for event in ("no_splice", "no_sockmap", "no_view"):
        assert f'{event} reason="the process that loads it has died"' in said
    with EchoServer() as server, connection(server) as client:
        assert read_exactly(client, 6) == b"06OK56"
        assert echoes(client, b"copied")
    daemon.wait_for_line(" closed .* datapath=copy ")


def test_reload_and_down_do_not_wait_for_those_that_load(starting: Starting) -> None:
    daemon = starting()
    daemon.reconfigure(CONFIG.replace("DATAPATH", "auto").replace("9217", "9218"))
    daemon.control().reload()
    with EchoServer() as server, dial(("127.0.0.1", 9218)) as client:
        client.sendall(instruction(address_text(server.address)))
        assert read_exactly(client, 6) == b"06OK56"
    assert daemon.stop() == 0
    assert LISTENING.search(daemon.output()) is None


def test_what_has_passed_since_the_boot_is_proven_again_only_when_asked(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "programs"))

    def proof(*words: str) -> str:
        daemon = daemons.start(place, CONFIG.replace("DATAPATH", "sockmap"), *words)
        try:
            line = daemon.wait_for_line(" datapath=sockmap ")
            assert daemon.stop() == 0
        finally:
            daemon.close()
        return line.partition("proof=")[2]

    assert proof().startswith('"8 scenarios in ')
    assert proof().startswith('"passed before')
    assert proof("--prove").startswith('"8 scenarios in ')
