"""Names to addresses: what is kept, for how long, and what a name server's failure does."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from pyforwarder.loop import Loop
from pyforwarder.worker.resolver import STALE_S, Resolver, addresses_of

DEADLINE_S = 10.0
NAME = "name.example"


class Names:
    """What getaddrinfo says, until it is told to say something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[str] = []
        self.error: int | None = None
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _getaddrinfo(self, name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        assert name == NAME
        self.asked += 1
        if self.error is not None:
            raise socket.gaierror(self.error, "as the test says")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in self.hosts]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


Ask = Callable[..., list[str]]


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def ask(loop: Loop) -> Ask:
    """Resolve, and wait for the answer."""
    resolver = Resolver(loop)

    def ask(*, keep_s: float) -> list[str]:
        answers: list[list[str]] = []
        assert resolver.resolve(NAME, answers.append, keep_s=keep_s)
        deadline_s = time.monotonic() + DEADLINE_S
        while not answers:
            assert time.monotonic() < deadline_s
            loop.run_once(0.01)
        assert len(answers) == 1
        return answers[0]

    return ask


def test_a_name_is_asked_for_again_when_its_time_is_over(names: Names, ask: Ask) -> None:
    names.hosts = ["192.0.2.1"]
    assert ask(keep_s=1000.0) == ["192.0.2.1"]
    names.hosts = ["192.0.2.2", "192.0.2.3", "192.0.2.2"]
    assert ask(keep_s=1000.0) == ["192.0.2.1"]
    assert names.asked == 1
    assert ask(keep_s=0.0) == ["192.0.2.2", "192.0.2.3"]
    assert ask(keep_s=1000.0) == ["192.0.2.2", "192.0.2.3"]
    assert names.asked == 2


def test_a_name_that_is_gone_has_no_address_any_more(names: Names, ask: Ask) -> None:
    names.hosts = ["192.0.2.1"]
    assert ask(keep_s=0.0) == ["192.0.2.1"]
    for gone in (socket.EAI_NONAME, socket.EAI_NODATA):
        names.error = gone
        assert ask(keep_s=0.0) == []
    # That is not kept: the name may come back with the next connection.
    names.error = None
    assert ask(keep_s=1000.0) == ["192.0.2.1"]


@pytest.mark.parametrize("error", [socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM])
def test_while_nobody_can_be_asked_a_name_keeps_its_addresses(
    error: int, names: Names, ask: Ask, loop: Loop
) -> None:
    names.error = error
    assert ask(keep_s=0.0) == []
    names.error = None
    names.hosts = ["192.0.2.1"]
    assert ask(keep_s=0.0) == ["192.0.2.1"]
    names.error = error
    assert ask(keep_s=0.0) == ["192.0.2.1"]
    # Not every connection waits for the failure: it is kept as long as an answer is.
    asked = names.asked
    assert ask(keep_s=1000.0) == ["192.0.2.1"]
    assert names.asked == asked


def test_addresses_that_nobody_confirms_end_at_last(
    names: Names, ask: Ask, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.hosts = ["192.0.2.1"]
    assert ask(keep_s=0.0) == ["192.0.2.1"]
    names.error = socket.EAI_AGAIN
    assert ask(keep_s=0.0) == ["192.0.2.1"]
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + STALE_S)
    loop.run_once(0.0)
    assert ask(keep_s=0.0) == []


def test_a_zone_is_no_address() -> None:
    assert addresses_of(["fe80::1%eth0", "2001:db8::1"], 80) == addresses_of(["2001:db8::1"], 80)
