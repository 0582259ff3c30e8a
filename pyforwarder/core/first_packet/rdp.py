"""`rdp`: Remote Desktop, by the X.224 connection request.

    rdp: {cookie: ["alice", "DOMAIN*"]}      what follows `mstshash=`: a user name

Source: MS-RDPBCGR section 2.2.1.1, RFC 1006 (TPKT), X.224 section 13.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.matcher import Parsed

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options

_CONNECTION_REQUEST: Final = 0xE0
_FIXED: Final = 6  # bytes of the request after its length byte: code, two references, class
_COOKIE: Final = b"Cookie: mstshash="


class Rdp(Parsed):
    """Matches a connection request, with one of `cookies` if they are given."""

    def __init__(self, cookies: Globs | None = None) -> None:
        self._cookies = cookies

    @classmethod
    def from_options(cls, options: Options) -> Rdp:
        """The matcher for what stands after `rdp:`.

        Raises:
            OptionError: an unknown option, or a name that no client can send.
        """
        cookies = alphabet.latin1_texts(options, "cookie")
        options.finish()
        return cls(Globs(cookies, ignore_case=True) if cookies else None)

    def _holds(self, cursor: Cursor) -> bool:
        rest = _read_request(cursor)
        if self._cookies is None:
            return True
        cookie = _read_cookie(cursor, rest)
        return cookie is not None and self._cookies.include(cookie)

    def describe(self, data: bytes) -> str:
        try:
            cursor = Cursor(data)
            cookie = _read_cookie(cursor, _read_request(cursor))
        except (Truncated, ParseError):
            return ""
        return "no cookie" if cookie is None else f"cookie {cookie!r}"


def _read_request(cursor: Cursor) -> int:
    """Pass over the fixed part; the number of bytes that follow it."""
    if cursor.get_uint8() != 3:
        raise ParseError("not TPKT version 3")
    if cursor.get_uint8() != 0:
        raise ParseError("TPKT's second byte is 0")
    length = cursor.get_uint16()
    # It does not count itself, and TPKT's header of four comes on top; 255 is reserved.
    indicator = cursor.get_uint8()
    if indicator == 255 or indicator + 5 != length or indicator < _FIXED:
        raise ParseError("the lengths of TPKT and X.224 contradict each other")
    if cursor.get_uint8() != _CONNECTION_REQUEST:
        raise ParseError("not a connection request")
    if cursor.get_uint16() != 0:
        raise ParseError("a new connection has no destination reference")
    cursor.skip(2)  # source reference
    if cursor.get_uint8() != 0:
        raise ParseError("RDP uses class 0")
    return indicator - _FIXED


def _read_cookie(cursor: Cursor, rest: int) -> str | None:
    """The user name; None: there is none, or a load balancer's token instead."""
    text = cursor.get_bytes(rest)
    if not text.startswith(_COOKIE):
        return None
    value, line_end, _ = text.removeprefix(_COOKIE).partition(b"\r\n")
    if not line_end:
        raise ParseError("the cookie has no end")
    return value.decode("latin-1")
