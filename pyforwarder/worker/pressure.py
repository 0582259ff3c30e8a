"""What a worker's pairs hold in memory: measured, kept under `limits.memory`, and told to others.

What waits for a peer that does not read is in the buffers of its sockets (up to `tcp_rmem` and
`tcp_wmem`, some MiB each), in the backlog of a sockmap, and here, behind a write that was cut
short.
Each pair is bounded by that; many of them are not. So:

- from half of `memory` on, a pair that holds more than its share gets buffers of a fixed size, as
  small as its share: it can take in no more, and TCP slows its sender down; nothing is lost;
- while all of it is held, new pairs are refused (`busy`, limit `memory`), those of a listener while
  it holds its own `memory`, and those of a client's network from a quarter of `memory` on, so that
  one cannot use up what the others need;
- so that a few who never read keep nobody out for long, the pair that holds most is reset (reason
  `backlog`), one at each look, if it has had its small buffers for ten seconds and still holds more
  than its share: one whose peer reads comes down to it.

A spliced pair holds nothing here: its ends talk to each other.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import END_TO_END
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.client_network import network_of
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.host_memory import tcp_pages
from pyforwarder.runtime.limits import TCP
from pyforwarder.runtime.socket_options import SO_BUF_LOCK

if TYPE_CHECKING:
    import _socket

    from pyforwarder.datapath.base import Flow
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.host import Host

# How often it is looked how much TCP holds on this host, which is one read; ours is part of it.
MEASURE_EVERY_S: Final = 0.25
# How often pairs are looked at, once that is a sixteenth of `memory`: what is not in the sockets is
# at most some times what is. Never for more than a twentieth of the time.
MEASURE_S: Final = 0.1
MEASURE_FROM: Final = 16
MOST_OF_THE_TIME: Final = 20
# How many pairs one turn of the loop looks at: a fraction of a millisecond.
SLICE: Final = 128
# Parts of `memory`.
CLAMP_FROM: Final = 2
RELEASE_BELOW: Final = 4
CLIENT_SHARE: Final = 4

# How long a pair may take to come down to its share, while others are refused for it.
SLOW_S: Final = 10.0

SMALLEST_BUFFER_BYTES: Final = 32 * 1024

_SO_MEMINFO: Final = 55  # asm-generic/socket.h
# enum sk_meminfo: RMEM_ALLOC, RCVBUF, WMEM_ALLOC, SNDBUF, FWD_ALLOC, WMEM_QUEUED, OPTMEM, BACKLOG
_MEMINFO: Final = struct.Struct("=8I")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def held_by(sock: _socket.socket) -> int:
    """What a socket holds in the kernel, in bytes; 0 where the kernel does not say."""
    try:
        received, _, _, _, _, queued, _, backlog = _MEMINFO.unpack(
            sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        )
    except (OSError, struct.error):
        return 0
    return int(received + queued + backlog)


class _Found:
    """What has been measured in one look at all pairs."""

    __slots__ = ("by_client", "by_scope", "pairs")

    def __init__(self) -> None:
        self.pairs: list[tuple[int, Client]] = []
        self.by_scope: dict[int, int] = {}
        self.by_client: dict[bytes, int] = {}


class Pressure:
    """Watches what the pairs of one worker hold, and slows or refuses."""

    def __init__(self, host: Host, *, memory_bytes: int, workers: int) -> None:
        """`memory_bytes` is for the pairs of all workers; see `change`."""
        self._host = host
        self._loop = host.loop
        self._workers = workers
        self.memory_bytes = memory_bytes
        # No more pairs for these: the scopes and networks that hold all they may.
        self.is_full = False  # anybody at all: every new pair asks
        self._full_scopes: frozenset[int] = frozenset()
        self._full_clients: frozenset[bytes] = frozenset()
        self._scopes: set[int] = set()  # what we have written a number for
        self._clamped: dict[Client, float] = {}  # and since when
        self._next_s = 0.0
        try:
            self._sockstat_fd = os.open("/proc/net/sockstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._sockstat_fd = -1

    def start(self) -> None:
        """Begin to look, every now and then."""
        self._loop.after(MEASURE_EVERY_S, self._begin_round)

    def close(self) -> None:
        """Look no more."""
        if self._sockstat_fd >= 0:
            os.close(self._sockstat_fd)
            self._sockstat_fd = -1

    def forbids(self, client: Client) -> bool:
        """Whether the client has to be refused a pair; asked only while a worker is full."""
        listener = client.listener
        if self.is_all_held() or listener.counter in self._full_scopes:
            return True
        return bool(self._full_clients) and self._network(client) in self._full_clients

    def is_all_held(self) -> bool:
        """Whether nobody may have another pair."""
        return TCP in self._full_scopes

    def _begin_round(self) -> None:
        next_s = MEASURE_EVERY_S
        try:
            if self.is_needed():
                next_s = 0.0  # says `_measure_some`
                self._measure_some(_Found(), list(self._host.clients.values()), 0.0)
            else:
                # Other workers' pairs may hold all that there is.
                self._conclude([], {})
        finally:
            # After an error over one look, too, there is another.
            if next_s:
                self._loop.after(next_s, self._begin_round)

    def _measure_some(self, found: _Found, rest: list[Client], took_s: float) -> None:
        """Look at some pairs, and then let the loop serve others first."""
        began_s = time.monotonic()
        is_done = True
        try:
            for client in rest[-SLICE:]:
                self._measure_pair(client, found)
            del rest[-SLICE:]
            took_s += time.monotonic() - began_s
            if rest:
                self._loop.after(0.0, lambda: self._measure_some(found, rest, took_s))
                is_done = False
            else:
                self._finish(found)
        finally:
            if is_done:
                self._loop.after(max(MEASURE_S, took_s * MOST_OF_THE_TIME), self._begin_round)

    def is_needed(self) -> bool:
        """Whether there may be enough of it to look at each pair; or there was when we looked."""
        if not self._host.clients and not self._scopes:
            return False
        if self._scopes or self._sockstat_fd < 0:
            return True
        pages = tcp_pages(os.pread(self._sockstat_fd, 4096, 0))
        return pages is None or pages * _PAGE_BYTES * MEASURE_FROM >= self._least_bytes()

    def _least_bytes(self) -> int:
        """The smallest of the limits on memory that are in force."""
        here = [
            listener.memory_here
            for listener in self._host.generation.listeners.values()
            if listener.memory_here
        ]
        return min([self.memory_bytes, *here])

    # Measuring

    def _measure_pair(self, client: Client, found: _Found) -> None:
        if client.life is not Life.JOINED or client.kind in END_TO_END:
            return
        held = self._held_by_pair(client)
        if held < SMALLEST_BUFFER_BYTES:
            return  # at rest, or nearly
        found.pairs.append((held, client))
        for scope in (TCP, client.listener.counter):
            found.by_scope[scope] = found.by_scope.get(scope, 0) + held
        network = self._network(client)
        found.by_client[network] = found.by_client.get(network, 0) + held

    def _finish(self, found: _Found) -> None:
        by_scope = found.by_scope
        limits = self._host.limits
        for scope in self._scopes - by_scope.keys():
            limits.set_held(scope, 0)
        for scope, held in by_scope.items():
            limits.set_held(scope, held)
        self._scopes = {scope for scope, held in by_scope.items() if held}
        self._host.counters[Counter.HELD_BYTES] = by_scope.get(TCP, 0)
        self._conclude(found.pairs, found.by_client)

    def _conclude(self, pairs: list[tuple[int, Client]], by_client: dict[bytes, int]) -> None:
        limits = self._host.limits
        memory = {TCP: self.memory_bytes}
        for listener in self._host.generation.listeners.values():
            if listener.memory_here:
                memory[listener.counter] = listener.memory_here
        held = {scope: limits.held(scope) for scope in memory}
        self._full_scopes = frozenset(
            scope for scope, most in memory.items() if held[scope] >= most
        )
        # The kernel deals a client's connections to all workers alike.
        most_of_one = self.memory_bytes // CLIENT_SHARE // self._workers
        self._full_clients = frozenset(
            network for network, count in by_client.items() if count >= most_of_one
        )
        self.is_full = bool(self._full_scopes or self._full_clients)
        tight = {scope for scope, most in memory.items() if held[scope] * CLAMP_FROM >= most}
        self._host.copying.may_take_much = not tight
        too_large = []
        for size, client in pairs:
            for scope in (TCP, client.listener.counter):
                if scope in tight:
                    share = memory[scope] // max(1, limits.count(scope))
                    share = max(4 * SMALLEST_BUFFER_BYTES, share)
                    if size > share // 2:
                        self._clamp(client, share)
                        if size > share and scope in self._full_scopes:
                            too_large.append((size, client.id, client))
                        break
        if too_large:
            self._end_largest(too_large)
        self._clamped = {c: s for c, s in self._clamped.items() if c.life is Life.JOINED}
        if self._clamped and all(
            held[scope] * RELEASE_BELOW < most for scope, most in memory.items()
        ):
            self._release()

    @staticmethod
    def _held_by_pair(client: Client) -> int:
        assert client.server is not None
        held = held_by(client.client) + held_by(client.server)
        if held < SMALLEST_BUFFER_BYTES:
            return held  # nothing waits elsewhere while there is room in the sockets
        for flow in (client.up, client.down):
            held += Pressure._waiting(client, flow)
        return held

    @staticmethod
    def _waiting(client: Client, flow: Flow) -> int:
        pending = len(flow.pending) if flow.pending is not None else 0
        assert client.datapath is not None
        return pending + client.datapath.carried(client, flow)[2]

    @staticmethod
    def _network(client: Client) -> bytes:
        if client.peer is None:
            return b"unix"
        prefix = client.listener.prefix
        return network_of(client.peer.host, ipv4_bits=prefix.ipv4, ipv6_bits=prefix.ipv6)

    # Slowing

    def _clamp(self, client: Client, share_bytes: int) -> None:
        """Let the pair's buffers be as large as its share, and grow no more.

        Of a sockmap's pair only the receive buffers: its program counts on the send buffers.
        """
        if client in self._clamped or client.life is not Life.JOINED:
            return
        assert client.server is not None
        size = share_bytes // 4
        for sock in (client.client, client.server):
            # The kernel doubles the number, for its own overhead (socket(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size // 2)
            if client.kind is DatapathKind.COPY:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2)
        self._clamped[client] = self._loop.now_s
        self._host.counters[Counter.PAIRS_SLOWED] += 1

    def _end_largest(self, pairs: list[tuple[int, int, Client]]) -> None:
        until_s = self._loop.now_s - SLOW_S
        slow = [entry for entry in pairs if self._clamped.get(entry[2], until_s + 1) <= until_s]
        if slow:
            self._host.broken(max(slow)[2], CloseReason.BACKLOG)

    def _release(self) -> None:
        """Let the kernel choose the sizes of buffers again, as there is room."""
        for client in self._clamped:
            if client.life is Life.JOINED and client.server is not None:
                for sock in (client.client, client.server):
                    try:
                        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
                    except OSError:
                        break  # before Linux 5.14: they stay as they are
        self._clamped.clear()
