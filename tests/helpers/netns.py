"""A network namespace of one's own: its ports, its routes, its TIME_WAIT sockets."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """The calling thread, and what it starts from here on, in a new namespace with `lo` up.

    Afterwards the thread is back where it was; the namespace goes with the last process and
    socket in it.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            _checked(_libc.setns(before, _CLONE_NEWNET), "setns")
    finally:
        os.close(before)


def narrow_the_network() -> None:
    """Make the current namespace a tight one: Ethernet's segments, small socket buffers.

    With the defaults of loopback the kernel's buffers take some ten megabytes in front of a
    stalled reader, and a forwarder is never asked what it does when one side is slow.
    """
    subprocess.run(["ip", "link", "set", "lo", "mtu", "1500"], check=True)
    Path("/proc/sys/net/ipv4/tcp_rmem").write_text("4096 32768 65536")
    Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 16384 65536")


def _checked(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


@contextlib.contextmanager
def blackhole(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """An address that answers a SYN with nothing at all.

    It is a listener whose accept queue is full: Linux drops further SYNs (tcp_conn_request in
    net/ipv4/tcp_input.c), so a connect neither succeeds nor fails until it gives up.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.bind((host, 0))
        listener.listen(0)
        address = listener.getsockname()[:2]
        for _ in range(8):
            filler = stack.enter_context(socket.socket(family))
            filler.settimeout(0.2)
            try:
                filler.connect(address)
            except TimeoutError:
                yield address
                return
        raise AssertionError("the accept queue never filled")
