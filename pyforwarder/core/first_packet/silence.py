"""`silence`: the client waits for the server to speak first (SMTP, MySQL, FTP, ...).

It matches when `first_packet.timeout` ends and the client has sent nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.express.conditions import Constant
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition


class Silence(Matcher):
    """Matches when first_packet.timeout has passed without a byte.

    Never at a client's close: a client that closes without a word waits for no server.
    """

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if data:
            return NO_MATCH
        return MATCH if end is End.TIMEOUT else NEED_MORE

    def in_kernel(self, local_port: int) -> Condition:
        return Constant(holds=False)  # it has sent a byte
