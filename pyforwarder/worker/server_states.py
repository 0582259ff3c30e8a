"""What a worker knows of the servers of upstreams: which are up, which pair counts for which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pyforwarder.runtime.counters import ServerCounter, count_connect

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.generation import Generation


class Balancing(Protocol):
    """The worker's server, as it is needed here."""

    loop: Loop
    generation: Generation  # the one in force
    counters: memoryview


class ServerStates:
    """Knows the states of servers, for one worker."""

    def __init__(self, worker: Balancing) -> None:
        self._worker = worker

    def rows(self) -> dict[str, dict[str, dict[str, object]]]:
        """What this worker knows of every server: upstream -> server -> state and counts."""
        now_s = self._worker.loop.now_s
        return {
            name: {
                server.name: {
                    "state": balancer.condition(server, now_s).value,
                    "pairs": server.pairs,
                    "connects": server.connects,
                    "failures": server.failures,
                }
                for server in balancer.servers
            }
            for name, balancer in self._worker.generation.balancers.items()
        }

    def mark(self, upstream: str, server: str, *, up: bool) -> None:
        """A health check has changed its mind about a server."""
        balancer = self._worker.generation.balancers.get(upstream)
        if balancer is None:
            return
        if up:
            balancer.mark_up(server, self._worker.loop.now_s)
        else:
            balancer.mark_down(server)
        self.write()

    def write(self) -> None:
        """Write down which servers get no new pairs here, and why."""
        counters = self._worker.counters
        for balancer in self._worker.generation.balancers.values():
            for server in balancer.servers:
                if server.counter:
                    counters[server.counter + ServerCounter.DOWN] = int(not server.is_up)
                    counters[server.counter + ServerCounter.DRAINED] = int(server.is_drained)

    def hold(self, client: Client, upstream: str, server: str) -> None:
        """Count the pair for a server of an upstream, if it is configured still."""
        state = self._worker.generation.upstreams.get(upstream)
        if state is None:
            return
        found = next((one for one in state.balancer.servers if one.name == server), None)
        if found is None:
            return
        client.upstream, client.server_state = state, found
        state.balancer.hold(found)
        state.balancer.opened(found)
        count_connect(self._worker.counters, found.counter)
        client.server_opened = True
