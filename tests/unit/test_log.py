"""Log lines of workers: one per connection that ends, and not more than anybody can read."""

from __future__ import annotations

import _socket
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from pyforwarder.core.address import Address, HostPort
from pyforwarder.core.first_packet.outcome import Facts, Route, Rule
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.worker.log import (
    MOST_PER_SECOND,
    USUAL_OF_SESSIONS,
    ConnectionLog,
    Log,
    not_blocking,
)

if TYPE_CHECKING:
    from pyforwarder.runtime.limits import Limit
    from pyforwarder.worker.client import Client


class Pipe:
    """Where a log is written, and what came out; blocking at the writer's end, as pipes are."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self.fd = not_blocking(self._write_fd)

    def lines(self) -> list[str]:
        """What was written since the last look."""
        said = b""
        while True:
            try:
                said += os.read(self._read_fd, 1 << 16)
            except BlockingIOError:
                return said.decode().splitlines()

    def close_reader(self) -> None:
        os.close(self._read_fd)
        self._read_fd = -1

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_fd)
        if self._read_fd >= 0:
            os.close(self._read_fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@dataclass
class Clock:
    now_s: float = 1000.0


@dataclass
class Owner:
    loop: Clock = field(default_factory=Clock)


PEER = Address("192.0.2.1", 40000)
SERVER = Address("::1", 9001)
SOURCE = Address("::1", 50000)


@dataclass
class Ended:
    """What the log looks at of a client."""

    owner: Owner
    over_limit: Limit | None = None
    id: int = 23
    reason: CloseReason = CloseReason.FINISHED
    listener_name: str = "main"
    rule_name: bytes = b"named"
    peer: Address | None = PEER
    destination: Address | None = SERVER
    kind: DatapathKind = DatapathKind.SOCKMAP
    accepted_s: float = 987.5
    pair_reason: PairReason = PairReason.BEST
    facts: Facts = ()
    route: Route | None = None
    refusal: str = ""
    has_sent_nothing: bool = False

    def source_address(self) -> Address | None:
        return SOURCE if self.destination else None


def closed(log: ConnectionLog, ended: Ended) -> None:
    log.closed(cast("Client", ended), (1023, 3), (7, 1))


# Lines


def test_text_line_names_level_event_and_fields(pipe: Pipe) -> None:
    Log(level="info", form="text", fd=pipe.fd).write("warning", "reloaded", listeners=3, by="hup")
    assert pipe.lines() == ["pyforwarder warning: reloaded listeners=3 by=hup"]


def test_json_line_is_one_object_with_the_time_of_day(pipe: Pipe) -> None:
    Log(level="info", form="json", fd=pipe.fd).write("info", "reloaded", listeners=3)
    (line,) = pipe.lines()
    said = json.loads(line)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said.pop("time"))
    assert said == {"level": "info", "event": "reloaded", "listeners": 3}


def test_a_line_names_the_instance(pipe: Pipe) -> None:
    for form in ("text", "json"):
        log = Log(level="info", form=form, fd=pipe.fd, instance="web")
        log.write("info", "reloaded", listeners=3)
    text, line = pipe.lines()
    assert text == "pyforwarder info: reloaded listeners=3 instance=web"
    assert json.loads(line)["instance"] == "web"


@pytest.mark.parametrize("form", ["text", "json"])
def test_line_break_in_a_field_makes_no_second_line(pipe: Pipe, form: str) -> None:
    Log(level="info", form=form, fd=pipe.fd).write("info", "x", name="a\nfake error: b")
    assert len(pipe.lines()) == 1


def test_lines_below_the_level_are_not_written(pipe: Pipe) -> None:
    log = Log(level="warning", form="text", fd=pipe.fd)
    for level in ("debug", "info", "warning", "error"):
        log.write(level, level)
    assert pipe.lines() == ["pyforwarder warning: warning", "pyforwarder error: error"]


def test_full_pipe_loses_lines_and_stops_nobody(pipe: Pipe) -> None:
    log = Log(level="info", form="text", fd=pipe.fd)
    for _ in range(3000):
        log.write("info", "x" * 100)
    before = pipe.lines()
    assert 0 < len(before) < 3000
    log.write("info", "y")
    assert pipe.lines() == [
        f"pyforwarder warning: log_lines_lost lines={3000 - len(before)}",
        "pyforwarder info: y",
    ]


def test_full_pipe_that_cannot_be_opened_anew_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(path, flags)

    monkeypatch.setattr("pyforwarder.worker.log.os.open", refuse)
    pipe = Pipe()
    try:
        assert os.get_blocking(pipe.fd)
        log = Log(level="info", form="text", fd=pipe.fd)
        for _ in range(3000):
            log.write("info", "x" * 100)
        assert 0 < len(pipe.lines()) < 3000
    finally:
        pipe.close()


def test_full_socket_loses_lines_and_stops_nobody() -> None:
    reader, writer = socket.socketpair()  # journald gives a unix stream socket
    with reader, writer:
        fd = not_blocking(writer.fileno())
        log = Log(level="info", form="text", fd=fd)
        for _ in range(20_000):
            log.write("info", "x" * 100)
        reader.setblocking(False)
        assert 0 < len(reader.recv(16 << 20).splitlines()) < 20_000
        assert writer.getblocking()
        log.close()
        os.close(fd)


def test_the_open_file_that_others_share_stays_as_it_was() -> None:
    read_fd, write_fd = os.pipe()
    fd = not_blocking(write_fd)
    assert (os.get_blocking(write_fd), os.get_blocking(fd)) == (True, False)
    for each in (read_fd, write_fd, fd):
        os.close(each)


def test_text_line_tells_the_time_where_nobody_else_does(pipe: Pipe) -> None:
    Log(level="info", form="text", fd=pipe.fd, is_timed=True).write("info", "reloaded")
    (line,) = pipe.lines()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z pyforwarder info: reloaded", line)


def test_text_value_with_blanks_is_quoted_and_commands_no_terminal(pipe: Pipe) -> None:
    log = Log(level="info", form="text", fd=pipe.fd)
    log.write("info", "x", a="two words", b="", c='"', d="\x1b[31m", e="k=v")
    assert pipe.lines() == ['pyforwarder info: x a="two words" b="" c="\\"" d=\\033[31m e="k=v"']


def test_another_level_and_form_count_from_then_on(pipe: Pipe) -> None:
    log = Log(level="warning", form="text", fd=pipe.fd)
    log.write("info", "unseen")
    log.change(level="info", form="json")
    log.write("info", "seen")
    assert [json.loads(line)["event"] for line in pipe.lines()] == ["seen"]


def test_reader_that_has_gone_stops_nobody(pipe: Pipe) -> None:
    pipe.close_reader()
    Log(level="info", form="text", fd=pipe.fd).write("info", "to nobody")


# Connections


def test_ended_connection_is_one_line(pipe: Pipe) -> None:
    closed(ConnectionLog(Log(level="info", form="text", fd=pipe.fd)), Ended(Owner()))
    assert pipe.lines() == [
        "pyforwarder info: closed id=23 reason=finished listener=main rule=named "
        "client=192.0.2.1:40000 source=[::1]:50000 server=[::1]:9001 datapath=sockmap "
        'why="the best this host and this pair allow" '
        "up_bytes=1023 down_bytes=7 up_packets=3 down_packets=1 age_s=12.5"
    ]


def test_what_is_not_known_is_a_dash(pipe: Pipe) -> None:
    ended = Ended(Owner(), peer=None, destination=None, kind=DatapathKind.NONE, rule_name=b"-")
    closed(ConnectionLog(Log(level="info", form="json", fd=pipe.fd)), ended)
    said = json.loads(pipe.lines()[0])
    names = ("client", "source", "server", "datapath", "rule")
    assert [said[name] for name in names] == ["unix:", "-", "-", "-", "-"]


def test_another_level_counts_for_connections_too(pipe: Pipe) -> None:
    log = ConnectionLog(Log(level="warning", form="text", fd=pipe.fd))
    closed(log, Ended(Owner()))
    log.change(level="info", form="json")
    closed(log, Ended(Owner()))
    assert [json.loads(line)["event"] for line in pipe.lines()] == ["closed"]
    log.change(level="warning", form="json")
    closed(log, Ended(Owner()))
    assert pipe.lines() == []


RULE = Rule("named", 0, None, None, None, None)


@pytest.mark.parametrize(
    ("to", "named", "destination", "fields"),
    [
        (HostPort("a.test", 9), True, SERVER, {"asked": "a.test:9", "resolved": "[::1]:9001"}),
        (HostPort("a.test", 9), True, None, {"asked": "a.test:9"}),
        (SERVER, True, SERVER, {"asked": "[::1]:9001"}),
        ("web", False, SERVER, {"upstream": "web"}),
        (SERVER, False, SERVER, {}),
    ],
)
def test_a_line_says_what_was_asked_for_and_what_it_became(
    pipe: Pipe,
    to: HostPort | Address | str,
    named: bool,
    destination: Address | None,
    fields: dict[str, str],
) -> None:
    ended = Ended(Owner(), destination=destination, route=Route(RULE, to, 0, None, named))
    closed(ConnectionLog(Log(level="info", form="json", fd=pipe.fd)), ended)
    said = json.loads(pipe.lines()[0])
    assert {name: said[name] for name in AUDIT if name in said} == fields


AUDIT = ("sni", "host", "user", "key", "asked", "resolved", "upstream", "refusal")


def test_what_a_client_said_is_a_field_and_no_more_than_that(pipe: Pipe) -> None:
    ended = Ended(Owner(), facts=(("sni", "a\n\x9b b"), ("user", "x=1")), refusal="no \x1b[m")
    ended.reason = CloseReason.DENIED
    closed(ConnectionLog(Log(level="info", form="text", fd=pipe.fd)), ended)
    (line,) = pipe.lines()
    assert line.isascii()
    assert line.isprintable()
    assert ' sni="' in line
    assert ' user="x=1" refusal="' in line


@pytest.mark.parametrize("reason", [CloseReason.CLIENT_GONE, CloseReason.CLIENT_RESET])
def test_a_connection_that_sent_nothing_has_a_line_only_if_that_is_wanted(
    pipe: Pipe, reason: CloseReason
) -> None:
    silent = Ended(Owner(), reason=reason, has_sent_nothing=True)
    log = ConnectionLog(Log(level="info", form="text", fd=pipe.fd))
    closed(log, silent)
    closed(log, Ended(Owner(), reason=CloseReason.TIMEOUT, has_sent_nothing=True))
    assert [line.split()[4] for line in pipe.lines()] == ["reason=timeout"]
    closed(log, Ended(Owner(), reason=reason))
    log.change(level="info", form="text", null_connections=True)
    closed(log, silent)
    log.change(level="debug", form="text")
    closed(log, silent)
    assert len(pipe.lines()) == 3


def test_steps_are_lines_at_level_debug(pipe: Pipe) -> None:
    log = ConnectionLog(Log(level="info", form="text", fd=pipe.fd))
    assert (log.tells, log.tells_steps) == (True, False)
    log.change(level="debug", form="text")
    assert log.tells_steps
    log.step(cast("Client", Ended(Owner())), "routed", rule="named")
    assert pipe.lines() == [
        "pyforwarder debug: routed id=23 listener=main client=192.0.2.1:40000 rule=named"
    ]
    log.change(level="warning", form="text")
    assert (log.tells, log.tells_steps) == (False, False)


@pytest.mark.parametrize("reason", CloseReason)
def test_faults_of_ours_and_overload_are_warnings(pipe: Pipe, reason: CloseReason) -> None:
    log = ConnectionLog(Log(level="warning", form="text", fd=pipe.fd))
    closed(log, Ended(Owner(), reason=reason))
    is_warning = reason in (CloseReason.INTERNAL, CloseReason.BACKLOG, CloseReason.BUSY)
    assert len(pipe.lines()) == is_warning


def test_flood_of_connections_is_counted_instead_of_written(pipe: Pipe) -> None:
    owner = Owner()
    log = ConnectionLog(Log(level="info", form="text", fd=pipe.fd))
    written = []
    for _ in range(MOST_PER_SECOND + 23):
        closed(log, Ended(owner))
        written += pipe.lines()
    assert len(written) == MOST_PER_SECOND
    owner.loop.now_s += 1
    closed(log, Ended(owner))
    suppressed, line = pipe.lines()
    assert suppressed == "pyforwarder info: suppressed lines=23"
    assert line.startswith("pyforwarder info: closed id=23 ")
    owner.loop.now_s += 1
    closed(log, Ended(owner))
    assert len(pipe.lines()) == 1


def test_fault_of_ours_is_logged_with_its_traceback(pipe: Pipe) -> None:
    try:
        _socket.inet_aton("no address")
    except OSError as error:
        ConnectionLog(Log(level="error", form="text", fd=pipe.fd)).internal_error(error)
    said, *where = pipe.lines()
    assert said.startswith('pyforwarder error: internal_error error="OSError: ')
    assert all(line.startswith("pyforwarder error: traceback line=") for line in where)
    assert any("test_log.py" in line for line in where)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("warning", 1)])
def test_what_the_verifier_said_is_written_at_level_debug_alone(
    pipe: Pipe, form: str, level: str, lines: int
) -> None:
    error = LoadError("load show()", cause=Refusal.VERIFIER, log="0: (b7) r0 = 0\n\nR1 is bad\n")
    Log(level=level, form=form, fd=pipe.fd).load_error("no_view", error)
    said = pipe.lines()
    assert len(said) == lines
    assert "R1 is bad" not in said[0]
    assert ("R1 is bad" in said[-1]) is (level == "debug")


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_of_a_value_are_joined(pipe: Pipe, form: str) -> None:
    log = Log(level="info", form=form, fd=pipe.fd)
    log.write("info", "x", reason="first\n   second\r\n\n third\u2028")
    (line,) = pipe.lines()
    assert "first; second; third" in line
    assert "\\" not in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_long_value_is_cut(pipe: Pipe, form: str) -> None:
    Log(level="info", form=form, fd=pipe.fd).write("info", "x", reason="a" * 100_000)
    (line,) = pipe.lines()
    assert len(line) < 1200
    assert "a ..." in line


# One of N


def reasons_of(pipe: Pipe) -> list[str]:
    return [json.loads(line)["reason"] for line in pipe.lines()]


def test_one_of_so_many_has_a_line_and_each_that_went_wrong(pipe: Pipe) -> None:
    log = ConnectionLog(Log(level="info", form="json", fd=pipe.fd), sample=5)
    for number in range(12):
        closed(log, Ended(Owner(), id=number))
    lines = [json.loads(line) for line in pipe.lines()]
    assert [(line["id"], line["one_of"]) for line in lines] == [(0, 5), (5, 5), (10, 5)]
    others = [reason for reason in CloseReason if reason is not CloseReason.FINISHED]
    for reason in others:
        closed(log, Ended(Owner(), reason=reason))
    lines = [json.loads(line) for line in pipe.lines()]
    assert [line["reason"] for line in lines] == [reason.value for reason in others]
    assert not any("one_of" in line for line in lines)


def test_sessions_that_were_silent_are_the_usual_ones(pipe: Pipe) -> None:
    log = ConnectionLog(
        Log(level="info", form="json", fd=pipe.fd), sample=3, usual=USUAL_OF_SESSIONS
    )
    for _ in range(6):
        closed(log, Ended(Owner(), reason=CloseReason.IDLE))
        closed(log, Ended(Owner(), reason=CloseReason.REFUSED))
    assert reasons_of(pipe).count("idle") == 2


def test_another_sample_holds_from_the_next_line_on(pipe: Pipe) -> None:
    log = ConnectionLog(Log(level="info", form="json", fd=pipe.fd), sample=1000)
    for _ in range(10):
        closed(log, Ended(Owner()))
    for _ in range(2):  # a reload that changes nothing begins nothing anew
        log.change(level="info", form="json", sample=1000)
        closed(log, Ended(Owner()))
    assert reasons_of(pipe) == ["finished"]
    log.change(level="info", form="json")
    closed(log, Ended(Owner()))
    assert reasons_of(pipe) == ["finished"]


def test_a_caller_that_has_picked_before_asks_once(pipe: Pipe) -> None:
    log = ConnectionLog(Log(level="info", form="json", fd=pipe.fd), sample=2)
    for _ in range(4):
        if log.picks(CloseReason.FINISHED):
            log.closed(cast("Client", Ended(Owner())), (0, 0), (0, 0), is_picked=True)
    assert len(pipe.lines()) == 2
    log.change(level="warning", form="json", sample=2)
    assert not any(log.picks(CloseReason.FINISHED) for _ in range(4))


def test_lines_together_are_whole_and_in_order(pipe: Pipe) -> None:
    log = Log(level="info", form="text", fd=pipe.fd)
    with log.together():
        for number in range(1000):
            log.write("info", "one", n=number)
        assert pipe.lines() != []  # as many as a pipe takes whole, from time to time
    log.write("info", "last")
    with log.together():
        log.write("info", "more")
    assert pipe.lines()[-2:] == ["pyforwarder info: last", "pyforwarder info: more"]


def test_lines_together_that_are_lost_are_counted(pipe: Pipe) -> None:
    log = Log(level="info", form="text", fd=pipe.fd)
    with log.together():
        for number in range(10_000):
            log.write("info", "one", n=number, padding="x" * 80)
    kept = pipe.lines()
    log.write("info", "after")
    lost, after = pipe.lines()
    assert after == "pyforwarder info: after"
    assert lost == f"pyforwarder warning: log_lines_lost lines={10_000 - len(kept)}"
