"""Talk to a forwarder: through it, as a client, and to it, over the control socket.

For programs that want to reach a destination through a forwarder:

    >>> from pyforwarder.client import connect
    >>> with connect("10.0.0.5:22", via="gateway.example.com:9999") as connection:
    ...     banner = connection.recv(64)

For programs that hold two connected sockets and want the kernel to move the bytes between them
(what SO_SPLICE does on other systems); the daemon owns and closes them from then on:

    >>> from pyforwarder.client import forward
    >>> pair_id = forward(accepted, outgoing)

`ControlClient` is what the command line is made of: one request, one answer.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict, cast

from pyforwarder.core import token
from pyforwarder.core.address import AddressError, UnixAddress, parse_destination, parse_server
from pyforwarder.core.first_packet.instruction import MIN_LENGTH, OK, frame
from pyforwarder.core.policy import parse_network
from pyforwarder.errors import (
    ConfigError,
    ControlError,
    ForwarderError,
    NotRunningError,
    RefusedError,
    UsageError,
)
from pyforwarder.runtime.instance import DEFAULT_NAME, Instance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.core.address import Address, HostPort

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
What: TypeAlias = Literal["pairs", "listeners", "rules", "upstreams", "stats", "fleet"]

DEFAULT_VIA: Final = "127.0.0.1:9999"  # the listener of the built-in configuration

# A pair is about 400 bytes of JSON: this is room for some 600,000 of them, and an end to what a
# program that is not our daemon could make us hold.
MAX_REPLY_BYTES: Final = 256 << 20
_RECV_BYTES: Final = 1 << 18
_NONCE_BYTES: Final = 12


class PairRow(TypedDict):
    """One pair as `show` gives it; an address that is not known yet is `-`."""

    id: int
    state: str
    datapath: str
    client: str
    listener: str
    source: str
    server: str
    up_bytes: int
    down_bytes: int
    age_s: float
    idle_s: float
    rule: str
    decided: str  # on its first packet: by the `kernel`, which has opened it then, or the `user`
    reason: str
    up_packets: int
    down_packets: int
    backlog_bytes: int | None  # None: this host's kernel cannot be asked


class ListenerRow(TypedDict):
    """One listener and what came to it since `up`."""

    name: str
    bind: str
    protocol: str
    accepted: int
    open: int
    refused: int


class RuleRow(TypedDict):
    """One rule of a listener and how often it decided."""

    listener: str
    rule: str
    taken: int
    refused: int
    to: str
    decided: str  # kernel, user, or partly: at some of the listener's addresses
    why: str  # userspace decides, though its listener asks for the kernel


class UpstreamRow(TypedDict):
    """One server of an upstream."""

    upstream: str
    server: str
    state: str
    pairs: int
    connects: int
    failures: int
    weight: int
    backup: bool
    checked_by: str | None  # `here`, `all`, another machine of the fleet, or nobody


class Flushed(TypedDict):
    """What `flush` did: ids that were reset, and ids that no pair has."""

    flushed: list[int]
    unknown: list[int]


class ControlClient:
    """The control socket of one instance.

    Every call is one connection, one request and one answer within `timeout_s` seconds, so a
    client can be kept for as long as one likes and survives a restart of the daemon.

    Every call raises:
        NotRunningError: no daemon of this instance listens.
        UsageError, ConfigError: the daemon cannot use the arguments, or the configuration.
        ControlError: it understood and refused.
        ForwarderError: it did not answer in time or not in our language, or we may not ask.
    """

    def __init__(self, instance: Instance, *, timeout_s: float = 10.0) -> None:
        self.instance = instance
        self._timeout_s = timeout_s

    def ping(self) -> Json:
        """What the daemon says about itself."""
        return self.request("ping")

    def show(self, what: What) -> Json:
        """The rows (or for `stats` the object) behind `show WHAT`, as the daemon sent them."""
        return self.request("show", what=what)

    def pairs(self) -> list[PairRow]:
        """Every pair, in the daemon's order."""
        return cast("list[PairRow]", _rows(self.show("pairs")))

    def listeners(self) -> list[ListenerRow]:
        """Every listener."""
        return cast("list[ListenerRow]", _rows(self.show("listeners")))

    def rules(self) -> list[RuleRow]:
        """Every rule, listener by listener, in the order in which they are tried."""
        return cast("list[RuleRow]", _rows(self.show("rules")))

    def upstreams(self) -> list[UpstreamRow]:
        """Every server of every upstream."""
        return cast("list[UpstreamRow]", _rows(self.show("upstreams")))

    def stats(self) -> dict[str, Json]:
        """Totals since `up`; `closed` counts ended connections by reason."""
        return _object(self.show("stats"))

    def config(self) -> tuple[str, str]:
        """The text of the configuration in force, and where it came from (for messages)."""
        result = _object(self.request("config"))
        return str(result["text"]), str(result["source"])

    def flush(self, ids: Sequence[int]) -> Flushed:
        """Reset these pairs; an id that no pair has is reported, not an error."""
        return _flushed(self.request("flush", ids=list(ids)))

    def flush_all(self) -> Flushed:
        """Reset every pair."""
        return _flushed(self.request("flush", all=True))

    def reload(self) -> dict[str, Json]:
        """Have the configuration read again; after an error the old one stays in force."""
        return _object(self.request("reload"))

    def set_server(self, server: str, state: Literal["drain", "ready"]) -> dict[str, Json]:
        """Let `UPSTREAM/SERVER` take no new pairs (its pairs go on), or new ones again.

        What is so now: the `server`, its `state`, and its `weight`; with 0 it takes none at all.
        """
        return _object(self.request("server", server=server, state=state))

    def down(self, *, now: bool = False) -> dict[str, Json]:
        """Ask the daemon to drain and end (`now`: to reset what is left and end).

        Returns at once; `instance.LockWatch`, made before this call, waits for the end.
        """
        return _object(self.request("down", now=now))

    def forward(self, pid: int, fd_a: int, fd_b: int) -> int:
        """Join two connected sockets of another process, named by its descriptor numbers.

        That process closes its own descriptors; the pair lives on.  Returns the pair's id.
        """
        return _pair_id(self.request("forward", pid=pid, fds=[fd_a, fd_b]))

    def join(self, fd_a: int, fd_b: int) -> int:
        """Join two connected sockets of this process; the daemon gets duplicates.

        The caller closes its own as soon as this returns.  Returns the pair's id.
        """
        return _pair_id(self.request("join", fds_sent=(fd_a, fd_b)))

    def failover(self) -> dict[str, Json]:
        """The fleet's addresses that move: which, which are here, and whether they may come."""
        return _object(self.request("failover"))

    def take_addresses(self) -> list[str]:
        """Have the daemon take them, and announce them; returns those that it did not have."""
        return cast("list[str]", self.request("take_addresses"))

    def give_addresses(self) -> list[str]:
        """Have the daemon give them up; returns those that it had."""
        return cast("list[str]", self.request("give_addresses"))

    def listen_port(self, port: int) -> int:
        """Move the first TCP listener to another port; returns the one in force."""
        result = _object(self.request("listen_port", port=port))
        return cast("int", result.get("port", port))

    def request(self, do: str, *, fds_sent: Sequence[int] = (), **arguments: Json) -> Json:
        """The result of one request; `fds_sent` travel with it as SCM_RIGHTS."""
        line = json.dumps({"do": do, **arguments}, separators=(",", ":")).encode() + b"\n"
        deadline_s = time.monotonic() + self._timeout_s
        with self._connected() as control:
            try:
                self._send(control, line, fds_sent)
                reply_line = self._receive(control, deadline_s)
            except TimeoutError as error:
                raise ForwarderError(
                    f"instance {self.instance.name!r} did not answer within {self._timeout_s:g} s"
                ) from error
            except OSError as error:
                raise ForwarderError(f"{self.instance.control}: {error.strerror}") from error
        try:
            reply = json.loads(reply_line)
        except ValueError as error:
            raise ForwarderError(f"{self.instance.control}: the answer is not JSON") from error
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
            raise ForwarderError(f"{self.instance.control}: the answer is not ours")
        if not reply["ok"]:
            raise _error_of(reply)
        return cast("Json", reply.get("result"))

    def _connected(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A non-blocking connect to a unix socket with a full backlog fails at once with
            # EAGAIN; a blocking one waits for room, for as long as SO_SNDTIMEO says (unix(7)).
            control.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_SNDTIMEO,
                struct.pack("ll", int(self._timeout_s), int(self._timeout_s % 1 * 1_000_000)),
            )
            control.connect(str(self.instance.control))
            control.settimeout(self._timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            # nobody bound it, or a killed daemon left it behind
            control.close()
            raise NotRunningError(f"instance {self.instance.name!r} is not running") from error
        except PermissionError as error:
            control.close()
            raise ForwarderError(
                f"{self.instance.control}: permission denied (are you root?)"
            ) from error
        except BlockingIOError as error:
            control.close()
            raise ForwarderError(
                f"instance {self.instance.name!r} took no connection within {self._timeout_s:g} s"
            ) from error
        except OSError as error:
            control.close()
            raise ForwarderError(f"{self.instance.control}: {error.strerror}") from error
        except BaseException:
            control.close()
            raise
        return control

    @staticmethod
    def _send(control: socket.socket, line: bytes, fds: Sequence[int]) -> None:
        sent = socket.send_fds(control, [line], list(fds)) if fds else 0
        # Even nothing is sent by sendall(), and fails if the answer has come and the end behind it.
        if sent < len(line):
            control.sendall(line[sent:])

    @staticmethod
    def _receive(control: socket.socket, deadline_s: float) -> bytes:
        reply = bytearray()
        while True:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            control.settimeout(remaining_s)
            chunk = control.recv(_RECV_BYTES)
            end = chunk.find(b"\n")
            if end >= 0:
                return bytes(reply + chunk[:end])
            if not chunk:
                raise ForwarderError("the daemon hung up without an answer")
            reply += chunk
            if len(reply) > MAX_REPLY_BYTES:
                raise ForwarderError(f"the daemon's answer has more than {MAX_REPLY_BYTES} bytes")


def forward(
    sock_a: socket.socket,
    sock_b: socket.socket,
    *,
    instance: str = DEFAULT_NAME,
    timeout_s: float = 10.0,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Hand two connected stream sockets to the running daemon, which joins them in the kernel.

    Bytes that wait unread in either socket are carried first, so nothing is lost; bytes that this
    program has read already are its own to deliver before it calls.  `sock_a` counts as the
    client (up is from a to b).  On success both socket objects are closed here: the connections
    are the daemon's, which ends them the way their peers do.  On an error both stay open and are
    the caller's as before.

    Returns the pair's id, as `show` prints it.

    Raises:
        NotRunningError, ControlError, UsageError, ForwarderError: see `ControlClient`.
    """
    client = ControlClient(Instance.named(instance, environ), timeout_s=timeout_s)
    pair_id = client.join(sock_a.fileno(), sock_b.fileno())
    sock_a.close()
    sock_b.close()
    return pair_id


def connect(
    destination: str | Address | HostPort,
    *,
    via: str | Address | HostPort | UnixAddress = DEFAULT_VIA,
    key: tuple[str, bytes] | None = None,
    source: str | None = None,
    audience: str | None = None,
    nonce: bool = True,
    lifetime_s: float = 60.0,
    ack: bool = True,
    timeout_s: float = 30.0,
) -> socket.socket:
    """A connection to `destination` through the forwarder at `via`, ready for the first byte.

    `destination` is `ip:port`, `[ip6]:port` or `name:port` (the forwarder resolves names).  With
    `key`, a key's id and its secret, the instruction is signed, expires after `lifetime_s`
    seconds and, with `source` (a CIDR), counts for clients from there only, with `audience` only at
    the gateway of that name (its `tokens: {audience: NAME}`), and it has a `nonce` unless that is
    False (see `instruction`).  `ack=False` is for
    rules that say `ack: false`: the socket is returned before anything is known about the server.

    The socket is blocking and without a timeout; the caller closes it.  Exactly the forwarder's
    answer has been read from it, never a byte of the server's.

    Raises:
        RefusedError: the forwarder said no; `.code` is its word.
        UsageError: `destination` or `via` is no address, or the instruction would be too long.
        ForwarderError: no forwarder answered as one within `timeout_s` seconds.
    """
    request = instruction(
        destination,
        key=key,
        source=source,
        audience=audience,
        nonce=nonce,
        # when it ends is said in the time of day, the forwarder's clock has to understand it
        expires_unix_s=time.time_ns() // 1_000_000_000 + math.ceil(lifetime_s),
    )
    deadline_s = time.monotonic() + timeout_s
    try:
        forwarder = parse_server(str(via))
    except AddressError as error:
        raise UsageError(f"via {via}: {error}") from error
    try:
        connection = _connect_to(forwarder, timeout_s)
    except OSError as error:
        raise ForwarderError(f"forwarder {forwarder}: {_words(error)}") from error
    try:
        connection.sendall(request)
        if ack:
            _await_answer(connection, str(destination), deadline_s)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise ForwarderError(f"forwarder {forwarder}: {_words(error)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def instruction(
    destination: str | Address | HostPort,
    *,
    key: tuple[str, bytes] | None = None,
    source: str | None = None,
    audience: str | None = None,
    expires_unix_s: int = 0,
    nonce: bool = False,
) -> bytes:
    """The instruction that asks for `destination`, signed if there is a `key` (its id and secret).

    `expires_unix_s`, `source` (a CIDR: the clients it is good for) and `audience` (the name of the
    only gateway to take it) are for signed ones.  With `nonce` a signed one has 96 random bits of
    its own, so that each is good once, how many ever are made in a second; gateways of version 0.1
    take none that has them.

    Raises:
        UsageError: no destination, no network, or the instruction would be too long.
    """
    try:
        parsed = parse_destination(str(destination))
        if key is None:
            if source is not None or audience is not None:
                raise ValueError("only a signed instruction says for whom it is: a key is missing")
            return frame(str(parsed).encode())
        key_id, secret = key
        return token.make(
            parsed,
            expires_unix_s=expires_unix_s,
            key_id=key_id,
            key=secret,
            source=parse_network(source) if source else None,
            audience=audience,
            nonce=secrets.token_urlsafe(_NONCE_BYTES) if nonce else None,
        )
    except ValueError as error:  # AddressError is one
        raise UsageError(f"{destination}: {error}") from error


def _connect_to(forwarder: Address | HostPort | UnixAddress, timeout_s: float) -> socket.socket:
    if isinstance(forwarder, UnixAddress):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(forwarder.path)
        except BaseException:
            connection.close()
            raise
        return connection
    connection = socket.create_connection((forwarder[0], forwarder[1]), timeout=timeout_s)
    # What a program writes is what it wants sent: an ssh keystroke must not wait for an ACK.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _await_answer(connection: socket.socket, destination: str, deadline_s: float) -> None:
    """Read exactly the forwarder's answer; return if it is yes."""
    head = _receive_exactly(connection, 2, deadline_s)
    if not (head.isdigit() and int(head) >= MIN_LENGTH):
        raise ForwarderError(f"this is no forwarder's answer: {head!r}")
    answer = head + _receive_exactly(connection, int(head) - len(head), deadline_s)
    if answer == OK:
        return
    content = answer[2:-2]
    if not content.startswith(b"ERR ") or answer != frame(content):
        raise ForwarderError(f"this is no forwarder's answer: {answer!r}")
    raise RefusedError(destination, content.removeprefix(b"ERR ").decode("ascii", "replace"))


def _receive_exactly(connection: socket.socket, count: int, deadline_s: float) -> bytes:
    """`count` bytes and never one more: what follows the answer is the server's."""
    received = bytearray()
    while len(received) < count:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        connection.settimeout(remaining_s)
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise ForwarderError(
                "the forwarder closed without an answer: no rule there takes instructions, "
                "or it does not acknowledge them"
            )
        received += chunk
    return bytes(received)


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionResetError):
        return "reset without an answer (is there a rule that takes instructions?)"
    return error.strerror or str(error)


def _error_of(reply: Mapping[str, Json]) -> ForwarderError:
    text = str(reply.get("error") or "refused without a word")
    match reply.get("kind"):
        case "config":
            return _config_error(text, reply)
        case "usage":
            return UsageError(text)
        case "internal":
            return ForwarderError(f"the daemon failed: {text}")
        case _:
            return ControlError(text)


def _config_error(text: str, reply: Mapping[str, Json]) -> ConfigError:
    # the daemon's text names line and key already: they are added for programs, not said twice
    line, path = reply.get("line"), reply.get("path")
    error = ConfigError(text)
    error.line = line if isinstance(line, int) else None
    error.path = path if isinstance(path, str) else ""
    return error


def _rows(result: Json) -> list[dict[str, Json]]:
    if not isinstance(result, list) or not all(isinstance(row, dict) for row in result):
        raise ForwarderError("the daemon's answer is no list of rows")
    return cast("list[dict[str, Json]]", result)


def _object(result: Json) -> dict[str, Json]:
    if not isinstance(result, dict):
        raise ForwarderError("the daemon's answer is no object")
    return result


def _flushed(result: Json) -> Flushed:
    return cast("Flushed", {"flushed": [], "unknown": [], **_object(result)})


def _pair_id(result: Json) -> int:
    pair_id = _object(result).get("id")
    if not isinstance(pair_id, int):
        raise ForwarderError("the daemon's answer names no pair")
    return pair_id
