"""What counts as a refusal, and which counters it moves: one table for TCP and UDP.

A client is *refused* if its connection ends before it was served, for a reason that says no. A TCP
client is served once its pair is joined, a UDP client once its server has answered.
`ListenerCounter.REFUSED` counts every refusal, `RuleCounter.REFUSED` those of connections that the
rule had taken or matched: a listener's number is the sum of its rules' and of what ended before any
rule had decided. `closed.<reason>` counts every end, refusals among them.
"""

from __future__ import annotations

from typing import Final

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import ListenerCounter, RuleCounter

# Whether the reason says no to a client that has not been served.
SAYS_NO: Final[dict[CloseReason, bool]] = {
    CloseReason.FINISHED: False,
    CloseReason.CLIENT_RESET: False,  # the client's own doing
    CloseReason.SERVER_RESET: False,
    CloseReason.CLIENT_GONE: False,  # the client's own doing
    CloseReason.CLIENT_TIMEOUT: False,  # of pairs that are joined
    CloseReason.SERVER_TIMEOUT: False,
    CloseReason.NO_ROUTE: False,
    CloseReason.MOVED: False,
    CloseReason.IDLE: False,
    CloseReason.HALF_CLOSED: False,
    CloseReason.REFUSED: True,
    CloseReason.UNREACHABLE: True,
    CloseReason.TIMEOUT: True,
    CloseReason.UNRESOLVED: True,
    CloseReason.DENIED: True,
    CloseReason.MALFORMED: True,
    CloseReason.NO_MATCH: True,
    CloseReason.REJECTED: True,
    CloseReason.TOKEN: True,
    CloseReason.BUSY: True,
    CloseReason.EVICTED: False,  # it was served as long as there was room
    CloseReason.FLUSHED: False,  # the operator's doing
    CloseReason.SHUTDOWN: False,
    CloseReason.BACKLOG: False,
    CloseReason.INTERNAL: False,  # a fault of ours, with a line of its own
}

_LISTENER_REFUSED: Final = int(ListenerCounter.REFUSED)
_RULE_REFUSED: Final = int(RuleCounter.REFUSED)


def count_refusal(
    counters: memoryview, reason: CloseReason, *, listener: int, rule: int | None
) -> bool:
    """Count the end of a client that was not served, if it is a refusal; whether it is one.

    `listener` and `rule` are the first of their counters; None: no rule has decided.
    """
    if not SAYS_NO[reason]:
        return False
    counters[listener + _LISTENER_REFUSED] += 1
    if rule is not None:
        counters[rule + _RULE_REFUSED] += 1
    return True
