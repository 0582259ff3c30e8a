"""A refused client is told why, and stays for no longer than it takes to read that."""

from __future__ import annotations

import contextlib

import pytest

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import ListenerCounter
from pyforwarder.worker import refusing
from tests.helpers.instruction import instruction, refusal
from tests.helpers.stream_play import (
    DEADLINE_S,
    StartPlay,
    named,
)


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (instruction("192.0.2.1:80"), "denied", CloseReason.DENIED),
        (instruction("169.254.169.254:80"), "denied", CloseReason.DENIED),
        (instruction("127.0.0.1:80")[:-2] + b"01", "malformed", CloseReason.MALFORMED),
    ],
)
def test_refused_client_is_told_why(
    start: StartPlay, sent: bytes, code: str, reason: CloseReason
) -> None:
    play = start(named())
    client = play.dial()
    client.sendall(sent + b"and payload that nobody reads")
    assert play.read_end(client) == (refusal(code), "eof")
    assert play.only_client().life is Life.REFUSING
    client.close()
    play.wait_for_end(reason)
    assert play.counters[play.state.counter + ListenerCounter.REFUSED] == 1


def test_refused_client_that_stays_is_ended(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "REFUSAL_LINGER_S", 3600.0)
    play = start(named())
    client = play.dial()
    client.sendall(instruction("192.0.2.1:80"))
    assert play.read_end(client)[1] == "eof"
    play.pass_time(3600.0 - DEADLINE_S)
    assert play.closed(CloseReason.DENIED) == 0
    play.pass_time(DEADLINE_S)
    assert play.closed(CloseReason.DENIED) == 1


def test_refused_client_that_goes_on_sending_is_not_read_for_ever(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "REFUSAL_LINGER_S", 3600.0)
    play = start(named())
    client = play.dial()
    client.sendall(instruction("192.0.2.1:80"))

    def push() -> bool:
        with contextlib.suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
            client.send(bytes(1 << 16))
        return play.closed(CloseReason.DENIED) == 1

    play.run_until(push, "end")


def test_own_listener_is_denied(start: StartPlay) -> None:
    play = start(named())
    client = play.dial()
    host, port = play.address
    client.sendall(instruction(f"{host}:{port}"))
    assert play.read_end(client) == (refusal("denied"), "eof")
