"""`tls`: a TLS ClientHello, and what it says in the clear.

    tls: {sni: ["*.example.com", example.org]}     the server name; `*` stands for any run
    tls: {alpn: [h2, http/1.1]}                    a protocol that the client offers
    tls: {version: ["1.2", "1.3"]}                 the highest version that the client offers

Without options the first six bytes decide.  With them the whole ClientHello is read, over as
many segments and records as it comes in.  With Encrypted Client Hello the name seen here is the
outer one, which is the only one meant for us.  An SSLv2 hello is not TLS.

Source: RFC 8446 section 5.1; client_hello.py has the rest.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Final

from pyforwarder.core.express.conditions import (
    Alpn,
    Every,
    ServerName,
    TlsHello,
    UserspaceOnly,
    name_patterns,
)
from pyforwarder.core.first_packet.client_hello import (
    CLIENT_HELLO,
    MESSAGE_HEADER,
    VERSION_NAMES,
    VERSIONS,
    ClientHello,
    HelloConditions,
    message_length,
    name_or_outcome,
    read_body,
    read_plain_body,
)
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.outcome import End, Facts

_HANDSHAKE: Final = 22
_RECORD_HEADER: Final = 5
# Type, version and length of a record; type and length of the message in it.
_HEADERS: Final = struct.Struct(">BBBHBBH").unpack_from
_MAX_FRAGMENT: Final = 1 << 14  # RFC 8446 section 5.1
# A hello cut into one-byte records would cost a millisecond to join, again for every segment.
# Clients that fragment on purpose, to hide the name from a censor, use a handful.
_MAX_RECORDS: Final = 512


class Tls(Matcher):
    """Matches a ClientHello for which all given conditions hold."""

    has_facts = True

    def __init__(
        self,
        conditions: HelloConditions | None = None,
        versions: frozenset[int] = frozenset(),
    ) -> None:
        self._conditions = conditions or HelloConditions()
        self._versions = versions
        self._reads_hello = bool(self._conditions) or bool(versions)

    @classmethod
    def from_options(cls, options: Options) -> Tls:
        """The matcher for what stands after `tls:`.

        Raises:
            OptionError: an unknown option or version, or a name that no client can send.
        """
        conditions = HelloConditions.from_options(options)
        versions = options.texts("version")
        options.finish()
        for version in versions:
            if version not in VERSIONS:
                raise OptionError(f"{version!r} is not one of {', '.join(VERSIONS)}", "version")
        return cls(conditions, frozenset(VERSIONS[version] for version in versions))

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if not self._reads_hello:
            return _begins(data)
        hello = _hello_or_outcome(data)
        if isinstance(hello, Outcome):
            return hello
        return MATCH if self._accepts(hello) else NO_MATCH

    def describe(self, data: bytes) -> str:
        try:
            hello = read_client_hello(data)
        except (Truncated, ParseError):
            return ""
        version = VERSION_NAMES.get(hello.version, hex(hello.version))
        return ", ".join(hello.words(version))

    def facts(self, data: bytes) -> Facts:
        hello = _hello_or_outcome(data) if self._reads_hello else NEED_MORE
        return () if isinstance(hello, Outcome) else hello.facts()

    def in_kernel(self, local_port: int) -> Condition:
        if not self._reads_hello:
            return TlsHello()
        if self._versions:
            raise UserspaceOnly("userspace alone compares `version`")
        names, alpn = self._conditions.server_names, self._conditions.alpn
        asked: list[Condition] = []
        if names is not None:
            asked.append(ServerName(name_patterns(names)))
        if alpn:
            asked.append(Alpn(alpn))
        return Every(tuple(asked))

    def _accepts(self, hello: ClientHello) -> bool:
        if not self._conditions.accept(hello):
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
        or (size > 5 and data[5] != CLIENT_HELLO)
    ):
        return NO_MATCH
    return MATCH if size > _RECORD_HEADER else NEED_MORE


def read_client_hello(data: bytes) -> ClientHello:
    """The ClientHello at the beginning of `data`; what follows it is ignored.

    Raises:
        Truncated: it is not complete.
        ParseError: it is no ClientHello, or a broken one.
    """
    return read_body(Cursor(*_join_records(data)))


def _read_plain_hello(data: bytes) -> ClientHello | None:
    """What `read_client_hello` returns for a hello that is there, in one record: nearly always.

    None: it is not as usual, and `read_client_hello` says what it is.
    """
    if len(data) < _RECORD_HEADER + MESSAGE_HEADER:
        return None
    kind, major, minor, length, message, high, low = _HEADERS(data)
    start = _RECORD_HEADER + MESSAGE_HEADER
    end = start + (high << 16 | low)
    if (
        kind != _HANDSHAKE
        or major != 3
        or minor > 4
        or length > _MAX_FRAGMENT
        or message != CLIENT_HELLO
        or end > _RECORD_HEADER + length
        or end > len(data)
    ):
        return None
    return read_plain_body(data, start, end)


# One: the rules of a listener are asked in turn about the same bytes.  With a hundred server names
# a decision took 1.4 ms, and 150 ms for a hello of 16 KiB full of extensions.
@functools.lru_cache(maxsize=1)
def _hello_or_outcome(data: bytes) -> ClientHello | Outcome:
    """What `read_client_hello` returns, and its errors as the outcomes they mean."""
    hello = _read_plain_hello(data)
    if hello is not None:
        return hello
    begins = _begins(data)
    if begins is not MATCH:
        return begins
    try:
        return read_client_hello(data)
    except Truncated:
        return NEED_MORE
    except ParseError:
        return NO_MATCH


def server_name_in(data: bytes) -> str | Outcome:
    """The server name in a ClientHello; NEED_MORE while it may come, NO_MATCH if there is none."""
    return name_or_outcome(_hello_or_outcome(data))


def _join_records(data: bytes) -> tuple[bytes, int, int]:
    """A ClientHello's body as (bytes, where it begins, where it ends)."""
    available = len(data)
    message = bytearray()
    needed = MESSAGE_HEADER
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
        if not message and length >= MESSAGE_HEADER and available >= start + MESSAGE_HEADER:
            # The common case needs no copy: the whole message in the first record.
            needed = MESSAGE_HEADER + message_length(data, start)
            if needed <= length:
                if available < start + needed:
                    raise Truncated
                return data, start + MESSAGE_HEADER, start + needed
        message += data[start:at]
        if len(message) >= MESSAGE_HEADER:
            needed = MESSAGE_HEADER + message_length(message, 0)
            if len(message) >= needed:
                return bytes(message), MESSAGE_HEADER, needed
        if at > available:
            raise Truncated
    raise ParseError(f"a ClientHello in more than {_MAX_RECORDS} records")
