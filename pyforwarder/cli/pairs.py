"""Commands that act on pairs: flush, forward."""

from __future__ import annotations

import re

import click

from pyforwarder.cli.command import DONE, FAILED, Call, command
from pyforwarder.cli.completion import pair_ids
from pyforwarder.errors import UsageError


def _pair_id(text: str) -> int:
    """An id from the first column of `show`."""
    if re.fullmatch("[0-9]{1,19}", text):
        return int(text)
    raise click.BadParameter(
        f"{text!r} is no id: write the numbers in the first column of `pyforwarder show`"
        + (", or --all" if text in ("all", "*") else "")
    )


@command(example="pyforwarder flush 12 17\npyforwarder flush --all")
@click.argument("ids", metavar="ID...", nargs=-1, type=_pair_id, shell_complete=pair_ids)
@click.option("--all", "every", is_flag=True, help="Reset every pair.")
def flush(call: Call, ids: tuple[int, ...], every: bool) -> int:
    """Reset pairs, both connections of each.

    Prints the ids that were reset, one per line.  Fails if one of the ids is no pair's (the
    others are reset all the same).
    """
    if bool(ids) == every:
        raise UsageError("flush: name ids or say --all" if not ids else "flush: ids or --all")
    control = call.control()
    answer = control.flush_all() if every else control.flush(ids)
    call.write("".join(f"{pair_id}\n" for pair_id in answer["flushed"]))
    if unknown := answer["unknown"]:
        call.say(f"pyforwarder: no such pair: {' '.join(map(str, unknown))}")
        return FAILED
    return DONE


@command(example="pyforwarder forward 4242 7 9")
@click.argument("pid", type=click.IntRange(min=1))
@click.argument("fd_a", metavar="FD", type=click.IntRange(min=0))
@click.argument("fd_b", metavar="FD", type=click.IntRange(min=0))
def forward(call: Call, pid: int, fd_a: int, fd_b: int) -> int:
    """Join two connected sockets of another process.

    The kernel moves the bytes from then on, up being from the first to the second.  Prints the
    new pair's id.  That process closes its own descriptors afterwards and must not read or write
    them any more.
    """
    if fd_a == fd_b:
        raise UsageError("forward: the two descriptors are the same")
    call.write(f"{call.control().forward(pid, fd_a, fd_b)}\n")
    return DONE
