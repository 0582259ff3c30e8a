"""`down`, and `up` at once: a daemon that drains gives way to the next one.

A daemon that drains has closed its listeners, and keeps its name, its lock and its files for `show`
and a second `down`, as long as it has pairs. An `up` that comes meanwhile takes all of that from
it, as `pyforwarder upgrade` does from a daemon that serves (messages.py), and its pairs too. What
stays (a client that has no server yet) ends by the drain's deadline. Differently from an upgrade,
configuration, environment and output are the command's own, and so is the lock: `down` waits for
the one that it was said to.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.errors import ControlError, ForwarderError
from pyforwarder.runtime.instance import is_running
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.daemon_state import DaemonState
from pyforwarder.supervisor.takeover.predecessor import find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.runtime.instance import Instance
    from pyforwarder.supervisor.takeover.predecessor import Predecessor

    # A request to the running daemon, and descriptors that go with it.
    Ask = Callable[[str, Sequence[int]], object]

# A daemon that stops, or is in its last moments, has gone by then or drains; and how often it is
# looked. It resets its pairs within 5 s, and programs in the kernel decide for 1.2 s more.
_WAIT_S: Final = 10.0
_LOOK_S: Final = 0.02


def find_draining(instance: Instance, ask: Ask) -> Predecessor | None:
    """The instance's daemon, if it drains; the caller's to close.

    None: there is none, or it serves. One that is about to drain, or to end, is waited for.

    Raises:
        ForwarderError: it drains, and says why its place cannot be taken.
    """
    until_s = time.monotonic() + scaled_s(_WAIT_S)
    refused: ForwarderError | None = None
    while _runs(instance):
        state = _state(ask)
        if state is DaemonState.SERVING:
            return None
        if state is DaemonState.DRAINING:
            try:
                return _usable(find(lambda fd: ask("succeed", [fd])))
            except ForwarderError as error:
                refused = error  # it may have ended meanwhile, or another one begins
        if time.monotonic() >= until_s:
            if refused is not None:
                raise refused
            return None
        time.sleep(_LOOK_S)
    return None


def _runs(instance: Instance) -> bool:
    try:
        return is_running(instance)
    except ForwarderError:
        return False  # `up` says why the lock cannot be taken


def _state(ask: Ask) -> DaemonState | None:
    """None: nobody answers, as it has only begun, or has nearly ended."""
    try:
        answer = ask("ping", ())
    except ForwarderError:
        return None
    state = None
    if isinstance(answer, dict):
        state = answer.get("state", answer.get("standing"))  # as some builds of 0.2 call it
    try:
        return DaemonState(str(state))
    except ValueError:
        return DaemonState.SERVING  # another version, which gives way to nobody


def _usable(found: Predecessor) -> Predecessor:
    from pyforwarder.supervisor.takeover.upgrade_command import why_not_here

    reason = why_not_here(found, "wait for its end, or `pyforwarder down --now`")
    if not reason and not found.offer.is_draining:
        reason = "the running daemon does not drain"
    if reason:
        found.discard()
        raise ControlError(reason)
    for fd in (found.stdout_fd, found.stderr_fd):
        os.close(fd)  # its reader waits for the end of the last holder
    return found
