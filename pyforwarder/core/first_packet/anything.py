"""`any`: every connection that no earlier rule took, before its first byte if it may."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.express.conditions import Constant
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.outcome import End


class Anything(Matcher):
    """Matches anything, and nothing at all."""

    reads = False
    asks_client = False

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        return MATCH

    @property
    def always(self) -> bool:
        return True

    def in_kernel(self, local_port: int) -> Condition:
        return Constant(holds=True)
