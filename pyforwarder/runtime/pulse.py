"""A process shows that it works, and its parent sees when it does no more.

The process adds one to a number in shared memory at every turn that it takes. Without that it may
be stopped, or run in circles, or wait for something that does not come; but it may also just not be
given a processor. The first three are told from the fourth by what the kernel says of it.

Source: proc_pid_stat(5).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple

from pyforwarder.runtime.shared_memory import SharedBlocks

# It beats, and is looked at, so often.
PULSE_S: Final = 1.0
# So many looks in a row without a beat: a whole daemon may have been stopped, and the process that
# looks may be the first to go on.
_LEAST_LOOKS: Final = 3
# What a turn may take of a processor: none of ours takes a tenth of it.
_BUSY_S: Final = 2.0
# How long it may sleep in a system call that its loop does not know of (a slow disk, a keeper that
# hangs), in looks.
_ASLEEP_LOOKS: Final = 10
_COUNT: Final = struct.Struct("=Q")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Pulse:
    """The number, for the process and its parent."""

    def __init__(self) -> None:
        # Memory of a file: anonymous memory could be made longer, see `SharedBlocks.make`.
        blocks = SharedBlocks.make("pulse", 1, mmap.PAGESIZE)
        (self.memory,) = blocks.map(writable=[0])
        blocks.close()

    def beat(self) -> None:
        """Show that this process works; called in the process."""
        (count,) = _COUNT.unpack_from(self.memory)
        _COUNT.pack_into(self.memory, 0, (count + 1) % (1 << 64))

    @property
    def count(self) -> int:
        """How often it has beaten; 0: not once."""
        (count,) = _COUNT.unpack_from(self.memory)
        return int(count)

    def close(self) -> None:
        """Unmap the memory here."""
        self.memory.close()


class Activity(NamedTuple):
    """What the kernel says of a process."""

    state: str  # one letter, as in proc_pid_stat(5)
    busy_s: float  # processor time, in user mode and in system calls


def activity(pid: int) -> Activity | None:
    """Return the state and the processor time of a process; None: there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name, in parentheses, may have any characters in it.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return Activity(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
    return None


class PulseWatch:
    """Decides whether a process hangs."""

    def __init__(self, pulse: Pulse, pid: int) -> None:
        self._pulse = pulse
        self._pid = pid
        self._last = 0
        self._still = 0
        self._at_beat: Activity | None = None
        self._checked_s = 0.0

    def why_stuck(self, now_s: float | None = None) -> str:
        """Why the process will not go on by itself; empty if it may. The process is looked at once
        a second at most.
        """
        now_s = time.monotonic() if now_s is None else now_s
        if now_s - self._checked_s < PULSE_S:
            return ""
        self._checked_s = now_s
        count = self._pulse.count
        if count != self._last or not count:
            self._last, self._still, self._at_beat = count, 0, None
            return ""
        self._still += 1
        now = activity(self._pid)
        if self._at_beat is None or now is None:
            self._at_beat = now
            return ""
        return self._judge(now, now.busy_s - self._at_beat.busy_s)

    def _judge(self, now: Activity, busy_s: float) -> str:
        if self._still < _LEAST_LOOKS:
            return ""
        if now.state in ("T", "t"):
            return "it is stopped"
        if busy_s >= _BUSY_S:
            return f"it is busy with one thing for {busy_s:.1f} s"
        if self._still >= _ASLEEP_LOOKS and now.state in ("S", "D") and not busy_s:
            return f"it waits for something for {self._still * PULSE_S:.0f} s"
        return ""
