"""`adb`: the Android Debug Bridge, by the CNXN message every connection begins with.

A message header is six little-endian words: command, two arguments, payload length, checksum
and `magic`, the command with all bits inverted.

Source: packages/modules/adb/docs/dev/protocol.md in the Android sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.matcher import Matcher, match_prefix
from pyforwarder.core.first_packet.outcome import MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.outcome import End

_COMMAND: Final = b"CNXN"
_MAGIC: Final = bytes(byte ^ 0xFF for byte in _COMMAND)
_MAGIC_AT: Final = 20


class Adb(Matcher):
    """Matches a CNXN message's header."""

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        begins = match_prefix(data, _COMMAND)
        if begins is not None:
            return begins
        magic = match_prefix(data[_MAGIC_AT:], _MAGIC)
        return MATCH if magic is None else magic
