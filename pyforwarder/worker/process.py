"""A worker's process: gives up its privileges, then serves until the supervisor says otherwise.

It reads hostile bytes, so it keeps nothing that they could be used for: an unprivileged user, no
capability, no way to gain one (PR_SET_NO_NEW_PRIVS). What it needs it has inherited: map
descriptors, shared memory, and listeners that the supervisor has bound.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from pyforwarder.runtime import collecting
from pyforwarder.runtime.privileges import give_up_privileges
from pyforwarder.runtime.seccomp import confine
from pyforwarder.runtime.tables import visible
from pyforwarder.worker.obeying import Worker

if TYPE_CHECKING:
    from pyforwarder.worker.inheritance import Inheritance


def run(inheritance: Inheritance) -> None:
    """Serve; returns when the supervisor is gone or has said stop."""
    supervisor = os.getppid()
    give_up_privileges(inheritance.user)
    if os.getppid() != supervisor:
        return  # it died before the signal was set
    # Before there is a thread, and before the first byte of a client.
    unconfined = confine()
    if unconfined:
        inheritance.log.write("warning", "no_seccomp", reason=unconfined)
    worker = Worker(inheritance)
    # A connection is no reference cycle, so collections find nothing: let them be rare.
    collecting.settle((50_000, 20, 100))
    worker.loop.run()
    worker.finish()


def main(inheritance: Inheritance) -> int:
    """`run`, with an exit code; what goes wrong is printed, for the supervisor's log."""
    try:
        run(inheritance)
    except Exception:
        sys.stderr.write(visible(traceback.format_exc()))
        return 1
    return 0
