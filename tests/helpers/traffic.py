"""Random TCP conversations whose every byte and every ending is known in advance.

A conversation is two scripts, one for each end, made from a seed.  `run` plays many of them at once
over real sockets, directly or through a forwarder, and tells what each end received and how it
ended.  Both ends live in this process and in one epoll loop: an end knows which conversation it
belongs to because each conversation has a listening port of its own, not because of bytes that
would have to be carried for that purpose.

`faults` is the judge.  Two rules hold for every conversation, with any timing:

* what an end received is a prefix of what the other end sent, and
* a clean end of file is seen only after all of it.

Beyond that the forwarded conversation must end as the direct one did.

A reset need not be heard, also directly: a kernel that has thrown away bytes for want of memory
(TCPRcvQDrop) closes its window, and ignores a reset that begins behind them; the other end has the
window rounded up to a step of its scale (tcp_acceptable_seq), and sends it there. So an end that
only reads asks after a while whether the other one is still there, as a keepalive does, and that
is held against a forwarder only where no kernel has thrown anything away.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import heapq
import itertools
import random
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.instruction import ACK, instruction

# A prime, so that no chunk, segment or page size divides it: bytes that are lost, doubled or
# swapped never land on an equal byte further on.
STREAM_PERIOD: Final = 4_194_301
LARGEST_CHUNK: Final = 1 << 20
READ_SIZE: Final = 1 << 18

_STREAM: Final = random.Random("the bytes of every conversation").randbytes(STREAM_PERIOD)
_BYTES: Final = _STREAM + _STREAM[:LARGEST_CHUNK]
_VIEW: Final = memoryview(_BYTES)

# How long a reset may take to be heard before the end that waits for it asks.
_ASKS_AFTER_S: Final = scaled_s(10.0)

_RESET_NOW: Final = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds, socket(7)
# ENOTCONN is what shutdown(2) says about a socket that has been reset in the meantime.
_RESET_ERRNOS: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})


# ---------------------------------------------------------------------------- scripts


@dataclass(frozen=True, slots=True)
class Send:
    """Hand `size` bytes to TCP in one call, and the rest of them as TCP takes them.

    `more`: with MSG_MORE, so that what follows (data or a FIN) travels in the same segment.
    """

    size: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Send nothing for a while; reading goes on."""

    milliseconds: float


@dataclass(frozen=True, slots=True)
class Await:
    """Send nothing until this many bytes in total have been received."""

    received: int


@dataclass(frozen=True, slots=True)
class AwaitEof:
    """Send nothing until the other end's FIN has been read."""


@dataclass(frozen=True, slots=True)
class Fin:
    """Half-close: shutdown(SHUT_WR)."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close both directions at once although the other end may still send."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Close with a reset: SO_LINGER on, zero seconds."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the connection open until the other end resets it."""


Step = Send | Pause | Await | AwaitEof | Fin | Close | Reset | Hold


@dataclass(frozen=True, slots=True)
class Script:
    """What one end does.

    `reading_stops` lists (received, milliseconds): having received that many bytes, the end
    reads nothing for that long.  `read_size` bounds one recv.  A buffer size of 0 is the kernel's.
    """

    steps: tuple[Step, ...]
    reading_stops: tuple[tuple[int, float], ...] = ()
    read_size: int = READ_SIZE
    send_buffer: int = 0
    receive_buffer: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """How the client sends its instruction: cut where, and does it wait for the answer.

    `coalesce`: the last piece of the instruction travels with the first bytes of the payload.
    """

    cuts: tuple[int, ...] = ()
    pause_ms: float = 0.0
    await_ack: bool = True
    coalesce: bool = False


class Verdict(enum.Enum):
    """How much of a conversation's ending is determined by its scripts."""

    ORDERLY = "orderly"  # every byte arrives and both ends read an end of file
    RESET = "reset"  # one end resets, the other must notice
    RACY = "racy"  # close() with the other end still sending: only the two rules hold


@dataclass(frozen=True, slots=True)
class Conversation:
    """Two scripts and how they meet; the same seed and number make the same conversation."""

    number: int
    kind: str
    verdict: Verdict
    client: Script
    server: Script
    opening: Opening
    server_is_ipv6: bool
    origins: tuple[int, int]  # where in the stream the client's and the server's bytes begin


@dataclass(slots=True)
class EndResult:
    """What one end saw."""

    connected: bool = False
    sent: int = 0
    received: int = 0
    first_wrong_byte: int | None = None
    fin_sent: bool = False
    eof: bool = False
    reset: bool = False
    own_reset: bool = False
    own_close: bool = False
    asked: bool = False  # whether the other end, which had sent a reset, was still there
    error: str = ""
    doing: str = ""  # the step that was never finished, when the deadline came


@dataclass(slots=True)
class Result:
    """What both ends saw, and what the client read in front of the payload."""

    conversation: Conversation
    client: EndResult
    server: EndResult
    ack: bytes = b""
    stuck: bool = False
    took_s: float = 0.0
    thrown_away: int = 0  # packets, by kernels of this network since all of them began


# ---------------------------------------------------------------------------- generator


def conversation(seed: int, number: int, *, largest: int = 1 << 20) -> Conversation:
    """The conversation of that number; `largest` bounds the bytes of one direction (roughly)."""
    rng = random.Random(f"{seed}/{number}")
    kinds: dict[str, tuple[int, Callable[[random.Random, int], _Draft]]] = {
        "dialogue": (22, _dialogue),
        "duplex": (18, _duplex),
        "upload then answer": (12, _upload_then_answer),
        "server first": (10, _server_first),
        "download": (8, _download),
        "almost nothing": (8, _almost_nothing),
        "slow readers": (7, _slow_readers),
        "reset by client": (6, _reset_by_client),
        "reset by server": (6, _reset_by_server),
        "abrupt close": (3, _abrupt_close),
    }
    kind = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    draft = kinds[kind][1](rng, largest)
    cuts = tuple(sorted(rng.sample(range(1, 18), rng.choice([1, 1, 1, 2, 3, 17]))))
    return Conversation(
        number=number,
        kind=kind,
        verdict=draft.verdict,
        client=draft.script(rng, draft.client),
        server=draft.script(rng, draft.server),
        opening=Opening(
            cuts=cuts if rng.random() < 0.25 else (),
            pause_ms=rng.choice([0.0, 0.0, 1.0, 5.0]),
            await_ack=rng.random() < 0.5,
            coalesce=rng.random() < 0.5,
        ),
        server_is_ipv6=rng.random() < 0.3,
        origins=(rng.randrange(STREAM_PERIOD), rng.randrange(STREAM_PERIOD)),
    )


def bulk_conversation(seed: int, number: int, *, largest: int = 200_000_000) -> Conversation:
    """One that moves tens to hundreds of megabytes: one way or both, to fast readers and slow.

    What a short conversation never meets: full buffers at every stage, windows that close and
    open, segments that are dropped and sent again, a backlog that reaches its limit many times.
    """
    rng = random.Random(f"bulk {seed}/{number}")
    draft = _Draft()
    kind = rng.choice(["up", "down", "both", "both"])
    for name, steps in (("up", draft.client), ("down", draft.server)):
        size = 0
        if kind in (name, "both"):
            size = _log_uniform(rng, min(largest, 20_000_000), largest)
        elif rng.random() < 0.5:
            size = _log_uniform(rng, 1, 100_000)
        # Blocks of one size are what programs write.
        block = rng.choice([LARGEST_CHUNK, LARGEST_CHUNK, 262_144, 100_003, 65_536])
        while size:
            piece = min(size, block)
            steps.append(Send(piece))
            size -= piece
            if rng.random() < 0.5 * block / largest:
                steps.append(Pause(rng.uniform(1, 300)))
    _endings(rng, draft)
    client = _bulk_script(rng, draft.client, _sent_by(draft.server))
    server = _bulk_script(rng, draft.server, _sent_by(draft.client))
    return Conversation(
        number=number,
        kind=f"bulk {kind}",
        verdict=Verdict.ORDERLY,
        client=client,
        server=server,
        opening=Opening(await_ack=rng.random() < 0.5),
        server_is_ipv6=rng.random() < 0.3,
        origins=(rng.randrange(STREAM_PERIOD), rng.randrange(STREAM_PERIOD)),
    )


def _bulk_script(rng: random.Random, steps: list[Step], incoming: int) -> Script:
    stops: tuple[tuple[int, float], ...] = ()
    if incoming > LARGEST_CHUNK and rng.random() < 0.5:
        places = sorted({rng.randrange(incoming) for _ in range(rng.choice([1, 3, 12]))})
        stops = tuple((place, rng.uniform(1, 400)) for place in places)
    return Script(
        steps=tuple(steps),
        reading_stops=stops,
        read_size=rng.choice([READ_SIZE, READ_SIZE, 1 << 16, 20_000]),
    )


@dataclass(slots=True)
class _Draft:
    client: list[Step] = field(default_factory=list)
    server: list[Step] = field(default_factory=list)
    verdict: Verdict = Verdict.ORDERLY
    stops: int = 0  # how often a reader stops, each side

    def script(self, rng: random.Random, steps: list[Step]) -> Script:
        other = self.server if steps is self.client else self.client
        incoming = _sent_by(other)
        stops: tuple[tuple[int, float], ...] = ()
        if self.stops and incoming:
            places = sorted({rng.randrange(incoming) for _ in range(self.stops)})
            stops = tuple((place, rng.uniform(1, 60)) for place in places)
        tight = rng.random() < (0.5 if self.stops else 0.1)
        # A window much smaller than loopback's segments moves a few kilobytes per delayed ack:
        # the tightest buffers are for the short streams.
        tight_receive = 20_000 if incoming > 16_384 else 4096
        return Script(
            steps=tuple(steps),
            reading_stops=stops,
            read_size=rng.choice([READ_SIZE, READ_SIZE, READ_SIZE, 1 << 16, 5000, 1460]),
            send_buffer=rng.choice([4096, 20_000]) if tight and rng.random() < 0.5 else 0,
            receive_buffer=tight_receive if tight and incoming < 200_000 else 0,
        )


def _sent_by(steps: Iterable[Step]) -> int:
    return sum(step.size for step in steps if isinstance(step, Send))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(low * (high / low) ** rng.random()))


def _message(rng: random.Random, total: int) -> list[Step]:
    """`total` bytes in chunks of random sizes with a few pauses."""
    steps: list[Step] = []
    pauses = 3
    while total:
        # Many small chunks are what segments get coalesced from, but a megabyte of them is slow.
        low = max(1, total // 64)
        size = min(total, _log_uniform(rng, low, max(low, min(total, LARGEST_CHUNK))))
        steps.append(Send(size, more=rng.random() < 0.1))
        total -= size
        if pauses and rng.random() < 0.06:
            pauses -= 1
            steps.append(Pause(rng.choice([0.0, 0.5, 2.0, 10.0])))
    return steps


def _amount(rng: random.Random, largest: int) -> int:
    """Mostly small, sometimes large, sometimes nothing at all."""
    pick = rng.random()
    if pick < 0.05:
        return 0
    if pick < 0.55:
        return _log_uniform(rng, 1, min(largest, 4096))
    if pick < 0.9:
        return _log_uniform(rng, 256, min(largest, 131_072))
    return _log_uniform(rng, min(65_536, largest), largest)


def _endings(rng: random.Random, draft: _Draft) -> _Draft:
    """Half-close in either order, or both at once."""
    order = rng.choice(["client first", "server first", "both"])
    if order == "client first":
        draft.server.append(AwaitEof())
    elif order == "server first":
        draft.client.append(AwaitEof())
    for steps in (draft.client, draft.server):
        if steps and isinstance(steps[-1], Send) and rng.random() < 0.5:
            steps[-1] = Send(steps[-1].size, more=True)  # FIN with data
        steps.append(Fin())
    return draft


def _dialogue(rng: random.Random, largest: int) -> _Draft:
    draft = _Draft()
    for _ in range(rng.choice([1, 1, 2, 3, 5, 9, 17])):
        draft.client += _message(rng, _log_uniform(rng, 1, min(largest, 20_000)))
        draft.server.append(Await(_sent_by(draft.client)))
        draft.server += _message(rng, _log_uniform(rng, 1, min(largest, 60_000)))
        draft.client.append(Await(_sent_by(draft.server)))
    return _endings(rng, draft)


def _duplex(rng: random.Random, largest: int) -> _Draft:
    draft = _Draft(_message(rng, _amount(rng, largest)), _message(rng, _amount(rng, largest)))
    return _endings(rng, draft)


def _upload_then_answer(rng: random.Random, largest: int) -> _Draft:
    """The client's FIN is there before the server answers; often with the data, or the ack."""
    draft = _Draft()
    draft.client += _message(rng, _amount(rng, largest))
    if draft.client and isinstance(draft.client[-1], Send) and rng.random() < 0.5:
        draft.client[-1] = Send(draft.client[-1].size, more=True)
    draft.client.append(Fin())
    draft.server.append(AwaitEof())
    draft.server += _message(rng, _amount(rng, largest))
    draft.server.append(Fin())
    return draft


def _server_first(rng: random.Random, largest: int) -> _Draft:
    draft = _Draft()
    draft.server += _message(rng, _log_uniform(rng, 1, 2000))
    draft.client.append(Await(_sent_by(draft.server)))
    draft.client += _message(rng, _amount(rng, largest))
    draft.server.append(Await(_sent_by(draft.client)))
    draft.server += _message(rng, _amount(rng, largest))
    return _endings(rng, draft)


def _download(rng: random.Random, largest: int) -> _Draft:
    draft = _Draft()
    draft.client += _message(rng, _log_uniform(rng, 1, 500))
    if rng.random() < 0.5:
        draft.client.append(Fin())
        draft.server.append(AwaitEof())
    draft.server += _message(rng, _log_uniform(rng, 10_000, 4 * largest))
    draft.server.append(Fin())
    if not isinstance(draft.client[-1], Fin):
        draft.client += [AwaitEof(), Fin()]
    return draft


def _almost_nothing(rng: random.Random, largest: int) -> _Draft:
    del largest
    draft = _Draft()
    if rng.random() < 0.3:
        draft.client.append(Send(1))
    if rng.random() < 0.3:
        draft.server.append(Send(1))
    return _endings(rng, draft)


def _slow_readers(rng: random.Random, largest: int) -> _Draft:
    draft = _Draft(stops=rng.choice([1, 2, 4]))
    draft.client += _message(rng, _log_uniform(rng, 1000, largest))
    draft.server += _message(rng, _log_uniform(rng, 1000, largest))
    return _endings(rng, draft)


def _reset_by_client(rng: random.Random, largest: int) -> _Draft:
    draft = _orderly(rng, largest)
    draft.client, draft.server = _with_reset(rng, draft.client, draft.server)
    draft.verdict = Verdict.RESET
    return draft


def _reset_by_server(rng: random.Random, largest: int) -> _Draft:
    draft = _orderly(rng, largest)
    draft.server, draft.client = _with_reset(rng, draft.server, draft.client)
    draft.verdict = Verdict.RESET
    return draft


def _orderly(rng: random.Random, largest: int) -> _Draft:
    make = rng.choice([_dialogue, _duplex, _upload_then_answer, _server_first, _slow_readers])
    return make(rng, largest)


def _with_reset(
    rng: random.Random, resetter: list[Step], victim: list[Step]
) -> tuple[list[Step], list[Step]]:
    """Cut the first script anywhere and reset there; the second one waits to be told.

    At most one of the two half-closes before: after both FINs nobody would see the reset.
    """
    resetter = resetter[: rng.randrange(len(resetter))]
    waits_for_fin = any(isinstance(step, AwaitEof) for step in resetter)
    if waits_for_fin:
        resetter = [step for step in resetter if not isinstance(step, Fin)]
    half_closed = any(isinstance(step, Fin) for step in resetter)
    if rng.random() < 0.5:
        resetter.append(Pause(rng.choice([0.0, 1.0, 5.0, 30.0])))
    resetter.append(Reset())
    if half_closed or (not waits_for_fin and rng.random() < 0.5):
        victim = [step for step in victim if not isinstance(step, Fin)]
    return resetter, [*victim, Hold()]


def _abrupt_close(rng: random.Random, largest: int) -> _Draft:
    """One end sends all it has and closes, unread bytes or not, while the other may still send."""
    draft = _Draft(_message(rng, _amount(rng, largest)), _message(rng, _amount(rng, largest)))
    first, second = (
        (draft.client, draft.server) if rng.random() < 0.5 else (draft.server, draft.client)
    )
    first.append(Close())
    second.append(Fin())
    draft.verdict = Verdict.RACY
    return draft


# ---------------------------------------------------------------------------- the loop


class _End:
    """One socket playing one script."""

    __slots__ = (
        "ack_left",
        "broken",
        "done",
        "held",
        "in_origin",
        "interest",
        "left",
        "on_done",
        "out_origin",
        "player",
        "preface",
        "reading",
        "result",
        "script",
        "sock",
        "step",
        "stops",
        "talk",
        "waiting",
    )

    def __init__(self, player: _Player, talk: _Talk, script: Script, origins: tuple[int, int]):
        self.player = player
        self.talk = talk
        self.script = script
        self.out_origin, self.in_origin = origins
        self.sock: socket.socket | None = None
        self.result = EndResult()
        self.step = 0
        self.left = -1  # bytes of the current Send not yet taken by TCP; -1: not begun
        self.waiting = False  # a Pause is running
        self.reading = True
        self.stops = list(script.reading_stops)
        self.preface: list[tuple[bytes, bool, float]] = []
        self.ack_left = 0
        self.held = False
        self.broken = False
        self.done = False
        self.interest = 0

    def open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.script.send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.script.send_buffer)
        if self.script.receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.script.receive_buffer)
        self.sock = sock
        self.player.watch(sock.fileno(), self.ready)
        self.player.poll.register(sock.fileno(), 0)

    def ready(self, events: int) -> None:
        assert self.sock is not None
        if not self.result.connected:
            if events & (select.EPOLLERR | select.EPOLLHUP):
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self.fail(OSError(code, "connect"))
                return
            self.result.connected = True
        if events & (select.EPOLLERR | select.EPOLLHUP):
            # Nothing will come any more that this end was waiting for: take what the
            # socket still holds and its error.
            self.read(everything=True)
        elif events & select.EPOLLIN and self.reading:
            self.read(everything=False)
        if not self.done:
            self.advance()

    def read(self, *, everything: bool) -> None:
        assert self.sock is not None
        result = self.result
        while not self.done and not result.eof:
            size = self.script.read_size
            if self.ack_left:
                size = min(size, self.ack_left)
            elif self.stops and not everything:
                size = max(1, min(size, self.stops[0][0] - result.received))
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                return
            except OSError as error:
                self.fail(error)
                return
            if not data:
                # After an error was taken by send() the kernel answers "end of file".
                if self.broken:
                    self.finish()
                    return
                result.eof = True
                break
            if self.ack_left:
                self.take_ack(data)
                continue
            place = (self.in_origin + result.received) % STREAM_PERIOD
            if result.first_wrong_byte is None and not _BYTES.startswith(data, place):
                good = _common_prefix(data, place)
                result.first_wrong_byte = result.received + good
            result.received += len(data)
            if not everything:
                self.stop_reading_here()
                return  # others want their turn
        if result.eof and not self.done and self.result.fin_sent and not self.held:
            self.finish()

    def take_ack(self, data: bytes) -> None:
        self.talk.ack += data
        self.ack_left -= len(data)
        if not ACK.startswith(self.talk.ack):
            # A refusal: take the rest of it as text, of any length.
            self.ack_left = 99

    def stop_reading_here(self) -> None:
        if self.stops and self.result.received >= self.stops[0][0]:
            _, milliseconds = self.stops.pop(0)
            self.reading = False
            self.player.after(milliseconds / 1000, self.resume_reading)

    def resume_reading(self) -> None:
        self.reading = True
        if not self.done:
            self.set_interest()

    def advance(self) -> None:
        """Go on with the script as far as it goes without waiting."""
        assert self.sock is not None
        while not self.done and not self.waiting and self.result.connected:
            if self.preface:
                if not self.send_preface():
                    break
                continue
            if self.ack_left and self.talk.conversation.opening.await_ack:
                break
            if self.step == len(self.script.steps):
                if self.result.eof and self.result.fin_sent:
                    self.finish()
                break
            if not self.perform(self.script.steps[self.step]):
                break
            self.step += 1
        if not self.done:
            self.set_interest()

    def send_preface(self) -> bool:
        assert self.sock is not None
        data, more, pause_s = self.preface[0]
        sent = self.transmit(memoryview(data), more=more)
        if sent < len(data):
            if sent >= 0:
                self.preface[0] = (data[sent:], more, pause_s)
            return False
        self.preface.pop(0)
        if pause_s:
            self.pause(pause_s)
        return True

    def transmit(self, data: memoryview, *, more: bool) -> int:
        """How much TCP took; -1 when the connection broke."""
        assert self.sock is not None
        try:
            return self.sock.send(data, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.broken = True
            self.note(error)
            self.read(everything=True)
            if not self.done:
                self.finish()
            return -1

    def perform(self, step: Step) -> bool:
        """Do one step; False: not finished, try again when something happens."""
        assert self.sock is not None
        result = self.result
        match step:
            case Send(size, more):
                if self.left < 0:
                    self.left = size
                while self.left:
                    place = (self.out_origin + result.sent) % STREAM_PERIOD
                    sent = self.transmit(_VIEW[place : place + self.left], more=more)
                    if sent <= 0:
                        return False
                    result.sent += sent
                    self.left -= sent
                self.left = -1
            case Pause(milliseconds):
                self.pause(milliseconds / 1000)
            case Await(received):
                return result.received >= received
            case AwaitEof():
                return result.eof
            case Fin():
                try:
                    self.sock.shutdown(socket.SHUT_WR)
                except OSError as error:
                    self.fail(error)
                    return False
                result.fin_sent = True
            case Close():
                result.own_close = True
                self.finish()
            case Reset():
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_NOW)
                result.own_reset = True
                self.player.after(_ASKS_AFTER_S, self.talk.ask)
                self.finish()
            case Hold():
                self.held = True
                return False
        return True

    def ask(self) -> None:
        """Have the kernel ask whether the other end is still there (a keepalive), at once."""
        assert self.sock is not None
        self.result.asked = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)

    def pause(self, seconds: float) -> None:
        self.waiting = True
        self.player.after(seconds, self.end_pause)

    def end_pause(self) -> None:
        self.waiting = False
        if not self.done:
            self.advance()

    def set_interest(self) -> None:
        assert self.sock is not None
        wanted = 0
        if self.reading and not self.result.eof:
            wanted |= select.EPOLLIN
        if not self.result.connected or (
            not self.waiting and (self.left > 0 or self.preface) and not self.broken
        ):
            wanted |= select.EPOLLOUT
        if wanted != self.interest:
            self.interest = wanted
            self.player.poll.modify(self.sock.fileno(), wanted)

    def note(self, error: OSError) -> None:
        if error.errno in _RESET_ERRNOS:
            self.result.reset = True
        else:
            self.result.error = errno.errorcode.get(error.errno or 0, str(error))

    def fail(self, error: OSError) -> None:
        self.note(error)
        self.finish()

    def finish(self) -> None:
        if self.done:
            return
        self.done = True
        if self.sock is not None:
            self.player.forget(self.sock.fileno())
            self.sock.close()
        self.talk.end_finished()

    def describe(self) -> str:
        if self.done:
            return ""
        if self.preface:
            return "sending the instruction"
        if self.step < len(self.script.steps):
            return f"step {self.step}: {self.script.steps[self.step]}, {self.left} bytes left"
        return "waiting for the end of file"


def _common_prefix(data: bytes, place: int) -> int:
    low, high = 0, len(data)
    while low < high:
        middle = (low + high + 1) // 2
        if _BYTES.startswith(data[:middle], place):
            low = middle
        else:
            high = middle - 1
    return low


class Way(NamedTuple):
    """A listener of a forwarder, and the one server that it leads to: addresses with ports."""

    listener: tuple[str, int]
    server: tuple[str, int]

    @property
    def is_ipv6(self) -> bool:
        """Whether both are."""
        return ":" in self.server[0]


class _Talk:
    """One conversation being played."""

    def __init__(self, player: _Player, conversation: Conversation, *, deadline_s: float):
        self.player = player
        self.conversation = conversation
        self.ack = b""
        self.over = False
        self.stuck = False
        self.asked = False
        self.began = time.monotonic()
        up, down = conversation.origins
        self.client = _End(player, self, conversation.client, (up, down))
        self.server = _End(player, self, conversation.server, (down, up))
        self.way = player.take_way(is_ipv6=conversation.server_is_ipv6)
        family = socket.AF_INET6 if conversation.server_is_ipv6 else socket.AF_INET
        self.listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if self.way is not None:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind(self.way.server)
        else:
            self.listener.bind(("::1" if conversation.server_is_ipv6 else "127.0.0.1", 0))
        self.listener.listen(4)
        player.watch(self.listener.fileno(), self.accept)
        player.poll.register(self.listener.fileno(), select.EPOLLIN)
        player.after(deadline_s, self.expire)

        host, port = self.listener.getsockname()[:2]
        via = player.via
        if self.way is not None:
            via = self.way.listener
        elif via is not None:
            text = instruction(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            self.client.preface = _pieces(text, conversation.opening)
            self.client.ack_left = len(ACK)
        target = (host, port) if via is None else via
        sock = socket.socket(
            socket.AF_INET6 if ":" in target[0] else socket.AF_INET,
            socket.SOCK_STREAM | socket.SOCK_NONBLOCK,
        )
        code = sock.connect_ex(target)
        self.client.open(sock)
        if code not in (0, errno.EINPROGRESS):
            self.client.fail(OSError(code, "connect"))
        else:
            self.client.set_interest()

    def accept(self, events: int) -> None:
        del events
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return  # reset before we came: accept(2) asks to go on
        self.close_listener()
        self.server.result.connected = True
        self.server.open(sock)
        self.server.advance()
        if not self.server.done:
            self.server.set_interest()

    def close_listener(self) -> None:
        if self.listener.fileno() >= 0:
            self.player.forget(self.listener.fileno())
            self.listener.close()

    def end_finished(self) -> None:
        if self.over:
            return
        if self.client.done and self.server.done:
            self.end()
        elif self.client.done and not self.server.result.connected:
            # The connection to the server may still be on its way, or never be made.
            self.player.after(0.3, self.give_up_on_server)

    def give_up_on_server(self) -> None:
        if not self.over and not self.server.result.connected:
            self.end()

    def ask(self) -> None:
        """One end has reset long ago, and the other, which has not heard of it, asks."""
        self.asked = True
        for end in (self.client, self.server):
            if end.result.connected and not end.done:
                end.ask()

    def expire(self) -> None:
        if not self.over:
            self.stuck = True
            self.client.result.doing = self.client.describe()
            self.server.result.doing = self.server.describe()
            self.end()

    def end(self) -> None:
        self.over = True
        self.close_listener()
        self.player.give_back(self.way)
        for end in (self.client, self.server):
            if not end.done:
                end.finish()
        self.player.talk_ended(
            Result(
                self.conversation,
                self.client.result,
                self.server.result,
                self.ack,
                self.stuck,
                time.monotonic() - self.began,
                thrown_away() - self.player.thrown_away_before if self.asked else 0,
            )
        )


def _pieces(text: bytes, opening: Opening) -> list[tuple[bytes, bool, float]]:
    cuts = [0, *(cut for cut in opening.cuts if cut < len(text)), len(text)]
    pieces = [
        (text[start:stop], False, opening.pause_ms / 1000)
        for start, stop in itertools.pairwise(cuts)
    ]
    last = pieces[-1][0]
    pieces[-1] = (last, opening.coalesce and not opening.await_ack, 0.0)
    return pieces


def thrown_away() -> int:
    """Packets that kernels of this network have thrown away for want of memory, behind a window."""
    with open("/proc/thread-self/net/netstat", encoding="ascii") as netstat:
        names, values = (next(netstat).split() for _ in range(2))
    return int(values[names.index("TCPRcvQDrop")])


class _Player:
    """The epoll loop: sockets, timers, and how many conversations run at once."""

    def __init__(
        self,
        conversations: Iterable[Conversation],
        *,
        via: tuple[str, int] | None,
        ways: Iterable[Way],
        concurrency: int,
        deadline_s: float,
        on_result: Callable[[Result], None],
    ):
        self.conversations = iter(conversations)
        self.via = via
        # The one that was not used for longest comes first: somebody may still come late by it.
        self.ways = {version: deque[Way]() for version in (False, True)}
        for way in ways:
            self.give_back(way)
        self.has_ways = any(self.ways.values())
        self.concurrency = concurrency
        self.deadline_s = deadline_s
        self.on_result = on_result
        self.poll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.timer_numbers = itertools.count()
        self.running = 0
        self.exhausted = False
        self.thrown_away_before = thrown_away()

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        self.handlers[fd] = handler

    def forget(self, fd: int) -> None:
        del self.handlers[fd]
        self.poll.unregister(fd)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        entry = (time.monotonic() + seconds, next(self.timer_numbers), call)
        heapq.heappush(self.timers, entry)

    def take_way(self, *, is_ipv6: bool) -> Way | None:
        """For one conversation; None: the client names its server, or connects to it."""
        return self.ways[is_ipv6].popleft() if self.has_ways else None

    def give_back(self, way: Way | None) -> None:
        if way is not None:
            self.ways[way.is_ipv6].append(way)

    def talk_ended(self, result: Result) -> None:
        self.running -= 1
        self.on_result(result)

    def run(self) -> None:
        try:
            while True:
                while self.running < self.concurrency and not self.exhausted:
                    self.start_next()
                if not self.running and self.exhausted:
                    return
                self.turn()
        finally:
            self.poll.close()

    def start_next(self) -> None:
        following = next(self.conversations, None)
        if following is None:
            self.exhausted = True
            return
        self.running += 1
        _Talk(self, following, deadline_s=self.deadline_s)

    def turn(self) -> None:
        now = time.monotonic()
        timeout = max(0.0, self.timers[0][0] - now) if self.timers else -1
        for fd, events in self.poll.poll(timeout, 256):
            handler = self.handlers.get(fd)
            if handler is not None:  # closed by an earlier event of this turn
                handler(events)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()


def run(
    conversations: Iterable[Conversation],
    *,
    via: tuple[str, int] | None = None,
    ways: Iterable[Way] = (),
    concurrency: int = 128,
    deadline_s: float = 30.0,
    on_result: Callable[[Result], None] | None = None,
) -> dict[int, Result]:
    """Play all of them, `concurrency` at a time, and return the results by number.

    `via` is the forwarder's listener; None connects the two ends directly.  `ways` are listeners
    that lead to a server each, more than `concurrency` of each version of IP.  A conversation that
    is not over after `deadline_s` is cut off and marked stuck.  With `on_result` each result is
    passed to it instead of being kept.
    """
    results: dict[int, Result] = {}

    def keep(result: Result) -> None:
        results[result.conversation.number] = result

    _Player(
        conversations,
        via=via,
        ways=ways,
        concurrency=concurrency,
        deadline_s=deadline_s,
        on_result=on_result or keep,
    ).run()
    return results


# ---------------------------------------------------------------------------- the judge


def faults(direct: Result, forwarded: Result) -> list[str]:
    """What is wrong with a forwarded conversation, given how the direct one went; [] if nothing."""
    talk = forwarded.conversation
    found = rule_violations(forwarded)
    if found:
        return found
    if talk.verdict is not Verdict.RACY:
        for name in ("client", "server"):
            end: EndResult = getattr(forwarded, name)
            model: EndResult = getattr(direct, name)
            if not end.connected and _client_left_early(forwarded):
                continue
            if end.reset != model.reset:
                found.append(f"{name}: reset is {end.reset}, directly {model.reset}")
            if talk.verdict is Verdict.ORDERLY and end.received != model.received:
                found.append(f"{name}: received {end.received}, directly {model.received}")
            if talk.verdict is Verdict.ORDERLY and end.eof != model.eof:
                found.append(f"{name}: end of file is {end.eof}, directly {model.eof}")
    return found


def rule_violations(result: Result) -> list[str]:
    """What breaks the rules that hold for every conversation, direct ones included."""
    found = []
    if result.stuck:
        found.append("not over in time")
    talk = result.conversation
    for name, end, other in (
        ("client", result.client, result.server),
        ("server", result.server, result.client),
    ):
        if end.error:
            found.append(f"{name}: {end.error}")
        if end.first_wrong_byte is not None:
            found.append(f"{name}: byte {end.first_wrong_byte} is not the one that was sent")
        if end.received > other.sent:
            found.append(f"{name}: received {end.received}, only {other.sent} were sent")
        if end.eof and end.received != other.sent:
            found.append(f"{name}: clean end of file after {end.received} of {other.sent} bytes")
        if end.eof and not (other.fin_sent or other.own_close):
            found.append(f"{name}: clean end of file although the other end sent no FIN")
        if end.asked and not result.thrown_away:
            found.append(f"{name}: heard of the reset only when it asked")
        if end.connected and not (end.eof or end.reset or end.own_reset or end.own_close):
            found.append(f"{name}: ended without an end of file or a reset")
        if talk.verdict is Verdict.ORDERLY and end.reset:
            found.append(f"{name}: reset in an orderly conversation")
        if not end.connected and not _client_left_early(result):
            found.append(f"{name}: never connected")
    if result.ack and result.ack != ACK and not ACK.startswith(result.ack):
        found.append(f"refused: {result.ack!r}")
    return found


def _client_left_early(result: Result) -> bool:
    """Whether the client was gone before the ack, so that there need not be a server at all."""
    gone = result.client.own_reset or result.client.own_close
    return gone and result.ack != ACK


def server_given_up(result: Result) -> bool:
    """Whether the server was closed before anybody had connected, for want of a client."""
    return not result.server.connected and _client_left_early(result)


def report(seed: int, bad: Sequence[tuple[Result, list[str]]], *, most: int = 5) -> str:
    """A text that lets someone else see the same failures again."""
    lines = [f"{len(bad)} bad conversations, seed {seed}"]
    for result, found in bad[:most]:
        talk = result.conversation
        lines.append(f"number {talk.number} ({talk.kind}), {result.took_s:.2f} s:")
        lines += [f"    {text}" for text in found]
        lines.append(f"    {talk.opening}")
        for name, script, end in (
            ("client", talk.client, result.client),
            ("server", talk.server, result.server),
        ):
            steps = ", ".join(str(step) for step in script.steps[:24])
            lines.append(f"    {name}: {end}")
            lines.append(f"      {len(script.steps)} steps: {steps}")
    return "\n".join(lines)


def close_quietly(*socks: socket.socket) -> None:
    """Close sockets of which some may be closed or reset already."""
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.close()
