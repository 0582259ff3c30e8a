"""The page's end of its channel to the supervisor: orders of viewers out, health in.

What may be said there is a table of the supervisor's (supervisor/messages.py); nothing here has any
privilege, and the supervisor obeys only where the configuration says `control: true`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.runtime.descriptors import close_given
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.status.page_data import HealthChange

if TYPE_CHECKING:
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.status.page_orders import Done

# Orders that are not answered yet.
_MOST_WAITING: Final = 32


class SupervisorLink:
    """Asks the supervisor, and receives what it sends of its own accord."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        changed: Callable[[HealthChange], None],
        fleet_changed: Callable[[list[Any]], None] = lambda _: None,
        exchanged: Callable[[list[Any]], None] = lambda _: None,
    ) -> None:
        """`changed` is called when a server went up or down; the loop ends with the supervisor.

        `fleet_changed` is called with the machines of the fleet, `exchanged` with what its store is
        asked for, and when that has answered.
        """
        self._fleet_changed = fleet_changed
        self._exchanged = exchanged
        self._loop = loop
        self._channel = channel
        self._changed = changed
        self._waiting: dict[int, Done] = {}
        self._number = 0
        loop.watch(channel.fileno(), EPOLLIN, self._receive, self)

    def flush(self, user: str, ids: Sequence[int], answer: Done) -> bool:
        """See `site.Steering`."""
        return self._order({"flush": list(ids), "user": user}, answer)

    def set_server(self, user: str, server: str, state: str, answer: Done) -> bool:
        """See `site.Steering`."""
        return self._order({"server": server, "state": state, "user": user}, answer)

    def _order(self, message: dict[str, object], answer: Done) -> bool:
        if len(self._waiting) >= _MOST_WAITING:
            return False
        self._number += 1
        try:
            self._channel.send({"n": self._number, **message}, wait=False)
        except OSError:
            return False
        self._waiting[self._number] = answer
        return True

    def _receive(self, _owner: object, _fd: int, _mask: int) -> None:
        try:
            received = self._channel.receive()
        except BlockingIOError:
            return
        except OSError:
            received = None
        if received is None:
            self._loop.stop()
            return
        message, fds = received
        close_given(fds)
        self._understand(message)

    def _understand(self, message: dict[str, Any]) -> None:
        match message:
            case {"n": int(number), "done": int(count)}:
                self._answer(number, count, "")
            case {"n": int(number), "error": str(error)}:
                self._answer(number, 0, error)
            case {"fleet": list(fleet)}:
                self._fleet_changed(fleet)
            case {"exchanges": list(exchanges)}:
                self._exchanged(exchanges)
            case {"at": at, "upstream": str(upstream), "server": str(server), "up": bool(up)}:
                self._changed(HealthChange(at, upstream, server, up, str(message.get("why", ""))))

    def _answer(self, number: int, count: int, error: str) -> None:
        answer = self._waiting.pop(number, None)
        if answer is not None:
            answer(count, error)
