"""The control socket: one JSON object per line in, one per line out, mode 0600.

Nobody who talks to it can hold the daemon up: requests and clients are bounded, answers are sent
as fast as the client reads them and dropped with it when it does not, and of requests that come
all at once one is served between any two other things that the daemon has to do.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.errors import ConfigError, ForwarderError, InternalError, UsageError
from pyforwarder.runtime.loop import EPOLLIN, EPOLLOUT, EPOLLRDHUP, Timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.runtime.loop import Loop

MOST_CLIENTS: Final = 32
MOST_REQUEST_BYTES: Final = 64 * 1024
MOST_FDS: Final = 2
# A client has this long for its next request, and again to read the answer.
CLIENT_TIMEOUT_S: Final = 30.0
# After an accept(2) that found no descriptor free: the listener stays readable, and would be
# called again at once.
ACCEPT_PAUSE_S: Final = 0.1

# Takes a request and the descriptors that came with it (closed afterwards); returns the result.
Obey = "Callable[[dict[str, Any], list[int]], object]"


class _ControlClient(Timed):
    __slots__ = ("fds", "incoming", "is_last", "outgoing", "owner", "sock")

    def __init__(self, owner: ControlServer, sock: socket.socket) -> None:
        super().__init__()
        self.owner = owner
        self.sock = sock
        self.incoming = b""
        self.outgoing = memoryview(b"")
        self.fds: list[int] = []
        self.is_last = False  # it has its last answer; what it sends after that is thrown away

    def expired(self) -> None:
        self.owner.drop(self)


class ControlServer:
    """Listens at a path and answers one request after the other for each client."""

    def __init__(
        self,
        loop: Loop,
        path: Path,
        obey: Callable[[dict[str, Any], list[int]], object],
        listener: socket.socket | None = None,
    ):
        """Replaces a socket that a dead daemon left: the caller holds the instance's lock.

        `listener` is that of a daemon that lives, and releases it: ours from here on.
        """
        self._loop = loop
        self._path = path
        self._obey = obey
        self._is_released = False
        self._clients: dict[int, _ControlClient] = {}
        if listener is not None:
            self._listener = listener
            self._resume()
            return
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Never connectable by others, not even between bind and chmod.
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(MOST_CLIENTS)
        self._listener.setblocking(False)
        self._resume()

    def fds(self) -> list[int]:
        """Descriptors that a worker must not keep."""
        listening = () if self._is_released else (self._listener.fileno(),)
        return [*listening, *self._clients]

    @property
    def listener(self) -> socket.socket:
        """The socket at which the server listens; ours."""
        return self._listener

    def release(self) -> None:
        """Another daemon listens there from here on; connected clients still get their answers."""
        if self._is_released:
            return
        self._is_released = True
        if self._pause:
            self._loop.cancel(self._pause)
        else:
            self._loop.forget(self._listener.fileno())
        self._listener.close()

    def close(self) -> None:
        """Stop answering; the path goes, unless it is another daemon's."""
        for client in list(self._clients.values()):
            self.drop(client)
        if not self._is_released:
            self.release()
            self._path.unlink(missing_ok=True)

    def _resume(self) -> None:
        self._pause = 0
        self._loop.watch(self._listener.fileno(), EPOLLIN, self._accept, self)

    def _accept(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # EMFILE, ENFILE, ENOMEM: the client that asks waits, nobody else
            self._loop.forget(self._listener.fileno())
            self._pause = self._loop.after(ACCEPT_PAUSE_S, self._resume)
            return
        if len(self._clients) >= MOST_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        client = _ControlClient(self, sock)
        self._clients[sock.fileno()] = client
        self._loop.watch(sock.fileno(), EPOLLIN | EPOLLRDHUP, self._ready, client)
        self._loop.deadlines.start(client, CLIENT_TIMEOUT_S, self._loop.now_s)

    def drop(self, client: _ControlClient) -> None:
        """Close the client's connection and what it sent."""
        self._loop.deadlines.stop(client)
        self._close_fds(client)
        if self._clients.pop(client.sock.fileno(), None) is not None:
            self._loop.forget(client.sock.fileno())
            client.sock.close()

    @staticmethod
    def _close_fds(client: _ControlClient) -> None:
        for fd in client.fds:
            os.close(fd)
        client.fds = []

    def _ready(self, client: _ControlClient, _fd: int, mask: int) -> None:
        """Send what is left to send, or read, and take the next request that is complete."""
        if client.outgoing:
            if mask:
                self._send(client)
        elif b"\n" in client.incoming or self._receive(client):
            self._take_request(client)

    def _receive(self, client: _ControlClient) -> bool:
        """Whether there may be a request now."""
        try:
            data, fds, _, _ = socket.recv_fds(client.sock, MOST_REQUEST_BYTES, MOST_FDS)
        except BlockingIOError:
            return False
        except OSError:
            self.drop(client)
            return False
        client.fds += fds
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds() forgets MSG_CMSG_CLOEXEC (Python 3.11)
        if not data or len(client.fds) > MOST_FDS:
            self.drop(client)
            return False
        if client.is_last:
            return False
        client.incoming += data
        return True

    def _take_request(self, client: _ControlClient) -> None:
        line, newline, rest = client.incoming.partition(b"\n")
        if len(line) > MOST_REQUEST_BYTES:
            client.is_last = True
            client.incoming = b""
            self._answer(client, {"ok": False, "kind": "usage", "error": "request too long"})
        elif newline:
            client.incoming = rest
            answer = self._serve(line, client.fds)
            self._close_fds(client)
            self._answer(client, answer)

    def _serve(self, line: bytes, fds: list[int]) -> dict[str, object]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):  # the latter: brackets, thousands deep
            return {"ok": False, "kind": "usage", "error": "the request is not JSON"}
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            return {"ok": False, "kind": "usage", "error": 'a request is {"do": ...}'}
        try:
            return {"ok": True, "result": self._obey(request, fds)}
        except ConfigError as error:
            return {
                "ok": False,
                "kind": "config",
                "error": str(error),
                "line": error.line,
                "path": error.path,
            }
        except UsageError as error:
            return {"ok": False, "kind": "usage", "error": str(error)}
        except InternalError as error:
            return {"ok": False, "kind": "internal", "error": str(error)}
        except ForwarderError as error:
            return {"ok": False, "kind": "refused", "error": str(error)}

    def _answer(self, client: _ControlClient, answer: dict[str, object]) -> None:
        client.outgoing = memoryview(json.dumps(answer).encode() + b"\n")
        self._loop.deadlines.start(client, CLIENT_TIMEOUT_S, self._loop.now_s)
        self._send(client)

    def _send(self, client: _ControlClient) -> None:
        """Send what the client takes; reads its next request once all is sent."""
        try:
            sent = client.sock.send(client.outgoing)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop(client)
            return
        client.outgoing = client.outgoing[sent:]
        if client.outgoing:
            self._loop.change(client.sock.fileno(), EPOLLOUT)
        else:
            self._loop.change(client.sock.fileno(), EPOLLIN | EPOLLRDHUP)
            if b"\n" in client.incoming:
                self._loop.soon(client, client.sock.fileno())
