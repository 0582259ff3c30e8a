"""The log of a daemon in the background: RUN_DIR/NAME/log, which lies in memory as /run does.

So it has a limit: beyond it, what was written becomes `log.1`, and the one before that goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 8 << 20
# Between two looks: at the most lines that there can be (worker/log.py), a few hundred KiB each.
LOOK_S: Final = 10.0


def open_log(path: Path) -> int:
    """The file, open for lines at its end; the caller closes it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def keep_small(path: Path, *, most_bytes: int = MOST_BYTES) -> None:
    """Begin anew if it has grown too large; never raises.

    Copied and cut rather than renamed: workers write to the file that they inherited. A line that
    is written between the two is lost.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size <= most_bytes:
            return
        before = path.with_name(f"{path.name}.1")
        before.unlink(missing_ok=True)
        fd = os.open(before, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as copy, path.open("rb") as log:
            shutil.copyfileobj(log, copy)
        os.truncate(path, 0)
