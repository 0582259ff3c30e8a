"""The view: iterators that print the tables, pinned as files in bpffs.

    BPFFS/NAME/show        one line per pair
    BPFFS/NAME/stats       totals
    BPFFS/NAME/listeners   one line per listener
    BPFFS/NAME/version     who made them (pins.py)

Whoever reads a pin runs its program in the kernel, on the tables as they are at that moment. The
daemon has no part in it: the files are readable while it is busy, and after it was killed, when
the header says so. bpf/view.c is the other half.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.counters import BLOCK_WORDS
from pyforwarder.datapath import bpf, btf
from pyforwarder.datapath.abi import Backlog
from pyforwarder.datapath.arrays import LISTENER_LINES, STAT_LINES, Arrays, Line, LineTable
from pyforwarder.datapath.loading import ProgramKind, load_programs
from pyforwarder.errors import ControlError, ForwarderError, LoadError
from pyforwarder.supervisor import bpffs, pins
from pyforwarder.tables import COLUMNS

if TYPE_CHECKING:
    from pyforwarder.datapath.kernel import KernelMaps
    from pyforwarder.supervisor.pins import Found

FILES: Final = ("show", "stats", "listeners")
_COLUMNS: Final = {
    "show": COLUMNS["pairs"],
    "stats": COLUMNS["stats"],
    "listeners": COLUMNS["listeners"],
}
_HEADER_BYTES: Final = 256
# How many may read `stats` at the same moment.
_MOST_READERS: Final = 256
_SUMS_BYTES: Final = (2 + STAT_LINES) * 8  # struct sums
# Cannot be in an instance's name, and bpffs takes it (it refuses dots).
_NEW: Final = "~new"

# Kernel structure fields that the programs read.
_FIELDS: Final = {"tcp_sock": ("write_seq",), "bpf_map": ("writecnt",)}


class View:
    """The loaded iterators of one daemon, pinned or not."""

    def __init__(
        self, arrays: Arrays, links: Mapping[str, int], backlog_link: int, opened: Sequence[int]
    ) -> None:
        self._links = dict(links)
        self._backlog_link = backlog_link
        self._opened = list(opened)
        self._stats = LineTable(arrays.stats_fd, STAT_LINES)
        self._listeners = LineTable(arrays.listeners_fd, LISTENER_LINES)
        self._directory: Path | None = None

    @classmethod
    def load(cls, arrays: Arrays, maps: KernelMaps | None, *, workers: int, slots: int) -> View:
        """Load the programs and link them; the caller pins and closes the view.

        Raises:
            LoadError: this host cannot.
        """
        opened: list[int] = []
        try:
            sums = bpf.create_map(
                bpf.MapType.HASH,
                name="pf_sums",
                key_bytes=8,
                value_bytes=_SUMS_BYTES,
                entries=_MOST_READERS,
                flags=bpf.F_NO_PREALLOC,
            )
            opened.append(sums)
            zero = bpf.create_map(
                bpf.MapType.ARRAY, name="pf_zero", key_bytes=4, value_bytes=_SUMS_BYTES, entries=1
            )
            opened.append(zero)
            fds = {
                "MAP_PAIRS_FD": arrays.pairs_fd,
                "MAP_COUNTERS_FD": arrays.counters_fd,
                "MAP_STATS_FD": arrays.stats_fd,
                "MAP_SUMS_FD": sums,
                "MAP_ZERO_FD": zero,
            }
            programs: list[tuple[str, ProgramKind]] = [(name, "map_iterator") for name in FILES]
            if maps is not None:
                fds |= {"MAP_SOCKETS_FD": maps.sockets_fd, "MAP_ENDS_FD": maps.ends_fd}
                programs.append(("backlog", "socket_iterator"))
            loaded = load_programs(
                "view.c",
                programs,
                defines={
                    **btf.defines(btf.field_offsets(_FIELDS)),
                    **fds,
                    "WORKERS": workers,
                    "SLOTS": slots,
                    "BLOCK_WORDS": BLOCK_WORDS,
                    "STAT_LINES": STAT_LINES,
                },
                map_fds=list(fds.values()),
            )
            opened += loaded
            targets = [arrays.pairs_fd, arrays.pairs_fd, arrays.listeners_fd]
            if maps is not None:
                targets.append(maps.sockets_fd)
            links = []
            for program, target in zip(loaded, targets, strict=True):
                links.append(bpf.link_iterator(program, target))
                opened.append(links[-1])
            return cls(
                arrays,
                dict(zip(FILES, links, strict=False)),
                links[3] if maps is not None else -1,
                opened,
            )
        except (LoadError, OSError) as error:
            for fd in opened:
                os.close(fd)
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"make the view: {error.strerror}") from error

    def pin(self, directory: Path) -> None:
        """Give the iterators their names; what a dead daemon left under them goes.

        Each name changes hands at once: a reader finds the old file or the new one. The caller
        holds the instance's lock.

        Raises:
            ForwarderError: no bpffs, or it refuses, or one of the names is somebody else's.
                Nothing is left in a directory of ours, and nothing of others has changed.
        """
        bpffs.enter(directory.parent)
        taken = {*FILES, pins.STAMP}.intersection(_survey(directory).foreign)
        if taken:
            names = ", ".join(str(directory / name) for name in sorted(taken))
            raise ForwarderError(f"{names}: not made by pyforwarder; remove it, then `up` again")
        self._directory = directory
        new = directory.parent / (directory.name + _NEW)
        try:
            pins.remove(_survey(new))
            new.mkdir(mode=0o755)
            stamp = pins.stamp_of(FILES)
            pins.write_stamp(new, stamp)
            for name, link in self._links.items():
                bpf.pin(link, new / name)
                (new / name).chmod(0o400)
            if directory.is_dir():
                # Another's pins may stand beside ours, so file by file.
                pins.write_stamp(directory, stamp)
                for name in FILES:
                    (new / name).rename(directory / name)
                pins.remove(_survey(new))
            else:
                new.rename(directory)
        except OSError as error:
            pins.remove(_survey(new))
            self.unpin()
            raise ForwarderError(f"pin the view in {directory}: {error.strerror}") from error

    def unpin(self) -> None:
        """Remove the names that are still there, and what `pin` made for them; never raises."""
        if self._directory is not None:
            pins.remove(_survey(self._directory))
            bpffs.leave(self._directory.parent)
            self._directory = None

    def set_stats(self, lines: list[Line]) -> None:
        """What `stats` says, in this order."""
        self._stats.write(lines)

    def set_listeners(self, lines: list[Line]) -> int:
        """What `listeners` says, in this order; how many of them found room."""
        return self._listeners.write(lines)

    def backlogs(self) -> dict[tuple[int, int], int]:
        """Bytes that wait in the kernel now, by slot (of the whole table) and direction.

        Only directions in which some wait are in it.

        Raises:
            ControlError: the kernel could not be asked just now (ENOMEM).
        """
        if self._backlog_link < 0:
            return {}
        try:
            said = bpf.read_link(self._backlog_link)
        except OSError as error:
            raise ControlError(f"read the backlogs: {error.strerror}") from error
        size = ctypes.sizeof(Backlog)
        records = [Backlog.from_buffer_copy(said, at) for at in range(0, len(said), size)]
        return {(record.slot, record.direction): record.bytes for record in records}

    def close(self) -> None:
        """Close the descriptors; pinned iterators live on."""
        self._stats.close()
        self._listeners.close()
        for fd in self._opened:
            os.close(fd)


def remove_stale(directory: Path) -> Found:
    """Remove what a daemon that was killed has left there, whatever its version; what was there.

    The caller holds the lock.
    """
    pins.remove(_survey(directory.parent / (directory.name + _NEW)))
    found = _survey(directory)
    pins.remove(found)
    return found


def _survey(directory: Path) -> Found:
    return pins.survey(directory, FILES, _is_ours)


def _is_ours(path: Path) -> bool:
    """Whether the file begins as ours of that name does, in every version (columns are only added).

    Reading it is all that is needed for this: no privilege, and no kernel that tells of links.
    """
    try:
        with path.open("rb", buffering=0) as file:
            words = file.read(_HEADER_BYTES).decode(errors="replace").split()
    except OSError:  # EIO: a map, a program, a link of another kind
        return False
    return words[:2] == list(_COLUMNS[path.name][:2])
