"""Why a store has not answered is told in plain words, whatever library has asked it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet.causes import cause_of
from pyforwarder.fleet.files import StoreFiles
from pyforwarder.fleet.store import Store, StoreError
from tests.helpers.etcd import Tls
from tests.helpers.peers import unused_port

Serve = Callable[[socket.socket], None]

CLOSED = "the connection was closed without an answer"
CUT_OFF = "an answer that is cut off"

# Each goes another way: etcd3gw and requests, our own few lines, requests' streams.
WAYS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("x"),
    "write": lambda store: store.write([("x", "y")]),
    "watch": lambda store: list(store.changes("/x/", after=1, until_s=time.monotonic() + 5.0)),
}


def read_request(sock: socket.socket) -> None:
    """All of it, so that nothing is left to be sent: its body is one JSON object."""
    read = b""
    while not read.endswith(b"}"):
        piece = sock.recv(65536)
        if not piece:
            return
        read += piece


def reset(sock: socket.socket) -> None:
    read_request(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close(sock: socket.socket) -> None:
    read_request(sock)


def answering(text: bytes) -> Serve:
    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(text)

    return serve


@contextlib.contextmanager
def member(serve: Serve) -> Iterator[int]:
    """The port of one that treats each connection so, until the test ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):  # the listener is shut down
                while True:
                    sock, _ = listener.accept()
                    with sock, contextlib.suppress(OSError):
                        serve(sock)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def said_of(way: str, endpoint: str, context: ssl.SSLContext | None = None) -> str:
    """What is said of a member, behind its name."""
    tls = {"tls": {"ca": "/x"}} if context else {}
    fleet = Fleet.model_validate({"endpoints": [endpoint], "name": "edge", **tls})
    store = Store(fleet, StoreFiles(None, context), timeout_s=1.0)
    with contextlib.closing(store), pytest.raises(StoreError) as caught:
        WAYS[way](store)
    head, _, words = str(caught.value).partition(f"etcd at {endpoint}: ")
    assert head == ""
    return words


@pytest.mark.parametrize("way", WAYS)
def test_a_member_that_does_not_listen(way: str) -> None:
    assert said_of(way, f"http://127.0.0.1:{unused_port()}") == "connection refused"


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_nobody_has(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert said_of(way, "http://nowhere.test:2379") == "name or service not known"


@pytest.mark.parametrize("way", WAYS)
def test_a_member_that_is_not_reached(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert said_of(way, "http://192.0.2.1:2379") == "no route to host"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (reset, {"connection reset by peer"}),
        (close, {CLOSED, CUT_OFF}),
        (answering(b"nonsense\r\n\r\n"), {"no answer of etcd", "no answer in HTTP"}),
        (answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), {CUT_OFF}),
    ],
    ids=["reset", "close", "nonsense", "cut off"],
)
def test_a_member_that_does_not_answer_as_it_should(way: str, serve: Serve, said: set[str]) -> None:
    with member(serve) as port:
        assert said_of(way, f"http://127.0.0.1:{port}") in said


@pytest.mark.parametrize("way", ["get", "write"])  # a watch may be silent
def test_a_member_that_is_silent(way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = said_of(way, f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert said == "no answer in time"


def test_an_answer_that_is_no_json() -> None:
    text = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    with member(answering(text)) as port:
        assert said_of("get", f"http://127.0.0.1:{port}") == "no answer of etcd"


@pytest.mark.parametrize("way", WAYS)
def test_a_member_without_tls(way: str) -> None:

    def serve(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        read_request(sock)  # until the other end closes: no reset overtakes the answer

    with member(serve) as port:
        said = said_of(way, f"https://127.0.0.1:{port}", ssl.create_default_context())
    assert said in {"TLS failed: wrong version number", "TLS failed: record layer failure"}


@pytest.mark.parametrize("way", WAYS)
def test_a_certificate_that_is_not_trusted(way: str, tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True):
            pass

    with member(serve) as port:
        said = said_of(way, f"https://127.0.0.1:{port}", ssl.create_default_context())
    assert said == "its certificate is not good: self-signed certificate"


def test_what_nobody_knows_says_its_own_words_or_what_it_is() -> None:
    assert cause_of(RuntimeError("so it is")) == "so it is"
    assert cause_of(RuntimeError()) == "RuntimeError"


def test_errors_that_are_in_each_other_come_to_an_end() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert cause_of(one) == "one"
