"""What the page knows of the configuration: listeners, rules, servers, and where each counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """A listener, and the first of its counters."""

    name: str
    bind: str
    protocol: str
    counter: int


@dataclass(frozen=True, slots=True)
class RulePlan:
    """A rule, and the first of its counters; `upstream` if that is where it goes."""

    listener: str
    rule: str
    to: str
    upstream: str | None
    counter: int


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server of an upstream, and the first of its counters, if it has any."""

    upstream: str
    server: str
    counter: int | None
    is_checked: bool
    weight: int = 1
    is_backup: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is by the configuration, in its order."""

    listeners: tuple[ListenerPlan, ...]
    rules: tuple[RulePlan, ...]
    servers: tuple[ServerPlan, ...]

    @property
    def upstreams(self) -> tuple[str, ...]:
        """The names of the upstreams."""
        return tuple(dict.fromkeys(server.upstream for server in self.servers))
