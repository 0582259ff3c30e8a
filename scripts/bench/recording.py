"""Puts the medians of a run into docs/benchmarks.json, of which tables are made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bench.results import Results

FILE: Final = Path(__file__).parents[2] / "docs" / "benchmarks.json"
_DIGITS: Final = 3  # of a number that matter: no run is more exact
_VERSION: Final = re.compile(r"\d+\.\d+")


def as_run(results: Results, command: str) -> dict[str, Any]:
    """The run as the file has it: those targets that have a number, None where they have none."""
    rows = results.measured()
    targets = [
        target
        for target in results.targets
        if any(results.median(measure.key, target) is not None for measure in rows)
    ]
    return {
        "command": command,
        "recorded": results.machine.get("date", "")[:10],
        "kernel": _short(results.machine.get("kernel", "")),
        "targets": [_name(results, target) for target in targets],
        "rows": [
            {
                "key": measure.key,
                "measure": measure.title,
                "unit": measure.unit,
                "values": [_rounded(results.median(measure.key, target)) for target in targets],
            }
            for measure in rows
        ],
    }


def record(results: Results, name: str, command: str, file: Path = FILE) -> None:
    """Put the run of that name there, in the place of an earlier one; the others stay."""
    document = json.loads(file.read_text(encoding="utf-8"))
    document["runs"][name] = as_run(results, command)
    file.write_text(_text(document), encoding="utf-8")


def _short(kernel: str) -> str:
    """Linux and two numbers."""
    found = _VERSION.search(kernel)
    return f"Linux {found[0]}" if found else kernel


def _name(results: Results, target: str) -> str:
    found = _VERSION.search(results.machine.get(target, ""))
    return f"{target} {found[0]}" if found else target


def _rounded(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() else short


def _text(document: dict[str, Any]) -> str:
    """As JSON, a row on a line."""
    lines = ["{"]
    for key, value in document.items():
        if key != "runs":
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)},")
            continue
        lines.append('  "runs": {')
        for name, run in value.items():
            lines.append(f"    {json.dumps(name)}: {{")
            lines += [
                f"      {json.dumps(part)}: {json.dumps(run[part])},"
                for part in run
                if part != "rows"
            ]
            lines.append('      "rows": [')
            lines += [f"        {json.dumps(row)}," for row in run["rows"]]
            lines[-1] = lines[-1].removesuffix(",")
            lines += ["      ]", "    },"]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  },")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join((*lines, "}")) + "\n"
