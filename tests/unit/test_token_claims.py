"""Tokens that are used up in a fleet, as a worker and its clients see it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pyforwarder.core import token
from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.loop import Loop
from pyforwarder.worker.token_claims import MOST_SENT, MOST_WAITING, TokenClaims
from tests.helpers import stream_play
from tests.helpers.generations import settings_of
from tests.helpers.instruction import ACK, refusal
from tests.helpers.stream_play import Play, listening_socket

KEY = b"k" * 32
CONFIG = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    first_packet: {timeout: 5s}
    rules: [{match: instruction, allow: [loopback], token: required}]
tokens: {keys: {ops: /ops.key}, max_lifetime: 1h}
fleet: {endpoints: ['http://127.0.0.1:1'], name: edge, tokens: {wait: 10s%s}}
"""


class Wire:
    """Claims in virtual time, and what the supervisor is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        self.loop = Loop()
        self.sent: list[dict[str, object]] = []
        self.is_full = False
        self.claims = TokenClaims(self.loop, self.send)
        self.told: list[bool | None] = []

    def send(self, message: dict[str, object]) -> None:
        if self.is_full:
            raise BlockingIOError
        self.sent.append(message)

    def ask(self, wait_s: float = 2.0) -> Any:
        return self.claims.ask(
            b"d" * 16, until_unix_s=5.5, wait_s=wait_s, answer=lambda first: self.told.append(first)
        )

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        self.loop.run_once(0.0)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire(monkeypatch)
    yield wire
    wire.loop.dispose()


def test_a_claim_is_asked_and_answered_once(wire: Wire) -> None:
    assert wire.ask()
    assert wire.sent == [{"claim": "64" * 16, "until": 6, "number": 1}]
    wire.claims.answered(1, True)
    wire.claims.answered(1, False)
    wire.claims.answered(7, False)
    wire.pass_time(5.0)
    assert wire.told == [True]


def test_no_answer_in_time_is_none(wire: Wire) -> None:
    wire.ask()
    wire.pass_time(1.9)
    assert wire.told == []
    wire.pass_time(0.2)
    wire.claims.answered(1, True)  # too late
    assert wire.told == [None]


def test_a_client_that_stops_is_not_told(wire: Wire) -> None:
    wire.ask().stop()
    wire.claims.answered(1, True)
    wire.pass_time(5.0)
    assert wire.told == []


def test_the_supervisor_has_few_at_once_and_those_that_it_lost_count_no_more(wire: Wire) -> None:
    for _ in range(MOST_SENT + 3):
        assert wire.ask(wait_s=100.0)
    assert [message["number"] for message in wire.sent] == list(range(1, MOST_SENT + 1))
    wire.claims.answered(1, True)
    assert wire.sent[-1]["number"] == MOST_SENT + 1
    wire.pass_time(31.0)
    wire.ask()
    assert wire.sent[-1]["number"] == MOST_SENT + 4
    # What waits is bounded, too.
    wire.is_full = True
    asked = [wire.ask() for _ in range(MOST_WAITING)]
    assert asked[-1] is None
    wire.pass_time(2.0)
    assert wire.told.count(None) == sum(one is not None for one in asked) + 1
    assert not wire.claims._unsent


def test_where_nobody_can_be_asked_nobody_is_called() -> None:
    loop = Loop()
    claims = TokenClaims(loop, None)
    assert claims.ask(b"d", until_unix_s=0, wait_s=1, answer=lambda _: None) is None
    loop.dispose()


# ---------------------------------------------------------------------------- a worker's clients


class Fleet:
    """A worker, a server, and a supervisor that answers when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
        monkeypatch.setattr(
            stream_play,
            "settings_of",
            lambda *a, **how: replace(settings_of(*a, **how), keys={"ops": KEY}),
        )
        self.play = Play(CONFIG % more)
        self.asked: list[dict[str, object]] = []
        self.play.server.claims = TokenClaims(self.play.loop, self.asked.append)
        self.listening = self.play.own(listening_socket())
        self._number = 0

    def token(self) -> bytes:
        self._number += 1
        return token.make(
            Address(*self.listening.getsockname()),
            expires_unix_s=int(time.time()) + 60 + 20 * self._number,  # noqa: TID251 - as above
            key_id="ops",
            key=KEY,
        )

    def wait_for_claims(self, count: int) -> None:
        self.play.run_until(lambda: len(self.asked) == count, f"{count} claims")


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    one = Fleet(monkeypatch)
    yield one
    one.play.close()


def test_a_client_waits_for_the_fleet_and_loses_nothing(fleet: Fleet) -> None:
    play = fleet.play
    client = play.dial()
    client.send(fleet.token() + b"first")
    fleet.wait_for_claims(1)
    # Neither more bytes nor the end make it decide again: that would use the token twice.
    client.send(b" second")
    client.shutdown(socket.SHUT_WR)
    for _ in range(10):
        play.loop.run_once(0.002)
    assert len(fleet.asked) == 1
    # Others are served meanwhile.
    other = play.dial()
    other.send(b"06\xffxxx")
    assert play.read(other, 17) == refusal("malformed")
    play.server.claims.answered(1, True)
    server = play.accept(fleet.listening)
    assert play.read(client, len(ACK)) == ACK
    assert play.read(server, 12) == b"first second"


@pytest.mark.parametrize(
    ("more", "is_first", "said"),
    [
        ("", False, refusal("token")),
        ("", None, refusal("token")),
        (", store_lost: machine", None, ACK),
        (", store_lost: machine", False, refusal("token")),
    ],
)
def test_what_the_store_does_not_say_is_refused_or_as_configured(
    monkeypatch: pytest.MonkeyPatch, more: str, is_first: bool | None, said: bytes
) -> None:
    fleet = Fleet(monkeypatch, more)
    client = fleet.play.dial()
    client.send(fleet.token())
    fleet.wait_for_claims(1)
    fleet.play.server.claims.answered(1, is_first)
    assert fleet.play.read(client, len(said)) == said
    fleet.play.close()


def test_a_client_that_leaves_while_it_waits_is_forgotten(fleet: Fleet) -> None:
    client = fleet.play.dial()
    client.send(fleet.token())
    fleet.wait_for_claims(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    fleet.play.wait_for_end(CloseReason.CLIENT_RESET)
    assert not fleet.play.server.claims._waiting
    fleet.play.server.claims.answered(1, True)


def test_the_first_packets_time_is_over_while_it_waits(fleet: Fleet) -> None:
    client = fleet.play.dial()
    client.send(fleet.token())
    fleet.wait_for_claims(1)
    (one,) = fleet.play.server.clients.values()
    fleet.play.server._sniffer.timed_out(one)
    assert one.refusal == "the fleet's store has not said in time whether the token was used"
    assert not fleet.play.server.claims._waiting
    assert fleet.play.closed(CloseReason.TIMEOUT) == 1


def test_a_token_that_was_used_here_is_not_asked_for(fleet: Fleet) -> None:
    once = fleet.token()
    first, second = fleet.play.dial(), fleet.play.dial()
    first.send(once)
    fleet.wait_for_claims(1)
    second.send(once)
    assert fleet.play.read(second, 13) == refusal("token")
    assert len(fleet.asked) == 1
