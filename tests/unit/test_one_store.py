"""Numbers in shared memory are the old ones or the new ones, whenever somebody looks."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from pyforwarder.runtime.one_store import store32, store64

PACKAGE: Final = Path(__file__).parents[2] / "pyforwarder"
TIMES: Final = 2_000_000

# Where `struct.pack_into` writes what nobody reads meanwhile, or where what is between the old
# number and the new one says the same as the old one; each says why there, or it is plain.
PACKED: Final = {
    "datapath/ebpf/image.py",  # a program before it is loaded
    "datapath/ebpf/pair_table.py",  # a sequence number says that it is being written
    "datapath/ebpf/syscall.py",  # before the system call
    "datapath/express/numbering.py",  # its state says so
    "datapath/splice/keeper.py",  # a pulse: any change will do
    "datapath/splice/keeper_joining.py",  # before `control` is run
    "datapath/splice/keeper_pairs.py",  # by the keeper, for itself and the next one
    "runtime/pulse.py",  # a pulse
    "runtime/recvmmsg.py",  # before the system call
    "worker/udp/connection_ids.py",  # a way that seems to be forgotten for a moment
    "worker/used_tokens.py",  # 0 is as if it were about to be used
}


def seen_while(store: Callable[[Any, int, int], object], code: str, old: int, new: int) -> set[int]:
    """What another process sees of a number that is changed to and fro."""
    with mmap.mmap(-1, 4096) as memory:
        store(memory, 64, old)
        pid = os.fork()
        if not pid:
            for _ in range(TIMES // 2):
                store(memory, 64, new)
                store(memory, 64, old)
            os._exit(0)
        with memoryview(memory) as whole, whole.cast(code) as numbers:  # type: ignore[call-overload]
            at = 64 // numbers.itemsize
            seen = {numbers[at]}
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                seen.update([numbers[at] for _ in range(10_000)])
        return seen


@pytest.mark.parametrize(("store", "code", "bits"), [(store32, "I", 32), (store64, "Q", 64)])
def test_nobody_sees_anything_in_between(
    store: Callable[[Any, int, int], object], code: str, bits: int
) -> None:
    old, new = 0x1122334455667788 >> (64 - bits), 0xFFEEDDCCBBAA9988 >> (64 - bits)
    assert seen_while(store, code, old, new) <= {old, new}


def test_what_is_written_by_bytes_is_nobody_else_s() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "pack_into(" in path.read_text() and "core" not in path.relative_to(PACKAGE).parts
    }
    assert found == PACKED
