"""Numbers in memory that is shared, written with one store each.

`struct.pack_into` and slices write zeros first, or byte by byte: a BPF program or
another process that reads meanwhile may find anything, and so may the successor of a process that
was killed there.
"""

from __future__ import annotations

import ctypes
from typing import Any


def store32(memory: Any, at: int, number: int) -> None:
    """32 bits, at a multiple of four."""
    ctypes.c_uint32.from_buffer(memory, at).value = number


def store64(memory: Any, at: int, number: int) -> None:
    """64 bits, at a multiple of eight."""
    ctypes.c_uint64.from_buffer(memory, at).value = number
