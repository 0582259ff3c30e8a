"""A running daemon lets another one take its place (messages.py), and ends with its pairs.

Everything that can fail comes before the first change. From then on this one accepts no new client:
it has given away its listeners, its files and its name, keeps the pairs that its workers could not
hand over, and ends when they have ended, or at the drain's deadline. Where its successor cannot
read the records of spliced pairs, these stay, too, with their keeper, maps and programs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.core.datapaths import OUTLIVING
from pyforwarder.datapath.attach import unix_names
from pyforwarder.datapath.splice.abi import HANDSHAKES_FORM
from pyforwarder.errors import ControlError
from pyforwarder.runtime.descriptors import duplicate_socket
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.daemon_state import DaemonState
from pyforwarder.supervisor.requests import report
from pyforwarder.supervisor.takeover.messages import (
    ENVIRON,
    PROTOCOL,
    SUCCESSOR_TIMEOUT_S,
    Ask,
    network_namespace,
    parts_of,
)
from pyforwarder.supervisor.takeover.successor import Successor
from pyforwarder.supervisor.workers.process import ask_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce, ConfigSource
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.files.view_and_proc import Files
    from pyforwarder.supervisor.listeners.activation import Activation
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.supervisor.processes.web_process import WebProcess
    from pyforwarder.supervisor.requests.control_socket import ControlServer
    from pyforwarder.supervisor.takeover.predecessor import Predecessor
    from pyforwarder.supervisor.workers.pool import WorkerPool
    from pyforwarder.worker.log import Log

# How long workers have to release what the kernel forwards, and how often they are asked.
_RELEASE_S: Final = 3.0
# The same where these stay: servers that were asked by the kernel have so long to answer. Before
# the successor's programs see packets, as these could open the same connection.
_SETTLE_S: Final = 6.0
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class RetiringDaemon:
    """What a daemon has, and what it does of its own."""

    options: UpOptions
    source: ConfigSource
    in_force: ConfigInForce
    activation: Activation
    memory: SharedMemory
    datapaths: Datapaths
    workers: WorkerPool
    files: Files
    web: WebProcess
    end_helpers: Callable[[], None]  # the processes that are of no use without the rest
    forget_held: Callable[[], None]  # other machines' pairs, of which the successor knows
    predecessor: Callable[
        [], Predecessor | None
    ]  # whose place it has taken, as long as that has pairs
    tokens_free_at_s: Callable[[], list[float]]  # as `OfferedTokens` has it
    down: Callable[[], Sequence[HealthResult]]  # servers that must get no pair just now
    lock: InstanceLock
    control: Callable[[], ControlServer]
    loop: Loop
    log: Log
    environ: Mapping[str, str]
    notify: Callable[[str], None]
    state: Callable[[], DaemonState]
    why_not: Callable[[], str]  # why no successor can take its place now; empty: one can
    end_if_done: Callable[[], None]  # whether there is anything left to end for
    retired: Callable[[], None]  # called once it accepts no new client
    stop: Callable[[], None]  # reset what is left and end


class Retirement:
    """Offers what the daemon has, and releases it when a successor says so."""

    def __init__(self, daemon: RetiringDaemon) -> None:
        self._daemon = daemon
        self._successor: Successor | None = None
        self._timer = 0
        self.is_retired = False
        self._keeps_spliced = False
        self._is_released = False

    @property
    def is_under_way(self) -> bool:
        """Whether a successor gets ready to take our place: until then we stay."""
        successor = self._successor
        return successor is not None and not successor.is_over and not self.is_retired

    @property
    def has_given_spliced(self) -> bool:
        """Whether what is spliced is the successor's."""
        return self.is_retired and not self._keeps_spliced

    def refuse(self) -> None:
        """We were told to end: who gets ready to take our place does not get it."""
        if self.is_under_way and self._successor is not None:
            self._successor.send_ending()
            self._successor.close()
            self._gone()

    def fds(self) -> list[int]:
        """What a child must not keep."""
        return self._successor.fds() if self._successor is not None else []

    def admit(self, fds: Sequence[int]) -> object:
        """Somebody wants to take our place and has sent where to speak to it.

        Raises:
            ControlError: not now, or not this one.
        """
        if len(fds) != 1:
            raise ControlError("a successor sends one descriptor")
        reason = self._daemon.why_not()
        if self._successor is not None and not self._successor.is_over:
            reason = "another upgrade is under way"
        if reason:
            raise ControlError(reason)
        try:
            sock = duplicate_socket(fds[0])
        except OSError as error:
            raise ControlError(f"a successor sends a socket: {error.strerror}") from error
        self._successor = successor = Successor(self._daemon.loop, sock, self._obey, self._gone)
        self._timer = self._daemon.loop.after(
            scaled_s(SUCCESSOR_TIMEOUT_S), lambda: self._give_up(successor)
        )
        return {"pid": os.getpid(), "version": __version__}

    def _give_up(self, successor: Successor) -> None:
        if not self.is_retired and not successor.is_over:
            self._daemon.log.write("error", "upgrade_refused", error="it took too long")
            successor.close()
            self._daemon.end_if_done()

    def _gone(self) -> None:
        self._daemon.loop.cancel(self._timer)
        if not self.is_retired:
            self._daemon.log.write("warning", "upgrade_failed", consequence="nothing has changed")
            self._daemon.end_if_done()

    def _obey(self, asked: Ask, fds: list[int]) -> tuple[dict[str, object], Sequence[int]]:
        match asked.do:
            case "offer":
                return self._offer(asked)
            case "last_id":
                return {
                    "last_id": self._daemon.workers.last_id(),
                    "keeper": self._daemon.datapaths.keeper_pid,
                }, ()
            case "take":
                self._retire(asked.serial, fds, keeps_spliced=asked.keeps_spliced)
                # From now on one that ends has no successor of ours.
                return {"keeper": self._daemon.datapaths.keeper_pid}, ()
            case "pairs":
                return {"pairs": self._rows()}, ()
            case "flush":
                found = ask_all(self._daemon.workers.living, "flush", ids=asked.ids)
                predecessor = self._daemon.predecessor()
                if predecessor is not None:
                    found.append(predecessor.flush(asked.ids))
                return {"flushed": [n for some in found for n in some]}, ()
            case "end":
                if not self.is_retired:
                    raise ControlError("nobody has taken its place")
                if asked.now:
                    self._daemon.loop.defer(lambda _: self._daemon.stop(), None)
                return {}, ()

    def _offer(self, asked: Ask) -> tuple[dict[str, object], Sequence[int]]:
        daemon = self._daemon
        config_path = daemon.options.config_path
        marks = unix_names.held()
        # Of another form it would be written, and read, beyond its end.
        knows_handshakes = asked.handshakes == HANDSHAKES_FORM
        handshakes_fd = daemon.datapaths.handshakes_fd if knows_handshakes else -1
        activation = daemon.activation.all()
        bound = [
            (name, each)
            for name, all_of in daemon.in_force.listeners.bound.items()
            for each in all_of
        ]
        web = list(daemon.web.listening.items())
        offer: dict[str, object] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "pid": os.getpid(),
            "config_path": None if config_path is None else daemon.source.name_from_anywhere,
            "overrides": dict(daemon.source.overrides),
            "detach": daemon.options.detach,
            "is_draining": daemon.state() is DaemonState.DRAINING,
            "verbosity": min(daemon.options.verbosity, 9),
            "workers": daemon.memory.workers,
            "last_id": daemon.workers.last_id(),
            "serial": daemon.in_force.changes,
            "drained": sorted(map(list, daemon.in_force.drained)),
            "environ": {key: daemon.environ[key] for key in ENVIRON if key in daemon.environ},
            "splice": daemon.datapaths.splice_state,
            "splice_map": daemon.datapaths.splice_map_id,
            "splice_pins": daemon.datapaths.splice_directory,
            "keeps_spliced": True,
            "keeper": daemon.datapaths.keeper_pid,
            "network": network_namespace(),
            "has_handshakes": handshakes_fd >= 0,
            "used_tokens": {"share": daemon.memory.share, "free_at_s": daemon.tokens_free_at_s()},
            "down": [
                {"upstream": one.upstream, "server": one.server, "why": one.why}
                for one in daemon.down()
            ],
            "marks": list(marks),
            "web": [{"key": key, "wanted": parts_of(one.wanted)} for key, one in web],
            "activation": [name for name, _ in activation],
            "places": [
                {
                    "listener": name,
                    "wanted": parts_of(each.wanted),
                    "bind": parts_of(each.bind),
                    "protocol": each.protocol,
                    "sockets": len(each.sockets),
                    "is_ours": each.is_ours,
                    "mode": each.mode,
                    "freebind": each.freebind,
                }
                for name, each in bound
            ],
        }
        fds = [daemon.control().listener.fileno(), daemon.lock.fileno(), 1, 2]
        fds += [handshakes_fd] if handshakes_fd >= 0 else []
        fds += daemon.memory.used_tokens.fds
        fds += marks.values()
        fds += [one.sock.fileno() for _, one in web]
        fds += [sock.fileno() for _, sock in activation]
        fds += [sock.fileno() for _, each in bound for sock in each.sockets]
        return offer, fds

    def _retire(self, serial: int, to_successors: Sequence[int], *, keeps_spliced: bool) -> None:
        """Accept no new client from here on.

        Raises:
            ControlError: nothing has changed.
        """
        daemon, successor = self._daemon, self._successor
        assert successor is not None
        if reason := daemon.why_not():
            raise ControlError(reason)
        if serial != daemon.in_force.changes:
            raise ControlError("its configuration has changed meanwhile")
        if len(to_successors) != daemon.memory.workers:
            raise ControlError("there must be as many workers as it has")
        if successor.has_ended():
            raise ControlError("its successor has ended since it asked")
        # From here on nothing stops it.
        has_own_lock = daemon.state() is DaemonState.DRAINING
        self.is_retired = True
        self._keeps_spliced = keeps_spliced
        daemon.retired()
        daemon.datapaths.look_for_left(looks=False)  # its successor does
        daemon.log.write("info", "retired", successor=successor.pid)
        # Before its workers release any pair: these have ended with us, and will not be ours.
        daemon.in_force.listeners.share(shared=True)
        daemon.in_force.listeners.close()
        daemon.workers.retire(to_successors, keeps_spliced=keeps_spliced)
        daemon.end_helpers()
        daemon.files.close_proc()
        daemon.files.release()
        daemon.control().release()
        if not has_own_lock:  # its successor has another, and `down` waits for us
            daemon.lock.close()
        daemon.notify(f"MAINPID={successor.pid}")
        daemon.loop.after(daemon.in_force.config.timeouts.drain_s, daemon.stop)
        until_s = time.monotonic() + scaled_s(_SETTLE_S if keeps_spliced else _RELEASE_S)
        daemon.loop.after(0.0, lambda: self._poll_release(until_s))
        daemon.loop.after(0.0, daemon.end_if_done)  # all pairs may have ended before

    def _poll_release(self, until_s: float) -> None:
        try:
            left = self._daemon.workers.spliced_left()
        except ControlError:
            left = 1
        if self._keeps_spliced:
            left += not self._daemon.workers.has_stopped_deciding
        if left and time.monotonic() < until_s:
            self._daemon.loop.after(_POLL_S, lambda: self._poll_release(until_s))
            return
        self._release()

    def _release(self) -> None:
        """What is spliced is the successor's from here on, or stays; only once."""
        if self._is_released:
            return
        self._is_released = True
        stay = 0
        if self._keeps_spliced:
            # Not before: until its own keeper begins, the successor knows none of them, and the
            # kernel would reset those whose addresses come to this machine meanwhile.
            self._daemon.forget_held()
            stay = len(self._spliced_rows())
            if stay:
                self._daemon.log.write("warning", "splice_stays", pairs=stay)
        else:
            self._daemon.datapaths.release()
        if self._successor is not None:
            self._successor.send_released(stay=stay)

    def _spliced_rows(self) -> list[report.Row]:
        rows = report.pair_rows(self._daemon.memory.table.windows, report.Backlogs({}))
        return [row for row in rows if row["datapath"] in OUTLIVING]

    def _rows(self) -> list[report.Row]:
        """The pairs that have stayed here."""
        rows = report.pair_rows(self._daemon.memory.table.windows, report.Backlogs({}))
        if not self._keeps_spliced:
            rows = [row for row in rows if row["datapath"] not in OUTLIVING]
        predecessor = self._daemon.predecessor()
        return rows if predecessor is None else rows + predecessor.pairs()

    def close(self) -> None:
        """Hang up: a successor that has not taken our place is told so.

        Before the datapaths are closed: what is spliced is not ours to end.
        """
        if self.is_retired:
            self._release()
        if self._successor is not None:
            self._successor.close()
