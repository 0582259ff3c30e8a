"""The local ports that pairs may have: the programs look up no flow for others (splice_ports.h)."""

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
    from collections.abc import Iterator

TIDY_S: Final = 60.0
# The keeper answers no request while it looks at so many records, or marks: about a millisecond.
RECORDS_AT_ONCE: Final = 1024
PORTS_AT_ONCE: Final = 8192
_MOST: Final = 1 << 16
_BYTES: Final = ctypes.sizeof(SplicePorts)
# Bytes per port: two, of which the programs of express write the second.
_STRIDE: Final = ctypes.sizeof(SplicePort)
_KEPT_AT: Final = SplicePort.kept.offset
_ALL: Final = bytes(SplicePort(kept=1)) * _MOST
# A port in a key is in wire order.
_PORT: Final = struct.Struct("!H")
_DPORTS_AT: Final = tuple(
    Splice.direction.offset
    + direction * ctypes.sizeof(SpliceDirection)
    + SpliceDirection.from_.offset
    + SpliceKey.dport.offset
    for direction in Direction
)


def make_our_ports() -> int:
    """Create the map, with all ports marked; the caller closes its descriptor.

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
    """The map, as the keeper writes it; the caller keeps the descriptor."""

    def __init__(self, fd: int, splices: mmap.mmap) -> None:
        """`splices` has the records of pairs; their ports are marked, and no others.

        Raises:
            OSError: the kernel refuses.
        """
        self._splices = splices
        self._memory = bpf.map_memory(fd, _BYTES, write=True)
        self._due_s = math.inf
        self._tidying: Iterator[None] | None = None
        # By port: whether a pair has it, as far as the tidying has come.
        self._kept = bytearray(_MOST)
        for _ in self._tidy():
            pass

    def mark(self, record: Splice) -> None:
        """Mark the ports of a pair, before its flows are made."""
        for direction in record.direction:
            port = socket.ntohs(direction.from_.dport)
            # The tidying may have passed this record already, when it was free.
            self._kept[port] = 1
            self._memory[port * _STRIDE + _KEPT_AT] = 1

    def forgotten(self, _index: int) -> None:
        """Note that the flows of a pair are gone, and its record is free."""
        self._due_s = min(self._due_s, time.monotonic() + TIDY_S)

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due."""
        return most_s if self._tidying is None else 0.0

    def run_due(self, now_s: float) -> None:
        """Remove the marks of ports that no pair has any more, every `TIDY_S`.

        In many turns of the loop, each of which takes about a millisecond.
        """
        if self._tidying is None:
            if now_s < self._due_s:
                return
            # A pair that is forgotten from here on may have its ports noted already: the next
            # tidying handles it.
            self._due_s = math.inf
            self._tidying = self._tidy()
        if next(self._tidying, self) is self:
            self._tidying = None

    def _tidy(self) -> Iterator[None]:
        """Tidy in parts, and yield after each. Ports of flows that are made between two parts are
        marked here.

        Programs that make flows meanwhile mark their ports by a byte of their own.
        """
        self._kept[:] = bytes(_MOST)
        for first in range(0, len(self._splices) // SPLICE_BYTES, RECORDS_AT_ONCE):
            for index in used_indexes(self._splices, first=first, most=RECORDS_AT_ONCE):
                for at in _DPORTS_AT:
                    (port,) = _PORT.unpack_from(self._splices, index * SPLICE_BYTES + at)
                    self._kept[port] = 1
            yield
        for first in range(0, _MOST, PORTS_AT_ONCE):
            ports = range(first, first + PORTS_AT_ONCE)
            marks = self._memory[first * _STRIDE + _KEPT_AT : ports.stop * _STRIDE : _STRIDE]
            for port, was in zip(ports, marks, strict=True):
                if was and not self._kept[port]:
                    self._memory[port * _STRIDE + _KEPT_AT] = 0
            yield
