"""The BPF arrays that hold what everybody looks at: pair records, counters, the view's lines.

They are made whenever the kernel lets us, for every datapath, because the view prints from
them. Where it does not, anonymous shared memory takes their place, and the daemon itself prints.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Final

from pyforwarder.datapath.ebpf import refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, LineKind, ViewLine
from pyforwarder.runtime.counters import BLOCK_BYTES, BLOCK_WORDS
from pyforwarder.runtime.shared_memory import SharedBlocks

# What `stats` has to say is fixed; a listener beyond this many is missing in the kernel's file.
STAT_LINES: Final = 128
LISTENER_LINES: Final = 1024

_LINE_BYTES: Final = ctypes.sizeof(ViewLine)


def create_pairs(slots: int) -> int:
    """A pair table alone, where nothing is shown; the caller closes it.

    Raises:
        OSError: the kernel does not let us.
    """
    return bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=PAIR_BYTES,
        entries=slots,
        flags=bpf.F_MMAPABLE,
    )


@dataclass(frozen=True, slots=True)
class Arrays:
    """Descriptors; memory mapped from them lives on after `close`."""

    pairs_fd: int
    counters_fd: int
    stats_fd: int
    listeners_fd: int

    @classmethod
    def create(cls, *, workers: int, slots: int) -> Arrays:
        """Make them, for that many pairs per worker.

        Raises:
            LoadError: the kernel does not let us; none is left open.
        """
        fds: list[int] = []
        try:
            for name, value_bytes, entries in (
                ("pf_pairs", PAIR_BYTES, workers * slots),
                ("pf_counters", 8, workers * BLOCK_WORDS),
                ("pf_stats", _LINE_BYTES, STAT_LINES),
                ("pf_listeners", _LINE_BYTES, LISTENER_LINES),
            ):
                fds.append(
                    bpf.create_map(
                        bpf.MapType.ARRAY,
                        name=name,
                        key_bytes=4,
                        value_bytes=value_bytes,
                        entries=entries,
                        flags=bpf.F_MMAPABLE,
                    )
                )
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise refusal.explain(
                "create the BPF maps of the view", error.errno or 0, needs=refusal.TRACING
            ) from error
        return cls(*fds)

    def counters_memory(self, workers: int) -> SharedBlocks:
        """The counters as memory, for `Counters`."""
        return SharedBlocks.over(self.counters_fd, workers, BLOCK_BYTES)

    def close(self) -> None:
        """Close the descriptors; a pinned view keeps the arrays alive."""
        for fd in (self.pairs_fd, self.counters_fd, self.stats_fd, self.listeners_fd):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the view's `stats` or `listeners`; texts are escaped as in a table's cell."""

    kind: LineKind
    name: str
    word: int = 0
    text: str = ""
    protocol: str = ""
    also: int = 0  # a word that is added to the first; 0: none


class LineTable:
    """The lines of one array, for the supervisor to write while others read."""

    def __init__(self, fd: int, lines: int) -> None:
        """Map the array; `fd` stays the caller's."""
        length = -(-lines * _LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = bpf.map_memory(fd, length, write=True)
        self._lines = lines

    def write(self, lines: list[Line]) -> int:
        """Put these in place of all there were; how many found room."""
        kept = lines[: self._lines]
        for number in range(self._lines):
            line = kept[number] if number < len(kept) else None
            self._write(number, line)
        return len(kept)

    def _write(self, number: int, line: Line | None) -> None:
        record = ViewLine.from_buffer(self._memory, number * _LINE_BYTES)
        if line is None and record.kind == LineKind.NONE:
            return
        record.sequence += 1  # odd: readers look again
        record.kind = LineKind.NONE if line is None else line.kind
        if line is not None:
            record.word, record.also = line.word, line.also
            record.name = line.name.encode()[: ViewLine.name.size - 1]
            record.text = line.text.encode()[: ViewLine.text.size - 1]
            record.protocol = line.protocol.encode()[: ViewLine.protocol.size - 1]
        record.sequence += 1

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()
