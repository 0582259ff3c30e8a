"""The process that Prometheus asks: forked, unprivileged, reading what the workers count.

It has a process of its own so that an answer, however long, never holds the supervisor up, and
so that nothing which reads HTTP has any privilege.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.address import Address
from pyforwarder.errors import ForwarderError
from pyforwarder.worker.process import give_up_privileges

if TYPE_CHECKING:
    from pyforwarder.metrics import Source
    from pyforwarder.supervisor.configuration import InForce
    from pyforwarder.supervisor.memory import SharedMemory

_BACKLOG: Final = 128


class MetricsListener:
    """The listening socket, which outlives the processes that serve it."""

    def __init__(self, wanted: Address) -> None:
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
            raise ForwarderError(f"metrics: cannot listen on {wanted}: {error.strerror}") from error
        host, port = self.sock.getsockname()[:2]
        self.bind = Address(host, port)  # port 0 resolved

    def close(self) -> None:
        """Close it."""
        self.sock.close()


class MetricsProcess:
    """One process after the other: after a reload, and after a death."""

    def __init__(
        self, source: Callable[[], Source], *, user: str | None, close_in_child: Callable[[], None]
    ) -> None:
        """`source` is called in the child, before `close_in_child`."""
        self._source = source
        self._user = user
        self._close_in_child = close_in_child
        self.listener: MetricsListener | None = None
        self._pid = 0

    def change_to(self, wanted: Address | None) -> MetricsListener | None:
        """Bind what is wanted, unless it is bound; nothing changes before `commit`.

        Raises:
            ForwarderError: it cannot be bound.
        """
        if wanted is None:
            return None
        if self.listener is not None and self.listener.wanted == wanted:
            return self.listener
        return MetricsListener(wanted)

    def abandon(self, following: MetricsListener | None) -> None:
        """The change does not come."""
        if following is not None and following is not self.listener:
            following.close()

    def commit(self, following: MetricsListener | None) -> None:
        """Serve there from now on, and tell of the configuration in force."""
        self._kill()
        if self.listener is not None and self.listener is not following:
            self.listener.close()
        self.listener = following
        self.start()

    def start(self) -> None:
        """Start a process, if one is wanted and none runs."""
        if self.listener is None or self._pid:
            return
        sock = self.listener.sock
        pid = os.fork()
        if pid:
            self._pid = pid
            return
        code = 1
        try:
            code = self._child(sock)
        finally:
            os._exit(code)

    def has_died(self) -> bool:
        """Whether it has ended by itself since the last call; reaps it."""
        if not self._pid:
            return False
        pid, _ = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return False
        self._pid = 0
        return True

    def close_socket(self) -> None:
        """In another child: it does not listen here."""
        if self.listener is not None:
            self.listener.close()

    def close(self) -> None:
        """End the process and stop listening."""
        self._kill()
        self.close_socket()
        self.listener = None

    def _kill(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _child(self, sock: socket.socket) -> int:
        try:
            supervisor = os.getppid()
            source = self._source()
            self._close_in_child()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # A terminal's Ctrl-C reaches the whole group; the supervisor decides.
                signal.signal(number, signal.SIG_IGN)
            give_up_privileges(self._user)
            if os.getppid() == supervisor:
                from pyforwarder.metrics import serve

                serve(sock, source)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return 1
        return 0


def source_in_child(
    in_force: InForce,
    memory: SharedMemory,
    datapaths: Mapping[str, str],
    *,
    started_unix_s: float,
) -> Source:
    """In the metrics process: what it tells, from memory that it cannot write."""
    from pyforwarder.metrics import Source

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
        datapaths=datapaths,
    )
