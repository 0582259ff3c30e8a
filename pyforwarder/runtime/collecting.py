"""How often Python looks for garbage that refers to itself (gc).

While modules are imported nothing becomes garbage, and all of it would be gone through again and
again: a fifth of the time that `up` takes to start.
"""

from __future__ import annotations

import gc
from typing import Final

# More objects than a command makes that prints something and ends.
_MANY: Final = 100_000
_USUAL: Final = gc.get_threshold()


def seldom() -> None:
    """For a command, and for a daemon until it has started."""
    gc.set_threshold(_MANY, *_USUAL[1:])


def settle(threshold: tuple[int, int, int] = _USUAL) -> None:
    """For a process that stays: how often from now on. What there is by now is never gone through.

    Children share its memory as long as nobody writes to it, and a collection would: megabytes for
    each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*threshold)
