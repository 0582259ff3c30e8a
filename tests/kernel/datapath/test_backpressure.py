"""A reader that stalls stops its sender after a bounded amount, and gets every byte later.

The kernel has no flow control on redirect: what bounds the memory here is the forwarder's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.netns import Network, narrow_the_network, usual_buffers
from tests.helpers.peers import (
    digest,
    pair_through,
    pattern,
    push_until_blocked,
    read_exactly,
    reset,
)
from tests.helpers.waiting import DEADLINE_S, wait_for
from tests.kernel.conftest import forwarders_at, temporary_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.daemon import Daemon

T = TypeVar("T")

MIB: Final = 1 << 20
LIMIT: Final = MIB
# The sockets of the narrow network have 64 KiB for each direction, and take up to twice that.
NARROW_SOCKET: Final = 2 * 65536
DATAPATHS: Final = {
    "copy": "datapath: copy",
    "sockmap": "datapath: sockmap",
    "auto": "datapath: auto\nhandover: {after_bytes: 64KiB}",
}


def config(datapath: str) -> str:
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{{match: instruction, allow: [loopback]}}]
{DATAPATHS[datapath]}
backlog_limit: {LIMIT >> 20}MiB
"""


def most_accepted(datapath: str) -> int:
    """How many bytes a stalled direction may take in a narrow network.

    Two connections of two sockets each, what a worker has in its hands (one read), and twice the
    backlog limit: the packet that would exceed it, and all behind it, wait in the source's socket.
    """
    return 4 * NARROW_SOCKET + MIB + (0 if datapath == "copy" else 2 * LIMIT)


class OnDatapath(NamedTuple):
    """A forwarder that carries its pairs on this datapath."""

    forwarder: Daemon
    datapath: str


@pytest.fixture(scope="module", params=list(DATAPATHS))
def wide(network: None, request: pytest.FixtureRequest) -> Iterator[OnDatapath]:
    """One with the buffers of loopback, for all tests of a datapath."""
    del network
    usual_buffers()
    with temporary_place() as place, forwarders_at(place) as start:
        yield OnDatapath(start(config(request.param)), request.param)


@pytest.fixture(scope="module")
def narrow_network() -> Iterator[Network]:
    """A network with small buffers and segments."""
    network = Network()
    try:
        with network.entered():
            narrow_the_network()
        yield network
    finally:
        network.close()


@pytest.fixture(scope="module", params=list(DATAPATHS))
def narrow_forwarder(
    narrow_network: Network, request: pytest.FixtureRequest
) -> Iterator[OnDatapath]:
    """One in the narrow network, for all tests of a datapath."""
    with temporary_place() as place, forwarders_at(place) as start:
        with narrow_network.entered():
            forwarder = start(config(request.param))
        yield OnDatapath(forwarder, request.param)


@pytest.fixture
def narrow(narrow_network: Network, narrow_forwarder: OnDatapath) -> Iterator[OnDatapath]:
    """The same; the test is in that network, too."""
    with narrow_network.entered():
        yield narrow_forwarder


@contextlib.contextmanager
def joined(on: OnDatapath) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair that has carried 100,000 bytes each way, and is on its datapath now."""
    forwarder, datapath = on
    with pair_through(forwarder.address) as (client, server):
        warm_up(client, server)
        wanted = "splice" if datapath == "auto" else datapath  # it is at rest: the best one
        forwarder.wait_for_pair(lambda row: row["datapath"] == wanted, f"a pair on {wanted}")
        yield client, server
    forwarder.wait_for_no_pairs()


def warm_up(client: socket.socket, server: socket.socket) -> None:
    # In pieces that two small sockets take: nothing else is between the ends of a spliced pair.
    for sender, receiver in ((client, server), (server, client)):
        for _ in range(10):
            sender.sendall(pattern(10_000))
            assert read_exactly(receiver, 10_000) == pattern(10_000)


def hash_of(sock: socket.socket, size: int) -> str:
    """The SHA-256 of the next `size` bytes."""
    sha = hashlib.sha256()
    while size:
        piece = sock.recv(min(size, MIB))
        assert piece, f"end of file, {size} bytes missing"
        sha.update(piece)
        size -= len(piece)
    return sha.hexdigest()


def workers_cpu_s(forwarder: Daemon) -> float:
    return sum(sum(worker.cpu_times()[:2]) for worker in forwarder.workers())


def memory() -> dict[str, int]:
    """The lines of /proc/meminfo, in bytes; it is the whole host's."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(value) << 10 for name, value, *_ in lines}


@pytest.mark.parametrize("direction", ["up", "down"])
def test_the_sender_is_blocked_until_the_reader_reads(narrow: OnDatapath, direction: str) -> None:
    forwarder, datapath = narrow
    with joined(narrow) as (client, server):
        sender, reader = (client, server) if direction == "up" else (server, client)
        total = 0
        for _ in range(2):  # stalled, read empty, stalled again: each time the same bound
            sent, used_s = push_until_all_is_quiet(sender, forwarder, start=total)
            total += sent
            assert used_s < 0.3, "a worker spins"
            assert sent < most_accepted(datapath)
            assert forwarder.pairs()[0]["backlog_bytes"] <= LIMIT + 65536
            expected = pattern(total)[total - sent :]
            assert hash_of(reader, sent) == hashlib.sha256(expected).hexdigest()
        sender.shutdown(socket.SHUT_WR)
        assert reader.recv(1) == b""


def push_until_all_is_quiet(
    sender: socket.socket, forwarder: Daemon, *, start: int
) -> tuple[int, float]:
    """How many bytes were taken, and the workers' time in a whole second in which none was.

    A worker that does not get a processor for a second is not one that takes nothing more.
    """
    sent = push_until_blocked(sender, most=64 * MIB, start=start)
    while True:
        before_s = workers_cpu_s(forwarder)
        more = push_until_blocked(sender, most=64 * MIB, start=start + sent)
        sent += more
        if not more:
            return sent, workers_cpu_s(forwarder) - before_s


def test_both_directions_stall_and_both_go_on(wide: OnDatapath) -> None:
    """A client uploads without reading while the server floods, with the buffers of loopback."""
    with joined(wide) as (client, server):
        sent = run_both(lambda sock: push_until_blocked(sock, most=256 * MIB), client, server)
        # Loopback's buffers take 4 MB or 6 MB each; a direct connection stops at about 8 MB.
        # What is passed to a socket of a sockmap behind a backlog is charged to nobody, and so much
        # more is taken, on a busy host, before the worker sees it (`_MOST_PASSED_BYTES`).
        most = 32 * MIB + (64 * MIB if wide.datapath == "sockmap" else 0)
        assert max(sent.values()) < most, sent
        other = {client: server, server: client}
        hashes = run_both(lambda sock: hash_of(sock, sent[other[sock]]), client, server)
        assert hashes == {sock: digest(sent[other[sock]]) for sock in (client, server)}


def run_both(
    what: Callable[[socket.socket], T], client: socket.socket, server: socket.socket
) -> dict[socket.socket, T]:
    """At the same time for the client's end and for the server's."""
    with ThreadPoolExecutor() as threads:
        futures = {sock: threads.submit(what, sock) for sock in (client, server)}
    return {sock: future.result() for sock, future in futures.items()}


@pytest.mark.parametrize("stalled", ["up", "down"])
def test_a_stalled_direction_does_not_stall_the_other(wide: OnDatapath, stalled: str) -> None:
    size = 50_000_000
    with joined(wide) as (client, server):
        busy, lazy = (server, client) if stalled == "up" else (client, server)
        waiting = push_until_blocked(lazy, most=256 * MIB)
        thread = threading.Thread(target=busy.sendall, args=(pattern(size),))
        thread.start()
        assert hash_of(lazy, size) == digest(size)
        thread.join(timeout=scaled_s(15))
        assert hash_of(busy, waiting) == digest(waiting)


@pytest.mark.alone
@pytest.mark.parametrize("narrow_forwarder", ["sockmap", "auto"], indirect=True)
def test_a_flood_of_tiny_segments_takes_no_more_memory_than_large_ones(narrow: OnDatapath) -> None:
    """The limit counts bytes, but a queued segment of one byte costs the kernel some 860."""
    # Other programs on the host have the kernel take memory too, but not each time. Without care
    # for such segments it was 300 MB here each time, 1.1 GB for a megabyte of them.
    found: list[int] = []
    while len(found) < 4:
        found.append(memory_of_tiny_segments(narrow))
        if found[-1] < 32 * MIB:
            return
    raise AssertionError(found)


def flood_until_blocked(client: socket.socket, *, most: int) -> int:
    """How many single bytes went before the reader's socket was full.

    Between two sockets TCP never stops at that by itself: the reader's kernel puts bytes of many
    segments together and drops others, so that for half a minute some more get through. In a second
    of that there are less than a third as many as in the best one.
    """
    tiny = 0
    most_in_a_second = 0
    with contextlib.suppress(TimeoutError):
        while tiny < most:
            before, end_s = tiny, time.monotonic() + 1
            while tiny < most and time.monotonic() < end_s:
                tiny += client.send(b"x")
            most_in_a_second = max(most_in_a_second, tiny - before)
            if tiny - before < most_in_a_second / 3:
                break
    return tiny


def memory_of_tiny_segments(on: OnDatapath) -> int:
    """How much more the kernel has while nobody reads them; then all of them are read."""
    with joined(on) as (client, server):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.settimeout(1)
        before = memory()["SUnreclaim"]
        tiny = flood_until_blocked(client, most=300_000)
        taken = memory()["SUnreclaim"] - before
        assert read_exactly(server, tiny) == b"x" * tiny
    return taken


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_the_memory_of_many_stalled_pairs_is_bounded_and_given_back(narrow: OnDatapath) -> None:
    # Other programs on the host have the kernel take memory too, but not each time; without a limit
    # it would be 64 MiB for each pair, each time, and so would be what is not given back.
    found: list[tuple[int, int]] = []
    while len(found) < 4:
        found.append(memory_of_stalled_pairs(narrow, count=20))
        taken, left = found[-1]
        if taken < 20 * 8 * MIB and left < most_left(taken):
            return
    raise AssertionError(found)


def most_left(taken: int) -> int:
    """What of that may be another's."""
    return max(taken // 2, 100 * MIB)


def memory_of_stalled_pairs(on: OnDatapath, *, count: int) -> tuple[int, int]:
    """How much more the kernel has while they are stalled, and once they have been over a while."""
    forwarder, datapath = on
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(pair_through(forwarder.address)) for _ in range(count)]
        for client, server in pairs:
            warm_up(client, server)
        before = kernel_memory()
        for client, _ in pairs:
            assert push_until_blocked(client, most=64 * MIB, quiet_s=0.1) < most_accepted(datapath)
        taken = kernel_memory() - before
        for client, _ in pairs:
            reset(client)
        forwarder.wait_for_no_pairs()
        # It is given back a while after that; the caller judges what is left.
        with contextlib.suppress(AssertionError):
            wait_for(
                lambda: kernel_memory() - before < most_left(taken),
                "it is given back",
                deadline_s=DEADLINE_S,
            )
        return taken, kernel_memory() - before


def kernel_memory() -> int:
    """What neither is to be had nor is a process's or a file's in memory: buffers of sockets, too.

    So a program that begins beside the test is not taken for ours.
    """
    now = memory()
    return now["MemTotal"] - now["MemAvailable"] - now["AnonPages"] - now["Shmem"]
