"""The parts of a page between its markers, and the files that it names."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Final

from documents.parts import PARTS

_MARKER: Final = re.compile(
    r"^<!-- made: ([a-z]+)((?: [^ \n]+)?) -->\n(.*?)<!-- /made -->\n", re.DOTALL | re.MULTILINE
)
_PATH: Final = re.compile(r"[\w.-]+(?:/[\w.-]*)*")
_SOURCE: Final = re.compile(r"\.(?:py|c|h|md|json|yaml|yml)$")
_BEGIN: Final = re.compile(r"^<!-- made: ", re.MULTILINE)


class PageError(Exception):
    """A page's markers are wrong; the message says where."""


def missing(text: str, root: Path) -> list[str]:
    """The files and directories that a page names and that are not there.

    They are named from the top of the tree, or of the package; a file of source without its
    directory is looked for everywhere.
    """
    words = [word for quoted in re.findall(r"`([^`\n]+)`", text) for word in quoted.split()]
    tops = root, root / "pyforwarder", root / "pyforwarder" / "datapath", root / "bpf"
    lost = []
    for word in words:
        if not _PATH.fullmatch(word) or any((top / word).exists() for top in tops):
            continue
        first, slash, _ = word.partition("/")
        if slash and (_SOURCE.search(word) or any((top / first).is_dir() for top in tops[:2])):
            lost.append(word)
        if not slash and _SOURCE.search(word) and word not in _names(root):
            lost.append(word)
    return lost


@functools.cache
def _names(root: Path) -> frozenset[str]:
    """How the files of source are called."""
    tops = ("pyforwarder", "bpf", "scripts", "tests")
    return frozenset(path.name for top in tops for path in (root / top).rglob("*.*"))


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
            body = PARTS[part](argument).strip("\n")
        except KeyError as error:
            raise PageError(f"{name}: {part} has no {error.args[0]!r}") from error
        marker = f"made: {part} {argument}".rstrip()
        return f"<!-- {marker} -->\n\n{body}\n\n<!-- /made -->\n"

    result = _MARKER.sub(make, text)
    if len(_BEGIN.findall(result)) != len(_MARKER.findall(text)):
        raise PageError(f"{name}: a <!-- made: ... --> has no <!-- /made -->")
    return result
