"""Connections that begin and end all the time, with an echo that must be whole, or an error."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from tests.helpers.peers import address_text

_LENGTH: Final = struct.Struct("!I")
_PATTERN: Final = bytes(range(253)) * 400
_SILENCE_S: Final = 5.0
_LOOK_S: Final = 0.05


class Broken(NamedTuple):
    """A client's connection that has ended too early."""

    client: str  # its address, as `show` has it
    began_s: float
    ended_s: float
    was_reset: bool  # else its client has waited too long


class Churn:
    """From `start` to `stop`; not more than a few at once."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        waiting: socket.socket,
        *,
        seed: int,
        at_once: int = 1,
        think_s: float = 0.0,
    ) -> None:
        """`connect` makes a client's connection; the server's come out of `waiting`.

        Servers think for so long at most before they answer.
        """
        self._think_s = think_s
        self._connect, self._waiting = connect, waiting
        self._rng = random.Random(seed)
        self._is_over = threading.Event()
        self._answering: list[threading.Thread] = []
        self._threads = [
            threading.Thread(target=run, daemon=True)
            for run in (self._serve, *[self._ask] * at_once)
        ]
        self.whole = self.broken = 0
        self.broken_ones: list[Broken] = []  # those that were connected
        self.faults: list[str] = []  # what must not be

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more of them; those that have begun have ended when this returns."""
        self._is_over.set()
        for thread in self._threads + self._answering:
            thread.join()

    def _serve(self) -> None:
        while not self._is_over.is_set():
            if select.select([self._waiting], [], [], _LOOK_S)[0]:
                sock, _ = self._waiting.accept()
                thread = threading.Thread(target=self._answer, args=(sock,), daemon=True)
                self._answering.append(thread)
                thread.start()

    def _answer(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(_SILENCE_S)
            got = _read_all(sock)
            if got != _message(len(got)):
                self.faults.append(f"the server got {len(got)} bytes, and an end")
            self._is_over.wait(self._rng.uniform(0, self._think_s))
            sock.sendall(got)

    def _ask(self) -> None:
        while not self._is_over.is_set():
            said = _message(self._rng.choice((40, 4000, 100_000)))
            began_s, client = 0.0, ""
            try:
                with self._connect() as sock:
                    client = address_text(sock.getsockname()[:2])
                    began_s = time.monotonic()
                    sock.settimeout(_SILENCE_S)
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    got = _read_all(sock)
            except OSError as error:
                self.broken += 1
                if began_s:
                    was_reset = isinstance(error, ConnectionError)
                    self.broken_ones.append(Broken(client, began_s, time.monotonic(), was_reset))
                continue
            if got != said:
                self.faults.append(f"the client got {len(got)} of {len(said)} bytes, and an end")
            self.whole += 1


def _message(size: int) -> bytes:
    """Of so many bytes, its length in front; none of fewer than that takes."""
    return (_LENGTH.pack(size) + _PATTERN)[:size] if size >= _LENGTH.size else b""


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
