"""The recorded numbers of docs/benchmarks.json, as tables and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from documents.markdown import table
from documents.svg import Drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILE: Final = Path(__file__).parents[2] / "docs" / "benchmarks.json"
_OURS: Final = ("copy", "sockmap", "splice", "auto", "express")

_WIDTH: Final = 460
_LABEL: Final = 90
_NUMBER: Final = 70
_STEP: Final = 20
_HEAD: Final = 40


def recorded() -> dict[str, Any]:
    """Everything that was recorded."""
    read: dict[str, Any] = json.loads(_FILE.read_text())
    return read


def numbers(name: str) -> str:
    """One run as a table, with the command that repeats it."""
    said = recorded()
    run = said["runs"].get(name)
    if run is None:
        return "Not recorded yet."
    rows = [
        (f"{row['measure']}, {row['unit']}", *(_number(value) for value in row["values"]))
        for row in run["rows"]
    ]
    when, kernel = run.get("recorded", said["recorded"]), run.get("kernel", said["kernel"])
    when = f"Recorded {when} on {kernel}, {said['machine']}"
    return f"{when}: `{run['command']}`\n\n" + table(("", *run["targets"]), rows)


def chart() -> str:
    """Bars for the rows that `chart` in the file names, as SVG."""
    said = recorded()
    run = said["runs"][said["chart"]["run"]]
    rows = [row for key in said["chart"]["rows"] for row in run["rows"] if row["key"] == key]
    panel_height = _HEAD + _STEP * len(run["targets"]) + 16
    drawing = Drawing(2 * _WIDTH + 40, panel_height * -(-len(rows) // 2) + 40)
    for index, row in enumerate(rows):
        left, top = 20 + index % 2 * _WIDTH, 10 + index // 2 * panel_height
        _panel(drawing, run["targets"], row, left, top)
    drawing.text(
        20, drawing.height - 12, f"{said['recorded']}, {said['kernel']}, {said['machine']}", "small"
    )
    return drawing.svg()


def _panel(
    drawing: Drawing, targets: Sequence[str], row: dict[str, Any], left: int, top: int
) -> None:
    less = row["unit"] in ("us", "ms", "s")
    drawing.text(left, top + 14, row["measure"], "bold")
    drawing.text(left, top + 30, f"{row['unit']}, {'less' if less else 'more'} is better", "small")
    most = max(value for value in row["values"] if value is not None)
    room = _WIDTH - _LABEL - _NUMBER - 20
    for index, (target, value) in enumerate(zip(targets, row["values"], strict=True)):
        if value is None:
            continue
        y = top + _HEAD + index * _STEP
        width = max(1, round(room * value / most))
        kind = "direct" if target == "direct" else "ours" if target in _OURS else "theirs"
        drawing.text(left + _LABEL - 6, y + 12, target, "end")
        drawing.box(left + _LABEL, y, width, _STEP - 6, kind)
        drawing.text(left + _LABEL + width + 6, y + 12, _number(value))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
