"""The straight path does what the tables do, and leaves for them where it is not as usual."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast

import pytest

from pyforwarder.core.connection import LIFE, Event, Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.ebpf.pair_table import read_records
from pyforwarder.runtime.counters import (
    CONNECT_BOUNDS_S,
    CONNECT_FIRST,
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    NAMED_FIRST,
    Counter,
)
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.raw_sockets import accept, address_in, end_writing, peer_name
from pyforwarder.worker import plain
from pyforwarder.worker.pair_sender import PairSender
from pyforwarder.worker.records import Records
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import reset, unused_port
from tests.helpers.stream_play import Play, Servers, StartPlay, named, to

if TYPE_CHECKING:
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.udp.server import DatagramServer


ANYTHING: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    {more}
    rules: [{{name: all, match: any, to: "{address}"}}]
"""


def anything(address: str, more: str = "") -> str:
    """One listener that connects every client, whether it says something or not."""
    return ANYTHING.format(address=address, more=more)


def client_first(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"question")
    server = play.accept(listening)
    assert play.read(server, 8) == b"question"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"
    client.close()
    assert play.read_end(server) == (b"", "eof")
    server.close()
    return CloseReason.FINISHED


def server_first(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"question")
    server = play.accept(listening)
    assert play.read(server, 8) == b"question"
    server.sendall(b"answer")
    server.close()
    assert play.read_end(client) == (b"answer", "eof")
    client.close()
    return CloseReason.FINISHED


def half_closed(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"all of it")
    client.shutdown(socket.SHUT_WR)
    server = play.accept(listening)
    assert play.read_end(server) == (b"all of it", "eof")
    for _ in range(3):
        server.sendall(b"more")
        assert play.read(client, 4) == b"more"
    server.close()
    assert play.read_end(client) == (b"", "eof")
    return CloseReason.FINISHED


def many_messages(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"0123")
    server = play.accept(listening)
    assert play.read(server, 4) == b"0123"
    for _ in range(5):
        server.sendall(b"pong")
        assert play.read(client, 4) == b"pong"
        client.sendall(b"ping")
        assert play.read(server, 4) == b"ping"
    client.close()
    assert play.read_end(server) == (b"", "eof")
    server.close()
    return CloseReason.FINISHED


def reset_by_client(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"question")
    server = play.accept(listening)
    assert play.read(server, 8) == b"question"
    reset(client)
    assert play.read_end(server) == (b"", "reset")
    return CloseReason.CLIENT_RESET


def reset_by_server(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.sendall(b"question")
    server = play.accept(listening)
    assert play.read(server, 8) == b"question"
    reset(server)
    assert play.read_end(client) == (b"", "reset")
    return CloseReason.SERVER_RESET


def gone_at_once(play: Play, listening: socket.socket) -> CloseReason:
    client = play.dial()
    client.close()
    play.run_until(lambda: play.counters[Counter.ACCEPTED], "client")
    if play.state.decides_at_once:
        server = play.accept(listening)
        assert play.read_end(server) == (b"", "eof")
        server.close()
        return CloseReason.FINISHED
    return CloseReason.CLIENT_GONE


def as_much_as_is_read(play: Play, listening: socket.socket) -> CloseReason:
    data = bytes(range(256)) * 512
    client = play.dial()
    sent = client.send(data)
    assert sent > play.state.max_bytes
    server = play.accept(listening)
    assert play.read(server, sent) == data[:sent]
    client.close()
    assert play.read_end(server) == (b"", "eof")
    server.close()
    return CloseReason.FINISHED


PLAYS: Final = (
    client_first,
    server_first,
    half_closed,
    many_messages,
    reset_by_client,
    reset_by_server,
    gone_at_once,
    as_much_as_is_read,
)
TIMES: Final = (
    (DECISION_FIRST, len(DECISION_BOUNDS_S)),
    (CONNECT_FIRST, len(CONNECT_BOUNDS_S)),
)


def counted(play: Play) -> list[int]:
    """All counters; of times only how many there are."""
    words = list(play.counters[: NAMED_FIRST + 64])
    for first, bounds in TIMES:
        times = sum(words[first : first + bounds + 1])
        words[first : first + bounds + 2] = [times] + [0] * (bounds + 1)
    return words


def accept_before_it_speaks(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a client of the play is accepted before it says anything."""
    dial = play.dial

    def dial_and_wait() -> socket.socket:
        client = dial()
        play.run_until(lambda: play.server.clients, "client")
        return client

    monkeypatch.setattr(play, "dial", dial_and_wait)


@pytest.mark.parametrize("act", PLAYS)
@pytest.mark.parametrize("config", [anything, to], ids=["any", "bytes"])
@pytest.mark.parametrize("speaks", ["at_once", "later"])
def test_both_ways_carry_count_and_end_alike(
    start: StartPlay,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Play, socket.socket], CloseReason],
    config: Callable[[str], str],
    speaks: str,
) -> None:
    found = []
    for is_plain in (True, False):
        listening, address = servers()
        play = start(config(address))
        assert play.state.is_plain
        play.state.is_plain = is_plain
        if speaks == "later":
            accept_before_it_speaks(play, monkeypatch)
        play.wait_for_end(act(play, listening))
        found.append(counted(play))
        assert play.server.clients == {}
    assert found[0] == found[1]


def test_path_is_one_that_the_tables_know() -> None:
    life = Life.SNIFFING
    for event in (Event.ROUTED, Event.CONNECTED, Event.FLUSHED):
        life, _ = LIFE[life][event]
    assert life is Life.JOINED
    assert LIFE[life][Event.FINISHED][0] is Life.CLOSED


def test_client_that_has_spoken_is_joined_as_it_is_accepted(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(to(address))
    client = play.dial()
    client.sendall(b"hello")
    play.run_until(lambda: play.server.clients, "client")
    joined = play.only_client()
    assert (joined.life, joined.kind) == (Life.JOINED, DatapathKind.COPY)
    assert joined.pair_reason is PairReason.SHORT
    assert (joined.up.carried_bytes, joined.up.carried_packets) == (5, 1)
    assert joined.peer == client.getsockname()
    assert play.read(play.accept(listening), 5) == b"hello"


def test_client_that_speaks_later_takes_the_straight_path_then(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, address = servers()
    play = start(to(address))
    accept_before_it_speaks(play, monkeypatch)
    client = play.dial()
    waiting = play.only_client()
    lives = [waiting.life]
    monkeypatch.setattr(play.server, "happen", None)  # the tables
    client.sendall(b"hello")
    assert play.read(play.accept(listening), 5) == b"hello"
    lives.append(waiting.life)
    assert lives == [Life.SNIFFING, Life.JOINED]


def test_client_that_says_nothing_has_its_time_once(start: StartPlay, servers: Servers) -> None:
    _, address = servers()
    play = start(to(address, timeout="5s"))
    client = play.dial()
    play.run_until(lambda: play.server.clients, "client")
    waiting = play.only_client()
    expires_s = waiting._expires_s
    callback = play.loop._callbacks[waiting.client_fd]
    assert callback is not None
    callback(waiting, waiting.client_fd, EPOLLIN)  # there is nothing
    assert (waiting.life, waiting._expires_s) == (Life.SNIFFING, expires_s)
    play.pass_time(5.1)
    assert play.read_end(client) == (b"", "reset")


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        (named(), True),
        (named("limits: {new_per_second: 5}"), False),
        (named("limits: {pairs_per_client: 5}"), False),
        (named("handover: {after_bytes: 0}"), False),
        (named("datapath: sockmap"), False),
        (named("datapath: copy"), True),
        (anything("127.0.0.1:1", "proxy_protocol: {accept: true, trusted: [loopback]}"), False),
    ],
)
def test_listener_that_asks_for_more_goes_by_the_tables(
    start: StartPlay, config: str, is_plain: bool
) -> None:
    assert start(config).state.is_plain is is_plain


def test_first_bytes_that_tcp_does_not_take_at_once_follow(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, address = servers()
    play = start(named())
    monkeypatch.setattr(plain, "_write", lambda fd, data: os.write(fd, data[:3]))
    client = play.dial()
    client.sendall(instruction(address) + b"in two pieces")
    server = play.accept(listening)
    monkeypatch.undo()
    assert play.read(server, 13) == b"in two pieces"
    assert play.read(client, len(ACK)) == ACK
    joined = play.only_client()
    assert (joined.up.carried_bytes, joined.down.carried_bytes) == (13, 0)
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"
    assert joined.down.carried_bytes == 6


def test_server_that_answers_later_gets_the_first_bytes_then(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, address = servers()
    play = start(to(address))

    def not_yet(_fd: int, _data: bytes) -> int:
        raise BlockingIOError(errno.EAGAIN, "not connected")

    monkeypatch.setattr(plain, "_write", not_yet)
    client = play.dial()
    client.sendall(b"hello")
    play.run_until(lambda: play.server.clients, "client")
    assert play.only_client().life is Life.CONNECTING
    server = play.accept(listening)
    assert play.read(server, 5) == b"hello"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"


def test_server_that_refuses_is_followed_by_the_next(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    dead = f"127.0.0.1:{unused_port()}"
    play = start(to("web", f"upstreams: {{web: {{servers: ['{dead}', '{address}']}}}}"))
    for _ in range(2):
        client = play.dial()
        client.sendall(b"hello")
        assert play.read(play.accept(listening), 5) == b"hello"
    failing, working = play.generation.balancers["web"].servers
    assert (failing.failures, failing.held.total()) == (1, 0)
    assert (working.connects, working.held.total(), working.pairs) == (2, 2, 2)


def test_server_of_another_kind_may_be_the_next(
    start: StartPlay, servers: Servers, tmp_path: Path
) -> None:
    del servers
    dead = f"127.0.0.1:{unused_port()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "server"))
        listening.listen()
        listening.setblocking(False)
        listed = f"['{dead}', 'unix:{tmp_path / 'server'}']"
        play = start(to("web", f"upstreams: {{web: {{servers: {listed}}}}}"))
        for _ in range(2):
            client = play.dial()
            client.sendall(b"one")
            server = play.accept(listening)
            assert play.read(server, 3) == b"one"
            client.sendall(b"two")
            assert play.read(server, 3) == b"two"
        play.run_until(lambda: len(list(read_records(play._memory))) == 2, "records")
        assert play.closed(CloseReason.INTERNAL) == 0


def test_connection_that_is_its_own_server_is_refused(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = servers()
    play = start(to(address))
    monkeypatch.setattr(play.server._connector, "is_itself", lambda _client: True)
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.REFUSED)
    assert play.counters[Counter.JOINED_COPY] == 0


def options(play: Play) -> list[bool]:
    """Whether the server's socket of the only client writes at once, and is asked for its peer."""
    sock = play.only_client().server
    assert sock is not None
    return [
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0,
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0,
    ]


def test_second_message_brings_the_options_of_a_lasting_connection(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(to(address))
    client = play.dial()
    client.sendall(b"one")
    server = play.accept(listening)
    assert play.read(server, 3) == b"one"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"
    assert options(play) == [False, False]
    client.sendall(b"two")
    assert play.read(server, 3) == b"two"
    assert options(play) == [True, True]


def test_pair_that_is_shown_has_the_options_of_a_lasting_connection(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(anything(address))
    play.dial()
    server = play.accept(listening)
    assert options(play) == [False, False]
    play.run_until(lambda: list(read_records(play._memory)), "record")
    assert options(play) == [True, True]
    server.sendall(b"x")
    play.run_until(lambda: play.only_client().down.carried_bytes, "byte")
    (record,) = read_records(play._memory)
    assert record.worker[Direction.DOWN].carried_bytes == 1


def test_pair_that_moves_to_another_daemon_has_the_options_of_a_lasting_connection(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(to(address))
    client = play.dial()
    client.sendall(b"hello")
    play.read(play.accept(listening), 5)
    assert options(play) == [False, False]
    seen: list[list[bool]] = []

    def send(message: dict[str, object], *_: object, **__: object) -> None:
        if "pair" in message:
            seen.append(options(play))

    datagrams = SimpleNamespace(handover=SimpleNamespace(settle=lambda **_: None), by_id={})
    to_successor = SimpleNamespace(send=send, close=lambda: None, unread_bytes=lambda: 0)
    PairSender(
        cast("Channel", to_successor), play.server, cast("DatagramServer", datagrams), None, None
    )
    play.run_until(lambda: seen, "pair")
    assert seen == [[True, True]]


def test_no_socket_object_is_made_of_a_number_that_another_connection_has(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(to(address))
    client = play.dial()
    client.sendall(b"hello")
    server = play.accept(listening)
    ended = play.only_client()
    client.close()
    assert play.read_end(server) == (b"hello", "eof")
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert ended.client.fileno() == -1


# The calls below


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accept_tells_the_peers_address(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        listener.setblocking(False)
        assert accept(listener.fileno()) == -errno.EAGAIN
        with socket.create_connection(listener.getsockname()[:2]) as client:
            fd = accept(listener.fileno())
            with socket.socket(fileno=fd) as accepted:
                assert address_in(peer_name()) == client.getsockname()[:2]
                assert not os.get_blocking(fd)
                assert not os.get_inheritable(fd)
                assert end_writing(fd)
                assert client.recv(1) == b""
                reset(client)
                with contextlib.suppress(ConnectionResetError):
                    accepted.recv(1)
                assert not end_writing(fd)


def test_client_of_a_unix_socket_has_no_address(tmp_path: Path) -> None:
    path = os.path.join(tmp_path, "listener")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        os.close(accept(listener.fileno()))
        assert address_in(peer_name()) is None


# Records


def test_few_connections_are_shown_soon_and_the_rest_of_many_a_little_later(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = servers()
    play = start(to(address))
    records = play.server.records
    monkeypatch.setattr(records, "_show_unshown", lambda: None)  # here, and not by the clock
    peers = [play.dial() for _ in range(20)]
    for peer in peers:
        peer.sendall(b"hello")
    play.run_until(lambda: len(play.server.clients) == 20, "clients")
    clients = list(play.server.clients.values())
    first_s = clients[0].accepted_s
    for client in clients:
        client.accepted_s = first_s
    play.loop.now_s = first_s + 0.03
    Records._show_unshown(records)
    assert [client for client in clients if client.slot >= 0] == clients[:16]
    play.loop.now_s = first_s + 0.11
    Records._show_unshown(records)
    assert len(list(read_records(play._memory))) == 20
    assert not records.unshown
