"""Accepting: by the limits, in batches, and without descriptors."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter, RuleCounter
from pyforwarder.runtime.raw_sockets import accept
from pyforwarder.worker import accepting
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.stream_play import (
    DEADLINE_S,
    Play,
    Servers,
    StartPlay,
    listening_socket,
    named,
)


def test_pair_beyond_the_limit_is_told_busy(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named("limits: {pairs: 1}"))
    client, server = play.joined(listening, address)
    second = play.dial()
    second.sendall(instruction(address))
    assert play.read_end(second) == (refusal("busy"), "eof")
    second.close()
    play.wait_for_end(CloseReason.BUSY)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    play.joined(listening, address)
    rule = play.state.rule_counters[0]
    assert play.counters[rule + RuleCounter.TAKEN] == 2
    assert play.counters[rule + RuleCounter.REFUSED] == 1


def test_client_beyond_its_limit_is_told_busy(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named("limits: {pairs_per_client: 2}"))
    play.joined(listening, address)
    client, server = play.joined(listening, address)
    third = play.dial()
    third.sendall(instruction(address))
    assert play.read_end(third) == (refusal("busy"), "eof")
    third.close()
    play.wait_for_end(CloseReason.BUSY)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    play.joined(listening, address)


def test_flood_beyond_the_rate_is_reset_once_too_many_listen(start: StartPlay) -> None:
    play = start(named("limits: {new_per_second: 1}"))
    clients = [play.dial() for _ in range(80)]
    play.run_until(lambda: play.counters[Counter.ACCEPTED] == 80, "clients")
    # One is admitted per second, 64 may ask and be told; the second may change meanwhile.
    assert 80 - 64 - 3 <= play.closed(CloseReason.BUSY) <= 80 - 64 - 1
    assert play.counters[Counter.OPEN] + play.closed(CloseReason.BUSY) == 80
    del clients


class Failing:
    """accept(2) of one listener, which fails as told before it works again."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.errors: list[int] = []

    def __call__(self, fd: int) -> int:
        if fd == self.listener.fileno() and self.errors:
            return -self.errors.pop(0)
        return accept(fd)


@pytest.fixture
def failing(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Play, Failing, str]]:
    """A play with another listener, which fails; and where it listens."""
    _, address = servers()
    play = start(named())
    with listening_socket() as listener:
        fails = Failing(listener)
        monkeypatch.setattr(accepting, "accept", fails)
        play.address = listener.getsockname()
        play.server.accepting.listen(listener, play.state)
        yield play, fails, address
        play.server.accepting.unlisten(listener)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_accept_without_descriptors_pauses_and_goes_on(
    failing: tuple[Play, Failing, str], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    play, fails, _ = failing
    fails.errors = [error]
    monkeypatch.setattr(accepting, "ACCEPT_PAUSE_S", 3600.0)
    play.dial()
    play.run_until(lambda: play.counters[Counter.ACCEPT_PAUSED], "pause")
    # Not tried again and again, although the listener is readable all the time.
    for _ in range(3):
        play.pass_time((3600.0 - DEADLINE_S) / 3)
        assert play.counters[Counter.ACCEPT_PAUSED] == 1
        assert not play.server.clients
    play.pass_time(DEADLINE_S)
    play.run_until(lambda: play.server.clients, "client")
    assert play.counters[Counter.ACCEPT_PAUSED] == 1


def test_connection_that_was_aborted_before_accept_is_passed_over(
    failing: tuple[Play, Failing, str],
) -> None:
    play, fails, _ = failing
    fails.errors = [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN]
    play.dial()
    play.run_until(lambda: play.server.clients, "client")
    assert fails.errors == []
    assert play.counters[Counter.ACCEPT_PAUSED] == 0


def test_accept_error_that_nobody_expects_is_a_fault(failing: tuple[Play, Failing, str]) -> None:
    play, fails, _ = failing
    fails.errors = [errno.EBADF]
    play.dial()
    with pytest.raises(OSError, match="Bad file descriptor"):
        play.run_until(lambda: not fails.errors, "error")


def test_listener_closed_during_its_pause_stays_closed(
    failing: tuple[Play, Failing, str],
) -> None:
    play, fails, _ = failing
    fails.errors = [errno.EMFILE]
    play.dial()
    play.run_until(lambda: play.counters[Counter.ACCEPT_PAUSED], "pause")
    play.server.accepting.unlisten(fails.listener)
    ran: list[int] = []
    play.loop.after(0.15, lambda: ran.append(1))
    play.run_until(lambda: ran, "end of the pause")
    assert play.counters[Counter.ACCEPTED] == 0


def test_clients_that_wait_at_a_listener_that_goes_are_served(
    start: StartPlay, servers: Servers
) -> None:
    server, address = servers()
    play = start(named())
    clients = [play.dial() for _ in range(5)]
    for client in clients:
        client.sendall(instruction(address))
    assert play.counters[Counter.ACCEPTED] == 0
    play.server.accepting.accept_rest(play.listener)
    play.server.accepting.unlisten(play.listener)
    play.listener.close()
    assert play.counters[Counter.ACCEPTED] == 5
    for client in clients:
        assert play.read(client, len(ACK)) == ACK
    del server


def test_clients_are_accepted_in_batches(start: StartPlay) -> None:
    play = start(named())
    clients = [play.dial() for _ in range(23)]
    play.loop.run_once(0.01)
    assert play.counters[Counter.ACCEPTED] == 16
    play.loop.run_once(0.01)
    assert play.counters[Counter.ACCEPTED] == 23
    del clients
