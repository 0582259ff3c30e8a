"""Work that several processes do at once."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_processes(count: int, action: Callable[[int], None]) -> None:
    """Run `action(n)` in that many children at once, each with its number."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                action(number)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * count
