"""The last 15 minutes of rates: rings of a fixed size, filled while there are viewers.

A point is the mean of the time since the point before, so a time without viewers is one long
point. Pure: samples and the time are passed in.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pyforwarder.status.plan import Plan
    from pyforwarder.status.sampling import Sample, Traffic

KEPT_S: Final = 900.0
STEP_S: Final = 5.0
_POINTS: Final = int(KEPT_S / STEP_S)
# So many things of the configuration have a curve, the first ones of each kind: 2 MB of rings.
MOST_CURVES: Final = 256
_RATES: Final = 3  # up, down, new


class History:
    """Curves by name: `t` of all, `l0` of the first listener, `r0` of a rule, `u0`, `s0` alike."""

    def __init__(self, plan: Plan) -> None:
        each = MOST_CURVES // 4
        self._counts = (
            ("l", min(each, len(plan.listeners))),
            ("r", min(each, len(plan.rules))),
            ("u", min(each, len(plan.upstreams))),
            ("s", min(each, len(plan.servers))),
        )
        self.names = ["t", *(f"{kind}{n}" for kind, count in self._counts for n in range(count))]
        # When each point ends (seconds since 1970), and how long it stands for.
        self._times: deque[tuple[float, float]] = deque(maxlen=_POINTS)
        self._points: deque[array[float]] = deque(maxlen=_POINTS)
        self._sums = [0] * (len(self.names) * _RATES)
        self._span_s = 0.0

    def add(self, sample: Sample, now_unix_s: float) -> dict[str, Any] | None:
        """Add a sample; what to send to viewers once it has completed a point."""
        if not sample.span_s:
            return None
        self._span_s += sample.span_s
        sums = self._sums
        at = 0
        for traffic in self._flows(sample):
            sums[at] += traffic.up_bytes
            sums[at + 1] += traffic.down_bytes
            sums[at + 2] += traffic.new
            at += _RATES
        # A sample comes a moment early or late.
        if self._span_s < STEP_S - 0.5:
            return None
        span_s = self._span_s
        point = array("d", (total / span_s for total in sums))
        self._times.append((now_unix_s, span_s))
        self._points.append(point)
        self._sums = [0] * len(sums)
        self._span_s = 0.0
        return {"at": _short(now_unix_s), "span": _short(span_s), "series": self._by_name(point)}

    def _flows(self, sample: Sample) -> Iterator[Traffic]:
        yield sample.total
        kinds = (sample.listeners, sample.rules, sample.upstreams, sample.servers)
        for (_, count), traffic in zip(self._counts, kinds, strict=True):
            yield from traffic[:count]

    def _by_name(self, point: array[float]) -> dict[str, list[float]]:
        return {
            name: [_short(rate) for rate in point[n * _RATES : (n + 1) * _RATES]]
            for n, name in enumerate(self.names)
        }

    def as_json(self, now_unix_s: float) -> dict[str, Any]:
        """All points that are not too old, by curve and then by rate."""
        kept = [n for n, (at_s, _) in enumerate(self._times) if at_s > now_unix_s - KEPT_S]
        return {
            "at": [_short(self._times[n][0]) for n in kept],
            "span": [_short(self._times[n][1]) for n in kept],
            "series": {
                name: [
                    [_short(self._points[n][at * _RATES + rate]) for n in kept]
                    for rate in range(_RATES)
                ]
                for at, name in enumerate(self.names)
            },
        }


def _short(value: float) -> float:
    """Round a number to as few characters as will do in JSON."""
    return round(value) if value == round(value) or value >= 1000 else round(value, 1)
