"""Health checks that the machines of a fleet share (`fleet: {health: ...}`).

Each machine writes what it knows of its servers at a key of its own, with a lease of a few seconds:
what a dead machine has said is gone with it. From all of these each machine concludes by itself
who checks a server and whether that is up, so nobody has to be elected.

    one   of the machines that have a server, one checks it: the same for all of them, chosen by a
          hash (rendezvous hashing), so that servers are spread, and few move when a machine goes
    all   all check, and a server is down when so many of them say so

`Board` is pure; `HealthSharing` runs in a process of its own without privileges.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field

from pyforwarder.core.wording import counted
from pyforwarder.fleet.exchanges import Exchanges
from pyforwarder.fleet.layout import (
    MOST_INSTANCES,
    MOST_SERVERS,
    Name,
    Value,
    ValueFault,
    check_machine,
)
from pyforwarder.fleet.reporting import Reporter

if TYPE_CHECKING:
    from pyforwarder.fleet.layout import Keys
    from pyforwarder.fleet.store import Store
    from pyforwarder.fleet.supervisor import Supervisor
    from pyforwarder.fleet.watching import Watcher

_TURN_S: Final = 0.1
_MOST_WHY: Final = 200
_MOST_NAME: Final = 64  # of a machine, as far as it is shown
_MOST_VALUE_BYTES: Final = 1 << 20
# All machines' reports together, kept for servers that this one may get later.
_MOST_KEPT_BYTES: Final = 32 << 20

Server = tuple[str, str]  # upstream and address
# "": it has this server, and has not looked; "up", or "down" and why.
_State = Annotated[str, Field(max_length=256, pattern=r"^(|up|down .*)$")]


class HealthReport(Value):
    """What a machine knows of the servers that it has and that are to be checked."""

    servers: dict[Name, dict[Name, _State]] = Field(default_factory=dict, max_length=MOST_SERVERS)


class State(NamedTuple):
    """What is known of a server."""

    up: bool
    why: str = ""

    @classmethod
    def decode(cls, text: str) -> State | None:
        """Return the state that was written as this text; None: the text is empty, nothing is
        known.
        """
        if not text:
            return None
        word, _, why = text.partition(" ")
        return cls(word == "up", why)

    def encode(self) -> str:
        """The text that `decode` reads."""
        return "up" if self.up else f"down {self.why[:_MOST_WHY]}".replace("\n", " ")


class Board:
    """What all machines say, and what follows for one of them."""

    def __init__(
        self, machine: str, checks: Literal["one", "all"], quorum: int | Literal["majority"]
    ) -> None:
        """`machine` is its name in the fleet, `quorum` how many must say that a server is down."""
        self._machine = machine
        self._checks = checks
        self._quorum = quorum
        # What each machine says of servers that this one has, too.
        self._said: dict[str, dict[Server, State | None]] = {}
        self._values: dict[str, bytes] = {}  # the reports of these
        self._kept_bytes = 0
        self._own: dict[Server, State | None] = {}
        # Words on these count from this turn on: they were not this machine's to check until then.
        self._from: dict[Server, int] = {}
        self.is_out = False  # this machine does not check just now, and its word is the last one
        self.faults = 0

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """All reports that are in the store, by machine."""
        self._said.clear()
        self._values.clear()
        self._kept_bytes = 0
        for machine, value in found:
            self.saw(machine, value)

    def saw(self, machine: str, value: bytes | None) -> None:
        """Note that a machine's report has changed, or has gone (None)."""
        self._said.pop(machine, None)
        self._kept_bytes -= len(self._values.pop(machine, b""))
        if value is None or machine == self._machine:
            return
        try:
            if len(self._said) >= MOST_INSTANCES:
                raise ValueFault("too many machines")
            report = _parse(machine, value)
        except ValueFault:
            self.faults += 1
            return
        self._said[machine] = self._known(report)
        # If a report is not kept, nothing is known of later servers until its machine reports
        # again.
        if self._kept_bytes + len(value) <= _MOST_KEPT_BYTES:
            self._values[machine] = value
            self._kept_bytes += len(value)

    def _known(self, report: HealthReport) -> dict[Server, State | None]:
        """What the report says of servers that this machine has, too."""
        return {
            (upstream, server): State.decode(text)
            for upstream, servers in report.servers.items()
            for server, text in servers.items()
            if (upstream, server) in self._own
        }

    def know(self, own: Mapping[Server, State | None], turn: int = 0) -> None:
        """What this machine knows by itself of the servers that it has, as of this `turn`."""
        has_more = bool(own.keys() - self._own.keys())
        self._from = {server: since for server, since in self._from.items() if server in own}
        self._own = {
            server: state if turn >= self._from.get(server, 0) else None
            for server, state in own.items()
        }
        if has_more:
            for machine, value in self._values.items():
                self._said[machine] = self._known(_parse(machine, value))

    def give_up(self, mine: Collection[Server], turn: int) -> None:
        """Check only the servers in `mine` from this turn on: what was known of others is past."""
        for server in self._own.keys() - mine:
            self._own[server] = None
            self._from[server] = turn

    def report(self) -> HealthReport:
        """What this machine tells the others."""
        servers: dict[str, dict[str, str]] = defaultdict(dict)
        for (upstream, server), state in list(self._own.items())[:MOST_SERVERS]:
            servers[upstream][server] = state.encode() if state is not None else ""
        return HealthReport(servers=servers)

    def mine(self) -> set[Server]:
        """The servers that this machine is to check."""
        if self._checks == "all":
            return set(self._own)
        return {server for server in self._own if self._checker_of(server) == self._machine}

    def others(self) -> dict[Server, str]:
        """The servers that another machine alone checks for this one, and which."""
        if self._checks == "all":
            return {}
        found = {server: self._checker_of(server, is_out=self.is_out) for server in self._own}
        return {server: name for server, name in found.items() if name != self._machine}

    def states(self) -> dict[Server, State]:
        """Return the states of this machine's servers of which something is known."""
        found = {}
        for server in self._own:
            state = self._elected(server) if self._checks == "one" else self._voted(server)
            if state is not None:
                found[server] = state
        return found

    def _checker_of(self, server: Server, *, is_out: bool = False) -> str:
        machines = [name for name, states in self._said.items() if server in states]
        if not is_out or not machines:
            machines.append(self._machine)
        return max(machines, key=lambda name: _weight(name, server))

    def _elected(self, server: Server) -> State | None:
        checker = self._checker_of(server, is_out=self.is_out)
        return self._own[server] if checker == self._machine else self._said[checker][server]

    def _voted(self, server: Server) -> State | None:
        votes = [
            state for states in self._said.values() if (state := states.get(server)) is not None
        ]
        own = self._own[server]
        if own is not None and not (votes and self.is_out):
            votes.insert(0, own)
        if not votes:
            return None
        down = [state for state in votes if not state.up]
        # Where fewer machines are left than must agree, all of them must.
        wanted = len(votes) // 2 + 1
        if self._quorum != "majority":
            wanted = min(self._quorum, len(votes))
        if len(down) < wanted:
            return State(
                up=True,
                why=f"reached by {len(votes) - len(down)} of {counted(len(votes), 'machine')}",
            )
        return State(
            up=False, why=f"{len(down)} of {counted(len(votes), 'machine')}: {down[0].why}"
        )


def _parse(machine: str, value: bytes) -> HealthReport:
    """What a machine says.

    Raises:
        ValueFault: it is no report.
    """
    check_machine(machine)
    if len(value) > _MOST_VALUE_BYTES:
        raise ValueFault("too long")
    report = HealthReport.decode(value)
    if sum(map(len, report.servers.values())) > MOST_SERVERS:
        raise ValueFault("too many servers")
    return report


def _weight(machine: str, server: Server) -> bytes:
    text = "\0".join((machine, *server))
    return hashlib.blake2b(text.encode(), digest_size=8).digest() + machine.encode()


class HealthSharing:
    """Writes this machine's report, reads the others', and tells the supervisor what follows."""

    def __init__(
        self,
        store: Store,
        watcher: Watcher,
        keys: Keys,
        machine: str,
        board: Board,
        supervisor: Supervisor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`watcher` is of `keys.health`, with a store of its own."""
        self._watcher = watcher
        self._board = board
        self._supervisor = supervisor
        self._clock = clock
        self._reporter = Reporter(store, watcher, keys.health, machine, supervisor, clock=clock)
        self._exchanges = Exchanges(supervisor)
        self._mine: set[Server] = set()
        self._turn = 0  # counts what there was to check
        self._rounds = 0  # of checks, that the supervisor has told of
        self._within_s = math.inf  # in which another one is to be finished
        self._round_s = clock()  # when one was last
        self._told: dict[str, Any] | None = None

    def run(self) -> None:
        """Share the results of checks until the supervisor is gone.

        Raises:
            EOFError, OSError: it is.
        """
        self._watcher.start()
        while True:
            message = self._supervisor.wait(_TURN_S)
            if message is not None:
                self.receive(message)
            self.turn()

    def receive(self, message: Mapping[str, Any]) -> None:
        """The supervisor says what this machine knows: upstream, server and a state each.

        Also how many rounds of checks were finished: a machine whose checks stand still would keep
        all others from checking what it is to check.
        """
        self._within_s = message["within_s"]
        if message["rounds"] != self._rounds:
            self._rounds, self._round_s = message["rounds"], self._clock()
        if "own" in message:
            self._board.know(
                {
                    (upstream, server): State.decode(text)
                    for upstream, server, text in message["own"]
                },
                message["turn"],
            )

    def turn(self) -> None:
        """Receive, write what has changed, and send what follows."""
        now_s = self._clock()
        self._reporter.receive(self._board, now_s)
        self._check_turn(now_s)
        self._reporter.write(now_s, self._write)
        self._exchanges.tell(self._reporter.answered_s, now_s, unusable=self._board.faults)
        was_lost = self._reporter.is_lost
        is_shared = self._reporter.check_store()
        if self._reporter.is_lost != was_lost:
            self._told = None
        if is_shared:
            self._report_states()

    def _write(self, now_s: float) -> bool:
        if self._board.is_out:  # others are to check what was ours, and ours counts last
            return self._reporter.withdraw(now_s)
        return self._reporter.put(self._board.report(), now_s)

    def _check_turn(self, now_s: float) -> None:
        """What this machine is to check, and whether it does."""
        mine = self._board.mine()
        if mine != self._mine:
            self._mine, self._turn = mine, self._turn + 1
        self._board.give_up(mine, self._turn)
        if not mine:
            self._round_s = now_s
        is_out = now_s > self._round_s + self._within_s
        if is_out != self._board.is_out:
            self._board.is_out = is_out
            self._reporter.renew_soon()

    def _report_states(self) -> None:
        states = self._board.states()
        texts: dict[str, dict[str, str]] = defaultdict(dict)
        for (upstream, server), state in states.items():
            word = "up" if state.up else "down"
            texts[upstream][server] = f"{word} {state.why[:_MOST_WHY]}"
        check: dict[str, list[str]] = defaultdict(list)
        for upstream, server in sorted(self._mine):
            check[upstream].append(server)
        others: dict[str, dict[str, str]] = defaultdict(dict)
        for (upstream, server), machine in self._board.others().items():
            others[upstream][server] = machine[:_MOST_NAME]
        message = {
            "states": dict(texts),
            "check": dict(check),
            "others": dict(others),
            "turn": self._turn,
        }
        if message != self._told:
            self._supervisor.send(message)
            self._told = message
