"""The records that Python and the BPF programs share, as bpf/abi.h declares them.

Data only. A test compiles abi.h and compares every offset and every enum with this file.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import ipaddress
import struct
from typing import Final

from pyforwarder.core.address import Address, UnixAddress, ip_text

ABI_VERSION: Final = 1
NAME_BYTES: Final = 64


class Direction(enum.IntEnum):
    """Up is client to server, down is server to client."""

    UP = 0
    DOWN = 1


class PairState(enum.IntEnum):
    """What `show` calls STATE; FREE marks a slot that holds no connection."""

    FREE = 0
    SNIFFING = 1
    CONNECTING = 2
    HANDOVER = 3
    JOINED = 4
    HALF_CLOSED = 5
    DRAINING = 6

    @property
    def label(self) -> str:
        """The word users see."""
        return self.name.lower().replace("_", "-")


class DatapathKind(enum.IntEnum):
    """Who moves a pair's bytes."""

    NONE = 0
    COPY = 1
    SOCKMAP = 2
    SPLICE = 3

    @property
    def label(self) -> str:
        """The word users see; `-` before anything moves."""
        return self.name.lower() if self else "-"


class Family(enum.IntEnum):
    """What an endpoint's address is."""

    UNKNOWN = 0
    UNIX = 1
    IPV4 = 4
    IPV6 = 6


class Endpoint(ctypes.Structure):
    """struct endpoint."""

    _fields_ = (
        ("ip", ctypes.c_uint8 * 16),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    )


class KernelDirection(ctypes.Structure):
    """struct kernel_direction: written by programs, at some moments by the worker, see abi.h."""

    _fields_ = (
        ("passed_bytes", ctypes.c_uint64),
        ("redirected_bytes", ctypes.c_uint64),
        ("redirected_packets", ctypes.c_uint64),
        ("last_ns", ctypes.c_uint64),
        ("latched", ctypes.c_uint16),
        ("lost", ctypes.c_uint16),
        ("trips", ctypes.c_uint32),
        ("latch_write_seq", ctypes.c_uint32),
        ("latch_redirected", ctypes.c_uint32),
        ("backlog_bytes", ctypes.c_uint32),
        ("peak_backlog_bytes", ctypes.c_uint32),
        ("next_seq", ctypes.c_uint32),
        ("trimmed_bytes", ctypes.c_uint32),
    )


class WorkerDirection(ctypes.Structure):
    """struct worker_direction: written by the worker, `asleep` also cleared by the program."""

    _fields_ = (
        ("consumed_bytes", ctypes.c_uint64),
        ("carried_bytes", ctypes.c_uint64),
        ("carried_packets", ctypes.c_uint64),
        ("peer_cookie", ctypes.c_uint64),
        ("armed", ctypes.c_uint32),
        ("asleep", ctypes.c_uint32),
        ("limit_bytes", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 5),
    )


class PairRecord(ctypes.Structure):
    """struct pair."""

    _fields_ = (
        ("kernel", KernelDirection * 2),
        ("worker", WorkerDirection * 2),
        ("id", ctypes.c_uint64),
        ("sequence", ctypes.c_uint64),
        ("started_ns", ctypes.c_uint64),
        ("last_ns", ctypes.c_uint64),
        ("state", ctypes.c_uint8),
        ("datapath", ctypes.c_uint8),
        ("reason", ctypes.c_uint8),
        ("worker_index", ctypes.c_uint8),
        ("protocol", ctypes.c_uint32),
        ("client", Endpoint),
        ("listener", Endpoint),
        ("source", Endpoint),
        ("server", Endpoint),
        ("rule", ctypes.c_char * NAME_BYTES),
        ("listener_name", ctypes.c_char * NAME_BYTES),
        ("reserved", ctypes.c_uint64),
    )


class SocketOwner(ctypes.Structure):
    """struct socket_owner."""

    _fields_ = (("slot", ctypes.c_uint32), ("direction", ctypes.c_uint32))


class Wakeup(ctypes.Structure):
    """struct wakeup."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("direction", ctypes.c_uint32),
        ("id", ctypes.c_uint64),
    )


class LineKind(enum.IntEnum):
    """What a line of the view's `stats` says."""

    NONE = 0
    COUNTER = 1
    NONZERO = 2
    UP_BYTES = 3
    DOWN_BYTES = 4
    TEXT = 5
    LISTENER = 6


class ViewLine(ctypes.Structure):
    """struct view_line."""

    _fields_ = (
        ("sequence", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("word", ctypes.c_uint32),
        ("also", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("name", ctypes.c_char * NAME_BYTES),
        ("text", ctypes.c_char * 128),
        ("protocol", ctypes.c_char * 8),
    )


class Backlog(ctypes.Structure):
    """struct backlog."""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("direction", ctypes.c_uint32),
        ("bytes", ctypes.c_uint64),
    )


PAIR_BYTES: Final = ctypes.sizeof(PairRecord)
_ENDPOINT: Final = struct.Struct("=16sHBx")
# In front of an IPv4 address in 16 bytes (RFC 4291, 2.5.5.2).
MAPPED: Final = b"\0" * 10 + b"\xff\xff"


def pack_endpoint(address: Address | UnixAddress | None) -> bytes:
    """An address as the 20 bytes of a struct endpoint; None and unix paths carry no address."""
    if address is None:
        return _ENDPOINT.pack(b"", 0, Family.UNKNOWN)
    if isinstance(address, UnixAddress):
        return _ENDPOINT.pack(b"", 0, Family.UNIX)
    packed, family = _pack_host(address.host)
    return _ENDPOINT.pack(packed, address.port, family)


@functools.lru_cache(maxsize=4096)
def _pack_host(host: str) -> tuple[bytes, Family]:
    packed = ipaddress.ip_address(host).packed
    if len(packed) == 4:
        return MAPPED + packed, Family.IPV4
    return packed, Family.IPV6


def unpack_endpoint(endpoint: Endpoint) -> str:
    """What users read for an endpoint: `ip:port`, `[ip6]:port`, `unix:` or `-`."""
    match endpoint.family:
        case Family.IPV4:
            ip = bytes(endpoint.ip)
            return str(Address(ip_text(ipaddress.IPv4Address(ip[12:])), endpoint.port))
        case Family.IPV6:
            return str(Address(ip_text(ipaddress.IPv6Address(bytes(endpoint.ip))), endpoint.port))
        case Family.UNIX:
            return "unix:"
        case _:
            return "-"
