"""The daemon that wants to take our place, as the running one has it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pyforwarder import __version__
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.supervisor.takeover.messages import MOST_FDS, Ask, peer_of, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.runtime.loop import Loop


class Successor:
    """One at a time."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        obey: Callable[[Ask, list[int]], tuple[dict[str, object], Sequence[int]]],
        gone: Callable[[], None],
    ) -> None:
        """`obey` does what it asks, and says what to answer; `gone` is called at its end.

        Raises:
            ControlError: the socket is none that a successor may have made; it is closed.
        """
        self.pid, uid = peer_of(sock) if sock.family == socket.AF_UNIX else (0, -1)
        if sock.type != socket.SOCK_SEQPACKET or uid not in (0, os.geteuid()):
            sock.close()
            raise ControlError("only this daemon's own user, or root, may take its place")
        if self.pid <= 0:
            sock.close()
            raise ControlError("a successor must be in the same namespace of processes")
        self._loop = loop
        self._obey = obey
        self._gone = gone
        self._channel = Channel(sock)
        self._fd = sock.fileno()
        self._come: list[int] = []
        self.is_over = False
        loop.watch(self._fd, EPOLLIN, self._receive, self)

    def fds(self) -> list[int]:
        """What a child must not keep."""
        return [] if self.is_over else [self._fd]

    def has_ended(self) -> bool:
        """Whether it is gone and reads no answer any more; it may have asked before."""
        poll = select.poll()
        poll.register(self._fd, 0)  # POLLHUP is always told of
        return self.is_over or bool(poll.poll(0))

    def _receive(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            received = receive(self._channel)
        except BlockingIOError:
            return
        if received is None:
            self.close()
            self._gone()
            return
        message, fds = received
        self._come += fds
        if len(self._come) > MOST_FDS:
            self.close()
            self._gone()
            return
        if message.get("more") is True:
            return
        fds, self._come = self._come, []
        try:
            answer, given = self._answer(message, fds)
            send(self._channel, answer, given)
        except (OSError, ValueError):
            # It does not read, or is gone; what was decided stands.
            self.close()
            self._gone()
        finally:
            close_given(fds)

    def _answer(
        self, message: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, object], Sequence[int]]:
        try:
            asked = Ask.model_validate(message)
            answer, given = self._obey(asked, fds)
        except ValidationError:
            return {"error": f"what pyforwarder {__version__} does not understand"}, ()
        except ForwarderError as error:
            return {"error": str(error)}, ()
        return {"answer": asked.do, **answer}, given

    def send_released(self, *, stay: int = 0) -> None:
        """Our spliced pairs are the successor's from now on, but for those that `stay`."""
        self._send_state("released", stay=stay)

    def send_ending(self) -> None:
        """We were told to end: no successor is to take our place."""
        self._send_state("ending")

    def _send_state(self, what: str, **fields: int) -> None:
        if not self.is_over:
            # One that is gone is told by our end.
            with contextlib.suppress(OSError):
                self._channel.send({"said": what, **fields}, wait=False)

    def close(self) -> None:
        """Hang up; nothing happens if that was done."""
        if not self.is_over:
            self.is_over = True
            self._loop.forget(self._fd)
            come, self._come = self._come, []
            close_given(come)
            self._channel.close()
