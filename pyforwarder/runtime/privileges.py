"""How a process becomes an unprivileged one, for good."""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
from typing import Final

from pyforwarder.errors import ForwarderError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38


def give_up_privileges(user: str | None) -> None:
    """Become `user`, for good.

    Raises:
        ForwarderError: there is no such user.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if user is not None and os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise ForwarderError(f"no user {user!r} on this host") from None
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        # Leaving uid 0 clears every capability set (capabilities(7)).
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Changing the user has cleared the parent-death signal: set it after.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
