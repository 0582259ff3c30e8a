"""Memory that processes share, of which each may write only its own part.

A process that a stranger has taken over can do to its memory what it likes, so what it may write is
decided by how the kernel has mapped it: a descriptor that is open for reading gives pages that
mprotect(2) does not make writable (mmap(2), EACCES). And no descriptor stays with the pages, as
more could be mapped by it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

_MAP_FIXED: Final = 0x10
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)


class _Block(NamedTuple):
    """Where a block is."""

    fd: int
    read_fd: int  # cannot write
    offset_bytes: int


class SharedBlocks:
    """Blocks of memory, one for each worker: a worker writes its own, and reads those of all."""

    def __init__(self, block_bytes: int, blocks: Sequence[_Block], owned: Collection[int]) -> None:
        self.block_bytes = block_bytes
        self._blocks = blocks
        self._owned = owned

    @classmethod
    def make(cls, name: str, count: int, block_bytes: int) -> SharedBlocks:
        """New memory, full of zeros; `name` is seen in /proc/PID/maps.

        A file for each block: a mapping can be made longer (mremap(2)), but not beyond its file.
        """
        fds = []
        for _ in range(count):
            fd = os.memfd_create(f"pyforwarder-{name}", os.MFD_CLOEXEC)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, block_bytes)
            fds.append(fd)
        return cls.inherited(fds, block_bytes)

    @classmethod
    def inherited(cls, fds: Sequence[int], block_bytes: int) -> SharedBlocks:
        """Blocks that another process has made (`fds` of it); the descriptors are ours to close.

        Raises:
            ValueError: one is no memory of that size; the descriptors stay the caller's.
        """
        for fd in fds:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != block_bytes:
                raise ValueError(f"no shared memory of {block_bytes} bytes")
        blocks = [
            _Block(fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC), 0) for fd in fds
        ]
        return cls(block_bytes, blocks, [fd for block in blocks for fd in block[:2]])

    @classmethod
    def over(cls, fd: int, count: int, block_bytes: int) -> SharedBlocks:
        """The values of an F_MMAPABLE array, whose descriptor stays the caller's.

        `block_bytes` are whole pages. What is mapped of it for reading stays so, and no mapping
        gets longer (bpf_map_mmap() in kernel/bpf/syscall.c, remap_vmalloc_range()).
        """
        return cls(block_bytes, [_Block(fd, fd, n * block_bytes) for n in range(count)], ())

    @property
    def fds(self) -> list[int]:
        """Descriptors by which another process may have the same blocks; they stay ours."""
        return [block.fd for block in self._blocks]

    def map(self, *, writable: Collection[int]) -> list[mmap.mmap]:
        """All blocks, those of these workers for writing; the caller closes them."""
        return [
            map_pages(
                block.fd if worker in writable else block.read_fd,
                self.block_bytes,
                mmap.PROT_READ | (mmap.PROT_WRITE if worker in writable else 0),
                offset_bytes=block.offset_bytes,
            )
            for worker, block in enumerate(self._blocks)
        ]

    def map_all(self) -> list[mmap.mmap]:
        """All blocks, for writing."""
        return self.map(writable=range(len(self._blocks)))

    def close(self) -> None:
        """Close the descriptors; what is mapped stays."""
        for fd in self._owned:
            os.close(fd)


def map_pages(fd: int, length_bytes: int, access: int, *, offset_bytes: int = 0) -> mmap.mmap:
    """Shared memory without a descriptor; the caller closes it.

    An mmap of Python's keeps a duplicate of its descriptor. A process that may only see these pages
    could map all the others by it, so /dev/null is put in its place. (Not while another thread may
    open something.)
    """
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    # A collection meanwhile may close descriptors, and another number would be the lowest.
    collects = gc.isenabled()
    gc.disable()
    try:
        # The lowest that is free, so the one that the duplicate will get.
        duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        os.close(duplicate)
        memory = mmap.mmap(fd, length_bytes, mmap.MAP_SHARED, access, offset=offset_bytes)
        names = [os.readlink(f"/proc/self/fd/{one}") for one in (fd, duplicate)]
        if names[0] == names[1]:
            os.dup2(null, duplicate, inheritable=False)
    finally:
        if collects:
            gc.enable()
        os.close(null)
    return memory


def keep_memory(kept: Iterable[mmap.mmap]) -> None:
    """Keep only this of the memory that the process shares with others for writing; called in a
    forked child.

    The rest becomes its own, and zero: what of our objects still refers to it does no harm.
    """
    kept_at = {ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in kept}
    for start, end in _shared_for_writing():
        if start in kept_at:
            continue
        access = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        if _libc.mmap(start, end - start, access, flags, -1, 0) != start:
            code = ctypes.get_errno()
            raise OSError(code, f"give up shared memory: {os.strerror(code)}")


def _shared_for_writing() -> list[tuple[int, int]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _ = line.split(" ", 2)
        if "w" in access and access.endswith("s"):
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found
