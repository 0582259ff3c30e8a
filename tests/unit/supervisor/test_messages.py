"""What a worker may say to the supervisor, and what becomes of one that says anything else."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.errors import ControlError
from pyforwarder.runtime.channel import Channel, text_to_fd
from pyforwarder.runtime.children import fork
from pyforwarder.runtime.descriptors import close_given
from pyforwarder.supervisor.messages import (
    FROM_CHECKER,
    FROM_FAILOVER,
    FROM_FLEET,
    FROM_HEALTH,
    FROM_PAGE,
    FROM_TOKENS,
    FROM_WORKER,
    RESULTS,
    Answer,
    Ask,
    FaultyMessageError,
    Flush,
    HealthMessage,
    RefusalMessage,
    SetServer,
    TokenClaim,
    understand,
    understand_result,
)
from pyforwarder.supervisor.workers import process
from pyforwarder.supervisor.workers.process import WorkerProcess
from pyforwarder.worker import obeying
from pyforwarder.worker.log import Log
from tests.helpers.malformed_messages import MALFORMED

ANYTHING: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["enlarge", "transparent", 0, 1, -1, 1 << 64, True, float("inf")]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["ask", "n", "result", "error", "number", "why", "x", ""]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


# ---------------------------------------------------------------------------- the table


def test_every_kind_of_message_is_understood() -> None:
    ask = {"ask": "enlarge", "number": 0}
    assert understand(ask, [7], FROM_WORKER) == Ask(ask="enlarge", number=0)
    assert understand({"n": 3, "result": [1]}, [], FROM_WORKER) == Answer(n=3, result=[1])
    claim = TokenClaim(claim="64" * 16, until=1, number=2)
    assert understand(claim.model_dump(), [], FROM_WORKER) == claim
    assert understand({"n": 3, "error": "no"}, [], FROM_WORKER) == RefusalMessage(n=3, error="no")
    verdict = {"upstream": "web", "server": "10.0.0.1:80", "up": False, "why": "timeout"}
    assert understand(verdict, [], FROM_CHECKER) == HealthMessage.model_validate(verdict)
    flush = {"flush": [1, 2], "n": 1, "user": "ann"}
    assert understand(flush, [], FROM_PAGE) == Flush(flush=[1, 2], n=1, user="ann")
    drain = {"server": "web/10.0.0.1:80", "state": "drain", "n": 1, "user": ""}
    assert understand(drain, [], FROM_PAGE) == SetServer.model_validate(drain)
    for change in ({"state": "down"}, {"server": None}, {"flush": [1]}, {"n": -1}, {"why": "x"}):
        with pytest.raises(FaultyMessageError):
            understand({**drain, **change}, [], FROM_PAGE)


@pytest.mark.parametrize(
    "change",
    [
        *({"flush": []}, {"flush": [-1]}, {"flush": "all"}, {"flush": [True]}, {"flush": [1.0]}),
        *({"flush": list(range(10_001))}, {"flush": None}, {"n": "1"}, {"user": None}),
        *({"user": "x" * 64}, {"do": "down"}, {"all": True}, {"result": 1}, {"fds": []}),
    ],
    ids=lambda change: str(change)[:40],
)
def test_the_page_orders_nothing_else(change: dict[str, object]) -> None:
    with pytest.raises(FaultyMessageError):
        understand({"flush": [1], "n": 1, "user": "ann", **change}, [], FROM_PAGE)
    with pytest.raises(FaultyMessageError):
        understand({"flush": [1], "n": 1, "user": "ann"}, [0], FROM_PAGE)


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        ([], 0),
        ({}, 0),
        ({"do": "stop"}, 0),
        ({"ask": "enlarge", "number": 0}, 0),
        ({"ask": "enlarge", "number": 0}, 2),
        ({"ask": "enlarge"}, 1),
        ({"ask": "chmod", "number": 0}, 1),
        ({"ask": ["enlarge"], "number": 0}, 1),
        ({"ask": "enlarge", "number": -1}, 1),
        ({"ask": "enlarge", "number": 1 << 64}, 1),
        ({"ask": "enlarge", "number": True}, 1),
        ({"ask": "enlarge", "number": 1.0}, 1),
        ({"ask": "enlarge", "number": "1"}, 1),
        ({"ask": "enlarge", "number": float("inf")}, 1),
        ({"ask": "enlarge", "number": None}, 1),
        ({"ask": "enlarge", "number": 1, "more": 1}, 1),
        ({"claim": "64" * 16, "until": 1, "number": 1}, 1),
        ({"claim": "64" * 17, "until": 1, "number": 1}, 0),
        ({"claim": "6/" * 16, "until": 1, "number": 1}, 0),
        ({"claim": "64" * 16, "until": 10**13, "number": 1}, 0),
        ({"claim": "64" * 16, "until": 1.5, "number": 1}, 0),
        ({"claim": "64" * 16, "until": 1}, 0),
        ({"claimed": [1], "used": [], "unknown": []}, 0),
        ({"n": 1, "result": 1, "error": ""}, 0),
        ({"n": 1, "result": 1}, 1),
        ({"n": "1", "result": 1}, 0),
        ({"result": 1}, 0),
        ({"n": 1, "error": "x" * 70_000}, 0),
        ({"n": 1, "error": 5}, 0),
    ],
)
def test_what_is_not_in_the_table_is_refused(message: object, descriptors: int) -> None:
    with pytest.raises(FaultyMessageError) as caught:
        understand(message, [0] * descriptors, FROM_WORKER)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("do", "good", "bad"),
    [
        ("settings", [None], [0, "", {}]),
        ("drain", [None], [False]),
        ("stop", [None], [1]),
        ("health", [None], [[]]),
        ("flush", [[], [1, (1 << 64) - 1]], [None, 1, [-1], ["1"], [True], [1.5], {"1": 1}]),
        ("pair_with", [None, 0, 5], [-1, 1 << 64, "5", True, [5]]),
        ("join", [5], [None, -5, "5", 1e9]),
        (
            "upstreams",
            [
                {},
                {"web": {"h:1": {"state": "slow_start", "pairs": 0, "connects": 1, "failures": 2}}},
            ],
            [
                None,
                [],
                {"web": 1},
                {"web": {"h:1": {"state": "\x1b[2J", "pairs": 0, "connects": 1, "failures": 2}}},
                {"web": {"h:1": {"state": "up", "pairs": -1, "connects": 1, "failures": 2}}},
                {"web": {"h:1": {"state": "up", "pairs": 1, "connects": 1}}},
            ],
        ),
    ],
)
def test_a_result_is_what_its_request_has(do: str, good: list[object], bad: list[object]) -> None:
    assert [understand_result(do, one) for one in good] == good
    for one in bad:
        with pytest.raises(FaultyMessageError):
            understand_result(do, one)


def test_every_request_of_the_supervisor_has_a_result() -> None:
    # The requests that a worker obeys.
    source = Path(obeying.__file__).read_text()
    for do in RESULTS:
        assert f'case "{do}":' in source


@given(ANYTHING)
def test_anything_else_raises_nothing_else(message: Any) -> None:
    tables = (FROM_WORKER, FROM_CHECKER, FROM_PAGE, FROM_FLEET, FROM_TOKENS, FROM_FAILOVER)
    for table in (*tables, FROM_HEALTH):
        for descriptors in (0, 1):
            with contextlib.suppress(FaultyMessageError):
                understand(message, [0] * descriptors, table)
    for do in RESULTS:
        with contextlib.suppress(FaultyMessageError):
            understand_result(do, message)


# ---------------------------------------------------------------------------- a worker that says it


@pytest.fixture
def log() -> Iterator[tuple[Log, Callable[[], str]]]:
    fd = os.memfd_create("log")
    log = Log(level="info", form="text", fd=fd)
    yield log, lambda: os.pread(fd, 1 << 20, 0).decode()
    log.close()
    os.close(fd)


class Played(WorkerProcess):
    """A worker that the test plays: no process but one that sleeps, to be ended."""

    def __init__(self, log: Log) -> None:
        ours, self.theirs = Channel.pair()
        self.raw = socket.socket(fileno=os.dup(self.theirs.fileno()))

        def child() -> int:
            signal.pause()
            return 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{process.__name__}.fork", lambda _: fork(child))
            super().__init__(lambda *_: None, lambda: None, log)  # type: ignore[arg-type]
        self.channel.close()
        self.channel = ours

    def gone(self) -> None:
        self.kill()
        self.raw.close()
        self.theirs.close()
        self.close()


@pytest.fixture
def worker(log: tuple[Log, Callable[[], str]]) -> Iterator[Played]:
    before = len(os.listdir("/proc/self/fd"))
    played = Played(log[0])
    yield played
    played.gone()
    assert len(os.listdir("/proc/self/fd")) == before


def send(sock: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_message_that_makes_no_sense_is_its_sender_s_fault(
    worker: Played, name: str, log: tuple[Log, Callable[[], str]]
) -> None:
    data, descriptors = MALFORMED[name]
    read_fd, write_fd = os.pipe()
    worker.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    send(worker.raw, data, [read_fd] * descriptors)
    os.close(read_fd)
    os.close(write_fd)
    with pytest.raises((FaultyMessageError, ValueError)) as caught:
        worker.receive()
    worker.fault(caught.value)
    assert worker.exit_code == -signal.SIGKILL
    said = log[1]()
    assert said.count("worker_fault") == 1
    assert len(said) < 600


@pytest.mark.parametrize("name", sorted(set(MALFORMED) - {"an answer to nothing"}))
def test_a_request_that_is_answered_so_fails_and_ends_the_worker(worker: Played, name: str) -> None:
    data, descriptors = MALFORMED[name]
    worker.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    send(worker.raw, data, [0] * descriptors)
    with pytest.raises(ControlError, match="does not make sense"):
        worker.ask("flush", ids=None)
    assert worker.exit_code == -signal.SIGKILL


@given(st.binary(max_size=64) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_any_message_is_handled_or_refused_and_no_descriptor_stays(data: bytes) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    played = Played(Log(level="error", form="text", fd=null))
    before = len(os.listdir("/proc/self/fd"))
    try:
        for count in (0, 1, 2):
            if not data and not count:
                continue  # that is the end
            send(played.raw, data, [null] * count)
            with contextlib.suppress(FaultyMessageError, ValueError):
                assert played.receive()
            assert len(os.listdir("/proc/self/fd")) == before
    finally:
        played.gone()
        os.close(null)


def test_a_long_answer_is_understood_and_one_that_is_too_long_is_not(
    worker: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(100_000))
    worker.theirs.send({"n": 1, "result": ids})
    assert worker.ask("flush", ids=None) == ids
    monkeypatch.setattr(process, "MOST_BYTES", 500_000)
    worker.theirs.send({"n": 2, "result": ids})
    with pytest.raises(ControlError, match="too long"):
        worker.ask("flush", ids=None)


def test_a_text_that_its_sender_can_still_change_is_not_read(worker: Played) -> None:
    unsealed = os.memfd_create("text")
    os.write(unsealed, b'{"n":1,"result":[]}')
    with open(__file__, "rb") as file:
        for fd in (unsealed, file.fileno()):
            send(worker.raw, b'"in the last descriptor"', [fd])
            with pytest.raises(ValueError, match="no message"):
                worker.receive()
    os.close(unsealed)
    sealed = text_to_fd('{"n":0,"result":[]}')
    send(worker.raw, b'"in the last descriptor"', [sealed])
    os.close(sealed)
    assert worker.receive()


def test_a_worker_that_reads_no_answers_holds_nobody_up(worker: Played) -> None:
    # One that waits does so for ever.
    worker.channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bytes(16))
    with socket.socket() as sock:
        asked = 0
        while not worker.is_deaf:
            worker.theirs.send({"ask": "transparent", "number": asked}, [sock.fileno()])
            assert worker.receive()
            asked += 1
        # It is heard again once it has read, and has lost no answer.
        worker.theirs.send({"ask": "transparent", "number": asked}, [sock.fileno()])
        asked += 1
        answers: list[dict[str, Any]] = []
        while len(answers) < asked:
            received = worker.theirs.receive()
            assert received is not None
            answers.append(received[0])
            assert worker.receive()
        assert answers == [{"granted": False, "number": number} for number in range(asked)]


def test_a_worker_that_asks_and_asks_is_told_from_one_that_asks(worker: Played) -> None:
    assert [worker.has_said_much(100.0) for _ in range(2001)] == [False] * 2000 + [True]
    assert not worker.has_said_much(100.2)


# ---------------------------------------------------------------------------- closing what it sent


def lingering() -> tuple[int, list[socket.socket]]:
    """A socket whose last close would wait for a minute, and what keeps its peer from reading."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    return sock.detach(), [listener, peer]


def test_closing_what_was_sent_does_not_linger() -> None:
    direct, kept = lingering()
    hidden, more = lingering()
    # In the queue of a unix socket, which is what is sent.
    outer, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    send(inner, b"x", [hidden])
    os.close(hidden)
    inner.close()
    started_s = time.monotonic()
    close_given([direct, outer.detach()])
    assert time.monotonic() - started_s < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    for sock in (*kept, *more):
        sock.close()
