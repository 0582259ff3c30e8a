"""The records that splice.c, its keeper and the workers share, as bpf/splice.h declares them.

Data only. A test compiles splice.h and compares every offset and every enum with this file.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

# Version of the records: the maps outlive the daemon, and the next one must know their layout.
VERSION: Final = 10
# SO_PRIORITY of a spliced socket, by which another forwarder on this host knows it.
PRIORITY: Final = 0x50465350
# Repeated bytes, beyond as many as were new, that are taken for retransmissions, and not counted.
MAX_REPEATED_BYTES: Final = 1 << 20
# Value of `answer` while the keeper probes a peer.
PROBE: Final = 2
# `worker` of a pair that another machine forwards: no ring and no counters have that number.
HELD: Final = 0xFFFFFFFF
# `slot` of a pair that is in no pair table at the moment.
NO_SLOT: Final = 0xFFFFFFFF
# Size of the table of the latest handshakes: a pair whose handshake was evicted is not spliced.
HANDSHAKES_PER_SET: Final = 4
HANDSHAKE_SETS: Final = 1 << 14
# Layout of that map: a new number whenever an earlier build could not read it, or would write
# beyond its values.
HANDSHAKES_FORM: Final = 2


class SpliceState(enum.IntEnum):
    """enum pf_splice_state."""

    FREE = 0
    ARMED = 1
    BEGINNING = 2
    ACTIVE = 3
    RESET = 4
    ASKED = 5


class ResetBy(enum.IntEnum):
    """enum pf_reset: why a pair was reset that its ends have not closed."""

    NOBODY = 0
    CLIENT = 1
    SERVER = 2
    NO_ROUTE = 3
    CLIENT_TIMEOUT = 4
    SERVER_TIMEOUT = 5
    MOVED = 6


class Routing(enum.IntFlag):
    """PF_ROUTING_...: what chooses the route of our socket's packets, besides their addresses."""

    BOUND = 1
    FOREIGN = 2


class Busy(enum.IntFlag):
    """PF_BUSY_...: why `control` did not let a pair begin."""

    GONE = 1
    UNREAD = 2
    FOREIGN = 4
    COARSE = 8
    LATE = 16


class Invalid(enum.IntEnum):
    """enum pf_invalid: why a packet with the addresses of a pair was invalid."""

    NOT_FOR_US = 0
    INTERFACE = 1
    HEADER = 2
    CHECKSUM = 3
    FRAGMENT = 4
    FLAGS = 5
    SYN = 6
    RESET = 7
    SEQUENCE = 8
    ACKNOWLEDGEMENT = 9
    TIMESTAMP = 10
    OPTION = 11
    ERROR = 12


class SpliceKey(ctypes.Structure):
    """struct splice_key."""

    _fields_ = (
        ("source", ctypes.c_uint32 * 4),
        ("target", ctypes.c_uint32 * 4),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
    )


class SpliceFlow(ctypes.Structure):
    """struct splice_flow."""

    _fields_ = (("index", ctypes.c_uint32), ("direction", ctypes.c_uint32))


class SpliceHandshake(ctypes.Structure):
    """struct splice_handshake."""

    _fields_ = (("mark", ctypes.c_uint64), ("began", ctypes.c_uint64))


class SpliceHandshakes(ctypes.Structure):
    """struct splice_handshakes."""

    _fields_ = (("latest", SpliceHandshake * HANDSHAKES_PER_SET),)


class SplicePort(ctypes.Structure):
    """struct splice_port."""

    _fields_ = (("kept", ctypes.c_uint8), ("opened", ctypes.c_uint8))


class SplicePorts(ctypes.Structure):
    """struct splice_ports."""

    _fields_ = (("port", SplicePort * (1 << 16)),)


class SpliceDirection(ctypes.Structure):
    """struct splice_direction."""

    _fields_ = (
        ("from_", SpliceKey),
        ("source", ctypes.c_uint32 * 4),
        ("target", ctypes.c_uint32 * 4),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("interface", ctypes.c_uint32),
        ("from_interfaces", ctypes.c_uint32 * 2),
        ("seq_delta", ctypes.c_uint32),
        ("ack_delta", ctypes.c_uint32),
        ("tsval_delta", ctypes.c_uint32),
        ("tsecr_delta", ctypes.c_uint32),
        ("last_ack", ctypes.c_uint64),
        ("last_end", ctypes.c_uint64),
        ("contiguous_end", ctypes.c_uint64),
        ("max_edge", ctypes.c_uint64),
        ("max_window", ctypes.c_uint32),
        ("fin_seq", ctypes.c_uint32),
        ("fin_due", ctypes.c_uint32),
        ("fin", ctypes.c_uint32),
        ("fin_acked", ctypes.c_uint32),
        ("ts_recent", ctypes.c_uint32),
        ("ts_recent_s", ctypes.c_uint32),
        ("tail_end", ctypes.c_uint32),
        ("tail_open", ctypes.c_uint32),
        ("socket_sent_end", ctypes.c_uint64),
        ("begin_seq", ctypes.c_uint32),
        ("socket_expected_seq", ctypes.c_uint32),
        ("window_edge", ctypes.c_uint32),
        ("unread", ctypes.c_uint32),
        ("pending", ctypes.c_uint32),
        ("answer", ctypes.c_uint32),
        ("last_tsval", ctypes.c_uint32),
        ("has_last_tsval", ctypes.c_uint32),
        ("narrow_mtu", ctypes.c_uint32),
        ("narrow_seq", ctypes.c_uint32),
        ("peer_scale", ctypes.c_uint8),
        ("other_scale", ctypes.c_uint8),
        ("no_ecn", ctypes.c_uint8),
        ("routing", ctypes.c_uint8),
        ("address_sum", ctypes.c_uint32),
        ("pseudo_sum", ctypes.c_uint32),
        ("missed_ack", ctypes.c_uint32),
        ("last_received_s", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("last_received_tick", ctypes.c_uint32),
        ("claim", ctypes.c_uint32),
        ("repeated_bytes", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("packets", ctypes.c_uint64),
    )


class _Clocks(ctypes.Structure):
    _fields_ = (("client", ctypes.c_uint32), ("server", ctypes.c_uint32))


class SpliceClocks(ctypes.Union):
    """union splice_clocks."""

    _anonymous_ = ("each",)
    _fields_ = (("each", _Clocks), ("end_noticed_ns", ctypes.c_uint64))


class Splice(ctypes.Structure):
    """struct splice."""

    _fields_ = (
        ("direction", SpliceDirection * 2),
        ("id", ctypes.c_uint64),
        ("barrier", ctypes.c_uint64),
        ("state", ctypes.c_uint32),
        ("worker", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("reset", ctypes.c_uint32),
        ("clocks", SpliceClocks),
        ("family", ctypes.c_uint32),
        ("last_slot", ctypes.c_uint32),
        ("out", ctypes.c_uint32 * 2),
        ("isn", ctypes.c_uint32 * 2),
        ("owner", ctypes.c_uint32),
        ("keep_idle_s", ctypes.c_uint32),
        ("keep_interval_s", ctypes.c_uint32),
        ("keep_count", ctypes.c_uint32),
    )


class SpliceEvent(ctypes.Structure):
    """struct splice_event."""

    _fields_ = (
        ("index", ctypes.c_uint32),
        ("worker", ctypes.c_uint32),
        ("id", ctypes.c_uint64),
    )


SPLICE_BYTES: Final = ctypes.sizeof(Splice)
