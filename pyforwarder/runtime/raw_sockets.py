"""accept(2), send(2), shutdown(2), a reset of a descriptor: called directly, without an object.

What `socket` accepts is a descriptor that blocks, which takes one more call to change, and the
text of an address that most connections never need; nobody waits is an exception. A socket object
for a descriptor asks getsockname(2) first.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Final

from pyforwarder.core.address import Address

# Not CDLL: to release the interpreter's lock for a call that never waits costs more than it.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_accept4: Final = _libc.accept4
_shutdown: Final = _libc.shutdown
_connect: Final = _libc.connect
_send: Final = _libc.send

_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_SHUT_WR: Final = int(socket.SHUT_WR)
_LAST_BUT_FIN: Final = socket.MSG_MORE | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NAME_BYTES: Final = 128  # struct sockaddr_storage
_IPV6_NAME_BYTES: Final = 28  # struct sockaddr_in6, the longest one that says anything of a client
_FAMILY: Final = struct.Struct("=H")
_NOWHERE: Final = bytes(16)  # struct sockaddr of AF_UNSPEC

_name: Final = ctypes.create_string_buffer(_NAME_BYTES)
_length: Final = ctypes.c_uint32(_NAME_BYTES)
_length_at: Final = ctypes.byref(_length)
# The address accepted last, as the kernel writes it (struct sockaddr); until the next `accept`.
peer_name: Final = memoryview(_name).cast("B")[:_IPV6_NAME_BYTES].tobytes


def accept(fd: int) -> int:
    """A connection of a listener, as a descriptor that does not block; or an errno, negative."""
    _length.value = _NAME_BYTES
    accepted: int = _accept4(fd, _name, _length_at, _FLAGS)
    return accepted if accepted >= 0 else -ctypes.get_errno()


def end_writing(fd: int) -> bool:
    """Send FIN behind what was written; False if the connection is gone (ENOTCONN)."""
    failed: int = _shutdown(fd, _SHUT_WR)
    return not failed


def write_last(fd: int, last: bytes) -> int:
    """Write bytes behind which `end_writing` follows at once; how many, or an errno, negative.

    They wait for it, and FIN goes out with them instead of in a packet of its own.
    """
    written: int = _send(fd, last, len(last), _LAST_BUT_FIN)
    return written if written >= 0 else -ctypes.get_errno()


def reset_now(fd: int) -> None:
    """Send RST, even if another process has the TCP socket, too; then it is to be closed.

    Source: connect(2) with AF_UNSPEC; tcp_disconnect (net/ipv4/tcp.c).
    """
    _connect(fd, _NOWHERE, len(_NOWHERE))


def address_in(name: bytes) -> Address | None:
    """The address that a struct sockaddr begins with; None: it is a unix socket's."""
    (family,) = _FAMILY.unpack_from(name)
    if family == socket.AF_INET:
        return Address(socket.inet_ntop(family, name[4:8]), int.from_bytes(name[2:4], "big"))
    if family == socket.AF_INET6:
        return Address(socket.inet_ntop(family, name[8:24]), int.from_bytes(name[2:4], "big"))
    return None
