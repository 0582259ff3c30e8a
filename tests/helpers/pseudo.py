"""Using pseudo-files as a shell does, while the loop that answers for them runs."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pyforwarder.runtime.loop import EPOLLIN, Loop
from tests.helpers.waiting import DEADLINE_S


@contextlib.contextmanager
def loop_with_sigio(asked: Callable[[], None]) -> Iterator[Loop]:
    """A loop that calls `asked` on SIGIO, as the daemon's does."""
    loop = Loop()
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    before = signal.signal(signal.SIGIO, lambda *_: None)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def woken(_owner: object, _fd: int, _mask: int) -> None:
        read.recv(64)
        asked()

    loop.watch(read.fileno(), EPOLLIN, woken, None)
    try:
        yield loop
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGIO, before)
        loop.dispose()
        read.close()
        write.close()


def shell(loop: Loop, directory: Path, command: str) -> str:
    """What a shell command in the directory prints, the loop running meanwhile.

    Raises:
        AssertionError: it failed, or did not end in time.
    """
    process = subprocess.Popen(
        ["sh", "-c", command], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline_s = time.monotonic() + DEADLINE_S
    while process.poll() is None:
        loop.run_once(0.002)
        if time.monotonic() > deadline_s:
            process.kill()
            process.communicate()
            raise AssertionError(f"{command}: not done within {DEADLINE_S} s")
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    # What was closed last has its event still to come.
    loop.run_once(0.002)
    return said
