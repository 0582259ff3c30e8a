"""Connections that the kernel opens by a client's first packet, without a socket of ours."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connection_maps import (
    LEAST_REST_HERE_S,
    LEAST_REST_S,
    REST_S,
)
from pyforwarder.datapath.express.grace import Grace
from pyforwarder.datapath.express.places import ANSWER_TIMEOUT_S, LASTS_AFTER_S, Seen
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import SpliceState
from pyforwarder.runtime import one_store
from tests.helpers.connections import FIRST_PORT, MSS, PLACES, Kernel
from tests.helpers.express_site import (
    ANY,
    Open,
    Site,
    asked,
    asked_place,
    has_ended,
    leaves,
    looked_after,
    opener,
)
from tests.helpers.faults import Action, faults
from tests.helpers.first_packets import client_hello
from tests.helpers.forged import ACK, FIN, RST, SYN, Forger, Segment, timestamp
from tests.helpers.peers import (
    Waiting,
    ends_with_reset,
    half_close,
    pattern,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.topology import Topology, topology
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.express import Rules

# Whether the client and the server are on the forwarder's host. From `lo` out is a worker's.
WAYS: Final = [(True, True), (False, True), (False, False)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Topology]:
    with topology() as made:
        yield made


@pytest.fixture(scope="module")
def kernel(hosts: Topology) -> Iterator[Kernel]:
    with contextlib.closing(Kernel(hosts.forwarder)) as made:
        yield made


@pytest.fixture
def site(hosts: Topology, kernel: Kernel) -> Iterator[Open]:
    with opener(hosts, kernel) as made:
        yield made
    kernel.free()


every_way = pytest.mark.parametrize(
    ("ways", "version"),
    [
        pytest.param(ways, version, id=f"{'lo' if ways[0] else 'far'}-{name}-{version}")
        for ways, name in zip(WAYS, ("lo", "lo", "far"), strict=True)
        for version in (4, 6)
    ],
)


@every_way
def test_bytes_and_ends_both_ways(
    hosts: Topology, site: Open, ways: tuple[bool, bool], version: int
) -> None:
    here = site(ways, version)
    for first_to_end in (0, 1):
        with here.pair() as (client, server, place):
            for sender, receiver in ((client, server), (server, client)) * 2:
                thread = threading.Thread(target=sender.sendall, args=(pattern(1_000_000),))
                thread.start()
                assert read_exactly(receiver, 1_000_000) == pattern(1_000_000)
                thread.join()
            one, other = (client, server) if first_to_end == 0 else (server, client)
            half_close(one)
            assert read_to_end(other) == b""
            other.sendall(b"still here")
            half_close(other)
            assert read_to_end(one) == b"still here"
            has_ended(here, place)
            record = here.kernel.record(place)
            more = [(5, 10), (15, 0)][first_to_end]
            assert [way.bytes - 2_000_000 for way in record.direction] == list(more)
    counted = here.counted()
    assert (counted.pop("TAKEN"), counted.pop("COMMITTED")) == (2, 2)
    assert counted == {"DEFERRED": 2}
    assert here.nobody_was_accepted()
    assert hosts.checksum_errors() == 0


def test_an_end_of_which_a_worker_is_told_alone_is_in_no_sum(site: Open) -> None:
    """Also if the keeper dies before it has said that it was told: see `go_round`."""
    here = site((True, True), 4)
    connections = here.kernel.connections
    with here.dial(b"one question") as client:
        half_close(client)
        server, place = here.accept(b"one question")
        with server:
            assert read_to_end(server) == b""
            half_close(server)
            assert read_to_end(client) == b""
            has_ended(here, place)
    ask, record = connections.ask(place), here.kernel.record(place)
    key = bytes(
        abi.EndKey(ask.listener_table, ask.rule, ask.target, record.direction[0].from_.dport)
    )
    connections.write_ends(key, abi.Ends())
    connections.mark_counted(place)
    assert connections.go_round(time.monotonic(), is_short=False).counted == 0
    assert connections.ends(key).pairs == 0
    # Of its successor nothing was said.
    one_store.store32(
        connections.memory,
        place * abi.ASK_BYTES + abi.Ask.counted_number.offset,
        ask.counted_number - 1,
    )
    assert connections.go_round(time.monotonic(), is_short=False).counted == 1
    assert connections.ends(key).pairs == 1
    connections.delete_ends(key)


@every_way
def test_a_client_that_ends_at_once(site: Open, ways: tuple[bool, bool], version: int) -> None:
    """Its end is in the packet that is kept, or right behind it."""
    here = site(ways, version)
    for _ in range(20):
        with here.dial(b"one question") as client:
            half_close(client)
            server, place = here.accept(b"one question")
            with server:
                assert read_to_end(server) == b""
                server.sendall(pattern(100_000))
                half_close(server)
                assert read_to_end(client) == pattern(100_000)
                has_ended(here, place)
    assert here.counted()["COMMITTED"] == 20


@every_way
def test_resets_both_ways(site: Open, ways: tuple[bool, bool], version: int) -> None:
    here = site(ways, version)
    for who in (0, 1):
        with here.pair() as (client, server, place):
            reset((client, server)[who])
            assert ends_with_reset((server, client)[who]) == b""
            assert here.kernel.record(place).reset == 1 + who


@every_way
def test_a_server_that_refuses(site: Open, ways: tuple[bool, bool], version: int) -> None:
    """The client has it never noticed: a worker gets its bytes, and decides what happens."""
    here = site(ways, version)
    here.waiting.listener.close()
    for number in range(3):
        first = b"hello %d" % number
        with here.dial(first) as client:
            here.falls_back(client, first)
    counted = here.counted()
    # The others need not even be tried, as it has refused just now.
    assert counted["REFUSED"] >= 1
    assert counted["REFUSED"] + counted.get("NO_TARGET", 0) >= 3
    # The place is another's once no program knows it, and nothing of it is left.
    assert leaves(here) == counted["REFUSED"] + counted.get("ENDED", 0)


@pytest.mark.parametrize("version", [4, 6])
def test_a_server_without_timestamps(site: Open, version: int) -> None:
    """Nobody could translate that: its half of a connection is ended, and a worker has it."""
    here = site((False, False), version)
    here.way.server.set(ipv4__tcp_timestamps=0)
    try:
        with here.dial(b"hello") as client:
            here.falls_back(client, b"hello")
    finally:
        here.way.server.set(ipv4__tcp_timestamps=1)
    assert here.counted()["REFUSED"] == 1
    assert here.waiting.nobody_came()


@pytest.mark.parametrize("version", [4, 6])
def test_a_server_whose_window_is_smaller_than_our_steps(site: Open, version: int) -> None:
    """The client would see none of it, and wait for ever; nor is it asked again a second later."""
    here = site((False, False), version)
    network = here.kernel.network
    before = network.get("ipv4__tcp_rmem")
    network.set(ipv4__tcp_rmem="4096 131072 67108864")  # a scale of 11
    here.way.server.set(ipv4__tcp_window_scaling=0)
    here.waiting.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 1460)
    try:
        with here.dial(b"hello") as client:
            here.falls_back(client, b"hello")
        (number,) = here.numbers
        left_s = here.kernel.connections.target(number).not_before_ns / 1e9 - time.monotonic()
        assert 5 < left_s <= 10
    finally:
        here.way.server.set(ipv4__tcp_window_scaling=1)
        network.set(ipv4__tcp_rmem=before)
    assert here.counted()["REFUSED"] == 1
    assert here.waiting.nobody_came()


@pytest.mark.parametrize("setting", ["tcp_timestamps", "tcp_sack", "tcp_window_scaling"])
@every_way
def test_without_an_option_on_all_hosts(
    hosts: Topology, site: Open, ways: tuple[bool, bool], version: int, setting: str
) -> None:
    here = site(ways, version)
    hosts.set(**{f"ipv4__{setting}": 0})
    try:
        with here.pair() as (client, server, _):
            for sender, receiver in ((client, server), (server, client)):
                thread = threading.Thread(target=sender.sendall, args=(pattern(500_000),))
                thread.start()
                assert read_exactly(receiver, 500_000) == pattern(500_000)
                thread.join()
    finally:
        hosts.set(**{f"ipv4__{setting}": 1})
    assert here.counted()["COMMITTED"] == 1


@every_way
def test_what_is_left_to_workers(site: Open, ways: tuple[bool, bool], version: int) -> None:
    rules: Rules = [
        {"match": {"tls": {"sni": "a.example.com"}}, "to": "127.0.0.1:1"},
        {"match": {"bytes": {"prefix": "EHLO"}}, "to": "127.0.0.1:1"},
    ]
    here = site(ways, version, rules)
    # Decided here,
    for first in (client_hello(b"a.example.com"), b"EHLO there"):
        with here.pair(first):
            pass
    # by another rule, too little to know, too long,
    for first, why in (
        (client_hello(b"b.example.com"), "UNDECIDED"),
        (b"EH", "UNDECIDED"),
        (b"EHLO" + pattern(5000), "LONG"),  # than two packets
    ):
        before = here.counted().get(why, 0)
        with here.dial(first) as client:
            here.falls_back(client, first)
        assert here.counted()[why] > before
    assert here.counted()["COMMITTED"] == 2


# Of two segments, and of what they can just hold together.
LONG_ONES: Final = (1429, 1449, 1800, 2855, 2856)


@every_way
def test_first_bytes_in_two_segments(
    hosts: Topology, site: Open, ways: tuple[bool, bool], version: int
) -> None:
    """As a ClientHello with a post-quantum key share is; a host with offload sends it whole."""
    here = site(ways, version)
    for size in LONG_ONES:
        with here.pair(pattern(size)) as (client, server, place):
            half_close(client)
            assert read_to_end(server) == b""
            server.sendall(pattern(10_000))
            half_close(server)
            assert read_to_end(client) == pattern(10_000)
            has_ended(here, place)
            assert here.kernel.record(place).direction[0].bytes == size
    assert here.counted()["COMMITTED"] == len(LONG_ONES)
    assert hosts.checksum_errors() == 0
    # And whole to a worker, if there is no server.
    here.waiting.listener.close()
    for size in LONG_ONES:
        with here.dial(pattern(size)) as client:
            here.falls_back(client, pattern(size))
    assert here.counted()["REFUSED"] >= 1


# Of a packet's bytes: below half of what can be kept, half of it, and above.
@pytest.mark.parametrize("segment", [2044, 2048, 2052])
@pytest.mark.parametrize("version", [4, 6])
def test_two_segments_of_about_half_of_what_is_kept(site: Open, version: int, segment: int) -> None:
    """Each of the two bears its own bytes, or a worker gets them all."""
    here = site((True, True), version)
    told_mss = segment + 12
    here.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, told_mss)
    target = here.target(here.waiting.address)
    target.mss = 2 * told_mss
    here.kernel.decide(here.listener, ANY, [target], told_mss=told_mss)
    first = random.Random(segment).randbytes(4000)
    if segment < abi.SAVED_BYTES // 2:
        with here.pair(first):
            pass
        assert here.counted()["COMMITTED"] == 1
    else:
        with here.dial(first) as client:
            here.falls_back(client, first)
        assert here.counted()["LONG"] >= 1
        assert "TAKEN" not in here.counted()


@pytest.mark.parametrize("version", [4, 6])
def test_listeners_of_a_device_are_left_to_workers(
    hosts: Topology, site: Open, version: int
) -> None:
    """Another program may have one with this address, of another device."""
    here = site((False, False), version)
    address = here.way.listener[version]
    with hosts.forwarder.entered():
        listener = socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"f0")
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS[version])
        listener.bind((address, 0))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        here.listener = listener
        here.kernel.decide(listener, ANY, [here.target(here.waiting.address)])
        with here.dial(b"hello") as client:
            here.falls_back(client, b"hello")
        assert here.counted()["DEVICE"] >= 1
        assert "TAKEN" not in here.counted()


@pytest.mark.parametrize("version", [4, 6])
def test_two_segments_with_loss(site: Open, version: int) -> None:
    """Also of the SYN: then what comes again is the first of the two alone."""
    here = site((False, False), version)
    with worker(here), faults() as lossy:
        for door in here.way.doors:
            with lossy.put_on(door):
                for number in range(1, 7):
                    lossy.set(exact={number: Action.LOSE})
                    converse(here, pattern(2000), 0, 5_000)
    counted = here.counted()
    assert counted["ASKED_AGAIN"] >= 1, counted
    assert counted["COMMITTED"] >= 5, counted


@pytest.mark.parametrize("version", [4, 6])
def test_what_comes_again_has_grown(site: Open, version: int) -> None:
    """TCP sends again in one packet what it sent in pieces: that is more than was kept."""
    here = site((False, False), version)
    with worker(here) as taken, faults() as lossy, lossy.put_on((here.way.server, "s0")):
        lossy.set(exact={1: Action.LOSE})  # the SYN
        converse(here, pattern(1000), 10, 5_000)
        assert taken
    assert here.counted()["LONG"] >= 1
    assert leaves(here) >= 1


@pytest.mark.parametrize("version", [4, 6])
def test_segments_of_a_sender_without_offload(version: int) -> None:
    """They come one by one, so the first is not known to be the last."""
    with topology() as plain:
        plain.wire("plain")
        with (
            contextlib.closing(Kernel(plain.forwarder)) as kernel,
            opener(plain, kernel) as opened,
        ):
            here = opened((False, False), version)
            with here.dial(pattern(2000)) as client:
                here.falls_back(client, pattern(2000))
            with here.pair(b"hello") as (client, server, _):
                server.sendall(pattern(100_000))
                assert read_exactly(client, 100_000) == pattern(100_000)
            assert here.counted()["COMMITTED"] == 1
            assert plain.checksum_errors() == 0


def test_a_listener_of_all_addresses(hosts: Topology, kernel: Kernel, site: Open) -> None:
    """It has clients of both versions; those of link-local addresses are a worker's."""
    here = site((False, False), 6)
    listener = kernel.listen(("::", 0))
    port = listener.getsockname()[1]
    with listener, hosts.server.entered(), Waiting("10.2.0.2") as waiting4:
        six = here.target(here.waiting.address)
        four = kernel.target(waiting4.address, source="10.2.0.1", interface="f1")
        with hosts.forwarder.entered():
            (near,) = [
                line.split()[3].partition("/")[0]
                for line in hosts.forwarder.run("ip", "-o", "-6", "addr").splitlines()
                if " f0 " in line and "fe80" in line
            ]
        for waiting, target, address in (
            (here.waiting, six, "fd01::1"),
            (waiting4, four, "10.1.0.1"),
        ):
            kernel.decide(listener, ANY, [target])
            with hosts.client.entered():
                client = socket.create_connection((address, port), timeout=DEADLINE_S)
            with client:
                client.sendall(b"hello")
                with waiting.accept() as server:
                    assert server.getpeername()[1] >= FIRST_PORT
                    assert read_exactly(server, 5) == b"hello"
                    server.sendall(b"back")
                    assert read_exactly(client, 4) == b"back"
        kernel.decide(listener, ANY, [six])
        with hosts.client.entered():
            client = socket.create_connection((f"{near}%c0", port), timeout=DEADLINE_S)
        with client:
            client.sendall(b"hello")
            worker_end, _ = listener.accept()
            with worker_end:
                assert read_exactly(worker_end, 5) == b"hello"
    assert here.counted()["COMMITTED"] == 2


@pytest.mark.parametrize("version", [4, 6])
def test_checksums_that_an_interface_has_looked_at(version: int) -> None:
    """As real ones do (CHECKSUM_UNNECESSARY); what they put together is one packet."""
    with topology() as merged:
        merged.wire("merged")
        with (
            contextlib.closing(Kernel(merged.forwarder)) as kernel,
            opener(merged, kernel) as opened,
        ):
            here = opened((False, False), version)
            for size in (1, 2, 5, 1000, 1400):
                with here.pair(pattern(size)) as (client, server, place):
                    converse_both_ways(client, server)
                    half_close(client)
                    assert read_to_end(server) == b""
                    half_close(server)
                    assert read_to_end(client) == b""
                    has_ended(here, place)
            here.waiting.listener.close()
            with here.dial(b"hello") as client:
                here.falls_back(client, b"hello")
            assert (here.counted()["COMMITTED"], here.counted()["REFUSED"]) == (5, 1)
        assert merged.checksum_errors() == 0
        assert merged.segments_sent_again() == 0


def converse_both_ways(client: socket.socket, server: socket.socket) -> None:
    """A megabyte each way."""
    for sender, receiver in ((client, server), (server, client)):
        thread = threading.Thread(target=sender.sendall, args=(pattern(1_000_000),))
        thread.start()
        assert read_exactly(receiver, 1_000_000) == pattern(1_000_000)
        thread.join()


def test_a_client_that_says_nothing_reaches_a_worker(site: Open) -> None:
    here = site((False, False), 4)
    with here.dial() as client:
        worker, _ = here.listener.accept()
        with worker:
            worker.sendall(b"first")
            assert read_exactly(client, 5) == b"first"
    assert here.counted()["DEFERRED"] >= 1
    assert "TAKEN" not in here.counted()


def test_a_client_that_ends_without_a_word(site: Open) -> None:
    here = site((False, False), 4)
    with here.dial() as client:
        half_close(client)
        worker, _ = here.listener.accept()
        with worker:
            worker.settimeout(DEADLINE_S)
            assert read_to_end(worker) == b""
    assert "TAKEN" not in here.counted()


def test_a_client_that_resets_while_a_server_is_asked(site: Open) -> None:
    here = site((False, False), 4)
    with faults() as lossy, lossy.put_on((here.way.server, "s0")):
        lossy.set(lose=1.0)
        client = here.dial(b"hello")
        wait_for(lambda: here.counted().get("TAKEN"), "asked")
        reset(client)
        wait_for(lambda: here.counted().get("ENDED"), "given up")
    assert leaves(here) == 1
    assert here.nobody_was_accepted()
    assert here.waiting.nobody_came()


@contextlib.contextmanager
def worker(here: Site) -> Iterator[list[int]]:
    """Forwards what the kernel has left to it, byte by byte; how many connections that were."""
    taken: list[int] = []
    # Whether it is still wanted: an accept() that waits cannot be taken back otherwise.
    threads: list[threading.Thread] = []

    def forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            while True:
                client, _ = here.listener.accept()
                stack.enter_context(client)
                taken.append(1)
                with here.kernel.network.entered():
                    server = socket.create_connection(here.waiting.address, timeout=DEADLINE_S)
                stack.enter_context(server)
                for ends in ((client, server), (server, client)):
                    threads.append(threading.Thread(target=forward, args=ends))
                    threads[-1].start()

    accepting = threading.Thread(target=serve)
    accepting.start()
    try:
        yield taken
    finally:
        here.listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for thread in threads:
            thread.join()


def converse(here: Site, first: bytes, more: int, answer: int) -> None:
    """A whole conversation, half-closed by the client; every byte is compared."""
    with here.dial(first) as client:

        def serve() -> bytes:
            server = here.waiting.accept()
            with server:
                asked = read_to_end(server)
                server.sendall(pattern(answer))
                return asked

        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(serve)
            client.sendall(pattern(more))
            half_close(client)
            assert read_to_end(client) == pattern(answer)
            assert served.result() == first + pattern(more)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("door", [0, 1, 2, 3])
def test_any_one_packet_is_lost_or_doubled(site: Open, door: int, version: int) -> None:
    """The first ones of every kind: handshakes, the bytes that are kept, acknowledgements, FINs."""
    here = site((False, False), version)
    with worker(here), faults() as lossy, lossy.put_on(here.way.doors[door]):
        for action in (Action.LOSE, Action.DUPLICATE):
            for number in range(1, 8):
                lossy.set(exact={number: action})
                converse(here, b"hello", 20_000, 30_000)
    counted = here.counted()
    assert counted["COMMITTED"] >= 5, counted


def test_without_a_place_it_is_a_workers(hosts: Topology) -> None:
    """Running out of ports costs nobody anything; and a place that is free again serves."""
    with (
        contextlib.closing(Kernel(hosts.forwarder, places=2)) as kernel,
        opener(hosts, kernel) as opened,
    ):
        here = opened((False, False), 4)
        with here.pair(), here.pair():
            with here.dial(b"hello") as client:
                here.falls_back(client, b"hello")
            assert here.counted()["NO_PORT"] == 1
        # The server's port remembers the last connection, from the same port of ours.
        for round_ in range(5):
            kernel.free_all()
            first = b"round %d" % round_
            with here.pair(first) as (client, server, place):
                half_close(server)
                assert read_to_end(client) == b""
                half_close(client)
                assert read_to_end(server) == b""
                has_ended(here, place)
        assert here.counted()["COMMITTED"] == 7


def test_a_flood_of_half_open_connections_leaves_all_to_workers(site: Open) -> None:
    """With cookies nothing is known of a handshake, and nothing is decided here."""
    here = site((False, False), 4)
    here.kernel.network.set(ipv4__tcp_syncookies=2)  # always
    try:
        with here.dial(b"hello") as client:
            here.falls_back(client, b"hello")
    finally:
        here.kernel.network.set(ipv4__tcp_syncookies=1)
    assert "TAKEN" not in here.counted()
    assert here.counted().get("NO_REQUEST", 0) >= 1, here.counted()


@pytest.mark.parametrize("version", [4, 6])
def test_a_server_with_cookies_that_has_lost_the_first_bytes(site: Open, version: int) -> None:
    """It knows of no connection before they come: of what is behind them it says so, by a reset."""
    here = site((False, False), version)
    here.way.server.set(ipv4__tcp_syncookies=2)  # always
    try:
        with faults() as lossy, lossy.put_on((here.way.server, "s0")):
            lossy.set(least_bytes=1, exact={1: Action.LOSE})
            with here.dial(b"hello") as client:
                wait_for(lambda: here.counted().get("COMMITTED"), "joined")
                client.sendall(b" and more")
                server, place = here.accept(b"hello and more")
                with server:
                    server.sendall(b"back")
                    assert read_exactly(client, 4) == b"back"
                    assert not here.kernel.record(place).reset
            assert lossy.counts()["lost"] == 1
    finally:
        here.way.server.set(ipv4__tcp_syncookies=1)
    assert here.way.server.counters()["TcpExtSyncookiesRecv"] >= 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_server_that_has_forgotten_a_connection(site: Open, version: int) -> None:
    """As it does not acknowledge what comes again, it is believed after a while."""
    here = site((False, False), version)
    with (
        contextlib.closing(Forger(here.way.server, "s0", here.kernel.network, "f1")) as forger,
        faults() as lossy,
        lossy.put_on((here.way.server, "s0")),
    ):
        lossy.set(least_bytes=1, lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("COMMITTED"), "joined")
            words = here.kernel.connections.words()
            (place,) = [n for n, word in enumerate(words) if word & abi.STATE_MASK]
            says = Segment(
                version=version,
                source=here.waiting.address,
                target=(here.source, FIRST_PORT + place),
                seq=here.kernel.record(place).isn[1] + 1,
                ack=0,
                flags=RST,
            )

            def is_reset() -> bool:
                forger.send(says)
                return bool(here.kernel.record(place).reset)

            assert not is_reset()
            wait_for(is_reset, "it is believed")
            assert ends_with_reset(client) == b""


@pytest.mark.parametrize("version", [4, 6])
def test_what_others_make_up_changes_nothing(site: Open, version: int) -> None:
    """Packets in the names of both ends, while a server is asked: none has the right numbers."""
    here = site((False, False), version)
    network = here.kernel.network
    with (
        contextlib.closing(Forger(here.way.server, "s0", network, "f1")) as by_server,
        contextlib.closing(Forger(here.way.client, "c0", network, "f0")) as by_client,
        faults() as lossy,
        lossy.put_on((here.way.server, "s0")),
    ):
        lossy.set(lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            place = asked_place(here)
            ask = asked(here)
            at_server = Segment(
                version=version,
                source=here.waiting.address,
                target=(here.source, FIRST_PORT + place),
                seq=1,
                ack=ask.own_isn + 1,
            )
            at_client = Segment(
                version=version,
                source=client.getsockname()[:2],
                target=client.getpeername()[:2],
                seq=ask.client_isn + 1,
                ack=ask.kernel_isn + 1,
                data=b"other",
            )
            for off in (-1, 1, 2, 1 << 20):
                for flags in (SYN | ACK, RST | ACK, RST, ACK, SYN, FIN | ACK, 0):
                    changed = replace(at_server, ack=ask.own_isn + 1 + off, flags=flags)
                    by_server.send(changed)
                    far = ask.client_isn + 1 + (1 << 30) + off
                    by_client.send(replace(at_client, seq=far, flags=flags))
            # With the right numbers, but spoiled; and by the wrong interface.
            for flags in (SYN | ACK, RST | ACK):
                by_server.send(replace(at_server, flags=flags, spoil_checksum=1))
                by_client.send(replace(at_server, flags=flags))
            by_server.send(replace(at_client, flags=RST | ACK, data=b""))
            by_client.send(replace(at_client, spoil_checksum=1))
            # They have all been seen once this one has: it has the right numbers.
            again = here.counted().get("ASKED_AGAIN", 0)
            by_client.send(
                replace(
                    at_client, data=b"hello", options=timestamp(ask.client_tsval, ask.client_tsecr)
                )
            )
            wait_for(lambda: here.counted().get("ASKED_AGAIN", 0) > again, "seen")
            assert here.kernel.connections.words()[place] == ask.word
            assert here.kernel.record(place).state == SpliceState.ASKED
            lossy.set(lose=0.0)
            server, _ = here.accept(b"hello")
            with server:
                server.sendall(b"and back")
                assert read_exactly(client, 8) == b"and back"


@pytest.mark.parametrize("why", [b"no", b"nobody listens here" * 50], ids=["short", "long"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_server_that_says_why_it_refuses(site: Open, version: int, why: bytes) -> None:
    """A reset may have bytes (RFC 9293, 3.5.3): a worker gets the client at once all the same."""
    here = site((False, False), version)
    errors = here.kernel.network.counters()["TcpInCsumErrors"]
    with (
        contextlib.closing(Forger(here.way.server, "s0", here.kernel.network, "f1")) as forger,
        faults() as lossy,
        lossy.put_on((here.way.server, "s0")),
    ):
        lossy.set(lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            says = Segment(
                version=version,
                source=here.waiting.address,
                target=(here.source, FIRST_PORT + asked_place(here)),
                seq=0,
                ack=asked(here).own_isn + 1,
                flags=RST | ACK,
                data=why,
            )
            forger.send(says)
            here.falls_back(client, b"hello")
    assert here.counted()["REFUSED"] == 1
    assert here.kernel.network.counters()["TcpInCsumErrors"] == errors


def test_a_server_that_does_not_answer(site: Open) -> None:
    """It is given up after a while; the client's next attempt to send its bytes is a worker's."""
    here = site((False, False), 4)
    places = looked_after(here)
    with faults() as lossy, lossy.put_on((here.way.server, "s0")):
        lossy.set(lose=1.0)
        with here.dial(b"hello") as client:
            wait_for(lambda: here.counted().get("TAKEN"), "asked")
            begun_s = asked(here).begun_ns / 1e9
            places.look(begun_s + ANSWER_TIMEOUT_S - 0.1)
            assert "UNANSWERED" not in here.counted()
            places.look(time.monotonic() + ANSWER_TIMEOUT_S + 1)
            assert here.counted()["UNANSWERED"] == 1
            assert leaves(here) == 1
            here.falls_back(client, b"hello")
        # And nobody else waits for it meanwhile.
        with here.dial(b"hello") as client:
            here.falls_back(client, b"hello")
    assert here.counted()["TAKEN"] == 1


def test_ended_and_lasting_connections_are_told_of_once(site: Open) -> None:
    here = site((False, False), 4)
    places = looked_after(here)
    with here.pair() as (lasting, _, lasting_place), here.pair() as (client, server, place):
        now_s = here.kernel.connections.ask(lasting_place).begun_ns / 1e9
        seen = places.look(now_s)
        assert seen == Seen([], [], [])
        server.sendall(b"bye")
        half_close(server)
        assert read_to_end(client) == b"bye"
        half_close(client)
        assert read_to_end(server) == b""
        has_ended(here, place)
        seen = places.look(now_s)
        assert [one.place for one in seen.ended] == [place]
        word = seen.ended[0].ask.word
        assert [way.bytes for way in seen.ended[0].record.direction] == [5, 3]
        assert seen.ended[0].ask.begun_ns == here.kernel.connections.ask(place).begun_ns
        seen = places.look(now_s + LASTS_AFTER_S + 1)
        assert seen == Seen([], [lasting_place], [])
        assert places.look(now_s + LASTS_AFTER_S + 2) == Seen([], [], [])
        # It is its own until that is told, and some time longer: its packets may come late.
        places.look(now_s + REST_S + 1)
        told_s = now_s + REST_S + 1
        places.told(place, word, told_s)
        places.look(told_s + REST_S - 1)
        for by_s, state in ((1, abi.AskState.RESTING), (2, abi.AskState.LEAVING)):
            assert here.kernel.connections.words()[place] == word & ~abi.STATE_MASK | state
            places.look(told_s + REST_S + by_s)
        assert here.kernel.connections.words()[place] == word & ~abi.STATE_MASK
        # The other goes on.
        lasting.sendall(b"still")
        assert here.kernel.record(lasting_place).state == SpliceState.ACTIVE


def end_key(here: Site, place: int) -> bytes:
    """By which the end of a place's connection is counted."""
    ask, up = here.kernel.connections.ask(place), here.kernel.record(place).direction[0]
    return bytes(abi.EndKey(ask.listener_table, ask.rule, ask.target, up.from_.dport))


@every_way
def test_ends_are_counted_by_the_programs_and_places_come_back(
    site: Open, ways: tuple[bool, bool], version: int
) -> None:
    """Once each, if it began late enough; and no sooner than they have rested."""
    here = site(ways, version)
    connections = here.kernel.connections
    places = looked_after(here)
    with here.pair() as (_, _, first), here.pair() as (client, server, place):
        key = end_key(here, place)
        connections.write_ends(key, abi.Ends(since_ns=connections.ask(place).begun_ns, round=3))
        server.sendall(b"bye")
        half_close(server)
        assert read_to_end(client) == b"bye"
        now_s = time.monotonic()
        assert places.look(now_s) == Seen([], [], [])
        half_close(client)
        assert read_to_end(server) == b""
        has_ended(here, place)
        for _ in range(3):
            now_s = time.monotonic()
            assert places.look(now_s) == Seen([], [], [])
        ends = connections.ends(key)
        assert (ends.round, ends.pairs, list(ends.bytes)) == (3, 1, [5, 3])
        assert connections.word(place) & abi.STATE_MASK == abi.AskState.RESTING
        assert here.kernel.record(place).id == 0
        assert connections.word(first) & abi.STATE_MASK == abi.AskState.JOINED
    # The other one began before, so that it is told of.
    has_ended(here, first)
    assert [one.place for one in places.look(now_s).ended] == [first]
    assert connections.ends(key).pairs == 1
    # As long as another program may have its port it is nobody's.
    connections.set_port_lost(place, is_lost=True)
    places.look(now_s + REST_S + 1)
    assert connections.word(place) & abi.STATE_MASK == abi.AskState.RESTING
    connections.set_port_lost(place, is_lost=False)
    least_s = LEAST_REST_HERE_S if all(ways) else LEAST_REST_S
    rests_s = connections.ask(place).resting_since_ns / 1e9
    gone = connections.go_round(rests_s + least_s - 0.01, is_short=True)
    assert (gone.freed, gone.unused) == (0, PLACES - 2)
    gone = connections.go_round(rests_s + least_s + 0.01, is_short=False)
    assert gone.freed == 0
    flows = here.kernel.flows_of(place)
    assert flows == 2
    # In a first round no packet finds it any more; the place comes back when no program runs that
    # has found it before.
    leaves_s = rests_s + least_s + 0.01
    leaves_ns = int(leaves_s * 1e9)
    for by_s, passed_ns in ((0.0, leaves_ns - 1), (1.0, 0), (60.0, leaves_ns - 1)):
        gone = connections.go_round(leaves_s + by_s, is_short=True, passed_ns=passed_ns)
        assert (gone.freed, gone.unused, gone.leaving) == (0, PLACES - 2, 1)
        assert (here.kernel.flows_of(place), here.kernel.record(place).state) == (0, 0)
        assert connections.word(place) & abi.STATE_MASK == abi.AskState.LEAVING
    connections.set_port_lost(place, is_lost=True)
    assert connections.go_round(leaves_s + 61, is_short=True, passed_ns=leaves_ns).freed == 0
    connections.set_port_lost(place, is_lost=False)
    gone = connections.go_round(leaves_s + 62, is_short=True, passed_ns=leaves_ns)
    assert gone == (0, 1, PLACES - 1, True, 0)
    assert connections.word(place) & abi.STATE_MASK == abi.AskState.FREE
    connections.delete_ends(key)


@pytest.mark.parametrize(("ahead_ms", "sent_bytes"), [(1 << 30, 0), (0, 1 << 30)])
def test_a_place_whose_numbers_ran_ahead_rests_for_a_minute(
    site: Open, ahead_ms: int, sent_bytes: int
) -> None:
    here = site((False, False), 4)
    connections = here.kernel.connections
    with here.pair() as (_, _, place):
        pass
    has_ended(here, place)
    now_s = time.monotonic()
    connections.rest(place, connections.word(place), now_s)
    here.kernel.run_ahead(place, ahead_ms=ahead_ms, sent_bytes=sent_bytes)
    assert connections.go_round(now_s + REST_S - 1, is_short=True).freed == 0
    freed = [
        connections.go_round(
            now_s + REST_S + by_s, is_short=False, passed_ns=int((now_s + REST_S + 1) * 1e9)
        ).freed
        for by_s in (1, 2)
    ]
    assert freed == [0, 1]


def test_programs_are_waited_for_while_connections_go_on(site: Open) -> None:
    """By a thread: the keeper does not wait."""
    here = site((True, True), 4)
    connections = here.kernel.connections
    grace = Grace(connections.wait_for_programs)
    with here.pair():
        grace.want(5)
        wait_for(lambda: grace.passed_ns == 5, "the first wait is over")
        grace.want(9)
        wait_for(lambda: grace.passed_ns == 9, "the second wait is over")


def test_a_place_rests_since_the_end_however_late_that_is_counted(site: Open) -> None:
    here = site((True, True), 4)
    connections = here.kernel.connections
    with here.pair() as (_, _, place):
        key = end_key(here, place)
        connections.write_ends(key, abi.Ends(since_ns=0))
    has_ended(here, place)
    connections.wait_for_programs()  # it says a moment later when that was
    record = here.kernel.record(place)
    ended_ns = int(record.clocks.end_noticed_ns)
    late_s = ended_ns / 1e9 + 0.9 * LEAST_REST_HERE_S
    assert connections.go_round(late_s, is_short=True).counted == 1
    assert connections.ask(place).resting_since_ns == ended_ns
    late_s = ended_ns / 1e9 + 1.1 * LEAST_REST_HERE_S
    assert connections.go_round(late_s, is_short=True).leaving == 1
    connections.delete_ends(key)


def test_a_reset_is_handed_over_at_once(site: Open) -> None:
    here = site((False, False), 4)
    places = looked_after(here)
    with here.pair() as (client, server, place):
        reset(client)
        assert ends_with_reset(server) == b""
        assert places.look(time.monotonic()) == Seen([], [place], [])


@every_way
def test_one_that_lasts_gets_sockets_as_an_adopted_pair(
    site: Open, ways: tuple[bool, bool], version: int
) -> None:
    """They are silent while it goes on, answer an end that started anew, can reset both ends."""
    here = site(ways, version)
    with here.pair() as (client, server, place), contextlib.ExitStack() as stack:
        record = here.kernel.record(place)
        with here.kernel.network.entered():
            ours = [
                stack.enter_context(splice_sockets.revive(way, record.family))
                for way in record.direction
            ]
        for sender, receiver in ((client, server), (server, client)) * 2:
            thread = threading.Thread(target=sender.sendall, args=(pattern(300_000),))
            thread.start()
            assert read_exactly(receiver, 300_000) == pattern(300_000)
            thread.join()
        here.kernel.store_state(place, SpliceState.RESET)
        for one in ours:
            splice_sockets.unmute(one)
            one.close()
        for end in (client, server):
            assert ends_with_reset(end) == b""


def test_a_free_place_is_nobody_elses(site: Open) -> None:
    """What frees a place must know its owner: its next connection is not ended by that."""
    here = site((False, False), 4)
    with here.pair() as (_, _, place):
        connections = here.kernel.connections
        word = connections.words()[place]
        for wrong in (word - 1, word + 1, word + 8, word - 8, word & ~7, 0, (1 << 64) - 1):
            assert not connections.end_connection(place, wrong)
        assert not connections.end_connection(PLACES, word)
        assert connections.words()[place] == word
        assert connections.end_connection(place, word)
        assert not connections.end_connection(place, word)
        assert leaves(here) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_many_over_few_places_with_loss(hosts: Topology, version: int) -> None:
    """With packets lost and doubled, and places used again and again, not one byte differs."""
    with (
        contextlib.closing(Kernel(hosts.forwarder, places=8)) as kernel,
        opener(hosts, kernel) as opened,
    ):
        here = opened((False, False), version)
        places = looked_after(here)
        with worker(here) as taken, faults() as lossy, lossy.put_on(*here.way.doors):
            lossy.set(seed=version, lose=0.01, duplicate=0.02, delay=0.01)
            ahead_s = 0.0
            for number in range(150):
                converse(here, b"%d " % number + pattern(number), 3_000 + number, 5_000)
                # Time goes faster here than it does, but not for programs that run.
                ahead_s += LEAST_REST_S
                now_s = time.monotonic() + ahead_s
                for ended in places.look(now_s).ended:
                    places.told(ended.place, ended.ask.word, now_s)
        counted = here.counted()
        # Of each: what the kernel has opened, or a worker; not both, and none twice.
        assert counted["COMMITTED"] + len(taken) >= 150, (counted, len(taken))
        assert counted["COMMITTED"] > 50, counted
