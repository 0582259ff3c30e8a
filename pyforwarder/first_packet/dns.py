"""`dns`: DNS over TCP, by the query.

    dns: {qname: ["*.internal.example"]}

Source: RFC 1035 section 4, RFC 7766 section 8 (the two bytes of length).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.first_packet.glob import Globs
from pyforwarder.first_packet.matcher import Parsed

if TYPE_CHECKING:
    from pyforwarder.first_packet.options import Options

_HEADER: Final = 12
_SHORTEST_QUESTION: Final = 5  # the root's empty name, type, class
# A name has 255 bytes, padding fills up to 128 (RFC 8467), cookies and TSIG take some more. The
# bound also keeps a SOCKS client, which begins with 4 or 5 and then waits for us, from looking like
# a query whose rest is still to come.
_LONGEST: Final = 1024
_MAX_NAME: Final = 255  # RFC 1035 section 2.3.4
_CLASSES: Final = frozenset({1, 3, 4, 255})  # IN, CH, HS, ANY


class Dns(Parsed):
    """Matches a query with one question, for one of `names` if they are given."""

    def __init__(self, names: Globs | None = None) -> None:
        self._names = names

    @classmethod
    def from_options(cls, options: Options) -> Dns:
        """The matcher for what stands after `dns:`.

        Raises:
            OptionError: an unknown option.
        """
        names = options.texts("qname")
        options.finish()
        return cls(Globs((n.removesuffix(".") for n in names), ignore_case=True) if names else None)

    def _holds(self, cursor: Cursor) -> bool:
        name = _read_question(cursor)
        return self._names is None or self._names.include(name)

    def found(self, data: bytes) -> str:
        try:
            return f"asks for {_read_question(Cursor(data)) or 'the root'}"
        except (Truncated, ParseError):
            return ""


def _read_question(cursor: Cursor) -> str:
    """The name that is asked for, without the final dot."""
    high = cursor.get_uint8()
    if high > _LONGEST >> 8:
        raise ParseError("too long for a query")
    length = high << 8 | cursor.get_uint8()
    if not _HEADER + _SHORTEST_QUESTION <= length <= _LONGEST:
        raise ParseError("not as long as a query")
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
    cursor.skip(2)  # type
    if cursor.get_uint16() not in _CLASSES:
        raise ParseError("not a class")
    if cursor.position > end:
        raise ParseError("the question reaches beyond the message")
    return ".".join(labels)
