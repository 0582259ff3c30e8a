"""Small drawings as SVG: boxes, lines, words. They have a ground of their own, for dark pages."""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape

_FILLS: Final = {
    "direct": "#9aa0a6",
    "ours": "#1a73e8",
    "theirs": "#c58af9",
    "kernel": "#e8f0fe",
    "user": "#fef7e0",
    "end": "#e6f4ea",
}
_STYLES: Final = {
    "": "",
    "bold": ' font-weight="bold"',
    "small": ' fill="#5f6368"',
    "end": ' text-anchor="end"',
    "middle": ' text-anchor="middle"',
    "title": ' font-weight="bold" text-anchor="middle"',
}


class Drawing:
    """Shapes in the order in which they are drawn; units are pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self._parts: list[str] = []

    def text(self, x: int, y: int, words: str, style: str = "") -> None:
        """Words that begin (or end, or have their middle, by `style`) at x, above y."""
        self._parts.append(f'<text x="{x}" y="{y}"{_STYLES[style]}>{escape(words)}</text>')

    def box(
        self, x: int, y: int, width: int, height: int, fill: str, *, border: bool = False
    ) -> None:
        """A filled rectangle."""
        line = ' stroke="#5f6368"' if border else ""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{_FILLS[fill]}"{line}/>'
        )

    def arrow(self, *points: tuple[int, int]) -> None:
        """A line through the points, with an arrow's head at both ends."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="#1a73e8" stroke-width="3" '
            'marker-start="url(#head)" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """All of it."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" '
                f'height="{self.height}" viewBox="0 0 {self.width} {self.height}" '
                'font-family="sans-serif" font-size="12">',
                '<defs><marker id="head" orient="auto-start-reverse" viewBox="0 0 8 8" refX="7" '
                'refY="4" markerWidth="4" markerHeight="4"><path d="M0,0 L8,4 L0,8 z" '
                'fill="#1a73e8"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )
