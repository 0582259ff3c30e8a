"""What `doctor --json` must say in a guest. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

GOOD = "works"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a kernel must be able to do: each datapath by its name, and the ways of doing it."""

    copy: str = GOOD
    sockmap: str = GOOD
    splice: str = GOOD
    auto: str = "splice"
    attach: str = "tcx"
    view: str = "map iterators"
    lockdown: str = "none"


def facts(said: Mapping[str, Any]) -> dict[str, str]:
    """What a guest's `doctor --json` says, in the words of `Expected`."""
    found = {
        name: GOOD if entry["works"] else f"broken: {entry['reason']}"
        for name, entry in said["datapaths"].items()
    }
    found["auto"] = said["auto"] or "none"
    for finding in said["findings"]:
        if finding["name"] in {"attach", "lockdown"}:
            found[finding["name"]] = finding["detail"].partition(":")[0]
        elif finding["name"] == "view":
            way = re.match(r"printed by the kernel, by (?:the )?([^(;:]+)", finding["detail"])
            found["view"] = way[1].strip() if way else f"none: {finding['detail']}"
    return found


def differences(expected: Expected, said: Mapping[str, Any]) -> list[str]:
    """One line for each thing that a guest's doctor says otherwise, or not at all."""
    found = facts(said)
    return [
        f"{name}: expected {word}, doctor says {found.get(name, 'nothing')}"
        for name, word in asdict(expected).items()
        if found.get(name) != word
    ]
