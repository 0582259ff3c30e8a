"""Log lines of workers: one per connection that ends, and not more than anybody can read."""

from __future__ import annotations

import _socket
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from pyforwarder.address import Address
from pyforwarder.datapath.abi import DatapathKind
from pyforwarder.reasons import CloseReason
from pyforwarder.worker.log import MOST_PER_SECOND, ConnectionLog, Log

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client


class Pipe:
    """Where a log is written, and what came out."""

    def __init__(self) -> None:
        self._read_fd, self.fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self.fd, False)

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


@dataclass
class Ended:
    """What the log looks at of a client."""

    owner: Owner
    id: int = 23
    reason: CloseReason = CloseReason.FINISHED
    listener_name: str = "main"
    rule_name: bytes = b"named"
    peer: Address | None = PEER
    destination: Address | None = SERVER
    kind: DatapathKind = DatapathKind.SOCKMAP
    accepted_s: float = 987.5


def closed(log: ConnectionLog, ended: Ended) -> None:
    log.closed(cast("Client", ended), 1023, 7)


# Lines


def test_text_line_names_level_event_and_fields(pipe: Pipe) -> None:
    Log(level="info", form="text", fd=pipe.fd).write("warning", "reloaded", listeners=3, by="hup")
    assert pipe.lines() == ["pyforwarder warning: reloaded listeners=3 by=hup"]


def test_json_line_is_one_object_with_the_time_of_day(pipe: Pipe) -> None:
    Log(level="info", form="json", fd=pipe.fd).write("info", "reloaded", listeners=3)
    (line,) = pipe.lines()
    said = json.loads(line)
    assert 1.6e9 < said.pop("time") < 1e11
    assert said == {"level": "info", "event": "reloaded", "listeners": 3}


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
    assert 0 < len(pipe.lines()) < 3000


def test_reader_that_has_gone_stops_nobody(pipe: Pipe) -> None:
    pipe.close_reader()
    Log(level="info", form="text", fd=pipe.fd).write("info", "to nobody")


# Connections


def test_ended_connection_is_one_line(pipe: Pipe) -> None:
    closed(ConnectionLog(Log(level="info", form="text", fd=pipe.fd)), Ended(Owner()))
    assert pipe.lines() == [
        "pyforwarder info: closed id=23 reason=finished listener=main rule=named "
        "client=192.0.2.1:40000 server=[::1]:9001 datapath=sockmap up_bytes=1023 down_bytes=7 "
        "age_s=12.5"
    ]


def test_what_is_not_known_is_a_dash(pipe: Pipe) -> None:
    ended = Ended(Owner(), peer=None, destination=None, kind=DatapathKind.NONE, rule_name=b"-")
    closed(ConnectionLog(Log(level="info", form="json", fd=pipe.fd)), ended)
    said = json.loads(pipe.lines()[0])
    assert (said["client"], said["server"], said["datapath"], said["rule"]) == (
        "unix:",
        "-",
        "-",
        "-",
    )


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
    assert [line.split(" ", 3)[2:] for line in pipe.lines()] == [
        ["suppressed", "lines=23"],
        [
            "closed",
            "id=23 reason=finished listener=main rule=named client=192.0.2.1:40000 "
            "server=[::1]:9001 datapath=sockmap up_bytes=1023 down_bytes=7 age_s=13.5",
        ],
    ]
    owner.loop.now_s += 1
    closed(log, Ended(owner))
    assert len(pipe.lines()) == 1


def test_fault_of_ours_is_logged_with_its_traceback(
    pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        _socket.inet_aton("no address")
    except OSError as error:
        ConnectionLog(Log(level="error", form="text", fd=pipe.fd)).internal_error(error)
    assert pipe.lines()[0].startswith("pyforwarder error: internal_error error=OSError(")
    assert "test_log.py" in capfd.readouterr().err
