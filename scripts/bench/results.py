"""The numbers of one run: medians, and ratios taken round by round.

Pure. A ratio is never that of two medians: the machine changes between rounds, so each round's
value is divided by the reference of the *same* round, and the median of those is given.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Final

from bench.measures import DIRECT, MEASURES, PEERS, Better, Measure

FORMAT: Final = 1


class ResultsError(ValueError):
    """A file that holds no results of this program."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A run of `target` that gave no number, or a target that did not start."""

    target: str
    text: str


@dataclass(slots=True)
class Results:
    """What was measured, and what went wrong meanwhile.

    `samples[measure][target]` has one entry per round, None where that run broke.
    `machine` and `options` are for readers only.
    """

    rounds: int
    targets: tuple[str, ...]
    machine: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, key: str, target: str, round_index: int, value: float) -> None:
        """Note one number; a round that is never noted stays None."""
        row = self.samples.setdefault(key, {}).setdefault(target, [None] * self.rounds)
        row[round_index] = value

    def values(self, key: str, target: str) -> list[float | None]:
        """One entry per round, None where nothing was measured."""
        return self.samples.get(key, {}).get(target, [None] * self.rounds)

    def median(self, key: str, target: str) -> float | None:
        """The median over the rounds that worked; None if none did."""
        known = [value for value in self.values(key, target) if value is not None]
        return statistics.median(known) if known else None

    def ratio(self, key: str, target: str, reference: str) -> float | None:
        """The median of the per-round ratios to `reference`; None without a round to compare.

        Where the reference is 0 (memory that did not grow) there is no ratio.
        """
        ratios = [
            value / other
            for value, other in zip(
                self.values(key, target), self.values(key, reference), strict=True
            )
            if value is not None and other is not None and other > 0
        ]
        return statistics.median(ratios) if ratios else None

    def difference(self, key: str, target: str, reference: str) -> float | None:
        """The median of the per-round differences to `reference`, in the measure's unit."""
        differences = [
            value - other
            for value, other in zip(
                self.values(key, target), self.values(key, reference), strict=True
            )
            if value is not None and other is not None
        ]
        return statistics.median(differences) if differences else None

    def added(self, key: str, target: str, reference: str) -> float | None:
        """What the target adds to `direct`, as a ratio to what the reference does.

        The median over the rounds in which the reference added anything.
        """
        ratios = [
            (value - direct) / (other - direct)
            for value, other, direct in zip(
                self.values(key, target),
                self.values(key, reference),
                self.values(key, DIRECT),
                strict=True,
            )
            if value is not None and other is not None and direct is not None and other > direct
        ]
        return statistics.median(ratios) if ratios else None

    def spread(self, key: str, target: str) -> float | None:
        """How far the rounds lie apart, (most - least) / median: what a ratio can be trusted to."""
        known = [value for value in self.values(key, target) if value is not None]
        middle = statistics.median(known) if known else 0.0
        return (max(known) - min(known)) / middle if middle > 0 else None

    def best_peer(self, measure: Measure) -> str | None:
        """The other forwarder with the best median in this row; None if none was measured."""
        medians = {
            peer: value
            for peer in PEERS
            if peer in self.targets and (value := self.median(measure.key, peer)) is not None
        }
        if not medians:
            return None
        choose = max if measure.better is Better.HIGHER else min
        return choose(medians, key=lambda peer: medians[peer])

    def measured(self) -> list[Measure]:
        """The rows that have at least one number, in the report's order."""
        return [
            measure
            for measure in MEASURES
            if any(self.median(measure.key, target) is not None for target in self.targets)
        ]


def to_json(results: Results, *, goals: list[dict[str, object]]) -> str:
    """The results as a file: samples to compute from, and a summary to read."""
    summary: dict[str, object] = {}
    for measure in results.measured():
        peer = results.best_peer(measure)
        summary[measure.key] = {
            "title": measure.title,
            "unit": measure.unit,
            "better": measure.better.value,
            "best_peer": peer,
            "targets": {
                target: {
                    "median": median,
                    "spread": results.spread(measure.key, target),
                    "to_best_peer": results.ratio(measure.key, target, peer) if peer else None,
                    "to_direct": results.ratio(measure.key, target, DIRECT),
                }
                for target in results.targets
                if (median := results.median(measure.key, target)) is not None
            },
        }
    document = {
        "format": FORMAT,
        "rounds": results.rounds,
        "targets": list(results.targets),
        "machine": results.machine,
        "options": results.options,
        "problems": [asdict(problem) for problem in results.problems],
        "goals": goals,
        "summary": summary,
        "samples": results.samples,
    }
    return json.dumps(document, indent=1) + "\n"


def from_json(text: str) -> Results:
    """The results that `to_json` wrote; summary and goals are computed anew.

    Raises:
        ResultsError: no JSON, another format, or a part is missing.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ResultsError(f"format {document['format']}, this program reads {FORMAT}")
        results = Results(
            rounds=int(document["rounds"]),
            targets=tuple(str(target) for target in document["targets"]),
            machine={str(k): str(v) for k, v in document["machine"].items()},
            options={str(k): str(v) for k, v in document["options"].items()},
            problems=[
                Problem(str(problem["target"]), str(problem["text"]))
                for problem in document["problems"]
            ],
        )
        for key, row in document["samples"].items():
            for target, values in row.items():
                if len(values) != results.rounds:
                    raise ResultsError(f"{key} of {target} has not one entry per round")
                for index, value in enumerate(values):
                    if value is not None:
                        results.add(key, target, index, float(value))
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ResultsError(f"no results of scripts/bench: {error!r}") from error
    return results
