"""The records of UDP sessions that the programs, the keeper and the workers share.

Data only: bpf/sessions.h declares them. A test compiles that and compares every offset.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from pyforwarder.datapath.splice.abi import SpliceKey

# Version of the records: the maps outlive the daemon, and the next one must know their layout.
SESSION_VERSION: Final = 2
# `armed` of a pair's record: the worker has waited long enough for an empty queue.
NOW: Final = 2


class SessionState(enum.IntEnum):
    """enum pf_session_state."""

    FREE = 0
    PREPARED = 1
    ACTIVE = 2


class SessionDirection(ctypes.Structure):
    """struct session_direction."""

    _fields_ = (
        ("from_", SpliceKey),
        ("source", ctypes.c_uint32 * 4),
        ("target", ctypes.c_uint32 * 4),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("interface", ctypes.c_uint32),
        ("from_interface", ctypes.c_uint32),
        ("address_sum", ctypes.c_uint32),
        ("pseudo_sum", ctypes.c_uint32),
        ("latched", ctypes.c_uint32),
        ("has_left", ctypes.c_uint32),
        ("passed", ctypes.c_uint64),
        ("last_ns", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("packets", ctypes.c_uint64),
    )


class SessionRecord(ctypes.Structure):
    """struct session."""

    _fields_ = (
        ("direction", SessionDirection * 2),
        ("id", ctypes.c_uint64),
        ("state", ctypes.c_uint32),
        ("worker", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("last_slot", ctypes.c_uint32),
        ("family", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("owner", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("began_ns", ctypes.c_uint64),
        ("idle_ns", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64),
    )


SESSION_BYTES: Final = ctypes.sizeof(SessionRecord)
