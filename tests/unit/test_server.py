"""The server's side of a connection's life: real loopback sockets, a fake datapath, one process.

Each play is a script: what a peer does, and what the others see of it. The event loop runs only
while a play waits for something, so what happens between two waits is the play's choice.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from pyforwarder.core.connection import LIFE, Event, Life, UnexpectedEventError
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath import copying
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.datapath.ebpf.pair_table import read_records
from pyforwarder.runtime.counters import (
    Counter,
)
from pyforwarder.runtime.raw_sockets import write_last
from pyforwarder.worker import plain
from pyforwarder.worker.udp.session import Session
from tests.helpers.instruction import ACK, instruction
from tests.helpers.stream_play import (
    Play,
    Servers,
    SlowNames,
    StartPlay,
    named,
)

if TYPE_CHECKING:
    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath


# Bytes before, between and after


def test_bytes_behind_the_instruction_come_first_and_once(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address) + b"first")
    server = play.accept(listening)
    assert play.read(client, 6) == ACK
    assert play.read(server, 5) == b"first"
    client.sendall(b" second")
    assert play.read(server, 7) == b" second"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"


def test_receive_data_before_server_connected(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    client = play.dial()
    port = address.rpartition(":")[2]
    client.sendall(instruction(f"server.test:{port}") + b"one ")
    play.run_until(lambda: names.asked == ["server.test"], "question")
    client.sendall(b"two ")
    play.loop.run_once(0.01)
    client.sendall(b"three")
    play.loop.run_once(0.01)
    assert play.only_client().life is Life.CONNECTING
    names.release()
    server = play.accept(listening)
    assert play.read(server, 13) == b"one two three"
    assert play.read(client, 6) == ACK


def test_receive_fin_before_server_connected(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    client = play.dial()
    port = address.rpartition(":")[2]
    client.sendall(instruction(f"server.test:{port}") + b"all I have to say")
    client.shutdown(socket.SHUT_WR)
    play.run_until(lambda: names.asked, "question")
    names.release()
    server = play.accept(listening)
    assert play.read_end(server) == (b"all I have to say", "eof")
    server.sendall(b"and the answer")
    server.close()
    assert play.read_end(client) == (ACK + b"and the answer", "eof")
    play.wait_for_end(CloseReason.FINISHED)


def test_receive_data_after_half_close(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    client, server = play.joined(*servers())
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server) == (b"request", "eof")
    for number in range(5):
        server.sendall(b"part %d" % number)
        assert play.read(client, 6) == b"part %d" % number
    assert play.closed(CloseReason.FINISHED) == 0
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (b"", "eof")
    play.wait_for_end(CloseReason.FINISHED)


def written_last(
    monkeypatch: pytest.MonkeyPatch, outcome: Callable[[int, bytes], int] = write_last
) -> list[bytes]:
    """What is written for FIN to go with it; `outcome` writes instead."""
    seen: list[bytes] = []

    def write(fd: int, last: bytes) -> int:
        seen.append(last)
        return outcome(fd, last)

    monkeypatch.setattr(copying, "write_last", write)
    return seen


def answered_and_ended(play: Play, servers: Servers) -> tuple[socket.socket, socket.socket]:
    """A pair whose server has sent an answer and FIN, before the forwarder sees any of it."""
    client, server = play.joined(*servers())
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    return client, server


def test_fin_that_has_come_behind_a_message_goes_on_with_it(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = written_last(monkeypatch)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    pair = play.only_client()
    assert play.read_end(client) == (b"answer", "eof")
    assert written == [b"answer"]
    assert (pair.down.carried_bytes, pair.down.carried_packets) == (6, 1)
    client.sendall(b"thanks")  # the other direction goes on
    client.close()
    assert play.read_end(server) == (b"thanks", "eof")
    assert written == [b"answer", b"thanks"]
    play.wait_for_end(CloseReason.FINISHED)


@pytest.mark.parametrize("takes", [0, 2])
def test_what_has_no_room_in_front_of_fin_is_written_before_it(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    def take_some(fd: int, last: bytes) -> int:
        return os.write(fd, last[:takes]) or -errno.EAGAIN

    written_last(monkeypatch, take_some)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    assert play.read_end(client) == (b"answer", "eof")
    client.close()
    assert play.read_end(server) == (b"", "eof")
    play.wait_for_end(CloseReason.FINISHED)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ECONNRESET, CloseReason.CLIENT_RESET),
        (errno.ETIMEDOUT, CloseReason.CLIENT_TIMEOUT),
    ],
)
def test_a_client_that_is_gone_as_the_last_bytes_are_written_ends_the_pair(
    start: StartPlay,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    reason: CloseReason,
) -> None:
    written_last(monkeypatch, lambda _fd, _last: -code)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    assert play.read_end(client) == (b"", "reset")
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(reason)


@pytest.mark.parametrize(
    ("behind", "end"),
    [
        (b" and more", (b"answer and more", "eof")),
        (BlockingIOError(errno.EAGAIN, "nothing"), (b"answer", "eof")),
        (ConnectionResetError(errno.ECONNRESET, "reset"), (b"answer", "reset")),
    ],
)
def test_what_a_second_read_finds_in_place_of_the_end_is_carried_on(
    start: StartPlay,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    behind: bytes | OSError,
    end: tuple[bytes, str],
) -> None:
    """More of it (a read stops at an urgent byte), nothing after all, or that all is over."""
    reads: list[bytes | OSError] = []

    def read(fd: int, most: int) -> bytes:
        if not reads:
            data = os.read(fd, most)
            if data == b"answer":
                reads.append(behind)
            return data
        found = reads.pop()
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(copying, "_read", read)
    written = written_last(monkeypatch)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    if isinstance(behind, BlockingIOError):
        assert play.read(client, 6) == b"answer"
        server.close()
        client.close()
        play.wait_for_end(CloseReason.FINISHED)
    else:
        assert play.read_end(client) == end
    assert written == []
    if end[1] == "reset":
        play.wait_for_end(CloseReason.SERVER_RESET)


def test_server_that_speaks_first_is_heard_behind_the_answer(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address))
    server = play.accept(listening)
    server.sendall(b"banner")
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (ACK + b"banner", "eof")
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server) == (b"", "eof")


def test_bytes_that_are_carried_are_counted_without_what_is_ours(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address) + b"x" * 23)
    server = play.accept(listening)
    server.sendall(b"y" * 7)
    assert play.read(client, 6 + 7) == ACK + b"y" * 7
    assert play.read(server, 23) == b"x" * 23
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert (play.counters[Counter.UP_BYTES], play.counters[Counter.DOWN_BYTES]) == (23, 7)


@pytest.mark.parametrize("named_first", [False, True])
def test_urgent_byte_stays_in_its_place_and_holds_nothing_up(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, named_first: bool
) -> None:
    # A read stops in front of it: what is behind it must not wait for the next segment.
    listening, address = servers()
    names = SlowNames(monkeypatch)
    play = start(named("datapath: copy"))
    client = play.dial()
    port = address.rpartition(":")[2]
    head = instruction(f"server.test:{port}")
    if named_first:
        # The urgent byte comes while the server is being connected.
        client.sendall(head)
        play.run_until(lambda: names.asked, "question")
        client.sendall(b"abc")
    else:
        client.sendall(head[:9])
        client.send(head[9:10], socket.MSG_OOB)
        client.sendall(head[10:] + b"abc")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"def")
    play.loop.run_once(0.01)
    names.release()
    server = play.accept(listening)
    assert play.read(server, 7) == b"abc!def"
    server.sendall(b"xyz")
    server.send(b"?", socket.MSG_OOB)
    server.sendall(b"uvw")
    assert play.read(client, 6 + 7) == ACK + b"xyz?uvw"


@pytest.mark.parametrize(
    "rules",
    [
        "{match: any, to: '%s'}",
        "{match: {not: {client: 10.0.0.0/8}}, to: '%s'}",
        "{match: [{client: 10.0.0.0/8}, {client: 127.0.0.0/8}], to: '%s'}",
        "{match: {client: 10.0.0.0/8, tls: {}}, reject: reset}, {match: any, to: '%s'}",
    ],
)
def test_server_that_speaks_first_is_heard_where_no_byte_is_needed_to_decide(
    rules: str, start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(
        "listeners: [{name: main, bind: '127.0.0.1:0', first_packet: {timeout: 1h},"
        f" rules: [{rules % address}]}}]"
    )
    client = play.dial()
    play.accept(listening).sendall(b"220 hello")
    assert play.read(client, 9) == b"220 hello"


# Faults of ours


@pytest.mark.parametrize("before", ["policy", "connect"])
def test_internal_error_at_accept_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    # Clients that have spoken by then are served from the listener's event.
    play = start(named())
    listening, address = servers()

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        if before == "policy":
            patch.setattr(play.generation, "permits", fail)
        else:
            patch.setattr(plain, "reset_at_close", fail)
        unlucky = play.dial()
        unlucky.sendall(instruction(address))
        play.wait_for_end(CloseReason.INTERNAL)
        assert play.read_end(unlucky) == (b"", "reset")
    play.joined(listening, address)


def test_internal_error_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    moved = play.server.moved

    def fail_once(*args: object) -> None:
        monkeypatch.setattr(play.server, "moved", moved)
        raise ZeroDivisionError("a bug")

    unlucky, its_server = play.joined(listening, address)
    monkeypatch.setattr(play.server, "moved", fail_once)
    unlucky.sendall(b"x")
    assert play.read_end(unlucky) == (b"", "reset")
    assert play.read_end(its_server)[1] == "reset"
    play.wait_for_end(CloseReason.INTERNAL)
    client.sendall(b"alive")
    assert play.read(server, 5) == b"alive"


def test_internal_error_after_a_name_was_found_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    unlucky = play.dial()
    unlucky.sendall(instruction(f"server.test:{address.rpartition(':')[2]}"))
    play.run_until(lambda: names.asked, "question")

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(play.server._connector, "connect", fail)
        names.release()
        play.wait_for_end(CloseReason.INTERNAL)
    play.joined(listening, address)


def test_internal_error_of_a_datapaths_timer_costs_one_connection_only(
    start: StartPlay, servers: Servers
) -> None:
    from pyforwarder.datapath.sockmap.directions import Half

    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    pair = play.only_client()

    class Broken:
        def advance(self, *args: object) -> None:
            raise ZeroDivisionError("a bug")

    timer = Half(cast("SockmapDatapath", Broken()), pair, pair.up, bytes(8))
    play.loop.deadlines.start(timer, 0.0, play.loop.now_s)
    play.wait_for_end(CloseReason.INTERNAL)
    assert play.read_end(client)[1] == "reset"
    assert play.read_end(server)[1] == "reset"
    play.joined(listening, address)


def test_an_event_that_the_table_has_not_is_a_fault_of_ours(start: StartPlay) -> None:
    play = start(named())
    play.dial()
    play.run_until(lambda: play.server.clients, "client")
    client = play.only_client()
    for life in Life:
        for event in set(Event) - set(LIFE[life]):
            client.life = life
            with pytest.raises(UnexpectedEventError, match=f"^{event.name} while {life.name}$"):
                play.server.happen(client, event)
            assert client.life is life
    client.life = Life.SNIFFING


# What the supervisor asks


def test_flushed_pair_is_reset_and_the_others_are_not(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    other, its_server = play.joined(listening, address)
    first, second = sorted(c.id for c in play.server.clients.values())
    assert play.server.flush_ids([first, 4711]) == [first]
    assert play.read_end(client) == (b"", "reset")
    assert play.read_end(server) == (b"", "reset")
    other.sendall(b"alive")
    assert play.read(its_server, 5) == b"alive"
    assert play.server.flush_ids(None) == [second]
    assert play.closed(CloseReason.FLUSHED) == 2


def test_record_shows_the_pair(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    _, address = (found := servers())
    client, server = play.joined(*found)
    play.run_until(lambda: list(read_records(play._memory)), "record")
    client.sendall(b"x" * 23)
    assert play.read(server, 23) == b"x" * 23
    (record,) = read_records(play._memory)
    assert (record.state, record.datapath) == (PairState.JOINED, DatapathKind.COPY)
    assert record.client.port == client.getsockname()[1]
    assert record.listener.port == play.address[1]
    assert record.source.port == server.getpeername()[1]
    assert record.server.port == int(address.rpartition(":")[2])
    assert (record.rule, record.listener_name) == (b"named", b"main")
    assert record.worker[0].carried_bytes == 23
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server)[1] == "eof"
    (record,) = read_records(play._memory)
    assert record.state == PairState.HALF_CLOSED


def test_internal_error_that_is_no_connection_s_costs_none(
    start: StartPlay, servers: Servers
) -> None:
    """Of a timer, of work that was put off, of a ring; one of a session costs that session."""
    del servers
    play = start(named())
    ended: list[tuple[Session, CloseReason]] = []
    session = Session.__new__(Session)
    session.owner = SimpleNamespace(end=lambda one, reason: ended.append((one, reason)))
    for owner in (None, lambda: None, session):
        play.server.failed(owner, ValueError("ours"))
    assert ended == [(session, CloseReason.INTERNAL)]
    # Without a listener, or the supervisor's channel, a worker is of no use.
    with pytest.raises(ValueError, match="ours"):
        play.server.failed(object(), ValueError("ours"))
