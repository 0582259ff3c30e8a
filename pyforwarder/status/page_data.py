"""What viewers of the page are sent, as JSON objects made of one sample of the tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pyforwarder.status.sampling import LANES, Sample, ServerNow, Traffic

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.status.plan import Plan, ServerPlan


class HealthChange(NamedTuple):
    """A server went up or down."""

    at_unix_s: float
    upstream: str
    server: str
    up: bool
    why: str

    def as_json(self) -> dict[str, object]:
        """Return the change as the page reads it."""
        return {
            "at": round(self.at_unix_s),
            "upstream": self.upstream,
            "server": self.server,
            "up": self.up,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class About:
    """What does not change while the process lives."""

    instance: str
    version: str
    started_unix_s: float
    workers: int
    datapaths: Mapping[str, str]  # name -> "available", or why not
    config: Config
    control: bool


def hello(
    about: About,
    plan: Plan,
    now_unix_s: float,
    *,
    user: str,
    control: bool,
    token: str,
    history: object,
    health: Iterable[HealthChange],
) -> dict[str, object]:
    """What a viewer gets first: what there is, by name, in the order of the lists of `tick`.

    `token` goes with each of its orders, `control` says whether it may give any.
    """
    return {
        "at": now_unix_s,
        "instance": about.instance,
        "version": about.version,
        "started": about.started_unix_s,
        "workers": about.workers,
        "user": user,
        "control": control,
        "token": token,
        "lanes": [kind.label for kind in LANES],
        "datapaths": dict(about.datapaths),
        "listeners": [
            {"name": one.name, "bind": one.bind, "protocol": one.protocol} for one in plan.listeners
        ],
        "rules": [{"listener": one.listener, "rule": one.rule, "to": one.to} for one in plan.rules],
        "upstreams": plan.upstreams,
        "servers": [
            {
                "upstream": one.upstream,
                "server": one.server,
                "weight": one.weight,
                "backup": one.is_backup,
            }
            for one in plan.servers
        ],
        "history": history,
        "health": [one.as_json() for one in health],
    }


def tick(
    sample: Sample, plan: Plan, down: Collection[tuple[str, str]], now_unix_s: float
) -> dict[str, object]:
    """What every viewer gets once a second; `down` are servers (upstream, server) that are."""
    span_s = sample.span_s

    def per_s(count: int) -> float:
        return round(count / span_s, 1) if span_s else 0.0

    def rates(traffic: Traffic) -> tuple[float, float]:
        return per_s(traffic.up_bytes), per_s(traffic.down_bytes)

    counts = sample.counts
    return {
        "at": now_unix_s,
        "totals": {
            "pairs": sample.total.pairs,
            "new": per_s(sample.total.new),
            "refused": per_s(sample.refused),
            "up": per_s(sample.total.up_bytes),
            "down": per_s(sample.total.down_bytes),
            "up_bytes": sample.up_bytes,
            "down_bytes": sample.down_bytes,
        },
        "lanes": [[traffic.pairs, *rates(traffic)] for traffic in sample.lanes],
        "listeners": [
            [open_now, per_s(traffic.new), *rates(traffic), accepted, refused]
            for traffic, (open_now, accepted, refused) in zip(
                sample.listeners, counts["listeners"], strict=True
            )
        ],
        "rules": [
            [traffic.pairs, per_s(traffic.new), *rates(traffic), taken, refused]
            for traffic, (taken, refused) in zip(sample.rules, counts["rules"], strict=True)
        ],
        "upstreams": [
            [traffic.pairs, per_s(traffic.new), *rates(traffic)] for traffic in sample.upstreams
        ],
        "servers": [
            [now.held, *rates(traffic), _state_of(one, now, down), now.connects, now.failures]
            for traffic, now, one in zip(
                sample.servers, counts["servers"], plan.servers, strict=True
            )
        ],
        "ends": [[reason, count, per_s(more)] for reason, count, more in counts["ends"]],
    }


def _state_of(server: ServerPlan, now: ServerNow, down: Collection[tuple[str, str]]) -> str:
    if now.is_drained:
        return "drained"
    if now.is_down or (server.upstream, server.server) in down:
        return "down"
    return "up" if server.is_checked else "not checked"
