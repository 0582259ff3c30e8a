"""A worker whose splice keeper is stopped serves everybody as before, with any request under way.

A dialogue of a pair that is copied goes on meanwhile, and how long it ever waited is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil
import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, VERSION, Splice
from pyforwarder.datapath.splice.records import used_indexes
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.instruction import ACK, instruction
from tests.helpers.keepers import keeper_of, stopped
from tests.helpers.peers import address_text, ends_with_reset, read_to_end, reset
from tests.helpers.sessions import SessionSite, Talk, datagram_socket
from tests.helpers.spliced import Site, config, exchange
from tests.helpers.survival import comes_to_be_spliced
from tests.helpers.topology import topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

# A worker that waits for the keeper once waits for 0.25 s at least, and for 2 s if it has read the
# request. Without that it is what others on this host take of its processors: some milliseconds.
MOST_PAUSE_S: Final = 0.2
# On a host with much to do another turn may show it.
TURNS: Final = 4
# More than a worker has under way at the same time.
MANY: Final = 100
UDP_PORT: Final = 7014
# Some turns, each with a hundred pairs.
pytestmark = pytest.mark.timeout(scaled_s(300))


class Sessions(SessionSite):
    """UDP sessions of the listener beside those of TCP."""

    def via(self, way: object, version: int) -> tuple[str, int]:
        """Where a client on that way finds the forwarder."""
        del version
        return way.listener[4], UDP_PORT  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Place:
    """One daemon with one worker: TCP, whose pairs of IPv6 are copied, and UDP."""

    site: Site
    sessions: Sessions
    worker: psutil.Process


@pytest.fixture
def place(start_forwarder: StartForwarder) -> Iterator[Place]:
    head, name, tail = config("workers: 1").partition("  - name: main6")
    tail = tail.replace("allow: [any]", "allow: [any], datapath: copy", 1)
    udp = f"""  - name: udp
    bind: "0.0.0.0:{UDP_PORT}"
    protocol: udp
    rules: [{{match: instruction, allow: [any]}}]
"""
    with topology() as hosts:
        with hosts.forwarder.entered():
            daemon = start_forwarder(head + udp + name + tail)
        site = Site(hosts, daemon)
        site.via(hosts.way(), 4)  # its ports are known before the supervisor is stopped
        (worker,) = daemon.workers()
        yield Place(site, Sessions(hosts, daemon), worker)
        assert daemon.workers() == [worker]
        assert site.stats()["closed"].get("internal", 0) == 0


class Dialogue:
    """A byte there and back, again and again, on a pair that is copied."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = client, server
        self._stop = threading.Event()
        self.longest_s = 0.0
        self.turns = 0
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        client, server = self._ends
        try:
            while not self._stop.wait(0.001):
                began_s = time.monotonic()
                for sender, receiver in ((client, server), (server, client)):
                    sender.sendall(b"x")
                    assert receiver.recv(2) == b"x"
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                self.turns += 1
        except BaseException as error:
            self.fault = error

    def __enter__(self) -> Dialogue:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self.fault is None, self.fault
        assert self.turns > 0


def places_in_use(place: Place) -> tuple[int, int]:
    """How many pairs and sessions the kernel has that have not ended."""
    daemon = place.site.forwarder
    pins = daemon.place.bpffs / daemon.instance / "splice"
    with contextlib.ExitStack() as stack:
        memories = []
        for name, size in (
            (f"splices_{VERSION}", SPLICE_BYTES),
            (session_maps.PINS[1], SESSION_BYTES),
        ):
            fd = bpf.open_pin(pins / name)
            stack.callback(os.close, fd)
            memory = bpf.map_memory(fd, bpf.map_sizes(fd).entries * size, write=False)
            memories.append(stack.enter_context(contextlib.closing(memory)))
        pairs, sessions = memories
        # One that has ended in order keeps its ports for a minute, and has no number any more.
        records = (Splice.from_buffer_copy(pairs, n * SPLICE_BYTES) for n in used_indexes(pairs))
        return (
            sum(1 for record in records if record.id),
            len(list(session_maps.used_indexes(sessions))),
        )


def new_session(place: Place, stack: contextlib.ExitStack) -> Talk:
    """One that is asked for with its second datagram; without a look at what `show` says."""
    way = place.site.topology.way()
    server = stack.enter_context(datagram_socket(way.server, way.destination[4]))
    client = stack.enter_context(datagram_socket(way.client, "0.0.0.0"))
    client.connect(place.sessions.via(way, 4))
    client.send(instruction(address_text(server.getsockname()[:2])) + b"first")
    assert client.recv(1 << 16) == ACK
    data, source = server.recvfrom(1 << 16)
    assert data == b"first"
    server.connect(source[:2])
    talk = Talk(client, server, 0)
    for _ in range(5):
        talk.server.send(b"down")
        assert talk.client.recv(100) == b"down"
        talk.client.send(b"up")
        assert talk.server.recv(100) == b"up"
    return talk


def play(place: Place) -> float:
    """Everything that a worker asks for, with a keeper that is stopped; the longest pause."""
    site, way = place.site, place.site.topology.way()
    supervisor = psutil.Process(site.forwarder.process.pid)
    site.wait_for_no_pairs()
    descriptors = place.worker.num_fds()
    with contextlib.ExitStack() as stack:
        steady = stack.enter_context(site.pair(way, 6))
        finishing = [stack.enter_context(site.spliced(way, 4)) for _ in range(3)]
        is_reset = stack.enter_context(site.spliced(way, 4))
        flushed = [stack.enter_context(site.spliced(way, 4)) for _ in range(3)]
        stays = stack.enter_context(site.spliced(way, 4))
        over, goes_on = (stack.enter_context(place.sessions.spliced(way, 4)) for _ in range(2))
        with Dialogue(*steady) as dialogue:
            with stopped(keeper_of(site.forwarder)):
                numbers = [number for *_, number in flushed]
                assert sorted(site.forwarder.control().flush([*numbers, over.id])["flushed"]) == (
                    sorted([*numbers, over.id])
                )
                with stopped(supervisor):  # so that the keeper is not replaced
                    for client, server, _ in finishing:
                        client.sendall(b"last words")
                        client.shutdown(socket.SHUT_WR)
                        assert read_to_end(server) == b"last words"
                        server.shutdown(socket.SHUT_WR)
                        assert read_to_end(client) == b""
                    reset(is_reset[0])
                    assert ends_with_reset(is_reset[1]) == b""
                    # Each of the first two is asked for; a second later they are copied.
                    new = [stack.enter_context(site.pair(way, 4)) for _ in range(2)]
                    talks = [new_session(place, stack) for _ in range(2)]
                    for client, server in (*new, stays[:2]):
                        exchange(client, server, 100_003)
                    for talk in (*talks, goes_on):
                        talk.exchange()
            # It goes on, and does what it was asked.
            for client, server, _ in flushed:
                for end in (client, server):
                    assert ends_with_reset(end) == b""
            for client, server in (*new, stays[:2]):
                site.wait_until_spliced(client)
                exchange(client, server, 100_003)
            for talk in talks:
                place.sessions.wait_until_spliced(talk)
            goes_on.exchange()
            places_are(place, (3, 3))
    site.forwarder.control().flush([row["id"] for row in site.pairs()])
    site.wait_for_no_pairs()
    assert site.pairs() == []
    places_are(place, (0, 0))
    wait_for(
        lambda: place.worker.num_fds() <= descriptors, "it has no more descriptors than before"
    )
    return dialogue.longest_s


def places_are(place: Place, expected: tuple[int, int]) -> None:
    try:
        wait_for(lambda: places_in_use(place) == expected, "places are given back")
    except AssertionError as error:
        raise AssertionError(f"{error}: {places_in_use(place)}, not {expected}") from None


def test_a_keeper_that_is_stopped_stops_nobody_and_does_all_when_it_goes_on(place: Place) -> None:
    pauses = []
    for _ in range(TURNS):
        pauses.append(play(place))
        if pauses[-1] < MOST_PAUSE_S:
            print(f"longest pauses: {pauses}")
            return
    raise AssertionError(f"somebody waited, each time: {pauses}")


def is_reset(end: socket.socket) -> None:
    """It is, or will be when it speaks: a silent one does not hear of an end without sockets."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        end.send(b"x")
        while True:
            assert end.recv(100) != b""


def end_many(place: Place, *, kills: bool) -> float:
    """More pairs end than can be told of at once, while the keeper is stopped."""
    site, way = place.site, place.site.topology.way()
    site.wait_for_no_pairs()
    descriptors = place.worker.num_fds()
    with contextlib.ExitStack() as stack:
        steady = stack.enter_context(site.pair(way, 6))
        pairs = [stack.enter_context(site.spliced(way, 4)) for _ in range(MANY)]
        with Dialogue(*steady) as dialogue:
            keeper = keeper_of(site.forwarder)
            with stopped(keeper):
                found = site.forwarder.control().flush([number for *_, number in pairs])
                assert len(found["flushed"]) == MANY
                if kills:
                    keeper.kill()
                    site.forwarder.wait_for_line("splice_keeper_died")
            for client, server, _ in pairs:
                for end in (client, server):
                    is_reset(end)
            longest_s = dialogue.longest_s
    site.wait_for_no_pairs()
    places_are(place, (0, 0))
    wait_for(
        lambda: place.worker.num_fds() <= descriptors, "it has no more descriptors than before"
    )
    wait_for(lambda: comes_to_be_spliced(site), "another pair is spliced")
    return longest_s


@pytest.mark.parametrize("kills", [False, True], ids=["stopped", "killed"])
def test_more_ends_than_can_be_told_of_at_once_are_all_told(place: Place, *, kills: bool) -> None:
    pauses = []
    for _ in range(TURNS):
        pauses.append(end_many(place, kills=kills))
        if pauses[-1] < MOST_PAUSE_S:
            print(f"longest pauses: {pauses}")
            return
    raise AssertionError(f"somebody waited, each time: {pauses}")
