"""Every error that pyforwarder raises on purpose, and the exit code each one means.

A peer's fault never becomes one of these: it ends one connection with a `CloseReason`.
"""

from __future__ import annotations

import os


class ForwarderError(Exception):
    """Base of all errors; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(ForwarderError):
    """The configuration cannot be used; nothing was changed.

    `path` is the key as a user writes it (`listeners[2].bind`), `line` counts from 1, `source` is
    the file.
    """

    exit_code = 2

    def __init__(
        self, reason: str, *, path: str = "", line: int | None = None, source: str = ""
    ) -> None:
        where = ", ".join(part for part in (source, f"line {line}" if line else "", path) if part)
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.path = path
        self.line = line
        self.source = source


class DatapathError(ForwarderError):
    """A kernel operation of a datapath failed; `errno` is the kernel's word for why."""

    def __init__(self, operation: str, errno: int) -> None:
        super().__init__(f"{operation}: {os.strerror(errno)}")
        self.operation = operation
        self.errno = errno


class LoadError(ForwarderError):
    """A BPF program could not be compiled, loaded or attached.

    `advice` tells the user what to do; `log` is the whole compiler or verifier output.
    """

    def __init__(self, operation: str, *, advice: str = "", log: str = "") -> None:
        tail = [line for line in log.strip().splitlines() if line.strip()][-6:]
        parts = [operation, *(f"    {line}" for line in tail), advice]
        super().__init__("\n".join(part for part in parts if part))
        self.operation = operation
        self.advice = advice
        self.log = log


class NotRunningError(ForwarderError):
    """No daemon of this instance answers."""

    exit_code = 3


class AlreadyRunningError(ForwarderError):
    """Another daemon holds this instance's lock."""


class ControlError(ForwarderError):
    """The daemon understood the request and refused it."""


class InternalError(ForwarderError):
    """The daemon failed over a request; a fault of ours, told to its log with a traceback."""


class UsageError(ForwarderError):
    """The arguments of a command or of a request to the daemon cannot be used."""

    exit_code = 2


class RefusedError(ForwarderError):
    """A forwarder refused to connect us; `code` is its word for why (`denied`, `refused`, ...)."""

    def __init__(self, destination: str, code: str) -> None:
        super().__init__(f"{destination}: the forwarder says {code!r}")
        self.destination = destination
        self.code = code
