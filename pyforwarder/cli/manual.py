"""The manual pages and the shell completions, made from the command line and the models.

    python -m pyforwarder.cli.manual DIRECTORY      # such as /usr/local/share

writes `man/man1/pyforwarder.1`, `man/man5/pyforwarder.yaml.5`,
`bash-completion/completions/pyforwarder`, `zsh/site-functions/_pyforwarder` and
`fish/vendor_completions.d/pyforwarder.fish` below it.

(click-man makes pages from click too, but leaves the examples out and lets a line of text that
begins with a dot become a roff request.)
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import get_completion_class

from pyforwarder import __version__
from pyforwarder.cli.configuration_manual import configuration_page
from pyforwarder.cli.roff import entries, escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM: Final = "pyforwarder"
_COMPLETIONS: Final = {
    "bash": "bash-completion/completions/pyforwarder",
    "zsh": "zsh/site-functions/_pyforwarder",
    "fish": "fish/vendor_completions.d/pyforwarder.fish",
}
# What no command's help says.
_EXIT_STATUS: Final = (
    ("0", "done"),
    ("1", "failed"),
    ("2", "usage or configuration error"),
    ("3", "no such instance is running"),
)
_FILES: Final = (
    ("/run/pyforwarder/NAME/control", "the control socket of the instance NAME"),
    ("/run/pyforwarder/NAME/proc/", "what it does, to be read and written like /proc"),
    ("/sys/fs/bpf/pyforwarder/NAME/", "its pinned BPF objects; `show` there can be read"),
)
_ENVIRONMENT: Final = (
    ("PYFORWARDER_RUN_DIR", "replaces /run/pyforwarder"),
    ("PYFORWARDER_BPFFS", "replaces /sys/fs/bpf/pyforwarder"),
    ("PYFORWARDER_STATE_DIR", "replaces /var/lib/pyforwarder"),
)


def manual_page(root: click.Group) -> str:
    """The page pyforwarder(1) in roff: every command with its options and its example."""
    summary = (root.help or "").split("\n\n")[0].replace("\n", " ").strip().rstrip(".")
    lines = [
        f'.TH PYFORWARDER 1 "" "pyforwarder {escape(__version__)}" "User Commands"',
        ".SH NAME",
        rf"{PROGRAM} \- {escape(summary)}",
        ".SH SYNOPSIS",
        f".B {PROGRAM}",
        escape("COMMAND [OPTIONS] [ARGUMENTS]"),
        ".SH DESCRIPTION",
        *_prose(root.help or ""),
        ".SH COMMANDS",
    ]
    with click.Context(root, info_name=PROGRAM) as context:
        common = {option for parameter in root.get_params(context) for option in parameter.opts}
        for name in root.list_commands(context):
            command = root.get_command(context, name)
            if command is not None and not command.hidden:
                lines += _commands(command, click.Context(command, context, info_name=name), common)
        lines += [
            '.SH "OPTIONS OF EVERY COMMAND"',
            *entries(_records(root.get_params(context), context)),
        ]
    for title, paragraph in (
        ("EXIT STATUS", _EXIT_STATUS),
        ("FILES", _FILES),
        ("ENVIRONMENT", _ENVIRONMENT),
    ):
        lines += [f'.SH "{title}"', *entries(paragraph)]
    lines += ['.SH "SEE ALSO"', r"\fBpyforwarder.yaml\fR(5)"]
    return "\n".join(lines) + "\n"


def completion(root: click.Command, shell: str) -> str:
    """The script that makes `shell` (bash, zsh or fish) complete our commands and options.

    Raises:
        ValueError: click knows no such shell.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"no completion for {shell}")
    script = kind(root, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source()
    return script.strip() + "\n"


def write_all(root: click.Group, directory: Path) -> list[Path]:
    """Write the pages and the completions below `directory`; returns what was written."""
    texts = {
        "man/man1/pyforwarder.1": manual_page(root),
        "man/man5/pyforwarder.yaml.5": configuration_page(),
    }
    texts |= {path: completion(root, shell) for shell, path in _COMPLETIONS.items()}
    written = []
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pyforwarder.cli.manual DIRECTORY`: write them all, print their paths."""
    from pyforwarder.cli.command import root

    parser = argparse.ArgumentParser(
        prog="python -m pyforwarder.cli.manual",
        description="Write pyforwarder's manual pages and shell completions.",
    )
    parser.add_argument("directory", type=Path, help="such as /usr/local/share")
    for path in write_all(root, parser.parse_args(arguments).directory):
        print(path)
    return 0


def _commands(command: click.Command, context: click.Context, common: set[str]) -> Iterator[str]:
    """One command, and those of a group."""
    yield from _command(command, context, common)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, click.Context(inner, context, info_name=name), common)


def _command(command: click.Command, context: click.Context, common: set[str]) -> Iterator[str]:
    """One command: what it is called with, what it does, its own options, its example."""
    usage = " ".join(command.collect_usage_pieces(context))
    _, _, name = context.command_path.partition(" ")
    yield f'.SS "{escape(name)}"'
    yield rf"\fB{PROGRAM} {escape(name)}\fR {escape(usage)}"
    yield from _prose(command.help or "")
    own = [option for option in command.get_params(context) if common.isdisjoint(option.opts)]
    yield from entries(_records(own, context))
    yield from _prose(command.epilog or "")


def _records(
    parameters: Sequence[click.Parameter], context: click.Context
) -> list[tuple[str, str]]:
    """(how it is written, what it means) of each one that has more to say than its name."""
    records = (parameter.get_help_record(context) for parameter in parameters)
    return [record for record in records if record is not None and record[1]]


def _prose(text: str) -> Iterator[str]:
    """Paragraphs of click's help; one that begins with \\b keeps its lines."""
    for paragraph in textwrap.dedent(text).strip("\n").split("\n\n"):
        if not paragraph.strip():
            continue
        yield ".PP"
        if paragraph.lstrip().startswith("\b"):
            yield ".nf"
            yield escape(paragraph.lstrip().removeprefix("\b").strip("\n"))
            yield ".fi"
        else:
            yield escape(" ".join(paragraph.split()))


if __name__ == "__main__":
    raise SystemExit(main())
