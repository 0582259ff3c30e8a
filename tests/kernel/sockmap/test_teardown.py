"""Many stalled sockmap pairs end at once: none stays, and the kernel does not complain."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from kernels.complaints import complaints
from tests.helpers.kernel_log import KernelLog
from tests.helpers.peers import pair_through, pattern, push_until_blocked, read_exactly, reset

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

CONFIG = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
datapath: sockmap
workers: 2
"""
PAIRS = 20
Pairs = list[tuple[socket.socket, socket.socket]]


def end(daemon: Daemon, pairs: Pairs, way: str) -> None:
    match way:
        case "reset":
            for client, _ in pairs:
                reset(client)
        case "close":
            for client, server in pairs:
                client.close()
                server.close()
        case "flush":
            assert daemon.command("flush", "--all").returncode == 0
        case "kill":
            for worker in daemon.workers():
                os.kill(worker.pid, signal.SIGKILL)


def push(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        push_until_blocked(sock, most=64 << 20, quiet_s=0.2)


@pytest.mark.parametrize("way", ["flush", "reset", "close", "kill"])
@pytest.mark.usefixtures("narrow_network")
def test_stalled_pairs_leave_nothing_behind(start_forwarder: StartForwarder, way: str) -> None:
    daemon = start_forwarder(CONFIG)
    log = KernelLog()
    with contextlib.closing(log), contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(pair_through(daemon.address)) for _ in range(PAIRS)]
        for client, server in pairs:
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(pattern(10_000))
                assert read_exactly(receiver, 10_000) == pattern(10_000)
        # Nobody reads, so both directions have a backlog.
        pushing = [threading.Thread(target=push, args=(end,)) for pair in pairs for end in pair]
        for thread in pushing:
            thread.start()
        for thread in pushing:
            thread.join()
        assert {row["datapath"] for row in daemon.pairs()} == {"sockmap"}
        end(daemon, pairs, way)
        daemon.wait_for_no_pairs()
        assert complaints(log.lines()) == []
