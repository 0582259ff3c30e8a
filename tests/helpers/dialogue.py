"""A client that talks to a ruleset as a worker would let it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyforwarder.core.first_packet.outcome import NEED_MORE, Decision, End, Send

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.routing import Ruleset


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a dialogue has got to."""

    decision: Decision  # NEED_MORE: all pieces were heard, and that was not enough
    said: bytes  # what we sent in between
    rest: bytes  # what the client sent beyond what we used up, of the pieces until the decision


def talk(
    rules: Ruleset,
    pieces: Iterable[bytes],
    *,
    client: Address | None = None,
    local_port: int = 0,
    now_unix_s: float = 0.0,
) -> Ended:
    """Hear the pieces one after the other until something is decided."""
    state = rules.begin()
    received, said = b"", b""
    for piece in pieces:
        received += piece
        while True:
            decision = rules.decide(
                received,
                client=client,
                local_port=local_port,
                end=End.OPEN,
                now_unix_s=now_unix_s,
                state=state,
            )
            if not isinstance(decision, Send):
                break
            said += decision.data
            received = received[decision.skip :]
        if decision is not NEED_MORE:
            return Ended(decision, said, received[getattr(decision, "skip", 0) :])
    return Ended(NEED_MORE, said, received)
