"""The world a command runs in, as one value that is passed to every command.

Nothing below the command line reaches for `sys.stdout`, `os.environ` or a clock: tests hand in
an `Environment` of their own instead of patching modules.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from pyforwarder.runtime.tables import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Environment:
    """Streams, variables and clocks of one command.

    Data goes to `stdout`, words to `stderr`.  `stdin_fd` and `stdout_fd` are for raw bytes
    (`connect`, `token`); a command that uses both `stdout` and `stdout_fd` flushes between.
    """

    stdin_fd: int
    stdout_fd: int
    stdout: TextIO
    stderr: TextIO
    environ: Mapping[str, str]
    monotonic_s: Callable[[], float]  # for every deadline and rate
    unix_time_s: Callable[[], float]  # for expiry dates only, never for a wait
    sleep: Callable[[float], None]

    @classmethod
    def of_process(cls) -> Environment:
        """The real one: this process's streams, variables and clocks."""
        return cls(
            stdin_fd=0,
            stdout_fd=1,
            stdout=sys.stdout,
            stderr=sys.stderr,
            environ=os.environ,
            monotonic_s=time.monotonic,
            unix_time_s=time.time,  # noqa: TID251 - the one place that hands out the wall clock
            sleep=time.sleep,
        )

    def say(self, words: str) -> None:
        """Write one line of words (not data) to stderr."""
        print(visible(words), file=self.stderr, flush=True)
