"""Every part of a page that is made, by the name in its marker.

A maker gets what stands behind the name, and returns Markdown; for an argument that it does not
know it raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from documents import configuration, matches, measured, program

PARTS: Final[dict[str, Callable[[str], str]]] = {
    "keys": configuration.keys,
    "kinds": configuration.kinds,
    "protocols": matches.protocols,
    "details": matches.details,
    "life": program.life,
    "session": program.session,
    "metrics": program.metrics,
    "limits": program.limits,
    "reasons": program.pair_reasons,
    "files": program.files,
    "numbers": measured.numbers,
    "commands": program.commands,
}
