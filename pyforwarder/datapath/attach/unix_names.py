"""Marks that say that something in this network namespace has a living owner.

A mark is an abstract unix socket (unix(7)): it is one of the network namespace, also where
its owner sees other files and process numbers, and it goes with its process, however that ends. Any
user may take any name, so only a socket of our own user counts; the kernel is asked whose it is
(sock_diag(7)).
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
import weakref
from typing import Final

from pyforwarder.errors import LoadError

_FREE_WITHIN_S: Final = 2.0  # the kernel closes what a killed process had
_PAUSE_S: Final = 0.01

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301
_ERROR, _DONE = 2, 3
_SHOW_NAME, _SHOW_USER = 0x1, 0x40  # UDIAG_SHOW_...
_NAME, _USER = 0, 7  # UNIX_DIAG_...
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST: Final = struct.Struct("=BB2xIIIII")  # struct unix_diag_req
_ANSWER_BYTES: Final = 16  # struct unix_diag_msg
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_RECEIVE_BYTES: Final = 1 << 16
_ANSWER_TIMEOUT_S: Final = 10.0


class NameInUse:
    """As long as this is open, and the process lives, no other gets the name.

    Children that are forked from it do not hold it.
    """

    def __init__(self, name: str) -> None:
        """Wait a moment for an owner that is just ending.

        Raises:
            LoadError: another process of this user has the name.
        """
        self.name = name
        if name in _inherited:
            self._sock = _inherited.pop(name)
            _in_use.add(self)
            return
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        deadline_s = time.monotonic() + _FREE_WITHIN_S
        while not self._has_bound(name):
            if not is_in_use(name):
                # Free by now, or a stranger's that would be in the way.
                self._has_bound(name)
                break
            if time.monotonic() > deadline_s:
                self._sock.close()
                raise LoadError(
                    f"{name!r} on interfaces is of a pyforwarder that runs in this network"
                    " namespace",
                    advice="give one of them another --instance name",
                )
            time.sleep(_PAUSE_S)
        _in_use.add(self)

    def _has_bound(self, name: str) -> bool:
        try:
            self._sock.bind(_mark_of(name))
        except OSError:
            return False
        return True

    def fileno(self) -> int:
        """The descriptor that holds the name, -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Give the name up."""
        self._sock.close()


_in_use: weakref.WeakSet[NameInUse] = weakref.WeakSet()
_inherited: Final[dict[str, socket.socket]] = {}


def held() -> dict[str, int]:
    """The names that this process has, with the descriptors that hold them."""
    return {use.name: use.fileno() for use in list(_in_use) if use.fileno() >= 0}


def inherit(name: str, fd: int) -> None:
    """The next `NameInUse` of it gets it: another process has it, and has sent its descriptor.

    The descriptor is ours from here on.
    """
    _inherited[name] = socket.socket(fileno=fd)


def drop_inherited() -> None:
    """Give up what was inherited, and no `NameInUse` has got: they are their first owner's."""
    for sock in _inherited.values():
        sock.close()
    _inherited.clear()


def _close_in_child() -> None:
    """A child must not hold a name when its parent has died."""
    for use in list(_in_use):
        use.close()
    drop_inherited()


os.register_at_fork(after_in_child=_close_in_child)


def is_in_use(name: str) -> bool:
    """Whether a living process of this user has the name.

    A kernel that does not tell whose a socket is (no unix_diag) may tell of a stranger's.
    """
    mark = _mark_of(name).encode()
    try:
        return (mark, os.geteuid()) in _names_and_users()
    except OSError:
        names = _names_in_proc()
        return mark[1:].decode() in names


def _names_and_users() -> set[tuple[bytes, int]]:
    """(name, user) of every unix socket of this network namespace."""
    found: set[tuple[bytes, int]] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        request = _REQUEST.pack(
            socket.AF_UNIX, 0, 0xFFFFFFFF, 0, _SHOW_NAME | _SHOW_USER, 0xFFFFFFFF, 0xFFFFFFFF
        )
        length = _HEADER.size + len(request)
        sock.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = sock.recv(_RECEIVE_BYTES)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind == _DONE:
                    return found
                if kind == _ERROR or length < _HEADER.size:
                    (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-code, os.strerror(-code))
                attributes = _attributes(data[at + _HEADER.size + _ANSWER_BYTES : at + length])
                if _NAME in attributes and _USER not in attributes:
                    raise OSError("the kernel does not tell users (before Linux 5.3)")
                if _NAME in attributes:
                    found.add((attributes[_NAME], int.from_bytes(attributes[_USER], "little")))
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _names_in_proc() -> set[str]:
    """The abstract names in /proc/net/unix, without the zero that they begin with."""
    with open("/proc/thread-self/net/unix", encoding="ascii", errors="replace") as file:
        words = [line.split(maxsplit=7) for line in file]
    return {each[7].strip()[1:] for each in words if len(each) == 8 and each[7].startswith("@")}


def _mark_of(name: str) -> str:
    return f"\0pyforwarder-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
