"""Which servers are up: by this machine's checks alone, or by those of all of its fleet."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import is_this_host
from pyforwarder.runtime.tables import one_line
from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import (
    FROM_HEALTH,
    FleetStates,
    FleetStore,
    Overwritten,
    StoreAnswered,
)
from pyforwarder.supervisor.processes.child import Above, Serving
from pyforwarder.supervisor.processes.health_checker import HealthResult

if TYPE_CHECKING:
    from pyforwarder.config import Config, Fleet, Upstream
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.processes.health_process import CheckerProcess
    from pyforwarder.worker.log import Log

    Server = tuple[str, str]  # upstream and address

_MOST_SHOWN: Final = 200
_GATHER_S: Final = 0.05
# Machines that come and go change who checks what; what the checks find has to be read, too.
_REST_S: Final = 1.0
# A machine that has checked all of its servers in no such time checks nothing.
_ROUNDS: Final = 3
_LEAST_S: Final = 2.0  # a loaded machine is late now and then


class FleetHealth(StoreProcess["FleetStates | FleetStore | Overwritten | StoreAnswered"]):
    """Puts together what our own process checks, and what the fleet says where that is shared.

    As long as the store does not answer, and until it has, each machine checks all by itself.
    """

    name = "fleet_health"
    part = "health"
    may_say = FROM_HEALTH

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        make_checks: Callable[[Callable[[HealthResult], None], Callable[[], None]], CheckerProcess],
        notify: Callable[[HealthResult], None],
    ) -> None:
        """`make_checks` makes the process that checks, with what is to be told by it, and when.

        `notify` is called with every change.
        """
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._notify = notify
        self.checks = make_checks(self._found, self._finished)
        self._fleet: Fleet | None = None
        self._upstreams: Mapping[str, Upstream] = {}
        self._servers: set[Server] = set()  # that are to be checked, here or at another machine
        self._local: set[Server] = set()  # of these, those that are others at other machines
        self._mine: set[Server] = set()  # that are checked here
        self._own: dict[Server, HealthResult] = {}  # what was found here
        self._down: dict[Server, HealthResult] = {}
        self._others: dict[Server, str] = {}  # machines that check for us
        self._is_shared = False
        self._timer = 0
        self._rest = 0  # the timer, as long as what is checked must not change again
        self._waiting: tuple[set[Server], int] | None = None  # to be checked then
        self._turn = 0  # the fleet's last word on what we check that is done
        self._rounds = 0  # of checks, that were finished

    @property
    def down(self) -> list[HealthResult]:
        """The servers that must get no pair just now."""
        return list(self._down.values())

    def checkers(self) -> dict[Server, str]:
        """Who checks each server: `here`, another machine by its name, or `all`, which includes
        this one.

        Those that nobody checks are left out.
        """
        is_all = self._fleet is not None and self._fleet.health.checks == "all"
        found = dict.fromkeys(self._mine, "here")
        if self._is_shared:
            for server in self._servers - self._local:
                if is_all:
                    found[server] = "all"
                elif server not in self._mine and server in self._others:
                    found[server] = self._others[server]
        return found

    def inherit(self, down: Sequence[HealthResult]) -> None:
        """Begin with the servers that another daemon has found down; the first check of each may
        find it up.
        """
        self._down = {(one.upstream, one.server): one for one in down}

    def change_to(self, config: Config) -> None:
        """Check the servers of this configuration from now on; those that are checked no more count
        as up.
        """
        fleet = config.fleet if config.fleet and config.fleet.health.checks != "own" else None
        self._upstreams = {
            name: upstream
            for name, upstream in config.upstreams.items()
            if upstream.health is not None
        }
        self._servers = {
            (name, str(server.address))
            for name, upstream in self._upstreams.items()
            for server in upstream.servers
        }
        self._local = {
            (name, str(server.address))
            for name, upstream in self._upstreams.items()
            for server in upstream.servers
            if is_this_host(server.address)
        }
        for server in [server for server in self._down if server not in self._servers]:
            del self._down[server]
            self._notify(HealthResult(*server, up=True, why="checked no more"))
        if fleet != self._fleet:
            self._fleet, self._is_shared = fleet, False
            self.renew()
        else:
            self.start()
        mine = self._mine & self._servers | self._local if self._is_shared else self._servers
        self._check(mine, anew=True)
        self._send_own_soon()

    @property
    def _is_wanted(self) -> bool:
        return self._fleet is not None

    def start(self) -> None:
        """See `ChildProcess.start`; it is told what is known here."""
        super().start()
        self._send_own_soon()

    def _check(self, mine: set[Server], *, anew: bool = False) -> None:
        """Have the servers in `mine` checked here, and no others."""
        if mine == self._mine and not anew:
            return
        self._mine = mine
        self._own = {server: one for server, one in self._own.items() if server in mine}
        if anew:
            self.checks.change_to(self._upstreams, mine)
        else:
            self.checks.check_only(mine)

    def _check_soon(self) -> None:
        """What the fleet has said last, once the last change is long enough ago."""
        self._rest = 0
        if self._waiting is None:
            return
        (check, self._turn), self._waiting = self._waiting, None
        # The fleet's process may name servers that are none any more: its next word is about those
        # of now.
        mine = check & self._servers | self._local
        if mine != self._mine:
            self._rest = self._loop.after(_REST_S, self._check_soon)
            self._check(mine)
        self._send_own_soon()  # what is checked no more is said no more

    def _finished(self) -> None:
        """Our own process has checked all that is checked here once more."""
        self._rounds += 1
        self._send(self._progress())

    def _progress(self) -> dict[str, object]:
        checks = [one.health for one in self._upstreams.values() if one.health is not None]
        within_s = max((_ROUNDS * one.interval_s + one.timeout_s for one in checks), default=0.0)
        return {"rounds": self._rounds, "within_s": max(within_s, _LEAST_S)}

    def _found(self, result: HealthResult) -> None:
        """Take a result of this machine's own checks, whether it is new to others or not."""
        server = (result.upstream, result.server)
        if server not in self._mine:
            return  # it is checked here no more
        self._own[server] = result
        self._send_own_soon()
        if not self._is_shared or server in self._local:
            self._put(result)

    def _put(self, result: HealthResult) -> None:
        """Note whether a server is up, and notify if that has changed."""
        server = (result.upstream, result.server)
        was_down = server in self._down
        if result.up:
            self._down.pop(server, None)
        else:
            self._down[server] = result
        if was_down == result.up:
            self._notify(result)

    def _send_own_soon(self) -> None:
        """Soon, and then all of it: results come in groups."""
        if self._fleet is not None and not self._timer:
            self._timer = self._loop.after(_GATHER_S, self._send_own)

    def _send_own(self) -> None:
        self._timer = 0
        if self._channel is None:
            return  # the next process is told
        own = []
        for server in sorted(self._servers - self._local):
            found = self._own.get(server)
            text = ""
            if found is not None:
                text = "up" if found.up else f"down {found.why}"[:_MOST_SHOWN].replace("\n", " ")
            own.append([*server, text])
        try:
            message = {"own": own, "turn": self._turn, **self._progress()}
            self._channel.send(message, wait=False)
        except OSError:  # it does not read just now
            self._send_own_soon()

    def _prepare(self, channel: Channel) -> Serving:
        # Files may be readable by root alone, these modules, too.
        from pyforwarder.fleet.health import Board, HealthSharing
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.opening import open_store
        from pyforwarder.fleet.watching import Watcher

        fleet = self._fleet
        assert fleet is not None
        assert fleet.health.checks != "own"
        stores = open_store(fleet), open_store(fleet)
        machine = fleet.instance or socket.gethostname()
        keys = Keys(fleet.name)
        board = Board(machine, fleet.health.checks, fleet.health.quorum)
        watcher = Watcher(stores[1], keys.health)
        sharing = HealthSharing(stores[0], watcher, keys, machine, board, Above(channel))
        return Serving(sharing.run)

    def _handle(self, message: FleetStates | FleetStore | Overwritten | StoreAnswered) -> None:
        if isinstance(message, StoreAnswered):
            self._note(message)
            return
        if isinstance(message, Overwritten):
            key = message.overwritten[:_MOST_SHOWN]
            self._log.write("warning", "fleet_health_overwritten", key=key)
            return
        if isinstance(message, FleetStore):
            is_lost = message.store == "lost"
            level, name = ("warning", "error") if is_lost else ("info", "endpoint")
            self._log.write(level, f"fleet_health_{message.store}", **{name: message.endpoint})
            if is_lost:
                self._go_alone()
            return
        self._is_shared = True
        self._others = {
            (upstream, server): one_line(machine)
            for upstream, some in message.others.items()
            for server, machine in some.items()
        }
        check = {(upstream, server) for upstream, some in message.check.items() for server in some}
        self._waiting = check, message.turn
        if not self._rest:
            self._check_soon()
        for upstream, states in message.states.items():
            for server, text in states.items():
                if (upstream, server) in self._servers - self._local:
                    word, _, why = text.partition(" ")
                    self._put(
                        HealthResult(upstream, server, up=word == "up", why=why[:_MOST_SHOWN])
                    )

    def close(self) -> None:
        """End both processes."""
        self._is_shared = False
        super().close()
        self.checks.close()

    def _hang_up(self) -> None:
        super()._hang_up()
        self._turn = 0
        self._go_alone()

    def _go_alone(self) -> None:
        """Check all servers here, as no other machine's checks are known."""
        self._waiting = None
        if self._is_shared:
            self._is_shared = False
            self._check(self._servers)
            for result in self._own.values():
                self._put(result)
