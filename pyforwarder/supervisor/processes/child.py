"""A process without privileges that the supervisor keeps: it reads what strangers send.

Health checks, the web process and the one that speaks to a fleet's store are such; what each of
them does is in a module of its own. Here is what they have in common: one is started after the
other, it has a channel and nothing else of ours, and one that says what it may not say is replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.children import fork, keep_only
from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.privileges import give_up_privileges
from pyforwarder.runtime.seccomp import confine
from pyforwarder.runtime.shared_memory import keep_memory
from pyforwarder.runtime.tables import visible
from pyforwarder.supervisor.messages import MOST_BYTES, Messages, understand

if TYPE_CHECKING:
    import mmap

    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.log import Log

Understood = TypeVar("Understood")

# A process that has died is replaced after the first of these pauses. One that fails as soon as it
# begins will do so again, because of a file for example: each time the pause doubles.
_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_SOON_S: Final = 5.0
# How many characters are logged of what a process did wrong; it may have chosen them.
_MOST_SHOWN: Final = 200


class Serving(NamedTuple):
    """What the process does, with which descriptors beside its channel, and shared memory."""

    run: Callable[[], object]
    fds: Sequence[int] = ()
    memory: Sequence[mmap.mmap] = ()  # that it may write


class ChildProcess(ABC, Generic[Understood]):
    """Keeps one process running: another one is started after a change, and after the death of the
    last.
    """

    name: str  # in the log: NAME_fault
    may_say: Messages  # the only messages that are taken from it: those of `Understood`
    pause_s: float = 0.0  # after each message others come first, for so long

    def __init__(
        self, loop: Loop, log: Log, *, user: str | None, close_in_child: Callable[[], None]
    ) -> None:
        """Start no process yet. `close_in_child` closes in it what is the supervisor's alone."""
        self._loop = loop
        self._log = log
        self._user = user
        self._close_in_child = close_in_child
        self._channel: Channel | None = None
        self._pid = 0
        self._started_s = 0.0
        self._failures = 0  # in a row, each soon after its start

    # What each kind says of itself

    @property
    @abstractmethod
    def _is_wanted(self) -> bool:
        """Whether there is something for it to do."""

    @abstractmethod
    def _prepare(self, channel: Channel) -> Serving:
        """Read files and import modules that the process will need; called in the process, as the
        supervisor's user.

        The supervisor's own descriptors are closed by then.
        """

    def _understand(self, message: dict[str, Any], fds: Sequence[int]) -> Understood:
        """What a message says; what this raises is the process's fault, and it is replaced."""
        return cast("Understood", understand(message, fds, self.may_say))

    @abstractmethod
    def _handle(self, message: Understood) -> None:
        """Do what follows from it."""

    # What the supervisor does with it

    def start(self) -> None:
        """Start a process, if one is wanted and none runs."""
        if self._pid or not self._is_wanted:
            return
        ours, theirs = Channel.pair()

        def child() -> int:
            ours.close()
            return self._child(theirs)

        self._started_s = time.monotonic()
        self._pid = fork(child)
        theirs.close()
        self._channel = ours
        self._loop.watch(ours.fileno(), EPOLLIN, self._receive, self)

    def renew(self) -> None:
        """Another process in the place of one that knows of things as they were."""
        self._kill()
        self._failures = 0
        self.start()

    def has_died(self) -> bool:
        """Whether the process has ended by itself since the last call; reaps it."""
        if not self._pid:
            return False
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return False
        self._pid = 0
        self._hang_up()
        # One that was killed has not failed.
        has_failed = os.WIFEXITED(status) and time.monotonic() - self._started_s < _SOON_S
        self._failures = self._failures + 1 if has_failed else 0
        return True

    @property
    def rest_s(self) -> float:
        """How long to wait before another one is started in the place of one that has died."""
        return min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** max(0, min(self._failures, 16) - 1))

    def close_channel(self) -> None:
        """Close this end of the channel, in another child of the supervisor."""
        if self._channel is not None:
            self._channel.close()

    def close(self) -> None:
        """End the process."""
        self._kill()

    def _send(self, message: Mapping[str, object]) -> None:
        """Send the process a message; one that does not read just now misses it."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(message, wait=False)

    def _receive(self, _owner: object, fd: int, _mask: int) -> None:
        channel = self._channel
        assert channel is not None
        try:
            received = channel.receive(most_bytes=MOST_BYTES)
            if received is not None:
                message, fds = received
                close_given(fds)
                understood = self._understand(message, fds)
        except BlockingIOError:
            return
        except ConnectionResetError:
            received = None
        except Exception as error:
            self._log.write("error", f"{self.name}_fault", error=str(error)[:_MOST_SHOWN])
            received = None
        if received is None:
            self._loop.forget(fd)
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)  # SIGCHLD does the rest
            return
        if self.pause_s:
            self._loop.forget(fd)
            self._loop.after(self.pause_s, lambda: self._receive_again(channel))
        self._handle(understood)

    def _receive_again(self, channel: Channel) -> None:
        if channel is self._channel:
            self._loop.watch(channel.fileno(), EPOLLIN, self._receive, self)

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
            # First: on a busy machine imports take seconds, in which a port that the supervisor
            # closes would still be bound.
            self._close_in_child()
            serving = self._prepare(channel)
            give_up_privileges(self._user)
            keep_memory(serving.memory)
            keep_only([channel.fileno(), *serving.fds])
            confine()  # of a kernel that has no filters the workers send
            if os.getppid() == supervisor:
                serving.run()
        except (EOFError, BrokenPipeError):
            return 0  # the supervisor is gone
        except ForwarderError as error:
            # What an operator has to mend, and no fault of ours.
            self._log.write("error", f"{self.name}_failed", error=str(error))
            return 1
        except Exception:
            sys.stderr.write(visible(traceback.format_exc()))
            return 1
        return 0


class Above:
    """The supervisor, as its child sees it: words up, words down."""

    def __init__(self, channel: Channel) -> None:
        """`channel` is the child's end."""
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def send(self, message: dict[str, Any]) -> None:
        """Send something up; it waits for room."""
        self._channel.send(message)

    def wait(self, timeout_s: float | None) -> dict[str, Any] | None:
        """What comes first; None: nothing has come in time. Without a `timeout_s` it will come.

        Raises:
            EOFError: the supervisor is gone.
        """
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            return None
        received = self._channel.receive()
        if received is None:
            raise EOFError
        return received[0]
