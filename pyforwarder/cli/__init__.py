"""The command line: `pyforwarder COMMAND ...`.

One file per group of commands; `command.py` is what they share.  At import time nothing here needs
more than click, so that `--help` is fast and works where bcc is not installed: a command
imports what else it needs when it runs (a test holds us to it).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pyforwarder.cli import connecting, deciding, fleet, lifecycle, pairs, proving, showing
from pyforwarder.cli.command import root, run
from pyforwarder.runtime import collecting
from pyforwarder.runtime.environment import Environment

if TYPE_CHECKING:
    from collections.abc import Sequence

for _command in (
    lifecycle.up,
    lifecycle.down,
    showing.show,
    showing.top,
    lifecycle.reload,
    lifecycle.upgrade,
    lifecycle.server,
    pairs.flush,
    pairs.forward,
    deciding.explain,
    connecting.connect,
    connecting.token,
    connecting.password,
    deciding.check,
    proving.doctor,
    proving.demo,
    fleet.fleet,
    fleet.register,
):
    root.add_command(_command)


def main(arguments: Sequence[str] | None = None, env: Environment | None = None) -> int:
    """Run one command line and return its exit code.

    0 done, 1 failed, 2 usage or configuration error, 3 no such instance is running.
    """
    collecting.seldom()
    return run(
        list(sys.argv[1:] if arguments is None else arguments),
        Environment.of_process() if env is None else env,
    )
