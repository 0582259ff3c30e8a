"""A running daemon lets another one take its place (succession.py), and ends with its pairs.

Everything that can fail comes before the first change. From then on this one serves nobody new: it
has given away its listeners, its files and its name, keeps the pairs that its workers could not
hand over, and ends when they have ended, or at the drain's deadline.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.datapath.attach import unix_names
from pyforwarder.errors import ControlError
from pyforwarder.runtime.descriptors import duplicate_socket
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor import report
from pyforwarder.supervisor.succession import (
    ENVIRON,
    PROTOCOL,
    SUCCESSOR_TIMEOUT_S,
    Ask,
    Successor,
    network_namespace,
    parts_of,
)
from pyforwarder.supervisor.workers import ask_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyforwarder.runtime.instance import InstanceLock
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor import UpOptions
    from pyforwarder.supervisor.activation import Activation
    from pyforwarder.supervisor.configuration import ConfigInForce, ConfigSource
    from pyforwarder.supervisor.control import ControlServer
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.files import Files
    from pyforwarder.supervisor.health import Verdict
    from pyforwarder.supervisor.memory import SharedMemory
    from pyforwarder.supervisor.scraping import WebProcess
    from pyforwarder.supervisor.succession import Predecessor
    from pyforwarder.supervisor.worker_pool import WorkerPool
    from pyforwarder.worker.log import Log

# How long workers have to let go of what the kernel forwards, and how often they are asked.
_RELEASE_S: Final = 3.0
_LOOK_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Belongings:
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
    end_helpers: Callable[[], None]  # those processes that serve nobody without the rest
    elder: Callable[[], Predecessor | None]  # whose place it has taken, as long as that has pairs
    tokens_free_at_s: Callable[[], list[float]]  # as `TokensSaid` has it
    down: Callable[[], Sequence[Verdict]]  # servers that must get no pair just now
    lock: InstanceLock
    control: Callable[[], ControlServer]
    loop: Loop
    log: Log
    environ: Mapping[str, str]
    notify: Callable[[str], None]
    why_not: Callable[[], str]  # why nobody can take its place now; empty: somebody can
    retired: Callable[[], None]  # called once it serves nobody new
    stop: Callable[[], None]  # reset what is left and end


class Retirement:
    """Offers what the daemon has, and lets go of it when a successor says so."""

    def __init__(self, belongings: Belongings) -> None:
        self._of = belongings
        self._successor: Successor | None = None
        self._timer = 0
        self.is_retired = False
        self._is_released = False

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
        reason = self._of.why_not()
        if self._successor is not None and not self._successor.is_over:
            reason = "another upgrade is under way"
        if reason:
            raise ControlError(reason)
        try:
            sock = duplicate_socket(fds[0])
        except OSError as error:
            raise ControlError(f"a successor sends a socket: {error.strerror}") from error
        self._successor = successor = Successor(self._of.loop, sock, self._obey, self._gone)
        self._timer = self._of.loop.after(
            scaled_s(SUCCESSOR_TIMEOUT_S), lambda: self._give_up(successor)
        )
        return {"pid": os.getpid(), "version": __version__}

    def _give_up(self, successor: Successor) -> None:
        if not self.is_retired and not successor.is_over:
            self._of.log.write("error", "upgrade_refused", error="it took too long")
            successor.close()

    def _gone(self) -> None:
        self._of.loop.cancel(self._timer)
        if not self.is_retired:
            self._of.log.write("warning", "upgrade_failed", consequence="nothing has changed")

    def _obey(self, asked: Ask, fds: list[int]) -> tuple[dict[str, object], Sequence[int]]:
        match asked.do:
            case "offer":
                return self._offer()
            case "last_id":
                return {
                    "last_id": self._of.workers.last_id(),
                    "keeper": self._of.datapaths.keeper_pid,
                }, ()
            case "take":
                self._retire(asked.serial, fds)
                # From now on one that ends has no successor of ours.
                return {"keeper": self._of.datapaths.keeper_pid}, ()
            case "pairs":
                return {"pairs": self._rows()}, ()
            case "flush":
                found = ask_all(self._of.workers.living, "flush", ids=asked.ids)
                elder = self._of.elder()
                if elder is not None:
                    found.append(elder.flush(asked.ids))
                return {"flushed": [n for some in found for n in some]}, ()
            case "end":
                if not self.is_retired:
                    raise ControlError("nobody has taken its place")
                if asked.now:
                    self._of.loop.defer(lambda _: self._of.stop(), None)
                return {}, ()

    def _offer(self) -> tuple[dict[str, object], Sequence[int]]:
        of = self._of
        config_path = of.options.config_path
        marks = unix_names.held()
        handshakes_fd = of.datapaths.handshakes_fd
        activation = of.activation.all()
        bound = [
            (name, each) for name, all_of in of.in_force.listeners.bound.items() for each in all_of
        ]
        web = list(of.web.listening.items())
        offer: dict[str, object] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "pid": os.getpid(),
            "config_path": None if config_path is None else of.source.name_from_anywhere,
            "overrides": dict(of.source.overrides),
            "detach": of.options.detach,
            "verbosity": min(of.options.verbosity, 9),
            "workers": of.memory.workers,
            "last_id": of.workers.last_id(),
            "serial": of.in_force.changes,
            "drained": sorted(map(list, of.in_force.drained)),
            "environ": {key: of.environ[key] for key in ENVIRON if key in of.environ},
            "splice": of.datapaths.splice_standing,
            "splice_map": of.datapaths.splice_map_id,
            "keeper": of.datapaths.keeper_pid,
            "network": network_namespace(),
            "has_handshakes": handshakes_fd >= 0,
            "used_tokens": {"share": of.memory.share, "free_at_s": of.tokens_free_at_s()},
            "down": [
                {"upstream": one.upstream, "server": one.server, "why": one.why}
                for one in of.down()
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
        fds = [of.control().listener.fileno(), of.lock.fileno(), 1, 2]
        fds += [handshakes_fd] if handshakes_fd >= 0 else []
        fds += of.memory.used_tokens.fds
        fds += marks.values()
        fds += [one.sock.fileno() for _, one in web]
        fds += [sock.fileno() for _, sock in activation]
        fds += [sock.fileno() for _, each in bound for sock in each.sockets]
        return offer, fds

    def _retire(self, serial: int, heirs: Sequence[int]) -> None:
        """Serve nobody new from here on.

        Raises:
            ControlError: nothing has changed.
        """
        of, successor = self._of, self._successor
        assert successor is not None
        if reason := of.why_not():
            raise ControlError(reason)
        if serial != of.in_force.changes:
            raise ControlError("its configuration has changed meanwhile")
        if len(heirs) != of.memory.workers:
            raise ControlError("there must be as many workers as it has")
        if successor.has_ended():
            raise ControlError("its successor has ended since it asked")
        # From here on nothing stops it.
        self.is_retired = True
        of.retired()
        of.log.write("info", "retired", successor=successor.pid)
        # Before its workers let go of any pair: these have ended with us, and will not be ours.
        of.in_force.listeners.share(shared=True)
        of.in_force.listeners.close()
        of.workers.retire(heirs)
        of.end_helpers()
        of.files.close_proc()
        of.files.let_go()
        of.control().let_go()
        of.lock.close()
        of.notify(f"MAINPID={successor.pid}")
        of.loop.after(of.in_force.config.timeouts.drain_s, of.stop)
        until_s = time.monotonic() + scaled_s(_RELEASE_S)
        of.loop.after(0.0, lambda: self._look_for_release(until_s))

    def _look_for_release(self, until_s: float) -> None:
        try:
            left = self._of.workers.spliced_left()
        except ControlError:
            left = 1
        if left and time.monotonic() < until_s:
            self._of.loop.after(_LOOK_S, lambda: self._look_for_release(until_s))
            return
        self._release()

    def _release(self) -> None:
        """What is spliced is the successor's from here on; nothing happens the second time."""
        if not self._is_released:
            self._is_released = True
            self._of.datapaths.release()
            if self._successor is not None:
                self._successor.say_released()

    def _rows(self) -> list[report.Row]:
        """The pairs that have stayed here."""
        rows = report.pair_rows(self._of.memory.table.windows, report.Backlogs({}))
        rows = [row for row in rows if row["datapath"] != "splice"]
        elder = self._of.elder()
        return rows if elder is None else rows + elder.pairs()

    def close(self) -> None:
        """Hang up: a successor that has not taken our place is told so.

        Before the datapaths are closed: what is spliced is not ours to end.
        """
        if self.is_retired:
            self._release()
        if self._successor is not None:
            self._successor.close()
