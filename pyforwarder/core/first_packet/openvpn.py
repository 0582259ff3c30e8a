"""`openvpn`: OpenVPN, by the client's hard reset, with or without tls-auth and tls-crypt.

    length(2)  opcode(5 bits) key id(3 bits)  session id(8) ...

A datagram has no length in front.  The opcode is P_CONTROL_HARD_RESET_CLIENT_V2, or V3 for
tls-crypt-v2; the key id is 0.

Source: OpenVPN's doc/protocol (github.com/openvpn/openvpn-rfc), sections 4 and 6.
"""

from __future__ import annotations

from typing import Final

from pyforwarder.core.first_packet.cursor import Cursor, ParseError
from pyforwarder.core.first_packet.matcher import Parsed

_HARD_RESETS: Final = frozenset({7 << 3, 10 << 3})
_SHORTEST: Final = 1 + 8 + 1 + 4  # opcode, session id, no acknowledgements, packet id
# tls-crypt-v2 appends the wrapped client key, which has at most 1024 bytes.
_LONGEST: Final = 2048


class OpenVpn(Parsed):
    """Matches the first three bytes of a client's stream, or its first datagram."""

    def __init__(self, *, datagrams: bool = False) -> None:
        self._datagrams = datagrams

    def _holds(self, cursor: Cursor) -> bool:
        if self._datagrams:
            return _SHORTEST <= cursor.remaining <= _LONGEST and cursor.get_uint8() in _HARD_RESETS
        high = cursor.get_uint8()
        if high > _LONGEST >> 8:
            raise ParseError("longer than a hard reset")
        if not _SHORTEST <= (high << 8 | cursor.get_uint8()) <= _LONGEST:
            raise ParseError("not as long as a hard reset")
        return cursor.get_uint8() in _HARD_RESETS
