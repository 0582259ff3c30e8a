"""How far a daemon has come towards its end."""

from __future__ import annotations

from enum import StrEnum


class DaemonState(StrEnum):
    """A daemon goes through these in this order; `ping` is answered with the one that it is in."""

    SERVING = "serving"
    CLOSING = "stopping"  # it is to drain, and its listeners are still its own
    DRAINING = "draining"  # it accepts no more
    ENDING = "ending"  # it resets what is left, or another one has its place
