"""What the shell offers for an argument: the instances of this host, and what a running one has.

The completions that `scripts/install` writes ask the command itself, at every Tab.  So it answers
within a second or says nothing; where there is nothing to offer there is no error either.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from click.shell_completion import CompletionItem

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.instance import RUN_DIR

if TYPE_CHECKING:
    import click

    from pyforwarder.cli.command import Call
    from pyforwarder.client import ControlClient

_ANSWER_S: Final = 1.0


def instances(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Instances that run, or have left something."""
    call = _call(context)
    root = call.env.environ.get("PYFORWARDER_RUN_DIR") or RUN_DIR if call else RUN_DIR
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        names = []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def listeners(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The listeners of the running instance, with their addresses."""
    try:
        rows = _control(context).listeners()
    except (ForwarderError, LookupError):
        return []
    return [
        CompletionItem(row["name"], help=row["bind"])
        for row in rows
        if row["name"].startswith(incomplete)
    ]


def servers(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The servers of the running instance's upstreams, with what they are doing."""
    try:
        rows = _control(context).upstreams()
    except (ForwarderError, LookupError):
        return []
    names = [(f"{row['upstream']}/{row['server']}", row["state"]) for row in rows]
    return [
        CompletionItem(name, help=state) for name, state in names if name.startswith(incomplete)
    ]


def pair_ids(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The pairs of the running instance, with both their ends."""
    try:
        rows = _control(context).pairs()
    except (ForwarderError, LookupError):
        return []
    return [
        CompletionItem(str(row["id"]), help=f"{row['client']} to {row['server']}")
        for row in rows
        if str(row["id"]).startswith(incomplete)
    ]


def _call(context: click.Context) -> Call | None:
    from pyforwarder.cli.command import Call

    return context.find_object(Call)


def _control(context: click.Context) -> ControlClient:
    call = _call(context)
    if call is None:
        raise LookupError("no command runs")
    return call.control(timeout_s=_ANSWER_S)
