"""What a kernel's log complains of: warnings, bugs, oopses. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# `WARNING: CPU: 0 PID: 1 at net/...`, on newer kernels `WARNING: net/x.c:159 at ...`; not
# `Spectre V2 : WARNING: ...`, which is advice.
_COMPLAINT: Final = re.compile(
    r"(?:^|[\]\s])(?:WARNING: (?:CPU: \d|\S+:\d+ at )|(?:kernel )?BUG[: ]|Oops: |refcount_t: "
    r"|general protection fault|possible (?:circular|recursive) locking)"
)
# Once per boot, after pairs with a backlog both ways have ended: a race of the kernel's own
# accounting (bpf/README.md).
_KNOWN: Final = re.compile(r"WARNING: .*\binet_sock_destruct\b")


def complaints(log: Iterable[str]) -> list[str]:
    """The lines that are none of those that are known."""
    return [line for line in log if _COMPLAINT.search(line) and not _KNOWN.search(line)]
