"""The bpf(2) system call, as far as the daemon needs it: maps, pins, attachment, iterators.

No bcc here: workers use this with map descriptors that they inherited, without any privilege.
All functions raise OSError with the kernel's errno.

Source: include/uapi/linux/bpf.h (union bpf_attr), bpf(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import mmap
import os
import platform
import struct
from pathlib import Path
from typing import Final, NamedTuple

from pyforwarder.runtime.shared_memory import map_pages

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_libc = ctypes.CDLL(None, use_errno=True)
_number = _SYS_BPF.get(platform.machine(), -1)

F_MMAPABLE: Final = 1 << 10
F_NO_PREALLOC: Final = 1
_F_BEFORE: Final = 1 << 3
# The verifier gives up when a signal waits (EAGAIN, kernel/bpf/verifier.c): so often it is asked
# again; as libbpf.
_MOST_INTERRUPTIONS: Final = 5
_LOG_BYTES: Final = 1 << 22


class MapType(enum.IntEnum):
    """enum bpf_map_type, the ones in use."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    SOCKHASH = 18
    QUEUE = 22
    RINGBUF = 27


class AttachType(enum.IntEnum):
    """enum bpf_attach_type, the ones in use."""

    SK_SKB_STREAM_VERDICT = 5
    TRACE_FENTRY = 24
    TRACE_ITER = 28
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class ProgramType(enum.IntEnum):
    """enum bpf_prog_type, the ones in use."""

    SCHED_CLS = 3
    SK_SKB = 14
    TRACING = 26


class MapSizes(NamedTuple):
    """How large a map and its elements are."""

    key_bytes: int
    value_bytes: int
    entries: int


class _Command(enum.IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_TEST_RUN = 10
    PROG_QUERY = 16
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34
    ITER_CREATE = 33


def _call(command: _Command, attributes: bytes) -> int:
    if _number < 0:
        raise OSError(38, f"bpf(2): unknown machine {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(_number, int(command), buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def create_map(
    kind: MapType,
    *,
    key_bytes: int,
    value_bytes: int,
    entries: int,
    flags: int = 0,
    inner_map_fd: int = 0,
    name: str = "",
) -> int:
    """A new map's descriptor, which the caller closes; `name` (15 bytes) is what bpftool shows."""
    attributes = struct.pack(
        "=IIIIIII16s",
        kind,
        key_bytes,
        value_bytes,
        entries,
        flags,
        inner_map_fd,
        0,
        name.encode()[:15],
    )
    return _call(_Command.MAP_CREATE, attributes)


# Of MAP_UPDATE_ELEM.
_FLAGS: Final = struct.Struct("=Q")
_FLAGS_AT: Final = 24
_NOEXIST: Final = 1


class Map:
    """One open map with fixed key and value sizes; calls are cheap enough for a worker's loop.

    The buffers are made once and reused, so an instance belongs to one thread.
    """

    def __init__(self, fd: int, *, key_bytes: int, value_bytes: int) -> None:
        self.fd = fd
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        self._attributes = ctypes.create_string_buffer(
            struct.pack(
                "=IxxxxQQQ", fd, ctypes.addressof(self._key), ctypes.addressof(self._value), 0
            ),
            32,
        )
        self._syscall = _libc.syscall

    def _run(self, command: int, length: int = 32) -> None:
        if self._syscall(_number, command, self._attributes, length) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def update(self, key: bytes, value: bytes) -> None:
        """Insert or replace one element."""
        self._key.raw = key
        self._value.raw = value
        self._run(_Command.MAP_UPDATE_ELEM)

    def insert(self, key: bytes, value: bytes) -> None:
        """Insert one element; OSError(EEXIST) if there is one with this key."""
        self._key.raw = key
        self._value.raw = value
        _FLAGS.pack_into(self._attributes, _FLAGS_AT, _NOEXIST)
        try:
            self._run(_Command.MAP_UPDATE_ELEM)
        finally:
            _FLAGS.pack_into(self._attributes, _FLAGS_AT, 0)

    def delete(self, key: bytes) -> None:
        """Remove one element; OSError(ENOENT) if there is none."""
        self._key.raw = key
        # Only descriptor and key: the kernel refuses a command with fields that it does not use.
        self._run(_Command.MAP_DELETE_ELEM, 16)

    def lookup(self, key: bytes) -> bytes:
        """One element's value; OSError(ENOENT) if there is none."""
        self._key.raw = key
        self._run(_Command.MAP_LOOKUP_ELEM)
        return self._value.raw

    def all_keys(self) -> list[bytes]:
        """All keys, at a time when nobody else changes the map; others may appear twice or not."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(len(self._key))
        key_at = 0  # NULL: the first
        while True:
            attributes = struct.pack("=IxxxxQQQ", self.fd, key_at, ctypes.addressof(following), 0)
            try:
                _call(_Command.MAP_GET_NEXT_KEY, attributes)
            except FileNotFoundError:
                return found
            found.append(following.raw)
            self._key.raw = following.raw
            key_at = ctypes.addressof(self._key)


def push(fd: int, value: bytes) -> None:
    """Put something into a QUEUE, behind everything else.

    Raises:
        OSError: it is full (E2BIG).
    """
    buffer = ctypes.create_string_buffer(value, len(value))
    _call(
        _Command.MAP_UPDATE_ELEM,
        struct.pack("=IxxxxQQQ", fd, 0, ctypes.addressof(buffer), 0),
    )


def pop(fd: int, value_bytes: int) -> bytes | None:
    """Take what is in front out of a QUEUE; None: it is empty.

    Raises:
        OSError: the kernel refuses.
    """
    buffer = ctypes.create_string_buffer(value_bytes)
    try:
        _call(
            _Command.MAP_LOOKUP_AND_DELETE_ELEM,
            struct.pack("=IxxxxQQQ", fd, 0, ctypes.addressof(buffer), 0),
        )
    except FileNotFoundError:
        return None
    return buffer.raw


def map_memory(fd: int, length_bytes: int, *, offset_bytes: int = 0, write: bool) -> mmap.mmap:
    """An F_MMAPABLE array's values as shared memory; the caller closes it.

    Only `length_bytes` from the page-aligned `offset_bytes` on can be reached through it.
    """
    access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    return map_pages(fd, length_bytes, access, offset_bytes=offset_bytes)


class VerifierError(OSError):
    """A program that the kernel has looked at and refused; `log` is what it said."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, os.strerror(number))
        self.log = log


def load_program(
    kind: ProgramType,
    instructions: bytes,
    *,
    attach_type: AttachType | None = None,
    attach_btf_id: int = 0,
    licence: str = "GPL",
    name: str = "pf_probe",
) -> int:
    """A program from its instructions; the caller closes the descriptor.

    `attach_type` and `attach_btf_id` (a function of the kernel, by its number in BTF) are for
    TRACING. `name` (15 bytes) is what bpftool shows.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    terms = ctypes.create_string_buffer(licence.encode())

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attributes = struct.pack(
            "=IIQQIIQII16sII32xII4x",
            kind,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(terms),
            *((0, 0, 0) if log is None else (1, len(log), ctypes.addressof(log))),
            0,
            0,
            name.encode()[:15],
            0,
            attach_type or 0,
            0,
            attach_btf_id,
        )
        for _ in range(_MOST_INTERRUPTIONS):
            with contextlib.suppress(BlockingIOError):
                return _call(_Command.PROG_LOAD, attributes)
        return _call(_Command.PROG_LOAD, attributes)

    try:
        return load(None)
    except PermissionError as error:
        if error.errno == errno.EPERM:  # it was not even looked at
            raise
    except OSError:
        pass
    # Again, for the log, which costs time and memory that a program that is taken should not.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return load(log)
    except OSError as error:
        verifier_log = log.value.decode(errors="replace")
        raise VerifierError(error.errno or errno.EINVAL, verifier_log) from None


def attach(program_fd: int, target_fd: int, kind: AttachType) -> None:
    """Attach a program to a map (sk_skb)."""
    _call(_Command.PROG_ATTACH, struct.pack("=IIII", target_fd, program_fd, kind, 0))


def link_iterator(program_fd: int, map_fd: int | None = None) -> int:
    """A link of an iterator program; the caller closes the descriptor, or pins it.

    `map_fd` is the map whose elements or sockets it walks, if it is of that kind.
    """
    info = ctypes.create_string_buffer(struct.pack("=IIII", map_fd or 0, 0, 0, 0), 16)
    at, size = (0, 0) if map_fd is None else (ctypes.addressof(info), 16)
    attributes = struct.pack("=IIIIQI", program_fd, 0, AttachType.TRACE_ITER, 0, at, size)
    return _call(_Command.LINK_CREATE, attributes)


def link_interface(
    program_fd: int, interface: int, kind: AttachType, *, first: bool = False
) -> int:
    """A link of a sched_cls program to an interface (tcx, Linux 6.6); it ends with the descriptor.

    `interface` is its index in the caller's network namespace.  It runs behind those that are
    linked there already, or ahead of them.
    """
    flags = _F_BEFORE if first else 0
    attributes = struct.pack("=IIIIIIQ", program_fd, interface, kind, flags, 0, 0, 0)
    return _call(_Command.LINK_CREATE, attributes)


def query_interface(interface: int, kind: AttachType) -> int:
    """How many programs are linked there; OSError(ENOENT) if none ever was."""
    # As large as the newest kernel's: it writes to all of it, however little it was told is there.
    attributes = ctypes.create_string_buffer(struct.pack("=II", interface, kind), 64)
    if _libc.syscall(_number, int(_Command.PROG_QUERY), attributes, 64) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    (count,) = struct.unpack_from("=I", attributes, 24)
    return int(count)


def update_link(link_fd: int, program_fd: int) -> None:
    """Put another program in a link's place, between two packets (BPF_LINK_UPDATE)."""
    _call(_Command.LINK_UPDATE, struct.pack("=IIII", link_fd, program_fd, 0, 0))


def detach_link(link_fd: int) -> None:
    """Take a link's program away from where it is; the link is there, and holds nothing.

    Others that have it open cannot update it any more (BPF_LINK_DETACH).
    """
    _call(_Command.LINK_DETACH, struct.pack("=I", link_fd))


def map_sizes(fd: int) -> MapSizes:
    """What a map was made with, as the kernel tells it in /proc/self/fdinfo."""
    sizes = _map_says(fd)
    return MapSizes(sizes["key_size"], sizes["value_size"], sizes["max_entries"])


def map_id(fd: int) -> int:
    """The kernel's own number of a map, which no other one has until the next boot."""
    return _map_says(fd)["map_id"]


def _map_says(fd: int) -> dict[str, int]:
    sizes = {}
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("key_size", "value_size", "max_entries", "map_id"):
            sizes[name] = int(value)
    if len(sizes) < 4:
        raise OSError(22, f"descriptor {fd} is no BPF map")
    return sizes


def run_program(program_fd: int, packet: bytes, *, times: int = 1) -> int:
    """What a sched_cls program returns for a packet, run in the caller's network namespace.

    It may run several `times`, each behind the other; a signal ends that early.

    Raises:
        OSError: the kernel refuses.
    """
    data = ctypes.create_string_buffer(packet, len(packet))
    attributes = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQIIIIQQIII",
            *(program_fd, 0, len(packet), 0, ctypes.addressof(data), 0),
            *(times, 0, 0, 0, 0, 0, 0, 0, 0),
        ),
        80,
    )
    if _libc.syscall(_number, int(_Command.PROG_TEST_RUN), attributes, 80) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    (returned,) = struct.unpack_from("=i", attributes, 4)
    return int(returned)


def read_link(link_fd: int) -> bytes:
    """Everything that an iterator's link has to say now: one walk."""
    data = bytearray()
    fd = _call(_Command.ITER_CREATE, struct.pack("=II", link_fd, 0))
    with os.fdopen(fd, "rb", buffering=0) as walk:
        while chunk := walk.read(1 << 20):
            data += chunk
    return bytes(data)


def pin(fd: int, path: Path) -> None:
    """Give a map, program or link a name in bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _call(_Command.OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))


def open_pin(path: Path) -> int:
    """A descriptor of what is pinned there; the caller closes it."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _call(_Command.OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))
