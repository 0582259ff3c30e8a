"""Short conversations whose every byte and ending is known, through express or directly.

Both ends are made from a number. The first bytes name it, so that the server knows which one it has
accepted. `play` says what each end has got and how it ended; the bytes are compared as they come.
Where one end resets, the other goes on sending a byte now and then until it is told: a reset that
is lost is not sent again by anybody, so who only reads would never hear of it, on any datapath.
"""

from __future__ import annotations

import contextlib
import enum
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.helpers.peers import half_close, pattern, reset
from tests.helpers.waiting import DEADLINE_S

# Loss on each of four ways: a packet may be lost many times, and every time costs twice as much.
PATIENCE_S: Final = 4 * DEADLINE_S
_HEARTBEAT_S: Final = 0.2
_LOOK_UP_S: Final = 0.05  # how soon a thread notices that it should stop
_NAME: Final = struct.Struct("!I")


class Kind(enum.Enum):
    """Which end ends it, and how."""

    CLIENT_FIRST = "the client half-closes, and then the server"
    SERVER_FIRST = "the server half-closes, and then the client"
    TOGETHER = "both half-close when they have sent all"
    AT_ONCE = "the client half-closes with its first bytes"
    CLIENT_RESETS = "the client resets in the middle"
    SERVER_RESETS = "the server resets in the middle"


class End(enum.Enum):
    """How a conversation has ended for one end."""

    FINISHED = "a clean end of file behind the last byte"
    RESET = "reset"
    OWN = "its own reset"
    STUCK = "never"


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation."""

    number: int  # its place in the list
    kind: Kind
    first: bytes  # what the client sends at once
    more: int  # and then, of the pattern
    answer: int

    def question(self) -> bytes:
        """All that the client sends."""
        return self.first + pattern(self.more, start=self.number)

    def reply(self) -> bytes:
        """All that the server sends."""
        return pattern(self.answer, start=7 * self.number)


@dataclass(slots=True)
class Seen:
    """What both ends have seen."""

    client: End = End.STUCK
    server: End | None = None  # nobody has connected to it
    wrong: list[str] = field(default_factory=list)


def talk(seed: int, number: int) -> Talk:
    """One for that place in a list."""
    rng = random.Random(f"{seed}/{number}")
    size = rng.choice([1, 2, 3, rng.randrange(20, 500), 1448, rng.randrange(1449, 2800)])
    first = _NAME.pack(number) + pattern(size - 1, start=number)
    at_most = rng.choice([1, 2_000, 60_000])
    kind = rng.choice([*Kind, Kind.CLIENT_FIRST, Kind.SERVER_FIRST])
    more = 0 if kind is Kind.AT_ONCE else rng.randrange(at_most)
    return Talk(number, kind, first, more, rng.randrange(1, at_most + 1))


class _Reader:
    """Reads what the other end sends, and compares."""

    def __init__(self, sock: socket.socket, due: bytes, who: str, seen: Seen) -> None:
        self.sock, self.due, self.who, self.seen = sock, due, who, seen
        self.got = 0

    def read(self, size: int, *, beats: bool = False) -> bool:
        """Some bytes; False: the end of file. Behind the last of them may be `beats`."""
        data = self.sock.recv(size)
        expected = self.due[self.got : self.got + len(data)]
        if beats:
            expected += b"." * (len(data) - len(expected))
        if data != expected:
            self.seen.wrong.append(f"{self.who} got other bytes behind {self.got}")
        self.got += len(data)
        return bool(data)

    def up_to(self, size: int) -> None:
        """So many in all."""
        while self.got < size:
            if not self.read(size - self.got):
                self.seen.wrong.append(f"{self.who} got an end of file behind {self.got} of {size}")
                raise ConnectionAbortedError

    def to_end(self, *, beats: bool = False) -> None:
        """All, and nothing else."""
        while self.read(1 << 16, beats=beats):
            pass
        if self.got < len(self.due):
            self.seen.wrong.append(f"{self.who} got {self.got} of {len(self.due)} and a clean end")


def _until_reset(sock: socket.socket, reader: _Reader) -> None:
    """Read and send until the other end's reset is known."""
    sock.settimeout(_HEARTBEAT_S)
    for _ in range(int(PATIENCE_S / _HEARTBEAT_S)):
        try:
            if not reader.read(1 << 16, beats=True):
                reader.seen.wrong.append(f"{reader.who} got a clean end of what was reset")
                return
        except TimeoutError:
            with contextlib.suppress(TimeoutError):  # what was sent before has not gone yet
                sock.send(b".")
    raise TimeoutError


def _ended(do: Callable[[], End]) -> End:
    try:
        return do()
    except (ConnectionResetError, BrokenPipeError):
        return End.RESET
    except (TimeoutError, ConnectionAbortedError):
        return End.STUCK


def be_client(sock: socket.socket, one: Talk, seen: Seen) -> None:
    """Play the client; the first bytes have been sent, but for `Kind.AT_ONCE`. Closes it."""
    reader = _Reader(sock, one.reply(), "the client", seen)

    def do() -> End:
        sock.sendall(one.question()[len(one.first) :])
        if one.kind in (Kind.CLIENT_FIRST, Kind.TOGETHER, Kind.AT_ONCE):
            half_close(sock)
        if one.kind is Kind.CLIENT_RESETS:
            reader.up_to(1 + one.number % one.answer)  # the server knows of it then
            reset(sock)
            return End.OWN
        if one.kind is Kind.SERVER_RESETS:
            _until_reset(sock, reader)
            return End.FINISHED
        reader.to_end()
        if one.kind is Kind.SERVER_FIRST:
            half_close(sock)
        return End.FINISHED

    sock.settimeout(PATIENCE_S)
    with sock:
        seen.client = _ended(do)


def be_server(sock: socket.socket, talks: list[Talk], seen: list[Seen]) -> None:
    """Play the server of the conversation that the first bytes name. Closes it."""
    sock.settimeout(PATIENCE_S)
    with sock:
        name = bytearray()
        try:
            while len(name) < _NAME.size:
                piece = sock.recv(_NAME.size - len(name))
                if not piece:
                    return
                name += piece
        except OSError:
            return  # reset, before it has said who it is
        (number,) = _NAME.unpack(name)
        one = talks[number]
        if seen[number].server is not None:
            seen[number].wrong.append("the server was connected to twice")
        reader = _Reader(sock, one.question(), "the server", seen[number])
        reader.got = _NAME.size
        reader.due = one.question()
        seen[number].server = End.STUCK

        def do() -> End:
            if one.kind is Kind.SERVER_RESETS:
                reader.up_to(len(one.first) + one.number % (one.more + 1))
                sock.sendall(one.reply()[: one.number % one.answer])
                reset(sock)
                return End.OWN
            if one.kind is Kind.CLIENT_RESETS:
                sock.sendall(one.reply())
                _until_reset(sock, reader)
                return End.FINISHED
            if one.kind in (Kind.CLIENT_FIRST, Kind.AT_ONCE):
                reader.to_end()
            sock.sendall(one.reply())
            half_close(sock)
            if one.kind not in (Kind.CLIENT_FIRST, Kind.AT_ONCE):
                reader.to_end()
            return End.FINISHED

        seen[number].server = _ended(do)


def due(one: Talk) -> tuple[End, End]:
    """How it has to end for the client and the server."""
    return {
        Kind.CLIENT_RESETS: (End.OWN, End.RESET),
        Kind.SERVER_RESETS: (End.RESET, End.OWN),
    }.get(one.kind, (End.FINISHED, End.FINISHED))


def forward(client: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """A worker's part: byte by byte, and a reset for a reset. Closes both."""
    broken = threading.Event()

    def carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            if not broken.is_set():
                half_close(target)
        except OSError:
            broken.set()
            for end in (source, target):  # the other thread wakes up, and nothing is sent
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RD)

    client.settimeout(PATIENCE_S)
    try:
        server = connect()
    except OSError:
        reset(client)
        return
    server.settimeout(PATIENCE_S)
    back = threading.Thread(target=carry, args=(server, client))
    back.start()
    carry(client, server)
    back.join()
    for end in (client, server):
        reset(end) if broken.is_set() else end.close()


@contextlib.contextmanager
def accepting(listener: socket.socket, do: Callable[[socket.socket], None]) -> Iterator[list[int]]:
    """`do` with everybody that connects, each in a thread of its own; how many that were."""
    taken: list[int] = []
    threads: list[threading.Thread] = []

    over = threading.Event()

    def accept() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                taken.append(1)
                threads.append(threading.Thread(target=do, args=(sock,)))
                threads[-1].start()

    listener.settimeout(_LOOK_UP_S)
    accepter = threading.Thread(target=accept)
    accepter.start()
    try:
        yield taken
    finally:
        over.set()
        accepter.join()
        for thread in threads:
            thread.join()
        listener.settimeout(DEADLINE_S)
