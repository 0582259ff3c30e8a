"""The tables that a run prints: medians, ratios to the best peer and to direct, goals.

Pure: makes rich objects and text, prints nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bench.goals import Outcome, Verdict, measure_of
from bench.measures import DIRECT, OURS, Better

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.measures import Measure
    from bench.results import Results

_VERDICT_STYLES = {
    Verdict.REACHED: "green",
    Verdict.MISSED: "red",
    Verdict.NOT_MEASURED: "dim",
}


def number(value: float | None, digits: int) -> str:
    """A number as a cell shows it; `-` for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(
    results: Results, title: str, cell: Callable[[Measure, str], str], *, last: str = ""
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("what")
    table.add_column("unit")
    for target in results.targets:
        table.add_column(target, justify="right", no_wrap=True)
    if last:
        table.add_column(last, no_wrap=True)
    for measure in results.measured():
        row = [measure.title, measure.unit]
        row += [cell(measure, target) for target in results.targets]
        if last:
            row.append(results.best_peer(measure) or "-")
        table.add_row(*row)
    return table


def _coloured(measure: Measure, target: str, ratio: float | None) -> str:
    text = number(ratio, 2)
    if ratio is None or target not in OURS:
        return text
    is_better = ratio >= 1 if measure.better is Better.HIGHER else ratio <= 1
    return f"[green]{text}[/]" if is_better else f"[yellow]{text}[/]"


def medians(results: Results) -> Table:
    """What was measured, in its own units."""
    return _table(
        results,
        f"medians of {results.rounds} round{'s' if results.rounds > 1 else ''}",
        lambda measure, target: number(results.median(measure.key, target), measure.digits),
    )


def ratios_to_best_peer(results: Results) -> Table:
    """Every target against the other forwarder that is best in that row."""

    def cell(measure: Measure, target: str) -> str:
        peer = results.best_peer(measure)
        ratio = results.ratio(measure.key, target, peer) if peer else None
        return _coloured(measure, target, ratio)

    return _table(results, "ratio to the best peer of the row", cell, last="best peer")


def ratios_to_direct(results: Results) -> Table:
    """Every target against a connection without a forwarder."""
    return _table(
        results,
        "ratio to a direct connection",
        lambda measure, target: number(results.ratio(measure.key, target, DIRECT), 2),
    )


def goals(outcomes: list[Outcome]) -> Table:
    """Which goals this run reached."""
    table = Table(title="goals", title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("datapath")
    table.add_column("what")
    table.add_column("goal")
    table.add_column("measured", justify="right")
    table.add_column("")
    for outcome in outcomes:
        goal = outcome.goal
        measure = measure_of(goal)
        if goal.is_difference:
            bound = f"{goal.limit.value} {goal.bound:g} {measure.unit} more than {goal.reference}"
        elif goal.is_added:
            bound = f"adds {goal.limit.value} {goal.bound:g} of what {goal.reference} adds"
        else:
            bound = f"{goal.limit.value} {goal.bound:g} of {goal.reference}"
        if outcome.reference != goal.reference:
            bound += f" ({outcome.reference})"
        style = _VERDICT_STYLES[outcome.verdict]
        table.add_row(
            goal.target,
            measure.title,
            bound,
            number(outcome.value, 0 if goal.is_difference else 2),
            f"[{style}]{outcome.verdict.value}[/]",
        )
    return table
