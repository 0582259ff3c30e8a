"""Obeys what is asked of a running daemon: over its control socket, by its files, by a signal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from pyforwarder import __version__
from pyforwarder.core.address import Address, AddressError, bind_text, parse_port
from pyforwarder.errors import ControlError, ForwarderError, InternalError, UsageError
from pyforwarder.runtime.descriptors import duplicate_socket
from pyforwarder.runtime.socket_options import cookie_of
from pyforwarder.supervisor.daemon_state import DaemonState
from pyforwarder.supervisor.requests import report
from pyforwarder.supervisor.workers.process import ask_all

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce, ConfigSource
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.files.view_and_proc import Files
    from pyforwarder.supervisor.fleet.failover_process import FailoverProcess
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.takeover.predecessor import Predecessor
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

# What a running daemon cannot change any more.
_FIXED: Final = ("workers", "user")


class Requests:
    """Obeys requests, one after the other."""

    def __init__(
        self,
        source: ConfigSource,
        in_force: ConfigInForce,
        memory: SharedMemory,
        datapaths: Datapaths,
        workers: WorkerPool,
        files: Files,
        *,
        loop: Loop,
        log: Log,
        fleet_rows: Callable[[], list[dict[str, Any]] | None],
        change_to: Callable[[str, Config], None],
        drain: Callable[[], None],
        stop: Callable[[], None],
        succeed: Callable[[list[int]], object],
        failover: Callable[[], FailoverProcess],
        checkers: Callable[[], Mapping[tuple[str, str], str]],
        lock: InstanceLock,
        predecessor: Callable[[], Predecessor | None] = lambda: None,
        state: Callable[[], DaemonState] = lambda: DaemonState.SERVING,
    ) -> None:
        """`fleet_rows` tells of the machines of the fleet, if there is one; `failover` moves its
        addresses, and `checkers` says who checks which server, by upstream and address.

        `change_to` puts a configuration in force; `drain` and `stop` end the daemon, and a command
        that asks for the end waits for `lock`. `succeed` lets a successor in; `predecessor` is the
        daemon whose place this one has taken, as long as that has pairs.
        """
        self._source = source
        self._in_force = in_force
        self._memory = memory
        self._datapaths = datapaths
        self._workers = workers
        self._files = files
        self._loop = loop
        self._log = log
        self._fleet_rows = fleet_rows
        self._change_to = change_to
        self._drain = drain
        self._stop = stop
        self._succeed = succeed
        self._failover = failover
        self._checkers = checkers
        self._lock = lock
        self._predecessor = predecessor
        self._state = state

    def obey(self, request: dict[str, Any], fds: list[int]) -> object:
        """Do what was asked; a fault of ours over it costs this request and no pair.

        Raises:
            ForwarderError: it cannot be done, or failed.
        """
        try:
            return self._do(request, fds)
        except ForwarderError:
            raise
        except Exception as error:
            self._log.fault("request_failed", error)
            raise InternalError(f"{type(error).__name__}: {error}") from error

    def _do(self, request: dict[str, Any], fds: list[int]) -> object:
        match request["do"]:
            case "ping":
                return {
                    "pid": os.getpid(),
                    "version": __version__,
                    "datapaths": self._datapaths.states,
                    "state": str(self._state()),
                    "standing": str(self._state()),  # as some builds of 0.2 ask for it
                }
            case "show":
                return self.show(request.get("what", "pairs"))
            case "config":
                return {
                    "text": self._in_force.settings.config_text,
                    "source": self._in_force.settings.source,
                }
            case "flush":
                return self._flush(request)
            case "reload":
                return self._reload()
            case "down":
                end = self._stop if request.get("now") else self._drain
                # Once this is answered.
                self._loop.defer(lambda _: end(), None)
                drain_s = self._in_force.config.timeouts.drain_s
                return {"drain_s": drain_s, "lock": self._lock.identity}
            case "forward":
                return self._forward(request)
            case "join":
                if len(fds) != 2:
                    raise UsageError("join wants two descriptors")
                return self._join(fds[0], fds[1])
            case "server":
                return self._drain_server(request)
            case "failover":
                return self._failover().state()
            case "take_addresses":
                return self._failover().take()
            case "give_addresses":
                return self._failover().give()
            case "listen_port":
                return self._listen_port(request)
            case "succeed":
                return self._succeed(fds)
            case unknown:
                raise UsageError(f"unknown request {unknown!r}")

    def show(self, what: object) -> object:
        """The rows (`stats`: the totals) of what was asked for, as `show --json` prints them.

        Raises:
            ForwarderError: there is no such thing, or it cannot be told just now.
        """
        match what:
            case "pairs":
                return self._pairs()
            case "listeners":
                return report.listener_rows(
                    self._in_force.config,
                    self._in_force.listeners.binds(),
                    self._memory.counters,
                    self._memory.directory,
                )
            case "rules":
                return report.rule_rows(
                    self._in_force.config,
                    self._memory.counters,
                    self._memory.directory,
                    self._workers.deciders,
                )
            case "upstreams":
                reports = ask_all(self._workers.living, "upstreams")
                return report.upstream_rows(
                    self._in_force.config, reports, self._workers.kernels_report, self._checkers()
                )
            case "fleet":
                rows = self._fleet_rows()
                if rows is None:
                    raise ControlError(
                        "this instance is in no fleet (`fleet` in its configuration)"
                    )
                return rows
            case "stats":
                return report.stats(
                    self._memory.counters, self._memory.table.windows, self._datapaths.states
                )
            case _:
                raise UsageError(f"cannot show {what!r}")

    def _pairs(self) -> object:
        """The rows of our pairs, and of those that the daemon before us lets end."""
        rows = report.pair_rows(self._memory.table.windows, self._files.backlogs())
        predecessor = self._predecessor()
        if predecessor is not None:
            own = {row["id"] for row in rows}
            reason = f"it ends with the daemon before (pid {predecessor.offer.pid})"
            rows += [
                {**row, "reason": reason} for row in predecessor.pairs() if row.get("id") not in own
            ]
        return rows

    def _flush(self, request: dict[str, Any]) -> object:
        ids = None
        if not request.get("all"):
            ids = request.get("ids")
            if not isinstance(ids, list) or not all(type(n) is int for n in ids):
                raise UsageError("flush wants a list of ids, or all")
        flushed = [n for found in ask_all(self._workers.living, "flush", ids=ids) for n in found]
        predecessor = self._predecessor()
        if predecessor is not None:
            flushed += predecessor.flush(ids)
        return {
            "flushed": sorted(flushed),
            "unknown": sorted(set(ids or ()) - set(flushed)),
        }

    def _forward(self, request: dict[str, Any]) -> object:
        """Take two sockets out of another process (pidfd_getfd(2)) and join them."""
        pid, numbers = request.get("pid"), request.get("fds")
        if (
            not _is_number(pid)
            or not isinstance(numbers, list)
            or len(numbers) != 2
            or not all(map(_is_number, numbers))
        ):
            raise UsageError("forward wants a process and two of its descriptors")
        from pyforwarder.runtime.pidfd import fetch_descriptors

        fds = fetch_descriptors(pid, numbers)
        try:
            return self._join(fds[0], fds[1])
        finally:
            for fd in fds:
                os.close(fd)

    def _join(self, client_fd: int, server_fd: int) -> object:
        living = self._workers.living
        if not living:
            raise ControlError("no worker is running just now")
        # Two pairs on one socket would tear its bytes apart, and each worker knows only its own.
        cookies = []
        for fd in (client_fd, server_fd):
            try:
                with duplicate_socket(fd) as sock:
                    cookies.append(cookie_of(sock))
            except OSError as error:
                raise ControlError(f"cannot join: {error.strerror}") from error
        for owner in ask_all(living, "pair_with", cookies=cookies):
            if owner is not None:
                raise ControlError(f"cannot join: pair {owner} has that socket already")
        worker = living[client_fd % len(living)]
        return {"id": worker.ask("join", [client_fd, server_fd])}

    def _listen_port(self, request: dict[str, Any]) -> object:
        """Move the first TCP listener to another port; live pairs are not touched."""
        binds = self._in_force.listeners.binds()
        name, bind = next(
            (
                (listener.name, bind)
                for listener in self._in_force.config.listeners
                if listener.protocol == "tcp"
                for bind in binds.get(listener.name, ())
                if isinstance(bind, Address)
            ),
            ("", None),
        )
        if bind is None:
            raise ControlError("there is no TCP listener")
        if "port" not in request:
            return {"port": bind.port}
        if not self._in_force.config.can_move(name):
            raise ControlError(
                f"the listener {name!r} does not bind one address that could be moved: change its "
                "`bind` and reload"
            )
        try:
            port = parse_port(str(request["port"]))
        except AddressError as error:
            raise UsageError(str(error)) from error
        with self._source.moving(name, port):
            # Nothing else changes: what is in the file by now waits for a `reload`.
            text = self._in_force.settings.config_text
            self._change_to(text, self._source.parse(text))
        moved = self._in_force.listeners.binds()[name]
        assert isinstance(moved[0], Address)
        self._log.write("info", "listener_moved", listener=name, bind=bind_text(moved))
        return {"port": moved[0].port}

    def _drain_server(self, request: dict[str, Any]) -> object:
        """Let one server of an upstream take no new pairs, or new ones again."""
        server, state = request.get("server"), request.get("state")
        if not isinstance(server, str):
            raise UsageError("server wants UPSTREAM/SERVER")
        if state not in ("drain", "ready"):
            raise UsageError("a server is told to `drain` or to be `ready`")
        weight = self._in_force.drain(server, drained=state == "drain")
        self._workers.configure()
        self._log.write("info", f"server_{state}", server=server)
        return {"server": server, "state": state, "weight": weight}

    def _reload(self) -> object:
        """Read the configuration again and put it in force; an error changes nothing."""
        before = self._in_force.config
        try:
            own = self._source.read_own()
            text, config = self._source.joined(own, self._source.shared)
            self._change_to(text, config)
            self._source.own = own
        except ForwarderError as error:
            self._log.write("error", "reload_refused", error=str(error))
            raise
        waiting = [
            key for key in _FIXED if getattr(before, key) != getattr(self._in_force.config, key)
        ]
        if self._datapaths.lacks(self._in_force.config):
            waiting.append("datapath")
        count = len(self._in_force.config.listeners)
        self._log.write("info", "reloaded", listeners=count, config=self._source.name)
        for warning in self._source.warnings(text, config):
            self._log.write("warning", "config", reason=warning)
        if waiting:
            self._log.write("warning", "restart_needed", keys=",".join(waiting))
        return {"listeners": count, "waiting": waiting}


def _is_number(value: object) -> TypeGuard[int]:
    """Whether this can be the number of a process or a descriptor; True and False are instances of
    int, too.
    """
    return type(value) is int and 0 <= value < 2**31
