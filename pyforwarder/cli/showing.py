"""Commands that only read: show, top."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, cast

import click

from pyforwarder.cli.command import DONE, Call, command
from pyforwarder.errors import NotRunningError, UsageError
from pyforwarder.runtime import tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.client import Json, What

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"  # home, screen, scroll-back: ECMA-48 ED, the last one xterm's


@command(
    example="pyforwarder show\npyforwarder show stats --json\npyforwarder show listeners --watch"
)
@click.argument("what", type=click.Choice(tuple(tables.COLUMNS)), default="pairs")
@click.option("--fleet", "of_fleet", is_flag=True, help="The machines of the fleet: `show fleet`.")
@click.option("--json", "as_json", is_flag=True, help="The same rows as JSON, every field.")
@click.option("--watch", is_flag=True, help="Again and again until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    metavar="SECONDS",
    help="Between two looks with --watch.  [default: 1]",
)
def show(call: Call, what: str, of_fleet: bool, as_json: bool, watch: bool, interval: float) -> int:
    """Print pairs, listeners, rules, upstreams, stats or the fleet.

    With --watch a terminal is drawn anew each time; elsewhere tables follow each other with an
    empty line between them, and --json prints one line per look.

    A daemon that was killed leaves pairs, listeners and stats in the kernel: `show` prints those,
    and says so on stderr and with exit code 3.
    """
    if of_fleet:
        if what not in ("pairs", "fleet"):
            raise UsageError("show --fleet lists machines, and nothing else")
        what = "fleet"
    kind = cast("What", what)
    control = call.control()
    if not watch:
        try:
            result = control.show(kind)
        except NotRunningError:
            _show_leftovers(call, what, as_json=as_json)
            raise
        call.write(_text(what, result, as_json=as_json, indent=2))
        return DONE
    _watch(call, kind, as_json=as_json, interval_s=interval)
    return DONE


def _watch(call: Call, what: What, *, as_json: bool, interval_s: float) -> None:
    """Print it again and again, until Ctrl-C."""
    control = call.control()
    is_screen = call.env.stdout.isatty() and not as_json
    separator = ""
    try:
        while True:
            text = _text(what, control.show(what), as_json=as_json, indent=None)
            if is_screen:
                call.env.stdout.write(_CLEAR)
            call.write(text if is_screen else separator + text)
            separator = "" if as_json else "\n"
            call.env.sleep(interval_s)
    except KeyboardInterrupt:  # the way to end it, not a failure
        return


def _text(what: str, result: Json, *, as_json: bool, indent: int | None) -> str:
    if as_json:
        return json.dumps(result, indent=indent) + "\n"
    if what == "stats":
        return tables.render(what, tables.stats_rows(cast("Mapping[str, object]", result)))
    return tables.render(what, cast("Sequence[Mapping[str, object]]", result))


# What of it the kernel prints by itself, and how its text becomes what the daemon would say.
_PINNED: Final[Mapping[str, tuple[str, Callable[[str], object]]]] = {
    "pairs": ("show", tables.rows_from_text),
    "listeners": ("listeners", tables.rows_from_text),
    "stats": ("stats", tables.stats_from_text),
}


def _show_leftovers(call: Call, what: str, *, as_json: bool) -> None:
    """Print the pinned table of a daemon that is gone, if there is one."""
    if what not in _PINNED:
        return
    name, parse = _PINNED[what]
    pinned = call.instance.bpffs_dir / name
    try:
        text = pinned.read_text(errors="replace")
    except OSError:
        return
    call.say(f"pyforwarder: read from {pinned}, which a daemon that is gone has left:")
    call.write(json.dumps(parse(text), indent=2) + "\n" if as_json else text)


@command(example="pyforwarder top\npyforwarder top --interval 0.5")
@click.option("--fleet", "of_fleet", is_flag=True, help="The machines of the fleet instead.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=60),
    default=1.0,
    metavar="SECONDS",
    help="Between two looks.  [default: 1]",
)
def top(call: Call, of_fleet: bool, interval: float) -> int:
    """Watch the pairs live: by rate, with totals and refusals.

    Keys sort, filter and flush; h lists them.  With --fleet it is the table of `show --fleet`,
    again and again until Ctrl-C.
    """
    import os

    if not (call.env.stdout.isatty() and os.isatty(call.env.stdin_fd)):
        raise UsageError("top needs a terminal; `show --watch` writes to a pipe")
    if of_fleet:
        _watch(call, "fleet", as_json=False, interval_s=interval)
        return DONE
    from pyforwarder.cli import top_screen

    return top_screen.run(call.env, call.control(timeout_s=2.0), interval_s=interval)
