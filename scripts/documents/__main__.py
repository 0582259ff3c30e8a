"""Write the parts of the pages that are made and the pictures, or check them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from documents import screens
from documents.pages import PageError, made, missing
from documents.pictures import pictures
from pyforwarder.config.reference import UndocumentedError

ROOT = Path(__file__).parents[2]


def wanted(root: Path) -> dict[Path, str]:
    """Every page and picture, with the text that it should have.

    Raises:
        PageError: a page has a part that is not closed or that nobody knows how to make, or names
            a file that is not there.
        UndocumentedError: a key of the configuration has no meaning.
    """
    texts = {path: made(path.read_text(), str(path.relative_to(root))) for path in pages(root)}
    for path, text in texts.items():  # as made: a list of files may still have one that has moved
        if names := missing(text, root):
            raise PageError(f"{path.relative_to(root)}: there is no {', '.join(names)}")
    return texts | {root / "docs" / name: text for name, text in pictures().items()}


def pages(root: Path) -> list[Path]:
    """README, CONTRIBUTING, SECURITY, everything in docs/, and what is beside the sources."""
    names = ("README", "CONTRIBUTING", "SECURITY", "bpf/README", "examples/README")
    return [root / f"{name}.md" for name in names] + sorted((root / "docs").glob("*.md"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/documents/run", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    parser.add_argument(
        "--screens", action="store_true", help="take the pictures of demo and top (as root)"
    )
    chosen = parser.parse_args(arguments)
    only_check = chosen.check
    if chosen.screens:
        for path in screens.take(ROOT / "docs" / "pictures"):
            print(f"{path.relative_to(ROOT)}: written")
        return 0
    try:
        texts = wanted(ROOT)
    except (PageError, UndocumentedError) as error:
        print(f"scripts/documents/run: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[path])
        print(f"{path.relative_to(ROOT)}: {'out of date' if only_check else 'written'}")
    if stale and only_check:
        print("scripts/documents/run writes them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
