"""Where pins live: finding, mounting and leaving the BPF file system.

Source: mount(2), proc_pid_mountinfo(5), kernel/bpf/inode.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final, NamedTuple

from pyforwarder.errors import ForwarderError

# The kernel makes this directory for it; every distribution with systemd mounts it there.
USUAL_MOUNT: Final = Path("/sys/fs/bpf")
# What a mount of ours is called in the mount table, so that `leave` knows it from others'.
_SOURCE: Final = "pyforwarder"

_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """One line of the mount table."""

    point: Path
    kind: str
    source: str


def parse_mounts(text: str) -> list[Mount]:
    """The lines of /proc/self/mountinfo, in the order in which they were mounted."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, source, *_ = after.split(" ")
        mounts.append(Mount(Path(_unescaped(before.split(" ")[4])), kind, _unescaped(source)))
    return mounts


def _unescaped(text: str) -> str:
    """The kernel writes blanks and backslashes of a path as \\ooo."""
    for escape, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(escape, character)
    return text


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """The mount that the (resolved) path is in: of the longest mount points the last one."""
    holding = [mount for mount in mounts if path.is_relative_to(mount.point)]
    deepest = max((len(mount.point.parts) for mount in holding), default=0)
    return next((m for m in reversed(holding) if len(m.point.parts) == deepest), None)


def _mounts() -> list[Mount]:
    return parse_mounts(Path("/proc/self/mountinfo").read_text())


def point_of(root: Path) -> tuple[Path, bool]:
    """Where the BPF file system is mounted that holds `root`, and True; or where `enter` mounts it.

    That is /sys/fs/bpf for a root below it, else the root itself.

    Raises:
        OSError: the mount table cannot be read.
    """
    resolved = root.resolve()
    mount = mount_of(resolved, _mounts())
    if mount is not None and mount.kind == "bpf":
        return mount.point, True
    return USUAL_MOUNT if resolved.is_relative_to(USUAL_MOUNT) else resolved, False


def enter(root: Path) -> None:
    """Make sure that `root` is a directory in a BPF file system.

    One that is not mounted is mounted, see `point_of`.

    Raises:
        ForwarderError: it cannot be mounted, or the directory cannot be made.
    """
    try:
        resolved = root.resolve()
        point, is_mounted = point_of(root)
        if not is_mounted:
            if point != USUAL_MOUNT:
                point.mkdir(mode=0o755, parents=True, exist_ok=True)
            _mount(point)
        resolved.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ForwarderError(f"BPF file system for {root}: {error.strerror}") from error


def leave(root: Path) -> None:
    """Remove the root, ours or another's, if nothing is in it; never raises.

    The last instance does that, which need not be the one that made it. A mount of ours at the root
    (not at /sys/fs/bpf) goes, too.
    """
    with contextlib.suppress(OSError):
        resolved = root.resolve()
        mount = mount_of(resolved, _mounts())
        if mount is not None and mount.point == resolved:
            # A dot is in the names of the kernel's own files (maps.debug), and in nobody else's.
            pins = [name for name in os.listdir(resolved) if "." not in name]
            if mount.source == _SOURCE and mount.kind == "bpf" and not pins:
                _libc.umount2(os.fsencode(resolved), 0)
        elif mount is not None and mount.kind == "bpf":
            resolved.rmdir()


def _mount(point: Path) -> None:
    # Root's alone, as systemd mounts it.
    if _libc.mount(_SOURCE.encode(), os.fsencode(point), b"bpf", 0, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount it at {point}: {os.strerror(code)}")
