"""Being told that a file was written and closed: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Final

_CLOSE_WRITE: Final = 0x8
_EVENT: Final = struct.Struct("=iIII")  # watch, mask, cookie, length of the name behind it
_READ_BYTES: Final = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches files (not directories) for the close of a descriptor that could write."""

    def __init__(self) -> None:
        """Raises OSError: the user's limit of instances is reached."""
        self.fd: int = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, path: Path) -> int:
        """The watch's number; it follows the file, also when that is renamed."""
        return _checked(_libc.inotify_add_watch(self.fd, os.fsencode(path), _CLOSE_WRITE))

    def forget(self, watch: int) -> None:
        """No more events of this watch but those that wait already."""
        _libc.inotify_rm_watch(self.fd, watch)

    def closed(self) -> list[int]:
        """The watches of files closed since the last call; -1 among them: some were lost."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return []
        watches = []
        at = 0
        while at < len(data):
            watch, mask, _, name_bytes = _EVENT.unpack_from(data, at)
            at += _EVENT.size + name_bytes
            if mask & _CLOSE_WRITE or watch < 0:
                watches.append(watch)
        return watches

    def close(self) -> None:
        """Close the descriptor and every watch with it."""
        os.close(self.fd)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
