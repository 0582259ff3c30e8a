"""`dns`: a DNS query, over TCP or in a datagram.

    dns: {qname: ["*.internal.example"]}
    dns: {qtype: [TXT, AXFR, TYPE65280]}     by name or number

Source: RFC 1035 section 4, RFC 7766 section 8 (the two bytes of length in front of a message on
TCP; a datagram has none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.matcher import Parsed

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options

_HEADER: Final = 12
_SHORTEST_QUESTION: Final = 5  # the root's empty name, type, class
# A name has 255 bytes, padding fills up to 128 (RFC 8467), cookies and TSIG take some more. The
# bound also keeps a SOCKS client, which begins with 4 or 5 and then waits for us, from looking like
# a query whose rest is still to come.
_LONGEST: Final = 1024
_MAX_NAME: Final = 255  # RFC 1035 section 2.3.4
_CLASSES: Final = frozenset({1, 3, 4, 255})  # IN, CH, HS, ANY
_TYPE_NAMES: Final = {number: name for name, number in alphabet.DNS_TYPES.items()}


class Dns(Parsed):
    """Matches a query with one question: for one of `names`, of one of `types`, if given."""

    def __init__(
        self,
        names: Globs | None = None,
        types: frozenset[int] = frozenset(),
        *,
        datagrams: bool = False,
    ) -> None:
        self._names = names
        self._types = types
        self._datagrams = datagrams

    @classmethod
    def from_options(cls, options: Options, *, datagrams: bool = False) -> Dns:
        """The matcher for what stands after `dns:`.

        Raises:
            OptionError: an unknown option, a name that no client can send, or no type.
        """
        names = alphabet.dns_names(options, "qname")
        types = alphabet.dns_types(options, "qtype")
        options.finish()
        globs = Globs(names, ignore_case=True) if names else None
        return cls(globs, frozenset(types), datagrams=datagrams)

    def _holds(self, cursor: Cursor) -> bool:
        name, kind = self._read(cursor)
        if self._types and kind not in self._types:
            return False
        return self._names is None or self._names.include(name)

    def describe(self, data: bytes) -> str:
        try:
            name, kind = self._read(Cursor(data))
        except (Truncated, ParseError):
            return ""
        said = f"asks for {name or 'the root'}"
        return f"{said}, type {_TYPE_NAMES.get(kind, kind)}" if self._types else said

    def _read(self, cursor: Cursor) -> tuple[str, int]:
        length = cursor.remaining if self._datagrams else _read_length(cursor)
        return _read_question(cursor, length)


def _read_length(cursor: Cursor) -> int:
    """How many bytes the message behind these two has."""
    high = cursor.get_uint8()
    if high > _LONGEST >> 8:
        raise ParseError("too long for a query")
    length = high << 8 | cursor.get_uint8()
    if not _HEADER + _SHORTEST_QUESTION <= length <= _LONGEST:
        raise ParseError("not as long as a query")
    return length


def _read_question(cursor: Cursor, length: int) -> tuple[str, int]:
    """The name that a message of `length` bytes asks for, without the final dot, and the type."""
    end = cursor.position + length
    cursor.skip(2)  # id
    # QR, OPCODE and TC are 0 in a query, AA too; RD is the client's choice.
    if cursor.get_uint8() & ~0x01:
        raise ParseError("not a standard query")
    # RA and RCODE are 0; of the three bits between them the last two are DNSSEC's AD and CD.
    if cursor.get_uint8() & ~0x30:
        raise ParseError("not a query")
    if cursor.get_uint16() != 1:
        raise ParseError("not one question")
    if cursor.get_uint16() != 0:
        raise ParseError("a query has no answers")
    if cursor.get_uint16() > 1:  # one in IXFR, RFC 1995 section 3
        raise ParseError("a query has no authorities")
    if cursor.get_uint16() > 2:  # OPT (RFC 6891) and TSIG (RFC 8945)
        raise ParseError("a query has no such additional records")
    labels: list[str] = []
    size = 1
    while count := cursor.get_uint8():
        size += 1 + count
        if count > 63 or size > _MAX_NAME:
            raise ParseError("not a name")
        labels.append(cursor.get_bytes(count).decode("latin-1"))
    kind = cursor.get_uint16()
    if cursor.get_uint16() not in _CLASSES:
        raise ParseError("not a class")
    if cursor.position > end:
        raise ParseError("the question reaches beyond the message")
    return ".".join(labels), kind
