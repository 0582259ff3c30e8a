"""How much memory the machine and a tree of processes hold."""

from __future__ import annotations

from pathlib import Path

import psutil


def machine_used_bytes() -> int:
    """Memory that is neither free nor could be dropped: processes, sockets, queues, shared maps.

    Source: proc_meminfo(5). Shared memory is listed under `Cached`, but cannot be dropped.
    """
    fields = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    droppable = fields["Buffers"] + fields["Cached"] - fields["Shmem"] + fields["SReclaimable"]
    return fields["MemTotal"] - fields["MemFree"] - droppable


def tree_bytes(pid: int) -> int:
    """The proportional set size of a process and all its descendants, 0 when it is gone.

    Proportional: a page shared by ten of them counts once in the sum.
    """
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        total += sum(int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith("Pss:"))
    return total
