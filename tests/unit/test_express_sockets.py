"""By which sockets the keeper tells workers of what the kernel has opened, each its own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyforwarder.datapath.express.sharing import Express


@pytest.fixture
def express() -> Iterator[Express]:
    connections: Any = SimpleNamespace(places=4, close=lambda: None)
    with contextlib.closing(Express(connections, workers=2)) as made:
        yield made


def read(sock: socket.socket) -> list[bytes]:
    """All that is there."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(1 << 16):
            found.append(data)
    return found


def test_a_successor_reads_what_the_one_before_has_not(express: Express) -> None:
    assert all(express.send(1, text) for text in ("read", "first", "second"))
    assert express.workers[1].recv(10) == b"read"
    express.renew(1)
    assert express.send(1, "third")
    assert read(express.workers[1]) == [b"first", b"second", b"third"]


@pytest.mark.parametrize("is_shut_down", [False, True])
def test_what_a_successor_is_told_nobody_else_reads(
    express: Express, *, is_shut_down: bool
) -> None:
    """A process that the worker before gave its socket to, and a socket that it shut down."""
    with express.workers[0].dup() as kept, express.keepers[0].dup() as before:
        assert express.send(0, "first")
        if is_shut_down:
            kept.shutdown(socket.SHUT_RDWR)
            assert not express.send(0, "second")
            assert express.closed == {0}
        express.renew(0)
        assert express.send(0, "third")
        assert read(express.workers[0]) == [b"first", b"third"]
        assert read(kept) == []
        # The keeper has not got its end yet, and keeps what it cannot say.
        with pytest.raises(BrokenPipeError):
            before.send(b"fourth")


def test_a_keeper_goes_on_by_its_end_of_the_new_one(express: Express) -> None:
    with express.keepers[0].dup() as before, express.renew(0).dup() as keeper:
        express.keepers[0], kept = before.dup(), express.keepers[0]  # as another process has it
        with kept:
            assert not express.send(0, "lost")
            express.renewed(0, keeper.dup())
            assert (express.closed, express.send(0, "found")) == (set(), True)
    assert read(express.workers[0]) == [b"found"]


def test_a_worker_that_is_busy_has_not_closed_its_socket(express: Express) -> None:
    count = 0
    while express.send(0, "x" * 1000):
        count += 1
    assert count > 10
    assert express.closed == set()
    # Of all that it had not read nothing is lost, either.
    express.renew(0)
    assert len(read(express.workers[0])) == count
