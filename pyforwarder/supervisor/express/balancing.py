"""Which servers of an upstream the kernel chooses among: what a worker of its own would know.

A worker has a balancer of its own for each upstream. So has the kernel, here: health checks, drains
and reloads change it as they change those of workers, and what became of the connections that the
kernel has opened ejects servers alike. Where no server is left but ejected ones, workers decide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.core.express.choosing import Target, choice_among, servers_at
from pyforwarder.core.upstreams import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pyforwarder.core.address import Address
    from pyforwarder.core.express.choosing import Choice
    from pyforwarder.core.upstreams import UpstreamSettings


class Outcome(Protocol):
    """What is read of what became of a server's connections; counted up to 2^32."""

    @property
    def opened(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def in_a_row(self) -> int: ...


class _Seen(NamedTuple):
    opened: int
    failed: int


# More failures at once eject no more.
_MOST_AT_ONCE: Final = 1000


class KernelBalancers:
    """Keeps a balancer for each upstream to which the kernel connects by itself."""

    def __init__(
        self,
        outcome_of: Callable[[Target], Outcome],
        failed: Callable[[str, str, int], object] = lambda _upstream, _server, _times: None,
    ) -> None:
        """`outcome_of` says what became of all the connections to a target so far.

        `failed` is called with an upstream, a server of it, and how many have failed since.
        """
        self._outcome_of = outcome_of
        self._failed = failed
        self._upstreams: dict[str, UpstreamSettings] = {}
        self._balancers: dict[str, Balancer] = {}
        # Targets that the kernel may choose, and of which upstreams they are, under which name.
        self._led: dict[Target, set[tuple[str, str]]] = {}
        self._were_led: set[Target] = set()
        self._seen: dict[Target, _Seen] = {}

    def configure(
        self,
        upstreams: Mapping[str, UpstreamSettings],
        *,
        down: Collection[tuple[str, str]],
        drained: Collection[tuple[str, str]],
        now_s: float,
    ) -> None:
        """Balance these upstreams and no others. Servers in `down` and `drained`, named by upstream
        and server, get no connections.

        What `leads_to` has said before is void.
        """
        for name in self._balancers.keys() - upstreams.keys():
            del self._balancers[name], self._upstreams[name]
        for name, settings in upstreams.items():
            balancer = self._balancers.get(name)
            if balancer is None:
                balancer = self._balancers[name] = Balancer(settings)
            elif self._upstreams[name] is not settings:
                balancer.reconfigure(settings)
            self._upstreams[name] = settings
            for server in balancer.servers:
                if (name, server.name) in down:
                    balancer.mark_down(server.name)
                else:
                    balancer.mark_up(server.name, now_s)
            balancer.drain({server for upstream, server in drained if upstream == name})
        self._were_led = set(self._led)
        self._led.clear()

    def leads_to(
        self, upstream: str, port: int, now_s: float, source: str = ""
    ) -> Choice | Address | None:
        """What the kernel is to do for connections to a port; None: userspace chooses.

        It connects from the address `source`, if there is one.
        """
        balancer, settings = self._balancers[upstream], self._upstreams[upstream]
        chosen = choice_among(upstream, settings.balance, balancer.fit(now_s), port, source)
        for server, address in servers_at(balancer.servers, port):
            target = Target(address, source)
            self._led.setdefault(target, set()).add((upstream, server.name))
            if target not in self._were_led:
                # What came before is no upstream's that is known.
                self._were_led.add(target)
                self._seen[target] = _seen_of(self._outcome_of(target))
        return chosen

    @property
    def targets(self) -> Collection[Target]:
        """The targets whose outcomes `update` reads."""
        return self._led.keys()

    def update(self, now_s: float) -> bool:
        """Read what became of connections; returns whether other servers are fit now.

        A server that fails does so for all upstreams that have it, with the same `source`.
        """
        before = self._fit(now_s)
        for target, servers in self._led.items():
            outcome = self._outcome_of(target)
            seen, now = self._seen[target], _seen_of(outcome)
            if now == seen:
                continue
            self._seen[target] = now
            failed = (now.failed - seen.failed) & 0xFFFFFFFF
            last = min(failed, outcome.in_a_row)
            for upstream, name in servers:
                if failed:
                    self._failed(upstream, name, failed)
                _report_outcomes(
                    self._balancers[upstream],
                    name,
                    now_s,
                    before=min(failed - last, _MOST_AT_ONCE),
                    has_opened=now.opened != seen.opened,
                    after=min(last, _MOST_AT_ONCE),
                )
        for target in self._seen.keys() - self._led.keys():
            del self._seen[target]
        return self._fit(now_s) != before

    def _fit(self, now_s: float) -> dict[str, list[str]]:
        return {
            name: [server.name for server in balancer.fit(now_s)]
            for name, balancer in self._balancers.items()
        }

    def rests_until_s(self, now_s: float) -> float:
        """When the next ejection ends; infinity if there is none."""
        return min((one.rests_until_s(now_s) for one in self._balancers.values()), default=math.inf)

    @property
    def is_leading(self) -> bool:
        """Whether there is a connection whose end is to be counted."""
        return bool(self._led)

    def report(self, now_s: float) -> dict[str, dict[str, dict[str, object]]]:
        """What workers report of their balancers (`Server.upstreams`), for the kernel's: with 0
        pairs, as those are counted by workers.
        """
        return {
            name: {
                server.name: {
                    "state": balancer.condition(server, now_s).value,
                    "pairs": 0,
                    "connects": 0,
                    "failures": server.failures,
                }
                for server in balancer.servers
            }
            for name, balancer in self._balancers.items()
        }


def _seen_of(outcome: Outcome) -> _Seen:
    return _Seen(outcome.opened, outcome.failed)


def _report_outcomes(
    balancer: Balancer, name: str, now_s: float, *, before: int, has_opened: bool, after: int
) -> None:
    """Tell the balancer of failures, then of a connection that was opened, if there was one, then
    of failures after it.
    """
    server = next((one for one in balancer.servers if one.name == name), None)
    if server is None:
        return
    for _ in range(before):
        balancer.failed(server, now_s)
    if has_opened:
        balancer.opened(server)
        balancer.closed(server)
    for _ in range(after):
        balancer.failed(server, now_s)
