"""The process that checks servers: forked, unprivileged, reaching what a worker reaches."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pyforwarder.health import Checker, Verdict
from pyforwarder.loop import EPOLLIN, Loop
from pyforwarder.worker.channel import Channel
from pyforwarder.worker.process import give_up_privileges

if TYPE_CHECKING:
    from pyforwarder.config import Upstream


class CheckerProcess:
    """One process after the other: after a reload, and after a death.

    Remembers which servers are down, for workers that are started later.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        tell: Callable[[Verdict], None],
    ) -> None:
        """`tell` is called in this process with every change."""
        self._loop = loop
        self._user = user
        self._close_in_child = close_in_child
        self._tell = tell
        self._upstreams: Mapping[str, Upstream] = {}
        self._channel: Channel | None = None
        self._pid = 0
        self._down: dict[tuple[str, str], Verdict] = {}

    @property
    def down(self) -> list[Verdict]:
        """The servers that must get no pair just now."""
        return list(self._down.values())

    def change_to(self, upstreams: Mapping[str, Upstream]) -> None:
        """Check these from now on; servers that are checked no more count as up."""
        self._kill()
        self._upstreams = upstreams
        checked = {
            (name, str(server.address))
            for name, upstream in upstreams.items()
            if upstream.health is not None
            for server in upstream.servers
        }
        for key in [key for key in self._down if key not in checked]:
            del self._down[key]
            self._tell(Verdict(*key, up=True, why="checked no more"))
        self.start()

    def start(self) -> None:
        """Start a process, if there is something to check and none runs."""
        if self._pid or all(upstream.health is None for upstream in self._upstreams.values()):
            return
        ours, theirs = Channel.pair()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                code = self._child(theirs)
            finally:
                os._exit(code)
        theirs.close()
        self._pid = pid
        self._channel = ours
        self._loop.watch(ours.fileno(), EPOLLIN, self._hear, self)

    def has_died(self) -> bool:
        """Whether it has ended by itself since the last call; reaps it."""
        if not self._pid:
            return False
        pid, _ = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return False
        self._pid = 0
        self._hang_up()
        return True

    def close_channel(self) -> None:
        """In another child: it hears no verdicts."""
        if self._channel is not None:
            self._channel.close()

    def close(self) -> None:
        """End the process; the servers stay what they are."""
        self._kill()

    def _hear(self, _owner: object, fd: int, _mask: int) -> None:
        assert self._channel is not None
        try:
            received = self._channel.receive()
        except BlockingIOError:
            return
        except OSError:
            received = None
        if received is None:
            self._loop.forget(fd)  # SIGCHLD does the rest
            return
        message, fds = received
        for stray in fds:
            os.close(stray)
        verdict = Verdict(**message)
        key = (verdict.upstream, verdict.server)
        was_down = key in self._down
        if verdict.up:
            self._down.pop(key, None)
        else:
            self._down[key] = verdict
        if was_down == verdict.up:
            self._tell(verdict)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._loop.forget(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _kill(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        self._hang_up()

    def _child(self, channel: Channel) -> int:
        try:
            supervisor = os.getppid()
            self._close_in_child()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # A terminal's Ctrl-C reaches the whole group; the supervisor decides.
                signal.signal(number, signal.SIG_IGN)
            give_up_privileges(self._user)
            if os.getppid() == supervisor:
                loop = Loop()
                Checker(loop, self._upstreams, lambda verdict: channel.send(verdict._asdict()))
                loop.run()
        except BrokenPipeError:
            return 0  # the supervisor is gone
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return 1
        return 0
