"""The records of choices among servers, as the program reads them.

Data only: bpf/express_choice.h declares them. A test compiles that and compares every offset.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from pyforwarder.core.express.choosing import LOG_STEPS, MOST_SERVERS, MOST_TURNS

# Flag in a rule's target: the lower bits are the number of a choice.
CHOICE: Final = 0x80000000


class Kind(enum.IntEnum):
    """enum pf_express_choice."""

    NO_CHOICE = 0
    IN_TURN = 1
    BY_CLIENT = 2


class Drawing(ctypes.Structure):
    """struct express_drawing."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("target", ctypes.c_uint32),
        ("weight", ctypes.c_uint32),
    )


class Choice(ctypes.Structure):
    """struct express_choice."""

    _fields_ = (
        ("turn", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("in_turn", ctypes.c_uint32 * MOST_TURNS),
        ("drawing", Drawing * MOST_SERVERS),
    )


class Logs(ctypes.Structure):
    """struct express_logs."""

    _fields_ = (("of", ctypes.c_uint64 * (LOG_STEPS + 1)),)


class Outcome(ctypes.Structure):
    """struct express_outcome."""

    _fields_ = (
        ("opened", ctypes.c_uint32),
        ("failed", ctypes.c_uint32),
        ("in_a_row", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )
