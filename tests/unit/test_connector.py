"""Connecting: whose fault a failure is, and what is left of an attempt that has ended."""

from __future__ import annotations

import os

import pytest

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.resolver import Wait
from pyforwarder.worker import connector
from pyforwarder.worker.race import SHORTAGES
from tests.helpers.instruction import instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import reset, unused_port
from tests.helpers.stream_play import (
    Play,
    Servers,
    SlowNames,
    StartPlay,
    named,
    to,
    watched_for_nobody,
)


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
    monkeypatch.setattr(connector, "addresses_of", lambda hosts, _port: made.append(len(hosts)))
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
