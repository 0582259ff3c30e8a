"""`stun`: a STUN request or indication, over TCP or in a datagram; TURN clients begin with one.

    0 class and method(14 bits)  length(2)  magic cookie(4)  transaction id(12)  attributes

Source: RFC 8489 sections 5 and 6.2 (on TCP the messages follow each other without a frame), RFC
8656 (TURN).  The STUN of RFC 3489 has no magic cookie, and cannot be told from other protocols.
"""

from __future__ import annotations

from typing import Final

from pyforwarder.core.first_packet.cursor import Cursor, ParseError
from pyforwarder.core.first_packet.matcher import Parsed

_MAGIC_COOKIE: Final = 0x2112A442
_HEADER: Final = 20
# The bit that responses have in their class; clients send requests and indications.
_RESPONSE: Final = 0x0100


class Stun(Parsed):
    """Matches the header of a client's first message, which a datagram holds whole."""

    def __init__(self, *, datagrams: bool = False) -> None:
        self._datagrams = datagrams

    def _holds(self, cursor: Cursor) -> bool:
        high = cursor.get_uint8()
        if high & 0xC0:
            raise ParseError("not the two zero bits of STUN")
        if (high << 8 | cursor.get_uint8()) & _RESPONSE:
            raise ParseError("clients do not begin with a response")
        length = cursor.get_uint16()
        if length % 4:
            raise ParseError("attributes are padded to four bytes")
        for byte in _MAGIC_COOKIE.to_bytes(4, "big"):
            if cursor.get_uint8() != byte:
                raise ParseError("not the magic cookie")
        if self._datagrams and cursor.position + cursor.remaining != _HEADER + length:
            raise ParseError("not as long as the datagram")
        return True
