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
    """Collect garbage seldom: for a command, and for a daemon until it has started."""
    gc.set_threshold(_MANY, *_USUAL[1:])


def settle(threshold: tuple[int, int, int] = _USUAL) -> None:
    """Collect garbage this often from now on, and never look at what there is by now; for a process
    that stays.

    Children share its memory as long as nobody writes to it, and a collection would: megabytes for
    each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*threshold)
