"""Through a forwarder, as a client: it is asked for a destination, and answers."""

from __future__ import annotations

import math
import secrets
import socket
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.core import token
from pyforwarder.core.address import AddressError, UnixAddress, parse_destination, parse_server
from pyforwarder.core.first_packet.instruction import MIN_LENGTH, OK, frame
from pyforwarder.core.policy import parse_network
from pyforwarder.errors import ForwarderError, RefusedError, UsageError

if TYPE_CHECKING:
    from pyforwarder.core.address import Address, HostPort

DEFAULT_VIA: Final = "127.0.0.1:9999"  # the listener of the built-in configuration
_NONCE_BYTES: Final = 12


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
