"""The system calls that a process needs which reads what strangers send: a seccomp filter.

One that a stranger has taken over can use what it has open, and little else of the kernel: it makes
no process, program or namespace, opens no file for writing, looks into no other process, and has
only the harmless part of bpf(2). What is not in the table does not exist (ENOSYS: a newer libc then
takes an older call); what is forbidden by its arguments is EPERM.

Source: seccomp(2), linux/seccomp.h, linux/filter.h, asm/unistd_64.h, asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

# Call -> its number on x86_64 and on aarch64 (None: it is not there).
CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "fstatfs": (138, 44),
    "statfs": (137, 43),
    "lseek": (8, 62),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getcwd": (79, 17),
    "pipe2": (293, 59),
    "ftruncate": (77, 46),
    "memfd_create": (319, 279),
    "splice": (275, 76),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "eventfd2": (290, 19),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "accept": (43, 202),
    "accept4": (288, 242),
    "bind": (49, 200),
    "listen": (50, 201),
    "shutdown": (48, 210),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "sendmmsg": (307, 269),
    "recvmmsg": (299, 243),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
    "brk": (12, 214),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "arch_prctl": (158, None),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "umask": (95, 166),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "open": (2, None),
    "clone": (56, 220),
    "socket": (41, 198),
    "setsockopt": (54, 208),
    "bpf": (321, 280),
    "prctl": (157, 167),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "ioctl": (16, 29),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "getrlimit": (97, 163),
}

_CLONE_THREAD: Final = 0x10000
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_WRITE_AND_EXECUTE: Final = 2 | 4  # PROT_WRITE, PROT_EXEC
_EXECUTE: Final = 4
# BPF_MAP_LOOKUP_ELEM, _UPDATE_ELEM, _DELETE_ELEM, _GET_NEXT_KEY, BPF_OBJ_GET_INFO_BY_FD
_BPF_COMMANDS: Final = (1, 2, 3, 4, 15)
_DOMAINS: Final = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (getaddrinfo asks routes)
_PRCTLS: Final = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA (malloc): harmless
# TCGETS, TIOCOUTQ, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, and what getaddrinfo asks of
# interfaces. Not TIOCSTI, which types into a terminal.
_IOCTLS: Final = (
    *(0x5401, 0x5411, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    *(0x8910, 0x8912, 0x8913, 0x8915, 0x8933),
)
_SOL_SOCKET: Final = 1
# SO_ATTACH_REUSEPORT_CBPF, _EBPF and SO_DETACH_REUSEPORT_BPF: they say which worker gets a new
# connection, for all workers.
_STEERING: Final = (51, 52, 68)


class Instruction(NamedTuple):
    """struct sock_filter."""

    code: int
    if_true: int
    if_false: int
    k: int


_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _ANY_BIT = 0x15, 0x45
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_FILTER: Final = struct.Struct("=HBBI")

_KILL_PROCESS, _ERRNO, _ALLOW_VALUE = 0x80000000, 0x00050000, 0x7FFF0000
_ALLOW: Final = Instruction(_RETURN, 0, 0, _ALLOW_VALUE)
_REFUSE: Final = Instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM)
_UNKNOWN: Final = Instruction(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
_KILL: Final = Instruction(_RETURN, 0, 0, _KILL_PROCESS)

# Column in CALLS, and AUDIT_ARCH_... (linux/audit.h).
_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2


def _argument(number: int) -> Instruction:
    """Load the lower half of an argument: all that are looked at are int or flags of 32 bits
    (little endian).
    """
    return Instruction(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * number)


def _one_of(argument: int, values: Sequence[int]) -> list[Instruction]:
    tests = [
        step for value in values for step in (Instruction(_EQUAL, 0, 1, value & 0xFFFFFFFF), _ALLOW)
    ]
    return [_argument(argument), *tests, _REFUSE]


def _without(argument: int, bits: int) -> list[Instruction]:
    return [_argument(argument), Instruction(_ANY_BIT, 0, 1, bits), _REFUSE, _ALLOW]


def _with(argument: int, bits: int) -> list[Instruction]:
    return [_argument(argument), Instruction(_ANY_BIT, 0, 1, bits), _ALLOW, _REFUSE]


def _not_all(argument: int, bits: int) -> list[Instruction]:
    masked = Instruction(_AND, 0, 0, bits)
    return [_argument(argument), masked, Instruction(_EQUAL, 0, 1, bits), _REFUSE, _ALLOW]


def _no_steering() -> list[Instruction]:
    tests = [step for option in _STEERING for step in (Instruction(_EQUAL, 0, 1, option), _REFUSE)]
    return [
        _argument(1),
        Instruction(_EQUAL, 1, 0, _SOL_SOCKET),
        _ALLOW,
        _argument(2),
        *tests,
        _ALLOW,
    ]


def conditions(pid: int) -> dict[str, list[Instruction]]:
    """What the arguments of a call must be, in process `pid`; the others may have any."""
    return {
        "open": _without(1, _WRITING),
        "openat": _without(2, _WRITING),
        "clone": _with(0, _CLONE_THREAD),  # threads; a process would outlive us
        "socket": _one_of(0, _DOMAINS),
        "setsockopt": _no_steering(),
        "bpf": _one_of(0, _BPF_COMMANDS),
        "prctl": _one_of(0, _PRCTLS),
        "mmap": _not_all(2, _WRITE_AND_EXECUTE),
        "mprotect": _without(2, _EXECUTE),
        "ioctl": _one_of(1, _IOCTLS),
        "tgkill": _one_of(0, [pid]),  # abort(3)
        "prlimit64": _one_of(0, [0]),
    }


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for a kind of machine.

    Raises:
        KeyError: its calls' numbers are not in the table.
    """
    column, architecture = _MACHINES[machine]
    steps = [
        Instruction(_LOAD, 0, 0, _ARCHITECTURE_AT),
        Instruction(_EQUAL, 1, 0, architecture),
        _KILL,
        Instruction(_LOAD, 0, 0, _NUMBER_AT),
    ]
    guarded = conditions(pid)
    # Calls whose arguments are looked at come first: for the others the kernel does not run the
    # filter.
    for name in sorted(CALLS, key=lambda name: name not in guarded):
        numbers = CALLS[name]
        number = numbers[column]
        if number is None:
            continue
        body = guarded.get(name, [_ALLOW])
        steps += [Instruction(_EQUAL, 0, len(body), number), *body]
    return [*steps, _UNKNOWN]


def confine() -> str:
    """Allow this process, and its threads to come, no other system calls from now on; returns why
    not, or "".

    For good. PR_SET_NO_NEW_PRIVS must have been set.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        return f"no table of system calls for {machine}"
    packed = b"".join(_FILTER.pack(*step) for step in program(machine, os.getpid()))
    instructions = ctypes.create_string_buffer(packed, len(packed))
    # struct sock_fprog
    count = len(packed) // _FILTER.size
    described = struct.pack("@HP", count, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.create_string_buffer(described, len(described))
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(address), 0, 0):
        return os.strerror(ctypes.get_errno())
    return ""
