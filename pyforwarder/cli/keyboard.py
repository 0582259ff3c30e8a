"""Single keys from a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import termios
import tty
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# What terminals send for these keys: ECMA-48 control sequences as xterm and linux use them, in
# both cursor key modes (CSI and SS3).
_SEQUENCES: Final = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page-up",
    b"\x1b[6~": "page-down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
}
_NAMES: Final = {
    "\x1b": "escape",
    "\t": "tab",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x03": "ctrl-c",
    "\x04": "ctrl-d",
}
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[A-Z])")


@contextlib.contextmanager
def single_keys(fd: int) -> Iterator[None]:
    """Have the terminal hand over each key at once and unprinted; as it was at the end."""
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def read_keys(fd: int, *, timeout_s: float) -> list[str] | None:
    """The keys pressed, after at most `timeout_s` seconds; None: the terminal is gone."""
    readable, _, _ = select.select([fd], [], [], max(timeout_s, 0.0))
    if not readable:
        return []
    try:
        data = os.read(fd, 1024)
    except OSError:  # EIO: hung up
        return None
    return decode(data) if data else None


def decode(data: bytes) -> list[str]:
    """Names and characters of the keys in what a terminal sent; unknown sequences are dropped."""
    keys = []
    while data:
        sequence = _SEQUENCE.match(data)
        if sequence:
            if sequence.group() in _SEQUENCES:
                keys.append(_SEQUENCES[sequence.group()])
            data = data[sequence.end() :]
            continue
        escape = data.find(b"\x1b", 1)
        text, data = (data, b"") if escape < 0 else (data[:escape], data[escape:])
        keys += [
            _NAMES.get(character, character)
            for character in text.decode(errors="ignore")
            if character in _NAMES or character.isprintable()
        ]
    return keys
