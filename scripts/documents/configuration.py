"""The tables of docs/configuration.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from documents.markdown import code, table
from pyforwarder.config import reference

if TYPE_CHECKING:
    from pyforwarder.config.reference import Key


def keys(path: str) -> str:
    """The keys of one block, by its path (`top` is the top level)."""
    blocks = {where: block for block in reference.blocks() for where in block.paths}
    block = blocks["" if path == "top" else path]
    return table(
        ("Key", "Value", "Default", "Meaning"),
        [(code(key.name), _values(key), _default(key), key.meaning) for key in block.keys],
    )


def kinds(_: str) -> str:
    """How the kinds of values are written."""
    return table(("Value", "Written"), reference.KINDS.items())


def _values(key: Key) -> str:
    return ", ".join(part if is_kind else code(part) for part, is_kind in key.kinds())


def _default(key: Key) -> str:
    return "required" if key.is_required else code(key.default)
