"""bpf/splice.h and its mirror in Python; and who changes the states of pairs and places."""

from __future__ import annotations

import ctypes
import enum
import re
from pathlib import Path
from typing import Final

import pytest

from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.datapath.express.connect_abi import AskState
from pyforwarder.datapath.splice import abi
from tests.helpers import mirrors

STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "splice_key": abi.SpliceKey,
    "splice_flow": abi.SpliceFlow,
    "splice_handshake": abi.SpliceHandshake,
    "splice_handshakes": abi.SpliceHandshakes,
    "splice_port": abi.SplicePort,
    "splice_ports": abi.SplicePorts,
    "splice_direction": abi.SpliceDirection,
    "splice": abi.Splice,
    "splice_event": abi.SpliceEvent,
}
NUMBERS: Final = {
    "PF_SPLICE_VERSION": abi.VERSION,
    "PF_SPLICE_PRIORITY": abi.PRIORITY,
    "PF_MAX_REPEATED_BYTES": abi.MAX_REPEATED_BYTES,
    "PF_ANSWER_PROBE": abi.PROBE,
    "PF_NO_SLOT": abi.NO_SLOT,
    "PF_HANDSHAKES_PER_SET": abi.HANDSHAKES_PER_SET,
    "PF_HANDSHAKE_SETS": abi.HANDSHAKE_SETS,
    **{f"PF_SPLICE_{state.name}": state for state in abi.SpliceState},
    **{f"PF_RESET_{one.name}": one for one in abi.ResetBy},
    **{f"PF_ROUTING_{one.name}": one for one in abi.Routing},
    **{f"PF_BUSY_{one.name}": one for one in abi.Busy},
    **{f"PF_INVALID_{one.name}": one for one in abi.Invalid},
    "PF_INVALID_KINDS": len(abi.Invalid),
}
# Of the programs alone.
ONLY_IN_C: Final = {"PF_ANSWER"}

PACKAGE: Final = Path(abi.__file__).parents[1]  # datapath/


def test_the_mirror_is_as_the_compiler_has_it(tmp_path: Path) -> None:
    declared = mirrors.structures_of("splice.h")
    assert declared == {*STRUCTURES, "splice_look"}  # that one never leaves the program
    named = set(re.findall(r"\bPF_\w+", mirrors.without_comments("splice.h")))
    assert named - ONLY_IN_C - {"PF_UP", "PF_DOWN"} == NUMBERS.keys()
    clocks = abi.SpliceClocks
    expected = mirrors.layout(STRUCTURES) | NUMBERS
    expected |= {
        "sizeof(union splice_clocks)": ctypes.sizeof(clocks),
        "offsetof(union splice_clocks, client)": clocks.client.offset,
        "offsetof(union splice_clocks, server)": clocks.server.offset,
        "offsetof(union splice_clocks, end_noticed_ns)": clocks.end_noticed_ns.offset,
    }
    assert mirrors.compiled("splice.h", expected, tmp_path) == expected


def in_the_readme(title: str) -> dict[str, set[str]]:
    """The files that write each state, from the last column of the table below that title."""
    text = (bpf_directory() / "README.md").read_text()
    table = text[text.index(f"**{title}**") :].split("\n\n")[1]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    return {row[0].strip(): set(re.findall(r"`([\w/]+\.\w+)`", row[-1])) for row in rows}


def in_the_sources(in_c: str, in_python: str) -> dict[str, set[str]]:
    """The same from the sources: the files in which the name of a state matches a pattern."""
    found: dict[str, set[str]] = {}
    for path in (*bpf_directory().glob("*.[ch]"), *PACKAGE.rglob("*.py")):
        pattern = in_python if path.suffix == ".py" else in_c
        for state in re.findall(pattern, path.read_text()):
            found.setdefault(state, set()).add(path.name)
    return found


PAIR_STATES: Final = (
    r"\bstate(?:,| =) PF_SPLICE_(\w+)",
    r"(?:set_state\([^()]*|\.state\b[^=\n]* = [^=\n]*)SpliceState\.(\w+)",
)
PLACE_STATES: Final = (
    r"(?:change_state\(\w+, [\w.]+, |WRITE_ONCE\(ask->word, [^;]*\| )PF_EXPRESS_(\w+)\)",
    r"& ~abi\.STATE_MASK \| abi\.AskState\.(\w+)",
)


@pytest.mark.parametrize(
    ("title", "states", "patterns"),
    [
        ("A pair's states.", abi.SpliceState, PAIR_STATES),
        ("A place's states.", AskState, PLACE_STATES),
    ],
)
def test_the_readme_says_of_each_state_which_files_write_it(
    title: str, states: type[enum.IntEnum], patterns: tuple[str, str]
) -> None:
    said, found = in_the_readme(title), in_the_sources(*patterns)
    if states is AskState:
        # A place becomes FREE by clearing the bits of the state, by which no name is written.
        assert (
            "&= ~(__u64)PF_EXPRESS_STATE_MASK" in (bpf_directory() / "express_places.h").read_text()
        )
        found["FREE"] = {"express_places.h"}
    assert list(said) == [state.name for state in states]
    assert said == found
