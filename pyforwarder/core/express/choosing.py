"""Which servers of an upstream the kernel chooses among, and which one it takes.

`round_robin` is a round that a worker's balancer would go through (`smooth_round`). `source_hash`
is what `Balancer` computes, but with logarithms of few bits: where the scores of two servers are so
close that these logarithms cannot tell which is lower, userspace chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.core.address import Address, SamePort
from pyforwarder.core.server_choice import (
    MOST_DRAWN,
    draw,
    hash_client,
    round_turns,
    smooth_round,
)

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Iterable, Sequence

    from pyforwarder.core.upstreams import ServerState


class WeighedServer(Protocol):
    """The fields of a server that are read here."""

    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...


MOST_TURNS: Final = 256  # turns of a round
MOST_SERVERS: Final = 64  # servers of which one is chosen by the client's address

LOG_STEPS: Final = 256
_LOG_BITS: Final = 32
# Between two steps the logarithm is interpolated linearly, with an error of no more than this.
LOG_ERROR: Final = 1 << 14
# Binary logarithms of 1, 1 + 1/256, ..., 2.
LOGS: Final = tuple(
    round(math.log2(1 + step / LOG_STEPS) * (1 << _LOG_BITS)) for step in range(LOG_STEPS + 1)
)
# Fractional bits of the quotient of a logarithm and a weight.
_MORE_BITS: Final = 16
_MOST_BITS: Final = MOST_DRAWN.bit_length() - 1


class Target(NamedTuple):
    """A server, and the address of this host from which the kernel connects to it."""

    server: Address
    source: str = ""  # an IP address; empty: that of the route


@dataclass(frozen=True, slots=True)
class InTurn:
    """The servers of `upstream` one after the other."""

    upstream: str
    servers: tuple[Address, ...]  # a round
    source: str = ""  # see `Target`


class Drawing(NamedTuple):
    """A server, and what its score for a client is computed from."""

    server: Address
    seed: int
    weight: int


@dataclass(frozen=True, slots=True)
class ByClient:
    """The server with the lowest score for the client's address."""

    upstream: str
    servers: tuple[Drawing, ...]
    source: str = ""  # see `Target`

    def choose(self, client: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Address | None:
        """The server of a client; None: it is not certain, and userspace must choose."""
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


def targets_of(to: Choice | Address) -> tuple[Target, ...]:
    """The targets of a rule, each once."""
    if isinstance(to, Address):
        return (Target(to),)
    servers = to.servers if isinstance(to, InTurn) else [one.server for one in to.servers]
    return tuple(Target(server, to.source) for server in dict.fromkeys(servers))


def sources_for(sources: Iterable[object], *, is_ipv6: bool) -> tuple[str, ...]:
    """The addresses among `source` of an upstream for connections of one IP version."""
    return tuple(text for text in map(str, sources) if (":" in text) is is_ipv6)


def logarithm(number: int) -> int:
    """The absolute binary logarithm of `number` / `MOST_DRAWN`, in units of 2^-32."""
    whole = number.bit_length() - 1
    # The bits behind the first one: of the step, and of the position between it and the next.
    rest = (number << (63 - whole)) & ((1 << 63) - 1)
    step, part = rest >> 55, rest >> 23 & 0xFFFFFFFF
    found = (whole << _LOG_BITS) + LOGS[step]
    found += (LOGS[step + 1] - LOGS[step]) * part >> 32
    return (_MOST_BITS << _LOG_BITS) - found


def why_not(balance: str, servers: Iterable[WeighedServer]) -> str:
    """Why userspace must choose among the servers of an upstream; empty: the kernel can."""
    weighed = [server for server in servers if server.weight]
    if not weighed:
        return "its servers get no new pairs"
    for is_backup in (False, True):
        weights = [server.weight for server in weighed if server.backup is is_backup]
        if len(weights) < 2:
            continue
        if balance == "least_pairs":
            return "userspace alone knows who has the fewest pairs"
        # A subset of the servers never has a longer round.
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
    upstream: str, balance: str, servers: Sequence[ServerState], port: int, source: str = ""
) -> Choice | Address | None:
    """How the kernel chooses a server for connections to a local port while these servers are up.

    An address stands for itself alone: with a `source` a single server is a round of one turn.
    None: there is no server, or userspace chooses (`why_not`).
    """
    at = servers_at(servers, port)
    if not at or len(at) != len(servers):
        return None
    if len(at) == 1:
        return InTurn(upstream, (at[0][1],), source) if source else at[0][1]
    if why_not(balance, servers):
        return None
    if balance == "round_robin":
        addresses = {server.name: address for server, address in at}
        turns = tuple(addresses[one.name] for one in smooth_round(servers))
        return InTurn(upstream, turns, source) if turns else None
    drawings = tuple(Drawing(to, one.seed, one.weight) for one, to in at)
    return ByClient(upstream, drawings, source)


def servers_at(servers: Iterable[ServerState], port: int) -> list[tuple[ServerState, Address]]:
    """The servers with an IP address, and their addresses for connections to a local port."""
    found = []
    for server in servers:
        to = server.address
        address = to.at(port) if isinstance(to, SamePort) else to
        if isinstance(address, Address):
            found.append((server, address))
    return found
