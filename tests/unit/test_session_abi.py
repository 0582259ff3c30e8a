"""bpf/sessions.h and its mirror in Python: every structure, field, enumerator and constant."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Final

from pyforwarder.datapath.splice import session_abi, session_maps
from tests.helpers import mirrors

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
    assert mirrors.structures_of("sessions.h") == STRUCTURES.keys()
    named = re.findall(r"\bPF_SESSION_\w+", mirrors.without_comments("sessions.h"))
    assert set(named) == NUMBERS.keys()
    expected = mirrors.layout(STRUCTURES) | NUMBERS
    assert mirrors.compiled("sessions.h", expected, tmp_path) == expected


def test_no_cache_line_is_of_two_sessions_or_directions() -> None:
    assert ctypes.sizeof(session_abi.SessionRecord) % 64 == 0
    assert ctypes.sizeof(session_abi.SessionDirection) % 64 == 0


def test_there_is_room_for_twice_as_many_sessions_as_may_be() -> None:
    """They are dealt out to workers unevenly, and each worker has a share of its own."""
    assert session_maps.room_for(10_000, 2) == 20_000
    assert session_maps.room_for(10, 4) == 4096
    assert session_maps.room_for(0, 2) == 1 << 17
