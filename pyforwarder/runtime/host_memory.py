"""How much memory there is for us: this machine's, or less if a control group says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_MEMINFO: Final = re.compile(r"^MemTotal:\s+(\d+) kB$", re.MULTILINE)
_SOCKSTAT: Final = re.compile(rb"^TCP: .*\bmem (\d+)", re.MULTILINE)
# Where nothing can be read: as a small machine.
_UNKNOWN_BYTES: Final = 1 << 30


def available_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or what the control groups that we are in may use, if less.

    Every group above ours limits us too: cgroup v2 (memory.max) and v1 (memory.limit_in_bytes).
    """
    limits = [_UNKNOWN_BYTES]
    found = _MEMINFO.search(_read(root / "proc/meminfo"))
    if found:
        limits = [int(found[1]) * 1024]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        while group.is_relative_to(top):
            text = _read(group / name).strip()
            if text.isdigit():
                limits.append(int(text))
            if group == top:
                break
            group = group.parent
    return min(limits)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def tcp_pages(sockstat: bytes) -> int | None:
    """The pages that TCP sockets of the host hold (proc/net/sockstat); None: it does not say."""
    found = _SOCKSTAT.search(sockstat)
    return int(found[1]) if found else None
