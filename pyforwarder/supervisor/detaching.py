"""`up --detach`: the command returns once the daemon listens, or with its error."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.children import detach

if TYPE_CHECKING:
    from pyforwarder.runtime.environment import Environment
    from pyforwarder.supervisor import UpOptions

_MOST_REPORT_BYTES: Final = 65536


class RunnableDaemon(Protocol):
    """What is started in the background."""

    def run(self, on_ready: Callable[[str], None] | None = None) -> int: ...


class DetachedError(ForwarderError):
    """The daemon could not start; carries its exit code to this side."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def detached(
    env: Environment,
    options: UpOptions,
    make: Callable[[Environment, UpOptions], RunnableDaemon],
    *,
    has_output: bool = False,
) -> str:
    """Run the daemon in a session of its own; returns once it accepts connections.

    The result is what an operator is to know of the daemon before; empty: nothing.

    `has_output`: `make` has given it a standard output and error that are not the caller's.

    Raises:
        DetachedError: it said why it cannot start.
    """
    env.stdout.flush()
    env.stderr.flush()
    read_fd, write_fd = os.pipe()

    def child() -> int:
        os.close(read_fd)
        return _background(env, options, make, write_fd, has_output=has_output)

    detach(child)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as report:
        # One line, not up to the end: the workers were forked with the other end open, and
        # there is no end before theirs.
        line = report.readline(_MOST_REPORT_BYTES)
    if not line:
        raise DetachedError("the daemon ended without a word", 1)
    result = json.loads(line)
    if result["error"]:
        raise DetachedError(result["error"], result["exit_code"])
    return str(result["remark"])


def _background(
    env: Environment,
    options: UpOptions,
    make: Callable[[Environment, UpOptions], RunnableDaemon],
    report_fd: int,
    *,
    has_output: bool,
) -> int:
    def report(error: str, exit_code: int, remark: str = "") -> None:
        said = {"error": error[:8192], "exit_code": exit_code, "remark": remark}
        os.write(report_fd, json.dumps(said).encode() + b"\n")
        os.close(report_fd)

    reported = False

    def ready(remark: str) -> None:
        nonlocal reported
        reported = True
        if not has_output:
            _leave_terminal()
        report("", 0, remark)

    try:
        return make(env, options if has_output else replace(options, detach=True)).run(ready)
    except ForwarderError as error:
        if not reported:
            report(str(error), error.exit_code)
        return error.exit_code
    except BaseException as error:
        # This is a copy of the caller's process: it must not unwind into the caller's code.
        traceback.print_exc()
        if not reported:
            report(f"internal error: {type(error).__name__}: {error}", 1)
        return 1


def _leave_terminal() -> None:
    """Let go of the terminal; standard error goes to the instance's log by now."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
