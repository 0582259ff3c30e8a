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


class Network:
    """A network namespace with `lo` up; it lasts as long as this, or anything that runs in it.

    A socket belongs to the namespace that its maker was in, so one process may have both ends of
    a connection: `with network.entered(): socket.create_connection(...)`.
    """

    def __init__(self) -> None:
        before = _own_network()
        try:
            _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
            try:
                self.fd = _own_network()
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            finally:
                _checked(_libc.setns(before, _CLONE_NEWNET), "setns")
        finally:
            os.close(before)

    def close(self) -> None:
        """Release it."""
        os.close(self.fd)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread, and what it starts, is in the namespace meanwhile."""
        return entered(self.fd)

    @property
    def path(self) -> str:
        """Its name for iproute2, which takes a path where it takes a name."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, *words: str, stdin: str = "") -> str:
        """What a command prints that runs there.

        Raises:
            subprocess.CalledProcessError: it failed; its stderr is in the test's output.
        """
        with self.entered():
            done = subprocess.run(words, check=True, input=stdin, text=True, stdout=subprocess.PIPE)
        return done.stdout

    def ip(self, *commands: str) -> None:
        """Some lines for `ip`."""
        self.run("ip", "-batch", "-", stdin="\n".join(commands))

    def set(self, **settings: object) -> None:
        """Write settings, for example `set(ipv4__tcp_sack=0)` for /proc/sys/net/ipv4/tcp_sack."""
        with self.entered():
            for name, value in settings.items():
                Path("/proc/sys/net", name.replace("__", "/")).write_text(str(value))

    def get(self, name: str) -> str:
        """A setting's value, as `set` takes it."""
        with self.entered():
            return Path("/proc/sys/net", name.replace("__", "/")).read_text().strip()

    def counters(self) -> dict[str, int]:
        """What `nstat` shows, by its names there (`TcpInCsumErrors`, `TcpExtTCPOFOQueue`)."""
        found = {}
        with self.entered():
            for name in ("snmp", "netstat"):
                lines = Path("/proc/thread-self/net", name).read_text().splitlines()
                for head, values in zip(lines[::2], lines[1::2], strict=True):
                    group, *names = head.split()
                    for each, value in zip(names, values.split()[1:], strict=True):
                        found[group.rstrip(":") + each] = int(value)
        return found


@contextlib.contextmanager
def entered(network_fd: int) -> Iterator[None]:
    """The calling thread, and what it starts, is in that namespace meanwhile."""
    before = _own_network()
    try:
        _checked(_libc.setns(network_fd, _CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _checked(_libc.setns(before, _CLONE_NEWNET), "setns")
    finally:
        os.close(before)


def _own_network() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def private_network() -> Iterator[Network]:
    """The calling thread, and what it starts from here on, in a new namespace with `lo` up.

    Afterwards the thread is back where it was; the namespace goes with the last process and
    socket in it.
    """
    with contextlib.closing(Network()) as network, network.entered():
        yield network


def usual_buffers() -> None:
    """Give the current namespace socket buffers as large as the kernel itself has them at most.

    A new namespace has what its host was tuned to, which may be many times that.
    """
    Path("/proc/sys/net/ipv4/tcp_rmem").write_text("4096 131072 6291456")
    Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 16384 4194304")


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
def blackhole(host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[str, int]]:
    """An address that answers a SYN with nothing at all.

    It is a listener whose accept queue is full: Linux drops further SYNs (tcp_conn_request in
    net/ipv4/tcp_input.c), so a connect neither succeeds nor fails until it gives up.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
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
