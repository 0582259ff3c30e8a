"""Every error that pyforwarder raises on purpose, and the exit code each one means.

A peer's fault never becomes one of these: it ends one connection with a `CloseReason`.
"""

from __future__ import annotations

import enum
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


class Refusal(enum.StrEnum):
    """Why a BPF program or map could not be had."""

    BCC = "bcc"  # there is none, or another project of that name
    COMPILER = "compiler"
    CAPABILITIES = "capabilities"  # this process lacks some
    CONFINED = "confined"  # a user namespace or a seccomp filter stands before bpf(2)
    PROGRAM_TYPE = "program type"  # this kernel refuses any of the kind to everybody
    TOO_OLD = "too old"  # the kernel does not know it
    REALTIME = "realtime"  # the kernel may interrupt a program by another of the same processor
    VERIFIER = "verifier"
    MEMORY = "memory"
    TIMEOUT = "timeout"
    SELF_TEST = "self-test"  # it loaded, and did not do what it should
    OTHER = "other"


class LoadError(ForwarderError):
    """A BPF program could not be compiled, loaded or attached.

    `cause` is why, `advice` tells the user what to do; `log` is the whole compiler or verifier
    output, which the text, one line, does not have.
    """

    def __init__(
        self,
        operation: str,
        *,
        cause: Refusal = Refusal.OTHER,
        advice: str = "",
        log: str = "",
    ) -> None:
        super().__init__("; ".join(part for part in (operation, advice) if part))
        self.operation = operation
        self.cause = cause
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
