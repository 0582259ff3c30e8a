"""The parts of a page between its markers, and the files that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from documents.parts import PARTS

_MARKER: Final = re.compile(
    r"^<!-- made: ([a-z]+)((?: [^ \n]+)?) -->\n(.*?)<!-- /made -->\n", re.DOTALL | re.MULTILINE
)
_BEGIN: Final = re.compile(r"^<!-- made: ", re.MULTILINE)


class PageError(Exception):
    """A page's markers are wrong; the message says where."""


def missing(text: str, root: Path) -> list[str]:
    """The files that a page names and that are not there, in the tree or in the package."""
    return [
        name
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|c|h|md|json|yaml|yml))`", text)
        if not name.startswith("/")
        and not (root / name).exists()
        and not (root / "pyforwarder" / name).exists()
    ]


def made(text: str, name: str) -> str:
    """The page with each part as it should be; `name` is the page's, for errors.

    Raises:
        PageError: a marker that has no end, or whose part nobody knows how to make.
    """

    def make(match: re.Match[str]) -> str:
        part, argument, old = match[1], match[2].strip(), match[3]
        if "<!-- made:" in old:
            raise PageError(f"{name}: {part} {argument} has no <!-- /made -->")
        if part not in PARTS:
            raise PageError(f"{name}: no part is called {part!r}; known: {', '.join(PARTS)}")
        try:
            body = PARTS[part](argument)
        except KeyError as error:
            raise PageError(f"{name}: {part} has no {error.args[0]!r}") from error
        marker = f"made: {part} {argument}".rstrip()
        return f"<!-- {marker} -->\n\n{body.strip()}\n\n<!-- /made -->\n"

    result = _MARKER.sub(make, text)
    if len(_BEGIN.findall(result)) != len(_MARKER.findall(text)):
        raise PageError(f"{name}: a <!-- made: ... --> has no <!-- /made -->")
    return result
