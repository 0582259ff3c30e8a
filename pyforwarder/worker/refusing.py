"""Refuses clients: tells them why, in their protocol's words, and lets them read that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Event
from pyforwarder.runtime.loop import EPOLLERR, EPOLLHUP, EPOLLIN
from pyforwarder.runtime.raw_sockets import end_writing
from pyforwarder.runtime.refusals import count_refusal

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.host import Host

# A refused client gets this long, and this many bytes, to read its answer and close. Closing at
# once would turn into a RST by bytes that it sent meanwhile, and the RST would take the answer
# along.
REFUSAL_LINGER_S: Final = 1.0
REFUSAL_DISCARD_BYTES: Final = 64 * 1024


class Refusing:
    """What a worker does with clients that are not joined."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = host.loop
        self._counters = host.counters

    def count(self, client: Client) -> None:
        """Settle whether the connection that was not joined is a refusal."""
        rule, state = client.rule, client.listener
        assert client.reason is not None
        client.is_refused = count_refusal(
            self._counters,
            client.reason,
            listener=state.counter,
            rule=state.rule_counters[rule.index] if rule is not None else None,
        )

    def answer(self, client: Client) -> None:
        """Tell the client why not, send FIN, and give it a moment to read that."""
        self.count(client)
        reply = client.down.pending
        client.down.pending = None
        try:
            if reply:
                # A few bytes into an empty queue: if TCP does not take them, nobody is reading.
                os.write(client.client_fd, reply)
        except OSError:
            self._host.happen(client, Event.BROKEN)
            return
        if not end_writing(client.client_fd):
            self._host.happen(client, Event.BROKEN)
            return
        self._loop.redirect(client.client_fd, self._discard)
        self._loop.deadlines.start(client, REFUSAL_LINGER_S, self._loop.now_s)
        client.up.read_bytes = 0
        self._host.records.show_state(client)
        self._discard(client, client.client_fd, EPOLLIN)

    def _discard(self, client: Client, fd: int, mask: int) -> None:
        """Read what a refused client still sends, up to a bound, until it closes."""
        if mask & (EPOLLERR | EPOLLHUP):
            self._host.happen(client, Event.FINISHED)
            return
        while client.up.read_bytes < REFUSAL_DISCARD_BYTES:
            try:
                size = len(os.read(fd, 4096))
            except BlockingIOError:
                return
            except OSError:
                break
            if not size:
                break
            client.up.read_bytes += size
        self._host.happen(client, Event.FINISHED)
