"""`dtls`: a DTLS ClientHello, and what it says in the clear.

    dtls: {sni: ["*.example.com"]}       the server name, as under `tls`
    dtls: {alpn: [webrtc]}               a protocol that the client offers

Versions 1.0 to 1.3.  Without options the first record decides.  With them the whole ClientHello is
read: its fragments may come in any order, over several records and a few datagrams.  The second
hello of a client, with the cookie that a server has asked for, is one, too.

Source: RFC 6347 section 4, RFC 9147 sections 4 and 5 (a ClientHello is sent in the clear, with the
records of DTLS 1.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.client_hello import (
    CLIENT_HELLO,
    MAX_HELLO,
    ClientHello,
    HelloConditions,
    in_datagrams,
    name_or_outcome,
    read_body,
)
from pyforwarder.core.first_packet.cursor import Cursor, ParseError
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH, Outcome
from pyforwarder.core.first_packet.pieces import Piece, beginning

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.options import Options
    from pyforwarder.core.first_packet.outcome import End, Facts

_HANDSHAKE: Final = 22
_VERSIONS: Final = frozenset({0xFEFF, 0xFEFD})  # 1.0, which hellos are sent as, too, and 1.2
_MAX_FRAGMENT: Final = 1 << 14
# An ordinary path's MTU has room for a hello in two or three; each costs a microsecond.
MOST_RECORDS: Final = 64


class Dtls(Matcher):
    """Matches a client's first datagrams for which all given conditions hold."""

    has_facts = True

    def __init__(self, conditions: HelloConditions | None = None) -> None:
        self._conditions = conditions
        self.spans_datagrams = conditions is not None

    @classmethod
    def from_options(cls, options: Options) -> Dtls:
        """The matcher for what stands after `dtls:`.

        Raises:
            OptionError: an unknown option, or a name that no client can send.
        """
        conditions = HelloConditions.from_options(options)
        options.finish()
        return cls(conditions or None)

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if self._conditions is None:
            return MATCH if _begins(data) else NO_MATCH
        hello = _hello_or_outcome(data)
        if isinstance(hello, Outcome):
            return hello
        return MATCH if self._conditions.accept(hello) else NO_MATCH

    def describe(self, data: bytes) -> str:
        hello = _hello_or_outcome(data)
        return "" if isinstance(hello, Outcome) else ", ".join(hello.words())

    def facts(self, data: bytes) -> Facts:
        hello = _hello_or_outcome(data) if self._conditions else NO_MATCH
        return () if isinstance(hello, Outcome) else hello.facts()


def server_name_in(data: bytes) -> str | Outcome:
    """The server name of a DTLS client; NEED_MORE while it may come, NO_MATCH if there is none."""
    return name_or_outcome(_hello_or_outcome(data))


def read_client_hello(datagrams: tuple[bytes, ...]) -> ClientHello | None:
    """The ClientHello in a client's first datagrams; None: not whole yet.

    Raises:
        ParseError: the first of them is not how a DTLS client begins, or the hello is broken.
    """
    hello = _Fragments()
    hello.read(datagrams[0])
    for datagram in datagrams[1:]:
        try:
            hello.read(datagram)
        except ParseError:
            continue  # a server drops what is no record (RFC 6347 section 4.1.2.7)
    message = beginning(hello.pieces)
    if len(message) < hello.length:
        return None
    return read_body(Cursor(message, 0, hello.length), has_cookie=True)


class _Fragments:
    """The fragments of one ClientHello."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.length = -1
        self._sequence = -1  # the message's number: 0, and 1 with a cookie

    def read(self, datagram: bytes) -> None:
        """Add those in a datagram.

        Raises:
            ParseError: its first record is none of a ClientHello.
        """
        cursor = Cursor(datagram, 0, len(datagram))
        for number in range(MOST_RECORDS):
            if not cursor.remaining:
                return
            try:
                length = _read_record_header(cursor)
                with cursor.restrict_to(length):
                    while cursor.remaining:
                        self._read_fragment(cursor)
            except ParseError:
                if number == 0:
                    raise
                return  # what follows a hello's records in a datagram is no part of it
        raise ParseError(f"more than {MOST_RECORDS} records in a datagram")

    def _read_fragment(self, cursor: Cursor) -> None:
        if cursor.get_uint8() != CLIENT_HELLO:
            raise ParseError("not a ClientHello")
        length = cursor.get_uint24()
        sequence = cursor.get_uint16()
        offset = cursor.get_uint24()
        fragment = cursor.get_bytes(cursor.get_uint24())
        if length > MAX_HELLO or offset + len(fragment) > length:
            raise ParseError("a fragment reaches beyond its message")
        if self.length < 0:
            self.length, self._sequence = length, sequence
        if sequence != self._sequence:
            return  # of another hello
        if length != self.length:
            raise ParseError("fragments of one message say two lengths")
        if fragment:
            self.pieces.append((offset, fragment))


def _read_record_header(cursor: Cursor) -> int:
    """How long the record is, without its header.

    Raises:
        ParseError: no handshake in the clear.
    """
    if cursor.get_uint8() != _HANDSHAKE:
        raise ParseError("not a handshake record")
    if cursor.get_uint16() not in _VERSIONS:
        raise ParseError("not a version of DTLS")
    if cursor.get_uint16() != 0:
        raise ParseError("encrypted: not the first epoch")
    cursor.skip(6)  # sequence number
    length = cursor.get_uint16()
    if not 0 < length <= _MAX_FRAGMENT:
        raise ParseError("not as long as a record")
    return length


def _begins(data: bytes) -> bool:
    """Whether the datagram's first record has a piece of a ClientHello in it."""
    try:
        _Fragments().read(data)
    except ParseError:
        return False
    return True


_hello_or_outcome = in_datagrams(read_client_hello)
