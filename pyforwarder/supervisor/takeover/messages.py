"""What is said between a daemon and the one that takes its place: `pyforwarder upgrade`.

Both are of one instance and of one user, and speak over a socket pair that the successor has made
and handed over by the control socket. The successor asks, the predecessor answers:

    offer   what the predecessor has, with its descriptors; nothing changes
    last_id the highest number of a pair so far
    take    the successor's workers accept: the predecessor accepts no more, and hands its pairs
            over, worker by worker, through the sockets that come with this; spliced ones stay with
            it if their records are of another version than the successor's
    pairs   rows of the pairs that have stayed with it
    flush   reset some of these
    end     end with them; at once, or when they have ended

and of its own accord the predecessor says `released`: it has released its spliced pairs, which
wait for its successor's keeper, or all of them are known that stay; or, before `take`, `ending`: it
was told to end, and nobody takes its place.

Until `take` is answered a successor that fails in any way has changed nothing. Both listen on the
very same sockets, so nobody who connects meanwhile is refused or lost.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from pyforwarder.core.address import Address, SystemdSockets, UnixAddress
from pyforwarder.errors import ControlError
from pyforwarder.worker.used_tokens import SHARES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.core.address import Bind
    from pyforwarder.runtime.channel import Channel

# Of what is said here; another number is another language.
PROTOCOL: Final = 1
# A daemon of this many sockets would not have started: a worker's share fits into its descriptors.
MOST_FDS: Final = 64 * 1024
MOST_DOWN: Final = 64 * 1024  # servers that are told of
# The kernel takes 253 with a message (SCM_MAX_FD), of which one may be the message itself.
_FDS_AT_ONCE: Final = 240
# Of a message: rows of more than a hundred thousand pairs.
MOST_BYTES: Final = 64 << 20
ANSWER_TIMEOUT_S: Final = 15.0
# As long as its successor loads and proves what it needs: one that takes longer has failed.
SUCCESSOR_TIMEOUT_S: Final = 300.0
_UCRED: Final = struct.Struct("=iII")

_Text = Annotated[str, Field(max_length=64 * 1024)]
_Short = Annotated[str, Field(max_length=4096)]
_Count = Annotated[int, Field(ge=0, le=MOST_FDS)]
_Number = Annotated[int, Field(ge=0, lt=1 << 63)]
# ["ip", host, port], ["unix", path] or ["systemd", name]
BindParts = Annotated[list[str | int], Field(min_length=2, max_length=3)]


class _Message(BaseModel):
    """No conversion of types; a field that another version adds is not for us."""

    # Made ready when one is first heard, which most never are: 10 ms less of a start.
    model_config = ConfigDict(defer_build=True, strict=True, extra="ignore", frozen=True)


class OfferedAddress(_Message):
    """One address of a listener; `sockets` descriptors belong to it."""

    listener: _Short
    wanted: BindParts
    bind: BindParts
    protocol: Literal["tcp", "udp"]
    sockets: _Count
    is_ours: bool
    mode: Annotated[int, Field(ge=0, le=0o7777)] | None
    freebind: bool


class OfferedWeb(_Message):
    """Where metrics or the status page are served; one descriptor belongs to it."""

    key: _Short
    wanted: BindParts


class OfferedTokens(_Message):
    """Whose the tables of used tokens are: see worker/used_tokens.py."""

    share: Annotated[int, Field(ge=0, lt=SHARES)]  # the predecessor's
    # CLOCK_MONOTONIC, seconds: from when on nobody writes into each share but its next owner.
    free_at_s: Annotated[list[float], Field(min_length=SHARES, max_length=SHARES)]


class OfferedDown(_Message):
    """A server that health checks found down."""

    upstream: _Short
    server: _Short
    why: _Short


class Offer(_Message):
    """What a predecessor has. Its descriptors come in the order of these fields:

    the control socket, the lock, standard output and standard error, then those of `handshakes`,
    `used_tokens`, `marks`, `web`, `activation` and `places`.
    """

    protocol: Literal[1]
    version: _Short
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    config_path: _Short | None
    overrides: dict[_Short, _Short]
    detach: bool
    is_draining: bool = False  # it was told to end, has no listeners, and lets its pairs end
    verbosity: Annotated[int, Field(ge=0, le=9)]
    workers: Annotated[int, Field(ge=1, le=255)]
    last_id: _Number = 0  # the highest number of a pair so far
    serial: _Number  # of the configuration in force: a later one has other sockets
    drained: Annotated[list[Annotated[list[_Short], Field(min_length=2, max_length=2)]], Field()]
    environ: dict[_Short, _Text]  # systemd's words to the daemon
    # Whether spliced pairs can outlive their daemon; "passing": there are some, and they cannot.
    splice: Literal["none", "pinned", "passing"]
    splice_map: _Number | None = None  # the id of the map with their records
    splice_pins: _Short = "splice"  # the directory of their pins (datapath/splice/directories.py)
    # Whether they can stay with it, which an older build cannot say.
    keeps_spliced: bool = False
    # The process that writes these; 0: there is none. `last_id` and `take` say it, too.
    keeper: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    # Where it listens, connects and splices: the inode of its network namespace.
    network: _Number | None = None
    has_handshakes: bool  # a map of what the programs of splice have seen, if asked in that form
    used_tokens: OfferedTokens | None = None  # SHARES tables for each worker
    down: Annotated[
        list[OfferedDown], Field(max_length=MOST_DOWN)
    ] = []  # servers that get no pairs
    marks: list[_Short]  # names that say that our filters are in use (attach/unix_names.py)
    web: list[OfferedWeb]
    activation: list[_Short]
    places: list[OfferedAddress]

    def descriptors(self) -> int:
        """How many come with it."""
        named = len(self.marks) + len(self.web) + len(self.activation)
        named += self.workers * SHARES if self.used_tokens is not None else 0
        return 4 + self.has_handshakes + named + sum(place.sockets for place in self.places)


class Ask(_Message):
    """What a successor wants."""

    do: Literal["offer", "last_id", "take", "pairs", "flush", "end"]
    serial: _Number = 0  # take: of the offer
    ids: Annotated[list[_Number], Field(max_length=1 << 16)] | None = None  # flush; None: all
    now: bool = False  # end
    keeps_spliced: bool = False  # take: spliced pairs stay
    # offer: the form of the map of handshakes that the successor reads and writes (`Offer`); 0: an
    # older build, whose map was another one, and which would take any for its own.
    handshakes: _Number = 0


def network_namespace() -> int:
    """Ours, by its inode (namespaces(7))."""
    return os.stat("/proc/self/ns/net").st_ino


# What `Offer.environ` may have.
ENVIRON: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "JOURNAL_STREAM", "FDSTORE")


def parts_of(bind: Bind) -> list[str | int]:
    """An address for the other daemon."""
    if isinstance(bind, Address):
        return ["ip", bind.host, bind.port]
    if isinstance(bind, SystemdSockets):
        return ["systemd", bind.name]
    return ["unix", bind.path]


def bind_of(parts: Sequence[str | int]) -> Address | UnixAddress | SystemdSockets:
    """The other end of `parts_of`.

    Raises:
        ControlError: it is no address.
    """
    match list(parts):
        case ["ip", str(host), int(port)] if 0 <= port < 65536:
            return Address(host, port)
        case ["unix", str(path)]:
            return UnixAddress(path)
        case ["systemd", str(name)]:
            return SystemdSockets(name)
    raise ControlError("the running daemon says an address that is none")


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user that made the other end of a socket pair (SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def receive(channel: Channel) -> tuple[dict[str, Any], list[int]] | None:
    """One message of the other daemon, with its descriptors, which are the caller's to close.

    None: it has hung up, or has sent what is no message.

    Raises:
        BlockingIOError: nothing has come.
    """
    try:
        return channel.receive(most_bytes=MOST_BYTES)
    except BlockingIOError:
        raise
    except (OSError, ValueError):
        return None


def send(channel: Channel, message: dict[str, object], fds: Sequence[int]) -> None:
    """Send one message with as many descriptors as there are; they stay the caller's."""
    rest = list(fds)
    while len(rest) > _FDS_AT_ONCE:
        some, rest = rest[:_FDS_AT_ONCE], rest[_FDS_AT_ONCE:]
        channel.send({"more": True}, some)
    channel.send(message, rest)
