"""Refusals are counted and logged the same way for every reason, by TCP and by UDP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime import askers, resolver
from pyforwarder.runtime.counters import CLOSED_INDEX, Counters, ListenerCounter, RuleCounter
from pyforwarder.runtime.refusals import SAYS_NO, count_refusal
from pyforwarder.worker.log import ConnectionLog, Log
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.instruction import instruction
from tests.helpers.netns import blackhole
from tests.helpers.peers import unused_port
from tests.helpers.stream_play import Play

NAMED = "{name: r, match: instruction, allow: [loopback]}"
CONFIG = """
listeners: [{{name: main, bind: "127.0.0.1:0", protocol: {protocol}, {listener} rules: [{rule}]}}]
timeouts: {{connect: 100ms}}
{more}
"""


@dataclass(frozen=True)
class Case:
    """What leads to a refusal, and whether a rule had a part in it."""

    reason: CloseReason
    rule: str
    sent: bytes
    by_rule: bool = True
    listener: str = ""
    more: str = ""

    def config(self, protocol: str) -> str:
        return CONFIG.format(
            protocol=protocol, listener=self.listener, rule=self.rule, more=self.more
        )


def fixed(to: str) -> str:
    return f"{{name: r, match: {{regex: '.'}}, to: '{to}'}}"


# For both protocols, if nothing else is said.
CASES: dict[str, Callable[[], Case]] = {
    "reject-reset": lambda: Case(
        CloseReason.REJECTED, "{name: r, match: any, reject: reset}", b"x"
    ),
    "reject-close": lambda: Case(
        CloseReason.REJECTED, "{name: r, match: any, reject: close}", b"x"
    ),
    "denied": lambda: Case(CloseReason.DENIED, NAMED, instruction("192.0.2.1:80")),
    "malformed": lambda: Case(
        CloseReason.MALFORMED, NAMED, instruction("127.0.0.1:80")[:-2] + b"01"
    ),
    "token": lambda: Case(
        CloseReason.TOKEN,
        "{name: r, match: instruction, allow: [loopback], token: required}",
        instruction("127.0.0.1:80"),
        more="tokens: {keys: {ops: /dev/null}}",
    ),
    "no-match": lambda: Case(CloseReason.NO_MATCH, NAMED, b"GET /", by_rule=False),
    "unresolved": lambda: Case(CloseReason.UNRESOLVED, NAMED, instruction("nowhere.test:80")),
    "server-refuses": lambda: Case(
        CloseReason.REFUSED, NAMED, instruction(f"127.0.0.1:{unused_port()}") + b"x"
    ),
    "server-refuses-without-words": lambda: Case(
        CloseReason.REFUSED, fixed(f"127.0.0.1:{unused_port()}"), b"x"
    ),
    "unreachable": lambda: Case(
        CloseReason.UNREACHABLE,
        "{name: r, match: {regex: '.'}, to: web}",
        b"x",
        more="upstreams: {web: {servers: [{address: '127.0.0.1:9', weight: 0}]}}",
    ),
}
TCP_ONLY: dict[str, Callable[[], Case]] = {
    "first-packet-timeout": lambda: Case(
        CloseReason.TIMEOUT, NAMED, b"18", listener="first_packet: {timeout: 50ms},"
    ),
    "proxy-header": lambda: Case(
        CloseReason.MALFORMED,
        NAMED,
        b"GET / HTTP/1.1\r\n\r\n",
        by_rule=False,
        listener="proxy_protocol: {accept: true, trusted: [127.0.0.1]},",
    ),
    "not-our-proxy": lambda: Case(
        CloseReason.DENIED,
        NAMED,
        b"",
        by_rule=False,
        listener="proxy_protocol: {accept: true, trusted: [10.0.0.1]},",
    ),
}


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "cares_knows_all_sources", lambda: False)
    monkeypatch.setattr(askers, "lookup", lambda _name: [])


class LoggedPlay(Play):
    """A play of TCP that keeps what the log says."""

    def __init__(self, config: str, path: Path) -> None:
        super().__init__(config)
        self._log_path = path
        fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._stack.callback(os.close, fd)
        self.server.log = ConnectionLog(Log(level="info", form="json", fd=fd))

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]


def counted(counters: memoryview, listener: int, rule: int, reason: CloseReason) -> tuple[int, ...]:
    """Refused of the listener, refused of the rule, closed for the reason."""
    return (
        int(counters[listener + ListenerCounter.REFUSED]),
        int(counters[rule + RuleCounter.REFUSED]),
        int(counters[CLOSED_INDEX[reason]]),
    )


def check(play: Play | DatagramPlay, lines: list[dict[str, Any]], case: Case) -> None:
    rule = play.state.rule_counters[0]
    seen = counted(play.counters, play.state.counter, rule, case.reason)
    assert seen == (1, int(case.by_rule), 1)
    assert sum(int(play.counters[index]) for index in CLOSED_INDEX.values()) == 1
    (line,) = [line for line in lines if line["event"] == "closed"]
    assert (line["reason"], line["listener"], line["rule"]) == (
        case.reason.value,
        "main",
        "r" if case.by_rule else "-",
    )


@pytest.mark.parametrize("name", [*CASES, *TCP_ONLY])
def test_refused_connection_is_counted_once_everywhere_and_logged(
    name: str, tmp_path: Path
) -> None:
    case = {**CASES, **TCP_ONLY}[name]()
    play = LoggedPlay(case.config("tcp"), tmp_path / "log")
    client = play.dial()
    client.sendall(case.sent)
    play.read_end(client)
    client.close()
    play.run_until(lambda: play.closed(case.reason), "end")
    check(play, play.said(), case)
    play.close()


@pytest.mark.parametrize("name", CASES)
def test_refused_datagram_is_counted_once_everywhere_and_logged(name: str) -> None:
    case = CASES[name]()
    play = DatagramPlay(case.config("udp"))
    client = play.client()
    client.send(case.sent)
    play.run_until(lambda: play.closed(case.reason), "end")
    check(play, play.said(), case)
    play.close()


def test_server_that_does_not_answer_the_connect_is_a_refusal(tmp_path: Path) -> None:
    with blackhole() as (host, port):
        case = Case(CloseReason.TIMEOUT, fixed(f"{host}:{port}"), b"x")
        play = LoggedPlay(case.config("tcp"), tmp_path / "log")
        client = play.dial()
        client.sendall(b"x")
        assert play.read_end(client) == (b"", "reset")
        check(play, play.said(), case)
        play.close()


@pytest.fixture
def server() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock, "{}:{}".format(*sock.getsockname())


@pytest.mark.parametrize("limit", ["pairs: 1", "pairs_per_client: 1", "new_per_second: 1"])
def test_connection_over_a_limit_is_counted_once_everywhere_and_logged(
    limit: str, tmp_path: Path, server: tuple[socket.socket, str]
) -> None:
    case = Case(CloseReason.BUSY, NAMED, b"", more=f"limits: {{{limit}}}")
    play = LoggedPlay(case.config("tcp"), tmp_path / "log")
    if limit.startswith("new_per"):
        # Within one second of the clock, whenever the test runs.
        play.limits.admit_this_second = lambda *_a, **_k: play.counters[0] <= 1  # type: ignore[method-assign]
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(end) for end in play.joined(*server)]
        second = play.dial()
        second.sendall(instruction(server[1]))
        play.read_end(second)
        second.close()
        play.run_until(lambda: play.closed(CloseReason.BUSY), "end")
        check(play, play.said(), case)
        assert play.said()[0]["refusal"] == f"limit {limit.partition(':')[0]}"
        del first
    play.close()


@pytest.mark.parametrize("limit", ["pairs: 1", "pairs_per_client: 1"])
def test_datagram_over_a_limit_is_counted_once_everywhere_and_logged(limit: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind(("127.0.0.1", 0))
        rule = fixed("{}:{}".format(*upstream.getsockname()))
        case = Case(CloseReason.BUSY, rule, b"", more=f"limits: {{{limit}}}")
        play = DatagramPlay(case.config("udp"))
        first, second = play.client(), play.client()
        first.send(b"x")
        play.settle()
        play.pass_time(3)
        first.send(b"y")  # a client that goes on speaking makes room for nobody
        play.settle()
        second.send(b"x")
        play.run_until(lambda: play.closed(CloseReason.BUSY), "end")
        rule_counter = play.state.rule_counters[0]
        counts = counted(play.counters, play.state.counter, rule_counter, CloseReason.BUSY)
        assert counts == (1, 1, 1)
        word = limit.partition(":")[0].replace("pairs", "sessions")
        (line,) = play.said()
        assert (line["rule"], line["refusal"]) == ("r", f"limit {word}")
        play.close()


def test_refused_client_that_resets_is_still_a_refusal(tmp_path: Path) -> None:
    case = CASES["denied"]()
    play = LoggedPlay(case.config("tcp"), tmp_path / "log")
    client = play.dial()
    client.sendall(case.sent)
    assert play.read_end(client)[1] == "eof"
    assert play.server.flush_ids(None) == [1]  # while it may still read its answer
    check(play, play.said(), case)
    play.close()


def test_client_that_was_served_is_not_refused(
    tmp_path: Path, server: tuple[socket.socket, str]
) -> None:
    play = LoggedPlay(Case(CloseReason.FINISHED, NAMED, b"").config("tcp"), tmp_path / "log")
    client, accepted = play.joined(*server)
    client.close()
    accepted.close()
    play.wait_for_end(CloseReason.FINISHED)
    rule = play.state.rule_counters[0]
    assert counted(play.counters, play.state.counter, rule, CloseReason.FINISHED) == (0, 0, 1)
    play.close()


@pytest.mark.parametrize("reason", CloseReason)
def test_every_reason_counts_as_the_table_says(reason: CloseReason) -> None:
    for rule in (None, 140):
        counters = Counters(Counters.memory(1)).block(0)
        says_no = SAYS_NO[reason]
        assert count_refusal(counters, reason, listener=130, rule=rule) is says_no
        assert counters[130 + ListenerCounter.REFUSED] == says_no
        assert counters[140 + RuleCounter.REFUSED] == (says_no and rule is not None)
        assert sum(counters) == says_no * (1 if rule is None else 2)
