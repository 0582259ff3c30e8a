"""ConnectionMaps: whose fault a failure is, and what is left of an attempt that has ended."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.resolver import Wait
from pyforwarder.worker import destinations
from pyforwarder.worker.race import SHORTAGES
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import reset, unused_port
from tests.helpers.stream_play import (
    DEADLINE_S,
    LINGER_RESET,
    Play,
    Servers,
    SlowNames,
    StartPlay,
    named,
    to,
    watched_for_nobody,
)


def dead_server() -> str:
    return f"127.0.0.1:{unused_port()}"


def test_open_connection_error_tries_the_next_server(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    dead = dead_server()
    backup = f"{{address: '{address}', backup: true}}"
    play = start(to("web", f"upstreams: {{web: {{servers: ['{dead}', {backup}]}}}}"))
    client = play.dial()
    client.sendall(b"hello")
    server = play.accept(listening)
    assert play.read(server, 5) == b"hello"
    state = play.server.servers.rows()["web"]
    assert (state[dead]["connects"], state[dead]["failures"], state[dead]["pairs"]) == (0, 1, 0)
    assert (state[address]["connects"], state[address]["pairs"]) == (1, 1)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert play.server.servers.rows()["web"][address]["pairs"] == 0


def test_open_connection_error_without_a_next_server_is_told(
    start: StartPlay, servers: Servers
) -> None:
    del servers
    play = start(named())
    client = play.dial()
    client.sendall(instruction(dead_server()))
    assert play.read_end(client) == (refusal("refused"), "eof")
    client.close()
    play.wait_for_end(CloseReason.REFUSED)


def test_client_without_words_for_it_is_reset(start: StartPlay) -> None:
    play = start(to(dead_server()))
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.REFUSED)


def test_nothing_is_held_of_a_server_that_a_client_is_through_with(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    with blackhole() as (host, port):
        listed = f"'{dead_server()}', '{host}:{port}', {{address: '{address}', backup: true}}"
        play = start(
            to(
                "web",
                f"upstreams: {{web: {{servers: [{listed}], balance: least_pairs,"
                " eject: {failures: 0}, connect_timeout: 200ms}}",
            )
        )

        def held() -> list[int]:
            return [server.held.total() for server in play.generation.balancers["web"].servers]

        client = play.dial()
        client.sendall(b"hello")
        # Already while it is being connected, and by one server at a time.
        play.run_until(lambda: held() == [0, 1, 0], "attempt")
        served = play.accept(listening)
        play.run_until(lambda: held() == [0, 0, 1], "pair")
        served.close()
        client.close()
        play.run_until(lambda: held() == [0, 0, 0], "end of the pair")
        gone = play.dial()
        gone.sendall(b"hello")
        play.run_until(lambda: held() == [0, 1, 0], "attempt")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        gone.close()
        play.run_until(lambda: held() == [0, 0, 0], "end of the client")


def test_very_many_dead_servers_are_only_dead_servers(start: StartPlay, tmp_path: Path) -> None:
    # Each fails at once, within connect(2): nothing may be stacked up by that.
    listed = ", ".join(f"'unix:{tmp_path}/{n}'" for n in range(400))
    play = start(to("web", f"upstreams: {{web: {{servers: [{listed}]}}}}"))
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    assert play.closed(CloseReason.INTERNAL) == 0
    play.wait_for_end(CloseReason.REFUSED)


def test_server_that_does_not_answer_is_given_up_in_time(start: StartPlay) -> None:
    with blackhole() as (host, port):
        play = start(named("timeouts: {connect: 1h}"))
        client = play.dial()
        client.sendall(instruction(f"{host}:{port}"))
        play.run_until(lambda: play.server.clients, "client")
        play.run_until(lambda: play.only_client().life is Life.CONNECTING, "attempt")
        play.pass_time(3600.0 - DEADLINE_S)
        assert play.only_client().life is Life.CONNECTING
        play.pass_time(DEADLINE_S)
        assert play.read_end(client) == (refusal("timeout"), "eof")
        client.close()
        play.wait_for_end(CloseReason.TIMEOUT)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_server_that_answers_late_is_waited_for(start: StartPlay, family: int) -> None:
    # A server of this host answers within connect(2), unless it has no room: then its kernel does
    # not answer, and is asked again after a second.
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listening.listen(0)
        listening.setblocking(False)
        host, port, *_ = listening.getsockname()
        play = start(named())
        with socket.create_connection((host, port), timeout=DEADLINE_S):
            client = play.dial()
            address = f"{host}:{port}" if family == socket.AF_INET else f"[{host}]:{port}"
            client.sendall(instruction(address) + b"first")
            play.run_until(lambda: play.server.clients, "client")
            play.loop.run_once(0.01)
            assert play.only_client().life is Life.CONNECTING
            client.sendall(b" second")
            play.loop.run_once(0.01)
            play.own(listening.accept()[0])
            server = play.accept(listening)
            assert play.read(client, 6) == ACK
            assert play.read(server, 12) == b"first second"
            server.sendall(b"answer")
            assert play.read(client, 6) == b"answer"


def test_server_that_resets_at_once_resets_the_client(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named())
    client, server = play.joined(listening, address)
    reset(server)
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.SERVER_RESET)


@pytest.mark.parametrize("gone", ["reset", "closed"])
def test_client_gone_while_connecting_costs_nothing_later(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    names = SlowNames(monkeypatch)
    listening, address = servers()
    play = start(named("limits: {pairs: 1}"))
    client = play.dial()
    client.sendall(instruction(f"server.test:{address.rpartition(':')[2]}"))
    play.run_until(lambda: names.asked, "question")
    assert play.limits.pairs == 1
    if gone == "reset":
        reset(client)
        play.wait_for_end(CloseReason.CLIENT_RESET)
        # The answer comes to nobody.
        names.release()
        play.loop.run_once(0.05)
    else:
        client.close()
        names.release()
        # It is connected all the same; then its acknowledgement meets a closed socket.
        play.accept(listening)
        play.wait_for_end(CloseReason.CLIENT_RESET)
    play.run_until(lambda: play.limits.pairs == 0, "place")
    play.joined(listening, address)


def test_name_that_nobody_knows_is_told(start: StartPlay, monkeypatch: pytest.MonkeyPatch) -> None:
    names = SlowNames(monkeypatch, hosts=[])
    names.release()
    play = start(named())
    client = play.dial()
    client.sendall(instruction("nowhere.test:80"))
    assert play.read_end(client) == (refusal("unresolved"), "eof")
    client.close()
    play.wait_for_end(CloseReason.UNRESOLVED)


def test_name_with_one_forbidden_address_is_denied(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch, hosts=["127.0.0.1", "192.0.2.1"])
    names.release()
    play = start(named())
    client = play.dial()
    client.sendall(instruction("mixed.test:80"))
    assert play.read_end(client) == (refusal("denied"), "eof")
    client.close()
    play.wait_for_end(CloseReason.DENIED)


def test_name_that_takes_too_long_is_given_up(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named("timeouts: {connect: 50ms}"))
    client = play.dial()
    client.sendall(instruction("slow.test:80"))
    assert play.read_end(client) == (refusal("timeout"), "eof")
    client.close()
    play.wait_for_end(CloseReason.TIMEOUT)
    names.release()
    play.loop.run_once(0.05)


def test_an_answer_that_comes_with_the_deadline_begins_no_attempt(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    listening, address = servers()
    with blackhole() as (host, port):
        listed = f"'silent.test:{port}', {{address: '{address}', backup: true}}"
        play = start(to("web", f"upstreams: {{web: {{servers: [{listed}]}}}}"))
        client = play.dial()
        client.sendall(b"hello")
        play.run_until(lambda: names.asked, "question")
        waiting = play.only_client()
        assert isinstance(waiting.approach, Wait)
        # A loop that was held up finds the deadlines of the question and of the client passed.
        waiting.approach.question.answer([host])
        waiting.expired()
        assert waiting.approach is None
        server = play.accept(listening)
        assert play.read(server, 5) == b"hello"
        server.sendall(b"answer")
        assert play.read(client, 6) == b"answer"
        assert waiting.life is Life.JOINED
        # Neither socket of another attempt is left: see `servers`.
        names.release()
        play.run_until(lambda: not play.server.names._configured._open, "answer")


def test_a_name_with_too_many_addresses_is_not_looked_at_one_by_one(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch, hosts=[f"127.0.1.{n}" for n in range(256)] + ["127.0.0.1"])
    names.release()
    made: list[int] = []
    monkeypatch.setattr(destinations, "addresses_of", lambda hosts, _port: made.append(len(hosts)))
    play = start(named())
    client = play.dial()
    client.sendall(instruction("many.test:80"))
    assert play.read_end(client) == (refusal("unresolved"), "eof")
    client.close()
    play.wait_for_end(CloseReason.UNRESOLVED)
    assert made == []


@pytest.mark.parametrize("code", sorted(SHORTAGES))
@pytest.mark.parametrize("hosts", [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_a_shortage_of_ours_is_not_held_against_a_server(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch, code: int, hosts: list[str]
) -> None:
    names = SlowNames(monkeypatch, hosts=hosts)
    names.release()
    play = start(
        to("web", "upstreams: {web: {servers: ['web.test:80'], eject: {failures: 1, for: 1m}}}")
    )

    def no_socket(_address: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(play.server._connector, "_socket_to", no_socket)
    for count in (1, 2):
        client = play.dial()
        client.sendall(b"hello")
        assert play.read_end(client) == (b"", "reset")
        play.wait_for_end(CloseReason.BUSY, count)
    (server,) = play.generation.balancers["web"].servers
    assert (server.failures, server.is_ejected(play.loop.now_s)) == (0, False)
    assert server.held.total() == 0


def test_what_the_supervisor_cannot_grant_is_not_held_against_a_server(
    start: StartPlay, servers: Servers
) -> None:
    _, address = servers()
    play = start(
        to(
            "web",
            f"upstreams: {{web: {{servers: ['{address}'], transparent: true,"
            " eject: {failures: 1, for: 1m}}}",
        )
    )
    client = play.dial()
    client.sendall(b"hello")
    play.run_until(lambda: play.asked, "request")
    play.server._connector.granted(1, done=False)
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.UNREACHABLE)
    (server,) = play.generation.balancers["web"].servers
    assert server.failures == 0


def waiting_for_its_address(start: StartPlay, address: str, more: str = "") -> Play:
    upstreams = f"upstreams: {{web: {{servers: ['{address}'], transparent: true{more}}}}}"
    return start(to("web", upstreams))


def test_what_the_supervisor_never_answers_is_forgotten_with_its_client(
    start: StartPlay, servers: Servers
) -> None:
    _, address = servers()
    play = waiting_for_its_address(start, address)
    for number in (1, 2, 3):
        client = play.dial()
        client.sendall(b"hello")
        play.run_until(lambda: play.server._connector._waiting_for_address, "request")
        assert list(play.server._connector._waiting_for_address) == [number]
        reset(client)
        play.wait_for_end(CloseReason.CLIENT_RESET, number)
        assert play.server._connector._waiting_for_address == {}
    # An answer that comes all the same finds nobody.
    play.server._connector.granted(1, done=True)


def test_a_server_s_socket_that_was_lent_goes_with_its_attempt(
    start: StartPlay, servers: Servers
) -> None:
    """The supervisor hangs with its copy of it, which the server is not to take for a client."""
    listening, address = servers()
    play = waiting_for_its_address(start, address, ", connect_timeout: 50ms")
    client = play.dial()
    client.sendall(b"hello")
    play.run_until(lambda: play.asked, "request")
    waiting = play.only_client()
    assert waiting.server is not None
    waiting.server.connect_ex(listening.getsockname())
    served = play.accept(listening)
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.TIMEOUT)
    assert watched_for_nobody(play.loop) == []
    assert play.read_end(served) == (b"", "reset")


def test_what_the_supervisor_does_not_answer_in_time_is_forgotten(
    start: StartPlay, servers: Servers
) -> None:
    _, address = servers()
    play = waiting_for_its_address(start, address, ", connect_timeout: 50ms")
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.TIMEOUT)
    assert play.server._connector._waiting_for_address == {}
    play.server._connector.granted(1, done=True)


def test_a_server_that_refuses_is_held_to_it(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch, hosts=["127.0.0.1", "127.0.0.2"])
    names.release()
    play = start(to("web", f"upstreams: {{web: {{servers: ['web.test:{unused_port()}']}}}}"))
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.REFUSED)
    (server,) = play.generation.balancers["web"].servers
    assert server.failures == 1
