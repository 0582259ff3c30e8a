"""How programs are attached to interfaces here: by tcx where the kernel has it, else by clsact."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.attach import clsact as attach_clsact
from pyforwarder.datapath.attach import tcx as attach_tcx
from pyforwarder.datapath.attach.clsact import ClsactAttacher
from pyforwarder.datapath.attach.tcx import TcxAttacher
from pyforwarder.errors import ForwarderError

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Attacher, Kind

# For tests: `clsact` on a kernel that has tcx.
FORCED: Final = "PYFORWARDER_ATTACH"


def kind() -> Kind:
    """What is used here.

    Raises:
        OSError: the kernel does not say whether it has tcx.
    """
    if os.environ.get(FORCED) == "clsact":
        return "clsact"
    return "tcx" if attach_tcx.is_supported() else "clsact"


def attacher(directory: Path | None, *, kept_with: str) -> Attacher:
    """For an instance that has its pins in `directory`; None: for something that passes.

    `kept_with` is the name of a pin that is there as soon as pairs are to outlive us.

    Raises:
        LoadError: another process that lives has our filters.
        OSError: the kernel does not say whether it has tcx.
    """
    if kind() == "tcx":
        return TcxAttacher(directory, kept_with=kept_with)
    return ClsactAttacher(directory)


def left_on(directory: Path) -> set[int]:
    """The interfaces on which a daemon that died has left its programs, in any way."""
    return attach_tcx.pinned_on(directory) | attach_clsact.found_on(directory)


def remove_others(kind: Kind, directory: Path) -> None:
    """Remove what that instance has left in the other way than `kind`. Never raises.

    Both would translate. A kernel has tcx or has not, and nothing outlives it; but a user may
    begin to force clsact, or stop. Call it when ours are attached: for a moment both are, and what
    one has redirected or dropped the other does not see.
    """
    (attach_clsact if kind == "tcx" else attach_tcx).remove(directory)


def remove_unpinned(directory: Path) -> None:
    """Remove what a daemon that died has left attached, where there are no pins to go with it.

    For a daemon that does not splice: filters, other than links, stay without. Never raises.
    """
    if attach_clsact.found_on(directory):
        with contextlib.suppress(ForwarderError, OSError):
            attacher = ClsactAttacher(directory)  # not while another process has that name
            attacher.clear()
            attacher.close()


def remove(directory: Path) -> None:
    """Remove all that an instance has attached and that nobody holds open. Never raises."""
    attach_tcx.remove(directory)
    attach_clsact.remove(directory)
