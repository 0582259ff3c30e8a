"""Where a daemon writes its log: standard error, or in the background RUN_DIR/NAME/log.

That file lies in memory as /run does, so it has a limit: beyond it, what was written becomes
`log.1`, and the one before that goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from pyforwarder.worker.log import Log, not_blocking

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config.model import Log as LogConfig
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.runtime.instance import Instance
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor import UpOptions

MOST_BYTES: Final = 8 << 20
# Between two looks: at the most lines that there can be (worker/log.py), a few hundred KiB each.
LOOK_S: Final = 10.0


def begin_log(
    env: Environment, instance: Instance, config: LogConfig, loop: Loop, options: UpOptions
) -> Log:
    """The daemon's log; with `--detach` standard error becomes the instance's file, kept small."""
    if options.detach:
        fd = open_log(instance.log_file)
        os.dup2(fd, 2)
        os.close(fd)
        _keep_small_from_now_on(loop, instance.log_file)
    return Log(
        level=config.level,
        form=config.format,
        fd=not_blocking(2),
        is_timed="JOURNAL_STREAM" not in env.environ,  # journald adds its own
        instance=instance.name,
    )


def _keep_small_from_now_on(loop: Loop, path: Path) -> None:
    keep_small(path)
    loop.after(LOOK_S, lambda: _keep_small_from_now_on(loop, path))


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
