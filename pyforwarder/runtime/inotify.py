"""Being told that a file was written and closed: inotify(7)."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from inotify_simple import INotify, flags

if TYPE_CHECKING:
    from pathlib import Path

# The queue is full, and the kernel has dropped events: it says so as an event of the watch -1.
_TOLD_OF: Final = int(flags.CLOSE_WRITE | flags.Q_OVERFLOW)


class Inotify:
    """Watches files (not directories) for the close of a descriptor that could write."""

    def __init__(self) -> None:
        """The first in a process runs ldconfig(8), by which the library finds libc: milliseconds.

        Raises:
            OSError: the user's limit of instances is reached.
        """
        # Closed by number alone. A forked process closes what is not its own so, and the object,
        # of which it has a copy, would close another descriptor of that number later.
        self._kernel = INotify(nonblocking=True, closefd=False)
        self.fd: int = self._kernel.fileno()

    def watch(self, path: Path) -> int:
        """The watch's number; it follows the file, also when that is renamed."""
        return int(self._kernel.add_watch(path, flags.CLOSE_WRITE))

    def forget(self, watch: int) -> None:
        """End a watch: only events that wait already still come."""
        with contextlib.suppress(OSError):  # it has ended with its file
            self._kernel.rm_watch(watch)

    def closed(self) -> list[int]:
        """The watches of files closed since the last call; -1 among them: some were lost."""
        return [event.wd for event in self._kernel.read(timeout=0) if event.mask & _TOLD_OF]

    def close(self) -> None:
        """Close the descriptor and every watch with it."""
        os.close(self.fd)
