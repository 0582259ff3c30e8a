"""Fixtures of several modules: plays of a worker's connections, and the servers in them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from tests.helpers.clock import StillClock
from tests.helpers.stream_play import Play, Servers, StartPlay


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test does takes no time, so nothing depends on how fast this host is."""
    clock = StillClock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    monkeypatch.setattr("time.monotonic_ns", clock.monotonic_ns)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Every descriptor that a play and its peers opened is closed at its end."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def servers(descriptors: None) -> Iterator[Servers]:
    """Makes servers that listen: the socket and its address."""
    del descriptors
    with contextlib.ExitStack() as stack:

        def make() -> tuple[socket.socket, str]:
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=16))
            sock.setblocking(False)
            host, port = sock.getsockname()
            return sock, f"{host}:{port}"

        yield make


@pytest.fixture
def start(servers: Servers) -> Iterator[StartPlay]:
    """Makes the play of this test, which ends before its servers do."""
    del servers
    plays: list[Play] = []

    def make(config: str) -> Play:
        plays.append(Play(config))
        return plays[-1]

    yield make
    for play in reversed(plays):  # each has put its clock in place of the one before
        play.close()
