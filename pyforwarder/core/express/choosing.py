"""Among which servers of an upstream the kernel chooses, and which one it takes.

Turns are a round that a balancer of a worker would go through (`smooth_round`). A client's address
chooses as `Balancer` does it, but with logarithms of few bits: where two servers are so near to
each other that these do not tell which is the lesser, the choice is userspace's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.core.address import Address, SamePort
from pyforwarder.core.upstreams import MOST_DRAWN, draw, hash_client, round_turns, smooth_round

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Iterable, Sequence

    from pyforwarder.core.upstreams import ServerState


class WeighedServer(Protocol):
    """What is read of a server."""

    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...


MOST_TURNS: Final = 256  # of a round
MOST_SERVERS: Final = 64  # of which one is chosen by the client's address

LOG_STEPS: Final = 256
_LOG_BITS: Final = 32
# Between two steps a straight line takes the logarithm's place, which is never further off.
LOG_ERROR: Final = 1 << 14
# Binary logarithms of 1, 1 + 1/256, ..., 2.
LOGS: Final = tuple(
    round(math.log2(1 + step / LOG_STEPS) * (1 << _LOG_BITS)) for step in range(LOG_STEPS + 1)
)
# A quotient of a logarithm and a weight has so many bits more.
_MORE_BITS: Final = 16
_MOST_BITS: Final = MOST_DRAWN.bit_length() - 1


@dataclass(frozen=True, slots=True)
class InTurn:
    """One after the other; `upstream` is whose turns these are."""

    upstream: str
    servers: tuple[Address, ...]  # a round


class Drawing(NamedTuple):
    """A server that draws a number for each client."""

    server: Address
    seed: int
    weight: int


@dataclass(frozen=True, slots=True)
class ByClient:
    """The one that draws the least number."""

    upstream: str
    servers: tuple[Drawing, ...]

    def choose(self, client: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Address | None:
        """The server of a client; None: userspace is to choose, as it is not certain."""
        hashed = hash_client(str(client))
        bounds = []
        for one in self.servers:
            log = logarithm(draw(hashed ^ one.seed))
            low = (max(log - LOG_ERROR, 0) << _MORE_BITS) // one.weight
            high = ((log + LOG_ERROR) << _MORE_BITS) // one.weight + 1
            bounds.append((low, high, one.server))
        bounds.sort(key=lambda bound: bound[0])
        if len(bounds) > 1 and bounds[0][1] >= bounds[1][0]:
            return None
        return bounds[0][2] if bounds else None


Choice = InTurn | ByClient


def logarithm(number: int) -> int:
    """The binary logarithm of a part of `MOST_DRAWN`, without its sign, in units of 2^-32."""
    whole = number.bit_length() - 1
    # Behind the first bit: those of the step, and how far the number is on the way to the next.
    rest = (number << (63 - whole)) & ((1 << 63) - 1)
    step, part = rest >> 55, rest >> 23 & 0xFFFFFFFF
    found = (whole << _LOG_BITS) + LOGS[step]
    found += (LOGS[step + 1] - LOGS[step]) * part >> 32
    return (_MOST_BITS << _LOG_BITS) - found


def why_not(balance: str, servers: Iterable[WeighedServer]) -> str:
    """Why userspace chooses among all the servers of an upstream; empty: the kernel can."""
    weighed = [server for server in servers if server.weight]
    if not weighed:
        return "its servers get no new pairs"
    for is_backup in (False, True):
        weights = [server.weight for server in weighed if server.backup is is_backup]
        if len(weights) < 2:
            continue
        if balance == "least_pairs":
            return "userspace alone knows who has the fewest pairs"
        # With fewer of them a round is no longer.
        if balance == "round_robin":
            turns = round_turns(weights)
            if turns > MOST_TURNS:
                return f"a round of its servers' weights has more than {MOST_TURNS} turns"
            if not turns:
                return "a round of its servers' weights is too much work"
        if balance == "source_hash" and len(weights) > MOST_SERVERS:
            return f"more than {MOST_SERVERS} servers"
    return ""


def choice_among(
    upstream: str, balance: str, servers: Sequence[ServerState], port: int
) -> Choice | Address | None:
    """What the kernel is to do about connections to a port of ours while these servers are fit.

    None: there is none, or userspace chooses (`why_not`).
    """
    at = servers_at(servers, port)
    if not at or len(at) != len(servers):
        return None
    if len(at) == 1:
        return at[0][1]
    if why_not(balance, servers):
        return None
    if balance == "round_robin":
        addresses = {server.name: address for server, address in at}
        turns = tuple(addresses[one.name] for one in smooth_round(servers))
        return InTurn(upstream, turns) if turns else None
    return ByClient(upstream, tuple(Drawing(to, one.seed, one.weight) for one, to in at))


def servers_at(servers: Iterable[ServerState], port: int) -> list[tuple[ServerState, Address]]:
    """Those with an IP address, and where that is for connections to a port of ours."""
    found = []
    for server in servers:
        to = server.address
        address = to.at(port) if isinstance(to, SamePort) else to
        if isinstance(address, Address):
            found.append((server, address))
    return found
