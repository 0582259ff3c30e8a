"""`any`: takes every connection that no earlier rule took, before its first byte if it may."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.first_packet.matcher import Matcher
from pyforwarder.first_packet.outcome import MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.address import Address
    from pyforwarder.first_packet.outcome import End


class Anything(Matcher):
    """Matches whatever comes, and nothing at all."""

    reads = False

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        return MATCH
