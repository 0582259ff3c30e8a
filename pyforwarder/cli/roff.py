"""Pieces of roff, as man(7) wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def escape(text: str) -> str:
    """`text` so that roff prints it as it is: no request, no escape, no typographic dash."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return "\n".join(
        rf"\&{line}" if line.startswith((".", "'")) else line for line in escaped.split("\n")
    )


def entries(
    pairs: Sequence[tuple[str, str]], meaning: Callable[[str], str] = escape
) -> Iterator[str]:
    """A list of terms with what each one means; `meaning` turns that into roff."""
    for term, paragraph in pairs:
        yield ".TP"
        yield rf"\fB{escape(term)}\fR"
        yield meaning(" ".join(paragraph.split()))
