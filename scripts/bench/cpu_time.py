"""How much CPU time a tree of processes has used."""

from __future__ import annotations

import contextlib

import psutil


def tree_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, those that were waited for included.

    A process counts what it does in the kernel, and what comes of it there: over loopback a send
    is also most of the peer's receiving.
    """
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                total += sum(process.cpu_times()[:4])
    return total
