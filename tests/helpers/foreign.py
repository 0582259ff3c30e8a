"""Somebody else's program at an interface, which gives all packets another mark: see foreign.c."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from tests.helpers.first_program import first_at

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Side
    from tests.helpers.netns import Network

# Marked packets that pass: a host that makes more of them than this in a test makes them for ever.
MOST: Final = 20_000


class _Record(ctypes.Structure):
    """Mirrors `struct foreign`."""

    _fields_ = (
        ("mark", ctypes.c_uint32),
        ("all", ctypes.c_uint32),
        ("most", ctypes.c_uint64),
        ("marked", ctypes.c_uint64),
    )


class Foreign:
    """One program, and one count of packets, for all interfaces that it is at."""

    def __init__(self) -> None:
        size = ctypes.sizeof(_Record)
        self._fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=size, entries=1)
        self._map = bpf.Map(self._fd, key_bytes=4, value_bytes=size)
        (self._program_fd,) = load_programs(
            str(Path(__file__).with_name("foreign.c")),
            [("rewrite", "sched_cls")],
            defines={},
            maps={"MAP_FOREIGN_FD": self._fd},
        )

    @contextlib.contextmanager
    def at(
        self, *doors: tuple[Network, str, Side], mark: int = 0, all_else: bool = False
    ) -> Iterator[None]:
        """In front of all that is there besides, packets get this mark meanwhile.

        With `all_else` also another hash, priority and index of traffic control.
        """
        self._map.update(bytes(4), bytes(_Record(mark=mark, all=all_else, most=MOST)))
        with first_at(self._program_fd, *doors):
            yield

    @property
    def marked(self) -> int:
        """How many packets came there that somebody else had marked."""
        return int(_Record.from_buffer_copy(self._map.lookup(bytes(4))).marked)

    def close(self) -> None:
        """Nobody is there any more."""
        os.close(self._program_fd)
        os.close(self._fd)


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """One until the end of the block."""
    with contextlib.closing(Foreign()) as made:
        yield made
