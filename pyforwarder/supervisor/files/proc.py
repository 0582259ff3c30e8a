"""The pseudo-/proc of an instance: RUN_DIR/NAME/proc/.

    show stats listeners    links to the view in bpffs; without one, files that the daemon fills
    listen_port             the port of the first TCP listener; write another one to move it
    forward                 write `PID FD FD`: join two connected sockets of that process
    flush                   write ids, or `all`: reset those pairs
    errors                  why the last refused writes were refused, newest last

A write is obeyed when the file is closed; one that cannot be obeyed changes nothing. The kernel's
files cannot seek (bpf_iter_fops), which head(1) complains of: `cat show | head -3`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.errors import ForwarderError, UsageError
from pyforwarder.runtime import tables
from pyforwarder.supervisor.files.pseudo_files import MOST_WRITTEN_BYTES, PseudoFile, PseudoFiles
from pyforwarder.supervisor.files.view_walks import FILES

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

_MOST_ERRORS: Final = 64
_LARGEST_NUMBER: Final = 2**31 - 1  # of a process or a descriptor: a C int

# Obeys a request of the control protocol, with the descriptors that came with it (none here).
Obey = Callable[[dict[str, Any], list[int]], object]


class ProcDirectory:
    """The directory and its files, from `up` to `down`."""

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        *,
        obey: Obey,
        unix_time_s: Callable[[], float],
        refused: Callable[[str, str], None],
        pins: Path | None,
        render: Mapping[str, Callable[[], str]],
    ) -> None:
        """Replaces what a dead daemon left there: the caller holds the instance's lock.

        `pins` is where the view is pinned; None: there is none, and `render` makes the texts.
        `refused` is told a file's name and why a write to it was refused, for the log.

        Raises:
            ForwarderError: the directory cannot be made.
        """
        self._directory = directory
        self._obey = obey
        self._unix_time_s = unix_time_s
        self._refused = refused
        self._errors: deque[str] = deque(maxlen=_MOST_ERRORS)
        rendered = []
        try:
            remove(directory)
            directory.mkdir(mode=0o755, parents=True)
            for name in FILES:
                if pins is not None:
                    (directory / name).symlink_to(pins / name)
                else:
                    rendered.append(PseudoFile(name, read=render[name]))
            self._files = PseudoFiles(
                loop,
                directory,
                [
                    *rendered,
                    PseudoFile("listen_port", read=self._port, write=self._taker("listen_port")),
                    PseudoFile("forward", write=self._taker("forward")),
                    PseudoFile("flush", write=self._taker("flush")),
                    PseudoFile("errors", read=lambda: "".join(self._errors)),
                ],
            )
        except OSError as error:
            remove(directory)
            raise ForwarderError(f"{directory}: {error.strerror}") from error

    def fds(self) -> list[int]:
        """Descriptors that another process must not keep."""
        return self._files.fds()

    def asked(self) -> None:
        """SIGIO has come: a process wants to open one of the files."""
        self._files.asked()

    def port_changed(self) -> None:
        """Another port is in force."""
        self._files.changed("listen_port")

    def close(self) -> None:
        """Remove the directory; never raises."""
        self._files.close()
        remove(self._directory)

    def _port(self) -> str:
        try:
            answer = self._obey({"do": "listen_port"}, [])
        except ForwarderError:
            return "-\n"  # there is no TCP listener
        assert isinstance(answer, dict)
        return f"{answer['port']}\n"

    def _taker(self, name: str) -> Callable[[str], None]:
        take = {"listen_port": self._move, "forward": self._forward, "flush": self._flush}[name]

        def obey(text: str) -> None:
            try:
                if len(text.encode()) > MOST_WRITTEN_BYTES:
                    raise UsageError(f"more than {MOST_WRITTEN_BYTES} bytes at once")
                take(text)
            except ForwarderError as error:
                self._complain(name, str(error))

        return obey

    def _complain(self, name: str, reason: str) -> None:
        when = datetime.datetime.fromtimestamp(int(self._unix_time_s()), datetime.UTC)
        # What was written may be anything, and this is read on terminals.
        reason = tables.one_line(reason)
        self._errors.append(f"{when:%Y-%m-%dT%H:%M:%SZ} {name}: {reason}\n")
        self._files.changed("errors")
        self._refused(name, reason)

    def _move(self, text: str) -> None:
        words = text.split()
        if len(words) != 1:
            raise UsageError(f"{_quoted(text)}: one port wanted")
        self._obey({"do": "listen_port", "port": words[0]}, [])

    def _forward(self, text: str) -> None:
        requests = []
        for line in filter(str.strip, text.splitlines()):
            try:
                pid, *fds = (_number(word) for word in line.split())
                if len(fds) != 2 or fds[0] == fds[1]:
                    raise ValueError
            except ValueError:
                raise UsageError(f"{_quoted(line)}: PID FD FD wanted") from None
            requests.append({"do": "forward", "pid": pid, "fds": fds})
        if len(requests) != 1:
            raise UsageError("one line PID FD FD wanted")
        self._obey(requests[0], [])

    def _flush(self, text: str) -> None:
        words = text.split()
        if words == ["all"]:
            self._obey({"do": "flush", "all": True}, [])
            return
        try:
            ids = [_number(word, largest=2**64 - 1) for word in words]
        except ValueError:
            ids = []
        if not ids:
            raise UsageError(f"{_quoted(text)}: ids wanted, or all")
        answer = self._obey({"do": "flush", "ids": ids}, [])
        assert isinstance(answer, dict)
        if answer["unknown"]:
            raise UsageError(f"no such pair: {' '.join(map(str, answer['unknown']))}")


def _number(word: str, largest: int = _LARGEST_NUMBER) -> int:
    """ValueError if the word is not a plain decimal number up to `largest`."""
    if not (word.isascii() and word.isdigit() and len(word) <= 20 and int(word) <= largest):
        raise ValueError
    return int(word)


def _quoted(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


def remove(directory: Path) -> None:
    """Remove a pseudo-/proc, ours or one that was left; never raises."""
    with contextlib.suppress(OSError):
        if os.path.islink(directory):
            os.unlink(directory)
        else:
            shutil.rmtree(directory)
