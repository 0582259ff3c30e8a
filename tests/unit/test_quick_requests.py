"""Answers over a connection that is kept: what is understood, and what is none."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.fleet.quick_requests import AnswerFault, Line, TooLongError

MOST: Final = 1000
OK: Final = b"HTTP/1.1 200 OK\r\n"


class Member:
    """Answers each request with the next text; None: it closes the connection instead."""

    def __init__(self, *answers: bytes | None, ends: bool = False) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._answers = list(answers)
        self._ends = ends  # the connection, behind each answer
        self.asked: list[bytes] = []
        self.connections = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._answers:
            connection, _ = self._listening.accept()
            self.connections += 1
            with connection, connection.makefile("rb") as requests:
                while self._answers and self._serve(connection, requests):
                    pass

    def _serve(self, connection: socket.socket, requests: object) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line: bytes = requests.readline()  # type: ignore[attr-defined]
            if not line:
                return False
            head += line
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        self.asked.append(head + requests.read(length))  # type: ignore[attr-defined]
        answer = self._answers.pop(0)
        if answer is None:
            return False
        connection.sendall(answer)
        return not self._ends

    def close(self) -> None:
        self._thread.join(30.0)
        self._listening.close()


@contextlib.contextmanager
def asked(member: Member) -> Iterator[Line]:
    line = Line(member.endpoint, None)
    try:
        yield line
    finally:
        line.close()
        member.close()


def post(line: Line, body: bytes = b"{}", authorization: str = "") -> tuple[int, bytes]:
    return line.post("/v3/x", body, authorization=authorization, timeout_s=30.0, most_bytes=MOST)


def test_a_connection_is_kept_for_all_requests() -> None:
    member = Member(
        OK + b"Content-Type: x\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 404\r\ntransfer-encoding:chunked\r\n\r\n"
        b"2\r\nab\r\nA;x=y\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
        OK + b"Content-Length: 0\r\n\r\n",
    )
    with asked(member) as line:
        assert post(line, b"one", "token") == (200, b"abc")
        assert post(line) == (404, b"ab0123456789")
        assert post(line) == (200, b"")
    host = member.endpoint.removeprefix("http://").encode()
    assert member.connections == 1
    head, _, body = member.asked[0].partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    assert first == b"POST /v3/x HTTP/1.1"
    assert {b"Host: " + host, b"Content-Type: application/json", b"Authorization: token"} < {
        *headers
    }
    assert body == b"one"
    assert b"Authorization" not in member.asked[1]


def test_one_that_was_closed_meanwhile_is_made_anew() -> None:
    said = OK + b"Content-Length: 1\r\n\r\nx"
    member = Member(said, said.replace(b"1.1", b"1.0"), said, ends=True)
    with asked(member) as line:
        for _ in range(3):
            assert post(line) == (200, b"x")
            # The end has come before the next request.
            opened = line._connection.sock
            if opened is not None:
                assert opened.recv(1, socket.MSG_PEEK) == b""
    assert member.connections == 3


FAULTS: Final = [
    None,
    b"?\r\n\r\n",
    b"HTTP/1.1 x\r\n\r\n",
    OK + b"\r\n",  # no length
    OK + b"Content-Length: -1\r\n\r\n",
    OK + b"Transfer-Encoding: gzip\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n?\r\na\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    OK + 101 * b"x: y\r\n" + b"\r\n",
    OK + b"x: " + 70_000 * b"y" + b"\r\n\r\n",
]
TOO_LONG: Final = [
    OK + b"Content-Length: 1001\r\n\r\n" + bytes(1001),
    OK
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + 2 * (b"258\r\n" + bytes(600) + b"\r\n")
    + b"0\r\n\r\n",
]


@pytest.mark.parametrize("answer", [*FAULTS, *TOO_LONG])
def test_what_is_no_answer_is_a_fault_and_the_next_one_is_another_connections(
    answer: bytes | None,
) -> None:
    member = Member(answer, OK + b"Content-Length: 2\r\n\r\nok")
    with asked(member) as line:
        with pytest.raises(TooLongError if answer in TOO_LONG else AnswerFault):
            post(line)
        assert post(line) == (200, b"ok")
    assert member.connections == 2


@given(st.binary(max_size=200))
def test_nothing_else_is_raised(answer: bytes) -> None:
    for said in (answer, OK + answer):
        member = Member(said, ends=True)
        with asked(member) as line, contextlib.suppress(OSError):
            post(line)


def test_a_member_that_says_nothing_is_waited_for_no_longer_than_the_caller_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = Line(f"http://127.0.0.1:{listening.getsockname()[1]}", None)
        with pytest.raises(TimeoutError):
            line.post("/", b"", authorization="", timeout_s=0.01, most_bytes=MOST)
        assert line._connection.sock is None
