"""Which ports of ours pairs may have: the programs look for no flow of others (splice_ports.h)."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import (
    SPLICE_BYTES,
    Splice,
    SpliceDirection,
    SpliceKey,
    SplicePort,
    SplicePorts,
)
from pyforwarder.datapath.splice.records import used_indexes

if TYPE_CHECKING:
    import mmap

# A tidying takes some milliseconds, in which nobody is answered.
TIDY_S: Final = 60.0
_MOST: Final = 1 << 16
_BYTES: Final = ctypes.sizeof(SplicePorts)
# Of a port: its two bytes, of which the programs of express write the second.
_STRIDE: Final = ctypes.sizeof(SplicePort)
_KEPT_AT: Final = SplicePort.kept.offset
_ALL: Final = bytes(SplicePort(kept=1)) * _MOST
# A key's port is in wire order.
_PORT: Final = struct.Struct("!H")
_DPORTS_AT: Final = tuple(
    Splice.way.offset
    + direction * ctypes.sizeof(SpliceDirection)
    + SpliceDirection.from_.offset
    + SpliceKey.dport.offset
    for direction in Direction
)


def make_our_ports() -> int:
    """The map, in which all ports are marked; its descriptor is the caller's to close.

    Raises:
        OSError: the kernel refuses.
    """
    fd = bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=_BYTES,
        entries=1,
        flags=bpf.F_MMAPABLE,
        name="pf_our_ports",
    )
    try:
        bpf.Map(fd, key_bytes=4, value_bytes=_BYTES).update(bytes(4), _ALL)
    except OSError:
        os.close(fd)
        raise
    return fd


class OurPorts:
    """The map, as the one keeper writes it; the descriptor stays the caller's."""

    def __init__(self, fd: int, splices: mmap.mmap) -> None:
        """`splices` are the records of pairs; the ports that these have are marked, and no others.

        Raises:
            OSError: the kernel refuses.
        """
        self._splices = splices
        self._memory = bpf.map_memory(fd, _BYTES, write=True)
        self._due_s = math.inf
        self._tidy()

    def mark(self, record: Splice) -> None:
        """Before the flows of this pair are made."""
        for way in record.way:
            self._memory[socket.ntohs(way.from_.dport) * _STRIDE + _KEPT_AT] = 1

    def forgotten(self, _index: int) -> None:
        """A pair's flows are gone, and its record is free."""
        self._due_s = min(self._due_s, time.monotonic() + TIDY_S)

    def run_due(self, now_s: float) -> None:
        """Take back the marks of ports that no pair has any more, once in a while."""
        if now_s >= self._due_s:
            self._tidy()

    def _tidy(self) -> None:
        """Programs that make flows meanwhile have marked their ports by a byte of their own."""
        self._due_s = math.inf
        kept = bytearray(_MOST)
        for index in used_indexes(self._splices):
            for at in _DPORTS_AT:
                (port,) = _PORT.unpack_from(self._splices, index * SPLICE_BYTES + at)
                kept[port] = 1
        for port, was in enumerate(self._memory[_KEPT_AT::_STRIDE]):
            if was and not kept[port]:
                self._memory[port * _STRIDE + _KEPT_AT] = 0
