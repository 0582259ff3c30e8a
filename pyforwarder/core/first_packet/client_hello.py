"""A TLS ClientHello: what it says in the clear, and the conditions that a rule may put on it.

TLS, DTLS and QUIC carry the same message, each in its own frames.

Source: RFC 8446 section 4.1.2, RFC 6066 section 3 (SNI), RFC 7301 (ALPN), RFC 8701 (GREASE), RFC
9849 (ECH), RFC 6347 section 4.2.1 (the cookie of DTLS).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import Cursor, ParseError
from pyforwarder.core.first_packet.datagrams import datagrams_in
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.outcome import NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options
    from pyforwarder.core.first_packet.outcome import Facts

CLIENT_HELLO: Final = 1  # the type of the handshake message
MESSAGE_HEADER: Final = 4
# OpenSSL refuses more than 131,396 bytes (SSL3_RT_MAX_PLAIN_LENGTH and CLIENT_HELLO_MAX_LENGTH).
MAX_HELLO: Final = 131_396

_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_ENCRYPTED_CLIENT_HELLO: Final = 0xFE0D
_HOST_NAME: Final = 0

_TWO_NUMBERS: Final = struct.Struct(">HH").unpack_from
_ONE_HOST_NAME: Final = struct.Struct(">HBH").pack
_HOST_NAME_LETTERS: Final = re.compile(rb"[!-~]+")

VERSIONS: Final = {"1.0": 0x0301, "1.1": 0x0302, "1.2": 0x0303, "1.3": 0x0304}
VERSION_NAMES: Final = {number: name for name, number in VERSIONS.items()} | {0x0300: "SSLv3"}


class ClientHello(NamedTuple):
    """What a ClientHello says in the clear."""

    server_name: str | None  # lower case, no final dot
    alpn: tuple[bytes, ...]
    version: int  # the highest one offered, as on the wire
    is_encrypted: bool  # the real hello is inside (ECH); `server_name` is the outer one

    def words(self, version: str = "") -> list[str]:
        """What it says, for `explain`; `version` in the words of its protocol."""
        said = [f"server name {self.server_name}" if self.server_name else "no server name"]
        if self.alpn:
            said.append("alpn " + " ".join(name.decode("ascii", "replace") for name in self.alpn))
        if version:
            said.append(f"version {version}")
        if self.is_encrypted:
            said.append("encrypted hello inside")
        return said

    def facts(self) -> Facts:
        """The fields that it has in the log."""
        return (("sni", self.server_name),) if self.server_name else ()


def name_or_outcome(hello: ClientHello | Outcome) -> str | Outcome:
    """The server name; NEED_MORE while it may come, NO_MATCH if there is none."""
    if isinstance(hello, Outcome):
        return hello
    return hello.server_name or NO_MATCH


def in_datagrams(
    read: Callable[[tuple[bytes, ...]], ClientHello | None],
) -> Callable[[bytes], ClientHello | Outcome]:
    """What `read` finds in a client's first datagrams, with its errors as the outcomes they mean.

    The last ones are remembered: the rules of a listener are asked in turn about the same.
    """

    @functools.lru_cache(maxsize=1)
    def hello_or_outcome(datagrams: tuple[bytes, ...]) -> ClientHello | Outcome:
        try:
            hello = read(datagrams)
        except ParseError:
            return NO_MATCH
        return NEED_MORE if hello is None else hello

    return lambda data: hello_or_outcome(datagrams_in(data))


@dataclass(frozen=True, slots=True)
class HelloConditions:
    """What a rule says of server name and ALPN."""

    server_names: Globs | None = None
    alpn: frozenset[bytes] = frozenset()

    @classmethod
    def from_options(cls, options: Options) -> HelloConditions:
        """Those of the options `sni` and `alpn`.

        Raises:
            OptionError: a name that no client can send.
        """
        names = alphabet.host_names(options, "sni")
        alpn = alphabet.alpn_names(options, "alpn")
        return cls(Globs(names, ignore_case=True) if names else None, frozenset(alpn))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.server_names is not None or bool(self.alpn)

    def accept(self, hello: ClientHello) -> bool:
        """Whether all of them hold."""
        if self.server_names is not None and (
            hello.server_name is None or not self.server_names.include(hello.server_name)
        ):
            return False
        return not self.alpn or not self.alpn.isdisjoint(hello.alpn)


def message_length(message: bytes | bytearray, at: int) -> int:
    """How long the ClientHello is whose header stands at `at`, without the header.

    Raises:
        ParseError: another message, or longer than any server takes.
    """
    if message[at] != CLIENT_HELLO:
        raise ParseError("not a ClientHello")
    length = int.from_bytes(message[at + 1 : at + 4], "big")
    if length > MAX_HELLO:
        raise ParseError(f"a ClientHello of {length} bytes")
    return length


def read_body(cursor: Cursor, *, has_cookie: bool = False) -> ClientHello:
    """The ClientHello that `cursor` is restricted to, without its header; DTLS has a cookie in it.

    Raises:
        ParseError: a broken one.
    """
    legacy_version = cursor.get_uint16()
    cursor.skip(32)  # random
    session_id_length = cursor.get_uint8()
    if session_id_length > 32:
        raise ParseError("a session id has at most 32 bytes")
    cursor.skip(session_id_length)
    if has_cookie:
        cursor.skip(cursor.get_uint8())
    cursor.skip(cursor.get_uint16())  # cipher suites
    cursor.skip(cursor.get_uint8())  # compression methods
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    versions: list[int] = []
    seen: set[int] = set()
    if cursor.remaining:
        with cursor.restrict_to(cursor.get_uint16()):
            while cursor.remaining:
                kind = cursor.get_uint16()
                length = cursor.get_uint16()
                if kind in seen:
                    # RFC 8446 section 4.2 forbids it; which one the server would read is unknown.
                    raise ParseError(f"extension {kind} stands there twice")
                seen.add(kind)
                if kind == _SERVER_NAME:
                    with cursor.restrict_to(length):
                        server_name = _read_server_name(cursor)
                elif kind == _ALPN:
                    with cursor.restrict_to(length):
                        alpn = _read_alpn(cursor)
                elif kind == _SUPPORTED_VERSIONS:
                    with cursor.restrict_to(length):
                        versions = _read_versions(cursor)
                else:
                    cursor.skip(length)
    if cursor.remaining:
        raise ParseError("bytes are left over after the extensions")
    return ClientHello(
        server_name,
        alpn,
        # Only known versions: GREASE values are larger than any real one.
        max((version for version in versions if version in VERSION_NAMES), default=legacy_version),
        _ENCRYPTED_CLIENT_HELLO in seen,
    )


def read_plain_body(data: bytes, at: int, end: int) -> ClientHello | None:
    """What `read_body` returns for all of `data[at:end]`, without a cursor: for most hellos.

    None: it is not as usual, or broken, and `read_body` says which.  The lengths are only added up:
    if one of them were too long, the sum would not end where the message does.
    """
    try:
        version = data[at] << 8 | data[at + 1]
        at += 34  # version and random
        session_id_length = data[at]
        at += 1 + session_id_length
        at += 2 + (data[at] << 8 | data[at + 1])  # cipher suites
        at += 1 + data[at]  # compression methods
        at += 2
        if session_id_length > 32 or at + (data[at - 2] << 8 | data[at - 1]) != end:
            return None
        server_name: str | None = None
        alpn: tuple[bytes, ...] = ()
        seen = []
        while at < end:
            kind, length = _TWO_NUMBERS(data, at)
            start = at + 4
            at = start + length
            seen.append(kind)
            if kind == _SERVER_NAME:
                if length < 6 or data[start : start + 5] != _ONE_HOST_NAME(
                    length - 2, _HOST_NAME, length - 5
                ):
                    return None
                name = data[start + 5 : at]
                if not _HOST_NAME_LETTERS.fullmatch(name):
                    return None
                server_name = name.decode("ascii").lower().removesuffix(".")
            elif kind == _SUPPORTED_VERSIONS:
                if not length & 1 or data[start] != length - 1:
                    return None
                known = [
                    number
                    for i in range(start + 1, at, 2)
                    if (number := data[i] << 8 | data[i + 1]) in VERSION_NAMES
                ]
                if known:
                    version = max(known)
            elif kind == _ALPN:
                if length < 2 or data[start] << 8 | data[start + 1] != length - 2:
                    return None
                names = []
                start += 2
                while start < at:
                    stop = start + 1 + data[start]
                    names.append(data[start + 1 : stop])
                    start = stop
                if start != at or not all(names):
                    return None
                alpn = tuple(names)
    except (IndexError, struct.error):
        return None
    if at != end or len(set(seen)) != len(seen):
        return None
    return ClientHello(server_name, alpn, version, _ENCRYPTED_CLIENT_HELLO in seen)


def _read_server_name(cursor: Cursor) -> str:
    name = None
    with cursor.restrict_to(cursor.get_uint16()):
        while cursor.remaining:
            kind = cursor.get_uint8()
            value = cursor.get_bytes(cursor.get_uint16())
            if kind != _HOST_NAME or name is not None:
                raise ParseError("RFC 6066 section 3 allows one host name")
            name = value
    if not name:
        raise ParseError("an empty server name")
    if not _HOST_NAME_LETTERS.fullmatch(name):
        raise ParseError("a server name that is not ASCII")
    return name.decode("ascii").lower().removesuffix(".")


def _read_alpn(cursor: Cursor) -> tuple[bytes, ...]:
    names = []
    with cursor.restrict_to(cursor.get_uint16()):
        while cursor.remaining:
            length = cursor.get_uint8()
            if length == 0:
                raise ParseError("an empty ALPN name")
            names.append(cursor.get_bytes(length))
    return tuple(names)


def _read_versions(cursor: Cursor) -> list[int]:
    length = cursor.get_uint8()
    if length % 2:
        raise ParseError("half a version")
    return [cursor.get_uint16() for _ in range(length // 2)]
