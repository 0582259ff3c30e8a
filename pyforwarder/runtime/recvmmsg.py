"""recvmmsg(2): the datagrams that wait at a socket, up to a bound, by one system call.

They come into memory that is used again and again, and what is made for each is a view of that. A
call for each, an object and the text of its address cost more than what is done with a datagram.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

# How many datagrams one call receives. Each has room for the longest there is.
MOST_AT_ONCE: Final = 64
_MOST_DATAGRAM_BYTES: Final = 65535
# No multiple of a page: else the beginnings of all would share a few lines of the cache.
_STRIDE: Final = 65536 + 4096 + 192

# Not CDLL: to release the interpreter's lock for a call that never waits costs more than it.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_recvmmsg: Final = _libc.recvmmsg
_recvmmsg.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.c_void_p,
)
_MSG_DONTWAIT: Final = 0x40  # linux/socket.h

# struct mmsghdr: a name and its length, parts and their number, control messages and their length,
# flags (struct msghdr of recvmsg(2), filled up to a word), then how long the datagram is.
_MESSAGE: Final = struct.Struct("@PIPNPNLI0P")
_PART: Final = struct.Struct("@PN")  # struct iovec
_WORD: Final = struct.calcsize("@L")
_CONTROL_WORD: Final = struct.calcsize("@PIPNPN") // _WORD - 1
_SIZE_HALF: Final = struct.calcsize("@PIPNPNLI") // 4 - 1


class Room:
    """Where datagrams are received to; it is taken from the system as far as it is needed."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, MOST_AT_ONCE * _STRIDE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        whole = memoryview(memory)
        self.slots = [
            whole[at : at + _MOST_DATAGRAM_BYTES]
            for at in range(0, MOST_AT_ONCE * _STRIDE, _STRIDE)
        ]


class Receiver:
    """Receives from sockets of one kind."""

    def __init__(self, room: Room, *, name_bytes: int = 0, control_bytes: int = 0) -> None:
        """Others may have the same room.

        Of each datagram are kept `name_bytes` of its sender's address, as its family has them, and
        `control_bytes` of control messages (cmsg(3)).
        """
        self._room = room
        self._name_bytes, self._control_bytes = name_bytes, control_bytes
        self._names = ctypes.create_string_buffer(MOST_AT_ONCE * name_bytes or 1)
        self._controls = ctypes.create_string_buffer(MOST_AT_ONCE * control_bytes or 1)
        self._parts = ctypes.create_string_buffer(MOST_AT_ONCE * _PART.size)
        self._messages = ctypes.create_string_buffer(MOST_AT_ONCE * _MESSAGE.size)
        self._address = ctypes.addressof(self._messages)
        names, controls = ctypes.addressof(self._names), ctypes.addressof(self._controls)
        for number in range(MOST_AT_ONCE):
            part_at = number * _PART.size
            part = room.address + number * _STRIDE, _MOST_DATAGRAM_BYTES
            _PART.pack_into(self._parts, part_at, *part)
            _MESSAGE.pack_into(
                self._messages,
                number * _MESSAGE.size,
                names + number * name_bytes if name_bytes else 0,
                name_bytes,
                ctypes.addressof(self._parts) + part_at,
                1,
                controls + number * control_bytes if control_bytes else 0,
                control_bytes,
                0,
                0,
            )
        self._all_names = memoryview(self._names).cast("B")
        self._all_controls = memoryview(self._controls).cast("B")
        self._written = memoryview(self._messages).cast("B")
        self._fresh = bytes(self._written)
        self._sizes = self._written.cast("I")[_SIZE_HALF :: _MESSAGE.size // 4]
        self._control_sizes = self._written.cast("L")[_CONTROL_WORD :: _MESSAGE.size // _WORD]
        self._count = 0

    def receive(self, fd: int, most: int = MOST_AT_ONCE) -> list[memoryview]:
        """What waits there, at most so many; it stays until the next call.

        If there are fewer than `most`, no more waited, or an error comes with the next call.

        Raises:
            OSError: an error of the socket came first.
        """
        if self._name_bytes or self._control_bytes:
            # How long names and control messages may be: the kernel has written how long they were.
            end = self._count * _MESSAGE.size
            self._written[:end] = self._fresh[:end]
        count: int = _recvmmsg(fd, self._address, min(most, MOST_AT_ONCE), _MSG_DONTWAIT, None)
        if count < 0:
            self._count = 0
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return []
            raise OSError(code, os.strerror(code))
        self._count = count
        if count == 1:
            return [self._room.slots[0][: self._sizes[0]]]
        sizes = self._sizes[:count].tolist()
        return [slot[:size] for slot, size in zip(self._room.slots, sizes, strict=False)]

    def names(self) -> list[bytes]:
        """The sender's address of each of them (struct sockaddr_in, sockaddr_in6)."""
        step = self._name_bytes
        names = self._all_names[: self._count * step].tobytes()
        return [names[at : at + step] for at in range(0, len(names), step)]

    def has_controls(self) -> bool:
        """Whether a datagram has a control message."""
        if self._count == 1:
            return bool(self._control_sizes[0])
        return any(self._control_sizes[: self._count].tolist())

    def controls(self) -> list[bytes]:
        """The control messages of each."""
        step = self._control_bytes
        controls = self._all_controls[: self._count * step].tobytes()
        sizes = self._control_sizes[: self._count].tolist()
        return [
            controls[at : at + size]
            for at, size in zip(range(0, len(controls), step), sizes, strict=True)
        ]
