"""What the kernel says while a test runs."""

from __future__ import annotations

import os


class KernelLog:
    """The records that come after this was made, from /dev/kmsg; needs root."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """Those since the last call (Documentation/ABI/testing/dev-kmsg)."""
        found: list[str] = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:
                continue  # the oldest were overwritten
            found.append(record.partition(";")[2].partition("\n")[0])

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
