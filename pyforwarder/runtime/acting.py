"""Making a socket that is another user's: what its owner is to the rules of this host."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from typing import Final

_NOBODYS: Final = ctypes.c_uint(-1)  # no user has that number: it only asks


@contextlib.contextmanager
def acting_as(user: int, group: int) -> Iterator[None]:
    """What this thread creates in the block is that user's and that group's; nothing else changes.

    Of a socket both its inode, by which routes are chosen (ip-rule(8): uidrange), and its
    credentials, which filters of packets look at (iptables-extensions(8): owner). Another owner
    afterwards (fchown(2)) would not change the latter.
    Source: setfsuid(2); sock_alloc (net/socket.c), owner_mt (net/netfilter/xt_owner.c).

    Raises:
        OSError: EPERM, this process may not act as another user.
    """
    libc = ctypes.CDLL(None)
    with contextlib.ExitStack() as stack:
        for change, number in ((libc.setfsgid, group), (libc.setfsuid, user)):
            before = _current(change)
            stack.callback(change, ctypes.c_uint(before))
            change(ctypes.c_uint(number))
            if _current(change) != number:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        yield


def _current(change: Callable[[ctypes.c_uint], int]) -> int:
    """Return the id that is in force, without changing it: these calls answer with it whether they
    succeed or not.
    """
    return change(_NOBODYS) & 0xFFFFFFFF
