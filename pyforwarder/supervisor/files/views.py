"""The view: iterators that print the tables, pinned as files in bpffs.

    BPFFS/NAME/show        one line per pair
    BPFFS/NAME/stats       totals
    BPFFS/NAME/listeners   one line per listener
    BPFFS/NAME/version     who made them (pins.py)

Reading a pin runs its program in the kernel, on the tables as they are at that moment. The
daemon has no part in it: the files are readable while it is busy, and after it was killed, when
the header says so. bpf/view.c is the other half, and view_walks.py has the two walks that make it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Backlog
from pyforwarder.datapath.ebpf.arrays import LISTENER_LINES, STAT_LINES, Arrays, Line, LineTable
from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.tables import COLUMNS
from pyforwarder.supervisor.files import bpffs, pins
from pyforwarder.supervisor.files.view_walks import FILES, WALKS, Links, Walk, link
from pyforwarder.supervisor.requests.report import Backlogs

if TYPE_CHECKING:
    from pyforwarder.datapath.sockmap.maps import KernelMaps
    from pyforwarder.supervisor.files.pins import Found

_COLUMNS: Final = {
    "show": COLUMNS["pairs"],
    "stats": COLUMNS["stats"],
    "listeners": COLUMNS["listeners"],
}
# The names of its first two columns.
_HEADER_BYTES: Final = 40
# Cannot be in an instance's name, and bpffs takes it (it refuses dots).
_NEW: Final = "~new"


class View:
    """The loaded iterators of one daemon, pinned or not."""

    def __init__(self, arrays: Arrays, links: Links) -> None:
        self._links = links
        self._stats = LineTable(arrays.stats_fd, STAT_LINES)
        self._listeners = LineTable(arrays.listeners_fd, LISTENER_LINES)
        self._directory: Path | None = None

    @classmethod
    def load(
        cls,
        arrays: Arrays,
        maps: KernelMaps | None,
        *,
        workers: int,
        slots: int,
        walks: Sequence[Walk] = WALKS,
    ) -> View:
        """Load the programs and link them; the caller pins and closes the view.

        Raises:
            LoadError: this host cannot, by any of the walks.
        """
        return cls(arrays, link(arrays, maps, walks, workers=workers, slots=slots))

    @property
    def walk(self) -> Walk:
        """The kind of iterators by which the view is made."""
        return self._links.walk

    def why_no_other(self) -> str:
        """What the kernel said of the walks that come before; the kernel is asked again."""
        kinds = {walk.kind for walk in WALKS}
        refused = [r for r in self._links.refused if r.kind in kinds]
        return "; ".join(str(r.error()) for r in refused)

    def pin(self, directory: Path) -> None:
        """Give the iterators their names; what a dead daemon left under them goes.

        Each name changes hands at once: a reader finds the old file or the new one. The caller
        holds the instance's lock.

        Raises:
            ForwarderError: no bpffs, or it refuses, or one of the names is another program's.
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
            for name, fd in self._links.files.items():
                bpf.pin(fd, new / name)
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

    def read(self, name: str) -> str:
        """Return what a file says now, pinned or not. Raises OSError."""
        return bpf.read_link(self._links.files[name]).decode()

    def backlogs(self) -> Backlogs:
        """What waits in the kernel now.

        Raises:
            ControlError: the kernel could not be asked just now (ENOMEM).
        """
        try:
            data = b"".join(map(bpf.read_link, self._links.backlogs))
        except OSError as error:
            raise ControlError(f"read the backlogs: {error.strerror}") from error
        size = ctypes.sizeof(Backlog)
        records = [Backlog.from_buffer_copy(data, at) for at in range(0, len(data), size)]
        return Backlogs(
            {(record.slot, record.direction): record.bytes for record in records},
            is_complete=self._links.tells_all_backlogs,
        )

    def close(self) -> None:
        """Close the descriptors; pinned iterators live on."""
        self._stats.close()
        self._listeners.close()
        for fd in self._links.opened:
            os.close(fd)


def remove_stale(directory: Path) -> Found:
    """Remove what a daemon that was killed has left there, of any version; what was there.

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
