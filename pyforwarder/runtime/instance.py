"""Where one instance keeps its files, and the lock that says whether it is running.

    RUN_DIR/NAME/control   unix socket, one JSON object per line
    RUN_DIR/NAME/pid       for people; nothing here decides by it, a pid may be another process's
    RUN_DIR/NAME/log       what a daemon in the background says; stays after its end
    RUN_DIR/NAME/lock      held with flock(2) for as long as the daemon lives
    RUN_DIR/NAME/proc/     the pseudo-/proc
    BPFFS/NAME/            pins
    STATE_DIR/NAME/        what outlives a restart of the machine

`PYFORWARDER_RUN_DIR`, `PYFORWARDER_BPFFS` and `PYFORWARDER_STATE_DIR` replace the three roots;
where only the first is set, state lies there, too.

The lock decides because the kernel drops it with the last descriptor, however the daemon died.
A lock taken by flock belongs to the open file, which fork(2) shares: a child that keeps the
descriptor keeps the instance "running", and a child that says LOCK_UN takes the lock from its
parent.  So nothing here ever unlocks: closing the descriptor is the only way out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyforwarder.errors import AlreadyRunningError, ConfigError, ForwarderError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

DEFAULT_NAME = "default"
RUN_DIR = Path("/run/pyforwarder")
BPFFS = Path("/sys/fs/bpf/pyforwarder")
STATE_DIR = Path("/var/lib/pyforwarder")

# bpffs refuses names with a dot; the rest keeps a name harmless as one path component
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_MAX_SOCKET_PATH_BYTES = 107  # sizeof(sun_path) without the final NUL, unix(7)

# a daemon that ends, or another `up` that fails, lets go of the lock a moment later
_ACQUIRE_RETRY_S = 0.25
# `is_running` shares the lock with others for some microseconds while it looks, or for longer where
# it has to wait for a processor; an `up` that comes in just then must not take that for a daemon
_LOOKED_AT_S = 5.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Instance:
    """The paths of one instance; making one touches no file."""

    name: str
    run_dir: Path
    bpffs_dir: Path
    state_dir: Path

    @classmethod
    def named(cls, name: str, environ: Mapping[str, str] = os.environ) -> Instance:
        """The instance of that name under the roots that `environ` or the defaults give.

        Raises:
            ConfigError: the name is not 1-32 letters, digits, `_` or `-`, or the control socket's
                path would be longer than a unix socket's may be.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"instance name {name!r}: 1 to 32 letters, digits, '_' or '-', "
                "the first a letter or digit"
            )
        run_dir = Path(environ.get("PYFORWARDER_RUN_DIR") or RUN_DIR) / name
        bpffs_dir = Path(environ.get("PYFORWARDER_BPFFS") or BPFFS) / name
        roots = ("PYFORWARDER_STATE_DIR", "PYFORWARDER_RUN_DIR")
        state = next((environ[root] for root in roots if environ.get(root)), STATE_DIR)
        state_dir = Path(state) / name
        instance = cls(name, run_dir.absolute(), bpffs_dir.absolute(), state_dir.absolute())
        if len(os.fsencode(instance.control)) > _MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{instance.control}: a unix socket's path may have {_MAX_SOCKET_PATH_BYTES} bytes;"
                " choose a shorter PYFORWARDER_RUN_DIR"
            )
        return instance

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.run_dir / "control"

    @property
    def pid_file(self) -> Path:
        """The daemon's process id, in decimal and a newline."""
        return self.run_dir / "pid"

    @property
    def lock_file(self) -> Path:
        """The file that the daemon holds with flock."""
        return self.run_dir / "lock"

    @property
    def fleet_file(self) -> Path:
        """What a fleet's store had last."""
        return self.state_dir / "fleet.json"

    @property
    def log_file(self) -> Path:
        """What a daemon in the background says."""
        return self.run_dir / "log"

    @property
    def proc_dir(self) -> Path:
        """The pseudo-/proc."""
        return self.run_dir / "proc"


class InstanceLock:
    """The daemon's hold on its instance: only its holder cleans and writes the instance's files.

    Close it in every child right after fork (`close` there does not release the parent's hold);
    otherwise a child that outlives a killed daemon keeps the instance locked.
    """

    def __init__(self, instance: Instance, fd: int) -> None:
        self.instance = instance
        self._fd = fd

    def fileno(self) -> int:
        """The locked descriptor, -1 once closed."""
        return self._fd

    @property
    def identity(self) -> list[int]:
        """Device and inode of its file; empty once closed."""
        return _identity(self._fd)

    def remove(self) -> None:
        """Unlink the lock file and close; the last step of a clean end.

        Unlinking before the close is safe because `acquire` checks, once it holds the lock, that
        the file it locked is still the one under that name.
        """
        if self._fd >= 0 and _is_still_at(self._fd, self.instance.lock_file):
            self.instance.lock_file.unlink(missing_ok=True)
        self.close()

    def renew(self) -> None:
        """Hold a file of our own in place of the one that we share with a daemon that ends.

        Nobody else gets the instance in between: the shared one is held until ours has its name.

        Raises:
            OSError: we still hold what we share.
        """
        new = self.instance.lock_file.with_name("lock.new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(self.instance.lock_file)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd = fd

    def write_reset(self, pairs: int) -> None:
        """Say that so many pairs are reset; `LockWatch.reset_pairs` reads it."""
        with contextlib.suppress(OSError):  # without it they know no number
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % pairs, 0)

    def close(self) -> None:
        """Close the descriptor; the lock is free once every process that inherited it did so."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> InstanceLock:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def acquire(instance: Instance) -> InstanceLock:
    """Take the instance for this process, making its run directory (0755) if need be.

    The caller closes the lock (or `remove`s it) at the very end, after everything it protects.

    Raises:
        AlreadyRunningError: a daemon holds it.
        ForwarderError: the run directory or the lock file cannot be made or opened.
    """
    began_s = time.monotonic()
    deadline_s = began_s + _ACQUIRE_RETRY_S
    while True:
        try:
            instance.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(instance.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            if time.monotonic() < deadline_s:
                continue  # a daemon that is ending removed the directory between the two lines
            raise ForwarderError(f"{instance.lock_file}: {error.strerror}") from error
        except PermissionError as error:
            raise ForwarderError(
                f"{instance.lock_file}: permission denied "
                "(not root? PYFORWARDER_RUN_DIR may name a directory of yours)"
            ) from error
        except OSError as error:
            raise ForwarderError(f"{instance.lock_file}: {error.strerror}") from error
        if not _try_lock(fd, fcntl.LOCK_EX):
            is_looked_at = _try_lock(fd, fcntl.LOCK_SH)  # a daemon does not share it
            os.close(fd)
            if time.monotonic() < (began_s + _LOOKED_AT_S if is_looked_at else deadline_s):
                time.sleep(_POLL_S)
                continue
            raise AlreadyRunningError(
                f"instance {instance.name!r} is already running{_pid_hint(instance)}"
            )
        if _is_still_at(fd, instance.lock_file):
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)  # what a daemon that was killed has said
            return InstanceLock(instance, fd)
        os.close(fd)  # we locked a file that its last holder has just unlinked


class LockWatch:
    """A look at one daemon's lock, so that its end can be waited for.

    It watches the lock *file that was there when it was made*: a new daemon of the same name that
    starts at once has another file, and is not waited for.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        try:
            self._fd = os.open(instance.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd = -1
        except OSError as error:
            raise ForwarderError(f"{instance.lock_file}: {error.strerror}") from error

    def follow(self, lock: object) -> None:
        """Watch the lock of this `identity`: a daemon that has just come has one of its own.

        Where its file is gone, so is the daemon. Nothing changes where `lock` is no identity, or
        where a third daemon's file is there.
        """
        if not isinstance(lock, list) or not lock or lock == _identity(self._fd):
            return
        with LockWatch(self._instance) as other:
            if _identity(other._fd) in ([], lock):
                self._fd, other._fd = other._fd, self._fd

    def is_held(self) -> bool:
        """Whether the daemon lives."""
        if self._fd < 0:
            return False
        if not _try_lock(self._fd, fcntl.LOCK_SH):
            return True
        # our own open file, shared with nobody: here, and only here, LOCK_UN takes from no one
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def wait_free(self, *, timeout_s: float) -> bool:
        """Wait until the daemon is gone; False if it still lives after `timeout_s` seconds.

        Polls every 10 ms: a blocking flock(2) has no deadline of its own.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.is_held():
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def reset_pairs(self) -> int:
        """How many pairs the daemon has said that it resets, at its end; 0: it has said nothing."""
        try:
            return int(os.pread(self._fd, 32, 0))
        except (OSError, ValueError):
            return 0

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LockWatch:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def is_running(instance: Instance) -> bool:
    """Whether a daemon holds the instance's lock at this moment.

    Raises:
        ForwarderError: the lock file is there and may not be opened.
    """
    with LockWatch(instance) as watch:
        return watch.is_held()


def _identity(fd: int) -> list[int]:
    if fd < 0:
        return []
    found = os.fstat(fd)
    return [found.st_dev, found.st_ino]


def _try_lock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_at(fd: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)


def pid_of(instance: Instance) -> int | None:
    """The process that has the instance's name, or had it last; None: nobody says."""
    try:
        return int(instance.pid_file.read_text())
    except (OSError, ValueError):
        return None


def _pid_hint(instance: Instance) -> str:
    pid = pid_of(instance)
    return "" if pid is None else f" (pid {pid})"
