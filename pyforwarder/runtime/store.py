"""What is worth keeping between two starts: compiled programs, facts of this kernel, proofs.

    /var/cache/pyforwarder/programs/HASH     of root; other users: RUN_DIR/.programs

A file says what it was kept for (its key) and carries a digest; what is damaged, or was kept for
something else, counts as not there. A program from here is loaded with our privileges, so nothing
is read from a directory that anybody else owns or may write to, nor below one, and from no such
file. `PYFORWARDER_CACHE_DIR` names another directory; `none` keeps nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "PYFORWARDER_CACHE_DIR"
_OF_ROOT: Final = Path("/var/cache/pyforwarder/programs")
_NONE: Final = "none"
_MAGIC: Final = b"pyforwarder 1\n"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_MOST_BYTES: Final = 16 << 20
# Those that were used the longest ago go: each version of the programs has ten or so, and each size
# of the pair table one.
_MOST_FILES: Final = 128
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
# Processes that make a value lock a byte of it; where a key's byte is, the name of its file says.
_LOCKS: Final = ".making"
_LOCK_OFFSETS: Final = 1 << 62
_POLL_S: Final = 0.05


def usual_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this user's processes keep things; None: nowhere."""
    named = environ.get(VARIABLE)
    if named:
        return None if named == _NONE else Path(named).absolute()
    if os.geteuid() == 0:
        return _OF_ROOT
    run_dir = environ.get("PYFORWARDER_RUN_DIR")
    # Not an instance's name, which begins with a letter or a digit.
    return Path(run_dir).absolute() / ".programs" if run_dir else None


def told_to_children() -> dict[str, str]:
    """The variable that has a child keep things where we do; none where it does so anyway."""
    directory = usual_directory()
    if directory == (_OF_ROOT if os.geteuid() == 0 else None):
        return {}
    return {VARIABLE: _NONE if directory is None else str(directory)}


class Store:
    """Values by key in one directory; nothing here raises, what cannot be kept is not kept."""

    def __init__(self, directory: Path | None) -> None:
        """`directory` is made when something is put there; None: an empty store."""
        self._directory = directory

    @classmethod
    def usual(cls) -> Store:
        """Return the store of this user."""
        return cls(usual_directory())

    def get(self, key: str) -> bytes | None:
        """What was put there last for exactly this key; None: nothing that can be trusted."""
        with contextlib.suppress(OSError), self._opened() as directory_fd:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            with os.fdopen(os.open(_name(key), flags, dir_fd=directory_fd), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or not _is_ours_alone(status):
                    return None
                with contextlib.suppress(OSError):  # a file system that is read-only
                    os.utime(file.fileno())  # what is used stays, see _remove_longest_unused
                return _unpacked(file.read(_MOST_BYTES + 1), key)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep this for the key, in the place of what was there; readers see one or the other."""
        packed = _packed(key, value)
        if self._directory is None or len(packed) > _MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            self._make()
            with self._opened() as directory_fd:
                self._write(directory_fd, _name(key), packed)
                _remove_longest_unused(directory_fd)

    @contextlib.contextmanager
    def making(self, key: str, *, within_s: float) -> Iterator[None]:
        """Let one process at a time make the value of this key.

        The others wait until it has ended (look again at `get` then), `within_s` at most; where
        there is no lock to be had, none waits. Not among threads of one process.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self._make()
                directory_fd = stack.enter_context(self._opened())
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
                locks_fd = os.open(_LOCKS, flags, 0o600, dir_fd=directory_fd)
                stack.callback(os.close, locks_fd)  # the kernel unlocks then, and at our death
                _lock(locks_fd, int(_name(key), 16) % _LOCK_OFFSETS, within_s)
            yield

    def forget(self, key: str) -> None:
        """Keep nothing for this key any more."""
        with contextlib.suppress(OSError), self._opened() as directory_fd:
            os.unlink(_name(key), dir_fd=directory_fd)

    def _make(self) -> None:
        """Make the directory, if there is to be one; OSError: it cannot be made."""
        if self._directory is not None:
            self._directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._directory.mkdir(mode=0o700, exist_ok=True)

    @staticmethod
    def _write(directory_fd: int, name: str, packed: bytes) -> None:
        new = f".{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(new, flags, 0o600, dir_fd=directory_fd), "wb") as file:
                file.write(packed)
            os.rename(new, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError:  # no space left, say
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory_fd)
            raise

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the directory; OSError if there is none, or it is not ours alone."""
        if self._directory is None:
            raise FileNotFoundError
        path = self._directory.resolve()
        for above in path.parents:
            if not _is_safe_above(os.lstat(above)):
                raise PermissionError(f"others may change {above}")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not _is_ours_alone(os.fstat(fd)):
                raise PermissionError(f"others may change {path}")
            yield fd
        finally:
            os.close(fd)


def _lock(fd: int, offset: int, within_s: float) -> None:
    """Lock a byte of the file, fcntl(2); it is left unlocked after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return
            time.sleep(_POLL_S)
        else:
            return


def _is_ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE


def _is_safe_above(status: os.stat_result) -> bool:
    """Whether nobody but root and us can put another in the place of what is below it."""
    if status.st_uid not in (0, os.geteuid()):
        return False
    return not status.st_mode & _OTHERS_MAY_WRITE or bool(status.st_mode & stat.S_ISVTX)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _packed(key: str, value: bytes) -> bytes:
    content = len(key.encode()).to_bytes(4, "big") + key.encode() + value
    return _MAGIC + hashlib.sha256(content).digest() + content


def _unpacked(packed: bytes, key: str) -> bytes | None:
    start = len(_MAGIC) + _DIGEST_BYTES
    content = packed[start:]
    expected = len(key.encode()).to_bytes(4, "big") + key.encode()
    if packed[:start] != _MAGIC + hashlib.sha256(content).digest() or not content.startswith(
        expected
    ):
        return None
    return content[len(expected) :]


def _remove_longest_unused(directory_fd: int) -> None:
    names = [name for name in os.listdir(directory_fd) if name != _LOCKS]
    if len(names) <= _MOST_FILES:
        return
    aged = []
    for name in names:
        with contextlib.suppress(OSError):  # another process has removed it
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            aged.append((status.st_mtime_ns, name))
    for _, name in sorted(aged)[: len(aged) - _MOST_FILES]:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory_fd)
