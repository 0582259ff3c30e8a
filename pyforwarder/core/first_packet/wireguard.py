"""`wireguard`: what a WireGuard peer sends first.

    1  zero(3)  sender(4)  ephemeral(32)  static(48)  timestamp(28)  mac1(16)  mac2(16)
    4  zero(3)  receiver(4)  counter(8)  encrypted packet(16 and more, in steps of 16)

The first is a handshake's initiation.  The second is data, with which a peer begins whose session
here has ended in a silence while its keys are still good: without it such a peer would wait for
fifteen seconds before it tries a handshake.

Source: the WireGuard paper, section 5.4 (wireguard.com/papers/wireguard.pdf).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.outcome import End

_INITIATION: Final = b"\x01\x00\x00\x00"
_INITIATION_BYTES: Final = 148
_DATA: Final = b"\x04\x00\x00\x00"
_LEAST_DATA_BYTES: Final = 32  # a keepalive
_STEP: Final = 16


class WireGuard(Matcher):
    """Matches a peer's first datagram by its type and size; all else in it is encrypted."""

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        size = len(data)
        if data.startswith(_INITIATION):
            fits = size == _INITIATION_BYTES
        else:
            fits = data.startswith(_DATA) and size >= _LEAST_DATA_BYTES and size % _STEP == 0
        return MATCH if fits else NO_MATCH
