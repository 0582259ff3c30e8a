"""Run one command line in this process, in a world made for it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyforwarder.cli import main
from pyforwarder.runtime.environment import Environment
from tests.helpers.fake_control import environ

UNIX_TIME_S: Final = 1_700_000_000.5


class Stdout(io.StringIO):
    """A stdout that says whether it is a terminal."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str
    raw: bytes  # what went to the descriptor itself


def run(
    root: Path,
    *words: str,
    stdin: bytes = b"",
    sleep: Callable[[float], None] | None = None,
    is_terminal: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Done:
    """`pyforwarder WORDS...` for instances below `root`; sleeping is an error unless `sleep`."""

    def may_not_sleep(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    stdout, stderr = Stdout(is_terminal=is_terminal), io.StringIO()
    in_fd, out_fd = os.memfd_create("stdin"), os.memfd_create("stdout")
    kept_fd = os.dup(out_fd)  # `connect` puts /dev/null in the place of its stdout at the end
    try:
        os.write(in_fd, stdin)
        os.lseek(in_fd, 0, os.SEEK_SET)
        code = main(
            words,
            Environment(
                stdin_fd=in_fd,
                stdout_fd=out_fd,
                stdout=stdout,
                stderr=stderr,
                environ={**environ(root), **(variables or {})},
                monotonic_s=lambda: 0.0,
                unix_time_s=lambda: UNIX_TIME_S,
                sleep=sleep or may_not_sleep,
            ),
        )
        raw = os.pread(kept_fd, 1 << 20, 0)
        return Done(code, stdout.getvalue(), stderr.getvalue(), raw)
    finally:
        os.close(in_fd)
        os.close(out_fd)
        os.close(kept_fd)
