"""What pyforwarder wants to reach, and whether a run shows that it does.

Pure. The goals are those of the design ("what fast means here"); one goal is one line.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from bench.measures import (
    DATAGRAM_RATES,
    DIRECT,
    EXPRESS,
    MEASURES,
    OURS,
    Measure,
)

if TYPE_CHECKING:
    from bench.results import Results

BEST_PEER: Final = "best peer"
MAX_STALL_US: Final = 1000.0


class Limit(enum.Enum):
    """How a value is held against a goal's bound."""

    AT_MOST = "at most"
    AT_LEAST = "at least"
    ABOVE = "above"


class Verdict(enum.Enum):
    """What a run says about a goal."""

    REACHED = "reached"
    MISSED = "missed"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """`target` in row `measure`, as a ratio to `reference`, must be `limit` `bound`.

    With `is_difference` it is the distance to the reference instead, in the row's unit; with
    `is_added` both are what they have more than `direct`. A goal with a `topology` is for runs in
    that one alone.
    """

    target: str
    measure: str
    reference: str
    limit: Limit
    bound: float
    is_difference: bool = False
    is_added: bool = False
    topology: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal, the number it was held against (None: not measured), and the verdict.

    `reference` is the target that the best peer turned out to be.
    """

    goal: Goal
    reference: str
    value: float | None
    verdict: Verdict


BULK: Final = ("bulk_1_up", "bulk_1_down", "bulk_8_up", "bulk_8_down")
ONE_CONNECTION: Final = ("rtt_near_p50", "rtt_far_p50")
CPU: Final = ("cpu_up", "cpu_down")
VIEW: Final = ("view_rtt", "view_cpu")
DATAGRAMS: Final = tuple(f"udp_{size}_{sessions}" for size, sessions in DATAGRAM_RATES)
SHORT: Final = ("connect_client_first", "connect_server_first", "connect_sni", "connect_host")
ONE_SESSION: Final = ("udp_rtt_near_p50", "udp_rtt_far_p50")

GOALS: Final = (
    *(Goal("sockmap", key, BEST_PEER, Limit.AT_MOST, 0.5) for key in ONE_CONNECTION),
    *(Goal("sockmap", key, BEST_PEER, Limit.AT_MOST, 0.7) for key in CPU),
    *(Goal("sockmap", key, BEST_PEER, Limit.AT_LEAST, 1.0) for key in BULK),
    *(Goal("splice", key, DIRECT, Limit.AT_MOST, 1.05) for key in ONE_CONNECTION),
    *(Goal("splice", key, DIRECT, Limit.AT_LEAST, 0.98) for key in BULK),
    *(Goal("splice", key, BEST_PEER, Limit.AT_LEAST, 1.4) for key in BULK),
    *(Goal("splice", key, DIRECT, Limit.AT_MOST, 1.05) for key in CPU),
    # reading the view in a loop costs nothing that `direct`, which has none, does not show as well
    *(Goal(t, key, DIRECT, Limit.AT_MOST, 1.02) for key in VIEW for t in ("copy", "sockmap")),
    *(Goal("splice", key, DIRECT, Limit.AT_LEAST, 0.9) for key in DATAGRAMS),
    *(Goal("splice", key, "nginx", Limit.AT_LEAST, 2.0) for key in DATAGRAMS),
    *(Goal("splice", key, DIRECT, Limit.AT_MOST, 1.1) for key in ONE_SESSION),
    Goal("splice", "udp_cpu", "nginx", Limit.AT_MOST, 0.25, is_added=True),
    *(Goal("copy", key, "nginx", Limit.AT_LEAST, 1.0) for key in DATAGRAMS),
    # `auto` is what a user gets; `copy` is where its short connections end
    *(
        Goal(target, f"connect_{order}_first", "haproxy", Limit.ABOVE, 1.0)
        for target in ("auto", "copy")
        for order in ("client", "server")
    ),
    *(
        Goal(target, f"delay_{way}_max", DIRECT, Limit.AT_MOST, MAX_STALL_US, is_difference=True)
        for target in OURS
        if target != EXPRESS  # it is about how connections begin
        for way in ("up", "down")
    ),
    *(
        Goal(EXPRESS, key, "haproxy", Limit.AT_LEAST, bound, topology=topology)
        for topology, bound in (("lo", 1.8), ("veth", 1.5))
        for key in SHORT
    ),
    *(Goal(EXPRESS, key, DIRECT, Limit.AT_LEAST, 0.8) for key in SHORT),
    Goal(EXPRESS, "connect_one_p50", DIRECT, Limit.AT_MOST, 1.15),
)

_BY_KEY: Final = {measure.key: measure for measure in MEASURES}


def measure_of(goal: Goal) -> Measure:
    """The row that the goal is about."""
    return _BY_KEY[goal.measure]


def judge(goal: Goal, results: Results) -> Outcome:
    """Hold the run's numbers against one goal."""
    reference: str | None = goal.reference
    if goal.reference == BEST_PEER:
        reference = results.best_peer(measure_of(goal))
    value = None
    if reference is not None:
        if goal.is_added:
            value = results.added(goal.measure, goal.target, reference)
        else:
            compare = results.difference if goal.is_difference else results.ratio
            value = compare(goal.measure, goal.target, reference)
    if value is None:
        return Outcome(goal, reference or goal.reference, None, Verdict.NOT_MEASURED)
    match goal.limit:
        case Limit.AT_MOST:
            is_reached = value <= goal.bound
        case Limit.AT_LEAST:
            is_reached = value >= goal.bound
        case Limit.ABOVE:
            is_reached = value > goal.bound
    assert reference is not None
    return Outcome(goal, reference, value, Verdict.REACHED if is_reached else Verdict.MISSED)


def judge_all(results: Results) -> list[Outcome]:
    """Every goal of the targets that took part, in the design's order."""
    topology = results.options.get("topology", "")
    return [
        judge(goal, results)
        for goal in GOALS
        if goal.target in results.targets and goal.topology in ("", topology)
    ]


def as_rows(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """The outcomes as plain values, for JSON."""
    return [
        {
            **asdict(outcome.goal),
            "limit": outcome.goal.limit.value,
            "reference": outcome.reference,
            "value": outcome.value,
            "verdict": outcome.verdict.value,
        }
        for outcome in outcomes
    ]
