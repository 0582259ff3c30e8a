"""The records that the programs for connections in the kernel share with their keeper.

Data only: bpf/express_connect.h declares them. A test compiles that and compares every offset.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

SAVED_BYTES: Final = 4096
# Places that one run of `go_round` handles.
PLACES_AT_ONCE: Final = 16
# Sizes of struct request_context and struct new_packet, which the programs alone read and write.
CONTEXT_BYTES: Final = 128
NEW_PACKET_BYTES: Final = 308
# `worker` of a pair that no worker knows of yet.
NO_WORKER: Final = 0xFFFFFFFE
# Set in the id of a pair that the kernel has opened.
ID_BIT: Final = 52
MOST_RULES: Final = 64


class AskState(enum.IntEnum):
    """enum pf_express_state."""

    FREE = 0
    FILLING = 1
    ASKED = 2
    JOINED = 3
    RESTING = 4
    LEAVING = 5


STATE_MASK: Final = 7
# The bits above the state are the number of the place's connection.
STATE_BITS: Final = 3


class Count(enum.IntEnum):
    """enum pf_express_count."""

    DEFERRED = 0
    TAKEN = 1
    COMMITTED = 2
    REFUSED = 3
    UNANSWERED = 4
    ENDED = 5
    ASKED_AGAIN = 6
    NO_REQUEST = 7
    ODD_REQUEST = 8
    ODD_NUMBERS = 9
    ODD_PACKET = 10
    LONG = 11
    UNDECIDED = 12
    NO_TARGET = 13
    NO_PORT = 14
    TAKEN_PORT = 15
    FAILED = 16
    DEVICE = 17
    SILENT = 18


class ListenerKey(ctypes.Structure):
    """struct express_listener_key."""

    _fields_ = (
        ("address", ctypes.c_uint32 * 4),
        ("port", ctypes.c_uint16),
        ("padding", ctypes.c_uint16),
    )


class Listener(ctypes.Structure):
    """struct express_listener."""

    _fields_ = (
        ("table", ctypes.c_uint32),
        ("owner", ctypes.c_uint32),
        ("advertised_mss", ctypes.c_uint16),
        ("padding", ctypes.c_uint16),
        ("target", ctypes.c_uint32 * MOST_RULES),
        ("answer_ms", ctypes.c_uint16 * MOST_RULES),
    )


class Target(ctypes.Structure):
    """struct express_target."""

    _fields_ = (
        ("source", ctypes.c_uint32 * 4),
        ("server", ctypes.c_uint32 * 4),
        ("port", ctypes.c_uint16),
        ("mss", ctypes.c_uint16),
        ("out", ctypes.c_uint32),
        ("from_interfaces", ctypes.c_uint32 * 2),
        ("padding", ctypes.c_uint32),
        ("not_before_ns", ctypes.c_uint64),
    )


class Ask(ctypes.Structure):
    """struct express_ask."""

    _fields_ = (
        ("word", ctypes.c_uint64),
        ("begun_ns", ctypes.c_uint64),
        ("resting_since_ns", ctypes.c_uint64),
        ("client_isn", ctypes.c_uint32),
        ("kernel_isn", ctypes.c_uint32),
        ("own_isn", ctypes.c_uint32),
        ("client_tsval", ctypes.c_uint32),
        ("client_tsecr", ctypes.c_uint32),
        ("saved_sum", ctypes.c_uint32),
        ("saved_bytes", ctypes.c_uint32),
        ("counted_number", ctypes.c_uint32),
        ("client_window", ctypes.c_uint32),
        ("kernel_window", ctypes.c_uint32),
        ("client_interface", ctypes.c_uint32),
        ("target", ctypes.c_uint32),
        ("listener_table", ctypes.c_uint32),
        ("rule", ctypes.c_uint32),
        ("first_segment_bytes", ctypes.c_uint32),
        ("first_segment_sum", ctypes.c_uint32),
        ("first_client_tsval", ctypes.c_uint32),
        ("port_lost", ctypes.c_uint32),
        ("window_field", ctypes.c_uint16),
        ("mss", ctypes.c_uint16),
        ("advertised_mss", ctypes.c_uint16),
        ("answer_ms", ctypes.c_uint16),
        ("client_scale", ctypes.c_uint8),
        ("kernel_scale", ctypes.c_uint8),
        ("has_timestamps", ctypes.c_uint8),
        ("has_sack", ctypes.c_uint8),
        ("has_scale", ctypes.c_uint8),
        ("has_fin", ctypes.c_uint8),
        ("macs", ctypes.c_uint8 * 12),
        ("padding", ctypes.c_uint8 * 6),
    )


class EndKey(ctypes.Structure):
    """struct express_end_key."""

    _fields_ = (
        ("table", ctypes.c_uint32),
        ("rule", ctypes.c_uint32),
        ("target", ctypes.c_uint32),
        ("port", ctypes.c_uint32),
    )


class Ends(ctypes.Structure):
    """struct express_ends."""

    _fields_ = (
        ("since_ns", ctypes.c_uint64),
        ("round", ctypes.c_uint64),
        ("pairs", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64 * 2),
    )


class Round(ctypes.Structure):
    """struct express_round."""

    _fields_ = (
        ("now_ns", ctypes.c_uint64),
        ("passed_ns", ctypes.c_uint64),
        ("least_rest_here_ns", ctypes.c_uint64),
        ("least_rest_ns", ctypes.c_uint64),
        ("rest_ns", ctypes.c_uint64),
        ("next", ctypes.c_uint32),
        ("is_short", ctypes.c_uint32),
        ("counted", ctypes.c_uint32),
        ("freed", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("leaving", ctypes.c_uint32),
    )


ASK_BYTES: Final = ctypes.sizeof(Ask)
