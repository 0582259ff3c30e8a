"""Memory that processes share: what may be written is decided by the kernel."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyforwarder.runtime.shared_memory import SharedBlocks, keep_memory
from tests.helpers.forks import in_processes

LENGTH = 1 << 16
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p


def address_of(memory: mmap.mmap) -> ctypes.c_void_p:
    """Also of what cannot be written, which ctypes itself does not tell."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    wanted = bytes(memory[:8])
    for line in lines:
        start, _, _ = line.partition("-")
        if "pyforwarder-test" in line and ctypes.string_at(int(start, 16), 8) == wanted:
            return ctypes.c_void_p(int(start, 16))
    raise AssertionError(f"not mapped: {lines}")


def test_a_worker_writes_its_own_block_and_reads_all() -> None:
    shared = SharedBlocks.make("test", 3, LENGTH)
    everything = shared.map_all()

    def act(worker: int) -> None:
        blocks = shared.map(writable=[worker])
        keep_memory([blocks[worker]])
        shared.close()
        blocks[worker][0] = worker + 1
        for other in range(3):
            if other != worker:
                with pytest.raises(TypeError):
                    blocks[other][0] = 9
        # What it has inherited for writing is its own now, and zero.
        everything[(worker + 1) % 3][1] = 9
        assert everything[worker][0] == 0

    in_processes(3, act)
    assert [block[0] for block in everything] == [1, 2, 3]
    assert [block[1] for block in everything] == [0, 0, 0]
    shared.close()


def test_what_is_mapped_for_reading_does_not_become_writable() -> None:
    shared = SharedBlocks.make("test", 2, LENGTH)
    everything = shared.map_all()
    everything[1][:8] = b"of other"

    def act(_worker: int) -> None:
        blocks = shared.map(writable=[0])
        keep_memory([blocks[0]])
        shared.close()
        at = address_of(blocks[1])
        assert libc.mprotect(at, LENGTH, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
        # Nor does a mapping that is writable reach further than its block.
        longer = libc.mremap(address_of(blocks[0]), LENGTH, 2 * LENGTH, 1)
        if longer != ctypes.c_void_p(-1).value:
            assert kills(lambda: ctypes.string_at(longer + LENGTH, 1))

    in_processes(1, act)
    assert bytes(everything[1][:8]) == b"of other"
    shared.close()


def kills(action: Callable[[], object]) -> bool:
    """Whether it kills a process (SIGBUS: beyond the end of the file)."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # it would tell of it at length
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_no_descriptor_stays() -> None:
    shared = SharedBlocks.make("test", 2, LENGTH)

    def act(_worker: int) -> None:
        kept = shared.map(writable=[0])
        shared.close()
        names = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        assert not [name for name in names if "pyforwarder-test" in name]
        assert len(kept) == 2

    in_processes(1, act)
    shared.close()


def test_blocks_of_another_process_are_the_same_memory() -> None:
    made = SharedBlocks.make("test", 2, mmap.PAGESIZE)
    inherited = SharedBlocks.inherited([os.dup(fd) for fd in made.fds], mmap.PAGESIZE)
    (_, mine), (his, _) = made.map(writable=[1]), inherited.map(writable=[0])
    his[0:3] = b"abc"
    mine[0:3] = b"def"
    assert bytes(made.map(writable=())[0][0:3]) == b"abc"
    assert bytes(inherited.map(writable=())[1][0:3]) == b"def"
    made.close()
    inherited.close()


def test_what_is_no_memory_of_that_size_is_refused() -> None:
    made = SharedBlocks.make("test", 1, mmap.PAGESIZE)
    reader, writer = os.pipe()
    for fds, size in ((made.fds, 2 * mmap.PAGESIZE), ([reader], mmap.PAGESIZE)):
        with pytest.raises(ValueError, match="no shared memory"):
            SharedBlocks.inherited(fds, size)
    for fd in (reader, writer):
        os.close(fd)
    made.close()
