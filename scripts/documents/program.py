"""Lists that the program has: metrics, commands, reasons, the table of a connection's life."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

import pyforwarder
from documents.markdown import code, table
from pyforwarder.cli.command import root
from pyforwarder.core.connection import diagram
from pyforwarder.core.session import session_diagram
from pyforwarder.datapath.base import PairReason
from pyforwarder.runtime.counters import Counters
from pyforwarder.runtime.limits import Limit
from pyforwarder.status.metrics import ForwarderCollector, Source

_PACKAGE: Final = Path(pyforwarder.__file__).parent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric


def life(_: str) -> str:
    """The table of a connection's life, as the worker obeys it."""
    return "\n".join(f"    {line}" for line in diagram().splitlines())


def session(_: str) -> str:
    """The tables of a UDP session's life, likewise."""
    lines = session_diagram().splitlines()
    return "\n".join(f"    {line}".rstrip() for line in lines)


def metrics(_: str) -> str:
    """A row for each metric, as a scrape has them."""
    return table(
        ("Metric", "Kind", "Labels", "Meaning"),
        [
            (code(_name(metric)), metric.type, _labels(metric), metric.documentation)
            for metric in sorted(collected(), key=lambda metric: str(metric.name))
        ],
    )


def collected() -> list[Metric]:
    """The metrics of a daemon with one listener and one rule that has done nothing yet."""
    source = Source(
        version="0",
        started_unix_s=0.0,
        workers=1,
        counters=Counters(Counters.memory(1)),
        windows=(),
        listeners={"main": 128},
        rules={("main", "named"): 132},
        servers={("web", "10.0.0.1:443"): 140},
        upstreams={"web": 160},
        datapaths={"copy": "available"},
        fleet=[
            {
                "instance": "one",
                "version": "0",
                "serial": 0,
                "refused": 0,
                "pairs": 0,
                "datapaths": ["copy"],
                "unavailable": {},
            }
        ],
        exchanges=[{"part": "health", "answered_s": 0.0, "unusable": 0}],
    )
    return list(ForwarderCollector(source).collect())


def limits(_: str) -> str:
    """The names of the limits, as the log and the metrics have them."""
    return ", ".join(code(limit.value) for limit in Limit)


def pair_reasons(_: str) -> str:
    """Why a pair is on its datapath."""
    return "\n".join(f"* {reason.text}" for reason in PairReason)


def commands(_: str) -> str:
    """A row for each command."""
    return table(
        ("Command", "What it does"),
        [
            (code(" ".join([name, *_arguments(command)])), (command.help or "").split("\n\n")[0])
            for name, command in root.commands.items()
            if not command.hidden
        ],
    )


def _arguments(command: click.Command) -> Iterator[str]:
    """What stands behind a command's name; click's own way to write it depends on its version."""
    if isinstance(command, click.Group):
        yield "COMMAND ..."
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words = parameter.metavar or (
                "|".join(map(str, parameter.type.choices))
                if isinstance(parameter.type, click.Choice)
                else (parameter.name or "").upper()
            )
            is_optional = not parameter.required and not words.startswith("[")
            yield f"[{words}]" if is_optional else words


def files(directory: str) -> str:
    """A line for each package in a directory, of the package or of the tree, and one for each of
    its files: the first paragraph of the text at its top. `.` is the package's own directory.

    Raises:
        KeyError: there is no such directory.
    """
    paths = [top / directory for top in (_PACKAGE, _PACKAGE.parent) if (top / directory).is_dir()]
    if not paths:
        raise KeyError(directory)
    rows = [
        (code(f"{path.parent.name}/"), first_paragraph(path))
        for path in sorted(paths[0].glob("*/__init__.py"))
        if directory != "." and path.read_text()  # those of the package are layers, in a table
    ]
    for path in sorted(paths[0].iterdir()):
        about = first_paragraph(path) if path.is_file() else ""
        if about and path.name not in ("__init__.py", "__main__.py"):
            rows.append((code(path.name), about))
    name = "pyforwarder" if directory == "." else directory
    return table((f"`{name}/`", ""), rows)


def first_paragraph(path: Path) -> str:
    """What a file of source says about itself at its top, in one line; "" if it is none.

    Knows Python's docstrings and the comments of C, of JavaScript, and of shell scripts (which have
    no suffix here).
    """
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
    elif path.suffix == ".c":
        found = re.search(r"/\*\n(.*?)\*/", path.read_text(), re.DOTALL)
        text = re.sub(r"^ \* ?", "", found[1], flags=re.MULTILINE) if found else ""
    elif path.suffix == ".js":
        text = _comment(path.read_text(), "//")
    elif not path.suffix:
        _, _, rest = path.read_text().partition("\n")
        text = _comment(rest, "#") if path.read_text().startswith("#!") else ""
    else:
        text = ""
    return " ".join(text.split("\n\n")[0].split())


def _comment(text: str, mark: str) -> str:
    """The comment that a text begins with."""
    lines = itertools.takewhile(lambda line: line.startswith(mark), text.splitlines())
    return "\n".join(line.removeprefix(mark).removeprefix(" ") for line in lines)


def _name(metric: Metric) -> str:
    return metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")


def _labels(metric: Metric) -> str:
    names = dict.fromkeys(name for sample in metric.samples for name in sample.labels)
    return ", ".join(map(code, names))
