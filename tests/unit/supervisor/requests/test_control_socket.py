"""The control socket: it answers any bytes, forgets nobody, and holds up nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pyforwarder.errors import ConfigError, ControlError, InternalError, UsageError
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.requests.control_socket import (
    ACCEPT_PAUSE_S,
    CLIENT_TIMEOUT_S,
    MOST_CLIENTS,
    MOST_REQUEST_BYTES,
    ControlServer,
)

BIG: Final = "x" * (4 << 20)


class Stage:
    """A control server whose loop turns when the test says so."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "control"
        self.loop = Loop()
        self.served: list[dict[str, Any]] = []
        self.fds: list[list[int]] = []
        self.server = ControlServer(self.loop, self.path, self.obey)
        self._opened: list[socket.socket] = []

    def obey(self, request: dict[str, Any], fds: list[int]) -> object:
        self.served.append(request)
        self.fds.append(list(fds))
        match request["do"]:
            case "big":
                return BIG
            case "refuse":
                raise ControlError("no")
            case "usage":
                raise UsageError("what?")
            case "config":
                raise ConfigError("bad", path="a.b", line=3)
            case "fail":
                raise InternalError("ZeroDivisionError: division by zero")
        return request.get("n")

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.settimeout(scaled_s(5))
        self._opened.append(sock)
        return sock

    def turn(self, times: int = 4) -> None:
        for _ in range(times):
            self.loop.run_once(0)

    def ask(self, sock: socket.socket, line: bytes) -> dict[str, Any]:
        sock.sendall(line)
        self.turn()
        return self.answer(sock)

    def answer(self, sock: socket.socket) -> dict[str, Any]:
        said = b""
        while not said.endswith(b"\n"):
            chunk = sock.recv(1 << 20)
            assert chunk, said
            said += chunk
            self.turn()
        answer = json.loads(said)
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        self.server.close()
        for sock in self._opened:
            sock.close()
        self.loop.dispose()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()
    assert not stage.path.exists()


def test_socket_is_the_owners_alone(stage: Stage) -> None:
    assert stat.S_IMODE(stage.path.stat().st_mode) == 0o600


def test_request_is_answered_and_the_next_one_too(stage: Stage) -> None:
    sock = stage.dial()
    for n in range(3):
        line = json.dumps({"do": "echo", "n": n}).encode() + b"\n"
        assert stage.ask(sock, line) == {"ok": True, "result": n}


def test_request_in_pieces_is_one_request(stage: Stage) -> None:
    sock = stage.dial()
    for byte in b'{"do": "echo", "n": 2':
        sock.sendall(bytes([byte]))
        stage.turn()
    assert stage.served == []
    assert stage.ask(sock, b"3}\n")["result"] == 23


def test_requests_that_come_at_once_are_answered_one_after_the_other(stage: Stage) -> None:
    sock = stage.dial()
    sock.sendall(b"".join(b'{"do": "echo", "n": %d}\n' % n for n in range(7)))
    stage.turn(1)  # accepted
    stage.turn(1)
    assert 1 <= len(stage.served) <= 2  # others get their turn in between
    stage.turn(10)
    assert [json.loads(line)["result"] for line in sock.recv(4096).splitlines()] == [*range(7)]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"banana\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"do": 1}\n',
        b'{"do": null}\n',
        b'"do"\n',
        b"9" * 5000 + b"\n",  # more digits than int() takes
        b"[" * 60_000 + b"\n",
        b'{"do":' * 10_000 + b"\n",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_what_is_no_request_is_a_usage_error(stage: Stage, line: bytes) -> None:
    sock = stage.dial()
    answer = stage.ask(sock, line)
    assert (answer["ok"], answer["kind"]) == (False, "usage")
    assert stage.served == []
    assert stage.ask(sock, b'{"do": "echo", "n": 1}\n')["result"] == 1


@pytest.mark.parametrize(
    ("do", "kind"),
    [("refuse", "refused"), ("usage", "usage"), ("config", "config"), ("fail", "internal")],
)
def test_error_says_of_which_kind_it_is(stage: Stage, do: str, kind: str) -> None:
    answer = stage.ask(stage.dial(), json.dumps({"do": do}).encode() + b"\n")
    assert (answer["ok"], answer["kind"]) == (False, kind)
    if kind == "config":
        assert (answer["line"], answer["path"]) == (3, "a.b")


def test_request_that_is_too_long_is_refused_and_takes_no_room(stage: Stage) -> None:
    sock = stage.dial()
    sock.setblocking(False)
    sent = 0
    for _ in range(1000):  # without end, without a newline
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(b"x" * MOST_REQUEST_BYTES)
        stage.turn(1)
    assert sent > 100 * MOST_REQUEST_BYTES
    (client,) = stage.server._clients.values()
    assert len(client.incoming) <= MOST_REQUEST_BYTES
    sock.settimeout(scaled_s(5))
    assert stage.answer(sock)["error"] == "request too long"
    assert stage.served == []


def test_reader_that_is_stuck_holds_up_nobody(stage: Stage) -> None:
    stuck = stage.dial()
    stuck.sendall(b'{"do": "big"}\n')
    stage.turn()
    other = stage.dial()
    assert stage.ask(other, b'{"do": "echo", "n": 1}\n')["result"] == 1
    # It may still have all of its answer, for a while.
    assert stage.answer(stuck)["result"] == BIG
    # The next time it does not come to that.
    stuck.sendall(b'{"do": "big"}\n')
    stage.turn()
    stage.loop.deadlines.run_expired(
        stage.loop.now_s + CLIENT_TIMEOUT_S + 1, lambda *_: pytest.fail("expired() raised")
    )
    assert stage.server._clients == {}
    assert len(b"".join(iter(lambda: stuck.recv(1 << 20), b""))) < len(BIG)


def test_no_more_clients_than_there_is_room_for(stage: Stage) -> None:
    first = [stage.dial() for _ in range(MOST_CLIENTS)]
    stage.turn(MOST_CLIENTS + 1)
    late = stage.dial()
    stage.turn()
    assert late.recv(1) == b""
    first[0].close()
    stage.turn()
    assert stage.ask(stage.dial(), b'{"do": "echo", "n": 1}\n')["result"] == 1


def test_descriptors_come_with_their_request_and_are_closed_after_it(stage: Stage) -> None:
    sock = stage.dial()
    read_fd, write_fd = os.pipe()
    socket.send_fds(sock, [b'{"do": "echo", "n": 1}\n'], [write_fd])
    os.close(write_fd)
    stage.turn()
    assert stage.answer(sock)["result"] == 1
    assert len(stage.fds[0]) == 1
    assert os.read(read_fd, 1) == b""  # nobody has the other end
    os.close(read_fd)


def test_client_that_leaves_in_the_middle_leaves_nothing(stage: Stage) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for said in (b"", b'{"do": ', b'{"do": "big"}\n', b'{"do": "big"}\n{"do": "big"}\n'):
        sock = stage.dial()
        sock.sendall(said)
        sock.close()
        stage.turn(8)
    assert stage.server._clients == {}
    assert len(os.listdir("/proc/self/fd")) == before


def test_want_of_descriptors_is_survived(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = stage.dial()
    sock.sendall(b'{"do": "echo", "n": 1}\n')
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        stage.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert stage.served == []
    stage.turn()
    assert stage.served == []  # it waits, and does not spin
    later_s = stage.loop.now_s + ACCEPT_PAUSE_S + 1
    monkeypatch.setattr("time.monotonic", lambda: later_s)
    stage.turn()
    assert stage.answer(sock)["result"] == 1
