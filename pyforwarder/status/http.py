"""HTTP/1.1 without a socket: one request as a value, one answer as bytes.

One request for a connection, so nothing has to be told apart from a next one. The head is read by
the standard library; what it does not understand is answered here, and reaches no site.

Source: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

METHODS: Final = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: `path` and `query` as they came, `headers` by name in any case."""

    method: str
    path: str
    query: str = ""
    headers: Message = field(default_factory=Message)
    body: bytes = b""

    def header(self, name: str) -> str:
        """A header's value without blanks around it; empty if it is not there."""
        return str(self.headers.get(name, "")).strip()


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered; its length and the end of the connection are added on the way out."""

    status: HTTPStatus
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @classmethod
    def words(cls, status: HTTPStatus, words: str, *headers: tuple[str, str]) -> Answer:
        """Return an answer of one sentence for people."""
        return cls(
            status, (("Content-Type", "text/plain; charset=utf-8"), *headers), f"{words}\n".encode()
        )

    def encode(self, *, without_body: bool = False) -> bytes:
        """The bytes of the whole answer; to HEAD `without_body`."""
        length = () if self.status is HTTPStatus.NO_CONTENT else (str(len(self.body)),)
        headers = [*self.headers, *(("Content-Length", text) for text in length)]
        return _head(self.status, headers) + (b"" if without_body else self.body)


def stream_head(headers: tuple[tuple[str, str], ...]) -> bytes:
    """The head of an answer that ends when the connection does."""
    return _head(HTTPStatus.OK, [*headers])


def _head(status: HTTPStatus, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    fixed = (
        ("Server", "pyforwarder"),
        ("Date", formatdate(usegmt=True)),
        ("Connection", "close"),  # every answer is the last one
    )
    lines += [f"{name}: {value}" for name, value in (*fixed, *headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


class _Head(BaseHTTPRequestHandler):
    """Reads one request's head from memory."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a broken request gets an answer with a status, too
    wrong = Answer.words(HTTPStatus.BAD_REQUEST, "This is no request.")

    def __init__(self, head: bytes) -> None:
        self._head = head
        self.is_understood = False
        super().__init__(None, ("", 0), None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Make two files in memory, in place of a socket's."""
        self.rfile = io.BufferedReader(io.BytesIO(self._head))
        self.wfile = io.BytesIO()

    def handle(self) -> None:
        """Read the head; nobody is answered from here."""
        self.raw_requestline = self.rfile.readline()
        self.is_understood = bool(self.raw_requestline.strip()) and self.parse_request()

    def finish(self) -> None:
        """Close nothing: the files are memory."""

    def handle_expect_100(self) -> bool:
        """The client may send on: the body has its deadline."""
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Keep what is wrong for the answer."""
        del message, explain
        status = HTTPStatus(code)
        self.wrong = Answer.words(status, f"{status.value} {status.phrase}")

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def read_head(head: bytes) -> Request | Answer:
    """The request whose head this is, up to the empty line, or what to answer to it.

    The body is still to come, see `body_length`.
    """
    read = _Head(head)
    if not read.is_understood:
        return read.wrong
    if read.command not in METHODS:
        return Answer.words(HTTPStatus.NOT_IMPLEMENTED, "There is no such method here.")
    path, _, query = read.path.partition("?")
    return Request(read.command, path, query, read.headers)


def body_length(request: Request, most: int) -> int | Answer:
    """How many bytes belong to the request after its head, or what to answer.

    With `most` 0 there are no requests that have one, and none is looked at.
    """
    if not most:
        return 0
    if request.header("Transfer-Encoding"):
        return Answer.words(HTTPStatus.LENGTH_REQUIRED, "Say how long it is: Content-Length.")
    lengths = request.headers.get_all("Content-Length", [])
    if not lengths:
        return 0
    text = str(lengths[0]).strip()
    if len(lengths) > 1 or not (text.isascii() and text.isdigit()) or len(text) > 15:
        return Answer.words(HTTPStatus.BAD_REQUEST, "This is no Content-Length.")
    if int(text) > most:
        return Answer.words(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {most} bytes, please.")
    return int(text)
