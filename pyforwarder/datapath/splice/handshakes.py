"""The handshakes that the programs of splice have seen lately (bpf/splice_handshakes.h)."""

from __future__ import annotations

import ctypes
import os
import secrets
import struct
from typing import Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice.abi import HANDSHAKE_SETS, SpliceHandshakes
from pyforwarder.datapath.splice.records import KEY_BYTES

_SIZES: Final = bpf.MapSizes(4, ctypes.sizeof(SpliceHandshakes), 1 + HANDSHAKE_SETS)
_WORDS: Final = struct.Struct(f"={KEY_BYTES // 4}I")
_MASK: Final = (1 << 64) - 1


def make_handshakes() -> int:
    """Create the map, empty; the caller closes its descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    fd = bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=_SIZES.key_bytes,
        value_bytes=_SIZES.value_bytes,
        entries=_SIZES.entries,
        flags=bpf.F_MMAPABLE,  # page-aligned: so a set is in one cache line
        name="pf_handshakes",
    )
    secret = SpliceHandshakes()
    secret.latest[0].mark = secrets.randbits(64)
    secret.latest[1].mark = secrets.randbits(64) | 1
    try:
        _map_of(fd).update(bytes(4), bytes(secret))
    except OSError:
        os.close(fd)
        raise
    return fd


def mark_of(key: bytes, secret: int, factor: int) -> int:
    """The mark of an entry with these addresses, 64 bits: as `handshake_mark` of
    bpf/splice_handshakes.h.
    """
    mark = secret
    for word in (*_WORDS.unpack(key), 0):
        mark = (mark ^ word) * factor & _MASK
        mark ^= mark >> 32
    return mark


def set_of(mark: int) -> int:
    """The element of the map that may have an entry with this mark."""
    return 1 + (mark >> 32) % HANDSHAKE_SETS


def is_handshakes(fd: int) -> bool:
    """Whether a map, perhaps of another version, has the layout of this version."""
    return bpf.map_sizes(fd) == _SIZES


class Handshakes:
    """The map, for reading; the caller keeps the descriptor."""

    def __init__(self, fd: int) -> None:
        """
        Raises:
            OSError: the kernel refuses.
        """
        self._map = _map_of(fd)
        secret = self._read(0)
        self._secret, self._factor = secret.latest[0].mark, secret.latest[1].mark

    def find(self, key: bytes) -> dict[int, int]:
        """The latest handshakes of connections whose packets have these addresses.

        Interface by ISN: the number of a SYN or SYN-ACK, and the interface by which it came. Any
        host may have sent it in a peer's name: that of a connection is the one with its ISN.
        """
        mark = mark_of(key, self._secret, self._factor)
        found: dict[int, int] = {}
        for one in self._read(set_of(mark)).latest:
            if one.mark == mark:
                found.setdefault(one.began & 0xFFFFFFFF, one.began >> 32)
        return found

    def _read(self, number: int) -> SpliceHandshakes:
        value = self._map.lookup(number.to_bytes(4, "little"))
        return SpliceHandshakes.from_buffer_copy(value)


def _map_of(fd: int) -> bpf.Map:
    return bpf.Map(fd, key_bytes=_SIZES.key_bytes, value_bytes=_SIZES.value_bytes)
