"""Pairs whose peers do not read: what they all hold is bounded, and nobody else is harmed."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.helpers.netns import private_network
from tests.helpers.peers import EchoServer, Waiting, dial, ends_with_reset, read_exactly
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

MEMORY = 32 << 20
CONFIG = """
datapath: {datapath}
workers: 2
handover: {{after_bytes: 0}}
limits: {{memory: {memory}}}
listeners:
  - {{name: slow, bind: "127.0.0.1:0", rules: [{{match: {{regex: "."}}, to: "{slow}"}}]}}
  - {{name: good, bind: "127.0.0.2:0", rules: [{{match: {{regex: "."}}, to: "{good}"}}]}}
"""


def push(sock: socket.socket, size: int) -> int:
    """What TCP takes of so many bytes without waiting."""
    sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < size:
            sent += sock.send(bytes(min(1 << 16, size - sent)))
    return sent


def held(daemon: Daemon) -> int:
    """What all its pairs hold, as it was measured last."""
    return int(daemon.look("stats")["held_bytes"])


def accepted(waiting: Waiting, client: socket.socket) -> socket.socket | None:
    """The server's end of the client's pair; None: the client's connection has ended instead."""
    readable, _, _ = select.select([waiting.listener, client], [], [], DEADLINE_S)
    assert readable, "neither a pair nor an end"
    return waiting.accept() if waiting.listener in readable else None


@pytest.mark.parametrize("datapath", ["copy", "sockmap"])
def test_what_stalled_pairs_hold_is_bounded(start_forwarder: StartForwarder, datapath: str) -> None:
    with (
        private_network(),
        Waiting(backlog=512) as slow,
        EchoServer("good") as good,
        contextlib.ExitStack() as stack,
    ):
        daemon = start_forwarder(
            CONFIG.format(
                datapath=datapath,
                memory=MEMORY,
                slow="{}:{}".format(*slow.address),
                good="{}:{}".format(*good.address),
            )
        )
        addresses = daemon.listeners()
        pair = stack.enter_context(dial(addresses["good"]))
        pair.sendall(b"hello")
        assert read_exactly(pair, 5) == b"hello"
        # Readers that take enough for all buffers to grow, and then stop; each from a network of
        # its own, for one alone may not hold it all.
        stalled = []
        refused = 0
        seen = []  # what they hold, as the daemon measures it
        for number in range(60):
            client = socket.socket()
            stack.enter_context(client)
            client.settimeout(20)
            client.bind((f"127.0.1.{number + 1}", 0))
            client.connect(addresses["slow"])
            client.sendall(b"x")
            server = accepted(slow, client)
            seen.append(held(daemon))
            if server is None:
                refused += 1
                assert ends_with_reset(client) == b""
                break
            stack.enter_context(server)
            stalled.append((client, server))
            for _ in range(20):
                sent = push(client, 1 << 20)
                client.setblocking(True)
                server.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    taken = 0
                    while taken < sent:
                        taken += len(server.recv(1 << 20))
            # Until nobody takes more, and longer than a look takes; the workers have their turn.
            for _ in range(20):
                push(client, 8 << 20)
                seen.append(held(daemon))
                time.sleep(0.02)
        stats = daemon.look("stats")
        assert refused == 1, f"{len(stalled)} pairs, {stats}"
        assert stats["limited"] == {"memory": 1}
        # A little goes up and down, and the last one had a moment to take some more. One that has
        # been slow for ten seconds is ended then, so that it is less by the time that we look.
        assert MEMORY * 3 // 4 <= max(seen) < 2 * MEMORY
        assert stats["pairs_slowed"] > 0
        # The pair that there was goes on, and a client that never reads keeps nobody out for long.
        pair.sendall(b"again")
        assert read_exactly(pair, 5) == b"again"

        def is_served() -> bool:
            with dial(addresses["good"]) as another:
                another.sendall(b"new")
                with contextlib.suppress(ConnectionResetError):
                    return another.recv(3) == b"new"
            return False

        wait_for(is_served, "room for a new pair", deadline_s=40)
        # One of them was ended for it, or they hold a little less now than they may.
        stats = daemon.show("stats")
        assert stats["closed"].get("backlog") or stats["held_bytes"] < MEMORY
        for client, server in stalled:
            client.close()
            server.close()
        wait_for(lambda: daemon.look("stats")["held_bytes"] < MEMORY // 8, "nothing is held")
