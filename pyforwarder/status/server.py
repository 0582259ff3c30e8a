"""Answers over HTTP: one thread, few connections, a deadline for each.

Silent clients must not keep others waiting: when there are as many connections as may be, one of
the client that has most makes room, and of a network before that of a client. What is answered is a
site's business (metrics.py, site.py).
"""

from __future__ import annotations

import contextlib
import socket
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.runtime.loop import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, Timed
from pyforwarder.runtime.tables import visible
from pyforwarder.status.allowance import most_crowded
from pyforwarder.status.http import Answer, Request, body_length, read_head, stream_head

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

# Prometheus asks one request at a time, a browser six; the rest are probes and those who mean ill.
MOST_CONNECTIONS: Final = 64
# From the first byte to the last, and again for the answer: both ends are near each other.
REQUEST_S: Final = 5.0
ANSWER_S: Final = 10.0
# For an answer that another process gives.
LATER_S: Final = 15.0
# A request's head has a few hundred bytes.
MOST_REQUEST_BYTES: Final = 8192
# What is read and thrown away behind the request, so that close() is no reset.
_MOST_DISCARDED_BYTES: Final = 65536
_ACCEPT_BATCH: Final = 16


class Site(Protocol):
    """What is served."""

    @property
    def most_body_bytes(self) -> int:
        """How long the body of a request may be; 0: no request has a body."""
        ...

    def answer(self, request: Request, visitor: Visitor) -> Answer | None:
        """The answer; None: the site keeps the visitor, and answers by it later, or in pieces."""
        ...


class Visitor(Protocol):
    """A connection as a site sees it that keeps it."""

    @property
    def host(self) -> str:
        """The address that it comes from."""
        ...

    def wait(self, gone: Callable[[], None]) -> None:
        """Keep the connection open for an answer to come; `gone` is called once if it ends
        before.
        """
        ...

    def finish(self, answer: Answer) -> None:
        """Answer; that is all. Nothing happens if the connection is gone."""
        ...

    def end(self) -> None:
        """End the connection, also in the middle of an answer."""
        ...

    def stream(
        self, headers: tuple[tuple[str, str], ...], first: bytes, gone: Callable[[], None]
    ) -> None:
        """Begin an answer in pieces; `gone` is called once, when the connection has ended.

        At once, if it has ended already.
        """
        ...

    def send(self, piece: bytes) -> bool:
        """The next piece; False, and nothing is sent, while the last one is not out.

        So a visitor that reads slowly has one piece waiting, and misses those that come meanwhile.
        """
        ...


class _Connection(Timed):
    """A client's connection, from accept to close."""

    __slots__ = (
        "body_length",
        "discarded_bytes",
        "fd",
        "gone",
        "head_length",
        "host",
        "is_answered",
        "is_asking",
        "is_streaming",
        "outgoing",
        "received",
        "request",
        "server",
        "sock",
    )

    def __init__(self, server: Server, sock: socket.socket, host: str) -> None:
        super().__init__()
        self.server = server
        self.sock = sock
        self.fd = sock.fileno()
        self.host = host
        self.received = b""
        self.request: Request | None = None  # known once its head is whole
        self.head_length = self.body_length = 0
        self.is_asking = True  # the request is not whole
        self.is_answered = False  # an answer has begun to go out
        self.is_streaming = False
        self.outgoing = memoryview(b"")
        self.gone: Callable[[], None] | None = None
        self.discarded_bytes = 0

    def expired(self) -> None:
        """Too slow; of a site, it has not answered."""
        self.server.close(self)

    def wait(self, gone: Callable[[], None]) -> None:
        """See `Visitor`."""
        self.gone = gone

    def end(self) -> None:
        """See `Visitor`."""
        self.server.close(self)

    @property
    def worth(self) -> int:
        """What goes first when room is needed: 0 what is through, 4 what goes on for hours."""
        if self.is_streaming:
            return 4
        if self.is_asking:
            return 1
        if self.outgoing:
            return 2
        return 0 if self.is_answered else 3

    def finish(self, answer: Answer) -> None:
        """See `Visitor`."""
        self.gone = None
        is_head = self.request is not None and self.request.method == "HEAD"
        self.server.send(self, answer.encode(without_body=is_head))

    def stream(
        self, headers: tuple[tuple[str, str], ...], first: bytes, gone: Callable[[], None]
    ) -> None:
        """See `Visitor`."""
        if not self.server.has(self):
            gone()
            return
        self.is_streaming = True
        self.gone = gone
        self.server.send(self, stream_head(headers) + first)

    def send(self, piece: bytes) -> bool:
        """See `Visitor`."""
        if self.outgoing:
            return False
        self.server.send(self, piece)
        return True


class Server:
    """Serves one listening socket on a loop."""

    def __init__(self, loop: Loop, sock: socket.socket, site: Site) -> None:
        """The socket listens already, and stays the caller's."""
        self._loop = loop
        self._sock = sock
        self._site = site
        self._connections: dict[_Connection, None] = {}  # in the order in which they came
        sock.setblocking(False)
        loop.watch(sock.fileno(), EPOLLIN, self._accept, self)
        loop.on_error = _contain

    def _accept(self, _owner: object, _fd: int, _mask: int) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                return
            except OSError:
                return  # accept(2): it is gone already, or memory is short; epoll tells again
            if len(self._connections) >= MOST_CONNECTIONS:
                self._make_room()
            sock.setblocking(False)
            connection = _Connection(self, sock, str(peer[0]))
            self._connections[connection] = None
            self._loop.deadlines.start(connection, REQUEST_S, self._loop.now_s)
            self._loop.watch(connection.fd, EPOLLIN, self._ready, connection)
            # Most have asked by now, and later clients cannot push those aside.
            try:
                self._read(connection)
            except Exception as error:
                # To the loop the server would be its owner, whose faults end the process.
                _contain(connection, error)

    def _make_room(self) -> None:
        """Close a connection of a host that has most of them; see `most_crowded`.

        Of that host's, the one that loses least by it, and the oldest of these. What is streamed to
        is known to the site, which sees to it that those are few.
        """
        connections = list(self._connections)
        some = [one for one in connections if not one.is_streaming] or connections
        crowd = [some[place] for place in most_crowded([one.host for one in some])]
        self.close(min(crowd, key=lambda one: one.worth))

    def _ready(self, connection: _Connection, _fd: int, mask: int) -> None:
        if mask & (EPOLLERR | EPOLLHUP):
            self.close(connection)
        elif connection.is_asking:
            self._read(connection)
        elif connection.outgoing:
            self._write(connection)
        else:
            self._discard(connection)

    def _read(self, connection: _Connection) -> None:
        try:
            piece = connection.sock.recv(MOST_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close(connection)
            return
        connection.received += piece
        answer = self._take_head(connection) if connection.request is None else None
        if answer is not None:
            self.send(connection, answer.encode())
        elif connection.request is not None:
            body = connection.received[connection.head_length :]
            if len(body) >= connection.body_length:
                self._take_request(connection, body[: connection.body_length])

    def _take_head(self, connection: _Connection) -> Answer | None:
        """Read a request's head, once it is whole; returns what to answer if it is wrong."""
        end = connection.received.find(b"\r\n\r\n")
        if end < 0:
            if len(connection.received) < MOST_REQUEST_BYTES:
                return None
            return Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        request = read_head(connection.received[: end + 4])
        if isinstance(request, Answer):
            return request
        length = body_length(request, self._site.most_body_bytes)
        if isinstance(length, Answer):
            return length
        connection.request, connection.head_length = request, end + 4
        connection.body_length = length
        return None

    def _take_request(self, connection: _Connection, body: bytes) -> None:
        asked = connection.request
        assert asked is not None
        connection.is_asking = False
        connection.received = b""
        # If the site answers later, or in pieces; `send` begins another.
        self._loop.deadlines.start(connection, LATER_S, self._loop.now_s)
        request = Request(asked.method, asked.path, asked.query, asked.headers, body)
        try:
            answer = self._site.answer(request, connection)
        except Exception:
            # What the client asks for may reach a library that does not understand all of it.
            sys.stderr.write(visible(traceback.format_exc()))
            answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR)
        if answer is not None:
            connection.finish(answer)

    def has(self, connection: _Connection) -> bool:
        """Whether the connection is still there."""
        return connection in self._connections

    def send(self, connection: _Connection, data: bytes) -> None:
        """What is to go out next; nothing happens once the connection is gone."""
        if connection not in self._connections:
            return
        connection.is_asking = False
        connection.is_answered = True
        connection.received = b""
        connection.outgoing = memoryview(data)
        self._loop.deadlines.start(connection, ANSWER_S, self._loop.now_s)
        self._loop.change(connection.fd, EPOLLOUT)
        self._write(connection)

    def _write(self, connection: _Connection) -> None:
        try:
            sent = connection.sock.send(connection.outgoing)
        except BlockingIOError:
            return
        except OSError:
            self.close(connection)
            return
        connection.outgoing = connection.outgoing[sent:]
        if connection.outgoing:
            return
        self._loop.change(connection.fd, EPOLLIN)
        if connection.is_streaming:
            # The next piece has a deadline of its own; until then there is nothing to wait for.
            self._loop.deadlines.stop(connection)
        else:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)

    def _discard(self, connection: _Connection) -> None:
        """The answer is out, or on its way: what comes is not wanted, and its end is the end."""
        try:
            size = len(connection.sock.recv(4096))
        except BlockingIOError:
            return
        except OSError:
            size = 0
        connection.discarded_bytes += size
        if not size or connection.discarded_bytes > _MOST_DISCARDED_BYTES:
            self.close(connection)

    def close(self, connection: _Connection) -> None:
        """End a connection, also in the middle of an answer."""
        if connection in self._connections:
            del self._connections[connection]
            self._loop.deadlines.stop(connection)
            self._loop.close(connection.sock.detach())
            gone, connection.gone = connection.gone, None
            if gone is not None:
                gone()

    def close_all(self) -> None:
        """End every connection and accept no more."""
        self._loop.forget(self._sock.fileno())
        for connection in list(self._connections):
            self.close(connection)


def _contain(owner: object, error: Exception) -> None:
    """A fault over one connection ends that one; any other one ends the process."""
    if not isinstance(owner, _Connection):
        raise error
    sys.stderr.write(visible("".join(traceback.format_exception(error))))
    owner.server.close(owner)
