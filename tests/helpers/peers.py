"""Servers with one behaviour each, and clients that speak the instruction.

Every server answers with a name where it answers at all, so that a test proves which one it
reached.  Each runs in a thread of its own; `with` starts and stops it.  Every blocking call has a
deadline.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from tests.helpers.instruction import ACK, instruction
from tests.helpers.waiting import DEADLINE_S, wait_for

_RESET_NOW: Final = struct.pack("ii", 1, 0)  # struct linger, socket(7)
_LOOK_UP_S: Final = 0.05  # how soon a server's thread notices that it should stop
_BLOCK: Final = random.Random("peers").randbytes(1_000_003)  # prime: equal to no chunk size


def address_text(address: tuple[str, int]) -> str:
    """`ip:port` or `[ip6]:port`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def pattern(size: int, *, start: int = 0) -> bytes:
    """`size` bytes of a stream that does not repeat at any power of two."""
    start %= len(_BLOCK)
    repeated = _BLOCK[start:] + _BLOCK * (size // len(_BLOCK) + 1)
    return repeated[:size]


def digest(size: int) -> str:
    """The SHA-256 of `pattern(size)`, without holding it."""
    whole, rest = divmod(size, len(_BLOCK))
    sha = hashlib.sha256()
    for _ in range(whole):
        sha.update(_BLOCK)
    sha.update(_BLOCK[:rest])
    return sha.hexdigest()


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_NOW)
    sock.close()


def half_close(sock: socket.socket) -> None:
    """Send a FIN.

    Raises:
        ConnectionResetError: it has been reset in the meantime; shutdown(2) says ENOTCONN then.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise ConnectionResetError(error.errno, "reset before the FIN") from error
        raise


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """That many bytes.

    Raises:
        AssertionError: an end of file came first; TimeoutError, ConnectionError from the socket.
    """
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), 1 << 20))
        assert piece, f"end of file after {len(data)} of {size} bytes: {bytes(data[:80])!r}"
        data += piece
    return bytes(data)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything up to a clean end of file.

    Raises:
        TimeoutError, ConnectionError: from the socket.
    """
    data = bytearray()
    while piece := sock.recv(1 << 20):
        data += piece
    return bytes(data)


def ends_with_reset(sock: socket.socket) -> bytes:
    """What could still be read before the reset.

    Raises:
        AssertionError: a clean end of file came instead.
    """
    data = bytearray()
    try:
        while piece := sock.recv(1 << 20):
            data += piece
    except (ConnectionResetError, BrokenPipeError):
        return bytes(data)
    raise AssertionError(f"a clean end of file after {len(data)} bytes, no reset")


def push_until_blocked(
    sock: socket.socket, *, most: int, quiet_s: float = 1.0, start: int = 0
) -> int:
    """Send `pattern` from `start` on until TCP takes nothing for `quiet_s`; how many bytes it took.

    Raises:
        AssertionError: it took `most` bytes and was still not blocked.
    """
    view = memoryview(pattern(2 * len(_BLOCK)))
    deadline_s = sock.gettimeout()
    sock.settimeout(quiet_s)
    sent = 0
    try:
        while sent < most:
            sent += sock.send(view[(start + sent) % len(_BLOCK) :])
    except TimeoutError:
        return sent
    finally:
        sock.settimeout(deadline_s)
    raise AssertionError(f"not blocked after {sent} bytes")


def bind_alone(sock: socket.socket) -> None:
    """Give a TCP socket a port of its own, which may be bound again as soon as it is closed.

    connect(2) also gives a port that another socket has, connected elsewhere or in TIME_WAIT, and
    that one is in the way of who binds the port later.
    """
    sock.bind(("", 0))


def dial(
    address: tuple[str, int] | str, *, deadline_s: float = DEADLINE_S, alone: bool = False
) -> socket.socket:
    """A connected socket with a deadline on every call; a `str` is a unix socket's path.

    `alone`: see `bind_alone`.
    """
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(deadline_s)
    try:
        if alone:
            bind_alone(sock)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def dial_through(
    forwarder: tuple[str, int],
    destination: tuple[str, int] | str,
    payload: bytes = b"",
    *,
    alone: bool = False,
) -> socket.socket:
    """A socket connected to `destination` by its instruction; the ack has been read.

    `alone`: see `bind_alone`.

    Raises:
        AssertionError: anything but the ack came back.
    """
    text = destination if isinstance(destination, str) else address_text(destination)
    sock = dial(forwarder, alone=alone)
    try:
        sock.sendall(instruction(text) + payload)
        answer = read_exactly(sock, len(ACK))
        assert answer == ACK, answer + sock.recv(99)
    except BaseException:
        sock.close()
        raise
    return sock


class Waiting:
    """A listening socket; the test itself is the server and accepts."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, backlog: int = 128) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.socket(family)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((host, port))
            self.listener.listen(backlog)
        except BaseException:
            self.listener.close()
            raise
        self.listener.settimeout(DEADLINE_S)
        self.address: tuple[str, int] = self.listener.getsockname()[:2]

    def accept(self) -> socket.socket:
        """The next connection, with a deadline on every call."""
        sock, _ = self.listener.accept()
        sock.settimeout(DEADLINE_S)
        return sock

    def nobody_came(self) -> bool:
        """Whether no connection waits to be accepted."""
        self.listener.setblocking(False)
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return True
        finally:
            self.listener.settimeout(DEADLINE_S)
        sock.close()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.listener.close()


def seconds_until_reset(what: str, sock: socket.socket, since_s: float) -> float:
    """How long it took until this end was reset; nothing else may come."""
    poll = select.poll()
    poll.register(sock, 0)  # POLLERR and POLLHUP: it is over both ways
    assert poll.poll(DEADLINE_S * 1000), f"{what} was not reset"
    took_s = time.monotonic() - since_s
    # One that had been told of the other direction's end before sees a broken pipe.
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE)
    assert sock.recv(4096) == b""
    return took_s


class Server:
    """Accepts, and plays `serve` for each connection in a thread; subclasses say what that is.

    `connections` counts the accepted ones, `errors` keeps what went wrong in a thread.
    """

    def __init__(self, name: str = "server", host: str = "127.0.0.1", port: int = 0) -> None:
        self.name = name
        self.connections = 0
        self.errors: list[BaseException] = []
        self.socks: list[socket.socket] = []
        self._stopping = threading.Event()
        self._waiting = Waiting(host, port)
        self._waiting.listener.settimeout(_LOOK_UP_S)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.address = self._waiting.address

    def serve(self, sock: socket.socket) -> None:
        """Talk on one connection; it is closed afterwards."""
        raise NotImplementedError

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._waiting.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.connections += 1
            sock.settimeout(DEADLINE_S)
            self.socks.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.closing(sock):
            try:
                self.serve(sock)
            except (ConnectionError, TimeoutError) as error:
                self.errors.append(error)
            except OSError as error:
                if not self._stopping.is_set():
                    self.errors.append(error)

    def wait_for_connections(self, count: int) -> None:
        """Until that many were accepted."""
        wait_for(lambda: self.connections >= count, f"{count} connections to {self.name}")

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._waiting.listener.close()
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=DEADLINE_S)


class NameServer(Server):
    """Says its name at once (server first) and closes."""

    def serve(self, sock: socket.socket) -> None:
        sock.sendall(self.name.encode())
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)


class EchoServer(Server):
    """Sends back what comes, then its FIN."""

    def serve(self, sock: socket.socket) -> None:
        while data := sock.recv(1 << 18):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


class AnswerServer(Server):
    """Reads one piece, answers `NAME got PIECE`, and goes on."""

    def serve(self, sock: socket.socket) -> None:
        while data := sock.recv(1 << 16):
            sock.sendall(self.name.encode() + b" got " + data)
        sock.shutdown(socket.SHUT_WR)


class SinkServer(Server):
    """Swallows everything; after the FIN it answers `NAME COUNT SHA256`."""

    def __init__(self, name: str = "sink", host: str = "127.0.0.1") -> None:
        super().__init__(name, host)
        self.received = 0

    def serve(self, sock: socket.socket) -> None:
        digest = hashlib.sha256()
        size = 0
        while data := sock.recv(1 << 20):
            digest.update(data)
            size += len(data)
            self.received += len(data)
        sock.sendall(f"{self.name} {size} {digest.hexdigest()}".encode())
        sock.shutdown(socket.SHUT_WR)


class FloodServer(Server):
    """Sends `size` bytes of `pattern` as fast as they are taken, reads nothing before `release`.

    Afterwards it reads to the end of file; `digest` is over what it read.
    """

    def __init__(self, size: int, *, host: str = "127.0.0.1") -> None:
        super().__init__("flood", host)
        self.size = size
        self.sent = 0
        self.received = 0
        self.digest = hashlib.sha256()
        self.release = threading.Event()
        self.finished = threading.Event()

    def serve(self, sock: socket.socket) -> None:
        sock.settimeout(4 * DEADLINE_S)
        sender = threading.Thread(target=self._flood, args=(sock,), daemon=True)
        sender.start()
        while not self.release.wait(_LOOK_UP_S):
            if self._stopping.is_set():
                break
        while data := sock.recv(1 << 20):
            self.digest.update(data)
            self.received += len(data)
        sender.join(timeout=DEADLINE_S)
        self.finished.set()

    def _flood(self, sock: socket.socket) -> None:
        view = memoryview(pattern(2 * len(_BLOCK)))
        with contextlib.suppress(OSError):
            while self.sent < self.size:
                place = self.sent % len(_BLOCK)
                self.sent += sock.send(view[place : place + self.size - self.sent])
            sock.shutdown(socket.SHUT_WR)


class ResetServer(Server):
    """Resets after `after` received bytes (0: at once)."""

    def __init__(self, after: int = 0) -> None:
        super().__init__("reset")
        self.after = after

    def serve(self, sock: socket.socket) -> None:
        if self.after:
            read_exactly(sock, self.after)
        reset(sock)


class SilentServer(Server):
    """Accepts and says nothing, reads nothing, until it is stopped."""

    def serve(self, sock: socket.socket) -> None:
        self._stopping.wait()


@contextlib.contextmanager
def pair_through(
    forwarder: tuple[str, int], *, host: str = "127.0.0.1"
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, server): two sockets joined through the forwarder by an instruction."""
    with Waiting(host) as waiting:
        client = dial_through(forwarder, waiting.address)
        with client:
            server = waiting.accept()
            with server:
                yield client, server


# Below those that the kernel gives to a bind to port 0 (ip_local_port_range), and not among those
# that tests name: a port that was found unused here stays so until the test has it bound.
_PORTS: Final = range(21_000, 32_000)
_next_ports: Final = itertools.count(random.Random().randrange(len(_PORTS)))


def unused_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens: a connect to it is refused. Another one each time."""
    for number in itertools.islice(_next_ports, len(_PORTS)):
        port = _PORTS[number % len(_PORTS)]
        try:
            with Waiting(host, port):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("all ports are in use")
