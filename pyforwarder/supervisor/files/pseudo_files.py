"""Files that the daemon answers for: made when they are opened, obeyed when they are closed.

Ordinary files, so that everything works on them (cat, echo, cp, an editor), and nothing hangs when
the daemon is gone. What makes them more is a write lease (fcntl(2), F_SETLEASE): a process that
opens such a file waits in open(2) until the daemon, told by SIGIO, has released it. Meanwhile the
daemon

- puts a new file, with a lease of its own, under the name: each opener has one for itself, so
  commands that follow each other closely never overwrite one another;
- writes into the opened one what it has to say now;
- and if a process is still writing, waits a moment for the end of that. So `echo 9000 >
  listen_port; cat listen_port` prints the port that is in force after the command.

Where there are no leases (some network file systems) all of this works but the order and the
moment: a read may be a second old, and the first of two quick writes may be lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.inotify import Inotify
from pyforwarder.runtime.loop import EPOLLIN

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

MOST_WRITTEN_BYTES: Final = 4096
# Openers wait at most this long for a process that has opened a file for writing and does not close
# it; the kernel itself would make them wait 45 s (/proc/sys/fs/lease-break-time).
PATIENCE_S: Final = 1.0
# Writers who are waited for after that; then what they write goes nowhere.
_WRITER_S: Final = 30.0
_MOST_WRITERS: Final = 64
_RETRY_S: Final = 0.001
# Without leases: how often what is read is made anew, and which part of the time that may take.
_REFRESH_S: Final = 1.0
_REFRESH_PART: Final = 50


@dataclass(frozen=True, slots=True)
class PseudoFile:
    """What stands behind a name. Neither function may raise."""

    name: str
    read: Callable[[], str] | None = None
    write: Callable[[str], None] | None = None


class _Opened:
    """One file under a name, or one that was there and has a writer."""

    __slots__ = ("before", "delays_others", "fd", "file", "is_leased", "watch")

    def __init__(self, file: PseudoFile, fd: int) -> None:
        self.file = file
        self.fd = fd
        self.before = b""  # what stood in it before anybody wrote
        self.is_leased = False
        self.watch = -1
        self.delays_others = False


class PseudoFiles:
    """The files of one directory, which the caller makes and removes."""

    def __init__(self, loop: Loop, directory: Path, files: Sequence[PseudoFile]) -> None:
        """SIGIO must be handled before this, and lead to `asked`.

        Raises:
            OSError: the directory cannot be written.
        """
        self._loop = loop
        self._directory = directory
        self._inotify = Inotify()
        self._present: dict[str, _Opened] = {}
        self._writers: dict[int, _Opened] = {}
        self._timers: set[int] = set()
        loop.watch(self._inotify.fd, EPOLLIN, self._notified, self)
        try:
            for file in files:
                self._present[file.name] = self._offer(file, _said(file))
                self._refresh_later(file)
        except OSError:
            self.close()
            raise

    def fds(self) -> list[int]:
        """Descriptors that another process must not keep."""
        opened = [*self._present.values(), *self._writers.values()]
        return [self._inotify.fd, *{entry.fd for entry in opened}]

    def close(self) -> None:
        """Let all waiting openers in, and remove the files."""
        for entry in {*self._present.values(), *self._writers.values()}:
            os.close(entry.fd)
        for name in self._present:
            with contextlib.suppress(OSError):
                (self._directory / name).unlink()
        for timer in self._timers:
            self._loop.cancel(timer)
        self._loop.forget(self._inotify.fd)
        self._inotify.close()
        self._present = {}
        self._writers = {}

    def changed(self, name: str) -> None:
        """Write the file's new text, also for those who read it after this process's death."""
        entry = self._present[name]
        _fill(entry, _said(entry.file))

    def asked(self) -> None:
        """Let processes in that wait in open(2); called on SIGIO, and when a writer is done."""
        for entry in list(self._present.values()):
            # Asked anew for each file: a writer whom we have just let in may be done with it, and
            # its next command at another file, before we get there.
            if any(writer.delays_others for writer in self._writers.values()):
                return  # `_done` calls again
            if entry.is_leased:
                wanted = fcntl.fcntl(entry.fd, fcntl.F_GETLEASE)
                if wanted != fcntl.F_WRLCK:
                    self._let_in(entry, is_writer=wanted == fcntl.F_UNLCK)

    def _offer(self, file: PseudoFile, text: bytes) -> _Opened:
        """Put a new file with this text under the name, leased and watched."""
        path = self._directory / file.name
        new = self._directory / f".{file.name}"
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        entry = _Opened(file, fd)
        try:
            # Root's alone. Readable by its owner in any case: inotify wants that without
            # CAP_DAC_OVERRIDE.
            os.fchmod(fd, 0o400 if file.write is None else 0o600)
            _fill(entry, text)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                entry.is_leased = True
            if file.write is not None:
                entry.watch = self._inotify.watch(new)
                self._writers[entry.watch] = entry
            new.rename(path)
        except OSError:
            self._drop(entry)
            raise
        return entry

    def _let_in(self, entry: _Opened, *, is_writer: bool) -> None:
        name = entry.file.name
        text = _said(entry.file)
        try:
            self._present[name] = self._offer(entry.file, text)
        except OSError:
            # No room for another file: this one is shared from here on, like one without leases.
            self._refresh_later(entry.file)
        _fill(entry, text)
        is_present = self._present[name] is entry
        if is_writer:
            entry.delays_others = True
            self._after(PATIENCE_S, lambda: self._delay_no_more(entry))
            self._after(_WRITER_S, lambda: self._give_up(entry))
            self._limit_writers()
        entry.is_leased = False
        fcntl.fcntl(entry.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        if not is_writer and not is_present:
            self._drop(entry)

    def _limit_writers(self) -> None:
        waiting = [entry for entry in self._writers.values() if not self._is_present(entry)]
        for entry in waiting[: max(0, len(waiting) - _MOST_WRITERS)]:
            self._drop(entry)

    def _delay_no_more(self, entry: _Opened) -> None:
        if entry.delays_others:
            entry.delays_others = False
            self.asked()

    def _give_up(self, entry: _Opened) -> None:
        if self._writers.get(entry.watch) is entry and not self._is_present(entry):
            self._drop(entry)

    def _notified(self, _owner: object, _fd: int, _mask: int) -> None:
        watches = self._inotify.closed()
        if -1 in watches:
            watches = list(self._writers)
        for watch in watches:
            entry = self._writers.get(watch)
            if entry is not None:
                self._written(entry)

    def _written(self, entry: _Opened) -> None:
        """Somebody has closed the file after writing, or without."""
        if self._is_present(entry):
            if entry.is_leased:
                return  # our own, or an event of before
            # Without leases the file is still under its name: the next writer gets another one.
            with contextlib.suppress(OSError):
                self._present[entry.file.name] = self._offer(entry.file, _said(entry.file))
                self._after(_WRITER_S, lambda: self._give_up(entry))
        data = os.pread(entry.fd, MOST_WRITTEN_BYTES + len(entry.before) + 1, 0)
        if data != entry.before:
            # Appended (>>) or written in its place: what stood there before is no command.
            data = data.removeprefix(entry.before)
            _fill(entry, b"")
            if data:
                assert entry.file.write is not None
                entry.file.write(data.decode(errors="replace"))
        self._done(entry)

    def _done(self, entry: _Opened, retry_s: float = _RETRY_S) -> None:
        """Give up the file that a writer had, once its command is obeyed and nobody else has it
        open.
        """
        if not self._is_present(entry):
            try:
                fcntl.fcntl(entry.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError:
                # A second writer has it too, or the kernel, which tells of a close before it has
                # done all of it (__fput), is not ready yet.
                self._after(retry_s, lambda: self._retry(entry, retry_s))
                return
            self._drop(entry)
        entry.delays_others = False
        self.asked()

    def _retry(self, entry: _Opened, after_s: float) -> None:
        if self._writers.get(entry.watch) is entry:
            self._done(entry, min(PATIENCE_S, 2 * after_s))

    def _is_present(self, entry: _Opened) -> bool:
        return self._present.get(entry.file.name) is entry

    def _drop(self, entry: _Opened) -> None:
        if entry.watch >= 0:
            # Before the close, which would be one more event.
            self._inotify.forget(entry.watch)
            self._writers.pop(entry.watch, None)
        os.close(entry.fd)

    def _refresh_later(self, file: PseudoFile, after_s: float = _REFRESH_S) -> None:
        """Make the text of a file without a lease anew every now and then: nobody tells when it is
        read.
        """

        def refresh() -> None:
            entry = self._present[file.name]
            if entry.is_leased:
                return
            before_s = time.monotonic()
            # Another file, so that nobody reads half of one text and half of the next.
            with contextlib.suppress(OSError):
                self._present[file.name] = self._offer(file, _said(file))
                self._drop(entry)
            took_s = time.monotonic() - before_s
            self._refresh_later(file, max(_REFRESH_S, took_s * _REFRESH_PART))

        if file.read is not None and file.write is None and not self._present[file.name].is_leased:
            self._after(after_s, refresh)

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            action()

        timer = self._loop.after(delay_s, run)
        self._timers.add(timer)


def _said(file: PseudoFile) -> bytes:
    return file.read().encode() if file.read is not None else b""


def _fill(entry: _Opened, text: bytes) -> None:
    """Make this the file's content; the longer text never stands there mixed with the shorter."""
    with contextlib.suppress(OSError):  # a full disk: it says less than it should
        os.ftruncate(entry.fd, 0)
        os.pwrite(entry.fd, text, 0)
        entry.before = text
