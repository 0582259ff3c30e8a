"""The process that checks servers: forked, unprivileged, reaching what a worker reaches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.runtime.loop import EPOLLIN, Loop
from pyforwarder.supervisor.messages import (
    FROM_CHECKER,
    ChecksDone,
    FaultyMessageError,
    HealthMessage,
    understand,
)
from pyforwarder.supervisor.processes.child import ChildProcess, Serving
from pyforwarder.supervisor.processes.health_checker import Checker, HealthResult

if TYPE_CHECKING:
    from pyforwarder.config import Upstream
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.log import Log

    Server = tuple[str, str]  # upstream and address

_MOST_SHOWN: Final = 200


def report_rounds(channel: Channel) -> Callable[[], None]:
    """What to call with each round that is finished: of those that nobody reads the last are lost.

    A supervisor that stands still must find its checks going on.
    """
    rounds = itertools.count(1)

    def report() -> None:
        with contextlib.suppress(BlockingIOError):
            channel.send({"rounds": next(rounds)}, wait=False)

    return report


class CheckerProcess(ChildProcess["HealthResult | ChecksDone"]):
    """Tells of each server once, and again when the server goes up or down."""

    name = "health_checks"
    may_say = FROM_CHECKER

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        notify: Callable[[HealthResult], None],
        finished: Callable[[], None],
    ) -> None:
        """`notify` is called in this process with each result.

        `finished`: each time when all servers that are to be checked have been once more.
        """
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._notify = notify
        self._finished = finished
        self._upstreams: Mapping[str, Upstream] = {}
        self._only: Collection[Server] = ()
        # What the last process has found of those that are checked still.
        self._known: dict[Server, bool] = {}

    def change_to(self, upstreams: Mapping[str, Upstream], only: Collection[Server]) -> None:
        """Start a process that checks the servers in `only`, of these upstreams.

        What is known of those that stay holds.
        """
        self._kill()
        self._upstreams = upstreams
        self._keep(only)
        self.start()

    def check_only(self, only: Collection[Server]) -> None:
        """Have the running process check the servers in `only`, and no others."""
        self._keep(only)
        if self._channel is None:
            self.start()
            return
        try:
            self._channel.send({"check": [list(one) for one in only]}, wait=False)
        except OSError:  # it has not read for long
            self.renew()

    def _keep(self, only: Collection[Server]) -> None:
        self._only = only
        self._known = {server: up for server, up in self._known.items() if server in only}

    @property
    def _is_wanted(self) -> bool:
        return any(upstream.health is not None for upstream in self._upstreams.values())

    def _prepare(self, channel: Channel) -> Serving:
        def run() -> None:
            loop = Loop()
            checker = Checker(
                loop,
                self._upstreams,
                lambda result: channel.send(result._asdict()),
                only=self._only,
                known=self._known,
                finished=report_rounds(channel),
            )

            def receive(_owner: object, _fd: int, _mask: int) -> None:
                received = channel.receive()
                if received is None:
                    raise EOFError
                checker.check_only(
                    {(upstream, server) for upstream, server in received[0]["check"]}
                )

            loop.watch(channel.fileno(), EPOLLIN, receive, channel)
            loop.run()

        return Serving(run)

    def _understand(self, message: dict[str, Any], fds: Sequence[int]) -> HealthResult | ChecksDone:
        understood = understand(message, fds, FROM_CHECKER)
        if isinstance(understood, ChecksDone):
            return understood
        assert isinstance(understood, HealthMessage)
        upstream = self._upstreams.get(understood.upstream)
        servers = () if upstream is None or upstream.health is None else upstream.servers
        if understood.server not in {str(server.address) for server in servers}:
            raise FaultyMessageError("a result of what it does not check")
        return HealthResult(
            understood.upstream,
            understood.server,
            up=understood.up,
            why=understood.why[:_MOST_SHOWN],
        )

    def _handle(self, message: HealthResult | ChecksDone) -> None:
        if isinstance(message, ChecksDone):
            self._finished()
            return
        server = (message.upstream, message.server)
        if server in self._only:
            self._known[server] = message.up
        self._notify(message)
