"""Traffic that goes on: every byte is looked at, and what breaks is told of."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pyforwarder.runtime.slowness import scaled_s

_PATIENCE_S: Final = scaled_s(20.0)
_SIZES: Final = (1, 100, 5003, 60_013)
_PAUSE_S: Final = 0.005


@dataclass(slots=True)
class Seen:
    """What was seen so far, by everybody."""

    faults: list[str] = field(default_factory=list)
    new: int = 0  # connections that were made, used and ended
    turns: int = 0  # of pairs that stay
    longest_s: float = 0.0  # that an answer was waited for
    udp_sources: set[tuple[str, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def waited(self, s: float) -> None:
        """An answer has come after so long."""
        with self._lock:
            self.turns += 1
            self.longest_s = max(self.longest_s, s)

    def connected(self) -> None:
        """One more connection has done what it was made for."""
        with self._lock:
            self.new += 1


class EchoServer:
    """Sends back what it gets: by TCP at a port of both families, by UDP at one of IPv4."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._tcp = socket.create_server(
            ("::", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 0))
        self.tcp_port: int = self._tcp.getsockname()[1]
        self.udp_port: int = self._udp.getsockname()[1]
        for run in (self._accept, self._answer):
            threading.Thread(target=run, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._tcp.accept()
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    @staticmethod
    def _echo(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while self._udp.fileno() >= 0:
                data, source = self._udp.recvfrom(2048)
                if not data:  # it was shut down
                    return
                self._seen.udp_sources.add(source)
                with contextlib.suppress(OSError):  # of a client that has gone
                    self._udp.sendto(data, source)

    def close(self) -> None:
        """Serve nobody any more."""
        for sock in (self._tcp, self._udp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class SteadyTraffic:
    """Clients that go on until `stop`; an echo is behind every port."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def hold(self, address: tuple[str, int], count: int, *, name: str) -> None:
        """So many pairs, on each of which bytes go to and fro."""
        for number in range(count):
            self._run(self._held, address, f"{name} {number}")

    def speak(self, address: tuple[str, int], count: int, *, name: str) -> None:
        """So many clients of UDP, one datagram after the other."""
        for number in range(count):
            self._run(self._spoken, address, f"{name} {number}")

    def connect(self, addresses: Sequence[tuple[str, int]], count: int) -> None:
        """So many clients that connect, use the connection, close it, and connect again."""
        for number in range(count):
            self._run(self._connecting, addresses, number)

    def stop(self) -> None:
        """End all of them in order, and wait for that."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _PATIENCE_S)
            assert not thread.is_alive(), "a client hangs"

    def _run(self, target: object, *arguments: object) -> None:
        def run() -> None:
            try:
                target(*arguments)  # type: ignore[operator]
            except Exception as error:
                self._seen.faults.append(f"{arguments}: {error!r}")

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _held(self, address: tuple[str, int], name: str) -> None:
        rng = random.Random(name)
        with socket.create_connection(address, timeout=_PATIENCE_S) as sock:
            while not self._stop.is_set():
                self._turn(sock, rng.randbytes(rng.choice(_SIZES)))
                self._stop.wait(_PAUSE_S)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b"", "bytes after the end"

    def _turn(self, sock: socket.socket, sent: bytes) -> None:
        began_s = time.monotonic()
        sock.sendall(sent)
        got = bytearray()
        while len(got) < len(sent):
            some = sock.recv(len(sent) - len(got))
            assert some, "the connection has ended"
            got += some
        assert got == sent, "other bytes"
        self._seen.waited(time.monotonic() - began_s)

    def _spoken(self, address: tuple[str, int], name: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.connect(address)
            number = 0
            while not self._stop.is_set():
                sent = f"{name} {number}".encode()
                began_s = time.monotonic()
                sock.send(sent)
                assert sock.recv(2048) == sent, "another datagram"
                self._seen.waited(time.monotonic() - began_s)
                number += 1
                self._stop.wait(_PAUSE_S)

    def _connecting(self, addresses: Sequence[tuple[str, int]], number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            with socket.create_connection(rng.choice(addresses), timeout=_PATIENCE_S) as sock:
                self._turn(sock, rng.randbytes(11))
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b"", "bytes after the end"
            self._seen.connected()
            self._stop.wait(_PAUSE_S)


@contextlib.contextmanager
def steady_traffic() -> Iterator[tuple[EchoServer, SteadyTraffic, Seen]]:
    """A server, clients to be started, and what they see; all have ended afterwards."""
    seen = Seen()
    server = EchoServer(seen)
    traffic = SteadyTraffic(seen)
    try:
        yield server, traffic, seen
    finally:
        traffic.stop()
        server.close()
