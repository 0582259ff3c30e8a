"""Clients whose first datagrams do not decide yet: what they have sent, until it does.

Bounded in every way: each by its listener's `first_packet` and in datagrams, all of a worker in
number and bytes. Where there is no room, those that have waited longest are decided by what is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.datagrams import MOST_DATAGRAMS
from pyforwarder.runtime.loop import Timed

if TYPE_CHECKING:
    from pyforwarder.core.routing import Claim
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.udp.session import DatagramPort
    from pyforwarder.worker.udp.sockets import Key

# Of one worker. A hello in two datagrams is whole a moment after its first half has come, so that
# most of so many have been made up.
MOST_UNDECIDED: Final = 1024
MOST_BYTES: Final = 4 * 1024 * 1024


class Undecided(Timed):
    """The datagrams of one client that no rule has taken yet."""

    __slots__ = ("claim", "datagrams", "key", "owner", "port", "size_bytes")

    def __init__(self, owner: UndecidedClients, port: DatagramPort, key: Key) -> None:
        super().__init__()
        self.owner = owner
        self.port = port
        self.key = key
        self.datagrams: list[bytes] = []
        self.size_bytes = 0
        self.claim: Claim | None = None  # what the decision waits for, if it is not for more

    def expired(self) -> None:
        """Decide by what has come: no more datagrams are waited for."""
        self.owner.decide(self)


class UndecidedClients:
    """All of one worker."""

    def __init__(self, loop: Loop, decide: Callable[[Undecided], None]) -> None:
        """`decide` is told of those who are not waited for any more; it has to `forget` them."""
        self._loop = loop
        self.decide = decide
        self._clients: dict[tuple[DatagramPort, Key], Undecided] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, port: DatagramPort, key: Key) -> Undecided | None:
        """The client that sends from this address to this listener."""
        return self._clients.get((port, key))

    @staticmethod
    def may_wait(port: DatagramPort, count: int, size_bytes: int) -> bool:
        """Whether a client with so many datagrams of so many bytes may send another."""
        return count < MOST_DATAGRAMS and size_bytes < port.listener.max_bytes

    def hold(self, port: DatagramPort, key: Key, datagram: bytes) -> None:
        """Keep a datagram until others have come, or `first_packet.timeout` is over."""
        client = self.get(port, key)
        if client is None:
            client = self._clients[port, key] = Undecided(self, port, key)
            self._loop.deadlines.start(client, port.listener.timeout_s, self._loop.now_s)
        client.datagrams.append(datagram)
        client.size_bytes += len(datagram)
        self._size_bytes += len(datagram)
        while len(self._clients) > MOST_UNDECIDED or self._size_bytes > MOST_BYTES:
            self.decide(next(iter(self._clients.values())))

    def forget(self, client: Undecided) -> None:
        """Forget a client that is decided, or whose listener is gone."""
        del self._clients[client.port, client.key]
        self._loop.deadlines.stop(client)
        self._size_bytes -= client.size_bytes

    def forget_all(self, port: DatagramPort) -> int:
        """Forget the clients of a listener that is gone; returns how many datagrams are lost with
        them.
        """
        clients = [client for client in self._clients.values() if client.port is port]
        for client in clients:
            self.forget(client)
        return sum(len(client.datagrams) for client in clients)
