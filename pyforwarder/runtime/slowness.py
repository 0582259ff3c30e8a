"""How slow this host is: one factor on the deadlines that stand for its work.

An emulated or overloaded machine takes many times the usual time to compile a program or to move
the self-test's bytes, and nothing is wrong. `PYFORWARDER_SLOWNESS=4` makes every such deadline four
times as long, in the daemon, its workers and the commands (and in the tests). Deadlines of a
protocol or of the configuration, which peers and users see, never change.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE: Final = "PYFORWARDER_SLOWNESS"
MOST: Final = 100.0


def factor(environ: Mapping[str, str] = os.environ) -> float:
    """What `PYFORWARDER_SLOWNESS` says; 1 if it says nothing.

    Raises:
        ConfigError: it is no number from 1 to 100.
    """
    text = environ.get(VARIABLE) or "1"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= MOST:  # also where it is no number (nan)
        raise ConfigError(f"{text!r} is no number from 1 to {MOST:g}", path=VARIABLE)
    return value


def scaled_s(seconds: float) -> float:
    """The deadline that is `seconds` long on a usual host, in seconds of this one."""
    return seconds * factor()


def advice() -> str:
    """What to say of a deadline that passed and stands for the host's speed alone."""
    return (
        f"this host may be too slow or too busy for that: {VARIABLE}={min(MOST, 4 * factor()):g} "
        "in the environment waits longer"
    )
