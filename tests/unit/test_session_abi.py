"""bpf/sessions.h and its mirror in Python: every structure, field, enumerator and constant."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Final

from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.datapath.splice import session_abi, session_maps

STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "session_direction": session_abi.SessionDirection,
    "session": session_abi.SessionRecord,
}
NUMBERS: Final = {
    "PF_SESSION_VERSION": session_abi.SESSION_VERSION,
    "PF_SESSION_NOW": session_abi.NOW,
    **{f"PF_SESSION_{state.name}": state for state in session_abi.SessionState},
}


def test_the_mirror_is_as_the_compiler_has_it(tmp_path: Path) -> None:
    header = (bpf_directory() / "sessions.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    assert set(re.findall(r"^struct (\w+) \{", header, re.MULTILINE)) == STRUCTURES.keys()
    assert set(re.findall(r"\bPF_SESSION_\w+", header)) == NUMBERS.keys()
    said, expected = [], []
    for name, structure in STRUCTURES.items():
        said.append(f"sizeof(struct {name})")
        expected.append(ctypes.sizeof(structure))
        for field in (entry[0] for entry in structure._fields_):
            said.append(f"offsetof(struct {name}, {field.rstrip('_')})")
            expected.append(getattr(structure, field).offset)
    for name, number in NUMBERS.items():
        said.append(name)
        expected.append(int(number))
    prints = "\n".join(f'printf("%lld\\n", (long long)({one}));' for one in said)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "sessions.h"\nint main(void) {{\n{prints}\nreturn 0;\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run(
        ["cc", "-Wall", "-Werror", f"-I{bpf_directory()}", "-o", program, source], check=True
    )
    lines = subprocess.run([program], capture_output=True, check=True).stdout.split()
    assert [int(line) for line in lines] == expected


def test_no_cache_line_is_of_two_sessions_or_directions() -> None:
    assert ctypes.sizeof(session_abi.SessionRecord) % 64 == 0
    assert ctypes.sizeof(session_abi.SessionDirection) % 64 == 0


def test_there_is_room_for_twice_as_many_sessions_as_may_be() -> None:
    """They are dealt out to workers unevenly, and each worker has a share of its own."""
    assert session_maps.room_for(10_000, 2) == 20_000
    assert session_maps.room_for(10, 4) == 4096
    assert session_maps.room_for(0, 2) == 1 << 17
