"""The arithmetic by which servers are chosen: rounds of turns, and numbers drawn from an address.

A worker's balancer (upstreams.py) and the programs in the kernel (express/choosing.py) must come to
the same server, so both have it from here.  Pure.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from pyforwarder.core.policy import parse_ip

if TYPE_CHECKING:
    from collections.abc import Sequence

# A round of turns is worked out once, in up to so many steps (a millisecond); weights that need
# more are weighed anew for every pair.
ROUND_STEPS: Final = 1 << 14

# What `draw` draws at most; a float can have each of these numbers.
MOST_DRAWN: Final = 1 << 53

_MASK: Final = (1 << 64) - 1


class Weighted(Protocol):
    """A server, as far as its turns depend on it."""

    @property
    def weight(self) -> int: ...


W = TypeVar("W", bound=Weighted)


def round_turns(weights: Sequence[int]) -> int:
    """How many turns a round of servers with these weights has; 0: it were too much work.

    Without some of them it has no more, and is no more work.
    """
    total = sum(weights) // math.gcd(*weights)
    if total != len(weights) and total * len(weights) > ROUND_STEPS:
        return 0
    return total


def smooth_round(servers: Sequence[W]) -> list[W]:
    """One round of smooth weighted round robin, as a balancer chooses it.

    Begun with no credit it ends with none, so rounds repeat.  Empty if it were too much work.
    """
    weights = [server.weight for server in servers]
    total = round_turns(weights)
    if total == len(servers):
        return list(servers)  # all alike
    divisor = math.gcd(*weights)
    weights = [weight // divisor for weight in weights]
    credit = [0] * len(servers)
    turns = []
    for _ in range(total):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = credit.index(max(credit))
        credit[best] -= total
        turns.append(servers[best])
    return turns


def hash_client(client_ip: str | None) -> int:
    """64 bits from a client's address; one client, one number, however its address is written."""
    if client_ip is None:
        key = b"unix"
    else:
        try:
            key = parse_ip(client_ip).packed
        except ValueError:
            key = client_ip.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"client").digest(), "big")


def draw(number: int) -> int:
    """From 1 to `MOST_DRAWN`, evenly spread: the finalizer of SplitMix64 (Steele 2014)."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    number ^= number >> 31
    return (number >> 11) + 1
