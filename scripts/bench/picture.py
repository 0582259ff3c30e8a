"""One picture of a run: a panel of bars per chosen row, as SVG.

Pure, and written by hand: bars and labels need no plotting library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from bench.measures import DIRECT, OURS, Better
from bench.report import number

if TYPE_CHECKING:
    from bench.measures import Measure
    from bench.results import Results

PANELS: Final = (
    "rtt_near_p50",
    "rtt_64_p99",
    "bulk_1_down",
    "bulk_8_up",
    "cpu_down",
    "connect_client_first",
    "idle_memory",
    "stall_up_memory",
)
COLUMNS: Final = 2
PANEL_WIDTH: Final = 440
LABEL_WIDTH: Final = 80
NUMBER_WIDTH: Final = 70
BAR_HEIGHT: Final = 16
BAR_STEP: Final = 22
TITLE_HEIGHT: Final = 44
MARGIN: Final = 20

_COLOURS: Final = {DIRECT: "#9aa0a6", **dict.fromkeys(OURS, "#1a73e8")}
_PEER_COLOUR: Final = "#c58af9"


def _text(x: float, y: float, content: str, *, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}</text>'


def _panel(results: Results, measure: Measure, left: float, top: float) -> list[str]:
    arrow = "more is better" if measure.better is Better.HIGHER else "less is better"
    parts = [
        _text(left, top + 14, measure.title, style=' font-weight="bold"'),
        _text(left, top + 30, f"{measure.unit}, {arrow}", style=' fill="#5f6368"'),
    ]
    values = {
        target: value
        for target in results.targets
        if (value := results.median(measure.key, target)) is not None
    }
    most = max(values.values(), default=0.0)
    room = PANEL_WIDTH - LABEL_WIDTH - NUMBER_WIDTH
    for index, (target, value) in enumerate(values.items()):
        y = top + TITLE_HEIGHT + index * BAR_STEP
        width = max(1.0, room * max(value, 0.0) / most) if most > 0 else 1.0
        colour = _COLOURS.get(target, _PEER_COLOUR)
        parts += [
            _text(left + LABEL_WIDTH - 6, y + 12, target, anchor="end"),
            f'<rect x="{left + LABEL_WIDTH:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{BAR_HEIGHT}" fill="{colour}"/>',
            _text(left + LABEL_WIDTH + width + 5, y + 12, number(value, measure.digits)),
        ]
    return parts


def draw(results: Results) -> str:
    """The picture as SVG text; panels without numbers are left out."""
    panels = [measure for measure in results.measured() if measure.key in PANELS]
    panels.sort(key=lambda measure: PANELS.index(measure.key))
    panel_height = TITLE_HEIGHT + len(results.targets) * BAR_STEP + MARGIN
    rows = -(-len(panels) // COLUMNS)
    width = MARGIN + COLUMNS * (PANEL_WIDTH + MARGIN)
    height = 2 * MARGIN + rows * panel_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        # without a ground of its own, black text would vanish on a dark page
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, measure in enumerate(panels):
        left = MARGIN + index % COLUMNS * (PANEL_WIDTH + MARGIN)
        parts += _panel(results, measure, left, MARGIN + index // COLUMNS * panel_height)
    caption = ", ".join(
        [
            *(results.machine[key] for key in ("kernel", "cpu") if key in results.machine),
            f"medians of {results.rounds} rounds",
        ]
    )
    parts.append(_text(MARGIN, height - 10, caption, style=' fill="#5f6368"'))
    return "\n".join([*parts, "</svg>"]) + "\n"
