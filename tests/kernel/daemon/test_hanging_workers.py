"""A worker that does nothing any more: another takes its place, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Final

from tests.helpers.peers import EchoServer, dial_through, read_exactly
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

CONFIG: Final = """
workers: 2
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
datapath: copy
"""
PAIRS: Final = 12


def echoes(client: socket.socket) -> bool:
    client.sendall(b"alive")
    return read_exactly(client, 5) == b"alive"


def other_than(daemon: Daemon, hung: psutil.Process, count: int) -> bool:
    now = [worker.pid for worker in daemon.workers()]
    return len(now) == count and hung.pid not in now


def test_stopped_worker_is_replaced_and_its_connections_are_reset(
    start_forwarder: StartForwarder,
) -> None:
    daemon = start_forwarder(CONFIG)
    with EchoServer() as server, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(dial_through(daemon.address, server.address)) for _ in range(PAIRS)
        ]
        assert all(map(echoes, clients))
        hung, other = daemon.workers()
        hung.suspend()
        line = daemon.wait_for_line(" worker_hangs ")
        assert f"pid={hung.pid}" in line
        assert 'why="it is stopped"' in line
        wait_for(lambda: other_than(daemon, hung, 2), "another worker")
        assert other.pid in [worker.pid for worker in daemon.workers()]
        reset = 0
        for client in clients:
            try:
                assert echoes(client)
            except (ConnectionResetError, BrokenPipeError):
                reset += 1
        assert f" pairs_reset={reset} " in daemon.wait_for_line(" worker_died ") + " "
        # The kernel has spread them over both.
        assert 0 < reset < PAIRS
        assert daemon.show("stats")["closed"]["internal"] == reset
        # New clients are served by either worker.
        for _ in range(PAIRS):
            with dial_through(daemon.address, server.address) as client:
                assert echoes(client)


def test_command_does_not_wait_long_for_a_stopped_worker(start_forwarder: StartForwarder) -> None:
    daemon = start_forwarder(CONFIG)
    hung = daemon.workers()[0]
    hung.suspend()
    daemon.control().reload()
    wait_for(lambda: other_than(daemon, hung, 2), "another worker")
    daemon.control().reload()


def test_whole_daemon_that_was_stopped_goes_on_as_it_was(start_forwarder: StartForwarder) -> None:
    daemon = start_forwarder(CONFIG)
    with EchoServer() as server, dial_through(daemon.address, server.address) as client:
        assert echoes(client)
        before = [worker.pid for worker in daemon.workers()]
        everyone = [daemon.process.pid, *before]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        end_s = time.monotonic() + 4.0
        wait_for(lambda: time.monotonic() > end_s, "some looks that were not taken")
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        assert echoes(client)
        end_s = time.monotonic() + 4.0
        wait_for(lambda: time.monotonic() > end_s, "some looks")
        assert [worker.pid for worker in daemon.workers()] == before
        assert echoes(client)


def test_watchdog_is_told_as_long_as_the_daemon_works(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(30)
        daemon = start_forwarder(
            CONFIG, prefix=["env", f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=400000"]
        )
        said = [systemd.recv(100)]
        while said[-1] != b"READY=1":
            said.append(systemd.recv(100))
        said += [systemd.recv(100) for _ in range(5)]
        assert set(said) == {b"READY=1", b"WATCHDOG=1"}
        assert said.count(b"READY=1") == 1
        os.kill(daemon.process.pid, signal.SIGSTOP)
        systemd.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                assert systemd.recv(100) == b"WATCHDOG=1"
        os.kill(daemon.process.pid, signal.SIGCONT)
        systemd.settimeout(30)
        assert systemd.recv(100) == b"WATCHDOG=1"
