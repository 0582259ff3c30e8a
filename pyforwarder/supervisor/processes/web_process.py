"""The process that Prometheus and browsers ask: forked, unprivileged, reading what workers count.

It has a process of its own so that an answer, however long, never holds the supervisor up, and
so that nothing which reads HTTP has any privilege.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder import __version__
from pyforwarder.core.address import Address, bind_text
from pyforwarder.errors import ForwarderError
from pyforwarder.supervisor.messages import (
    FROM_PAGE,
    FaultyMessageError,
    Flush,
    SetServer,
)
from pyforwarder.supervisor.processes.child import ChildProcess, Serving
from pyforwarder.supervisor.requests import report

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.status.metrics import Source
    from pyforwarder.status.process import PageSource
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.messages import FleetInstance
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.worker.log import Log

_BACKLOG: Final = 128


# How many changes of servers, up or down, the page is told when it starts.
_MOST_RESULTS: Final = 50

# What is served where, by the key of the configuration.
Wanted = Mapping[str, Address]


def wanted_of(config: Config) -> Wanted:
    """The addresses that the configuration has for this process."""
    sections = {"metrics": config.metrics, "status": config.status}
    return {key: section.bind for key, section in sections.items() if section is not None}


class WebListener:
    """A listening socket, which outlives the processes that serve it."""

    def __init__(self, key: str, wanted: Address) -> None:
        """Bind and listen.

        Raises:
            ForwarderError: the address cannot be bound.
        """
        self.wanted = wanted
        family = socket.AF_INET6 if wanted.is_ipv6 else socket.AF_INET
        try:
            self.sock = socket.create_server(
                (wanted.host, wanted.port), family=family, backlog=_BACKLOG
            )
        except OSError as error:
            raise ForwarderError(f"{key}: cannot listen on {wanted}: {error.strerror}") from error
        host, port = self.sock.getsockname()[:2]
        self.bind = Address(host, port)  # port 0 resolved

    @classmethod
    def inherited(cls, wanted: Address, fd: int) -> WebListener:
        """The socket of the daemon before, with its descriptor, which is ours from here on."""
        listener = cls.__new__(cls)
        listener.wanted = wanted
        listener.sock = socket.socket(fileno=fd)
        listener.bind = Address(*listener.sock.getsockname()[:2])
        return listener

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


Listening = dict[str, WebListener]


class WebProcess(ChildProcess["Flush | SetServer"]):
    """Remembers which servers went up and down, for the processes to come."""

    name = "web"
    may_say = FROM_PAGE
    pause_s = 0.05  # between two orders of the page

    def __init__(
        self,
        sources: Callable[[], tuple[Source, PageSource | None]],
        *,
        user: str | None,
        loop: Loop,
        log: Log,
        close_in_child: Callable[[], None],
        obey: Callable[[dict[str, Any], list[int]], object],
        may_order: Callable[[], bool],
        unix_time_s: Callable[[], float],
    ) -> None:
        """`sources` is called in the child, before `close_in_child`.

        What viewers order is asked of `obey`, as over the control socket, while `may_order`.
        """
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._sources = sources
        self._obey = obey
        self._may_order = may_order
        self._unix_time_s = unix_time_s
        self.listening: Listening = {}
        self.results: deque[tuple[float, HealthResult]] = deque(maxlen=_MOST_RESULTS)
        # Machines, and exchanges with the fleet's store, for processes to come.
        self.fleet: list[dict[str, Any]] = []
        self.exchanges: list[dict[str, Any]] = []

    def change_to(self, wanted: Wanted) -> Listening:
        """Bind what is wanted, unless it is bound; nothing changes before `commit`.

        Raises:
            ForwarderError: it cannot be bound; nothing new is left bound.
        """
        following: Listening = {}
        try:
            for key, bind in wanted.items():
                present = self.listening.get(key)
                is_same = present is not None and present.wanted == bind
                following[key] = present if present and is_same else WebListener(key, bind)
        except ForwarderError:
            self.abandon(following)
            raise
        return following

    def abandon(self, following: Listening) -> None:
        """The change does not come."""
        for listener in following.values():
            if listener not in self.listening.values():
                listener.close()

    def commit(self, following: Listening) -> None:
        """Serve there from now on, and tell of the configuration in force."""
        self._kill()
        self._listen_at(following)
        self.start()

    def listen(self, wanted: Wanted) -> None:
        """Listen there, before the first process serves it.

        Raises:
            ForwarderError: it cannot be bound.
        """
        self._listen_at(self.change_to(wanted))

    def _listen_at(self, following: Listening) -> None:
        for listener in self.listening.values():
            if listener not in following.values():
                listener.close()
        self.listening = following

    def close_listeners(self) -> None:
        """Close the listeners, in another child, which does not serve them."""
        for listener in self.listening.values():
            listener.close()

    def close(self) -> None:
        """End the process and stop listening."""
        super().close()
        for listener in self.listening.values():
            listener.close()
        self.listening = {}

    def send_health(self, result: HealthResult) -> None:
        """A server went up or down: viewers may want to know."""
        now_unix_s = self._unix_time_s()
        self.results.append((now_unix_s, result))
        self._send({"at": now_unix_s, **result._asdict()})

    def send_fleet(self, instances: Sequence[FleetInstance]) -> None:
        """The machines of the fleet have changed: that is told at `/metrics`."""
        self.fleet = [one.model_dump(exclude={"started", "why"}) for one in instances]
        self._send({"fleet": self.fleet})

    def send_exchanges(self, exchanges: list[dict[str, Any]]) -> None:
        """The fleet's store has answered, or is asked for other things: `StoreProcess.exchange`."""
        if exchanges != self.exchanges:
            self.exchanges = exchanges
            self._send({"exchanges": exchanges})

    @property
    def _is_wanted(self) -> bool:
        return bool(self.listening)

    def _prepare(self, channel: Channel) -> Serving:
        from pyforwarder.status.process import prepare

        source, page = self._sources()
        sockets = {key: listener.sock for key, listener in self.listening.items()}
        serving = prepare(sockets, source, page, channel)
        return Serving(serving.run, serving.fds)

    def _understand(self, message: dict[str, Any], fds: Sequence[int]) -> Flush | SetServer:
        order = super()._understand(message, fds)
        if not self._may_order():
            raise FaultyMessageError("an order, and viewers may only look")
        return order

    def _handle(self, message: Flush | SetServer) -> None:
        self._send({"n": message.n, **self._carry_out(message)})

    def _carry_out(self, order: Flush | SetServer) -> dict[str, object]:
        """Do what a viewer orders; the log has the viewer's name, as the process gave it."""
        user = order.user or "-"
        try:
            if isinstance(order, SetServer):
                request = {"do": "server", "server": order.server, "state": order.state}
                self._obey(request, [])
                self._log.write(
                    "info", "server_set_by_page", user=user, server=order.server, state=order.state
                )
                return {"done": 1}
            result = self._obey({"do": "flush", "ids": order.flush}, [])
        except ForwarderError as error:
            return {"error": str(error)}
        assert isinstance(result, dict)
        count = len(result["flushed"])
        self._log.write("info", "flushed_by_page", user=user, pairs=count)
        return {"done": count}


def source_in_child(
    in_force: ConfigInForce,
    memory: SharedMemory,
    datapaths: Mapping[str, str],
    *,
    started_unix_s: float,
    fleet: Sequence[Mapping[str, Any]],
    exchanges: Sequence[Mapping[str, Any]],
) -> Source:
    """Return what metrics tell, from memory that this process cannot write; called in the metrics
    process.
    """
    from pyforwarder.status.metrics import Source

    counters, windows = memory.give_up_writing()
    directory = memory.directory
    listeners = in_force.config.listeners
    return Source(
        version=__version__,
        started_unix_s=started_unix_s,
        workers=memory.workers,
        counters=counters,
        windows=windows,
        listeners={listener.name: directory.index(listener.name) for listener in listeners},
        rules={
            (listener.name, rule.name): directory.index(listener.name, rule.name)
            for listener in listeners
            for rule in listener.rules
        },
        servers={
            (name, str(server.address)): index
            for name, upstream in in_force.config.upstreams.items()
            for server in upstream.servers
            if (index := directory.server_index(name, str(server.address))) is not None
        },
        upstreams={
            name: index
            for name in in_force.config.upstreams
            if (index := directory.upstream_index(name)) is not None
        },
        datapaths=datapaths,
        fleet=list(fleet),
        exchanges=list(exchanges),
    )


def page_source_in_child(
    in_force: ConfigInForce,
    source: Source,
    memory: SharedMemory,
    *,
    instance: str,
    results: Iterable[tuple[float, HealthResult]],
    down: Iterable[HealthResult],
    unix_time_s: Callable[[], float],
) -> PageSource | None:
    """Return what the page shows, from what metrics tell; None: no page is wanted. Called in the
    same process.
    """
    from pyforwarder.status.page_data import About, HealthChange
    from pyforwarder.status.plan import ListenerPlan, Plan, RulePlan, ServerPlan
    from pyforwarder.status.process import PageSource

    config, directory = in_force.config, memory.directory
    if config.status is None:
        return None
    binds = in_force.listeners.binds()
    plan = Plan(
        listeners=tuple(
            ListenerPlan(
                one.name,
                bind_text(binds[one.name]),
                one.protocol,
                directory.index(one.name),
            )
            for one in config.listeners
        ),
        rules=tuple(
            RulePlan(
                one.name,
                rule.name,
                report.goes_to(rule),
                rule.to if isinstance(rule.to, str) else None,
                directory.index(one.name, rule.name),
            )
            for one in config.listeners
            for rule in one.rules
        ),
        servers=tuple(
            ServerPlan(
                name,
                str(server.address),
                directory.server_index(name, str(server.address)),
                upstream.health is not None,
                server.weight,
                server.backup,
            )
            for name, upstream in config.upstreams.items()
            for server in upstream.servers
        ),
    )
    return PageSource(
        about=About(
            instance=instance,
            version=source.version,
            started_unix_s=source.started_unix_s,
            workers=source.workers,
            datapaths=source.datapaths,
            config=config,
            control=config.status.control,
        ),
        plan=plan,
        counters=source.counters,
        windows=source.windows,
        passwords=in_force.settings.passwords,
        health=tuple(HealthChange(at_s, *result) for at_s, result in results),
        down=frozenset((one.upstream, one.server) for one in down),
        unix_time_s=unix_time_s,
    )
