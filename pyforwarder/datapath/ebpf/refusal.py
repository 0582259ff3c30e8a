"""Why the kernel refused a BPF map or program: from the errno, and from asking it a simpler thing.

The same EPERM means a missing capability, a container's seccomp filter, or a kernel that refuses
this kind of program to everybody; the same EINVAL a kernel that is too old, or a verifier that
found a fault.  The shortest program of the kind (probing.py) tells them apart.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from pyforwarder.datapath.ebpf import probing
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import host
from pyforwarder.runtime.host import Capability, Lockdown

# For maps; for programs that read kernel structures; for those of the network besides.
MAPS: Final = (Capability.CAP_BPF,)
TRACING: Final = (Capability.CAP_BPF, Capability.CAP_PERFMON)
NETWORK: Final = (*TRACING, Capability.CAP_NET_ADMIN)

_NO_MEMORY: Final = frozenset({errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})
# What a lack of capabilities shows itself as: without CAP_PERFMON the verifier forbids (EACCES)
# or does not even know (EINVAL) what other processes may do.
_PERHAPS_NOT_ALLOWED: Final = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL})
_WORDS: Final = {
    "sk_skb": "sk_skb programs",
    "sched_cls": "tc programs",
    "map_iterator": "iterators over maps",
    "socket_iterator": "iterators over sockmaps",
    "ksym_iterator": "iterators over symbols",
    "tcp_iterator": "iterators over TCP sockets",
    "fentry": "fentry programs",
}


class Process(NamedTuple):
    """What is asked about this process and its kernel; a test has its own."""

    missing: Callable[[Iterable[Capability]], tuple[Capability, ...]] = functools.partial(
        host.missing_capabilities, for_bpf=True
    )
    in_user_namespace: Callable[[], bool] = host.in_user_namespace
    has_seccomp_filter: Callable[[], bool] = host.has_seccomp_filter
    lockdown: Callable[[], Lockdown] = host.lockdown
    kernel: Callable[[], tuple[int, int]] = host.kernel_version
    try_kind: Callable[[str], None] = probing.check  # raises OSError or LoadError
    is_root: Callable[[], bool] = lambda: os.geteuid() == 0


def explain(
    operation: str,
    number: int,
    *,
    kind: str = "",
    log: str = "",
    needs: tuple[Capability, ...] | None = None,
    process: Process = Process(),  # noqa: B008 - immutable
) -> LoadError:
    """The error for a call of bpf(2) that failed with the errno `number`.

    `operation` says what was tried (`load show() of view.c`). `kind` is the program's (one of
    probing.KINDS), none for a map. `needs` is what the call asks for, by default what its kind
    does.
    """
    if needs is None:
        needs = needed_by(kind)
    strerror = os.strerror(number)
    if number in _NO_MEMORY:
        return LoadError(f"{operation}: {strerror}", cause=Refusal.MEMORY, log=log)
    if number == errno.ENOSYS:
        return LoadError(
            f"{operation}: this kernel has no bpf(2)",
            cause=Refusal.TOO_OLD,
            advice="it needs CONFIG_BPF_SYSCALL=y",
        )
    if number in _PERHAPS_NOT_ALLOWED:
        if missing := process.missing(needs):
            return lacking(operation, missing, is_root=process.is_root(), log=log)
        if number == errno.EPERM and process.in_user_namespace():
            return LoadError(
                f"{operation}: {strerror}: bpf(2) does not count the capabilities of a user "
                "namespace",
                cause=Refusal.CONFINED,
                advice="run it outside of the user namespace (no rootless container)",
                log=log,
            )
    if not kind:
        return _of_a_map(operation, number, process)
    return _of_a_program(operation, number, kind, log, process)


def needed_by(kind: str) -> tuple[Capability, ...]:
    """The capabilities that loading a program of this kind asks for; of a map without one."""
    if not kind:
        return MAPS
    return NETWORK if kind in ("sk_skb", "sched_cls") else TRACING


def lacking(
    operation: str,
    missing: tuple[Capability, ...],
    *,
    is_root: bool | None = None,
    log: str = "",
) -> LoadError:
    """The error of a process without these capabilities."""
    if is_root is None:
        is_root = os.geteuid() == 0
    names = " and ".join(capability.name for capability in missing)
    return LoadError(
        f"{operation}: {names} {'is' if len(missing) == 1 else 'are'} missing",
        cause=Refusal.CAPABILITIES,
        # From root they were taken away on purpose.
        advice="allow them to this root (systemd: CapabilityBoundingSet=, docker: --cap-add)"
        if is_root
        else "run as root, or with these capabilities",
        log=log,
    )


def _of_a_map(operation: str, number: int, process: Process) -> LoadError:
    if number == errno.EPERM:
        if process.has_seccomp_filter():
            return LoadError(
                f"{operation}: a seccomp filter refuses bpf(2)",
                cause=Refusal.CONFINED,
                advice="let the container have it (docker: --privileged, or --cap-add SYS_ADMIN)",
            )
        return LoadError(
            f"{operation}: this kernel refuses bpf(2), though no capability is missing"
            f"{_because(process)}",
            cause=Refusal.OTHER,
        )
    return LoadError(f"{operation}: {os.strerror(number)}")


def _of_a_program(operation: str, number: int, kind: str, log: str, process: Process) -> LoadError:
    words, since = _WORDS[kind], probing.KINDS[kind].since
    try:
        process.try_kind(kind)
    except (OSError, LoadError) as error:
        if process.kernel() < since:
            has, wants = (".".join(map(str, version)) for version in (process.kernel(), since))
            return LoadError(
                f"{operation}: Linux {has} does not know {words}",
                cause=Refusal.TOO_OLD,
                advice=f"they came with {wants}",
                log=log,
            )
        if isinstance(error, LoadError):
            return LoadError(
                f"{operation}: {error.operation}", cause=error.cause, advice=error.advice, log=log
            )
        if error.errno == errno.EPERM and process.has_seccomp_filter():
            return _of_a_map(operation, errno.EPERM, process)
        if error.errno in _NO_MEMORY:
            return LoadError(f"{operation}: {os.strerror(number)}", cause=Refusal.MEMORY, log=log)
        return LoadError(
            f"{operation}: this kernel refuses {words} to everybody ({os.strerror(number)}, "
            f"though no capability is missing){_because(process)}",
            cause=Refusal.PROGRAM_TYPE,
            log=log,
        )
    return LoadError(
        f"{operation}: the verifier refuses it ({os.strerror(number)})",
        cause=Refusal.VERIFIER,
        advice="-v shows what it says",
        log=log,
    )


def _because(process: Process) -> str:
    mode = process.lockdown()
    is_locked = mode in (Lockdown.INTEGRITY, Lockdown.CONFIDENTIALITY)
    return f"; lockdown is {mode}" if is_locked else ""
