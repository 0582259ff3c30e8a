"""`tls`: a TLS ClientHello, and what it says in the clear.

    tls: {sni: ["*.example.com", example.org]}     the server name; `*` stands for any run
    tls: {alpn: [h2, http/1.1]}                    a protocol that the client offers
    tls: {version: ["1.2", "1.3"]}                 the highest version that the client offers

Without options the first six bytes decide.  With them the whole ClientHello is read, over as
many segments and records as it comes in.  With Encrypted Client Hello the name seen here is the
outer one, which is the only one meant for us.  An SSLv2 hello is not TLS.

Source: RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3 (SNI), RFC 7301 (ALPN), RFC 8701
(GREASE), RFC 9849 (ECH).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.first_packet.glob import Globs
from pyforwarder.first_packet.matcher import Matcher
from pyforwarder.first_packet.options import OptionError, Options
from pyforwarder.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.address import Address
    from pyforwarder.first_packet.outcome import End

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEADER: Final = 5
_MESSAGE_HEADER: Final = 4
_MAX_FRAGMENT: Final = 1 << 14  # RFC 8446 section 5.1
# OpenSSL refuses more than 131,396 bytes (SSL3_RT_MAX_PLAIN_LENGTH and CLIENT_HELLO_MAX_LENGTH).
_MAX_HELLO: Final = 131_396
# A hello cut into one-byte records would cost a millisecond to join, again for every segment.
# Clients that fragment on purpose, to hide the name from a censor, use a handful.
_MAX_RECORDS: Final = 512

_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_ENCRYPTED_CLIENT_HELLO: Final = 0xFE0D
_HOST_NAME: Final = 0

VERSIONS: Final = {"1.0": 0x0301, "1.1": 0x0302, "1.2": 0x0303, "1.3": 0x0304}
_VERSION_NAMES: Final = {number: name for name, number in VERSIONS.items()} | {0x0300: "SSLv3"}


class ClientHello(NamedTuple):
    """What a ClientHello says in the clear."""

    server_name: str | None  # lower case, no final dot
    alpn: tuple[bytes, ...]
    version: int  # the highest one offered, as on the wire
    is_encrypted: bool  # the real hello is inside (ECH); `server_name` is the outer one


class Tls(Matcher):
    """Matches a ClientHello for which all given conditions hold."""

    def __init__(
        self,
        *,
        server_names: Globs | None = None,
        alpn: frozenset[bytes] = frozenset(),
        versions: frozenset[int] = frozenset(),
    ) -> None:
        self._server_names = server_names
        self._alpn = alpn
        self._versions = versions
        self._reads_hello = server_names is not None or bool(alpn) or bool(versions)

    @classmethod
    def from_options(cls, options: Options) -> Tls:
        """The matcher for what stands after `tls:`.

        Raises:
            OptionError: an unknown option or version.
        """
        names = options.texts("sni")
        alpn = options.texts("alpn")
        versions = options.texts("version")
        options.finish()
        for version in versions:
            if version not in VERSIONS:
                raise OptionError(f"{version!r} is not one of {', '.join(VERSIONS)}", "version")
        return cls(
            server_names=Globs((name.removesuffix(".") for name in names), ignore_case=True)
            if names
            else None,
            alpn=frozenset(name.encode() for name in alpn),
            versions=frozenset(VERSIONS[version] for version in versions),
        )

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if not self._reads_hello:
            return _begins(data)
        hello = _hello_or_outcome(data)
        if isinstance(hello, Outcome):
            return hello
        return MATCH if self._accepts(hello) else NO_MATCH

    def found(self, data: bytes) -> str:
        try:
            hello = read_client_hello(data)
        except (Truncated, ParseError):
            return ""
        said = [f"server name {hello.server_name}" if hello.server_name else "no server name"]
        if hello.alpn:
            said.append("alpn " + " ".join(name.decode("ascii", "replace") for name in hello.alpn))
        said.append("version " + _VERSION_NAMES.get(hello.version, hex(hello.version)))
        if hello.is_encrypted:
            said.append("encrypted hello inside")
        return ", ".join(said)

    def _accepts(self, hello: ClientHello) -> bool:
        if self._server_names is not None and (
            hello.server_name is None or not self._server_names.include(hello.server_name)
        ):
            return False
        if self._alpn and self._alpn.isdisjoint(hello.alpn):
            return False
        return not self._versions or hello.version in self._versions


def _begins(data: bytes) -> Outcome:
    """Whether this is the beginning of a handshake record with a ClientHello."""
    size = len(data)
    if (
        (size > 0 and data[0] != _HANDSHAKE)
        or (size > 1 and data[1] != 3)
        or (size > 2 and data[2] > 4)
        or (size > 4 and not 0 < (data[3] << 8 | data[4]) <= _MAX_FRAGMENT)
        or (size > 5 and data[5] != _CLIENT_HELLO)
    ):
        return NO_MATCH
    return MATCH if size > _RECORD_HEADER else NEED_MORE


def read_client_hello(data: bytes) -> ClientHello:
    """The ClientHello at the beginning of `data`; what follows it is ignored.

    Raises:
        Truncated: it is not complete.
        ParseError: it is no ClientHello, or a broken one.
    """
    cursor = Cursor(*_join_records(data))
    legacy_version = cursor.get_uint16()
    cursor.skip(32)  # random
    session_id_length = cursor.get_uint8()
    if session_id_length > 32:
        raise ParseError("a session id has at most 32 bytes")
    cursor.skip(session_id_length)
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
        max((version for version in versions if version in _VERSION_NAMES), default=legacy_version),
        _ENCRYPTED_CLIENT_HELLO in seen,
    )


# One: the rules of a listener are asked in turn about the same bytes.  With a hundred server names
# a decision took 1.4 ms, and 150 ms for a hello of 16 KiB full of extensions.
@functools.lru_cache(maxsize=1)
def _hello_or_outcome(data: bytes) -> ClientHello | Outcome:
    """What `read_client_hello` returns, and its errors as the outcomes they mean."""
    begins = _begins(data)
    if begins is not MATCH:
        return begins
    try:
        return read_client_hello(data)
    except Truncated:
        return NEED_MORE
    except ParseError:
        return NO_MATCH


def _join_records(data: bytes) -> tuple[bytes, int, int]:
    """A ClientHello's body as (bytes, where it begins, where it ends)."""
    available = len(data)
    message = bytearray()
    needed = _MESSAGE_HEADER
    at = 0
    for _ in range(_MAX_RECORDS):
        if available - at < _RECORD_HEADER:
            # What is there of the header may rule TLS out already.
            if data[at : at + 1] not in (b"", b"\x16") or data[at + 1 : at + 2] not in (
                b"",
                b"\x03",
            ):
                raise ParseError("not a handshake record")
            raise Truncated
        length = data[at + 3] << 8 | data[at + 4]
        if data[at] != _HANDSHAKE or data[at + 1] != 3 or not 0 < length <= _MAX_FRAGMENT:
            raise ParseError("not a handshake record")
        start = at + _RECORD_HEADER
        at = start + length
        if not message and length >= _MESSAGE_HEADER and available >= start + _MESSAGE_HEADER:
            # The common case needs no copy: the whole message in the first record.
            needed = _MESSAGE_HEADER + _message_length(data, start)
            if needed <= length:
                if available < start + needed:
                    raise Truncated
                return data, start + _MESSAGE_HEADER, start + needed
        message += data[start:at]
        if len(message) >= _MESSAGE_HEADER:
            needed = _MESSAGE_HEADER + _message_length(message, 0)
            if len(message) >= needed:
                return bytes(message), _MESSAGE_HEADER, needed
        if at > available:
            raise Truncated
    raise ParseError(f"a ClientHello in more than {_MAX_RECORDS} records")


def _message_length(message: bytes | bytearray, at: int) -> int:
    if message[at] != _CLIENT_HELLO:
        raise ParseError("not a ClientHello")
    length = int.from_bytes(message[at + 1 : at + 4], "big")
    if length > _MAX_HELLO:
        raise ParseError(f"a ClientHello of {length} bytes")
    return length


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
    if not all(0x21 <= byte <= 0x7E for byte in name):
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
