"""Silent, slow, rude and dead peers: each gets a reason and a deadline and hurts nobody else."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import (
    EchoServer,
    NameServer,
    ResetServer,
    SilentServer,
    Waiting,
    address_text,
    dial,
    dial_through,
    ends_with_reset,
    half_close,
    pair_through,
    pattern,
    push_until_blocked,
    read_exactly,
    read_to_end,
    reset,
    unused_port,
)
from tests.helpers.waiting import stays, wait_for
from tests.kernel.conftest import forwarders_at, temporary_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


def config(*, more: str = "", first_packet: str = "300ms", datapath: str = "copy") -> str:
    """Copied where none is named: refusals, timers and limits are the same on every datapath."""
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    first_packet: {{timeout: {first_packet}}}
    rules: [{{match: instruction, allow: [loopback]}}]
datapath: {datapath}
{more}
"""


def closed(forwarder: Daemon) -> Counter[str]:
    """How many connections ended, by reason."""
    return Counter(
        {name: count for name, count in forwarder.show("stats")["closed"].items() if count}
    )


@pytest.fixture(scope="module", params=["copy", "sockmap", "splice", "express"])
def on_datapath(network: None, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One whose pairs are on this datapath, for all tests that leave it as it was."""
    del network
    with temporary_place() as place, forwarders_at(place) as start:
        yield start(config(datapath=request.param))


def still_works(forwarder: Daemon) -> None:
    with NameServer("well") as server, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(server.address)))
        assert read_to_end(client) == ACK + b"well"


# ---------------------------------------------------------------------------- clients


def test_a_silent_client_is_closed_after_the_first_packet_timeout(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config())
    began_s = time.monotonic()
    with dial(forwarder.address) as client:
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert time.monotonic() - began_s >= 0.3
    forwarder.wait_for_no_pairs()
    assert sum(closed(forwarder).values()) == 1


def test_hundreds_of_silent_clients_do_not_delay_the_others(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(first_packet="1h"))
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(dial(forwarder.address))
        wait_for(lambda: len(forwarder.look()) == 500, "500 silent clients are seen")
        assert {row["state"] for row in forwarder.pairs()} == {"sniffing"}
        still_works(forwarder)
        # Its client has seen the end of it a moment before it is shown no more.
        wait_for(lambda: len(forwarder.look()) == 500, "only they are left")
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"client_gone": 500, "finished": 1}


def test_a_drip_of_bytes_does_not_extend_the_deadline(start_forwarder: StartForwarder) -> None:
    """Slowloris: one byte at a time, each well within the timeout, all of them not."""
    forwarder = start_forwarder(config(first_packet="400ms"))
    text = instruction("[0000:0000:0000:0000:0000:0000:0000:0001]:65000")
    with dial(forwarder.address) as client:
        client.settimeout(0.1)
        answer = None
        for byte in text[:-1]:
            try:
                client.sendall(bytes([byte]))
                answer = client.recv(100)
            except TimeoutError:
                continue
            except ConnectionError:
                answer = b""
            break
        assert answer in (b"", refusal("timeout"))
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"timeout": 1}


def test_clients_that_come_and_go_leave_nothing(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(first_packet="10s"))
    still_works(forwarder)
    forwarder.wait_for_no_pairs()
    before = forwarder.open_fds()
    rng = random.Random(1)
    ways = Counter[str]()
    for number in range(200):
        client = dial(forwarder.address)
        part = instruction("127.0.0.1:1")[: rng.randrange(18)]
        client.sendall(part)
        if number % 2:
            reset(client)
            ways["client_reset"] += 1
        else:
            client.close()
            ways["other"] += 1
    forwarder.wait_for_no_pairs()
    forwarder.wait_for_no_more_fds(before)
    assert sum(closed(forwarder).values()) == 201
    still_works(forwarder)


def test_garbage_hurts_nobody(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    rng = random.Random(2)
    with pair_through(forwarder.address) as (client, server):
        for _ in range(300):
            with dial(forwarder.address) as noisy, contextlib.suppress(ConnectionError):
                noisy.sendall(rng.randbytes(rng.choice([1, 2, 5, 100, 5000])))
                half_close(noisy)
                noisy.settimeout(scaled_s(5))
                answer = read_to_end(noisy)
                assert answer in (b"", refusal("malformed"), refusal("timeout")), answer
        client.sendall(b"still there?")
        assert read_exactly(server, 12) == b"still there?"
        server.sendall(b"yes")
        assert read_exactly(client, 3) == b"yes"
    forwarder.wait_for_no_pairs()
    assert sum(closed(forwarder).values()) == 301
    assert "Traceback" not in forwarder.output()


def test_a_client_that_resets_while_the_server_is_being_reached(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(more="timeouts: {connect: 30s}"))
    with blackhole() as address:
        client = dial(forwarder.address)
        client.sendall(instruction(address_text(address)))
        forwarder.wait_for_pair(lambda row: row["state"] == "connecting")
        reset(client)
        forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"client_reset": 1}


def test_a_client_that_half_closes_while_the_server_is_being_reached_is_refused_in_time(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(more="timeouts: {connect: 500ms}"))
    with blackhole() as address, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(address)) + b"payload")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == refusal("timeout")


def test_a_client_that_floods_while_the_server_is_being_reached_is_blocked(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(more="timeouts: {connect: 1500ms}"))
    with blackhole() as address, dial(forwarder.address) as client:
        client.sendall(instruction(address_text(address)))
        sent = push_until_blocked(client, quiet_s=0.5, most=256 << 20)
        assert client.recv(100) == refusal("timeout")
    assert sent < 32 << 20
    still_works(forwarder)


# ---------------------------------------------------------------------------- servers


def test_a_server_that_accepts_and_says_nothing_is_held_until_idle(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(more="timeouts: {idle: 700ms}"))
    with SilentServer() as silent, dial_through(forwarder.address, silent.address) as client:
        began_s = time.monotonic()
        client.sendall(b"hello?")
        assert ends_with_reset(client) == b""
        assert time.monotonic() - began_s >= 0.7
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"idle": 1}


def test_a_server_that_resets_at_once_resets_the_client(start_forwarder: StartForwarder) -> None:
    """Also when the reset is there before the forwarder has noticed that it is connected."""
    forwarder = start_forwarder(config())
    with ResetServer() as rude:
        for _ in range(300):
            with dial(forwarder.address) as client:
                client.sendall(instruction(address_text(rude.address)))
                assert ends_with_reset(client) in (b"", ACK)
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"server_reset": 300}


def test_a_server_that_resets_mid_way_resets_the_client(on_datapath: Daemon) -> None:
    forwarder, before = on_datapath, closed(on_datapath)
    with (
        ResetServer(after=100_000) as rude,
        dial_through(forwarder.address, rude.address) as client,
        contextlib.suppress(ConnectionError),
    ):
        client.sendall(pattern(1 << 20))
        assert ends_with_reset(client) == b""
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == before + Counter({"server_reset": 1})


def test_a_client_that_resets_mid_way_resets_the_server(on_datapath: Daemon) -> None:
    forwarder, before = on_datapath, closed(on_datapath)
    with Waiting() as waiting:
        client = dial_through(forwarder.address, waiting.address)
        with waiting.accept() as server:
            client.sendall(b"a few bytes")
            assert read_exactly(server, 11) == b"a few bytes"
            reset(client)
            assert ends_with_reset(server) == b""
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == before + Counter({"client_reset": 1})


def test_a_refused_connect_is_counted(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    text = instruction(f"127.0.0.1:{unused_port()}")
    for _ in range(3):
        with dial(forwarder.address) as client:
            client.sendall(text)
            assert read_to_end(client) == refusal("refused")
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"refused": 3}


# ---------------------------------------------------------------------------- timers


@pytest.mark.parametrize("datapath", ["copy", "sockmap", "splice"])
def test_an_idle_pair_is_reset_and_a_busy_one_is_not(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(more="timeouts: {idle: 2s}", datapath=datapath))
    began_s = time.monotonic()
    with (
        pair_through(forwarder.address) as (client, server),
        pair_through(forwarder.address) as (busy, busy_server),
    ):

        def chat() -> bool:
            busy.sendall(b"x")
            return read_exactly(busy_server, 1) == b"x"

        client.setblocking(False)

        def gone() -> bool:
            chat()
            try:
                client.recv(1)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            raise AssertionError("a clean end of file")

        wait_for(gone, "the idle pair is reset")
        assert time.monotonic() - began_s >= 2
        assert ends_with_reset(server) == b""
        stays(chat, "the busy pair works", for_s=2.2)
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"idle": 1, "finished": 1}


@pytest.mark.parametrize("datapath", ["copy", "sockmap", "splice"])
def test_a_half_closed_pair_has_its_own_deadline(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(
        config(more="timeouts: {half_closed: 2s, idle: 1h}", datapath=datapath)
    )
    with pair_through(forwarder.address) as (client, server):
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(server) == b"last words"
        began_s = time.monotonic()
        forwarder.wait_for_pair(lambda row: row["state"] == "half-closed")
        assert ends_with_reset(client) == b""
        assert time.monotonic() - began_s >= 0.4
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"half_closed": 1}


def test_a_half_closed_pair_goes_on_in_the_other_direction(on_datapath: Daemon) -> None:
    forwarder, before = on_datapath, closed(on_datapath)
    with pair_through(forwarder.address) as (client, server):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(server) == b"question"
        for number in range(20):
            piece = pattern(10_000, start=number)
            server.sendall(piece)
            assert read_exactly(client, len(piece)) == piece
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == before + Counter({"finished": 1})


# ---------------------------------------------------------------------------- limits


def test_the_limit_of_pairs(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(more="limits: {pairs: 3}"))
    with EchoServer() as echo:
        held = [dial_through(forwarder.address, echo.address) for _ in range(3)]
        with dial(forwarder.address) as client:
            client.sendall(instruction(address_text(echo.address)))
            assert read_to_end(client) == refusal("busy")
        held.pop().close()
        wait_for(lambda: len(forwarder.look()) == 2, "two pairs left")

        refused = 1

        def is_served() -> bool:
            """Its place is free right behind that, and another worker may be quicker."""
            nonlocal refused
            client = dial(forwarder.address)
            client.sendall(instruction(address_text(echo.address)))
            answer = read_exactly(client, len(ACK))
            if answer == ACK:
                held.append(client)
                return True
            with client:
                assert answer + read_to_end(client) == refusal("busy")
            refused += 1
            return False

        wait_for(is_served, "another pair", deadline_s=scaled_s(5.0))
        for sock in held:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
            sock.close()
    forwarder.wait_for_no_pairs()
    assert closed(forwarder) == {"busy": refused, "finished": 4}


def test_the_limit_of_pairs_per_client(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(more="limits: {pairs_per_client: 2}"))
    with EchoServer() as echo, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(dial_through(forwarder.address, echo.address))
        with dial(forwarder.address) as client:
            client.sendall(instruction(address_text(echo.address)))
            assert read_to_end(client) == refusal("busy")
        other = stack.enter_context(socket.socket())
        other.settimeout(scaled_s(10))
        other.bind(("127.0.0.2", 0))
        other.connect(forwarder.address)
        other.sendall(instruction(address_text(echo.address)))
        assert read_exactly(other, 6) == ACK


def test_the_limit_of_new_connections_per_second(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(more="limits: {new_per_second: 5}"))
    with NameServer("one") as server:
        answers = Counter[bytes]()
        began_s = time.monotonic()
        for _ in range(40):
            with dial(forwarder.address) as client:
                client.sendall(instruction(address_text(server.address)))
                answers[read_to_end(client)] += 1
        seconds = time.monotonic() - began_s
        assert set(answers) == {ACK + b"one", refusal("busy")}
        # A burst of one second's worth may come on top of the rate.
        assert 5 <= answers[ACK + b"one"] <= 5 + 5 * (seconds + 1)
