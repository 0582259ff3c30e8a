"""What this kernel lets a process do with BPF: its version, lockdown, and what the process may.

Only facts that the kernel states itself.  What a fact means for a load that was refused is
datapath/ebpf/refusal.py.

Source: capabilities(7), kernel_lockdown(7), seccomp(2), user_namespaces(7), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_STATUS: Final = Path("/proc/self/status")
_UID_MAP: Final = Path("/proc/self/uid_map")

# include/uapi/asm-generic/unistd.h: the same number on every machine.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC: Final = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_FSCONFIG_CMD_CREATE: Final = 6  # include/uapi/linux/mount.h

_libc = ctypes.CDLL(None, use_errno=True)


class Lockdown(enum.StrEnum):
    """How far the kernel is locked down, as /sys/kernel/security/lockdown says."""

    NONE = "none"
    INTEGRITY = "integrity"
    CONFIDENTIALITY = "confidentiality"
    UNKNOWN = "unknown"


class Capability(enum.IntEnum):
    """The capabilities that BPF asks for (include/uapi/linux/capability.h)."""

    CAP_NET_ADMIN = 12
    CAP_SYS_ADMIN = 21
    CAP_PERFMON = 38
    CAP_BPF = 39


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """Major and minor of a release such as `6.1.0-49-amd64`; of the running kernel without one."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release if release is None else release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def lockdown() -> Lockdown:
    """The mode in force; UNKNOWN where this process may not look."""
    try:
        return lockdown_of(_LOCKDOWN.read_text())
    except FileNotFoundError:
        if os.path.ismount(_LOCKDOWN.parent):
            return Lockdown.NONE  # a kernel without the lockdown module
    except OSError:
        return Lockdown.UNKNOWN
    try:
        return lockdown_of(_read_from_securityfs("lockdown"))
    except FileNotFoundError:
        return Lockdown.NONE
    except OSError:
        return Lockdown.UNKNOWN


def lockdown_of(text: str) -> Lockdown:
    """The mode in brackets: `none [integrity] confidentiality`."""
    found = re.search(r"\[(\w+)\]", text)
    with contextlib.suppress(ValueError):
        return Lockdown(found[1]) if found else Lockdown.UNKNOWN
    return Lockdown.UNKNOWN


def _read_from_securityfs(name: str) -> str:
    """A file of securityfs where it is not mounted; nothing is mounted for it (fsopen(2)).

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENODEV without securityfs, ENOENT without the file.
    """
    opened = _checked(_libc.syscall(_SYS_FSOPEN, b"securityfs", _CLOEXEC))
    try:
        _checked(_libc.syscall(_SYS_FSCONFIG, opened, _FSCONFIG_CMD_CREATE, None, None, 0))
        root = _checked(_libc.syscall(_SYS_FSMOUNT, opened, _CLOEXEC, 0))
    finally:
        os.close(opened)
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root), encoding="ascii") as file:
            return file.read()
    finally:
        os.close(root)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def is_realtime(sys: Path = Path("/sys"), version: str | None = None) -> bool:
    """Whether this kernel is built with CONFIG_PREEMPT_RT, where what handles packets is preempted.

    Of older ones, whose version in `uname -v` says so, not all have /sys/kernel/realtime.
    """
    with contextlib.suppress(OSError):
        if (sys / "kernel/realtime").read_text().strip() == "1":
            return True
    return "PREEMPT_RT" in (os.uname().version if version is None else version).split()


def missing_capabilities(
    needed: Iterable[Capability],
    status: Mapping[str, str] | None = None,
    *,
    for_bpf: bool = False,
) -> tuple[Capability, ...]:
    """Return the capabilities of `needed` that this process has not.

    CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON (capabilities(7)), and `for_bpf` for
    CAP_NET_ADMIN, too: so bpf(2) takes it, and nothing else does (kernel/bpf/syscall.c,
    bpf_prog_load).  `status` is what /proc/self/status says.
    """
    has = int((own_status() if status is None else status).get("CapEff", "0"), 16)

    def is_there(capability: Capability) -> bool:
        stands_in = for_bpf or capability in (Capability.CAP_BPF, Capability.CAP_PERFMON)
        return bool(has >> capability & 1 or (stands_in and has >> Capability.CAP_SYS_ADMIN & 1))

    return tuple(capability for capability in needed if not is_there(capability))


def own_status() -> dict[str, str]:
    """/proc/self/status, by its names."""
    with contextlib.suppress(OSError):
        lines = _STATUS.read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def has_seccomp_filter() -> bool:
    """Whether a filter decides about this process's system calls, as in most containers."""
    return own_status().get("Seccomp") == "2"


def in_user_namespace() -> bool:
    """Whether this process's capabilities count in a user namespace only; bpf(2) asks for more."""
    with contextlib.suppress(OSError):
        return _UID_MAP.read_text().split() != ["0", "0", "4294967295"]
    return False
