"""Reading a BPF ring buffer from Python: two mappings and a descriptor to wait on.

Source: kernel/bpf/ringbuf.c (layout of the pages, BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Final

from pyforwarder.runtime.shared_memory import map_pages

_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_LENGTH: Final = struct.Struct("=I")
_HEADER_BYTES: Final = 8


class RingBuffer:
    """The consumer's side of one BPF_MAP_TYPE_RINGBUF; there may be only one consumer.

    `fd` is readable for epoll while records wait.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map the ring of a map with max_entries `size_bytes`; the caller keeps and closes `fd`."""
        self.fd = fd
        self._mask = size_bytes - 1
        both = mmap.PROT_READ | mmap.PROT_WRITE
        self._consumer_page = map_pages(fd, mmap.PAGESIZE, both)
        # The kernel maps the data twice in a row, so that no record is cut at the end.
        length = mmap.PAGESIZE + 2 * size_bytes
        self._data_pages = map_pages(fd, length, mmap.PROT_READ, offset_bytes=mmap.PAGESIZE)
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._data_pages)[: mmap.PAGESIZE].cast("Q")
        self._data = memoryview(self._data_pages)[mmap.PAGESIZE :]

    def records(self) -> Iterator[bytes]:
        """Everything that waits, oldest first; asking for the next frees the one before."""
        position = self._consumer[0]
        while position < self._producer[0]:
            at = position & self._mask
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length & _BUSY:
                return  # reserved, not yet written: its commit wakes us again
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                yield bytes(self._data[at + _HEADER_BYTES : at + _HEADER_BYTES + size])
            position += (size + _HEADER_BYTES + 7) & ~7
            self._consumer[0] = position

    def close(self) -> None:
        """Unmap the ring; the descriptor stays open."""
        for view in (self._consumer, self._producer, self._data):
            view.release()
        self._consumer_page.close()
        self._data_pages.close()
