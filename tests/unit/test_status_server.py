"""HTTP for scrapes: what is answered, and which connections end when there are too many."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

from pyforwarder.runtime.loop import Loop
from pyforwarder.status.http import Answer, Request, body_length, read_head
from pyforwarder.status.metrics import Application, MetricsSite
from pyforwarder.status.server import (
    ANSWER_S,
    LATER_S,
    MOST_CONNECTIONS,
    MOST_REQUEST_BYTES,
    REQUEST_S,
    Server,
    Site,
    Visitor,
)
from tests.helpers.status import request

REGISTRY = CollectorRegistry()
Gauge("answer", "To everything.", registry=REGISTRY).set(42)
APPLICATION = make_wsgi_app(REGISTRY)


class Alone:
    """A connection that nobody keeps."""

    host = "127.0.0.1"

    def wait(self, gone: object) -> None:
        raise AssertionError("nothing is answered later")

    def finish(self, answer: Answer) -> None:
        raise AssertionError("nothing is answered later")

    def end(self) -> None:
        raise AssertionError("nothing is answered later")

    def stream(self, *_: object) -> None:
        raise AssertionError("nothing is answered in pieces")

    def send(self, piece: bytes) -> bool:
        raise AssertionError("nothing is answered in pieces")


def answer_to(head: bytes, application: Application) -> bytes:
    """What the site says to a request, or HTTP itself."""
    request = read_head(head)
    if isinstance(request, Answer):
        return request.encode()
    answer = MetricsSite(application).answer(request, Alone())
    return answer.encode(without_body=request.method == "HEAD")


def ask(first_line: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    lines = "\r\n".join([first_line, "Host: x", *headers])
    head, _, body = answer_to(f"{lines}\r\n\r\n".encode(), APPLICATION).partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    return int(status.split()[1]), dict(field.split(": ", 1) for field in fields), body


def test_metrics_are_at_their_path_and_nowhere_else() -> None:
    status, headers, body = ask("GET /metrics HTTP/1.1")
    assert (status, int(headers["Content-Length"])) == (200, len(body))
    assert headers["Content-Type"].startswith("text/plain")
    assert headers["Connection"] == "close"
    assert b"\nanswer 42.0\n" in body
    assert ask("GET /metrics?x=y HTTP/1.0")[2] == body
    for path in ("/", "/metrics/", "/favicon.ico", "/../metrics", "*"):
        assert ask(f"GET {path} HTTP/1.1")[0] == 404, path


def test_head_is_answered_as_get_without_the_body() -> None:
    _, expected, body = ask("GET /metrics HTTP/1.1")
    status, headers, nothing = ask("HEAD /metrics HTTP/1.1")
    assert (status, nothing) == (200, b"")
    assert headers["Content-Length"] == str(len(body))
    assert {**headers, "Date": ""} == {**expected, "Date": ""}
    assert ask("HEAD /nowhere HTTP/1.1")[::2] == (404, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(method: str) -> None:
    status, headers, body = ask(f"{method} /metrics HTTP/1.1", "Content-Length: 5")
    assert (status, headers["Allow"], body) == (405, "GET, HEAD, OPTIONS", b"")


def test_other_requests_are_answered_too() -> None:
    assert ask("OPTIONS /metrics HTTP/1.1")[::2] == (204, b"")
    assert ask("BREW /metrics HTTP/1.1")[0] == 501
    assert ask("GET /metrics HTTP/9.9")[0] == 505
    assert ask("GET /metrics ")[0] in (200, 400)
    assert b"400" in answer_to(b"\x9b[31m GET\r\n\r\n", APPLICATION)


class Play:
    """A server in virtual time, and its clients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Site | None = None) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        self.loop = Loop()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.server = Server(self.loop, self.listening, site or MetricsSite(APPLICATION))
        self.clients: list[socket.socket] = []

    def dial(self, host: str = "127.0.0.1", said: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.listening.getsockname(), source_address=(host, 0))
        self.clients.append(sock)
        sock.sendall(said)
        self.pass_time(0.0)
        return sock

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        for _ in range(3):
            self.loop.run_once(0.0)

    def is_open(self, sock: socket.socket) -> bool:
        sock.setblocking(False)
        try:
            return sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True

    def close(self) -> None:
        for sock in (*self.clients, self.listening):
            sock.close()
        self.server.close_all()
        self.loop.run_once(0.0)
        self.loop.dispose()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    with playing(monkeypatch) as play:
        yield play


@contextlib.contextmanager
def playing(monkeypatch: pytest.MonkeyPatch, site: Site | None = None) -> Iterator[Play]:
    before = sorted(os.listdir("/proc/self/fd"))
    play = Play(monkeypatch, site)
    yield play
    play.close()
    assert play.loop.deadlines.next_s() is None
    assert sorted(os.listdir("/proc/self/fd")) == before


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_request_in_pieces_is_answered_once_it_is_whole(play: Play) -> None:
    sock = play.dial(said=GET[:5])
    for at in range(5, len(GET)):
        play.pass_time(0.01)
        sock.sendall(GET[at : at + 1])
    play.pass_time(0.0)
    assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
    assert sock.recv(1) == b""
    sock.close()
    play.pass_time(0.0)
    assert play.server._connections == {}


def test_silence_and_a_byte_now_and_then_end_at_the_deadline(play: Play) -> None:
    silent, slow = play.dial(), play.dial(said=b"G")
    for _ in range(4):
        play.pass_time(REQUEST_S / 5)
        slow.sendall(b"G")
    assert play.is_open(silent)
    assert play.is_open(slow)
    play.pass_time(REQUEST_S / 5)
    assert not play.is_open(silent)
    assert not play.is_open(slow)


def test_a_request_without_end_is_too_long(play: Play) -> None:
    sock = play.dial(said=b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * (MOST_REQUEST_BYTES // 6))
    play.pass_time(0.0)
    assert sock.recv(1 << 16).startswith(b"HTTP/1.1 431 ")


def test_the_oldest_of_the_client_with_most_connections_makes_room(play: Play) -> None:
    first_of_few = play.dial("127.1.0.2")
    many = [play.dial() for _ in range(MOST_CONNECTIONS - 1)]
    second_of_few = play.dial("127.1.0.2")
    assert play.is_open(first_of_few)
    assert [play.is_open(sock) for sock in many[:3]] == [False, True, True]
    sock = play.dial(said=GET)
    assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
    assert [play.is_open(sock) for sock in many[:3]] == [False, False, True]
    # One that was answered has nothing to lose, and goes before those that have not asked yet.
    play.dial()
    assert [play.is_open(sock) for sock in many[:3]] == [False, False, True]
    for _ in range(5):
        play.dial()
    assert play.is_open(second_of_few)
    assert len(play.server._connections) == MOST_CONNECTIONS


def test_a_host_with_many_addresses_makes_room_for_others(play: Play) -> None:
    first = play.dial("127.9.0.1")
    for number in range(2 * MOST_CONNECTIONS):
        play.dial(f"127.0.{number // 8}.{number % 8 + 1}")
    assert play.is_open(first)


def test_a_fault_over_one_request_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> list[bytes]:
        raise TypeError("a header that a library does not understand")

    with playing(monkeypatch, MetricsSite(broken)) as play:
        sock = play.dial(said=GET)
        answer = sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert answer.endswith(b"\r\n\r\n")
        assert play.dial(said=GET).recv(1 << 16).startswith(b"HTTP/1.1 500 ")
    assert "does not understand" in capsys.readouterr().err


def test_a_header_that_the_library_does_not_understand_is_answered(play: Play) -> None:
    odd = b"GET /metrics HTTP/1.1\r\nAccept: text/plain; version=x\r\n\r\n"
    assert play.dial(said=odd).recv(1 << 16).startswith(b"HTTP/1.1 ")


# ---------------------------------------------------------------- bodies, streams, later answers


class Keeper:
    """A site that keeps its visitors, and says what they sent."""

    most_body_bytes = 1000

    def __init__(self) -> None:
        self.visitors: list[Visitor] = []
        self.requests: list[Request] = []
        self.gone: list[Visitor] = []

    def answer(self, request: Request, visitor: Visitor) -> Answer | None:
        self.visitors.append(visitor)
        self.requests.append(request)
        if request.path == "/stream":
            visitor.stream((("X-A", "b"),), b"first\n", lambda: self.gone.append(visitor))
        return None


def post(body: bytes, *headers: str, path: str = "/x") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_a_body_is_read_to_its_length_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        whole = post(b"x" * 700, "Content-Length: 700") + b"more"
        sock = play.dial(said=whole[:30])
        for at in range(30, len(whole), 97):
            sock.sendall(whole[at : at + 97])
            play.pass_time(0.0)
        (request,), (visitor,) = site.requests, site.visitors
        assert (request.method, request.path, request.body) == ("POST", "/x", b"x" * 700)
        visitor.finish(Answer.words(HTTPStatus.OK, "done"))
        assert sock.recv(1 << 16).endswith(b"\r\n\r\ndone\n")
        visitor.finish(Answer.words(HTTPStatus.OK, "twice"))
        sock.close()
        play.pass_time(0.0)
        assert play.server._connections == {}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Content-Length: 1001"], 413),
        (["Content-Length: 99999999999999999999"], 400),
        (["Content-Length: -1"], 400),
        (["Content-Length: 1_0"], 400),
        (["Content-Length: 3", "Content-Length: 4"], 400),
        (["Transfer-Encoding: chunked"], 411),
    ],
)
def test_a_body_of_no_known_length_is_not_read(headers: list[str], status: int) -> None:
    request = read_head(post(b"", *headers))
    assert isinstance(request, Request)
    answer = body_length(request, 1000)
    assert isinstance(answer, Answer)
    assert answer.status == status
    assert body_length(request, 0) == 0  # where no request has one


def test_a_body_that_does_not_come_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        sock = play.dial(said=post(b"x", "Content-Length: 700"))
        play.pass_time(REQUEST_S)
        assert not play.is_open(sock)
        assert site.requests == []


def test_an_answer_that_does_not_come_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        sock = play.dial(said=post(b"", "Content-Length: 0"))
        play.pass_time(LATER_S - 1)
        assert play.is_open(sock)
        play.pass_time(1)
        assert not play.is_open(sock)
        site.visitors[0].finish(Answer.words(HTTPStatus.OK, "late"))


STREAM = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_stream_goes_on_until_the_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        sock = play.dial(said=STREAM)
        head, _, body = sock.recv(1 << 16).partition(b"\r\n\r\n")
        assert (b"X-A: b" in head, b"Content-Length" in head, body) == (True, False, b"first\n")
        for number in range(5):
            play.pass_time(60.0)
            assert site.visitors[0].send(b"%d" % number)
            assert sock.recv(10) == b"%d" % number
        assert site.gone == []
        sock.close()
        play.pass_time(0.0)
        assert site.gone == site.visitors
        site.visitors[0].send(b"nobody hears it")
        assert play.server._connections == {}


def test_a_reader_that_stops_has_one_piece_waiting_and_then_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        play.dial(said=STREAM)
        visitor, piece = site.visitors[0], bytes(1 << 20)
        while visitor.send(piece):
            play.pass_time(0.1)
        assert not visitor.send(piece)
        play.pass_time(ANSWER_S)
        assert site.gone == [visitor]


def test_a_client_that_waits_for_an_answer_stays_while_others_are_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Turning(Keeper):
        def answer(self, request: Request, visitor: Visitor) -> Answer | None:
            super().answer(request, visitor)
            if request.path == "/wait":
                visitor.wait(lambda: self.gone.append(visitor))
                return None
            return Answer.words(HTTPStatus.TOO_MANY_REQUESTS, "no")

    site = Turning()
    with playing(monkeypatch, site) as play:
        wait = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
        waiting = [play.dial(f"127.0.0.{n}", wait) for n in range(1, 17)]
        for number in range(3 * MOST_CONNECTIONS):
            play.dial(f"127.0.0.{number % 200 + 20}", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert site.gone == []
        site.visitors[0].finish(Answer.words(HTTPStatus.OK, "yes"))
        assert waiting[0].recv(1 << 16).endswith(b"yes\n")
        waiting[1].close()
        play.pass_time(0.0)
        assert site.gone == [site.visitors[1]]
        site.visitors[2].end()
        assert site.gone == site.visitors[1:3]
        play.pass_time(0.0)
        assert not play.is_open(waiting[2])


def test_metrics_cost_so_much_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    told: list[dict[str, Any]] = []

    def application(environ: dict[str, Any], start: Any) -> list[bytes]:
        told.append(environ)
        start("200 OK", [])
        return [b"%d" % len(told)]

    site = MetricsSite(application)

    def ask(**headers: str) -> bytes:
        return site.answer(request("GET", "/metrics", b"", **headers), Alone()).body

    assert [ask() for _ in range(30)] == [b"%d" % n for n in range(1, 21)] + [b"20"] * 10
    assert ask(Accept="application/openmetrics-text") == b"21"  # another text: none is kept yet
    assert ask(Accept="application/openmetrics-text; version=1") == b"21"
    now_s += 1.0
    assert ask() == b"22"


def test_silent_clients_make_room_before_a_stream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeper()
    with playing(monkeypatch, site) as play:
        stream = play.dial(said=STREAM)
        assert stream.recv(1 << 16)
        for _ in range(2 * MOST_CONNECTIONS):
            play.dial()
        assert site.gone == []
        assert play.is_open(stream)
