"""Which server of an upstream takes the next pair, and which servers are fit for one.

Pure: no socket, no clock, no randomness.  Times come in as seconds of one monotonic clock; what
happened to connections and health checks is reported by those who made them.

A server is out for one of two reasons that do not mix: its *health* (active checks, health.py,
reported with `mark_up` and `mark_down`) and an *ejection* (its last connections failed in a row,
`Balancer.failed`).  Health is believed: a server that is down gets no pair.  An ejection is a
guess, so it never empties an upstream: when nobody else is left, ejected servers are tried.

Each worker has balancers of its own.  What they must agree on (where `source_hash` sends a client)
depends only on names and weights; what they need not agree on (the turn in `round_robin`) is
shifted by the worker's number, so that the workers do not all begin with the first server.  How
many pairs a server has (`least_pairs`) they tell each other, through `Held`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pyforwarder.core.server_choice import MOST_DRAWN, draw, hash_client, smooth_round

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pyforwarder.core.address import ServerAddress

# A server that has just come back takes at least this share of its weight: with less, a server
# of a quiet upstream would not see a single pair during its slow start and learn nothing.
SLOW_START_FLOOR: Final = 0.05

# A server that fails again right after an ejection rests twice as long, up to this many times the
# configured time (Envoy's outlier detection multiplies in the same way, up to 300 s).
LONGEST_EJECTION: Final = 16


class ServerSettings(Protocol):
    """What is read of a server's configuration."""

    @property
    def address(self) -> ServerAddress: ...
    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...


class EjectionSettings(Protocol):
    """What is read of the configuration of passive ejection."""

    @property
    def failures(self) -> int: ...
    @property
    def for_s(self) -> float: ...


class UpstreamSettings(Protocol):
    """What is read of an upstream's configuration."""

    @property
    def servers(self) -> Sequence[ServerSettings]: ...
    @property
    def balance(self) -> Literal["round_robin", "least_pairs", "source_hash"]: ...
    @property
    def eject(self) -> EjectionSettings: ...
    @property
    def slow_start_s(self) -> float: ...


class Condition(Enum):
    """What `show upstreams` says of a server."""

    UP = "up"
    SLOW_START = "slow_start"  # back, and not at its full share yet
    EJECTED = "ejected"
    DOWN = "down"
    DRAINED = "drained"  # by weight 0 or a command: keeps its pairs and gets no new ones


class Held(Protocol):
    """How many pairs have a server or are being connected to it, in all workers."""

    def add(self, by: int) -> None:
        """This worker has so many more."""
        ...

    def total(self) -> int:
        """Those of all workers."""
        ...


class _OwnHeld:
    """For a worker that knows of no other."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def add(self, by: int) -> None:
        self._count += by

    def total(self) -> int:
        return self._count


class ServerState:
    """One server and what is known of it."""

    __slots__ = (
        "_credit",
        "_ejected_until_s",
        "_ejections",
        "_failures_in_a_row",
        "_rising_since_s",
        "address",
        "backup",
        "connects",
        "counter",
        "failures",
        "held",
        "is_told_to_drain",
        "is_up",
        "name",
        "pairs",
        "seed",
        "weight",
    )

    def __init__(self, settings: ServerSettings, held: Held | None = None) -> None:
        self.address = settings.address
        self.name = str(settings.address)
        self.weight = settings.weight
        self.backup = settings.backup
        self.pairs = 0  # open ones that this balancer gave it
        self.held = held or _OwnHeld()
        self.connects = 0  # attempts that were answered
        self.failures = 0  # attempts that were not
        self.counter = 0  # where its user counts for others, if it does; not read here
        self.is_up = True
        self.is_told_to_drain = False
        self._failures_in_a_row = 0
        self._ejections = 0  # in a row, without a connection that worked in between
        self._ejected_until_s = -math.inf
        self._rising_since_s = -math.inf  # when it came back; never, for those up from the start
        self._credit = 0.0  # smooth weighted round robin's running balance
        digest = hashlib.blake2b(self.name.encode(), digest_size=8, person=b"server").digest()
        self.seed: Final = int.from_bytes(digest, "big")

    @property
    def is_drained(self) -> bool:
        """Whether it keeps its pairs and gets no new ones."""
        return self.is_told_to_drain or not self.weight

    def is_ejected(self, now_s: float) -> bool:
        """Whether it rests because its connections failed."""
        return now_s < self._ejected_until_s

    def __repr__(self) -> str:
        return f"<ServerState {self.name} pairs={self.pairs} is_up={self.is_up}>"


class Balancer:
    """Chooses servers of one upstream.

    `worker` is this worker's number, from 0; `shared` counts for all workers what a server of
    this name holds.

    For every choice the caller reports what became of it: `opened` once the connection stands,
    later `closed` when the pair ends, or `failed` when it never stood.  Besides it says `hold` when
    it begins to connect and `release` when it has nothing to do with the server any more: of many
    that come at once, each has to see those before it.
    """

    def __init__(
        self,
        upstream: UpstreamSettings,
        *,
        worker: int = 0,
        shared: Mapping[str, Held] | None = None,
    ) -> None:
        self._worker = worker
        self._latest_s = -math.inf  # the last time that was passed in
        self._servers: dict[str, ServerState] = {}
        # The servers that can be chosen, and by round_robin in which order, as long as nothing
        # happens to any server: choosing is on the path of every connection, and there may be many
        # servers. Empty: not known, or about to change by itself (an ejection ends, a slow start
        # goes on).
        self._settled: list[tuple[ServerState, float]] = []
        self._round: list[ServerState] = []
        self._turn = worker - 1  # the last one taken of the round
        self._configure(upstream, shared or {})

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """All servers, in the order of the configuration."""
        return tuple(self._servers.values())

    def reconfigure(
        self, upstream: UpstreamSettings, *, shared: Mapping[str, Held] | None = None
    ) -> None:
        """Take over a new configuration; servers that stay keep their pairs, health and history.

        A server that is gone gets no new pair; the state that open pairs still hold stays valid
        for `closed`, `failed` and `release`.
        """
        self._configure(upstream, shared or {})

    def _configure(self, upstream: UpstreamSettings, shared: Mapping[str, Held]) -> None:
        self._choose = {
            "round_robin": self._round_robin,
            "least_pairs": self._least_pairs,
            "source_hash": self._source_hash,
        }[upstream.balance]
        # Whether `choose` looks at who the client is.
        self.asks_client = upstream.balance == "source_hash"
        self._eject_after: int = upstream.eject.failures
        self._eject_for_s: float = upstream.eject.for_s
        self._slow_start_s: float = upstream.slow_start_s
        servers = {}
        for settings in upstream.servers:
            name = str(settings.address)
            state = self._servers.get(name) or ServerState(settings, shared.get(name))
            state.weight = settings.weight
            state.backup = settings.backup
            servers[state.name] = state
        self._servers = servers
        self._start_turn()
        self._unsettle()

    def _start_turn(self) -> None:
        """Give the first turn of a round to another server in each worker."""
        self._turn = self._worker - 1
        for server in self._servers.values():
            server._credit = 0.0
        turns = [
            (server, float(server.weight))
            for server in self._servers.values()
            if server.weight and not server.backup
        ]
        if turns:
            for _ in range(self._worker % len(turns)):
                self._round_robin(turns, None)

    def _unsettle(self) -> None:
        """Something has happened to a server: find out again which ones can be chosen."""
        self._settled = []
        self._round = []

    def _settle(self, now_s: float) -> None:
        """Remember which servers can be chosen, if that stays so until something happens."""
        able = [s for s in self._servers.values() if s.is_up and not s.is_drained]
        if any(server.is_ejected(now_s) or self._is_rising(server, now_s) for server in able):
            return
        for backup in (False, True):
            group = [(s, float(s.weight)) for s in able if s.backup is backup]
            if group:
                self._settled = group
                if self._choose == self._round_robin:
                    self._round = smooth_round([server for server, _ in group])
                return

    def choose(
        self,
        client_ip: str | None,
        now_s: float,
        tried: Collection[ServerState] = (),
    ) -> ServerState | None:
        """The server for the next pair of this client, or None when there is none left.

        `client_ip` is None for clients on a unix socket, `tried` are the servers that already
        failed this client.  In this order: servers, backups, ejected servers, ejected backups.
        """
        self._latest_s = now_s
        if not tried:
            if not self._settled:
                self._settle(now_s)
            if self._round:
                self._turn = turn = (self._turn + 1) % len(self._round)
                return self._round[turn]
            if self._settled:
                return self._choose(self._settled, client_ip)
        fit: list[ServerState] = []
        ejected: list[ServerState] = []
        for server in self._servers.values():
            if server.is_up and not server.is_drained and server not in tried:
                (ejected if server.is_ejected(now_s) else fit).append(server)
        for group in (fit, ejected):
            for backup in (False, True):
                candidates = [
                    (server, self._present_weight(server, now_s))
                    for server in group
                    if server.backup is backup
                ]
                if len(candidates) == 1:
                    return candidates[0][0]
                if candidates:
                    return self._choose(candidates, client_ip)
        return None

    def fit(self, now_s: float) -> tuple[ServerState, ...]:
        """Those among which `choose` chooses; none if only ejected ones are left, or nobody."""
        able = [
            server
            for server in self._servers.values()
            if server.is_up and not server.is_drained and not server.is_ejected(now_s)
        ]
        servers = tuple(server for server in able if not server.backup)
        return servers or tuple(able)

    def rests_until_s(self, now_s: float) -> float:
        """When the next ejection ends; infinity if there is none."""
        return min(
            (s._ejected_until_s for s in self._servers.values() if s.is_ejected(now_s)),
            default=math.inf,
        )

    @staticmethod
    def hold(server: ServerState) -> None:
        """A connection to this server is about to be made."""
        server.held.add(1)

    @staticmethod
    def release(server: ServerState) -> None:
        """The client for which `hold` was called is through with this server."""
        server.held.add(-1)

    def opened(self, server: ServerState) -> None:
        """A connection to this server stands, a pair begins."""
        server.pairs += 1
        server.connects += 1
        server._failures_in_a_row = 0
        server._ejections = 0
        if self._latest_s < server._ejected_until_s:
            # It was tried because nobody else was left, and it works.
            server._ejected_until_s = server._rising_since_s = -math.inf
            self._unsettle()

    def closed(self, server: ServerState) -> None:
        """A pair for which `opened` was called has ended."""
        if server.pairs <= 0:
            raise ValueError(f"{server.name}: more pairs closed than opened")
        server.pairs -= 1

    def passed(self, server: ServerState, count: int) -> None:
        """So many pairs with this server have begun and ended; at least one."""
        self.opened(server)
        self.closed(server)
        server.connects += count - 1

    def failed(self, server: ServerState, now_s: float) -> None:
        """A connection to this server was refused, unreachable or too slow."""
        self._latest_s = now_s
        server.failures += 1
        if server.is_ejected(now_s):
            return  # tried for want of a better one: it was known to fail
        server._failures_in_a_row += 1
        # After an ejection one failure is enough: its first pair was to show whether it is back.
        needed = 1 if server._ejections else self._eject_after
        if self._eject_after and server._failures_in_a_row >= needed:
            times = min(2**server._ejections, LONGEST_EJECTION)
            server._ejected_until_s = now_s + self._eject_for_s * times
            server._rising_since_s = server._ejected_until_s
            server._ejections = min(server._ejections + 1, LONGEST_EJECTION)
            server._failures_in_a_row = 0
            self._unsettle()

    def mark_up(self, name: str, now_s: float) -> None:
        """Health checks say that the server of this name is back; its slow start begins."""
        server = self._servers.get(name)
        if server is not None and not server.is_up:
            server.is_up = True
            server._rising_since_s = now_s
            # What failed before it was seen to be well says nothing any more.
            server._ejected_until_s = -math.inf
            server._failures_in_a_row = server._ejections = 0
            self._unsettle()

    def mark_down(self, name: str) -> None:
        """Health checks say that the server of this name must get no new pairs."""
        server = self._servers.get(name)
        if server is not None:
            server.is_up = False
            self._unsettle()

    def drain(self, names: Collection[str]) -> None:
        """The servers of these names, and no others, are told to take no new pairs."""
        for server in self._servers.values():
            server.is_told_to_drain = server.name in names
        self._unsettle()

    def condition(self, server: ServerState, now_s: float) -> Condition:
        """What to show of a server; the strongest reason against it first."""
        if not server.is_up:
            return Condition.DOWN
        if server.is_drained:
            return Condition.DRAINED
        if server.is_ejected(now_s):
            return Condition.EJECTED
        if self._present_weight(server, now_s) < server.weight:
            return Condition.SLOW_START
        return Condition.UP

    def why_none(self, now_s: float) -> str:
        """What keeps new pairs from its servers, for the log: `3 drained, 1 down`."""
        found = Counter(self.condition(server, now_s).value for server in self._servers.values())
        return ", ".join(f"{count} {word}" for word, count in found.items()) or "it has none"

    def _is_rising(self, server: ServerState, now_s: float) -> bool:
        """Whether its slow start still goes on."""
        return now_s - server._rising_since_s < self._slow_start_s

    def _present_weight(self, server: ServerState, now_s: float) -> float:
        """The weight in force: it grows with time after a server came back."""
        if not self._slow_start_s:
            return server.weight
        grown = (now_s - server._rising_since_s) / self._slow_start_s
        return server.weight * min(max(grown, SLOW_START_FLOOR), 1.0)

    def _round_robin(
        self, candidates: Sequence[tuple[ServerState, float]], client_ip: str | None
    ) -> ServerState:
        # nginx's smooth weighted round robin: every server earns its weight, the richest is
        # taken and pays what all have earned.  With weights 5, 1, 1 that gives aabacaa instead
        # of aaaaabc.
        total = 0.0
        best = candidates[0][0]
        for server, share in candidates:
            server._credit += share
            total += share
            if server._credit > best._credit:
                best = server
        best._credit -= total
        return best

    def _least_pairs(
        self, candidates: Sequence[tuple[ServerState, float]], client_ip: str | None
    ) -> ServerState:
        # The load *after* the choice, so that of two idle servers the heavier one is taken.
        loads = [(server.held.total() + 1) / share for server, share in candidates]
        least = min(loads)
        equal = [
            candidate
            for candidate, load in zip(candidates, loads, strict=True)
            if load <= least * (1 + 1e-9)
        ]
        return equal[0][0] if len(equal) == 1 else self._round_robin(equal, client_ip)

    def _source_hash(
        self, candidates: Sequence[tuple[ServerState, float]], client_ip: str | None
    ) -> ServerState:
        # Weighted rendezvous hashing (Thaler and Ravishankar 1998; the logarithm for weights:
        # Schindelhauer and Schomaker 2005): each server draws a number from (client, server),
        # the best wins.  When a server leaves only its clients move, when it returns they return.
        client = hash_client(client_ip)
        return min(
            candidates,
            key=lambda candidate: (
                -math.log(draw(client ^ candidate[0].seed) / MOST_DRAWN) / candidate[1],
                candidate[0].name,
            ),
        )[0]
