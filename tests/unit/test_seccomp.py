"""The filter of system calls: what it forbids is refused, what a worker needs is not."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import mmap
import os
import platform
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from pyforwarder.runtime import seccomp
from pyforwarder.runtime.privileges import give_up_privileges

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="no table for this machine"
)
HEADERS: Final = (
    Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    Path("/usr/include/asm-generic/unistd.h"),
)
NAMES_64: Final = {"newfstatat": "fstatat"}  # asm-generic's name for the one of 64 bits


def confined(act: Callable[[], Any]) -> Any:
    """What `act` returns in a process with the filter."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            give_up_privileges(None)
            said = seccomp.confine()
            os.write(write_fd, json.dumps([said, act()]).encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert text, f"ended with {os.waitstatus_to_exitcode(status)}"
    said, result = json.loads(text)
    assert said == ""
    return result


def call(name: str, *arguments: int) -> str:
    """The errno's name of a raw system call by number; "" if it succeeded."""
    headers = (HEADERS[0].read_text(), HEADERS[1].read_text())
    column = 0 if platform.machine() == "x86_64" else 1
    found = re.search(rf"#define __NR(?:3264)?_{name}\s+(\d+)", headers[column])
    assert found, name
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [ctypes.c_long(argument) for argument in (*arguments, 0, 0, 0, 0)]
    if libc.syscall(ctypes.c_long(int(found[1])), *padded) >= 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]


FORBIDDEN: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    # name in the report: call, its arguments
    **{
        name: (name, ())
        for name in (
            *("execve", "execveat", "clone3", "unshare", "setns", "ptrace", "kill", "tkill"),
            *("process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd"),
            *("pidfd_send_signal", "mount", "umount2", "pivot_root", "chroot", "perf_event_open"),
            *("userfaultfd", "io_uring_setup", "keyctl", "add_key", "request_key", "personality"),
            *("init_module", "finit_module", "kexec_load", "open_by_handle_at", "openat2"),
            *("unlinkat", "renameat2", "mkdirat", "linkat", "symlinkat", "fchmod", "fchown"),
            *("setuid", "setgroups", "capset", "seccomp", "inotify_init1", "fanotify_init"),
            *("sched_setaffinity", "setpriority", "mlockall", "quotactl", "acct", "swapon"),
            *("rt_sigqueueinfo", "timer_create", "shmget", "msgget", "semget", "mq_open"),
        )
    },
    "a process": ("clone", (signal.SIGCHLD,)),
    "a process in a user namespace": ("clone", (signal.SIGCHLD | 0x10000000,)),
    "a packet socket": ("socket", (17, 3, 0)),
    "a socket of the kernel's ciphers": ("socket", (38, 5, 0)),
    "a vsock": ("socket", (40, 1, 0)),
    "another program for new connections": ("setsockopt", (0, 1, 51, 0, 0)),
    "another eBPF program for new connections": ("setsockopt", (0, 1, 52, 0, 0)),
    "loading a BPF program": ("bpf", (5, 0, 0)),
    "making a BPF map": ("bpf", (0, 0, 0)),
    "a BPF map by its number": ("bpf", (14, 0, 0)),
    "a BPF pin": ("bpf", (7, 0, 0)),
    "being traced": ("prctl", (0x59616D61, 1)),
    "being dumped": ("prctl", (4, 1)),
    "memory to write and to execute": ("mmap", (0, 4096, 7, 0x22, -1, 0)),
    "memory made executable": ("mprotect", (0, 4096, 5)),
    "typing into a terminal": ("ioctl", (0, 0x5412, 0)),
    "another process's limits": ("prlimit64", (1, 7, 0, 0)),
    "a signal to another": ("tgkill", (1, 1, 9)),
}


def test_what_a_worker_does_not_need_is_refused() -> None:
    def act() -> dict[str, str]:
        return {name: call(what, *arguments) for name, (what, arguments) in FORBIDDEN.items()}

    assert confined(act) == {
        name: "ENOSYS" if name == what else "EPERM" for name, (what, _) in FORBIDDEN.items()
    }


def test_files_are_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")

    def act() -> list[object]:
        said: list[object] = [(tmp_path / "there").read_text()]
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_CREAT):
            try:
                os.open(tmp_path / "there", flags)
                said.append("opened")
            except OSError as error:
                said.append(error.errno)
        return said

    assert confined(act) == ["x", *[errno.EPERM] * 4]


def test_what_a_worker_needs_is_there() -> None:
    def act() -> list[object]:
        done: list[object] = []
        thread = threading.Thread(target=lambda: done.append("thread"))
        thread.start()
        thread.join()
        listener = socket.create_server(("127.0.0.1", 0), reuse_port=True)
        with socket.create_connection(listener.getsockname()) as sock:
            peer, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"bytes")
            done.append(peer.recv(5).decode())
        done.append(bool(socket.getaddrinfo("localhost", 80)))
        done.append(len(os.urandom(3)))
        done.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0)
        with mmap.mmap(-1, 4096) as memory:
            memory[:1] = b"y"
        os.close(os.memfd_create("text", os.MFD_ALLOW_SEALING))
        ours, theirs = socket.socketpair()
        socket.send_fds(ours, [b"x"], [0])
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        done.append(len(fds))
        import wave  # a module that nobody has imported yet

        done.append(wave.__name__)
        return done

    assert confined(act) == ["thread", "bytes", True, 3, True, 1, "wave"]


def test_an_abort_still_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's would print a traceback that looks like a failure
        give_up_privileges(None)
        seccomp.confine()
        os.abort()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGABRT


# Debian has the header of x86_64 only there; that of the others everywhere.
@pytest.mark.parametrize("column", [0, 1] if platform.machine() == "x86_64" else [1])
def test_the_numbers_are_those_of_the_kernel_s_headers(column: int) -> None:
    text = HEADERS[column].read_text()
    for name, numbers in seccomp.CALLS.items():
        if numbers[column] is None:
            continue
        names = {name, NAMES_64.get(name, name)} if column else {name}
        found = {
            int(match[1])
            for one in names
            for match in re.finditer(rf"#define __NR(?:3264)?_{one}\s+(\d+)", text)
        }
        assert numbers[column] in found, name


def test_every_machine_s_filter_is_short_enough_for_the_kernel() -> None:
    for machine in ("x86_64", "aarch64"):
        steps = seccomp.program(machine, 1)
        assert len(steps) < 4096  # BPF_MAXINSNS
        assert all(step.if_true <= 255 and step.if_false <= 255 for step in steps)
