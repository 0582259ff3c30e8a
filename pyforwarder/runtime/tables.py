"""The text tables of `show`: rows in, text out, and back.

Pure: rows are what the control socket answers.  The same header and the same order of columns
stand in the kernel's own `show` file, so what reads one reads the other: columns are separated by
blanks, a value never contains one, and a new column only ever goes to the end.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PAIR_COLUMNS: Final = (
    "ID",
    "STATE",
    "DATAPATH",
    "CLIENT",
    "LISTENER",
    "SOURCE",
    "SERVER",
    "UP_BYTES",
    "DOWN_BYTES",
    "AGE_S",
    "IDLE_S",
    "RULE",
    "DECIDED",
)

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "pairs": PAIR_COLUMNS,
    "listeners": ("NAME", "BIND", "PROTOCOL", "ACCEPTED", "OPEN", "REFUSED"),
    "rules": ("LISTENER", "RULE", "TAKEN", "REFUSED", "TO", "DECIDED", "WHY"),
    "upstreams": (
        *("UPSTREAM", "SERVER", "STATE", "PAIRS", "CONNECTS", "FAILURES"),
        *("WEIGHT", "BACKUP", "CHECKED_BY"),
    ),
    "stats": ("STAT", "VALUE"),
    "fleet": (
        *("INSTANCE", "VERSION", "SERIAL", "REFUSED", "PAIRS", "ACCEPTED", "DATAPATHS"),
        *("STARTED", "HEARD_S", "WHY"),
    ),
}

_NUMBERS: Final = frozenset(
    {"id", "up_bytes", "down_bytes", "up_packets", "down_packets", "age_s", "idle_s"}
    | {"backlog_bytes", "accepted", "open", "refused"}
)
_NOTHING: Final = "-"  # a value that is not known (yet), as in the kernel's file
_UNPRINTABLE = re.compile(r"[^!-\[\]-~]")  # blanks, controls, the backslash itself, non-ASCII
_CONTROL = re.compile(r"[^ -~]")
_SUSPECT = re.compile(r"[^\t\n -~]")
_CUT: Final = " ..."
_ESCAPE = re.compile(r"(?:\\[0-7]{3})+")


def render(what: str, rows: Iterable[Mapping[str, object]]) -> str:
    """The table of `show WHAT`: a header and a line per row, each ending in a newline."""
    return table(COLUMNS[what], rows, last_is_prose=what in ("stats", "fleet", "rules"))


def stats_rows(stats: Mapping[str, object], prefix: str = "") -> Iterator[dict[str, object]]:
    """Yield a row for each number of `show stats`, nested names joined by a dot: `closed.denied
    3`.
    """
    for name, value in stats.items():
        if isinstance(value, dict):
            yield from stats_rows(value, f"{prefix}{name}.")
        else:
            yield {"stat": f"{prefix}{name}", "value": value}


def table(
    columns: Sequence[str], rows: Iterable[Mapping[str, object]], *, last_is_prose: bool = False
) -> str:
    """Rows under a header; a row's keys are the column names in lower case.

    With `last_is_prose` the last column is for people and keeps its blanks.
    """
    keys = [column.lower() for column in columns]
    values = [[row.get(key) for key in keys] for row in rows]
    cells = [[cell(value) for value in line] for line in values]
    if last_is_prose:
        for line, shown in zip(values, cells, strict=True):
            if isinstance(line[-1], str) and line[-1]:
                shown[-1] = one_line(line[-1])
    is_number = [
        bool(values) and all(isinstance(line[i], int | float) for line in values)
        for i in range(len(keys))
    ]
    widths = [
        max(len(header), *(len(line[i]) for line in cells)) if cells else len(header)
        for i, header in enumerate(columns)
    ]
    return "".join(
        " ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, is_number, strict=True)
        ).rstrip()
        + "\n"
        for line in ([*columns], *cells)
    )


def cell(value: object) -> str:
    """Return a value as a table shows it: never empty, never with a blank in it.

    Seconds are whole ones, rounded down.  What is not printable ASCII becomes `\\ooo` per UTF-8
    byte as in /proc/mounts: names come from clients, and a terminal must not obey them.
    """
    match value:
        case None | "":
            return _NOTHING
        case bool():
            return "yes" if value else "no"
        case float():
            return str(int(value))
        case _:
            return _UNPRINTABLE.sub(_octal, str(value))


def printable(text: str) -> str:
    """A text for people, blanks and all; what a terminal might obey is escaped as in `cell`."""
    return _CONTROL.sub(_octal, text)


def visible(text: str) -> str:
    """A whole output: its lines as they are, what a terminal might obey as `\\uXXXX`.

    That is every control (C0 but newline and tab, DEL, C1), every format character (those that turn
    the direction of writing among them), line separators, and what is assigned to nothing. It is
    the last thing that happens to all data and words on their way out; in
    JSON the escapes mean the same characters.
    """
    return _SUSPECT.sub(_unicode_escape, text)


def single_line(text: str, *, most: int = 500) -> str:
    """A text that may come from outside (an error, a log), as one line: its lines joined by `; `.

    Longer than `most` characters it is cut, and ends in ` ...`. Every text from outside that goes
    into one line of a log, a table, a file or a report goes through here, or through `one_line`;
    the whole is below `-v` and at level debug.
    """
    lines = text.splitlines()
    if len(lines) > 1:
        line = "; ".join(stripped for line in lines if (stripped := line.strip()))
    else:
        line = lines[0] if lines else ""
    return line if len(line) <= most else line[: most - len(_CUT)].rstrip() + _CUT


def one_line(text: str, *, most: int = 500) -> str:
    """Return a text as one line that a terminal may read: printable ASCII, the rest escaped as in
    `cell`.
    """
    return printable(single_line(text, most=most))


def parse(text: str) -> list[dict[str, str]]:
    """The rows of a table, keys in lower case, values as text; what `render` escaped is back.

    Lines that begin with `#` are remarks and skipped.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return []
    keys = lines[0].lower().split()
    return [
        dict(zip(keys, (_ESCAPE.sub(_from_octal, field) for field in line.split()), strict=False))
        for line in lines[1:]
    ]


def rows_from_text(text: str) -> list[dict[str, object]]:
    """The rows of the kernel's `show` or `listeners`, with their numbers as numbers."""
    return [
        {key: _number(value) if key in _NUMBERS else value for key, value in row.items()}
        for row in parse(text)
    ]


# Groups of `stats` that have no line while nothing happened.
MAY_HAVE_NO_LINE: Final = ("closed", "limited", "splice_invalid", "express", "express_left")


def stats_from_text(text: str) -> dict[str, object]:
    """The kernel's `stats` as the daemon answers it: a dot in a name is a level."""
    stats: dict[str, Any] = {}
    for line in text.splitlines()[1:]:
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        group, dot, member = name.partition(".")
        where = stats.setdefault(group, {}) if dot else stats
        where[member or group] = _number(_ESCAPE.sub(_from_octal, value.strip()))
    for group in MAY_HAVE_NO_LINE:
        stats.setdefault(group, {})
    return stats


def _number(text: str) -> object:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def _octal(match: re.Match[str]) -> str:
    return "".join(f"\\{byte:03o}" for byte in match.group().encode())


def _unicode_escape(match: re.Match[str]) -> str:
    character = match.group()
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _from_octal(match: re.Match[str]) -> str:
    escapes = match.group()
    data = bytes(int(escapes[i + 1 : i + 4], 8) & 0xFF for i in range(0, len(escapes), 4))
    return data.decode(errors="replace")
